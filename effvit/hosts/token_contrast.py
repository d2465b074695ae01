"""Patch token contrast: patches of one class are to be alike, others not (Token Contrast, arXiv 2303.01267)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.schedule import check_number

__all__ = ["BACKGROUND", "UNKNOWN", "activation_labels", "class_activations", "patch_contrast"]

BACKGROUND, UNKNOWN = 0, -1  # labels of patches; that of class k is k + 1


def patch_contrast(patches: Tensor, labels: Tensor) -> Tensor:
    """How unlike patches of one label are, and how alike those of different ones: a scalar in [0, 1].

    ``get_masked_ptc_loss`` of model/losses.py in rulixiang/ToCo@6d47d97 with the pairs of ``label_to_aff_mask`` in
    utils/camutils.py. Cosines count without their sign, all pairs of the batch alike, a patch beside itself not.

    Args:
        patches: (B, N, C), those of the last block.
        labels: (B, N) int64; UNKNOWN patches belong to no pair.

    Raises:
        ValueError: Other shapes.
    """
    if patches.ndim != 3 or labels.shape != patches.shape[:2]:
        raise ValueError(
            f"patches must be (B, N, C) and labels (B, N), got {tuple(patches.shape)} and {tuple(labels.shape)}"
        )
    unit = F.normalize(patches, dim=-1, eps=1e-8)
    cosine = (unit @ unit.transpose(1, 2)).abs()  # (B, N, N)
    known = labels != UNKNOWN
    pairs = (
        known.unsqueeze(2) & known.unsqueeze(1) & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    )
    same = labels.unsqueeze(2) == labels.unsqueeze(1)
    alike, unlike = pairs & same, pairs & ~same
    return 0.5 * (1 - mean_over(cosine, alike)) + 0.5 * mean_over(cosine, unlike)


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """() sum of the values where it holds, over one more than how often it does, as officially."""
    return values.where(where, 0).sum() / (where.sum() + 1)


def class_activations(patches: Tensor, weight: Tensor) -> Tensor:
    """(B, K, N) in [0, 1): how much each patch speaks for each class, over the largest of its image (CAM).

    As ``multi_scale_cam2`` of utils/camutils.py@6d47d97 makes them of one image size.

    Args:
        patches: (B, N, C).
        weight: (K, C) of a linear classifier without bias.
    """
    found = F.linear(patches, weight).relu().transpose(1, 2)  # (B, K, N)
    found = found - found.amin(-1, keepdim=True)
    return found / (found.amax(-1, keepdim=True) + 1e-5)


def activation_labels(activations: Tensor, present: Tensor, low: float = 0.25, high: float = 0.7) -> Tensor:
    """(B, N) int64 labels of patches: the class of the largest activation if above ``high``, BACKGROUND up to ``low``.

    Those between are UNKNOWN (``cam_to_label`` of utils/camutils.py@6d47d97; thresholds of its training).

    Args:
        activations: (B, K, N) of ``class_activations``.
        present: (B, K) which classes the image is labelled with; others count as 0.
        low: Up to it a patch is background.
        high: Above it a patch is of the class.

    Raises:
        ValueError: Thresholds that are not 0 <= low <= high.
    """
    if not 0 <= check_number("low", low) <= check_number("high", high):
        raise ValueError(f"thresholds must be 0 <= low <= high, got {low} and {high}")
    largest, label = (activations * present.unsqueeze(-1)).max(dim=1)  # (B, N)
    return torch.where(largest <= low, BACKGROUND, torch.where(largest <= high, UNKNOWN, label + 1))
