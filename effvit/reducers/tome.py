"""ToMe: merge the most similar tokens, a few in every block (arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule, tokens_by_block
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import alternating_match, mean_keys, merge_sizes, move_shares
from effvit.reducers.merging import apply_merge, plan_merge
from effvit.schedule import check_switch, spread_ladder, tome_r
from effvit.tokens import (
    Ranges,
    TokenMap,
    flat_rows,
    fx_leaf,
    position_of,
    ranges_of,
    take_rows,
    wide_dtype,
    wide_product,
    widened,
)

__all__ = [
    "Matching",
    "MergedGrids",
    "ToMe",
    "bipartite_soft_matching",
    "kth_bipartite_target",
    "matching_target",
    "merge_tokens",
]


class Matching(NamedTuple):
    """Pairs of tokens to merge, by their places in the sequence, prefix tokens included: a ``Step`` of a token map.

    Attributes:
        merged: (B, r) places of the tokens that are merged away, most similar first.
        kept: (B, P+N-r) places of the tokens that stay, in the order of the new sequence.
        into: (B, r) place in the new sequence of the token that each merged one goes into.
        num_prefix: P.
    """

    merged: Tensor
    kept: Tensor
    into: Tensor
    num_prefix: int
    fuses: bool = False

    @property
    def source(self) -> Tensor:
        """(B, r) patch tokens that are merged away, most similar first."""
        return self.merged - self.num_prefix

    @property
    def order(self) -> Tensor:
        """(B, N-r) patch tokens that stay, in the order of the new sequence."""
        return self.kept[:, self.num_prefix :] - self.num_prefix

    @property
    def destination(self) -> Tensor:
        """(B, r) the patch token each merged one goes into."""
        return self.kept.gather(1, self.into) - self.num_prefix

    def target(self, like: Tensor) -> Tensor:
        """(B, N) new place of every old token; ``like`` is any (B, N) int64."""
        return matching_target(self, like)


@fx_leaf
def matching_target(matching: Matching, like: Tensor) -> Tensor:
    """(B, N) new place of every old token under the matching; ``like`` is any (B, N) int64."""
    return position_of(matching.order, like).scatter(1, matching.source, matching.into - matching.num_prefix)


@fx_leaf
def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    num_prefix: int,
    ranges: Ranges | None = None,
    origin: str = "tokens",
    x: Tensor | None = None,
    in_order: bool | None = None,
) -> Matching:
    """Match the r tokens of set A that are most similar to one of set B (ToMe, 2210.09461, section 3.1).

    The sets alternate along the whole sequence, prefix tokens included: A has its even, B its odd places.
    Prefix tokens are never matched, whatever their number (merge.py@af95e4b protects the first two only).

    Args:
        metric: (B, N, D) features of the patch tokens, compared by cosine.
        r: Tokens to merge, at most N // 2.
        num_prefix: Prefix tokens in front of the patches.
        ranges: Those of the batch, for P + N places at least; None: made here.
        origin: What the features are, for messages.
        x: (B, P+N, C) tokens that entered the block, for messages; of fewer images, each has as many rows of features.
        in_order: Whether what is left of A keeps its order in the sequence, or is ordered by falling similarity. None:
            it keeps its order if there is a prefix token, as in the official code.

    Returns:
        The matching. The new order is what is left of A, then B.

    Raises:
        ValueError: Similarities that are NaN, see ``check_finite``.
    """
    length = num_prefix + metric.shape[1]
    places = (ranges_of(metric, length, num_prefix) if ranges is None else ranges).sequence
    first_a, first_b = num_prefix + num_prefix % 2, num_prefix + (num_prefix + 1) % 2
    best, match = alternating_match(metric, num_prefix)  # (B, |A|) each
    rows = 1 if x is None else max(1, best.shape[0] // x.shape[0])
    ranked = check_finite(best, origin, x, rows).argsort(dim=-1, descending=True)  # (B, |A|)
    in_a = torch.add(places[:, first_a : first_a + 1], ranked, alpha=2)
    left = in_a[:, r:]  # (B, |A|-r)
    if num_prefix if in_order is None else in_order:
        left = left.sort(dim=-1).values
    kept = torch.cat([places[:, :num_prefix], left, places[:, first_b:length:2]], dim=1)
    behind = num_prefix + left.shape[1]  # in the new sequence B follows what is left of A
    return Matching(in_a[:, :r], kept, match.gather(1, ranked[:, :r]) + behind, num_prefix)


def kth_bipartite_target(metric: Tensor, k: int) -> Tensor:
    """Where each token goes if every k-th one absorbs the tokens most similar to it (merge.py@af95e4b).

    Args:
        metric: (B, N, D); a tail of N % k tokens is left out, as in the official code.
        k: At least 2.

    Returns:
        (B, N - N % k) index of the absorbing token, 0 to N // k - 1.
    """
    metric = F.normalize(widened(metric), dim=-1)
    groups: Tensor = metric[:, : metric.shape[1] // k * k].unflatten(1, (-1, k))  # (B, N // k, k, D)
    others, absorbing = groups[:, :, :-1].flatten(1, 2), groups[:, :, -1]  # (B, N // k * (k - 1), D), (B, N // k, D)
    similarity = wide_product(others, absorbing.transpose(1, 2))  # (B, N // k * (k - 1), N // k)
    nearest = similarity.argmax(-1)  # (B, N // k * (k - 1))
    itself = torch.ones_like(nearest[:, :: k - 1]).cumsum(1) - 1  # (B, N // k)
    return torch.cat([nearest.unflatten(1, (-1, k - 1)), itself.unsqueeze(-1)], dim=2).flatten(1)


@fx_leaf
def merge_tokens(
    x: Tensor, size: Tensor | None, matching: Matching, ranges: Ranges | None = None, part: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of merged tokens (merge.py@af95e4b ``merge_wavg``).

    Only the r merged rows are computed with: each adds its share of the difference to its destination, so two
    equal tokens merge without any rounding.

    Args:
        x: (B, P+N, C).
        size: (B, P+N) patches each token stands for; None: one each.
        matching: Which tokens go where.
        ranges: Those of the batch, for P + N places at least; None: made here.
        part: (B, r) part of each merged token that counts, in [0, 1]; None: all of it.

    Returns:
        (B, P+N-r, C) and the new sizes (B, P+N-r).
    """
    kept, length = matching.kept, x.shape[1]
    images = (ranges_of(x, length, matching.num_prefix) if ranges is None else ranges).images
    rows = torch.add(kept, images, alpha=length).flatten()  # (B * (P+N-r),) of the flattened sequence
    source = torch.add(matching.merged, images, alpha=length).flatten()  # (B * r,)
    destination = torch.add(matching.into, images, alpha=kept.shape[1]).flatten()  # (B * r,) of the new sequence
    x = x.flatten(0, 1)
    sizes = x.new_ones(x.shape[0], dtype=wide_dtype(x.dtype)) if size is None else size.flatten()
    gain = sizes.index_select(0, source)
    gain = gain if part is None else gain * part.flatten()
    new_sizes, share = merge_sizes(sizes.index_select(0, rows), gain, destination)
    new = move_shares(x.index_select(0, rows), x.index_select(0, source), destination, share)
    return new.view(*kept.shape, -1), new_sizes.view(kept.shape)


class MergedGrids(NamedTuple):
    """Groups of the tokens of small grids, see ``effvit.reducers.grids``.

    Attributes:
        matching: The pairs.
        target: (B, N) group of each token.
        sizes_count: A group counts as a key by its size.
    """

    matching: Matching
    target: Tensor
    sizes_count: bool

    @property
    def anchor(self) -> Tensor:
        """(B, N-r) token whose position each group keeps."""
        return self.matching.order

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, C) -> means (B, N-r, C), and the sizes (B, N-r) if they count."""
        means, sizes = merge_tokens(x, None, self.matching)
        return means, sizes if self.sizes_count else None

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets what its group became: y (B, N-r, C) -> (B, N, C)."""
        return take_rows(y, flat_rows(self.target, y.shape[1]))


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
        (2303.17604), tokens are compared as they enter.
        """
        length = features.shape[1]
        r = min(self.r * length // area, length // 2)
        if r == 0:  # a map so small that nothing is compared; of one token there are no pairs
            place = ranges_of(features, length, 0).sequence.expand(features.shape[0], -1)
            matching = Matching(place[:, :0], place, place[:, :0], 0)
        else:
            matching = bipartite_soft_matching(features, r, 0, origin=self.origin("tokens"), x=x)
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
