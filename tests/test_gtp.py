"""GTP: the graph where it has no edge, and the token that is appended."""

from __future__ import annotations

import pytest
import torch
from hosts import make_model

from effvit.reducers.gtp import propagation_graph


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_patch_without_a_neighbour_gives_and_receives_nothing(num_prefix: int) -> None:
    """The only patch of an image touches no other, so its row of the adjacency is zero and stays so."""
    graph = propagation_graph(torch.randn(2, num_prefix + 1, 8), (1, 1), num_prefix, "Spatial", 8)
    assert graph.tolist() == [[[0.0]], [[0.0]]]


def test_mean_of_the_removed_tokens_is_one_more() -> None:
    """Each block removes three patch tokens and appends their mean: 48 - 3 + 1 and so on."""
    assert make_model("gtp", "class_token", num_prop=3, propagation="Mean").token_counts() == [46, 44, 42, 40]
