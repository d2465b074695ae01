"""Closed forms of plain vision transformers, with and without a reduction method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn

from effvit.hosts.native_patches import NominalPatches
from effvit.layers.macs import (
    PlainBlock,
    Scores,
    SelfAttention,
    Terms,
    attend,
    attention,
    convolutions,
    feedforward,
    layers,
    norm,
    position_bias,
    resampling,
    score,
)
from effvit.protocols import PatchEmbedding, Size
from effvit.reducers import METHODS, Reducer
from effvit.reducers.cost import BlockSizes, Change

__all__ = [
    "PlainViT",
    "block_sizes",
    "classifier",
    "embedding",
    "entrance",
    "plain_block",
    "plain_vit",
    "positions",
    "run_blocks",
    "scoring",
]


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


class Heads(Scores, Protocol):
    """Attention with heads, whatever its projections are."""

    head_dim: int


class Attends(Protocol):
    """A block with attention."""

    norm1: nn.Module

    @property
    def attn(self) -> Heads:
        """Its attention."""
        ...


BlockT = TypeVar("BlockT", bound=Attends)
BlockCost: TypeAlias = Callable[[BlockT, int, int, int], Terms]


class Embeds(Protocol):
    """A model that tells the width of its tokens."""

    embed_dim: int


class Classifies(Protocol):
    """A ViT behind its blocks."""

    num_prefix_tokens: int
    embed_dim: int
    global_pool: str
    attn_pool: Pool
    norm: nn.Module
    head: nn.Module


class PlainViT(Classifies, Protocol):
    """A plain ViT of timm, reduced or not, behind its patch embedding."""

    blocks: Sequence[Block]


def embedding(patch_embed: PatchEmbedding, size: Size) -> tuple[Terms, Size]:
    """The patch embedding of images of that size, and the grid of patches."""
    if patch_embed.dynamic_img_pad:
        patch = patch_embed.patch_size
        size = -(-size[0] // patch[0]) * patch[0], -(-size[1] // patch[1]) * patch[1]
    projection = dict(patch_embed.named_children())
    if isinstance(projection.get("proj"), nn.Linear):  # of patches that were cut out before
        grid = patch_embed.dynamic_feat_size(size)
        terms = Terms()
        for layer in projection.values():
            terms += layers("embedding", layer, grid[0] * grid[1])
        return terms, grid
    # In the order they are applied: the convolutions of a stem come before the projection, though it was made first.
    parts = sorted(patch_embed.named_children(), key=lambda part: part[0] in ("proj", "norm"))
    return convolutions("embedding", nn.Sequential(*(part for _, part in parts)), size)


def plain_vit(model: PlainViT, patch_embed: PatchEmbedding, size: Size, counts: Sequence[int] | None) -> Terms:
    """A plain ViT behind its patch embedding.

    Args:
        model: The ViT, reduced or not.
        patch_embed: Its own, or the like of a ``NaFlexVit``.
        size: (H, W) of an image.
        counts: Patch tokens that leave each block of a method that adapts to the image; None for any other.
    """
    terms, grid = entrance(model, patch_embed, size)
    of_blocks, left, merges = run_blocks(model, model.blocks, grid, counts, plain_block)
    return terms + of_blocks + classifier(model, left, grid[0] * grid[1], merges)


def entrance(model: PlainViT, patch_embed: PatchEmbedding, size: Size) -> tuple[Terms, Size]:
    """What a plain ViT computes beside its blocks and head, and the grid of patches; arguments as for ``plain_vit``.

    The patch embedding, the norm behind it, and the relative positions that MLPs make for the blocks.
    """
    terms, grid = embedding(patch_embed, size)
    terms += norm(getattr(model, "norm_pre", nn.Identity()), model.num_prefix_tokens + grid[0] * grid[1])
    return terms + positions(model, patch_embed, grid), grid


def positions(model: PlainViT, patch_embed: PatchEmbedding, grid: Size) -> Terms:
    """What is made of tables of positions for a grid, once for all images of a batch."""
    terms = Terms()
    if isinstance(patch_embed, NominalPatches):
        terms["embedding"] += patch_embed.resampling_macs(grid)
    elif getattr(model, "dynamic_img_size", False):
        terms["embedding"] += resampled_positions(getattr(model, "pos_embed", None), patch_embed.grid_size, grid)
    for biases in (getattr(model, "shared_rel_pos", None), *(getattr(b.attn, "rel_pos", None) for b in model.blocks)):
        terms += position_bias(biases, grid)
    return terms


def resampled_positions(table: Tensor | None, old: Size, new: Size) -> int:
    """MACs of a table (1, P+N, C) of positions on another grid, as timm's ``resample_abs_pos_embed`` makes it."""
    return 0 if table is None else resampling(old, new, table.shape[-1], 4, antialiased=True)


