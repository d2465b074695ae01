"""What a method does to the sizes of a block, and what that costs: the terms of ``effvit.measure.closed_form``."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BlockSizes", "Change", "alternating_pairs"]


class BlockSizes(NamedTuple):
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
        area: Tokens that absolute numbers are meant for where N tokens are one of many small grids, see
            ``Reducer.group``; None: they are the patches of the image.
    """

    tokens: int
    left: int
    prefix: int
    num_class: int
    grid: tuple[int, int]
    dim: int
    heads: int
    head_dim: int
    last: bool
    area: int | None = None

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
        merges: Tokens have sizes from here on although patches may be dropped; a method that keeps every patch need not
            say so.
        scored: Patch tokens that are normed, and of which queries and keys are made, for a map beside that of the keys
            and queries above.
        valued: Of the queries, those of which values alone are made.
        behind: Patch tokens that leave the block, where those are fewer than enter the MLP.
    """

    keys: int
    queries: int
    left: int
    macs: int
    merges: bool = False
    scored: int | None = None
    valued: int | None = None
    behind: int | None = None


def alternating_pairs(tokens: int, dim: int) -> int:
    """Similarity of every token at an even place to every one at an odd place."""
    return (tokens // 2) * (tokens - tokens // 2) * dim
