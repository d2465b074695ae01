"""Closed forms of plain vision transformers, with and without a reduction method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import nn

from effvit.layers.macs import (
    PlainBlock,
    SelfAttention,
    Terms,
    attend,
    attention,
    convolutions,
    feedforward,
    layers,
    norm,
)
from effvit.protocols import PatchEmbedding, Size
from effvit.reducers import METHODS, Reducer
from effvit.reducers.cost import BlockSizes, Change

__all__ = ["PlainViT", "classifier", "embedding", "plain_vit"]


class Pool(Protocol):
    """What is asked of timm's ``AttentionPoolLatent``."""

    latent_len: int
    num_heads: int
    head_dim: int

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers by name."""
        ...


class HeadedAttention(SelfAttention, Protocol):
    """Attention that tells the width of its heads."""

    head_dim: int


class Block(PlainBlock, Protocol):
    """A block of a plain ViT."""

    attn: HeadedAttention


class Classifies(Protocol):
    """A ViT behind its blocks."""

    num_prefix_tokens: int
    embed_dim: int
    global_pool: str
    attn_pool: Pool
    norm: nn.Module
    head: nn.Module


class PlainViT(Classifies, Protocol):
    """A plain ViT of timm, reduced or not."""

    patch_embed: PatchEmbedding
    norm_pre: nn.Module
    blocks: Sequence[Block]


def embedding(patch_embed: PatchEmbedding, size: Size) -> tuple[Terms, Size]:
    """The patch embedding of images of that size, and the grid of patches."""
    if patch_embed.dynamic_img_pad:
        patch = patch_embed.patch_size
        size = -(-size[0] // patch[0]) * patch[0], -(-size[1] // patch[1]) * patch[1]
    # In the order they are applied: the convolutions of a stem come before the projection, though it was made first.
    parts = sorted(patch_embed.named_children(), key=lambda part: part[0] in ("proj", "norm"))
    return convolutions("embedding", nn.Sequential(*(part for _, part in parts)), size)


def plain_vit(model: PlainViT, size: Size, counts: Sequence[int] | None) -> Terms:
    """A plain ViT; ``counts`` are the patch tokens that leave each block of a method that adapts to the image."""
    terms, grid = embedding(model.patch_embed, size)
    patches = left = grid[0] * grid[1]
    prefix, dim = model.num_prefix_tokens, model.embed_dim
    terms += norm(model.norm_pre, prefix + patches)
    reducers: Mapping[int, Reducer] = getattr(model, "reducers", {})
    for reducer in list(reducers.values())[:1]:
        terms["reduction"] += reducer.start_cost(patches, dim)
    for i, block in enumerate(model.blocks):
        change = Change(left, left, left, 0)
        if i in reducers:
            attn = block.attn
            leaving = left if counts is None else counts[i]
            last = i == len(model.blocks) - 1
            num_class: int = getattr(model, "num_class_tokens", 0)  # of a reduced model
            sizes = BlockSizes(left, leaving, prefix, num_class, grid, dim, attn.num_heads, attn.head_dim, last)
            change = reducers[i].cost(sizes)
        left = change.left
        keys, queries = prefix + change.keys, prefix + change.queries
        terms += norm(block.norm1, keys) + attend(block.attn, keys, queries) + feedforward(block, prefix + left)
        terms["reduction"] += change.macs
    return terms + classifier(model, left, patches)


def classifier(model: Classifies, left: int, patches: int) -> Terms:
    """Final norm, pooling and heads of a plain ViT that ends with ``left`` of its patch tokens."""
    prefix, terms = model.num_prefix_tokens, Terms()
    token_head: nn.Module | None = getattr(model, "aux_head", None)  # LV-ViT's, on every patch
    pools = model.global_pool != "token" or token_head is not None
    method = METHODS.get(getattr(model, "method", ""))
    if method is not None and method.soft and pools and left < patches:
        terms["reduction"] += 2 * patches * left * model.embed_dim  # distances, and mixtures of the centres
        left = patches
    pooled_norm: nn.Module = getattr(model, "fc_norm", nn.Identity())
    terms += norm(model.norm, prefix + left) + norm(pooled_norm, 1)
    if token_head is not None:
        terms += layers("head", token_head, patches if method is not None and method.keeps_every_patch else left)
    if model.global_pool == "map":
        include = bool(getattr(model, "pool_include_prefix", True))
        terms += attention_pool(model.attn_pool, left + (prefix if include else 0))
    of_distillation: nn.Module | None = getattr(model, "head_dist", None)
    for head in (model.head, of_distillation):
        terms += layers("head", head, 1) if head is not None else Terms()
    return terms


def attention_pool(pool: Pool, keys: int) -> Terms:
    """timm's pooling by the attention of learned queries."""
    queries, heads = pool.latent_len, pool.num_heads
    terms = attention(queries * keys, heads * pool.head_dim)
    for name, layer in pool.named_children():
        if name in ("q_norm", "k_norm"):
            terms += norm(layer, heads * (queries if name == "q_norm" else keys))
        else:
            terms += layers("pooling", layer, keys if name == "kv" else queries)
    return terms
