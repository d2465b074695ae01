"""TinyViT (2207.10666) as a host: fewer tokens inside the windows of a stage, full maps from stage to stage.

Every block has a 3 x 3 convolution between attention and MLP, and every stage but the last is followed by one of stride
2, so no token can leave for good. ``effvit.hosts.windows`` says what methods do in the windows; smaller grids pass the
convolutions as a map of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.models import register_notrace_module
from timm.models.tiny_vit import Attention, TinyVit, TinyVitBlock, TinyVitStage
from torch import Tensor, nn

from effvit.block import rehouse
from effvit.hosts.windows import (
    Among,
    Cut,
    Family,
    GroupedAttention,
    GroupingBlock,
    ReducedWindows,
    Span,
    check_square,
    interpolated_biases,
    replace_attributes,
    run_blocks,
)
from effvit.protocols import Layer, Size
from effvit.tokens import wide_dtype

__all__ = ["ReducedTinyViT", "cluster_biases"]


class MergedAttention(GroupedAttention, Attention):
    """timm's attention of a TinyViT for some tokens of each window."""

    attention_biases: Tensor
    attention_bias_idxs: Tensor
    norm: Layer
    qkv: Layer
    key_dim: int
    val_dim: int

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B*nW, heads, K, 3D)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)  # (B*nW, heads, K, D) each
        return q, k, v

    def _position_bias(self, q: Tensor, among: Among) -> Tensor:
        pairs = self.attention_bias_idxs[among.anchor.unsqueeze(2), among.anchor.unsqueeze(1)]  # (B*nW, K, K)
        return self.attention_biases[:, pairs].transpose(0, 1)  # (B*nW, heads, K, K)


class MergingBlock(GroupingBlock, TinyVitBlock):
    """timm's block, with the most similar tokens of each window merged for attention and MLP."""

    window_size: int
    local_conv: Layer

    def cut(self, size: Size) -> Cut:
        return Cut((self.window_size, self.window_size), size)

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _compared(self, windows: Tensor, cut: Cut) -> Tensor:
        # The norm gives padding its bias, by which it is alike: no need to tell it apart.
        norm: Layer = getattr(self.attn, "norm")  # noqa: B009
        return norm(windows)

    def _between(self, x: Tensor) -> Tensor:
        return self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def cluster_biases(biases: Tensor, window: int, cells: int) -> Tensor:
    """Position biases between the clusters of a window, interpolated at the distances of their cells.

    Args:
        biases: (heads, window²) by rows and columns apart.
        window: Side of the window.
        cells: Side of its grid of clusters; a cell is window / cells wide.

    Returns:
        (heads, cells², cells²).
    """
    cell = torch.arange(cells, device=biases.device)
    distance = cell.to(wide_dtype(biases.dtype)) * (window / cells)  # (cells,)
    grid = biases.unflatten(1, (window, window))
    table = interpolated_biases(grid, (0, 0), (distance, distance))  # (heads, cells, cells)
    apart = (cell.unsqueeze(1) - cell).abs()  # (cells, cells)
    return table[:, apart[:, None, :, None], apart[None, :, None, :]].flatten(3).flatten(1, 2)


class LiveAttention(Attention):
    """timm's attention of a TinyViT with the position biases that its parameter holds now.

    timm's keeps them from one forward pass in eval mode to the next, until ``train`` is called: that of a model that
    shares the parameter is another one.
    """

    attention_biases: Tensor
    attention_bias_idxs: Tensor

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """(heads, N, N)."""
        return self.attention_biases[:, self.attention_bias_idxs]


class ClusterAttention(Attention):
    """timm's attention of a TinyViT among the clusters of each window.

    Attributes:
        cells: Side of the grid of clusters.
    """

    cells: int
    attention_biases: Tensor
    resolution: tuple[int, int]

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """(heads, cells², cells²)."""
        return cluster_biases(self.attention_biases, self.resolution[0], self.cells)


def shrink_block(block: TinyVitBlock, window: Size, cells: Size) -> None:
    """Let a plain block work on windows that became smaller grids."""
    check_square(cells, "TinyVit")
    replace_attributes(block, window_size=cells[0])
    block.attn = rehouse(block.attn, ClusterAttention)
    block.attn.cells = cells[0]


class WindowStage(TinyVitStage):
    """timm's stage, of which some blocks may see smaller grids in place of each window.

    Attributes:
        span: These blocks.
    """

    span: Span | None
    downsample: Layer
    blocks: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) of the stage before -> (B, C, H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)  # (B, H', W', C)
        x, _ = run_blocks(self.blocks, x, self.span)
        return x.permute(0, 3, 1, 2)


register_notrace_module(WindowStage)  # as timm does with its block, which torch.fx cannot trace either


class ReducedTinyViT(ReducedWindows, TinyVit):
    """timm's ``TinyVit`` with a reduction method in its windows; everything else is timm's."""

    family = Family(
        TinyVitBlock,
        Attention,
        MergingBlock,
        MergedAttention,
        shrink_block,
        ClusterAttention,
        lambda attn: rehouse(attn, LiveAttention),
        LiveAttention,
    )
    reason = "the blocks of a TinyVit convolve full maps"
    open_sides = 2
    stages: nn.Sequential

    def own_stages(self) -> None:
        self.stages = rehouse(self.stages, nn.Sequential)
        for i in range(1, len(self.stages)):
            self.stages[i] = rehouse(self.stages[i], WindowStage)

    def window_stages(self) -> list[WindowStage]:
        return [stage for stage in self.stages if isinstance(stage, WindowStage)]

    def block_window(self, block: Any) -> Size:
        return block.window_size, block.window_size

    def stage_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stages[0](self.patch_embed(x))  # the stem
        for stage in self.window_stages():
            yield stage.downsample(x).permute(0, 2, 3, 1)
            x = stage(x)
