"""HoT: keep the tokens that are peaks of density, the rest is dropped (arXiv 2311.12028)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from effvit.protocols import Settings
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.density import highest, peak_scores
from effvit.reducers.keep_rate import KeepRate, kept_in_blocks
from effvit.schedule import check_blocks, check_count
from effvit.tokens import TokenMap

__all__ = ["HoT"]


class HoT(KeepRate):
    """Keep the K patches that are peaks of density before a block, in image order (HoT, 2311.12028).

    The token pruning cluster of the Hourglass Tokenizer, made for frames of a pose sequence and applied to
    patches here. It needs no class token and no attention, only the (N, N) distances of the patches. The second
    half, attention that recovers the full sequence, has weights to train: ``effvit.recover.TokenRecoveringAttention``.
    """

    name = "hot"
    summary = "keep the peaks of density among the patches, drop the rest (2311.12028)"

    def __init__(self, keep_rate: float, k: int, num_tokens: int | None) -> None:
        super().__init__(keep_rate, num_tokens)
        self.k = k

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 1 / 3,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        k: int = 2,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction of the patch tokens that stay, in (0, 1]; one value, or one for each block. The
                published one is 81 of 243 frames.
            reduce_at: 0-based blocks before which tokens are dropped; None means the published 3 of 8, in
                proportion for another depth.
            num_tokens: Absolute numbers of tokens to keep in place of a rate; one value or one for each block.
            k: Neighbours in the density, the token itself included, at least 2.
        """
        check_count("k", k, 2)
        blocks = check_blocks("reduce_at", (3 * depth // 8,) if reduce_at is None else reduce_at, depth)
        kept = kept_in_blocks(blocks, keep_rate, num_tokens)
        return {b: cls(rate, k, number) for b, (rate, number) in kept.items()}

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.5, "reduce_at": (1, 3)}

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return []  # published for pose sequences: effvit.tune does not try it

    def count(self, num_tokens: int, num_patches: int) -> int:
        return self.num_kept(num_tokens)

    def cost(self, at: BlockSizes) -> Change:
        kept = math.ceil(self.keep_rate * at.tokens) if self.num_tokens is None else self.num_tokens
        if kept >= at.tokens:
            return Change(at.tokens, at.tokens, at.tokens, 0)
        return Change(kept, kept, kept, at.tokens**2 * at.dim)  # distances of all pairs

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        kept = self.num_kept(tokens.num_tokens)
        return (x, tokens) if kept >= tokens.num_tokens else self.prune(x, tokens, kept)

    def prune(self, x: Tensor, tokens: TokenMap, kept: int) -> tuple[Tensor, TokenMap]:
        """x (B, P+N, C) -> (B, P+kept, C) and the map of the kept tokens."""
        k = min(self.k, tokens.num_tokens) if self.any_size else self.k
        scores = check_finite(peak_scores(tokens.split(x)[1], k), self.origin("peak scores"), x)  # (B, N)
        return tokens.select(x, highest(scores, kept), kept)
