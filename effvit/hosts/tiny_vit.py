"""TinyViT (2207.10666) as a host: fewer tokens inside the windows of a stage, full maps from stage to stage.

Every block has a 3 x 3 convolution between attention and MLP, and every stage but the last is followed by one of stride
2, so no token can leave for good. Two methods fit:

- ToMe: the r most similar tokens of a window are merged before attention and given back behind it, and so are the same
  ones around the MLP, as in token merging for Stable Diffusion (2303.17604). The convolution sees the full map. Tokens
  are compared as they enter attention, normalised: its keys are not there yet.
- Expedite: each window is clustered to a smaller grid, the blocks work on the map of the clusters, convolution too, and
  the patches are reconstructed, as in the windows of SAM (hourglass_image_encoder.py@75a1c30). Position biases are
  interpolated. This ends with the stage at the latest; stages that follow cluster their own windows.

Blocks are counted through, from the first with attention. Padding of the last windows takes part, as in timm's model;
where it leaves more tokens than the map has, the MLP sees the map itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.tiny_vit import Attention, TinyVit, TinyVitBlock, TinyVitStage
from torch import Tensor, nn

from effvit.block import copy_shared, rehouse
from effvit.hosts.surface import Reduced
from effvit.layers.windows import from_windows, num_windows, to_windows
from effvit.protocols import Layer, Setting
from effvit.recording import refuse_fx, refuse_legacy_onnx
from effvit.recover import reconstruct_tokens
from effvit.reducers import METHODS, Reducer
from effvit.reducers.base import check_finite
from effvit.reducers.expedite import Expedite, cluster_centres
from effvit.reducers.tome import Matching, ToMe, bipartite_soft_matching, matching_target, merge_tokens
from effvit.tokens import flat_rows, take_rows, wide_dtype, wide_product

__all__ = ["WINDOW_METHODS", "ReducedTinyViT", "cluster_biases", "reduce_windows"]

WINDOW_METHODS = ("tome", "expedite")


class ReducedTinyViT(Reduced, TinyVit):
    """timm's ``TinyVit`` with a reduction method in its windows; everything else is timm's."""

    depths: Sequence[int]
    stages: nn.Sequential

    def forward_features(self, x: Tensor) -> Tensor:
        """Final map (B, C, H/32, W/32) of images (B, 3, H, W)."""
        self._check_run(x)
        return super().forward_features(x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's method, with its arguments."""
        self._check_run(x)
        return super().forward_intermediates(x, *args, **kwargs)

    def _check_run(self, x: Tensor) -> None:
        self.check_whole()
        refuse_fx(
            x,
            "a TinyViT, timm's own too, pads its windows as the size of a map asks",
            "use torch.export, or timm's create_feature_extractor, which does not look into its blocks",
            extractors=False,
        )
        refuse_legacy_onnx(f"a model reduced by {self.method}")


# -- merging ---------------------------------------------------------------------------------------------


class WindowMerging(NamedTuple):
    """Which tokens of each window share one.

    Attributes:
        matching: The pairs.
        target: (B*nW, N) place of each token among those left.
    """

    matching: Matching
    target: Tensor

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Windows x (B*nW, N, C) -> means (B*nW, N-r, C) and how many tokens each stands for (B*nW, N-r)."""
        return merge_tokens(x, None, self.matching)

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets what the one it is part of became: y (B*nW, N-r, C) -> (B*nW, N, C)."""
        return take_rows(y, flat_rows(self.target, y.shape[1]))


class MergedAttention(Attention):
    """timm's attention of a TinyViT for some tokens of each window."""

    attention_biases: Tensor
    attention_bias_idxs: Tensor
    norm: Layer
    qkv: Layer
    proj: Layer
    num_heads: int
    key_dim: int
    val_dim: int

    def forward(self, x: Tensor, anchor: Tensor, size: Tensor | None) -> Tensor:
        """Attention among tokens that stand at given places of the window.

        Args:
            x: (B*nW, K, C).
            anchor: (B*nW, K) place of each in the window.
            size: (B*nW, K) tokens each counts for as a key; None: one.

        Returns:
            (B*nW, K, C).
        """
        pairs = self.attention_bias_idxs[anchor.unsqueeze(2), anchor.unsqueeze(1)]  # (B*nW, K, K)
        bias = self.attention_biases[:, pairs].transpose(0, 1)  # (B*nW, heads, K, K)
        if size is not None:
            bias = bias + size.log().to(bias.dtype)[:, None, None]
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B*nW, heads, K, 3D)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)  # (B*nW, heads, K, D) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(y.transpose(1, 2).flatten(2))


