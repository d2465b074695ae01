"""The terms that every closed form is a sum of: layers on a number of rows, attention between numbers of
tokens, and the blocks made of them.

The conventions are those of ``effvit.measure.flops``: one MAC for each weight and row, 5 for each element of an affine
LayerNorm and 4 without weights, 3 and 2 for each of an RMSNorm, 2 for each of an affine BatchNorm in eval mode, 1 for
each element an adaptive average pooling reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol, TypeAlias, runtime_checkable

from timm.layers import RmsNorm, RmsNormFp32
from torch import nn

from effvit.layers.cross_attention import CrossBlock, WindowCrossBlock
from effvit.protocols import Size

__all__ = [
    "Scores",
    "Terms",
    "attend",
    "attention",
    "convolutions",
    "convolved",
    "cross_block",
    "feedforward",
    "layers",
    "norm",
    "plain_block",
    "position_bias",
    "resampling",
    "score",
    "window_block",
    "window_cross",
    "windows",
]

Terms: TypeAlias = Counter[str]
"""MACs by term."""


class Scores(Protocol):
    """What is asked of timm's attention modules, whatever their output projection is called."""

    num_heads: int

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers by name."""
        ...


class SelfAttention(Scores, Protocol):
    """What is asked of timm's attention modules."""

    proj: nn.Linear


class FeedForward(Protocol):
    """A block with an MLP behind its second norm."""

    norm2: nn.Module
    mlp: nn.Module


class PlainBlock(FeedForward, Protocol):
    """What is asked of timm's transformer blocks."""

    norm1: nn.Module
    attn: SelfAttention


@runtime_checkable
class Pooling(Protocol):
    """What acts on all tokens in front of a norm that it is a child of, as token-aware pooling does."""

    def closed_form(self, num_tokens: int) -> Terms:
        """MACs for one image of so many tokens."""


class WindowedBlock(PlainBlock, Protocol):
    """What is asked of timm's Swin blocks."""

    window_size: Size


def norm(module: nn.Module, rows: int) -> Terms:
    """A norm over the channels of so many tokens or positions, with what pools them before; nothing for an Identity."""
    pool = getattr(module, "pool", None)
    terms = pool.closed_form(rows) if isinstance(pool, Pooling) else Terms()
    if isinstance(module, nn.LayerNorm):  # timm's LayerNorm2d too
        terms["norm"] += rows * module.normalized_shape[-1] * (4 if module.weight is None else 5)
    elif isinstance(module, nn.BatchNorm2d):
        terms["norm"] += rows * module.num_features * (2 if module.affine else 1)
    elif isinstance(module, (RmsNorm, RmsNormFp32)):
        terms["norm"] += rows * module.normalized_shape[-1] * (2 if module.weight is None else 3)
    elif "Norm" in type(module).__name__ and all(name == "pool" for name, _ in module.named_children()):
        known = "LayerNorm, BatchNorm2d and timm's RmsNorm and RmsNormFp32"
        raise TypeError(f"closed forms know {known}, not {type(module).__name__}; use count_flops")
    return terms


def layers(term: str, module: nn.Module, rows: int) -> Terms:
    """All linear layers, convolutions and norms in a module, each of them applied at ``rows`` tokens or positions."""
    terms = Terms()
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            terms[term] += rows * layer.weight.numel()
        terms += norm(layer, rows)
    return terms


