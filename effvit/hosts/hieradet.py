"""The image encoder of SAM 2 (2408.00714), timm's ``HieraDet``, as a host: Hiera's stages with windows on full maps.

Some blocks attend to the whole map. ``effvit.hosts.windows`` says what methods do in the windows, and
``effvit.hosts.pooled_stages`` what they leave alone. Numbers of tokens are those of a window of the stage; a block that
attends to the whole map merges in proportion, and smaller grids reach it as the smaller map that they make up.
Attention adds no position biases: positions are added to the embedding, to the whole map and window by window
(2311.05613).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import PatchEmbed
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock
from torch import Tensor

from effvit.block import rehouse
from effvit.hosts.pooled_stages import ReducedPooledStages, pooled_stages
from effvit.hosts.window_form import WindowForm
from effvit.hosts.windows import (
    WHOLE,
    Cut,
    Family,
    GroupedAttention,
    ScaledGroupingBlock,
    replace_attributes,
)
from effvit.layers.macs import Terms, convolved, layers, resampling
from effvit.protocols import Setting, Size

__all__ = ["ReducedHieraDet"]


class GroupedMultiScaleAttention(GroupedAttention, MultiScaleAttention):
    """timm's attention of a HieraDet among groups of tokens."""


class GroupingMultiScaleBlock(ScaledGroupingBlock, MultiScaleBlock):
    """timm's block of a HieraDet with groups of tokens.

    Attributes:
        area_of_windows: Tokens of a window of the stage; 0 if it has none.
    """

    area_of_windows: int

    def cut(self, size: Size) -> Cut:
        return Cut(window_of(self, size), size)

    def area(self, cut: Cut) -> int:
        return self.area_of_windows or cut.area


def window_of(block: Any, size: Size) -> Size:
    """(h, w) of the windows of a block on a map of that size."""
    rows, columns = block.window_size if block.is_windowed else size
    return rows, columns


def shrink_block(block: MultiScaleBlock, window: Size, cells: Size) -> None:
    """Let a plain block work on windows that became smaller grids."""
    if block.is_windowed:
        replace_attributes(block, window_size=cells)


FORM = WindowForm(window_of, lambda attn, cut, tokens, grouped: 0)


class ReducedHieraDet(ReducedPooledStages, HieraDet):
    """timm's ``HieraDet`` with a reduction method in its windows and global blocks."""

    family = Family(
        MultiScaleBlock,
        MultiScaleAttention,
        GroupingMultiScaleBlock,
        GroupedMultiScaleAttention,
        shrink_block,
        MultiScaleAttention,
        lambda attn: rehouse(attn, MultiScaleAttention),
    )
    reason = "the stages of a HieraDet pool full maps, and its windows change from stage to stage"
    window_spec: tuple[int, ...]
    q_stride: Size
    pos_embed: Tensor

    def block_window(self, block: Any) -> Size:
        return window_of(block, WHOLE)

    def place(self, method: str, settings: Mapping[str, Setting]) -> None:
        super().place(method, settings)
        for stage in self.window_stages():
            area = max(rows * columns for rows, columns in map(self.block_window, stage.blocks))
            for block in stage.blocks:
                if isinstance(block, GroupingMultiScaleBlock):
                    block.area_of_windows = area

    def patch_grid(self, size: Size) -> Size:
        """(H, W) of the patches of images of that size."""
        if isinstance(self.patch_embed, PatchEmbed):
            return self.patch_embed.dynamic_feat_size(size)
        return convolved(self.patch_embed.proj, size)

    def check_run(self, x: Tensor) -> None:
        super().check_run(x)
        height, width = x.shape[-2:]
        side, grid = self.window_spec[0], self.patch_grid((height, width))
        if grid[0] % side or grid[1] % side:
            raise ValueError(
                f"images of {height} x {width} pixels are {grid[0]} x {grid[1]} patches, but the positions of a "
                f"HieraDet repeat every {side} patches; resize or pad the images to whole multiples of that"
            )

    def _embed(self, x: Tensor) -> Tensor:
        return self._pos_embed(self.patch_embed(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map (B, H/32, W/32, C) of images (B, 3, H, W)."""
        self.check_run(x)
        return self.run(self._embed(x))[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        coarse: bool = True,
    ) -> Any:
        """Full maps behind several stages or blocks; arguments and returns as timm's method."""
        return self._intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only, coarse)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term."""
        grid = self.patch_grid(size)
        terms = layers("embedding", self.patch_embed, grid[0] * grid[1])
        terms["embedding"] += resampling(self.pos_embed.shape[2:], grid, self.pos_embed.shape[1], 4, always=True)
        return terms + pooled_stages(self, grid, FORM, self.q_stride)
