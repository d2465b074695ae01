"""Controls: patches kept at random, evenly spaced or around the middle, whatever the image shows."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effvit.attention import AttnState, Pick, Picked
from effvit.protocols import Host, Settings, Size
from effvit.recording import compile_each_size
from effvit.reducers.base import Reducer
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import ImageShare
from effvit.reducers.rings import PATTERNS, Shrinking, distances, middle_of, nearest_ring, sizes_within
from effvit.schedule import check_blocks, check_choice, check_count, check_number, spread_blocks
from effvit.tokens import TokenMap, fx_leaf

__all__ = [
    "PLACES",
    "Radial",
    "Random",
    "Ranked",
    "StaticSelection",
    "Uniform",
    "random_ranks",
    "ranks_of",
    "uniform_ranks",
]

PLACES = ("block", "queries", "mlp")
"""What the dropped patches do not enter first: the block, the queries of its attention, or its MLP."""


def uniform_ranks(grid: Size) -> Tensor:
    """(H*W,) int64 rank of each patch in the order of ordered dithering: any first K are spread evenly over the grid.

    The order of the Bayer matrix of side 2^k >= max(H, W): row r and column c with the bits r_b and c_b (b = 0 the
    lowest) have the value sum_b (2 (r_b xor c_b) + r_b) 4^(k-1-b). A half of the patches is a checkerboard, a quarter
    every second row and column.
    """
    row = torch.arange(grid[0], device="cpu").unsqueeze(1)  # (H, 1)
    column = torch.arange(grid[1], device="cpu")  # (W,)
    bits = (max(grid) - 1).bit_length()
    value = torch.zeros(grid, dtype=torch.int64, device="cpu")
    for b in range(bits):
        row_bit, column_bit = row >> b & 1, column >> b & 1
        value += (2 * (row_bit ^ column_bit) + row_bit) * 4 ** (bits - 1 - b)
    return ranks_of(value.flatten().argsort())


@torch.compiler.assume_constant_result  # dynamo knows no generators; a graph is for one grid anyway
def random_ranks(grid: Size, seed: int) -> Tensor:
    """(H*W,) int64 rank of each patch in a random order, the same on every machine and device.

    Raises:
        ValueError: A grid that is met for the first time while a model is exported, which cannot draw.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        order = torch.randperm(grid[0] * grid[1], generator=generator, device="cpu")
    except NotImplementedError as error:  # torch.export records no generators
        raise ValueError(
            f"no random order of {grid[0]} x {grid[1]} can be drawn while a model is exported; make the model for "
            "images of that size, by img_size or set_input_size, so that the order is known before"
        ) from error
    if torch.jit.is_tracing():  # which records the draw without its seed
        order = torch.tensor(order.tolist(), device="cpu")
    return ranks_of(order)


