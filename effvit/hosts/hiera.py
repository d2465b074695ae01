"""Hiera (2306.00989) as a host: attention inside mask units, then to the whole map, with tokens in timm's order.

timm keeps the tokens as a sequence, in which those that are pooled together and those of a mask unit are whole strides
apart, and makes a map of them where one is asked for. Here a map goes from block to block, so that a method meets mask
units as small grids; a block of timm's gets its own sequence, bit for bit.

``effvit.hosts.windows`` says what methods do in the windows, which here are mask units, and
``effvit.hosts.pooled_stages`` what they leave alone. To a stage that attends to the whole map this is one window:
numbers of tokens are those of the map, and Expedite clusters it as in a plain vision transformer. Attention adds no
position biases: positions are added to the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention, Reroll, Unroll
from torch import Tensor

from effvit.block import rehouse
from effvit.hosts.pooled_stages import ReducedPooledStages, pooled_stages
from effvit.hosts.window_form import WindowForm
from effvit.hosts.windows import (
    Cut,
    Family,
    GroupedAttention,
    ScaledGroupingBlock,
    replace_attributes,
    restore_attributes,
)
from effvit.layers.macs import Terms, convolutions, convolved, resampling
from effvit.protocols import Size

__all__ = ["ReducedHiera", "map_of", "sequence_of"]

Strides: TypeAlias = Sequence[Size]
"""(rows, columns) of each stride of a map that lies in a sequence, that of neighbours first."""


def sequence_of(x: Tensor, strides: Strides) -> Tensor:
    """The map x (B, H, W, C) in timm's order (B, H*W, C): by the places inside the strides, then by mask units."""
    rows, columns = ([-1, *(stride[side] for stride in reversed(strides))] for side in (0, 1))
    n = len(rows)
    x = x.unflatten(2, columns).unflatten(1, rows)  # (B, rows of units, ..., of neighbours, likewise columns, C)
    places = [dim for k in range(n, 0, -1) for dim in (k, n + k)]
    return x.permute(0, *places, 2 * n + 1).flatten(1, -2)


def map_of(x: Tensor, strides: Strides, grid: Size) -> Tensor:
    """Inverse of ``sequence_of``: (B, H*W, C) -> the map (B, H, W, C) of ``grid`` (H, W)."""
    sides: list[int] = []
    units = grid
    for rows_of, columns_of in strides:
        sides += [rows_of, columns_of]
        units = units[0] // rows_of, units[1] // columns_of
    n = len(strides) + 1
    x = x.unflatten(1, [*sides, *units])  # (B, rows of neighbours, columns, ..., rows of units, columns, C)
    rows, columns = (list(range(first, 0, -2)) for first in (2 * n - 1, 2 * n))
    return x.permute(0, *rows, *columns, 2 * n + 1).flatten(n + 1, 2 * n).flatten(1, n)


class MapBlock(HieraBlock):
    """timm's block of a Hiera on a map in place of a sequence.

    Attributes:
        grid: (H, W) of the map that enters it.
        strides: Those that lie in timm's sequence of it.
    """

    grid: Size
    strides: Strides

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, H, W, C) -> the map that leaves the block, pooled by the first stride if it pools."""
        y: Tensor = super().forward(sequence_of(x, self.strides))
        if self.attn.q_stride == 1:
            return map_of(y, self.strides, self.grid)
        (rows, columns), *left = self.strides
        return map_of(y, left, (self.grid[0] // rows, self.grid[1] // columns))


class GroupedMaskUnitAttention(GroupedAttention, MaskUnitAttention):
    """timm's attention of a Hiera among groups of tokens."""

    heads: int

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        """timm's ``heads``."""
        return self.heads


class GroupingHieraBlock(ScaledGroupingBlock, HieraBlock):
    """timm's block of a Hiera with groups of tokens, on a map."""

    grid: Size
    strides: Strides

    def cut(self, size: Size) -> Cut:
        return Cut(window_of(self, size), size)


def window_of(block: Any, size: Size) -> Size:
    """(h, w) of the mask units of a block on a map of that size, or of the map that it attends to.

    Raises:
        ValueError: Mask units that are no whole strides of timm's sequence.
    """
    if not block.attn.use_mask_unit_attn:
        return size
    area, rows, columns = block.attn.window_size * block.attn.q_stride, 1, 1
    for stride in block.strides:
        if rows * columns >= area:
            break
        rows, columns = rows * stride[0], columns * stride[1]
    if rows * columns != area:
        raise ValueError(
            f"mask units of {area} tokens are not made of whole strides {', '.join(map(str, block.strides))}; create "
            "the Hiera with a mask_unit_size that is a power of its q_stride, as high as its number of stages less one"
        )
    return rows, columns


