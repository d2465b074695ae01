"""ATS: inverse transform sampling as a search over all tokens and points."""

from __future__ import annotations

import pytest
import torch
from hosts import make_model
from torch import Tensor

from effvit.reducers.ats import GRIDS, inverse_transform_sample


def slow_sample(scores: Tensor, num_points: int, grid: str) -> set[int]:
    """Tokens of one image nearest to a point of the grid (section 3.2): every distance is looked at."""
    order = scores.argsort()
    cumulated = scores[order].cumsum(0)
    height = (cumulated - cumulated[0]) / (cumulated[-1] - cumulated[0])
    if grid == "official":  # from the smallest height above zero to 1
        points = torch.linspace(float(height[1]), 1, num_points, dtype=scores.dtype)
    else:  # the middles of equal parts of [0, 1]
        points = torch.tensor([(2 * k - 1) / (2 * num_points) for k in range(1, num_points + 1)], dtype=scores.dtype)
    nearest = (points[:, None] - height).abs().argmin(1)
    return {int(order[place]) for place in nearest}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_points", [2, 5, 12, 40])
def test_sample_is_that_of_the_slow_search(grid: str, num_points: int) -> None:
    scores = torch.rand(6, 12, dtype=torch.float64).square()
    order, picked = inverse_transform_sample(scores, num_points, grid=grid)
    found = [set(row[chosen].tolist()) for row, chosen in zip(order, picked, strict=True)]
    assert found == [slow_sample(row, num_points, grid) for row in scores]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("compat", [False, True])
def test_only_token_of_an_image_is_sampled_and_no_padding(grid: str, compat: bool) -> None:
    """The nearest token to every point is the only one there is, whatever its neighbour in the batch holds."""
    scores = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    valid = torch.tensor([[False, False, True, False], [True] * 4])
    order, picked = inverse_transform_sample(scores, 4, valid, grid, compat)
    assert order[0][picked[0]].tolist() == [2]


def test_small_image_is_sampled_at_two_points() -> None:
    """A grid from its first point to its last has two, though 0.01 of 48 patches rounds up to one."""
    assert make_model("ats", "class_token", keep_rate=0.01).token_counts() == [48, 2, 2, 2]
