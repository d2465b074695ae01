"""ToMe: merge the most similar tokens, a few in every block (arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.bipartite import Matching, MergedGrids, bipartite_soft_matching, matching_target, merge_tokens
from effvit.reducers.block_schedule import BlockSchedule, tokens_by_block
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import mean_keys
from effvit.reducers.merging import apply_merge, plan_merge
from effvit.schedule import check_switch, spread_ladder, tome_r
from effvit.tokens import (
    TokenMap,
    ranges_of,
)

__all__ = ["ToMe"]


class ToMe(Reducer):
    """Merge the r most similar token pairs of each block (ToMe, 2210.09461, section 3).

    Similarity is that of the keys, averaged over heads, as they enter attention (with RoPE: rotated). A merged
    token is the mean of what it stands for, and with ``prop_attn`` counts that often as a key.
    """

    name = "tome"
    summary = "merge the r most similar tokens of every block (2210.09461)"
    open_sides = 1
    keeps_every_patch = True
    takes_padding = True

    def __init__(self, r: int, prop_attn: bool) -> None:
        super().__init__()
        self.r = r
        self.prop_attn = prop_attn

    @classmethod
    def plan(
        cls, depth: int, *, r: int | Sequence[int] | tuple[int, float] = 8, prop_attn: bool = True
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            r: Tokens to merge in every block, at most half of those left; an int, a list with one value for each
                block, or a pair (r, inflection) with a float inflection in [-1, 1], see ``schedule.tome_r``.
            prop_attn: Proportional attention: a token of size s receives attention like s equal tokens. The
                authors use True for supervised models, False for masked autoencoders off the shelf.
        """
        check_switch("prop_attn", prop_attn)
        return {block: cls(value, prop_attn) for block, value in enumerate(tome_r(r, depth)) if value > 0}

    @classmethod
    def off(cls) -> Settings:
        return {"r": 0}

    @classmethod
    def example(cls) -> Settings:
        return {"r": 3}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return [{"r": 2}, {"r": 4}] if num_patches < FEW_PATCHES else [{"r": num_patches // 15}]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"r": r} for r in spread_ladder(depth, num_patches)]]

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        return tokens_by_block(cls, "r", settings, depth)

    def num_merged(self, num_tokens: int) -> int:
        """Tokens that are merged away of ``num_tokens``."""
        return min(self.r, num_tokens // 2)

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens - self.num_merged(num_tokens)

    @torch.no_grad()
    def group(self, features: Tensor, x: Tensor, area: int) -> MergedGrids:
        """Groups of the r most similar pairs of each grid; r is meant for ``area`` tokens.

        What the block will make of its tokens is not known yet, keys neither: as in token merging for Stable Diffusion
        (2303.17604), tokens are compared as they enter, and equal ones by place.
        """
        length = features.shape[1]
        r = min(self.r * length // area, length // 2)
        if r == 0:  # a map so small that nothing is compared; of one token there are no pairs
            place = ranges_of(features, length, 0).sequence.expand(features.shape[0], -1)
            matching = Matching(place[:, :0], place, place[:, :0], 0)
        else:
            matching = bipartite_soft_matching(features, r, 0, origin=self.origin("tokens"), x=x, by_place=True)
        return MergedGrids(matching, matching_target(matching, features[..., 0].long()), self.prop_attn)

    def cost(self, at: BlockSizes) -> Change:
        r = self.r if at.area is None else self.r * at.tokens // at.area
        merged = min(r, at.tokens // 2)
        macs = alternating_pairs(at.tokens, at.head_dim) if merged else 0
        return Change(at.tokens, at.tokens, at.tokens - merged, macs)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        if tokens.valid is not None:
            return self.reduce_each(x, tokens, state)
        r = self.num_merged(tokens.num_tokens)
        if r == 0:
            return x, tokens
        ranges = tokens.layout.ranges
        num_prefix = tokens.num_prefix
        metric = mean_keys(state.k)[:, num_prefix:]  # (B, N, D)
        matching = bipartite_soft_matching(metric, r, num_prefix, ranges, self.origin("keys"), state.x)
        x, size = merge_tokens(x, tokens.size, matching, ranges)
        weight = size if self.prop_attn else None
        return x, tokens.relabel(matching, tokens.num_tokens - r, size, weight, keeps_every_patch=True)

    def reduce_each(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        """``reduce`` of images with different numbers of tokens, each of which loses r or half of its own."""
        lengths = [length - tokens.num_prefix for length in tokens.sequence_lengths()]
        left = tuple(length - self.num_merged(length) for length in lengths)
        if left == tuple(lengths):
            return x, tokens
        metric = mean_keys(state.k)
        metric = (tokens.unpack(metric) if tokens.packed else metric)[:, tokens.num_prefix :]  # (B, N, D)
        check_finite(metric, self.origin("keys"), state.x)
        every = metric.new_full((), -2)  # below all cosines
        merge = plan_merge(
            metric, tokens.valid, tokens.num_prefix, every, max_r=self.r, packed=tokens.packed, lengths=left
        )
        x, merged = apply_merge(x, tokens, merge, tokens.packed)
        return x, merged if self.prop_attn else replace(merged, key_weight=None)
