"""Hosts whose stages begin with a block that pools its queries: what Hiera (2306.00989) and SAM 2's encoder share.

All blocks lie in a row, and the map that leaves the first one of a stage is smaller and wider than the one that enters
it. There every token must be at its place: queries are pooled over neighbours, and the shortcut too. So methods act in
all blocks but these, which keep the windows of the stage before. A method that is given one rule for all blocks passes
over them; a list with a value of its own for one of them is refused. Maps that were made smaller are restored before
the next stage begins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from effvit.hosts.surface import check_output_fmt
from effvit.hosts.window_form import WindowForm, stage_terms
from effvit.hosts.windows import Cut, ReducedWindows, Span, run_blocks
from effvit.layers.macs import Terms, attend, feedforward, layers, norm
from effvit.protocols import Layer, Setting, Size
from effvit.reducers import METHODS

__all__ = ["Part", "ReducedPooledStages", "StageBlocks", "pooled_stages"]


class Part(NamedTuple):
    """Blocks in a row: the one that begins a stage, or those of a stage that keep its map.

    Attributes:
        first: Number of the first.
        blocks: The blocks.
        span: Those of them that work on smaller grids.
        begins: It is the one that begins a stage.
    """

    first: int
    blocks: list[Any]
    span: Span | None
    begins: bool


class StageBlocks:
    """The blocks of a stage that keep its map, as a stage of their own of the model that holds them.

    Args:
        model: The model.
        first: Number of the first block.
        number: How many there are.
    """

    def __init__(self, model: ReducedPooledStages, first: int, number: int) -> None:
        self.model = model
        self.first = first
        self.number = number

    @property
    def blocks(self) -> nn.Sequential:
        """The blocks; those that are assigned take their places in the model."""
        return nn.Sequential(*list(self.model.blocks)[self.first : self.first + self.number])

    @blocks.setter
    def blocks(self, blocks: Iterable[nn.Module]) -> None:
        for number, block in enumerate(blocks, self.first):
            self.model.blocks[number] = block

    @property
    def span(self) -> Span | None:
        """Those of them that work on smaller grids."""
        return self.model.spans[self.first]

    @span.setter
    def span(self, span: Span | None) -> None:
        self.model.spans[self.first] = span


class ReducedPooledStages(ReducedWindows):
    """What both hosts share; a subclass of timm's class too.

    Attributes:
        spans: {first block that keeps the map of a stage: the blocks of the stage that work on smaller grids}.
    """

    holds_blocks = True
    blocks: Any  # timm's list of blocks, which takes a block at a number
    patch_embed: Any  # not timm's usual one
    _pos_embed: Layer
    stage_ends: list[int]
    grad_checkpointing: bool
    head: Any
    spans: dict[int, Span | None]

    # -- the blocks --------------------------------------------------------------------------------------------

    def own_stages(self) -> None:
        self.spans = {}

    def all_blocks(self) -> list[Any]:
        return list(self.blocks)

    @property
    def stage_starts(self) -> list[int]:
        """Blocks that begin a stage with a smaller map; the first stage begins with the map of the embedding."""
        return [end + 1 for end in self.stage_ends[:-1]]

    def parts(self, number: int | None = None) -> Iterator[Part]:
        """The first ``number`` blocks, all of them if None, part by part."""
        blocks = self.all_blocks()[:number]
        starts = self.stage_starts
        edges = [0, *(edge for start in starts for edge in (start, start + 1))]
        inside = [edge for edge in edges if edge < len(blocks)]
        for first, end in pairwise([*inside, len(blocks)]):
            if first < end:  # a stage of one block has none that keep its map
                yield Part(first, blocks[first:end], self.spans.get(first), first in starts)

    def window_stages(self) -> list[StageBlocks]:
        return [StageBlocks(self, part.first, len(part.blocks)) for part in self.parts() if not part.begins]

    def numbered_stages(self) -> Iterator[tuple[StageBlocks, int]]:
        for stage in self.window_stages():
            yield stage, stage.first

    def place(self, method: str, settings: Mapping[str, Setting]) -> None:
        """Let a method act in the blocks that keep the map of their stage, in place of what acts there.

        Raises:
            ValueError: Settings that do not fit the windows, or a list with values for blocks that begin a stage.
        """
        planned = METHODS[method].plan(self._depth, **settings)
        named = [name for name, value in settings.items() if gives_each_block(value)]
        passed = [str(i) for i in self.stage_starts if i in planned and planned[i].groups()]
        if named and passed:
            leave = f"give 0 for them, or one {named[0]} for all blocks"
            if "reduce_at" in named:
                leave = "leave them out of reduce_at"
            raise ValueError(
                f"{named[0]} has values for {', '.join(f'block {i}' for i in passed)}: blocks that begin a stage of a "
                f"{type(self).__bases__[-1].__name__} pool their queries over neighbours, so every token must be at "
                f"its place there; {leave}"
            )
        super().place(method, settings)

    # -- one forward pass --------------------------------------------------------------------------------------

    def run(self, x: Tensor, take: Collection[int] = (), number: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """The blocks on the map x (B, H, W, C).

        Args:
            x: The map.
            take: Blocks whose output is returned too.
            number: Blocks to run, None for all.

        Returns:
            The map behind the last block that was run, and behind each of ``take``, at the sizes of their stages.
        """
        taken: list[Tensor] = []
        for first, blocks, span, _ in self.parts(number):
            x, maps = run_blocks(blocks, x, span, [i - first for i in take], self.grad_checkpointing)
            taken += maps
        return x, taken

    def stage_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self._embed(x)
        for _, blocks, span, begins in self.parts():
            if not begins:
                yield x
            x, _ = run_blocks(blocks, x, span)

    def _embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the map (B, H', W', C) that enters the blocks."""
        raise NotImplementedError

    def _finished(self, x: Tensor, block: int) -> Tensor:
        """The map (B, H, W, C) behind a block in timm's form of it."""
        return x

    def _intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None,
        norm: bool,
        stop_early: bool,
        output_fmt: str,
        intermediates_only: bool,
        coarse: bool,
    ) -> Any:
        """What timm's ``forward_intermediates`` returns, given its arguments.

        Args:
            x: Images (B, 3, H, W).
            indices: The last n stages if an int, all if None, or numbers of stages.
            norm: Refused: the widths of the maps differ, and no norm is made for them.
            stop_early: Do not run the blocks behind the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Return only the list of maps.
            coarse: Indices count stages, of which the last maps are given; False: they count blocks.

        Raises:
            ValueError: ``norm``, or another form.
        """
        name = type(self).__bases__[-1].__name__
        if norm:
            raise ValueError(f"the maps of a {name} differ in width, so no norm fits them; leave norm=True out")
        check_output_fmt(output_fmt, ("NCHW", "NHWC"))
        self.check_run(x)
        ends = self.stage_ends if coarse else range(len(self.blocks))
        chosen, last = feature_take_indices(len(ends), indices)
        number = ends[last] + 1 if stop_early else len(self.blocks)
        x, maps = self.run(self._embed(x), [ends[i] for i in chosen], number)
        maps = [y.permute(0, 3, 1, 2) for y in maps] if output_fmt == "NCHW" else maps
        return maps if intermediates_only else (self._finished(x, number - 1), maps)


