"""MCTF: criteria and matching against slow constructions, counts, steps, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import make_host, make_images
from torch import Tensor, nn

import effvit
from effvit.measure.controls import control_of
from effvit.reducers.bipartite import matching_target
from effvit.reducers.mctf import (
    POOLING,
    STEPS,
    Criteria,
    fuse_tokens,
    fusion_weights,
    pool_map,
    pooling_weights,
    two_way_matching,
)

PAPER = Criteria(1.0, 20.0, 40.0)


def slow_weight(x: Tensor, received: Tensor, size: Tensor, a: int, b: int) -> float:
    """Attractiveness of two tokens of one image, in the words of the paper."""
    similarity = (torch.cosine_similarity(x[a], x[b], dim=0).item() + 1) / 2
    information = [(1 / received[i] / (1 / received).max()).item() for i in (a, b)]
    smallness = [(1 / size[i] / (1 / size).max()).item() for i in (a, b)]
    return similarity * math.prod(information) ** (1 / 20) * math.prod(smallness) ** (1 / 40)


def parts(num_prefix: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 8, generator=generator, dtype=torch.float64)
    received = torch.rand(2, length, generator=generator, dtype=torch.float64) + 0.01
    size = torch.randint(1, 5, (2, length), generator=generator).double()
    size[:, :num_prefix] = 1
    return x, received, size


@pytest.mark.parametrize(("num_prefix", "length"), [(1, 12), (0, 9), (2, 11), (5, 14)])
def test_weights_multiply_the_three_criteria(num_prefix: int, length: int) -> None:
    x, received, size = parts(num_prefix, length)
    weights = fusion_weights(x, received, size, PAPER, num_prefix)
    patches = range(num_prefix, length)
    for image in range(2):
        expected = [
            [slow_weight(x[image], received[image], size[image], a, b) for b in patches if b % 2]
            for a in patches
            if a % 2 == 0
        ]
        torch.testing.assert_close(weights[image], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("num_prefix", "length"), [(1, 12), (0, 9), (2, 11), (5, 14)])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_half_of_the_tokens_go_each_way(num_prefix: int, length: int, r: int) -> None:
    """A token that receives another and then leaves takes it along."""
    x, received, size = parts(num_prefix, length)
    weights = fusion_weights(x, received, size, PAPER, num_prefix)
    matching = two_way_matching(weights, r, num_prefix, True, x)
    target = matching_target(matching, torch.zeros(2, length - num_prefix, dtype=torch.int64))
    in_a = [i for i in range(num_prefix, length) if i % 2 == 0]
    in_b = [i for i in range(num_prefix, length) if i % 2]
    for image in range(2):
        w = weights[image]
        into = {i: i for i in (*in_a, *in_b)}
        for row in w.max(1).values.argsort(descending=True)[: r // 2].tolist():
            into[in_a[row]] = in_b[int(w[row].argmax())]
        left = [row for row, i in enumerate(in_a) if into[i] == i]
        for column in w[left].max(0).values.argsort(descending=True)[: r - r // 2].tolist():
            into[in_b[column]] = in_a[left[int(w[left, column].argmax())]]
        ends = {i: into[into[i]] for i in into}
        kept = matching.order[image] + num_prefix
        assert [kept[place].item() for place in target[image]] == [ends[i] for i in sorted(ends)]


def test_pooled_map_sums_keys_and_averages_queries() -> None:
    """A map that is applied to tokens that were equal before says what the whole map said of them."""
    x, received, size = parts(1, 12)
    matching = two_way_matching(fusion_weights(x, received, size, PAPER, 1), 4, 1, True, x)
    weights = torch.rand(2, 3, 12, 12, dtype=torch.float64).softmax(-1)
    pooled = pool_map(weights, received, matching)
    torch.testing.assert_close(pooled.sum(-1), torch.ones(2, 3, 8, dtype=torch.float64))
    target = matching_target(matching, torch.zeros(2, 11, dtype=torch.int64))
    group = torch.cat([torch.zeros(2, 1, dtype=torch.int64), target + 1], dim=1)
    member = nn.functional.one_hot(group, 8).double()  # (2, 12, 8)
    shares = member * received.unsqueeze(-1)
    shares = shares / shares.sum(1, keepdim=True)
    torch.testing.assert_close(pooled, torch.einsum("bqt,bhqk,bku->bhtu", shares, weights, member))


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("sized", [True, False])
def test_fused_tokens_are_the_mean_or_the_largest_value_of_their_group(pooling: str, sized: bool) -> None:
    x, received, size = parts(1, 12)
    matching = two_way_matching(fusion_weights(x, received, size, PAPER, 1), 4, 1, True, x)
    weight, sizes = pooling_weights(received, size if sized else None, pooling, matching)
    fused = fuse_tokens(x, weight, matching)
    target = matching_target(matching, torch.zeros(2, 11, dtype=torch.int64))
    of = {"attention": received * size if sized else received, "size": size if sized else torch.ones_like(size)}
    for image in range(2):
        group = torch.cat([torch.zeros(1, dtype=torch.int64), target[image] + 1])
        for place in range(8):
            members = x[image, group == place]
            share = of.get(pooling, torch.ones_like(size))[image, group == place].unsqueeze(1)
            expected = members.amax(0) if pooling == "max" else (members * share).sum(0) / share.sum()
            torch.testing.assert_close(fused[image, place], expected)
            patches = (size if sized else torch.ones_like(size))[image, group == place].sum()
            torch.testing.assert_close(sizes[image, place], patches)


@pytest.mark.parametrize("step", STEPS)
def test_ten_tokens_stay_and_half_leave_at_most(step: str) -> None:
    """48 patches and a class token: 24 leave, then 12, then 3, which leaves 9 and the class token."""
    model = effvit.sparsify(make_host("class_token"), "mctf", r=40, step=step, reduce_at=(0, 1, 2, 3))
    assert model.token_counts() == [24, 12, 9, 9]
    for _, tokens in model.trace_tokens(make_images(model)):
        assert tokens.size is None or torch.equal(tokens.size[:, 1:].sum(1), torch.full((2,), 48.0))


def test_shares_are_of_the_patches() -> None:
    model = effvit.sparsify(make_host("class_token"), "mctf", r=0.25, reduce_at=(0, 1))
    assert model.token_counts()[:2] == [36, 27]


class Doubled(nn.Module):
    """A layer in place of timm's that does more than its weight says."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("host", ["class_token", "eva02", "gated_grouped", "shared_relpos"])
