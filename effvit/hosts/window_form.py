"""Closed forms of stages whose blocks attend inside windows, with and without a reduction method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from effvit.hosts.windows import Cut, GroupingBlock, Span
from effvit.layers.macs import Terms, attend, feedforward, norm
from effvit.protocols import Size
from effvit.reducers.cost import BlockSizes, Change

__all__ = ["WindowForm", "stage_terms"]


class WindowForm(NamedTuple):
    """What the closed form of a network with windows needs to know of its blocks.

    Attributes:
        window_of: (h, w) of the windows of a block on a map of that size.
        position_macs: MACs of all position biases: (attention, cut, tokens of a window, grouped) -> MACs.
        attend: MACs of attention without them: (attention, keys, queries, pairs) -> terms.
    """

    window_of: Callable[[Any, Size], Size]
    position_macs: Callable[[Any, Cut, int, bool], int]
    attend: Callable[[Any, int, int, int], Terms] = attend


def stage_terms(blocks: Iterable[Any], span: Span | None, size: Size, form: WindowForm) -> Terms:
    """The blocks of a stage on a map of that size."""
    terms, terms_to_restore, full = Terms(), Terms(), size
    for i, block in enumerate(blocks):
        if span is not None and i == span.first:
            cut = Cut(span.window, full)
            terms += shrinking(span, cut, width(block))
            size, terms_to_restore = small_size(span, cut), restoring(span, cut, width(block))
        if span is not None and i == span.last:
            size, terms, terms_to_restore = full, terms + terms_to_restore, Terms()
        terms += block_terms(block, size, form)
    return terms + terms_to_restore


def block_terms(block: Any, size: Size, form: WindowForm) -> Terms:
    """A block on a map of that size."""
    rows, attn = size[0] * size[1], block.attn
    cut = block.cut(size) if isinstance(block, GroupingBlock) else Cut(form.window_of(block, size), size)
    left, terms = cut.area, norm(block.norm1, rows)
    if isinstance(block, GroupingBlock):
        change = grouping(block, cut)
        left = change.left
        terms["reduction"] += cut.number * change.macs
    tokens = cut.number * left
    terms += form.attend(attn, tokens, tokens, tokens * left)
    terms["attention"] += form.position_macs(attn, cut, left, isinstance(block, GroupingBlock))
    return terms + feedforward(block, min(tokens, rows) if isinstance(block, GroupingBlock) else rows)


def width(block: Any) -> int:
    """Channels of a block."""
    channels: int = block.norm1.normalized_shape[-1]
    return channels


def sizes(tokens: int, grid: Size, dim: int, area: int | None = None) -> BlockSizes:
    """What a method meets in a window of so many tokens, compared by ``dim`` features."""
    return BlockSizes(tokens, tokens, 0, 0, grid, dim, 1, dim, False, area)


def grouping(block: GroupingBlock, cut: Cut) -> Change:
    """What groups make of a window."""
    features = width(block) + (cut.num_parts if cut.num_parts > 1 else 0)
    return block.reducer.cost(sizes(cut.area, cut.window, features, block.area(cut)))


def shrinking(span: Span, cut: Cut, dim: int) -> Terms:
    """All windows become smaller grids."""
    change = span.reducer.cost(sizes(cut.area, cut.window, dim))
    return Terms(reduction=cut.number * change.macs)


def restoring(span: Span, cut: Cut, dim: int) -> Terms:
    """Smaller grids become windows again."""
    return Terms(reduction=cut.number * span.reducer.restore_macs(cut.window, dim))


def small_size(span: Span, cut: Cut) -> Size:
    """(H, W) of the map of smaller grids."""
    rows, columns = (-(-n // w) * c for n, w, c in zip(cut.size, cut.window, span.cells, strict=True))
    return rows, columns
