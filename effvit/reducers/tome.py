"""ToMe: merge the most similar tokens, a few in every block (arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule, tokens_by_block
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import alternating_match
from effvit.schedule import check_switch, spread_ladder, tome_r
from effvit.tokens import TokenMap, flat_rows, take_rows, wide_dtype, wide_product

__all__ = [
    "Matching",
    "ToMe",
    "bipartite_soft_matching",
    "kth_bipartite_target",
    "matching_target",
    "merge_tokens",
]


class Matching(NamedTuple):
    """Pairs of tokens to merge, in positions among the N patch tokens.

    Attributes:
        source: (B, r) tokens that are merged away, most similar first.
        destination: (B, r) the token each of them goes into.
        order: (B, N-r) the tokens that stay, in the order of the new sequence.
    """

    source: Tensor
    destination: Tensor
    order: Tensor


def bipartite_soft_matching(metric: Tensor, r: int, num_prefix: int) -> Matching:
    """Match the r tokens of set A that are most similar to one of set B (ToMe, 2210.09461, section 3.1).

    The sets alternate along the whole sequence, prefix tokens included: A has its even, B its odd places.
    Prefix tokens are never matched, whatever their number (merge.py@af95e4b protects the first two only).

    Args:
        metric: (B, N, D) features of the patch tokens, compared by cosine.
        r: Tokens to merge, at most N // 2.
        num_prefix: Prefix tokens in front of the patches.

    Returns:
        The matching. The new order is what is left of A, then B; A keeps its order in the sequence if there is
        a prefix token and is ordered by falling similarity if not, as in the official code.
    """
    first_a, first_b = num_prefix % 2, (num_prefix + 1) % 2
    best, destination = alternating_match(metric, num_prefix)
    ranked = best.argsort(dim=-1, descending=True)
    merged, left = ranked[:, :r], ranked[:, r:]
    if num_prefix:
        left = left.sort(dim=-1).values
    in_b = 2 * torch.ones_like(metric[:, first_b::2, 0], dtype=torch.int64).cumsum(1) - 2 + first_b
    return Matching(
        source=2 * merged + first_a,
        destination=destination.gather(1, merged),
        order=torch.cat([2 * left + first_a, in_b], dim=1),
    )


def kth_bipartite_target(metric: Tensor, k: int) -> Tensor:
    """Where each token goes if every k-th one absorbs the tokens most similar to it (merge.py@af95e4b).

    Args:
        metric: (B, N, D); a tail of N % k tokens is left out, as in the official code.
        k: At least 2.

    Returns:
        (B, N - N % k) index of the absorbing token, 0 to N // k - 1.
    """
    metric = F.normalize(metric.to(wide_dtype(metric.dtype)), dim=-1)
    groups: Tensor = metric[:, : metric.shape[1] // k * k].unflatten(1, (-1, k))  # (B, N // k, k, D)
    absorbing = groups[:, :, -1]
    similarity = wide_product(groups[:, :, :-1].flatten(1, 2), absorbing.transpose(1, 2))
    nearest = similarity.argmax(-1)  # (B, N // k * (k - 1))
    itself = torch.ones_like(nearest[:, :: k - 1]).cumsum(1) - 1
    return torch.cat([nearest.unflatten(1, (-1, k - 1)), itself.unsqueeze(-1)], dim=2).flatten(1)


def matching_target(matching: Matching, like: Tensor) -> Tensor:
    """(B, N) new place of every old token under the matching; ``like`` is any (B, N) int64."""
    rank = torch.ones_like(matching.order).cumsum(1) - 1
    target = torch.zeros_like(like).scatter(1, matching.order, rank)
    return target.scatter(1, matching.source, target.gather(1, matching.destination))


def merge_tokens(
    x: Tensor, size: Tensor, matching: Matching, target: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of merged tokens (merge.py@af95e4b ``merge_wavg``).

    Only the r merged rows are computed with: each adds its share of the difference to its destination, so two
    equal tokens merge without any rounding.

    Args:
        x: (B, P+N, C).
        size: (B, N) patches each token stands for.
        matching: Which tokens go where.
        target: (B, N) from ``matching_target``.
        num_prefix: P.

    Returns:
        (B, P+N-r, C) and the new sizes (B, N-r).
    """
    length = x.shape[1]
    into = target.gather(1, matching.source)  # (B, r) new place of each merged token
    merged_size = size.gather(1, matching.source)
    new_size = size.gather(1, matching.order).scatter_add(1, into, merged_size)  # (B, N-r)
    share = (merged_size / new_size.gather(1, into)).unsqueeze(-1).to(x.dtype)  # (B, r, 1)
    source = take_rows(x, flat_rows(matching.source + num_prefix, length))
    destination = take_rows(x, flat_rows(matching.destination + num_prefix, length))
    kept = take_rows(x, flat_rows(matching.order, length, num_prefix))
    rows = flat_rows(into + num_prefix, length - matching.source.shape[1])
    return add_rows(kept, rows, (source - destination) * share), new_size


def add_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x (B, N, C) with values (B, r, C) added to its flattened rows (B, r)."""
    return x.flatten(0, 1).index_add(0, rows.flatten(), values.flatten(0, 1)).view_as(x)


class ToMe(Reducer):
    """Merge the r most similar token pairs of each block (ToMe, 2210.09461, section 3).

    Similarity is that of the keys, averaged over heads, as they enter attention (with RoPE: rotated). A merged
    token is the mean of what it stands for, and with ``prop_attn`` counts that often as a key.
    """

    name = "tome"
    summary = "merge the r most similar tokens of every block (2210.09461)"
    open_sides = 1
    keeps_every_patch = True

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
        return [{"r": 2}, {"r": 4}] if num_patches < FEW_PATCHES else [{"r": 13}]

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

    def cost(self, at: BlockSizes) -> Change:
        merged = min(self.r, at.tokens // 2)
        return Change(at.tokens, at.tokens, at.tokens - merged, alternating_pairs(at.tokens, at.head_dim))

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        r = self.num_merged(tokens.num_tokens)
        if r == 0:
            return x, tokens
        with torch.no_grad():
            metric = state.k.mean(dim=1, dtype=wide_dtype(state.k.dtype))[:, tokens.num_prefix :]  # (B, N, D)
            check_finite(metric.sum(-1), self.origin("keys"), state.x)
            matching = bipartite_soft_matching(metric, r, tokens.num_prefix)
            target = matching_target(matching, tokens.anchor)
            size = tokens.size
            if size is None:
                size = torch.ones_like(tokens.anchor, dtype=wide_dtype(x.dtype))
        x, size = merge_tokens(x, size, matching, target, tokens.num_prefix)
        return x, tokens.relabel(
            target,
            tokens.anchor.gather(1, matching.order),
            self.count(tokens.num_tokens, tokens.num_patches),
            size=size,
            key_weight=size if self.prop_attn else None,
            keeps_every_patch=True,
        )