class MergingBlock(TinyVitBlock):
    """timm's block, with the most similar tokens of each window merged for attention and MLP.

    Attributes:
        reducer: Says how many, and whether they count as keys by their size.
    """

    reducer: ToMe
    window_size: int
    attn: MergedAttention
    mlp: Layer
    local_conv: Layer
    drop_path1: Layer
    drop_path2: Layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, H, W, C) -> (B, H, W, C)."""
        size, window = x.shape[1:3], self.window_size
        windows = to_windows(x, window)  # (B*nW, N, C)
        merging = self.match(windows)
        merged, weight = merging.merge(windows)  # (B*nW, N-r, C), (B*nW, N-r)
        y: Tensor = self.attn(merged, merging.matching.order, weight if self.reducer.prop_attn else None)
        x = x + self.drop_path1(from_windows(merging.spread(y), window, size))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if merged.shape[0] * merged.shape[1] >= x.shape[0] * size[0] * size[1]:  # of a small map in padded windows
            return x + self.drop_path2(self.mlp(x))
        y = self.mlp(merging.merge(to_windows(x, window))[0])  # (B*nW, N-r, C)
        return x + self.drop_path2(from_windows(merging.spread(y), window, size))

    @torch.no_grad()
    def match(self, windows: Tensor) -> WindowMerging:
        """Match the tokens of windows (B*nW, N, C)."""
        origin, r = self.reducer.origin("tokens"), self.reducer.num_merged(windows.shape[1])
        matching = bipartite_soft_matching(self.attn.norm(windows), r, 0, origin=origin, x=windows)
        return WindowMerging(matching, matching_target(matching, windows[..., 0].long()))


# -- clusters --------------------------------------------------------------------------------------------


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
    distance = cell.to(wide_dtype(biases.dtype)).unsqueeze(1) * (window / cells)  # (cells, 1)
    place = torch.arange(window, device=biases.device)
    weights = (1 - (distance - place).abs()).clamp(min=0)  # (cells, window)
    table = wide_product(wide_product(weights, biases.unflatten(1, (window, window))), weights.T)
    table = table.to(biases.dtype)  # (heads, cells, cells)
    apart = (cell.unsqueeze(1) - cell).abs()  # (cells, cells)
    return table[:, apart[:, None, :, None], apart[None, :, None, :]].flatten(3).flatten(1, 2)


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


class ClusteredStage(TinyVitStage):
    """timm's stage, of which the blocks ``first`` to ``last`` - 1 see a grid of clusters in place of each window.

    Attributes:
        reducer: How to cluster and to reconstruct.
        window: Side of a window.
        cells: Side of its grid of clusters.
        first: Block of this stage before which the windows are clustered.
        last: Block before which, or behind which, if there is none, all patches are reconstructed.
    """

    reducer: Expedite
    downsample: Layer
    blocks: Sequence[Layer]
    window: int
    cells: int
    first: int
    last: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) of the stage before -> (B, C, H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)  # (B, H', W', C)
        for block in self.blocks[: self.first]:
            x = block(x)
        x = self.clustered(x)
        for block in self.blocks[self.last :]:
            x = block(x)
        return x.permute(0, 3, 1, 2)

    def clustered(self, x: Tensor) -> Tensor:
        """The blocks that see clusters: map (B, H, W, C) -> (B, H, W, C), reconstructed."""
        reducer, size, window, cells = self.reducer, x.shape[1:3], self.window, self.cells
        patches = to_windows(x, window)  # (B*nW, N, C)
        options = (reducer.num_iters, reducer.temperature, reducer.window_size)
        maps = patches.unflatten(1, (window, window))  # (B*nW, window, window, C)
        centres = cluster_centres(maps, (cells, cells), *options).flatten(1, 2)  # (B*nW, cells², C)
        check_finite(centres.detach().sum(-1), reducer.origin("cluster centres"), x)
        grid = [num_windows(side, window) * cells for side in size]
        z = from_windows(centres.to(x.dtype), cells, grid)  # (B, nH*cells, nW*cells, C)
        for block in self.blocks[self.first : self.last]:
            z = block(z)
        z = to_windows(z, cells)  # (B*nW, cells², C)
        x = reconstruct_tokens(z, patches, centres, reducer.temperature, reducer.k, reducer.norm)  # (B*nW, N, C)
        return from_windows(x, window, size)


register_notrace_module(ClusteredStage)  # as timm does with its block, which torch.fx cannot trace either


# -- the whole model -------------------------------------------------------------------------------------


def reduce_windows(dense: TinyVit, method: str, settings: Mapping[str, Setting], share: bool = True) -> ReducedTinyViT:
    """The model with a method in its windows; the one given stays as it is.

    Args:
        dense: timm's model, or one that is reduced already: its method is replaced.
        method: One of WINDOW_METHODS.
        settings: As for ``effvit.sparsify``; blocks are those with attention, and ``r`` is counted in each window.
        share: On the same parameters and buffers, else on copies of them.

    Raises:
        ValueError: Another method, or clusters that do not fit the windows.
    """
    if method not in WINDOW_METHODS:
        raise ValueError(
            f"{method} takes tokens away for good, but the blocks of a TinyVit convolve full maps; "
            f"use method {' or '.join(map(repr, WINDOW_METHODS))}, which give them back within a stage"
        )
    host = rehouse(copy_shared(dense, share), ReducedTinyViT)
    plan = METHODS[method].plan(sum(host.depths[1:]), **settings)
    start = 0
    host.stages = rehouse(host.stages, nn.Sequential)
    for i, depth in enumerate(host.depths[1:], start=1):
        stage = plain_stage(host.stages[i])
        host.stages[i] = merging_stage(stage, plan, start) if method == "tome" else clustered_stage(stage, plan, start)
        start += depth
    return host


def plain_stage(stage: TinyVitStage) -> TinyVitStage:
    """timm's stage on the same parameters, without a method."""
    stage = rehouse(stage, TinyVitStage)
    stage._modules.pop("reducer", None)
    stage.blocks = rehouse(stage.blocks, nn.Sequential)
    for i, block in enumerate(stage.blocks):
        stage.blocks[i] = plain_block(block)
    return stage


