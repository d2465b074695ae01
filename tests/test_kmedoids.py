"""K-Medoids: the fit against a slow one, where its weights come from, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import make_host, make_images, make_model

import effvit
from effvit.reducers.kmedoids import Weigh, central_token, farthest_tokens, fit_medoids, nearest_medoid


def distances(x: torch.Tensor) -> torch.Tensor:
    return (x.unsqueeze(1) - x.unsqueeze(2)).norm(dim=-1)


def slow_fit(distance: torch.Tensor, cost: list[float], start: list[int], num_iters: int) -> list[list[int]]:
    """The fit of one image by loops, from the definition."""

    def assign(medoids: list[int]) -> list[int]:
        return [
            medoids.index(token)
            if token in medoids
            else min(range(len(medoids)), key=lambda k: float(distance[token, medoids[k]]))
            for token in range(len(distance))
        ]

    medoids = [*start]
    for _ in range(num_iters):
        cluster = assign(medoids)
        members = [[token for token, own in enumerate(cluster) if own == k] for k in range(len(medoids))]
        medoids = [min(tokens, key=lambda token: cost[token]) for tokens in members]
    return [medoids, assign(medoids)]


@pytest.mark.parametrize("num_iters", [0, 1, 4])
def test_fit_is_that_of_the_slow_one(num_iters: int) -> None:
    distance = distances(torch.randn(3, 18, 5, dtype=torch.float64))
    cost = torch.rand(3, 18, dtype=torch.float64) * distance.sum(-1)
    start = torch.stack([torch.randperm(18)[:6] for _ in range(3)])
    medoids, cluster = fit_medoids(distance, cost, start, num_iters)
    for image in range(3):
        expected = slow_fit(distance[image], cost[image].tolist(), start[image].tolist(), num_iters)
        assert [medoids[image].tolist(), cluster[image].tolist()] == expected


def test_medoids_of_equal_tokens_are_different_tokens() -> None:
    """Each is in its own cluster; officially the first takes them all, and the others become token 0."""
    medoids, cluster = fit_medoids(torch.zeros(2, 9, 9), torch.zeros(2, 9), torch.arange(4).expand(2, -1), 3)
    assert medoids.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(cluster.gather(1, medoids), torch.arange(4).expand(2, -1))


def test_of_equal_costs_the_first_token_is_the_medoid() -> None:
    distance = distances(torch.tensor([[[0.0], [1.0], [0.5], [9.0]]]))
    medoids, _ = fit_medoids(distance, torch.ones(1, 4), torch.tensor([[2, 3]]), 1)
    assert medoids.tolist() == [[0, 3]]


def test_nearest_medoid_is_the_first_of_equally_near_ones() -> None:
    distance = distances(torch.tensor([[[0.0], [1.0], [2.0]]]))
    assert nearest_medoid(distance, torch.tensor([[2, 0]])).tolist() == [[1, 0, 0]]


def test_first_medoids_are_far_from_any_of_those_before() -> None:
    """The release takes the largest of the largest distances, not of the smallest: 5 follows 4, near as they are."""
    distance = distances(torch.tensor([[[0.0], [3.0], [5.0], [8.0], [10.0], [9.0]]]))
    assert farthest_tokens(distance, torch.tensor([[0]]), 4).tolist() == [[0, 4, 5, 3]]
    assert central_token(distance).tolist() == [[2]]  # 19 to all others, as token 3, which comes later


def test_first_medoids_of_equal_tokens_are_different_tokens() -> None:
    """No token is far from any other: the first that is free comes next, and each medoid stands for itself."""
    distance = torch.zeros(1, 6, 6)
    start = farthest_tokens(distance, torch.tensor([[2]]), 4)
    assert start.tolist() == [[2, 0, 1, 3]]
    medoids, cluster = fit_medoids(distance, distance.sum(-1), start, 3)
    assert torch.equal(cluster.gather(1, medoids), torch.arange(4).expand(1, -1))


def test_weights_are_the_attention_that_tokens_get_in_the_block_before() -> None:
    """Sums over all heads and queries, the class token's among them."""
    model = make_model("kmedoids", "class_token", reduce_at=(2,), num_tokens=7, num_iters=0)
    assert sorted(model.reducers) == [1, 2]
    assert isinstance(model.reducers[1], Weigh)
    maps: list[torch.Tensor] = []
    dense = make_host("class_token")
    dense.blocks[1].attn.fused_attn = False
    dense.blocks[1].attn.attn_drop.register_forward_hook(lambda _, arguments, __: maps.append(arguments[0]))
    x = make_images(model)
    dense(x)
    expected = maps[0].sum((1, 2))[:, 1:]  # (B, N)
    trace: list[Any] = model.trace_tokens(x)
    assert torch.allclose(trace[1].tokens.carry, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(trace[2].tokens.anchor, expected.topk(7, dim=1).indices)


def test_a_block_between_two_stages_weighs_and_reduces() -> None:
    model = make_model("kmedoids", "class_token", reduce_at=(1, 2), num_tokens=(9, 4))
    assert sorted(model.reducers) == [0, 1, 2]
    assert model.token_counts() == [48, 9, 4, 4]


@pytest.mark.parametrize("rates", [[0.7, 0.5, 1.0], [1.0, 0.5, 0.5], 0.5])
def test_settings_follow_the_keep_rate_and_leave_out_blocks_that_weigh(rates: float | list[float]) -> None:
    """A model made with them keeps as many tokens."""
    model = make_model("kmedoids", "class_token", reduce_at=None)
    model.set_keep_rate(rates)
    assert make_model("kmedoids", "class_token", **model.settings).token_counts() == model.token_counts()


def test_medoids_are_tokens_as_they_were() -> None:
    model = make_model("kmedoids", "average_pool", reduce_at=(0,), num_tokens=12, equal_weight=True)
    x, _, tokens = model._start(make_images(model), memory=False)
    kept, left = model.reducers[0].keep(x, tokens, 12)  # type: ignore[operator]
    assert torch.equal(kept, torch.stack([image[index] for image, index in zip(x, left.anchor, strict=True)]))
    assert (left.size.sum(1) == 48).all()


def test_settings_out_of_range_are_named() -> None:
    host = make_host("class_token")
    message = "block 0 has none before it; begin reduce_at with 1 or later, or use equal_weight=True"
    with pytest.raises(ValueError, match=message):
        effvit.sparsify(host, "kmedoids", reduce_at=(0, 2))
    assert effvit.sparsify(host, "kmedoids", reduce_at=(0, 2), equal_weight=True).token_counts()[0] == 33
    with pytest.raises(ValueError, match="num_iters must be at least 0, got -1"):
        effvit.sparsify(host, "kmedoids", num_iters=-1)
    with pytest.raises(TypeError, match="equal_weight must be True or False, got None"):
        effvit.sparsify(host, "kmedoids", equal_weight=None)
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        effvit.sparsify(host, "kmedoids", num_tokens=0)


def test_weights_that_were_taken_out_are_missed() -> None:
    model = make_model("kmedoids", "class_token", reduce_at=(2,))
    model.blocks[1].reducer = None
    with pytest.raises(ValueError, match="kmedoids in block 2: weights are those of the attention of block 1, whose"):
        model(make_images(model))
