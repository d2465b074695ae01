"""Predictions under shifts: models whose answer is known for every crop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effvit.measure.shifts import SHIFTS, central_crop, same_predictions, shift_consistency
from effvit.measure.values import Consistency


class ReadsPixel(nn.Module):
    """Says the number in the first pixel of an image, of five."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 5).double()


def images_of(*lit: tuple[int, int]) -> Tensor:
    """An image (1, 1, 14, 16) of zeros with ones at those places as seen from the middle's first pixel, margin 4."""
    images = torch.zeros(1, 1, 14, 16)
    for row, column in lit:
        images[0, 0, 4 + row, 4 + column] = 1
    return images


def test_crops_are_what_lies_there() -> None:
    images = torch.arange(2 * 14 * 16).view(2, 1, 14, 16)
    assert torch.equal(central_crop(images, 4), images[:, :, 4:10, 4:12])
    assert torch.equal(central_crop(images, 4, -4, 3), images[:, :, 0:6, 7:15])


def test_each_direction_of_each_distance_counts() -> None:
    """A pixel that differs one to the right, and one that does three below: three of four predictions stay there."""
    counts = same_predictions(ReadsPixel(), images_of((0, 1), (3, 0)))
    assert counts.tolist() == [[3, 4, 3, 4]]
    around = images_of(*[(2 * row, 2 * column) for row, column in ((0, 1), (1, 0), (0, -1), (-1, 0))])
    assert same_predictions(ReadsPixel(), around).tolist() == [[4, 0, 4, 4]]


def test_margin_is_the_largest_shift() -> None:
    assert same_predictions(ReadsPixel(), images_of((1, 0))[..., 2:-2, 2:-2], shifts=(2, 1)).tolist() == [[4, 3]]


def test_share_is_over_directions_and_images_of_all_batches() -> None:
    images = torch.cat([images_of(), images_of((0, 1)), images_of((0, 1), (1, 0), (0, 2))])
    found = shift_consistency(ReadsPixel(), [images[:1], images[1:]])
    assert found == Consistency([1, 2, 3, 4], [(4 + 3 + 2) / 12, 11 / 12, 1, 1], 3)
    assert tuple(found.shifts) == SHIFTS


def test_prediction_that_ignores_the_place_stays() -> None:
    """The mean of a constant image is that of each of its crops."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    assert shift_consistency(model, [torch.ones(2, 3, 12, 12)], (2,)) == Consistency([2], [1.0], 2)


def test_what_cannot_be_shifted_is_refused() -> None:
    images = torch.zeros(1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"by 4 pixels on each side, which leaves nothing of \(8, 16\)"):
        same_predictions(ReadsPixel(), images)
    with pytest.raises(ValueError, match="there must be a shift to measure, got none"):
        same_predictions(ReadsPixel(), images, ())
    with pytest.raises(ValueError, match="shifts must be at least 1, got 0"):
        same_predictions(ReadsPixel(), images, (0, 1))
    with pytest.raises(ValueError, match="there are no images to shift"):
        shift_consistency(ReadsPixel(), [])
    with pytest.raises(ValueError, match="the scores of Identity must be finite"):
        same_predictions(nn.Identity(), torch.full((1, 1, 12, 12), torch.nan), (1,))