def convolved(layer: nn.Conv2d, size: Size) -> Size:
    """(H, W) of what a convolution makes of a map of that size."""
    padding = layer.padding
    assert not isinstance(padding, str)
    height, width = ((size[i] + 2 * padding[i] - layer.kernel_size[i]) // layer.stride[i] + 1 for i in range(2))
    return height, width


def convolutions(term: str, module: nn.Module, size: Size) -> tuple[Terms, Size]:
    """A chain of convolutions and norms on a map of that size, and the size of what comes out."""
    terms = Terms()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            size = convolved(layer, size)
            terms[term] += prod(size) * layer.weight.numel()
        terms += norm(layer, size[0] * size[1])
    return terms, size


def attention(pairs: int, dim: int) -> Terms:
    """Two products, q k^T and map times v, over so many pairs of query and key of ``dim`` channels in all heads."""
    return Terms(attention=2 * pairs * dim)


def windows(size: Size, window: Size | int) -> int:
    """Windows that cover a map, the last of each side partly if need be."""
    height, width = (window, window) if isinstance(window, int) else window
    return -(-size[0] // height) * -(-size[1] // width)


def attend(attn: SelfAttention, keys: int, queries: int, pairs: int | None = None) -> Terms:
    """Projections and products of a self-attention module; ``pairs`` if not every query sees every key."""
    terms = attention(queries * keys if pairs is None else pairs, attn.proj.in_features)
    for name, layer in attn.named_children():
        if name in ("proj", "norm"):
            terms += layers("projection", layer, queries)
        elif name in ("q_norm", "k_norm"):
            terms += head_norm(attn, name, layer, keys)
        elif name != "rel_pos":  # of which no rows are tokens, see position_bias
            terms += layers("projection", layer, keys)
    return terms


def head_norm(attn: Scores, name: str, layer: nn.Module, rows: int) -> Terms:
    """The norm ``q_norm`` or ``k_norm`` of so many tokens in each head, of which grouped keys have fewer."""
    groups: int = getattr(attn, "num_kv_groups", 1) if name == "k_norm" else 1
    return norm(layer, rows * attn.num_heads // groups)


def score(attn: Scores, rows: int) -> Terms:
    """Queries and keys of a self-attention module, without values, products and output."""
    terms = Terms()
    for name, layer in attn.named_children():
        if name == "qkv":
            terms["projection"] += layers("projection", layer, rows)["projection"] * 2 // 3
        elif name in ("q_proj", "k_proj"):
            terms += layers("projection", layer, rows)
        elif name in ("q_norm", "k_norm"):
            terms += head_norm(attn, name, layer, rows)
    return terms


def position_bias(module: nn.Module | None, grid: Size) -> Terms:
    """The bias of all offsets on a grid by an MLP; nothing without one, or for a table, whose entries are only read."""
    return Terms() if module is None else layers("positions", module, (2 * grid[0] - 1) * (2 * grid[1] - 1))


def resampling(
    old: Sequence[int],
    new: Sequence[int],
    channels: int,
    taps: int,
    antialiased: bool = False,
    always: bool = False,
) -> int:
    """MACs of a table of ``channels`` resampled from one size to another.

    Args:
        old: Sides of the table.
        new: Sides that are wanted.
        channels: Of each entry.
        taps: Entries that the kernel spans along a side: 2 linear, 4 cubic.
        antialiased: The kernel is wider by as much as a side shrinks.
        always: Between equal sizes too, where most models leave the table as it is, at no cost.
    """
    if tuple(old) == tuple(new) and not always:
        return 0
    spans = [taps * max(1.0, a / b) if antialiased else taps for a, b in zip(old, new, strict=True)]
    return round(channels * prod(new) * prod(spans))


def feedforward(block: FeedForward, rows: int) -> Terms:
    """Second half of a transformer block."""
    return norm(block.norm2, rows) + layers("mlp", block.mlp, rows)


def plain_block(block: PlainBlock, rows: int) -> Terms:
    """A transformer block in which all tokens attend to all."""
    return norm(block.norm1, rows) + attend(block.attn, rows, rows) + feedforward(block, rows)


def window_block(block: WindowedBlock, size: Size) -> Terms:
    """A Swin block: attention inside the windows that cover the padded map."""
    window, tokens = block.window_size, size[0] * size[1]
    area = window[0] * window[1]
    padded = windows(size, window) * area
    return norm(block.norm1, tokens) + attend(block.attn, padded, padded, padded * area) + feedforward(block, tokens)


def cross_block(
    block: CrossBlock, queries: int, keys: int, pairs: int | None = None, normed: int | None = None
) -> Terms:
    """A ``CrossBlock``; ``pairs`` if not every query sees every key, ``normed`` if not both sets are normalised."""
    terms = norm(block.norm1, queries + keys if normed is None else normed)
    terms += layers("projection", block.attn.q, queries) + layers("projection", block.attn.kv, keys)
    terms += attention(queries * keys if pairs is None else pairs, block.attn.q.out_features)
    return terms + layers("projection", block.attn.proj, queries) + feedforward(block, queries)


def window_cross(block: WindowCrossBlock, queries: Size, keys: Size) -> Terms:
    """A ``WindowCrossBlock``: by windows, or on the whole map of keys if that has fewer pairs."""
    tokens, others = queries[0] * queries[1], keys[0] * keys[1]
    pairs = windows(queries, block.window) * block.window**2 * block.kernel**2
    outside = Terms()
    if block.mask_mode == "correct":
        pairs = min(pairs, tokens * others)
    else:  # all that is outside has one key and one value
        outside = norm(block.norm1, 1) + layers("projection", block.attn.kv, 1)
    return cross_block(block, tokens, others, pairs) + outside
