"""EViT: keep the patches the class token attends to, fuse the rest into one token (arXiv 2202.07800)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState, class_attention
from effvit.protocols import Settings
from effvit.recover import unpacked
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import KeepRate, kept_in_blocks
from effvit.schedule import check_blocks, check_switch, keep_rate_ladder, spread_blocks
from effvit.tokens import Fused, Kept, Step, TokenMap, take_rows

__all__ = ["EViT"]


class EViT(KeepRate):
    """Keep the K patches the class token attends to most (EViT, 2202.07800, section 3.1, eq. 3 and 4).

    Between attention and MLP of a reducing block, the ceil(keep_rate * N) most attended tokens stay, in
    descending order of attention; with ``fuse_token`` the others are summed up into one more token, weighted by
    their raw attention. Follows evit.py@5ca95a7, where the weights are not divided by their sum.
    """

    name = "evit"
    summary = "keep the patches the class token attends to most, fuse the rest (2202.07800)"
    needs_class_token = True
    takes_padding = True

    def __init__(self, keep_rate: float, fuse_token: bool, num_tokens: int | None) -> None:
        super().__init__(keep_rate, num_tokens)
        self.fuse_token = fuse_token

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        fuse_token: bool = True,
        num_tokens: int | Sequence[int] | None = None,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction of the patch tokens that stay, in (0, 1]; one value, or one for each block.
            reduce_at: 0-based blocks that reduce; None means (3, 6, 9) of 12, in proportion for another depth.
            fuse_token: Add the token that sums up what was dropped.
            num_tokens: Absolute numbers of tokens to keep in place of a rate; one value or one for each block.
        """
        check_switch("fuse_token", fuse_token)
        blocks = check_blocks("reduce_at", spread_blocks((3, 6, 9), depth) if reduce_at is None else reduce_at, depth)
        kept = kept_in_blocks(blocks, keep_rate, num_tokens)
        return {b: cls(rate, fuse_token, number) for b, (rate, number) in kept.items()}

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.6, "reduce_at": (1, 2)}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return [{"keep_rate": 0.9}, {"keep_rate": 0.7}] if num_patches < FEW_PATCHES else [{"keep_rate": 0.5}]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        early = sorted({max(1, depth // 6), max(1, depth // 3), max(1, depth // 2)})
        rates = keep_rate_ladder()
        return [rates, [{**rung, "reduce_at": early} for rung in rates]]

    def count(self, num_tokens: int, num_patches: int) -> int:
        kept = self.num_kept(num_tokens)
        return kept + int(self.fuse_token and kept < num_tokens)

    def cost(self, at: BlockSizes) -> Change:
        kept = math.ceil(self.keep_rate * at.tokens) if self.num_tokens is None else self.num_tokens
        if kept >= at.tokens:
            return Change(at.tokens, at.tokens, at.tokens, 0)
        fused = at.tokens * at.dim if self.fuse_token else 0  # a weighted sum of all tokens
        return Change(at.tokens, at.tokens, kept + bool(fused), at.class_rows + fused)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        if tokens.valid is not None:
            return self.reduce_each(x, tokens, tokens.valid, state)
        kept = self.num_kept(tokens.num_tokens)
        if kept == tokens.num_tokens:
            return x, tokens
        scores = check_finite(class_attention(state), self.origin("class-token scores"), state.x)  # (B, N)
        if not self.fuse_token:
            return tokens.select(x, scores.topk(kept, dim=1).indices, kept)

        ranked = scores.topk(kept + 1, dim=1).indices  # (B, kept+1)
        index = ranked[:, :kept]  # (B, kept)
        fused = fuse_rest(x[:, tokens.num_prefix :], scores, index)  # (B, 1, C)
        return torch.cat([take_rows(x, tokens.rows(index)), fused], dim=1), tokens.fuse(ranked, kept)

    def reduce_each(self, x: Tensor, tokens: TokenMap, valid: Tensor, state: AttnState) -> tuple[Tensor, TokenMap]:
        """``reduce`` of images with different numbers of tokens, each of which keeps a share of its own."""
        lengths = [length - tokens.num_prefix for length in tokens.sequence_lengths()]
        numbers = [self.num_kept(length) for length in lengths]
        if numbers == lengths:
            return x, tokens
        left = [kept + int(self.fuse_token and kept < length) for kept, length in zip(numbers, lengths, strict=True)]
        packed = tokens.packed
        x, tokens = unpacked(x, tokens)
        scores = check_finite(
            class_attention(state), self.origin("class-token scores"), state.x
        )  # (B, N), 0 for padding
        order = scores.masked_fill(~valid, -1).topk(max(left), dim=1).indices  # (B, K)
        place = torch.arange(max(left), device=x.device)
        kept, counts = (torch.tensor(n, device=x.device).unsqueeze(1) for n in (numbers, left))  # (B, 1)
        new = take_rows(x, tokens.rows(order))  # (B, P+K, C)
        step: Step = Kept(order, place < counts)
        if self.fuse_token:
            index = torch.where(place < kept, order, order[:, :1])  # of the kept tokens, the first one repeated
            fused = fuse_rest(x[:, tokens.num_prefix :], scores, index)  # (B, 1, C)
            here = (place == kept) & (place < counts)
            new = torch.where(F.pad(here, (tokens.num_prefix, 0)).unsqueeze(-1), fused, new)
            step = Fused(order, kept)
        tokens = tokens.relabel(step, max(left), valid=place < counts, packed=packed, lengths=tuple(left))
        return tokens.pack(new) if packed else new, tokens


def fuse_rest(patches: Tensor, scores: Tensor, index: Tensor) -> Tensor:
    """Sum of the patches (B, N, C) that are not in ``index`` (B, K), weighted by scores (B, N): (B, 1, C)."""
    weights = scores.scatter(1, index, 0).to(patches.dtype)
    return weights.unsqueeze(1) @ patches
