"""Zero-TPrune: page rank, which heads count, how the tokens are split, and what is pruned, against a slow search."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hosts import make_model
from torch import Tensor

from effvit import attention
from effvit.attention import AttnState
from effvit.reducers.zero_tprune import (
    KEYS,
    PARTITIONS,
    ZeroTPrune,
    aggregate_heads,
    head_variance,
    page_rank_in_pieces,
    split_groups,
    start_signal,
    weighted_page_rank,
)
from effvit.tokens import TokenMap

# Times four tokens: (1, 1, 1, 1) and (2, 1, 0.5, 0.5), of variance 0 and (1 + 0 + 0.25 + 0.25) / 4 = 0.375.
FLAT, UNEVEN = (0.25, 0.25, 0.25, 0.25), (0.5, 0.25, 0.125, 0.125)


@pytest.mark.parametrize(
    ("var_range", "heads"),
    [
        ((0.0, 0.375), (FLAT, UNEVEN)),  # both ends belong to the range
        ((0.0, 0.37), (FLAT,)),
        ((0.375, 1.0), (UNEVEN,)),
        ((0.1, 0.2), (FLAT, UNEVEN)),  # none is in range: all count
        (None, (FLAT, UNEVEN)),
    ],
)
def test_heads_in_the_variance_range_count(
    var_range: tuple[float, float] | None, heads: tuple[tuple[float, ...], ...]
) -> None:
    """Section 3.2: the root mean square over the heads that are listed, by hand."""
    expected = torch.tensor(heads).square().mean(0).sqrt()
    assert torch.allclose(aggregate_heads(torch.tensor([[FLAT, UNEVEN]]), var_range)[0], expected)


@pytest.mark.parametrize(
    ("partition", "group_a", "group_b"),
    [
        ("sequential_u", [1, 3], [0, 2, 4]),
        ("sequential_i", [2, 4], [1, 3, 0]),
        ("alternate", [1, 0], [3, 2, 4]),
    ],
)
def test_groups_are_those_of_the_paper(partition: str, group_a: list[int], group_b: list[int]) -> None:
    """Section 3.3 on five tokens that rank 1, 3, 0, 2, 4 from the least important to the most, split by hand."""
    a, b = split_groups(torch.tensor([[0.3, 0.1, 0.4, 0.2, 0.5]]), partition)
    assert (a.tolist(), b.tolist()) == ([group_a], [group_b])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_pruned_look_alikes_do_not_come_back_where_no_patch_gathers_importance(partition: str) -> None:
    """All attention goes to the class token, so all patches tie at zero; pruned ones must stay out of the choice."""
    x, weights = torch.randn(16, 9, 8), torch.zeros(16, 1, 9, 9)
    weights[..., 0] = 1
    tokens, k = TokenMap.full(x, (2, 4), 1, 1), torch.randn(16, 1, 9, 8)
    state = AttnState.of(k, k, k, 1.0, tokens, x)._replace(weights=weights)
    settings = {"reduce_at": (0,), "r": 3, "num_iters": 2, "var_range": None, "partition": partition}
    left, kept = (ZeroTPrune.plan(1, keep_rate=rate, **settings)[0].reduce(x, tokens, state)[1] for rate in (1.0, 0.4))
    assert (left.num_tokens, kept.num_tokens) == (5, 2)
    assert all(set(few.tolist()) <= set(more.tolist()) for few, more in zip(kept.anchor, left.anchor, strict=True))


def slow_rank(weights: Tensor, places: list[int], votes: int, boost: float) -> Tensor:
    """Page rank of one head among the tokens at these places, of which the first is the class token; 0 elsewhere."""
    part = weights[places][:, places]
    part = part / part.sum(1, keepdim=True)
    signal = torch.tensor([boost] + [1.0] * (len(places) - 1), dtype=weights.dtype)
    signal = signal / signal.sum()
    for _ in range(votes):
        signal = part.T @ signal  # s <- A^T s, section 3.2
    return torch.zeros(len(weights), dtype=weights.dtype).index_copy(0, torch.tensor(places), signal)


def test_page_rank_without_renormalised_rows_loses_what_goes_to_the_others() -> None:
    weights = torch.randn(1, 2, 7, 7, dtype=torch.float64).softmax(-1)
    places = [0, 1, 3, 4, 6]
    kept = torch.zeros(1, 7, dtype=torch.int64).index_fill(1, torch.tensor(places), 1)
    found = weighted_page_rank(weights, 3, 2.5, 1, kept, 5, renormalise=False)
    for head, ranks in zip(weights[0], found[0], strict=True):
        part = head[places][:, places]
        expected = torch.tensor([2.5, 1, 1, 1, 1], dtype=torch.float64) @ part @ part @ part
        assert torch.allclose(ranks[places], expected / expected.sum())
        assert ranks[[2, 5]].eq(0).all()


@pytest.mark.parametrize("whole", [True, False])
def test_many_votes_that_lose_some_leave_a_ranking(whole: bool) -> None:
    """Of 49 tokens 24 left: each vote loses about half, and 2 ** -200 is no number of float32."""
    x, q, k = torch.randn(2, 50, 3), *torch.randn(2, 2, 2, 50, 4)
    reducer = ZeroTPrune.plan(1, keep_rate=0.5, reduce_at=(0,), r=24, num_iters=200, renormalise=False)[0]
    state = AttnState.of(q, k, k, 0.5, TokenMap.full(x, (7, 7), 1, 1), x)
    state = state._replace(weights=state.softmax_map()) if whole else state
    kept = torch.ones(2, 50, dtype=torch.int64).index_fill(1, torch.arange(2, 50, 2), 0)
    found = reducer.importance(state, 200, kept)
    assert torch.allclose(found, reducer.importance(state, 400, kept), rtol=1e-4)  # the votes have settled
    assert found[:, 1::2].gt(0).all()


@pytest.mark.parametrize("places", [range(7), (0, 1, 3, 4, 6)], ids=["all", "some"])
def test_page_rank_is_that_of_the_graph_of_those_left(places: range | tuple[int, ...]) -> None:
    weights = torch.randn(1, 2, 7, 7, dtype=torch.float64).softmax(-1)
    kept = torch.zeros(1, 7, dtype=torch.int64).index_fill(1, torch.tensor(places), 1)
    few = len(places) < 7
    signal = weighted_page_rank(weights, 3, 2.5, 1, kept if few else None, len(places))
    expected = torch.stack([slow_rank(head, list(places), 3, 2.5) for head in weights[0]])
    assert torch.allclose(signal[0], expected)
    variance = (expected[:, list(places)] * len(places) - 1).square().mean(1)  # of scores of mean one
    assert torch.allclose(head_variance(signal, len(places))[0], variance)


@pytest.mark.parametrize("entries", [8 * 49, 49, 20, 1], ids=["many heads", "head", "rows", "row"])
@pytest.mark.parametrize("scale", [1, 8], ids=["most held", "all held"])
def test_page_rank_in_pieces_is_that_of_the_whole_map(
    monkeypatch: pytest.MonkeyPatch, entries: int, scale: int
) -> None:
    """Seven tokens of one or eight channels, of whose four maps as much is held as six times the queries."""
    monkeypatch.setattr(attention, "CACHED_ENTRIES", entries)
    q, k = (torch.randn(2, 2, 7, scale, dtype=torch.float64) for _ in range(2))
    signal = start_signal(q[..., 0], 7, 2.5, 1)
    expected = weighted_page_rank((q @ k.transpose(-2, -1)).softmax(-1), 3, 2.5)
    assert torch.allclose(page_rank_in_pieces(q, k.transpose(2, 3), 3, signal), expected)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("r", [0, 5])
def test_importance_without_the_map_is_that_with_it(r: int, renormalise: bool) -> None:
    """The votes of those left on a map formed anew from their queries and keys, in float64."""
    x, q, k = torch.randn(3, 21, 3), *torch.randn(2, 3, 2, 21, 4, dtype=torch.float64)
    tokens = TokenMap.full(x, (4, 5), 1, 1)
    reducer = ZeroTPrune.plan(1, keep_rate=0.5, reduce_at=(0,), r=r, num_iters=3, renormalise=renormalise)[0]
    state = AttnState.of(q, k, k, 0.5, tokens, x)
    kept = torch.ones(3, 21, dtype=torch.int64).index_fill(1, torch.tensor([2, 3, 7, 11, 20]), 0) if r else None
    expected = reducer.importance(state._replace(weights=state.softmax_map()), 3, kept)
    assert torch.allclose(reducer.importance(state, 3, kept), expected)


@pytest.mark.parametrize("method", ["gtp", "zero_tprune"])
def test_model_with_maps_in_pieces_is_that_with_whole_ones(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    model = make_model(method, "class_token")
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr(attention, "CACHED_ENTRIES", 100)
        assert torch.allclose(model(images), whole, atol=1e-6)


def slow_importance(weights: Tensor, places: list[int], votes: int, boost: float) -> Tensor:
    """Root mean square over the heads of their page ranks among these places: (P+N,)."""
    return torch.stack([slow_rank(head, places, votes, boost) for head in weights]).square().mean(0).sqrt()


@pytest.mark.parametrize("cls_boost", [None, 1.0])
def test_pruning_is_that_of_the_slow_search(cls_boost: float | None) -> None:
    """Section 3.3: look-alikes of the less important half leave by their keys, then the least important by page rank.

    The class token starts with the root of the tokens that vote, or with ``cls_boost``.
    """
    x, k = torch.randn(6, 21, 3), torch.randn(6, 2, 21, 4, dtype=torch.float64)
    weights = (2 * torch.randn(6, 2, 21, 21, dtype=torch.float64)).softmax(-1)
    tokens = TokenMap.full(x, (4, 5), 1, 1)
    settings = {"keep_rate": 0.5, "reduce_at": (0,), "r": 5, "num_iters": 2, "var_range": None}
    reducer = ZeroTPrune.plan(1, cls_boost=cls_boost, **settings)[0]
    state = AttnState.of(k, k, k, 1.0, tokens, x)._replace(weights=weights)
    reduced, left = reducer.reduce(x, tokens, state)
    all_boost, left_boost = (21**0.5, 16**0.5) if cls_boost is None else (cls_boost, cls_boost)
    for image in range(6):
        order = (1 + slow_importance(weights[image], list(range(21)), 1, all_boost)[1:].argsort()).tolist()
        keys = k[image].transpose(0, 1).flatten(1)
        alike = {a: max(float(F.cosine_similarity(keys[a], keys[b], dim=0)) for b in order[10:]) for a in order[:10]}
        pruned = sorted(alike, key=lambda place, alike=alike: -alike[place])[:5]
        places = [place for place in range(21) if place not in pruned]
        kept = torch.ones(1, 21, dtype=torch.int64).index_fill(1, torch.tensor(pruned), 0)
        scores = slow_importance(weights[image], places, 2, left_boost)
        one = state._replace(weights=weights[image : image + 1])
        assert torch.allclose(reducer.importance(one, 2, kept)[0], scores)
        best = sorted(sorted(places[1:], key=lambda place, scores=scores: -float(scores[place]))[:8])  # 0.5 * 15 = 7.5
        assert left.anchor[image].tolist() == [place - 1 for place in best]
        assert torch.equal(reduced[image], x[image, [0, *best]])


def test_similar_tokens_are_found_by_concatenated_or_averaged_keys() -> None:
    """Concatenated, a head weighs as its keys are long; averaged, keys that point apart in two heads cancel."""
    k = torch.tensor([[[[3.0, 0], [0, 1]], [[-3.0, 0], [0, 1]]]])  # (1, 2 heads, 2 tokens, D)
    features = {way: ZeroTPrune.plan(1, keys=way, reduce_at=(0,))[0].features(k)[0].tolist() for way in KEYS}
    assert features == {"concatenated": [[3, 0, -3, 0], [0, 1, 0, 1]], "averaged": [[0, 0], [0, 1]]}
    with pytest.raises(TypeError, match="renormalise must be True or False, got 2"):
        ZeroTPrune.plan(12, renormalise=2)  # type: ignore[arg-type]
