"""GTP's graph as the matrix that the paper writes."""

from __future__ import annotations

from torch import Tensor

from effvit.reducers.gtp import Graph


def dense_graph(graph: Graph) -> Tensor:
    """(B, N, N) of a graph: entry [b, i, r] is the share of r that goes to i, the paper's G."""
    batch, number, _ = graph.neighbours.shape
    return graph.shares.new_zeros(batch, number, number).scatter_add(2, graph.neighbours, graph.shares)


def listed_graph(matrix: Tensor) -> Graph:
    """The graph of a matrix (B, N, N), in which every patch is listed as a neighbour of each."""
    shares, neighbours = matrix.sort(dim=-1)
    return Graph(neighbours, shares)