def plain_block(block: TinyVitBlock) -> TinyVitBlock:
    """timm's block on the same parameters, without a method."""
    block = rehouse(block, TinyVitBlock)
    block._modules.pop("reducer", None)
    block.attn = rehouse(block.attn, Attention)
    block.window_size = block.attn.resolution[0]
    return block


def merging_stage(stage: TinyVitStage, plan: dict[int, Reducer], start: int) -> TinyVitStage:
    """The stage, whose first block is number ``start``, with merging in the blocks of the plan."""
    for i, block in enumerate(stage.blocks):
        reducer = plan.get(start + i)
        if not isinstance(reducer, ToMe):
            continue
        reducer.block = start + i
        stage.blocks[i] = block = rehouse(block, MergingBlock)
        block.reducer = reducer
        block.attn = rehouse(block.attn, MergedAttention)
    return stage


def clustered_stage(stage: TinyVitStage, plan: dict[int, Reducer], start: int) -> TinyVitStage:
    """The stage, whose first block is number ``start``, with clusters in its blocks that lie within the plan."""
    blocks: Sequence[TinyVitBlock] = stage.blocks
    ends = sorted(plan) if len(plan) == 2 else [*plan, start + len(blocks)]  # none in an empty plan
    first, last = max(ends[0] - start, 0), min(ends[-1] - start, len(blocks))
    if not plan or first >= last:
        return stage
    reducer = copy.copy(plan[ends[0]])  # each stage names its own first block in errors
    assert isinstance(reducer, Expedite)
    window: int = blocks[0].window_size
    cells = window_cells(reducer, window)
    if cells == window:
        return stage
    stage = rehouse(stage, ClusteredStage)
    stage.reducer, stage.window, stage.cells, stage.first, stage.last = reducer, window, cells, first, last
    reducer.block = start + first
    for block in blocks[first:last]:
        block.window_size = cells
        block.attn = rehouse(block.attn, ClusterAttention)
        block.attn.cells = cells
    return stage


def window_cells(reducer: Expedite, window: int) -> int:
    """Side of the grid of clusters in a window; a ValueError if it is none, or not square as the window is."""
    rows, columns = reducer.clusters((window, window))
    if rows != columns:
        raise ValueError(
            f"num_clusters must be square in the square windows of a TinyVit, got {rows} x {columns}; "
            "give a square number or a keep_rate"
        )
    reducer.count_on(window * window, (window, window))
    return rows
