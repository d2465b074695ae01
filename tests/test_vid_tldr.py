"""vid-TLDR: what stands out, what is dropped and what merges in part, against a slow search; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import make_host, make_images, make_model
from slow_merging import most_similar
from torch import Tensor

import effvit
from effvit import attention
from effvit.attention import AttnState
from effvit.reducers.vid_tldr import VidTLDR, foreground_scores, map_sharpness, sharpness
from effvit.tokens import TokenMap


def slow_scores(weights: Tensor, num_prefix: int) -> list[float]:
    """Scores of the patches of one image, from its map (heads, P+N, P+N), row by row (vid-TLDR, 2403.13347)."""
    rows = weights.mean(0)[num_prefix:]
    sharp = [sum(float(a) * math.log(float(a)) for a in row) for row in rows]
    lowest = min(sharp)
    raised = [value - lowest for value in sharp]
    scaled = [value / max(raised) for value in raised]
    mean = sum(scaled) / len(scaled)
    highest = max(value - mean for value in scaled)
    return [(value - mean) / highest if value >= mean else 0.0 for value in scaled]


def slow_merge(
    x: Tensor, size: Tensor, scores: list[float], r: int, num_prefix: int
) -> tuple[Tensor, list[float], set[int]]:
    """Tokens (P+N-r, C) and sizes of one image, pair by pair, and the patches that are dropped."""
    into, best = most_similar(x[num_prefix:], num_prefix)
    merged = sorted(best, key=lambda place: -best[place])[:r]
    kept = [place for place in range(num_prefix, len(x)) if place not in merged]
    order = [place for place in kept if place % 2 == 0] + [place for place in kept if place % 2]
    tokens, sizes = [x[place] for place in range(num_prefix)], [1.0] * num_prefix
    for place in order:
        weights = {place: float(size[place])}
        weights |= {a: scores[a - num_prefix] * float(size[a]) for a in merged if into[a] == place}
        total = sum(weights.values())
        tokens.append(sum((weight * x[a] for a, weight in weights.items()), torch.zeros_like(x[0])) / total)
        sizes.append(total)
    return torch.stack(tokens), sizes, {a - num_prefix for a in merged if scores[a - num_prefix] == 0}


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("r", [1, 5, 0.4])
def test_merging_is_that_of_the_slow_search(num_prefix: int, r: float) -> None:
    """Two blocks, so that sizes differ in the second; the map that scores does not know of them."""
    length, reducer = num_prefix + 12, VidTLDR.plan(1, r=r)[0]
    x, tokens = torch.randn(3, length, 5), TokenMap.full(torch.zeros(3, length, 1), (3, 4), num_prefix, 0)
    size = torch.ones(3, length)
    for number in (12, 12 - (int(r) if r >= 1 else 4)):
        q, k = torch.randn(2, 3, 2, x.shape[1], 4)
        weights = (0.5 * q @ k.transpose(2, 3)).softmax(-1)
        merged = min(int(r if r >= 1 else r * number), number // 2)
        expected = [
            slow_merge(x[i], size[i], slow_scores(weights[i], num_prefix), merged, num_prefix) for i in range(3)
        ]
        before = tokens
        x, tokens = reducer.reduce(x, tokens, AttnState.of(q, k, k, 0.5, tokens))
        assert torch.allclose(x, torch.stack([kept for kept, _, _ in expected]), atol=1e-5)
        assert tokens.key_weight is not None
        assert torch.allclose(tokens.key_weight, torch.tensor([sizes for _, sizes, _ in expected]), atol=1e-5)
        for image, (_, _, dropped) in enumerate(expected):
            gone = {int(token) for token in before.source[image][tokens.source[image] < 0] if token >= 0}
            assert gone == dropped
        size = tokens.key_weight


def test_a_row_with_zeros_has_the_entropy_of_the_others() -> None:
    """Half on each of two keys: log(1/2); the official logarithm of 0 is NaN."""
    weights = torch.tensor([[[[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]])
    assert torch.allclose(map_sharpness(weights), torch.tensor([[math.log(0.5), 0.0]]))


def test_tokens_that_are_all_alike_are_all_foreground() -> None:
    assert foreground_scores(torch.full((2, 6), -1.5)).tolist() == [[1.0] * 6] * 2


@pytest.mark.parametrize("level", [-1.5, -0.1, -7.0])
def test_rounding_makes_no_background_of_tokens_that_are_alike(level: float) -> None:
    """Sharpness is a sum of many terms: its last bits depend on their order. A thousandth of it is a difference."""
    last_bits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]) * 2 * torch.finfo(torch.float32).eps * max(1, -level)
    assert foreground_scores(level + last_bits).tolist() == [[1.0] * 6]
    assert foreground_scores(level + 1000 * last_bits).tolist()[0] == pytest.approx([0, 1, 0, 1, 0, 0], abs=1e-2)


def test_scores_of_three_tokens_are_those_worked_by_hand() -> None:
    """The mean of 0, 3 and 6 is 3: nothing, half of nothing above it, and all."""
    assert foreground_scores(torch.tensor([[0.0, 3.0, 6.0], [0.0, 0.0, 9.0]])).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert foreground_scores(torch.tensor([[0.0, 4.0, 5.0]])).tolist() == [[0.0, 0.5, 1.0]]


def test_sharpness_by_rows_is_that_of_the_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 3, 40, 8, dtype=torch.float64)
    state = AttnState.of(q, k, k, 0.3, TokenMap.full(q[:, 0], (5, 8), 0, 0))
    expected = map_sharpness((0.3 * q @ k.transpose(2, 3)).softmax(-1))
    assert torch.allclose(sharpness(state), expected, atol=1e-12)
    monkeypatch.setattr(attention, "CACHED_ENTRIES", 1500)
    assert torch.allclose(sharpness(state), expected, atol=1e-12)


def test_an_average_over_tokens_has_no_weights_and_dropped_patches_no_part_in_it() -> None:
    """As the authors read out: the mean of the tokens left."""
    model = make_model("vid_tldr", "average_pool")
    images = make_images(model)
    x, tokens = model.forward_tokens(images)
    assert tokens.size is None
    pooled = model.fc_norm(x[:, model.num_prefix_tokens :].mean(1))
    assert torch.allclose(model.head(pooled), model(images), atol=1e-5)


@pytest.mark.parametrize(
    ("r", "counts"),
    [
        (0.25, [36, 27, 21, 16]),  # int(12.0), int(9.0), int(6.75), int(5.25)
        ([0.25, 0.1], [36, 33, 33, 33]),
        ([20, 0, 30], [28, 28, 14, 14]),  # at most half
        ([0, 3], [48, 45, 45, 45]),
    ],
)
def test_counts_are_those_of_the_official_rule(r: Any, counts: list[int]) -> None:
    assert effvit.sparsify(make_host("class_token"), "vid_tldr", r=r).token_counts() == counts


class TestRefusals:
    @pytest.mark.parametrize("r", [1.5, -0.5, 2.0, -1, True, "3", float("nan"), float("inf")])
    def test_r_that_is_neither_a_number_of_tokens_nor_a_share(self, r: Any) -> None:
        with pytest.raises(ValueError, match=r"r must be a whole number of tokens or a share of them in \(0, 1\), got"):
            make_model("vid_tldr", "class_token", r=[0.2, r])

    def test_more_values_than_blocks(self) -> None:
        with pytest.raises(ValueError, match="r has 5 values, but the model has 4 blocks"):
            make_model("vid_tldr", "class_token", r=[1] * 5)
