"""The image encoder of Segment Anything (SAM, 2304.02643) as a host: windows, decomposed relative positions, a neck.

It is a plain ViT whose blocks attend inside windows, some of them to the whole map (2203.16527). All blocks are one
stage, which ends with the full map that the neck needs. ``effvit.hosts.windows`` says what methods do in the windows.
The whole map of a global block is one window to them: groups are made in proportion to its tokens, and smaller grids
reach it as the smaller map that they make up, as officially (hourglass_image_encoder.py@75a1c30).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models._features import feature_take_indices
from timm.models.vision_transformer_sam import Attention, Block, VisionTransformerSAM
from torch import Tensor, nn

from effvit.block import rehouse
from effvit.hosts.closed_form import embedding
from effvit.hosts.surface import check_images, check_output_fmt
from effvit.hosts.window_form import WindowForm, stage_terms
from effvit.hosts.windows import (
    WHOLE,
    Among,
    Cut,
    Family,
    GroupedAttention,
    ReducedWindows,
    ScaledGroupingBlock,
    Span,
    check_square,
    replace_attributes,
    run_blocks,
)
from effvit.layers.macs import Terms, convolutions, layers, norm, resampling
from effvit.protocols import Layer, Setting, Size

__all__ = ["ReducedSAM", "decomposed_bias"]


def distance_table(table: Tensor, side: int) -> Tensor:
    """Relative positions (L, D) for the distances 1 - side to side - 1, resized as timm does it: (2 * side - 1, D)."""
    if table.shape[0] == 2 * side - 1:
        return table
    return F.interpolate(table.T.unsqueeze(0), 2 * side - 1, mode="linear")[0].T


def products_by_key(q: Tensor, table: Tensor, place: Tensor, side: int) -> Tensor:
    """Products of queries with the relative positions of all places along one side.

    Args:
        q: (B, heads, K, D).
        table: (L, D) relative positions along the side.
        place: (B, K) row or column of each query.
        side: Places.

    Returns:
        (B, heads, K, side).
    """
    products = q @ distance_table(table, side).to(q.dtype).T  # (B, heads, K, 2 * side - 1)
    key = torch.arange(side, device=q.device)
    distance = place.unsqueeze(2) - key + side - 1  # (B, K, side)
    return products.gather(3, distance.unsqueeze(1).expand(-1, q.shape[1], -1, -1))


def decomposed_bias(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, among: Among) -> Tensor:
    """Decomposed relative positions (MViTv2, 2112.01526, eq. 4) between some tokens of each window.

    timm adds the row's and the column's product for each pair of places of a grid. Tokens at any places take theirs by
    a product with the places as indicators, which gathers nothing pair by pair.

    Args:
        q: (B*nW, heads, K, D) queries.
        rel_pos_h: (L, D) relative positions along rows.
        rel_pos_w: (L', D) along columns.
        among: Their places.

    Returns:
        (B*nW, heads, K, K).
    """
    height, width = among.window
    row, column = torch.div(among.anchor, width, rounding_mode="floor"), among.anchor % width
    by_place = torch.cat(
        [products_by_key(q, rel_pos_h, row, height), products_by_key(q, rel_pos_w, column, width)], dim=-1
    )  # (B*nW, heads, K, h + w)
    is_row = row.unsqueeze(1) == torch.arange(height, device=q.device).unsqueeze(1)  # (B*nW, h, K)
    is_column = column.unsqueeze(1) == torch.arange(width, device=q.device).unsqueeze(1)
    places = torch.cat([is_row, is_column], dim=1).to(q.dtype)  # (B*nW, h + w, K)
    return (by_place.flatten(1, 2) @ places).unflatten(1, (q.shape[1], -1))


class GroupedSAMAttention(GroupedAttention, Attention):
    """timm's attention of SAM among groups of tokens."""

    qkv: Layer
    q_norm: Layer
    k_norm: Layer
    proj_drop: Layer
    use_rel_pos: bool
    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(x)
        return self.q_norm(q), self.k_norm(k), v

    def _position_bias(self, q: Tensor, among: Among) -> Tensor | None:
        return decomposed_bias(q, self.rel_pos_h, self.rel_pos_w, among) if self.use_rel_pos else None

    def _output(self, y: Tensor) -> Tensor:
        return self.proj_drop(self.proj(y))


class GroupingSAMBlock(ScaledGroupingBlock, Block):
    """timm's block of SAM with groups of tokens.

    Attributes:
        area_of_windows: Tokens of a window of the network; 0 if it has none.
    """

    window_size: int
    area_of_windows: int

    def cut(self, size: Size) -> Cut:
        return Cut(window_of(self, size), size)

    def area(self, cut: Cut) -> int:
        return self.area_of_windows or cut.area


def shrink_block(block: Block, window: Size, cells: Size) -> None:
    """Let a plain block work on windows that became smaller grids; timm's attention resizes its relative positions."""
    check_square(cells, "VisionTransformerSAM")
    if block.window_size:
        replace_attributes(block, window_size=cells[0])


def position_macs(attn: Any, cut: Cut, tokens: int, grouped: bool) -> int:
    """MACs of the relative positions of all windows with so many tokens each."""
    if not attn.use_rel_pos:
        return 0
    sides, width = sum(cut.window), attn.num_heads * attn.head_dim
    resized = sum(
        resampling(table.shape[:1], (2 * side - 1,), attn.head_dim, 2)
        for side, table in zip(cut.window, (attn.rel_pos_h, attn.rel_pos_w), strict=True)
    )
    if not grouped:
        return resized + cut.number * tokens * sides * width
    products = tokens * (2 * sides - 2) * width + attn.num_heads * tokens**2 * sides
    return resized + cut.number * products


def window_of(block: Any, size: Size) -> Size:
    """(h, w) of the windows of a block on a map of that size."""
    return (block.window_size, block.window_size) if block.window_size else size


FORM = WindowForm(window_of, position_macs)


def sam(model: Any, size: Size) -> Terms:
    """MACs of SAM's image encoder, reduced or not, on one image (H, W) by term."""
    terms, grid = embedding(model.patch_embed, size)
    if model.pos_embed is not None:
        terms["embedding"] += resampling(model.pos_embed.shape[1:3], grid, model.embed_dim, 4, antialiased=True)
    terms += norm(model.norm_pre, grid[0] * grid[1])
    terms += stage_terms(model.blocks, getattr(model, "span", None), grid, FORM)
    terms += convolutions("neck", model.neck, grid)[0]
    if isinstance(model.head.global_pool.pool, nn.AdaptiveAvgPool2d):
        terms["pooling"] += grid[0] * grid[1] * model.num_features
    return terms + layers("head", model.head, 1)


class ReducedSAM(ReducedWindows, VisionTransformerSAM):
    """timm's ``VisionTransformerSAM`` with a reduction method in its windows and global blocks."""

    family = Family(
        Block,
        Attention,
        GroupingSAMBlock,
        GroupedSAMAttention,
        shrink_block,
        Attention,
        lambda attn: rehouse(attn, Attention),
    )
    reason = "the neck of a VisionTransformerSAM and its blocks with other windows need the full map"
    holds_blocks = True
    span: Span | None
    blocks: nn.Sequential
    neck: Layer
    pos_embed: Tensor | None
    pos_drop: Layer
    patch_drop: Layer
    norm_pre: Layer
    head: nn.Module
    grad_checkpointing: bool

    @property
    def dynamic_img_size(self) -> bool:
        """Whether images of any size are taken."""
        return not getattr(self.patch_embed, "strict_img_size", True)

    def window_stages(self) -> list[ReducedSAM]:
        return [self]

    def block_window(self, block: Any) -> Size:
        return window_of(block, WHOLE)

    def check_parts(self) -> None:
        super().check_parts()
        for i, block in enumerate(self.blocks):
            if getattr(block.attn, "rope", None) is not None:
                raise TypeError(
                    f"blocks.{i}.attn rotates queries and keys by tables of whole windows, which groups and smaller "
                    "grids of tokens do not have; create the host with use_rope=False"
                )

    def place(self, method: str, settings: Mapping[str, Setting]) -> None:
        super().place(method, settings)
        area = max(rows * columns for rows, columns in map(self.block_window, self.blocks))
        for block in self.blocks:
            if isinstance(block, GroupingSAMBlock):
                block.area_of_windows = area

    def stage_maps(self, x: Tensor) -> Iterator[Tensor]:
        yield self._embed(x)

    def check_run(self, x: Tensor) -> None:
        super().check_run(x)
        check_images(x, self)

    def _embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the map (B, H, W, C) that enters the blocks."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(self.pos_embed, x.shape[1:3])
        return self.norm_pre(self.patch_drop(self.pos_drop(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """The neck's map (B, C', H/patch, W/patch) of images (B, 3, H, W)."""
        self.check_run(x)
        x, _ = run_blocks(self.blocks, self._embed(x), self.span, checkpointing=self.grad_checkpointing)
        return self.neck(x.permute(0, 3, 1, 2))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Full maps behind several blocks; arguments and returns as timm's method.

        Args:
            x: Images (B, 3, H, W).
            indices: The last n blocks if an int, all if None, or block numbers.
            norm: Apply the neck to the maps.
            stop_early: Do not run the blocks behind the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: Return only the list of maps.

        Returns:
            (map of the neck, maps (B, C, H/patch, W/patch)), or the maps.
        """
        check_output_fmt(output_fmt, ("NCHW",))
        self.check_run(x)
        take: list[int]
        last: int
        take, last = feature_take_indices(len(self.blocks), indices)
        blocks = list(self.blocks)[: last + 1] if stop_early else self.blocks
        x, taken = run_blocks(blocks, self._embed(x), self.span, take, self.grad_checkpointing)
        maps = [y.permute(0, 3, 1, 2) for y in taken]
        maps = [self.neck(y) for y in maps] if norm else maps
        return maps if intermediates_only else (self.neck(x.permute(0, 3, 1, 2)), maps)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term."""
        return sam(self, size)