def ranks_of(order: Tensor) -> Tensor:
    """(N,) rank of each place in an order (N,) of places: the inverse of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@fx_leaf
def lowest(ranks: Tensor, anchor: Tensor, number: int) -> Tensor:
    """(B, number) tokens of the lowest ranks (H*W,) among those on the patches ``anchor`` (B, N), in their order."""
    return ranks.to(anchor.device)[anchor].topk(number, dim=1, largest=False).indices.sort(dim=1).values


class Ranked(nn.Module):
    """What keeps the places of the lowest ranks on a grid: a buffer holds those of the grid it was made for.

    Attributes:
        grid: (H, W) of that grid.
        ranks: (H*W,) int64 rank of each of its places, in no file.
    """

    ranks: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grid: Size = (0, 0)
        self.register_buffer("ranks", torch.empty(0, dtype=torch.int64), persistent=False)

    def ranks_on(self, grid: Size) -> Tensor:
        """(H*W,) int64 rank of each place of that grid, on the CPU; the lowest ranks are kept."""
        raise NotImplementedError

    def resize(self, grid: Size) -> None:
        """Hold the ranks of another grid (H, W)."""
        self.grid = grid
        self.ranks = self.ranks_on(grid).to(self.ranks.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ranked:
        """Move as any module, and rank anew: behind ``to_empty`` the memory holds anything."""
        super()._apply(fn, recurse)
        self.resize(self.grid)
        return self

    def knows(self, grid: Size) -> bool:
        """Whether ``ranks`` are those of that grid: not of a host that takes any size, nor where no file held them."""
        return grid == self.grid and self.ranks.device.type != "meta"


class StaticSelection(Ranked, ImageShare):
    """Keep the K patches of the lowest ranks, the same ones in every image, in image order.

    No publication: a control of this package. The counts are those of ``ImageShare``; a later block keeps some of those
    that an earlier one kept. Prefix tokens stay.

    Args:
        keep_rate: Fraction of the patches of the earlier blocks that stays.
        num_tokens: Number of patches to keep in place of a rate.
        block: Number of the block it sits in.
        earlier: The reducers of the blocks before, on whose rates the number of patches depends.
        place: One of PLACES.

    Attributes:
        any_number: Any K can be asked for, so that it is the control of a method at that method's counts.
    """

    place: str
    open_sides = 0  # the ranks are those of one grid
    any_number = True

    def __init__(
        self, keep_rate: float, num_tokens: int | None, block: int, earlier: tuple[StaticSelection, ...], place: str
    ) -> None:
        super().__init__(keep_rate, num_tokens, block, earlier)
        self.place = place

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return []  # to compare with, not to be chosen by effvit.tune

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        self.ranks = self.ranks.to(next(host.parameters()).device)

    def check_size(self, grid: Size) -> None:
        super().check_size(grid)
        compile_each_size(grid)

    def cost(self, at: BlockSizes) -> Change:
        kept = self.num_left(at)
        keys = kept if self.place == "block" else at.tokens
        return Change(keys, at.tokens if self.place == "mlp" else kept, kept, 0)

    def start(self, x: Tensor, tokens: TokenMap) -> TokenMap:
        height, width = tokens.grid
        grid = operator.index(height), operator.index(width)  # numbers, not the symbols of dynamo and of traces
        return tokens if self.knows(grid) else replace(tokens, carry=self.ranks_on(grid).to(x.device))

    def chosen(self, tokens: TokenMap) -> tuple[Tensor, int]:
        """(B, K) tokens that stay, in image order, and K."""
        kept = self.count_on(tokens.num_tokens, tokens.grid)
        ranks = self.ranks if self.knows(tokens.grid) else tokens.carry
        assert isinstance(ranks, Tensor)
        return lowest(ranks, tokens.anchor, kept), kept

    def keep(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        """x (B, P+N, C) -> (B, P+K, C) and the map of the patches that stay."""
        if self.count_on(tokens.num_tokens, tokens.grid) == tokens.num_tokens:
            return x, tokens
        return tokens.select(x, *self.chosen(tokens))

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        return self.keep(x, tokens) if self.place == "block" else (x, tokens)

    def pick(self) -> Pick | None:
        return self.sample if self.place == "queries" else None

    def sample(self, state: AttnState) -> Picked:
        """The query rows of the patches that stay."""
        index, kept = self.chosen(state.keys)
        rows = state.keys.rows(index)
        return Picked(rows, state.keys.keep(index, kept, rows=rows))

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        return self.keep(x, tokens) if self.place == "mlp" else (x, tokens)


class Uniform(StaticSelection):
    """The control that keeps patches evenly spaced over the image (``uniform_ranks``)."""

    name = "uniform"
    summary = "control: keep patches evenly spaced over the grid, whatever the image shows"

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        place: str = "block",
    ) -> dict[int, Reducer]:
        """Settings of the control.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction r of the patches that stays in each reducing block, in (0, 1]: the first keeps int(N r)
                of the N patches of the image, the next int(N r^2); one value, or one for each block.
            reduce_at: 0-based blocks that reduce; None means (3, 6, 9) of 12, in proportion for another depth.
            num_tokens: Absolute numbers of patches to keep in place of a rate; one value or one for each block.
            place: Where in the block patches are dropped: before the "block", as DynamicViT does; before the "queries",
                so that they are still keys of its attention (ATS); or before the "mlp" (EViT, ToMe).
        """
        check_choice("place", place, PLACES)
        return cls.in_blocks(depth, keep_rate, reduce_at, num_tokens, place)

    def ranks_on(self, grid: Size) -> Tensor:
        return uniform_ranks(grid)


class Random(StaticSelection):
    """The control that keeps patches at random (``random_ranks``), the same ones in every image."""

    name = "random"
    summary = "control: keep patches at random, the same ones in every image"

    def __init__(
        self,
        keep_rate: float,
        num_tokens: int | None,
        block: int,
        earlier: tuple[StaticSelection, ...],
        place: str,
        seed: int,
    ) -> None:
        super().__init__(keep_rate, num_tokens, block, earlier, place)
        self.seed = seed

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        place: str = "block",
        seed: int = 0,
    ) -> dict[int, Reducer]:
        """Settings of the control: those of ``Uniform``, and ``seed``, the number of the random order."""
        check_choice("place", place, PLACES)
        return cls.in_blocks(depth, keep_rate, reduce_at, num_tokens, place, check_count("seed", seed))

    def ranks_on(self, grid: Size) -> Tensor:
        return random_ranks(grid, self.seed)


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

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return []  # no control at the counts of the methods there

    def ranks_on(self, grid: Size) -> Tensor:
        return ranks_of(distances(grid, self.pattern).argsort(stable=True))

    def count_on(self, num_tokens: int, grid: Size) -> int:
        height, width = map(operator.index, grid)  # numbers, not the symbols of traces
        if self.shrinking is not None:
            sizes = sizes_within((height, width), self.pattern, self.shrinking.steps, self.shrinking.min_radius)
            kept = sizes[self.shrinking.step(self.block)]
        else:
            asked = self.num_tokens if self.num_tokens is not None else int(height * width * self.share)
            kept = nearest_ring((height, width), self.pattern, asked)
        return min(max(1, kept) if self.any_size else kept, num_tokens)

    def num_left(self, at: BlockSizes) -> int:
        away = distances(at.grid, self.pattern)
        nearest_first = sorted(away.tolist())
        if self.shrinking is not None:
            farthest, least = nearest_first[-1], self.shrinking.min_radius
            least = least if least > 0 else middle_of(away, at.grid)
            radius = farthest - (farthest - least) * self.shrinking.step(self.block) / (self.shrinking.steps - 1)
            kept = bisect_right(nearest_first, radius)
        else:
            asked = int(len(away) * self.share) if self.num_tokens is None else self.num_tokens
            inside = [bisect_right(nearest_first, radius) for radius in set(nearest_first)]
            kept = min((abs(number - asked), number) for number in inside)[1]
        return min(max(kept, int(self.any_size)), at.tokens)
