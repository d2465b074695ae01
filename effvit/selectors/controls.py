"""Controls: cells kept at random or evenly spaced, whatever the image shows; what every selector has to beat."""

from __future__ import annotations

import operator

from torch import Tensor

from effvit.protocols import Size
from effvit.reducers.static_selection import Ranked, random_ranks, uniform_ranks
from effvit.schedule import check_count
from effvit.selectors.base import Choice, Features, SelectionSizes, Selector

__all__ = ["RandomCells", "UniformCells"]


class RankedCells(Ranked, Selector):
    """Keep the K cells of the lowest ranks, the same ones in every image."""

    whole_grid = True

    def settle(self, grid: Size) -> None:
        self.resize(grid)

    def cost(self, at: SelectionSizes) -> int:
        return 0

    def choose(self, features: Features, kept: int) -> Choice:
        height, width = features.grid
        grid = operator.index(height), operator.index(width)  # numbers, not the symbols of dynamo and of traces
        ranks = self.ranks if self.knows(grid) else self.ranks_on(grid)
        ids = ranks.to(features.x.device).topk(kept, largest=False).indices  # (K,)
        return Choice(ids.expand(features.x.shape[0], -1))


class UniformCells(RankedCells):
    """Keep cells evenly spaced over the grid, in the order of ordered dithering (``uniform_ranks``)."""

    name = "uniform"
    summary = "control: keep cells evenly spaced over the grid, whatever the image shows"

    def ranks_on(self, grid: Size) -> Tensor:
        return uniform_ranks(grid)


class RandomCells(RankedCells):
    """Keep cells at random (``random_ranks``), the same ones in every image.

    Args:
        seed: Number of the random order.
    """

    name = "random"
    summary = "control: keep cells at random, the same ones in every image"

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = check_count("seed", seed)

    def ranks_on(self, grid: Size) -> Tensor:
        return random_ranks(grid, self.seed)