def test_queries_keys_and_values_apart_are_those_of_one_projection(host: str) -> None:
    model = effvit.sparsify(make_host(host), "mctf", r=0.2)
    attn: Any = model.blocks[1].attn
    x = torch.randn(2, 9, attn.proj.in_features)
    for replaced in (False, True):
        if replaced:
            if getattr(attn, "qkv", None) is None:
                break
            attn.qkv = Doubled(attn.qkv)
        for apart, together in zip((*attn._score(x), attn._values(x)), attn._project(x), strict=True):
            torch.testing.assert_close(apart, together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": "before"}, "step must be one of attention, tokens, after, got 'before'"),
        ({"pooling": "sum"}, "pooling must be one of attention, size, mean, max, got 'sum'"),
        ({"tau_info": -1}, "tau_info must be at least 0, got -1"),
        ({"tau_sim": 0, "tau_info": 0, "tau_size": 0}, "one of tau_sim, tau_info and tau_size must be above 0"),
        ({"r": 1.5}, "r must be a whole number of tokens or a share of them in"),
        ({"bidirection": 1}, "bidirection must be True or False"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        effvit.sparsify(make_host("class_token"), "mctf", **settings)


def test_control_of_tokens_that_leave_behind_the_block_is_refused() -> None:
    model = effvit.sparsify(make_host("class_token"), "mctf", r=5, step="after")
    with pytest.raises(ValueError, match="mctf acts in after, so the place at which its tokens leave is not known"):
        control_of(model)