def plain_block(block: Block, keys: int, queries: int, rows: int) -> Terms:
    """A block with so many keys and queries in its attention and so many rows in its MLP, without position biases."""
    normed = queries if getattr(block, "post_norm", False) else keys
    return norm(block.norm1, normed) + attend(block.attn, keys, queries) + feedforward(block, rows)


def scoring(block: Attends, rows: int) -> Terms:
    """Of the first half of a block what scores tokens: the norm of so many rows, their queries and keys."""
    terms = score(block.attn, rows)
    return terms if getattr(block, "post_norm", False) else terms + norm(block.norm1, rows)


def beside(block: Attends, change: Change, prefix: int) -> int:
    """MACs of the queries and keys that a method makes beside those of the tokens that attend, and has them spare."""
    scored = Terms() if change.scored is None else scoring(block, prefix + change.scored)
    spared = Terms() if change.valued is None else score(block.attn, prefix + change.valued)
    return sum(scored.values()) - sum(spared.values())


class Run(NamedTuple):
    """What blocks do.

    Attributes:
        terms: Their MACs.
        left: Patch tokens that leave the last one.
        merges: Whether a method merged tokens that may also drop some, see ``Change``.
    """

    terms: Terms
    left: int
    merges: bool


def run_blocks(
    model: Embeds, blocks: Sequence[BlockT], grid: Size, counts: Sequence[int] | None, cost: BlockCost[BlockT]
) -> Run:
    """The blocks of a plain ViT, reduced or not.

    Args:
        model: The ViT, for its reducers and widths.
        blocks: Its blocks.
        grid: (H, W) of the patches.
        counts: As for ``plain_vit``.
        cost: (block, keys, queries, rows of the MLP) -> terms of one block without its method.
    """
    terms, merges = Terms(), False
    left, dim = grid[0] * grid[1], model.embed_dim
    prefix = prefix_tokens(model)
    reducers: Mapping[int, Reducer] = getattr(model, "reducers", {})
    for reducer in list(reducers.values())[:1]:
        terms["reduction"] += reducer.start_cost(left, dim)
    for i, block in enumerate(blocks):
        change = Change(left, left, left, 0)
        if i in reducers:
            sizes = block_sizes(model, block, grid, left)._replace(last=i == len(blocks) - 1)
            change = reducers[i].cost(sizes if counts is None else sizes._replace(left=counts[i]))
            terms[reducers[i].cost_term] += change.macs + beside(block, change, prefix)
        left, merges = change.left, merges or change.merges
        terms += cost(block, prefix + change.keys, prefix + change.queries, prefix + left)
        left = left if change.behind is None else change.behind
    return Run(terms, left, merges)


def prefix_tokens(model: Embeds) -> int:
    """Prefix tokens of a plain ViT; timm's classifier of Gemma does not say that it has none."""
    return getattr(model, "num_prefix_tokens", 0)


def block_sizes(model: Embeds, block: Attends, grid: Size, left: int) -> BlockSizes:
    """What a method meets in a block that ``left`` patch tokens of that grid enter."""
    num_class: int = getattr(model, "num_class_tokens", 0)  # of a reduced model
    attn = block.attn
    prefix, dim = prefix_tokens(model), model.embed_dim
    return BlockSizes(left, left, prefix, num_class, grid, dim, attn.num_heads, attn.head_dim, last=False)


def classifier(model: Classifies, left: int, patches: int, merges: bool = False) -> Terms:
    """Final norm, pooling and heads of a plain ViT that ends with ``left`` of its patch tokens; ``merges``: see Run."""
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
        repeats = merges or (method is not None and method.keeps_every_patch and method.has_sizes)
        terms += layers("head", token_head, patches if repeats else left)
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
