"""vid-TLDR: merge what the attention stands out for, and drop the background on the way (arXiv 2403.13347)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.attention import AttnState, piece_entries
from effvit.protocols import Settings
from effvit.recording import is_recorded
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.bipartite import Matching, bipartite_soft_matching, matching_target, merge_tokens
from effvit.reducers.block_schedule import BlockSchedule, tokens_by_block
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.merging import TIE
from effvit.schedule import check_r, spread_ladder
from effvit.tokens import TokenMap, fx_leaf, wide_product

__all__ = ["VidTLDR", "foreground_scores", "map_sharpness", "sharpness"]


@fx_leaf
def map_sharpness(weights: Tensor) -> Tensor:
    """Negative entropy of the rows of softmax maps (B, heads, Q, K), averaged over heads first: (B, Q).

    Sharp rows are those of the foreground (vid-TLDR, 2403.13347; utils/vid_TLDR.py@a25051d, where a weight of 0 gives
    NaN and here 0).
    """
    weights = weights.mean(dim=1)
    return (weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)


def sharpness(state: AttnState) -> Tensor:
    """``map_sharpness`` of the map that the block would have if all tokens counted alike as keys: (B, P+N)."""
    q, k = state._replace(bias=None).map_factors()
    return sharpness_by_rows(q, k, None if state.pairs is None else state.pairs.whole())


@fx_leaf
def sharpness_by_rows(q: Tensor, k: Tensor, pairs: Tensor | None) -> Tensor:
    """``map_sharpness`` of a map of which only some rows are held, as many as attention would form at once.

    One that is recorded, or has a bias for each pair of tokens beside it, is held whole.

    Args:
        q: (B, heads, P+N, D) queries whose products with the keys are the logits.
        k: (B, heads, P+N, D) keys.
        pairs: (B or 1, heads, P+N, P+N) bias of each pair; None: none.

    Returns:
        (B, P+N).
    """
    batch, heads, length, _ = q.shape
    whole = pairs is not None or is_recorded(q)
    rows = length if whole else max(1, piece_entries(q) // (batch * heads * length))
    logits = (wide_product(part, k.transpose(-2, -1)) for part in q.split(rows, dim=2))  # (B, heads, rows, P+N)
    return torch.cat([map_sharpness((y if pairs is None else y + pairs).softmax(dim=-1)) for y in logits], dim=1)


@fx_leaf
def foreground_scores(sharp: Tensor) -> Tensor:
    """How far each token stands out: sharpness (B, N) -> 0 below the mean, then rising to 1 for the sharpest.

    Tokens that are all alike, to within ``TIE`` of their sharpness, are all foreground: 1. Officially they are NaN, or
    what rounding makes of them.
    """
    mean = sharp.mean(dim=1, keepdim=True)  # (B, 1)
    spread = sharp.amax(dim=1, keepdim=True) - mean
    differ = spread > TIE * mean.abs().clamp(min=1)
    scores = (sharp - mean).clamp(min=0) / torch.where(differ, spread, 1)
    return torch.where(differ, scores, 1)


class Thinned(NamedTuple):
    """A step in which merged tokens go into others, but are dropped where nothing of them counts.

    Attributes:
        matching: Which tokens go where.
        part: (B, r) part of each merged token that counts.
    """

    matching: Matching
    part: Tensor
    fuses: bool = False

    @property
    def order(self) -> Tensor:
        """(B, N-r) patch tokens that stay, in the order of the new sequence."""
        return self.matching.order

    def target(self, like: Tensor) -> Tensor:
        """(B, N) new place of every old token, -1 for those dropped; ``like`` is any (B, N) int64."""
        return thinned_target(self.matching, self.part, like)


@fx_leaf
def thinned_target(matching: Matching, part: Tensor, like: Tensor) -> Tensor:
    """(B, N) new place of every old token, -1 for merged ones of which nothing counts."""
    target = matching_target(matching, like)
    dropped = torch.zeros_like(target, dtype=torch.bool).scatter(1, matching.source, part == 0)
    return target.masked_fill(dropped, -1)


class VidTLDR(Reducer):
    """Merge the r most similar tokens into others by how far they stand out (vid-TLDR, 2403.13347).

    A token stands out if its row of the attention map, averaged over heads, is sharp. Of a token that is merged only
    that part counts, in the mean and in the size; one whose row is less sharp than the mean counts for nothing, so that
    it is dropped. The places, the sets and proportional attention are those of ToMe, but features after attention are
    compared and not keys.

    Made for videos and hosts without a class token. Deviations from utils/vid_TLDR.py@a25051d, which has none to
    protect: prefix tokens are never merged, and are in no mean or extreme of sharpness, but a row of the map holds the
    attention to them too; LayerScale is applied, with which the official blocks fail.
    """

    name = "vid_tldr"
    summary = "merge tokens by how sharp their attention is, and drop the background (2403.13347)"
    open_sides = 1

    def __init__(self, r: float) -> None:
        super().__init__()
        self.r = r

    @classmethod
    def plan(cls, depth: int, *, r: float | Sequence[float] = (0.25, 0.1)) -> dict[int, Reducer]:
        """Settings of the method.

        The default is ours, about the shares that the authors' 600 and 200 are of the 2352 tokens of a video in ViT-B.

        Args:
            depth: Blocks of the host.
            r: Tokens that leave each block, at most half of those that enter: whole numbers, or shares of them below 1.
                One value for all blocks, or a list for the first ones, filled up with 0.
        """
        values: list[float] = list(r) if isinstance(r, (list, tuple)) else [r] * depth  # type: ignore[list-item]
        if len(values) > depth:
            raise ValueError(f"r has {len(values)} values, but the model has {depth} blocks")
        return {block: cls(value) for block, value in enumerate(map(check_r, values)) if value > 0}

    @classmethod
    def off(cls) -> Settings:
        return {"r": 0}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return [{}]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"r": r} for r in spread_ladder(depth, num_patches)]]

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        schedule = tokens_by_block(cls, "r", settings, depth)
        return schedule if all(isinstance(r, int) for r in schedule.taken) else None

    def num_merged(self, num_tokens: int) -> int:
        """Tokens that leave of ``num_tokens``."""
        r = self.r if self.r >= 1 else self.r * num_tokens
        return min(math.floor(r), math.floor(num_tokens / 2))  # torch.export would fix what int and // give

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens - self.num_merged(num_tokens)

    def cost(self, at: BlockSizes) -> Change:
        merged = min(int(at.tokens * self.r) if self.r < 1 else int(self.r), at.tokens // 2)
        macs = at.map_entries * at.head_dim + alternating_pairs(at.tokens, at.dim)
        return Change(at.tokens, at.tokens, at.tokens - merged, macs if merged else 0)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        r = self.num_merged(tokens.num_tokens)
        if r == 0:
            return x, tokens
        ranges, num_prefix = tokens.layout.ranges, tokens.num_prefix
        with torch.no_grad():
            sharp = check_finite(sharpness(state), self.origin("attention maps"), state.x)[:, num_prefix:]
            matching = bipartite_soft_matching(
                x[:, num_prefix:], r, num_prefix, ranges, self.origin("tokens"), state.x, in_order=True
            )
            part = foreground_scores(sharp).gather(1, matching.source)  # (B, r)
        # No size: the authors' mean over tokens has no weights, and dropped patches have no part in one.
        x, size = merge_tokens(x, tokens.key_weight, matching, ranges, part)
        return x, tokens.relabel(Thinned(matching, part), tokens.num_tokens - r, key_weight=size)
