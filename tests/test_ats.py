"""ATS: inverse transform sampling as a search over all tokens and points."""

from __future__ import annotations

import pytest
import torch
from hosts import make_model
from torch import Tensor

from effvit.attention import AttnState
from effvit.reducers.ats import ATS, GRIDS, inverse_transform_sample, significance
from effvit.tokens import TokenMap


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


def test_points_are_the_rate_of_the_patches_rounded_up() -> None:
    """Half of 49 patches are 24.5: at most 25 tokens stay."""
    assert ATS.plan(4, keep_rate=0.5)[1].count(49, 49) == 25


def test_rate_of_one_set_later_samples_nothing() -> None:
    model = make_model("ats", "class_token", keep_rate=0.5)
    model.set_keep_rate(1.0)
    assert [reducer.pick() for reducer in model.reducers.values()] == [None] * 3


@pytest.mark.parametrize("value_norm", ["concat", "per_head"])
def test_significance_is_class_attention_times_the_norm_of_the_value(value_norm: str) -> None:
    """Section 3.1, eq. 3, with the mean of the rows of class and distillation token; over its sum."""
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    tokens = TokenMap.full(torch.zeros(2, 8, 1), (2, 3), 2, 2)
    score = significance(AttnState.of(q, k, v, 0.5, tokens), value_norm)
    attention = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, :2].mean(2)
    if value_norm == "concat":
        expected = (attention.sum(1) * v.square().sum((1, 3)).sqrt())[:, 2:]
    else:
        expected = (attention * v.square().sum(3).sqrt()).sum(1)[:, 2:]
    assert torch.allclose(score, expected / expected.sum(1, keepdim=True), atol=1e-6)


def test_rate_and_number_of_points_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"keep_rate and num_tokens both set the sampling points, got 0\.5 and 10;"):
        ATS.plan(4, keep_rate=0.5, num_tokens=10)
