"""Whether a prediction stays when the image is shifted by a few pixels, with no border invented.

As in "Lost in Translation" (arXiv 2404.07153), the model sees crops of a larger image that lie a few pixels apart: what
a camera turned slightly would see. There translations are drawn at random up to a distance; here each distance is
measured by itself, in the four directions along the axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from effvit.measure.accuracy import predicted_classes
from effvit.measure.values import Consistency
from effvit.schedule import check_count

__all__ = ["SHIFTS", "central_crop", "same_predictions", "shift_consistency"]

SHIFTS = (1, 2, 3, 4)  # pixels
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # (rows, columns)


def central_crop(images: Tensor, margin: int, rows: int = 0, columns: int = 0) -> Tensor:
    """Images (..., H + 2 margin, W + 2 margin) without their margin, (..., H, W), or that crop moved so many pixels.

    Raises:
        ValueError: Images that are nothing but margin.
    """
    height, width = (side - 2 * margin for side in images.shape[-2:])
    if height < 1 or width < 1:
        raise ValueError(
            f"images must be larger than the model's by {margin} pixels on each side, which leaves nothing of "
            f"{tuple(images.shape[-2:])}; give larger images or smaller shifts"
        )
    top, left = margin + rows, margin + columns
    return images[..., top : top + height, left : left + width]


def same_predictions(model: nn.Module, images: Tensor, shifts: Sequence[int] = SHIFTS) -> Tensor:
    """How many of the four shifts of each distance leave the predicted class as it is in the middle.

    Args:
        model: Any classifier in eval mode.
        images: (B, channels, H + 2 m, W + 2 m) prepared for the model, which takes (H, W), with m the largest shift.
        shifts: Distances in pixels.

    Returns:
        (B, len(shifts)) int64 of 0 to 4.

    Raises:
        ValueError: No shift or one below 1, images that are nothing but margin, or as ``predicted_classes``.
    """
    if not shifts:
        raise ValueError("there must be a shift to measure, got none; give distances in pixels")
    margin = max(check_count("shifts", distance, 1) for distance in shifts)
    name = type(model).__name__
    middle = predicted_classes(model, central_crop(images, margin), name)
    counts = torch.zeros(len(images), len(shifts), dtype=torch.int64)
    for place, distance in enumerate(shifts):
        for rows, columns in DIRECTIONS:
            shifted = central_crop(images, margin, distance * rows, distance * columns)
            counts[:, place] += predicted_classes(model, shifted, name) == middle
    return counts


def shift_consistency(model: nn.Module, batches: Iterable[Tensor], shifts: Sequence[int] = SHIFTS) -> Consistency:
    """The share of predictions that stay under each shift, over the four directions and the images of all batches.

    Arguments and errors are those of ``same_predictions``; no images are a ValueError too.
    """
    counts = [same_predictions(model, images, shifts) for images in batches]
    if not counts:
        raise ValueError("there are no images to shift; give at least one batch")
    stayed = torch.cat(counts)
    same = stayed.double().mean(0) / len(DIRECTIONS)
    return Consistency(list(shifts), same.tolist(), len(stayed))
