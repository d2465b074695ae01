"""Closed forms of the towers of vision-language models, dense or reduced (``effvit.hosts.towers``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.deepseek_vit import DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4Attention, Gemma4Block, Gemma4VitEncoder
from timm.models.qwen3_vit import Qwen3VitEncoder
from torch import nn

from effvit.hosts.closed_form import embedding, plain_block, run_blocks
from effvit.layers.macs import Terms, attention, layers, norm, resampling
from effvit.protocols import Size
from effvit.recover import FILLS, AttentionRecovery
from effvit.reducers import METHODS

__all__ = ["projected_form", "tower_block", "tower_embedding", "tower_form", "tower_positions"]


def tower_form(model: Any, size: Size, counts: Sequence[int] | None) -> Terms:
    """MACs of one image (H, W) by term: what ``forward`` runs.

    Args:
        model: An encoder or classifier of ``effvit.hosts.towers``, or timm's own; with a fill that
            ``effvit.register_fill`` added, without what the fill costs.
        size: (H, W) of the image.
        counts: Patch tokens that leave each block of a method that adapts to the image.
    """
    tower = getattr(model, "encoder", model)
    terms, grid = tower_embedding(tower, size)
    patches = grid[0] * grid[1]
    of_blocks, left, _ = run_blocks(model, tower.blocks, grid, counts, tower_block)
    projected, outputs = projector(tower, grid)
    means = not projected and model.global_pool == "avg"
    if left < patches:
        terms += restored(model, left, patches, means)
    if isinstance(tower, DeepseekVitEncoder):
        soft = left < patches and METHODS[model.method].soft
        terms += norm(tower.norm, left if means and not soft else patches)  # before or behind the grid is restored
    terms += of_blocks + projected
    if tower is not model:
        rows = 1 if model.global_pool == "avg" else outputs
        terms += norm(model.norm, rows) + layers("head", model.head, rows)
    return terms


def tower_embedding(tower: Any, size: Size) -> tuple[Terms, Size]:
    """Patch and position embedding of an image, and the grid of its patches."""
    embed = tower.patch_embed
    if isinstance(tower, Gemma4VitEncoder):
        grid = size[0] // embed.patch_size[0], size[1] // embed.patch_size[1]
        patches = grid[0] * grid[1]
        terms = layers("embedding", embed.input_proj, patches)
        # A row of each of two tables, taken by a product with one-hot vectors.
        terms["embedding"] += 2 * patches * embed.position_embedding_size * tower.embed_dim
    else:
        terms, grid = embedding(embed, size)
    return terms + tower_positions(tower, grid), grid


def tower_positions(tower: Any, grid: Size) -> Terms:
    """What is made of positions for a grid, once for all images of a batch."""
    if isinstance(tower, Qwen3VitEncoder):
        return Terms(embedding=resampling((tower.pos_embed_grid_size,) * 2, grid, tower.embed_dim, 2))
    if isinstance(tower, Gemma4VitEncoder):  # angles of both axes
        return Terms(embedding=2 * grid[0] * grid[1] * tower.rotary_emb.inv_freq.numel())
    return Terms()


def tower_block(block: Any, keys: int, queries: int, rows: int) -> Terms:
    """A block with so many keys and queries in its attention and so many rows in its MLP."""
    if not isinstance(block, Gemma4Block):
        return plain_block(block, keys, queries, rows)
    terms = norm(block.norm1, keys) + gemma_attention(block.attn, keys, queries) + norm(block.norm2, queries)
    return terms + norm(block.norm3, rows) + layers("mlp", block.mlp, rows) + norm(block.norm4, rows)


def gemma_attention(attn: Gemma4Attention, keys: int, queries: int) -> Terms:
    """Projections and products of timm's ``Gemma4Attention``."""
    terms = attention(queries * keys, attn.num_heads * attn.head_dim)
    for name, heads in (("q", attn.num_heads), ("k", attn.num_kv_heads), ("v", attn.num_kv_heads)):
        terms += layers("projection", getattr(attn, f"{name}_proj"), keys)
        terms += norm(getattr(attn, f"{name}_norm"), keys * heads)
    return terms + layers("projection", attn.o_proj, queries)


def projector(tower: Any, grid: Size) -> tuple[Terms, int]:
    """What makes tokens of a language model of the patches, and how many rows leave the tower."""
    patches = grid[0] * grid[1]
    merger, aligner = getattr(tower, "merger", None), getattr(tower, "aligner", None)
    if merger is not None:
        cells = patches // merger.merge_size**2
        return norm(merger.norm, patches) + layers("projector", nn.Sequential(merger.fc1, merger.fc2), cells), cells
    if aligner is not None:
        cells = -(-grid[0] // aligner.downsample_ratio) * -(-grid[1] // aligner.downsample_ratio)
        return layers("projector", aligner, cells), cells
    if tower.global_pool == "soft":
        cells = patches // tower.pooler.pooling_kernel_size**2
        return Terms(projector=cells * patches * tower.embed_dim), cells
    return Terms(), patches


def projected_form(tower: Any, grid: Size) -> tuple[Terms, int]:
    """What the projector of a tower computes of all its patches, DeepSeek's norm included, and its channels C'."""
    terms, _ = projector(tower, grid)
    if isinstance(tower, DeepseekVitEncoder):
        terms += norm(tower.norm, grid[0] * grid[1])
    layer = getattr(tower, "merger", None) or getattr(tower, "aligner", None)
    return terms, tower.embed_dim if layer is None else layer.out_features


def restored(model: Any, left: int, patches: int, means: bool) -> Terms:
    """The full grid from ``left`` tokens: products for what is reconstructed or recovered by attention, else none."""
    method = METHODS[model.method]
    if method.soft if means else FILLS[model.recover].reference:
        return Terms(reduction=2 * patches * left * model.embed_dim)
    recovery: AttentionRecovery | None = model.recovery
    if means or recovery is None:
        return Terms()
    terms = norm(recovery.norm, patches + left) + layers("recovery", recovery.attn.q, patches)
    terms += layers("recovery", recovery.attn.kv, left) + layers("recovery", recovery.attn.proj, patches)
    return terms + attention(patches * left, recovery.attn.q.out_features)
