"""GTP: the graph and what is handed along it, by slow search; the token that is appended; what tokens are ranked by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from graphs import dense_graph, listed_graph
from hosts import make_model

from effvit.attention import AttnState
from effvit.reducers import gtp
from effvit.reducers.gtp import GRAPH_TYPES, GTP, propagation_graph
from effvit.tokens import TokenMap


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_patch_without_a_neighbour_gives_and_receives_nothing(num_prefix: int) -> None:
    """The only patch of an image touches no other, so its row of the adjacency is zero and stays so."""
    graph = propagation_graph(torch.randn(2, num_prefix + 1, 8), (1, 1), num_prefix, "Spatial", 8)
    assert dense_graph(graph).tolist() == [[[0.0]], [[0.0]]]


def test_mean_of_the_removed_tokens_is_one_more() -> None:
    """Each block removes three patch tokens and appends their mean: 48 - 3 + 1 and so on."""
    assert make_model("gtp", "class_token", num_prop=3, propagation="Mean").token_counts() == [46, 44, 42, 40]


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("graph_type", GRAPH_TYPES)
def test_graph_is_that_of_the_slow_search(graph_type: str, num_prefix: int) -> None:
    """Section 3.3 on a grid that is not square: D^-1/2 A D^-1/2 with the row sums D of the directed A, no loops."""
    x = torch.randn(1, num_prefix + 10, 6, requires_grad=True)
    graph = propagation_graph(x, (2, 5), num_prefix, graph_type, 2)
    assert not graph.shares.requires_grad
    number = {"Spatial": 0, "Semantic": 2, "Mixed": 2}[graph_type] + (graph_type != "Semantic") * 8
    assert graph.neighbours.shape == (1, 10, number + (graph_type != "Spatial" and not num_prefix))
    unit = F.normalize(x[0, num_prefix:].detach(), dim=-1)
    adjacency = torch.zeros(10, 10)
    for i in range(10):
        others = sorted((j for j in range(10) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        near = set(others[: 2 if num_prefix else 3])  # without a prefix token officially one more
        touching = {j for j in others if abs(i // 5 - j // 5) <= 1 and abs(i % 5 - j % 5) <= 1}
        found = {"Spatial": touching, "Semantic": near, "Mixed": near | touching}[graph_type]
        adjacency[i, list(found)] = 1
    degree = adjacency.sum(1)
    expected = adjacency / (degree[:, None] * degree).sqrt()
    assert torch.allclose(dense_graph(graph)[0], expected, atol=1e-6)


def test_similar_patches_are_found_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 41, 6)
    whole = propagation_graph(x, (5, 8), 1, "Mixed", 4)
    monkeypatch.setattr(gtp, "SIMILARITIES_AT_ONCE", 2 * 40 * 7)
    parts = propagation_graph(x, (5, 8), 1, "Mixed", 4)
    assert torch.equal(dense_graph(parts), dense_graph(whole))


def test_patches_of_a_blank_image_have_no_more_neighbours_than_asked_for() -> None:
    """The official threshold would make each of them a neighbour of all others, a graph of N * N edges."""
    graph = dense_graph(propagation_graph(torch.ones(1, 13, 6), (3, 4), 1, "Semantic", 2))
    assert ((graph > 0).sum(2) == 2).all()
    assert (graph.diagonal(dim1=1, dim2=2) == 0).all()


def test_removed_tokens_are_handed_to_the_nodes_of_the_kept() -> None:
    """Section 3.3 after an earlier block left the patches 4, 1, 5, 2: ``x + alpha G x_removed``, and so the scales.

    The softmax map ranks by what a key receives, a row sum being one for all.
    """
    x, weights, graph = torch.randn(1, 5, 3), torch.rand(1, 2, 5, 5).square().softmax(-1), torch.rand(1, 6, 6)
    tokens = TokenMap.full(torch.zeros(1, 7, 1), (2, 3), 1, 1).keep(torch.tensor([[4, 1, 5, 2]]), 4)
    tokens = replace(tokens, carry=listed_graph(graph), key_weight=torch.rand(1, 5) + 1)
    reducer = GTP.plan(1, num_prop=2, selection="IMGAttnMean", alpha=0.3)[0]
    k = torch.randn(1, 2, 5, 4)
    reduced, left = reducer.reduce(x, tokens, AttnState.of(k, k, k, 0.5, tokens)._replace(weights=weights))

    ranked = weights[0].sum(1).mean(0)[1:].argsort(descending=True).tolist()
    nodes, scales = tokens.anchor[0].tolist(), tokens.key_weight[0, 1:]
    for place, token in enumerate(ranked[:2]):
        shares = {other: 0.3 * graph[0, nodes[token], nodes[other]] for other in ranked[2:]}
        expected = x[0, 1 + token] + sum(share * x[0, 1 + other] for other, share in shares.items())
        assert torch.allclose(reduced[0, 1 + place], expected, atol=1e-6)
        scale = scales[token] + sum(share * scales[other] for other, share in shares.items())
        assert left.key_weight is not None
        assert torch.allclose(left.key_weight[0, 1 + place], scale)
    assert torch.equal(reduced[0, 0], x[0, 0])
    assert left.anchor[0].tolist() == [nodes[token] for token in ranked[:2]]


def test_token_that_attends_as_no_other_stays_by_cosine() -> None:
    """Of rows that are alike but for one, that one has the smallest sum of cosines, and the highest score."""
    weights = torch.zeros(1, 1, 5, 5)
    weights[..., 1] = 1
    weights[0, 0, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    tokens, k = TokenMap.full(torch.zeros(1, 5, 1), (2, 2), 1, 1), torch.zeros(1, 1, 5, 4)
    state = AttnState.of(k, k, k, 1.0, tokens)._replace(weights=weights)
    for selection in ("CosSimMean", "CosSimMax"):
        reducer = GTP.plan(1, selection=selection)[0]
        assert reducer.scores(state).argmax(1).tolist() == [2]
