"""Rings of patches around the middle of a grid, as in the fixed radial patterns of TokenReduction (2308.04657)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.protocols import Size

__all__ = ["PATTERNS", "Shrinking", "distances", "middle_of", "nearest_ring", "ring_sizes", "sizes_within"]

PATTERNS = ("l1", "l2", "linf")
"""Norms of a patch's distance from the middle: the rings are diamonds, circles or squares."""


def distances(grid: Size, pattern: str) -> Tensor:
    """(H*W,) float32 distance of each patch from the middle of the grid, in patches.

    A side of n patches runs in equal steps from floor(-n / 2) to floor(n / 2), as in the official code, so that the
    middle of an odd side is off by half a patch. That code rounds in float32, and rings that are equal on paper may be
    two: so they are here.
    """
    height, width = (torch.linspace(-side // 2, side // 2, side, device="cpu").abs() for side in grid)
    rows, columns = height.unsqueeze(1), width  # (H, 1) and (W,)
    if pattern == "l1":
        return (rows + columns).flatten()
    return (torch.maximum(rows, columns) if pattern == "linf" else (rows**2 + columns**2).sqrt()).flatten()


def ring_sizes(grid: Size, pattern: str) -> tuple[int, ...]:
    """Number of patches within each distance that a patch has, the nearest first."""
    return _numbers(grid, pattern, None)


@torch.compiler.assume_constant_result  # a graph is for one grid anyway
def nearest_ring(grid: Size, pattern: str, asked: int) -> int:
    """That of ``ring_sizes`` nearest to a number, the smaller one of two."""
    return min(ring_sizes(grid, pattern), key=lambda size: abs(size - asked))


@torch.compiler.assume_constant_result
def sizes_within(grid: Size, pattern: str, steps: int, min_radius: float) -> tuple[int, ...]:
    """Number of patches within each of ``steps`` radii in equal steps from the farthest corner to ``min_radius``.

    A radius of 0 or less means the distance of the patch at (H // 2, W // 2).
    """
    return _numbers(grid, pattern, (steps, min_radius))


@lru_cache(maxsize=1024)
def _numbers(grid: Size, pattern: str, radii: tuple[int, float] | None) -> tuple[int, ...]:
    """``ring_sizes`` or ``sizes_within``; what was counted once is known while a model is exported."""
    away = distances(grid, pattern)
    nearest_first = away.sort().values
    if radii is None:
        limits = nearest_first.unique_consecutive()
    else:
        steps, least = radii
        limits = torch.linspace(away[0].item(), least if least > 0 else middle_of(away, grid), steps, device="cpu")
    return tuple(torch.searchsorted(nearest_first, limits, right=True).tolist())


def middle_of(away: Tensor, grid: Size) -> float:
    """The distance (H*W,) of the patch at (H // 2, W // 2)."""
    return away[grid[0] // 2 * grid[1] + grid[1] // 2].item()


class Shrinking(NamedTuple):
    """Radii that shrink block by block.

    Attributes:
        first: First block that reduces.
        last: The last one.
        min_radius: Radius that the block behind the last would have; 0 or less stands for the patch in the middle.
    """

    first: int
    last: int
    min_radius: float

    @property
    def steps(self) -> int:
        """Radii from the farthest corner to the least."""
        return self.last - self.first + 3

    def step(self, block: int) -> int:
        """Which of them a block has: the first block still keeps all if it is the first of the host."""
        return block - self.first + (self.first > 0)