def shrink_block(block: MapBlock, window: Size, cells: Size) -> None:
    """Let a plain block work on windows that became smaller grids, which lie in its sequence as mask units do."""
    rows, columns = (side // n * c for side, n, c in zip(block.grid, window, cells, strict=True))
    replace_attributes(block, grid=(rows, columns), strides=[cells])
    replace_attributes(block.attn, window_size=cells[0] * cells[1])


def plain_attention(attn: Any) -> MaskUnitAttention:
    """timm's attention of a Hiera, in mask units of tokens again where it was in units of cells."""
    plain = rehouse(attn, MaskUnitAttention)
    restore_attributes(plain)
    return plain


FORM = WindowForm(window_of, lambda attn, cut, tokens, grouped: 0)


class ReducedHiera(ReducedPooledStages, Hiera):
    """timm's ``Hiera`` with a reduction method in its mask units and global stages."""

    family = Family(
        HieraBlock,
        MaskUnitAttention,
        GroupingHieraBlock,
        GroupedMaskUnitAttention,
        shrink_block,
        MaskUnitAttention,
        plain_attention,
        unreduced_block=MapBlock,
    )
    reason = "the stages of a Hiera pool full maps"
    untraceable = " with fewer tokens cuts its maps into mask units by their sizes"
    tokens_spatial_shape: list[int]
    patch_stride: Sequence[int]
    patch_drop_rate: float
    q_stride: Size
    unroll: Unroll
    reroll: Reroll
    pos_embed: Tensor
    pos_embed_win: Tensor | None

    @property
    def grid_size(self) -> Size:
        """(H, W) of the map that enters the blocks."""
        rows, columns = self.tokens_spatial_shape
        return rows, columns

    @property
    def img_size(self) -> Size:
        """(H, W) of the images."""
        return self.grid_size[0] * self.patch_stride[0], self.grid_size[1] * self.patch_stride[1]

    def check_parts(self) -> None:
        super().check_parts()
        if len(self.tokens_spatial_shape) != 2:
            raise TypeError(
                f"the patches of this Hiera lie in a grid of {len(self.tokens_spatial_shape)} dimensions, as those of "
                "videos do, and methods know windows of two; create it for images, with img_size=(H, W)"
            )
        sides = [prod(stride[i] for stride in self.unroll.schedule) for i in (0, 1)]
        if any(patches % side for patches, side in zip(self.grid_size, sides, strict=True)):
            raise ValueError(
                f"{self.grid_size[0]} x {self.grid_size[1]} patches are no whole multiple of the {sides[0]} x "
                f"{sides[1]} that its stages pool; create the Hiera with an img_size of whole multiples of "
                f"{sides[0] * self.patch_stride[0]} x {sides[1] * self.patch_stride[1]} pixels"
            )

    def own_stages(self) -> None:
        super().own_stages()
        for number, block in enumerate(self.all_blocks()):
            if type(block) is HieraBlock:
                self.blocks[number] = new = rehouse(block, MapBlock)
                new.strides, (rows, columns) = self.reroll.schedule[max(number - 1, 0)]  # behind the block before
                new.grid = rows, columns

    def block_window(self, block: Any) -> Size:
        return window_of(block, block.grid)

    def check_run(self, x: Tensor) -> None:
        super().check_run(x)
        height, width = x.shape[-2:]
        if convolved(self.patch_embed.proj, (height, width)) != self.grid_size:
            size = self.img_size
            raise ValueError(
                f"expected images of {size[0]} x {size[1]} pixels, got {height} x {width}; create the model with "
                f"img_size=({height}, {width}), or resize the images"
            )
        if self.training and self.patch_drop_rate:
            raise ValueError(
                f"patch_drop_rate={self.patch_drop_rate} leaves mask units out in training, and a method needs every "
                "patch at its place; create the Hiera with patch_drop_rate=0"
            )

    def _embed(self, x: Tensor) -> Tensor:
        return self._pos_embed(self.patch_embed(x)).unflatten(1, self.grid_size)

    def _finished(self, x: Tensor, block: int) -> Tensor:
        strides, _ = self.reroll.schedule[block]
        return sequence_of(x, strides)

    def forward_features(self, x: Tensor, mask: Tensor | None = None, return_intermediates: bool = False) -> Any:
        """The last tokens (B, N, C) of images (B, 3, H, W), in timm's order.

        Args:
            x: The images.
            mask: Refused: mask units that are left out have no place on a map.
            return_intermediates: Return the maps (B, H, W, C) that leave the stages, too.
        """
        self.check_run(x)  # first, since symbolic tracing passes a placeholder for the mask too
        self.refuse_mask(mask)
        x, maps = self.run(self._embed(x), self.stage_ends if return_intermediates else ())
        x = self._finished(x, len(self.blocks) - 1)
        return (x, maps) if return_intermediates else x

    def refuse_mask(self, mask: Tensor | None) -> None:
        """Raise a ValueError for a mask of mask units."""
        if mask is not None:
            raise ValueError(
                f"a Hiera reduced by {self.method} takes no mask: a method needs every patch at its place; use the "
                "dense model for masked images"
            )

    def forward_intermediates(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        coarse: bool = True,
    ) -> Any:
        """Full maps behind several stages or blocks; arguments and returns as timm's method, without a mask."""
        self.refuse_mask(mask)
        return self._intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only, coarse)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term."""
        terms, grid = convolutions("embedding", self.patch_embed, size)
        if self.pos_embed_win is not None:
            table = self.pos_embed
            terms["embedding"] += resampling(table.shape[2:], grid, table.shape[1], 4, antialiased=True, always=True)
        return terms + pooled_stages(self, grid, FORM, self.q_stride)