def gives_each_block(value: Setting) -> bool:
    """Whether a setting is a list of values for single blocks; (number, inflection) is one rule for all of them."""
    return isinstance(value, (list, tuple)) and not (len(value) == 2 and isinstance(value[1], float))


# -- closed form -----------------------------------------------------------------------------------------


def pooled_stages(model: ReducedPooledStages, grid: Size, form: WindowForm, stride: Size) -> Terms:
    """MACs of the blocks and the head on a map of that size, by term.

    Args:
        model: The model.
        grid: (H, W) of the map that enters the first block.
        form: What is to be known of its blocks.
        stride: (h, w) by which a block pools, if it does.
    """
    terms = Terms()
    for part in model.parts():
        if not part.begins:
            terms += stage_terms(part.blocks, part.span, grid, form)
            continue
        (block,) = part.blocks
        pooled = stride if pools(block) else (1, 1)
        terms += pooling_terms(block, Cut(form.window_of(block, grid), grid), pooled)
        grid = grid[0] // pooled[0], grid[1] // pooled[1]
    return terms + layers("head", model.head, 1 if model.head.pool_type else grid[0] * grid[1])


def pools(block: Any) -> bool:
    """Whether a block pools its queries, in the words of either class of timm."""
    q_stride: int | Size | None = getattr(block, "q_stride", None) or getattr(block.attn, "q_stride", None)
    return q_stride not in (None, 1)


def pooling_terms(block: Any, cut: Cut, stride: Size) -> Terms:
    """A block whose queries are pooled by a stride inside each window of the map."""
    rows = cut.size[0] * cut.size[1]
    terms = norm(block.norm1, rows)
    if block.proj is not None:  # of the shortcut, before it is pooled
        terms += layers("projection", block.proj, rows)
    keys = cut.number * cut.area
    terms += attend(block.attn, keys, keys // prod(stride), keys // prod(stride) * cut.area)
    return terms + feedforward(block, rows // prod(stride))
