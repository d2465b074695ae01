"""What a reduction method leaves of the tokens and costs beside the block it works in, method by method.

Each function restates the arithmetic of the paper, not that of the classes in ``effvit.reducers``: N patch tokens
enter a block, with P prefix tokens, C channels and attention of ``heads`` times D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from effvit.closed_form.terms import Size

__all__ = ["METHOD_COSTS", "Change", "Setting", "graph_macs"]


class Setting(NamedTuple):
    """What a method meets in one block.

    Attributes:
        tokens: Patch tokens N that the block before left.
        left: Patch tokens that leave this block, for a method whose number depends on the image; else unused.
        prefix: Prefix tokens P.
        num_class: Class-like tokens among them.
        grid: (H, W) of the patches.
        dim: Channels C.
        heads: Attention heads.
        head_dim: Channels D of a head.
        last: Whether no block follows.
    """

    tokens: int
    left: int
    prefix: int
    num_class: int
    grid: Size
    dim: int
    heads: int
    head_dim: int
    last: bool

    @property
    def class_rows(self) -> int:
        """MACs of the class tokens' rows of q k^T, computed beside the fused kernel."""
        return self.num_class * (self.prefix + self.tokens) * self.heads * self.head_dim

    @property
    def map_entries(self) -> int:
        """Entries of the softmax map of all heads."""
        return self.heads * (self.prefix + self.tokens) ** 2


class Change(NamedTuple):
    """What a method does in one block.

    Attributes:
        keys: Patch tokens that enter attention.
        queries: Patch tokens whose attention is computed.
        left: Patch tokens that enter the MLP.
        macs: MACs beside attention and MLP.
    """

    keys: int
    queries: int
    left: int
    macs: int


def alternating_pairs(tokens: int, dim: int) -> int:
    """Similarity of every token at an even place to every one at an odd place."""
    return (tokens // 2) * (tokens - tokens // 2) * dim


def _evit(reducer: Any, at: Setting) -> Change:
    kept = math.ceil(reducer.keep_rate * at.tokens) if reducer.num_tokens is None else reducer.num_tokens
    if kept >= at.tokens:
        return Change(at.tokens, at.tokens, at.tokens, 0)
    fused = at.tokens * at.dim if reducer.fuse_token else 0  # a weighted sum of all tokens
    return Change(at.tokens, at.tokens, kept + bool(fused), at.class_rows + fused)


def _tome(reducer: Any, at: Setting) -> Change:
    merged = min(reducer.r, at.tokens // 2)
    return Change(at.tokens, at.tokens, at.tokens - merged, alternating_pairs(at.tokens, at.head_dim))


def _dymu(reducer: Any, at: Setting) -> Change:
    return Change(at.tokens, at.tokens, at.left, alternating_pairs(at.tokens, at.head_dim))


def _ats(reducer: Any, at: Setting) -> Change:
    return Change(at.tokens, at.left, at.left, at.class_rows)


def _gtp(reducer: Any, at: Setting) -> Change:
    removed = reducer.num_removed(at.tokens)
    kept = at.tokens - removed
    macs = 0
    if reducer.selection.startswith("CLS"):
        macs += at.class_rows
    elif reducer.selection.startswith("CosSim"):
        macs += at.tokens * (at.prefix + at.tokens)  # each row times the sum of all
    if reducer.token_scale and (reducer.sparsity < 1 or not reducer.selection.startswith(("CLS", "Random"))):
        macs += at.map_entries  # the bias of the keys is one more feature of q k^T
    if reducer.propagation == "GraphProp":
        macs += (at.prefix + kept) * removed * at.dim  # G times the removed tokens
        macs += kept * removed if reducer.token_scale and not at.last else 0  # scales for the next block
    return Change(at.tokens, at.tokens, kept + (reducer.propagation == "Mean" and removed > 0), macs)


def graph_macs(reducer: Any, patches: int, dim: int) -> int:
    """Cosines of all pairs of embedded patches, for GTP's semantic graph, once an image."""
    if reducer.name != "gtp" or reducer.propagation != "GraphProp" or reducer.graph_type == "Spatial":
        return 0
    return patches**2 * dim


def _zero_tprune(reducer: Any, at: Setting) -> Change:
    similar = min(reducer.r, at.tokens // 2)
    left = math.floor(reducer.keep_rate * (at.tokens - similar) + 0.5)
    votes = matching = 0
    if similar:
        votes += 1
        matching = alternating_pairs(at.tokens, at.heads * at.head_dim)
    if left < at.tokens - similar:
        votes += reducer.num_iters + bool(similar)  # the sub-graph's rows are summed anew
    return Change(at.tokens, at.tokens, left, votes * at.map_entries + matching)


def _hot(reducer: Any, at: Setting) -> Change:
    kept = math.ceil(reducer.keep_rate * at.tokens) if reducer.num_tokens is None else reducer.num_tokens
    if kept >= at.tokens:
        return Change(at.tokens, at.tokens, at.tokens, 0)
    return Change(kept, kept, kept, at.tokens**2 * at.dim)  # distances of all pairs


def _expedite(reducer: Any, at: Setting) -> Change:
    patches = at.grid[0] * at.grid[1]
    if not hasattr(reducer, "num_clusters"):  # the block before which all patches are restored
        return Change(patches, patches, patches, 2 * patches * at.tokens * at.dim)
    side = math.sqrt(reducer.keep_rate or 0)
    clusters = math.prod(reducer.num_clusters or (max(1, math.floor(n * side + 0.5)) for n in at.grid))
    if clusters == patches:
        return Change(patches, patches, patches, 0)
    # Hard labels of the patches, patches * clusters * dim, are for maps and pictures alone: no score needs them.
    # Means of cells to start from; in each iteration the distances, then the new means, with a feature of ones.
    macs = patches * at.dim + reducer.num_iters * 2 * patches * clusters * (at.dim + 1)
    return Change(clusters, clusters, clusters, macs)


METHOD_COSTS: dict[str, Callable[[Any, Setting], Change]] = {
    "evit": _evit,
    "tome": _tome,
    "gtp": _gtp,
    "ats": _ats,
    "zero_tprune": _zero_tprune,
    "dymu": _dymu,
    "expedite": _expedite,
    "hot": _hot,
}
