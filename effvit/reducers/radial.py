"""Fixed radial patterns of TokenReduction (2308.04657): rings around the middle of the image, whatever it shows."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.protocols import Settings, Size
from effvit.reducers.base import Reducer
from effvit.reducers.cost import BlockSizes
from effvit.reducers.static_selection import PLACES, StaticSelection, ranks_of
from effvit.schedule import check_blocks, check_choice, check_number, spread_blocks

__all__ = ["PATTERNS", "Radial", "Shrinking", "distances", "ring_sizes", "sizes_within"]

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


@torch.compiler.assume_constant_result  # a graph is for one grid anyway
def ring_sizes(grid: Size, pattern: str) -> tuple[int, ...]:
    """Number of patches within each distance that a patch has, the nearest first."""
    return _numbers(grid, pattern, None)


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
        limits = torch.linspace(away[0].item(), least if least > 0 else _middle(away, grid), steps, device="cpu")
    return tuple(torch.searchsorted(nearest_first, limits, right=True).tolist())


def _middle(away: Tensor, grid: Size) -> float:
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


class Radial(StaticSelection):
    """Keep the patches nearest to the middle of the image, whole rings of them, the same ones in every image.

    The fixed radial patterns of "Which Tokens to Use? Investigating Token Reduction in Vision Transformers"
    (2308.04657), there a yardstick for choices of tokens. Official code: JoakimHaurum/TokenReduction @ 88fe07e,
    models/heuristic.py. That code masks patches and computes them on; here they are dropped, which the class token and
    the patches that stay do not notice.

    Args:
        keep_rate: As for ``StaticSelection``; the ring whose number of patches is nearest to the rate's is kept.
        num_tokens: Number of patches in place of a rate, likewise that of the nearest ring.
        block: Number of the block it sits in.
        earlier: The reducers of the blocks before.
        place: One of ``PLACES``.
        pattern: One of ``PATTERNS``.
        shrinking: Radii in place of rates, or None.
    """

    name = "radial"
    summary = "control: keep rings of patches around the middle of the image (TokenReduction, 2308.04657)"
    any_number = False  # whole rings

    def __init__(
        self,
        keep_rate: float,
        num_tokens: int | None,
        block: int,
        earlier: tuple[Radial, ...],
        place: str,
        pattern: str,
        shrinking: Shrinking | None,
    ) -> None:
        super().__init__(keep_rate, num_tokens, block, earlier, place)
        self.pattern = pattern
        self.shrinking = shrinking

    @property
    def min_radius(self) -> float | None:
        """The setting."""
        return None if self.shrinking is None else self.shrinking.min_radius

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        pattern: str = "l1",
        min_radius: float | None = None,
        place: str = "block",
    ) -> dict[int, Reducer]:
        """Settings of the patterns.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction r of the patches that is asked for in each reducing block, in (0, 1]: int(N r) of the N
                patches of the image in the first, int(N r^2) in the next; one value, or one for each block. The ring
                with the nearest number of patches is kept, the smaller one of two.
            reduce_at: 0-based blocks that reduce; None means (3, 6, 9) of 12, in proportion for another depth.
            num_tokens: Absolute numbers of patches to ask for in place of a rate; one value or one for each block.
            pattern: Norm of a patch's distance from the middle: "l1" (diamonds), "l2" (circles) or "linf" (squares).
            min_radius: In place of a rate: every block from the first to the last of ``reduce_at`` reduces, by radii in
                equal steps towards this one, in patches; 0 or less stands for the patch in the middle. The official
                code's default, there 1.
            place: Where in the block patches are dropped, as for ``uniform``; the official code's is "block".

        Raises:
            ValueError: ``min_radius`` beside ``num_tokens``.
        """
        check_choice("place", place, PLACES)
        check_choice("pattern", pattern, PATTERNS)
        if min_radius is None:
            return cls.in_blocks(depth, keep_rate, reduce_at, num_tokens, place, pattern, None)
        check_number("min_radius", min_radius)
        if num_tokens is not None:
            raise ValueError("num_tokens and min_radius both take the place of a rate: leave one of them out")
        blocks = check_blocks("reduce_at", spread_blocks((3, 6, 9), depth) if reduce_at is None else reduce_at, depth)
        if not blocks:
            return {}
        shrinking = Shrinking(min(blocks), max(blocks), float(min_radius))
        every = range(shrinking.first, shrinking.last + 1)
        return cls.in_blocks(depth, keep_rate, every, None, place, pattern, shrinking)

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.6, "reduce_at": (1, 2), "pattern": "l2"}

    def ranks_on(self, grid: Size) -> Tensor:
        return ranks_of(distances(grid, self.pattern).argsort(stable=True))

    def count_on(self, num_tokens: int, grid: Size) -> int:
        height, width = operator.index(grid[0]), operator.index(grid[1])  # numbers, not the symbols of dynamo
        if self.shrinking is not None:
            sizes = sizes_within((height, width), self.pattern, self.shrinking.steps, self.shrinking.min_radius)
            kept = sizes[self.shrinking.step(self.block)]
        else:
            asked = self.num_tokens if self.num_tokens is not None else int(height * width * self.share)
            kept = min(ring_sizes((height, width), self.pattern), key=lambda size: abs(size - asked))
        return min(max(1, kept) if self.any_size else kept, num_tokens)

    def num_left(self, at: BlockSizes) -> int:
        away = distances(at.grid, self.pattern)
        nearest_first = sorted(away.tolist())
        if self.shrinking is not None:
            farthest, least = nearest_first[-1], self.shrinking.min_radius
            least = least if least > 0 else _middle(away, at.grid)
            radius = farthest - (farthest - least) * self.shrinking.step(self.block) / (self.shrinking.steps - 1)
            kept = bisect_right(nearest_first, radius)
        else:
            asked = int(len(away) * self.share) if self.num_tokens is None else self.num_tokens
            inside = [bisect_right(nearest_first, radius) for radius in set(nearest_first)]
            kept = min((abs(number - asked), number) for number in inside)[1]
        return min(max(kept, int(self.any_size)), at.tokens)
