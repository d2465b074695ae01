"""AIM: similar tokens merged in pairs, again and again (arXiv 2412.03248)."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.reducers.cost import alternating_pairs
from effvit.reducers.matching import alternating_match
from effvit.selectors.base import Choice, Features, SelectionSizes, Selector, add_rows, count_members, rows_of
from effvit.tokens import widened

__all__ = ["AIM", "merge_round", "rounds_to"]


def rounds_to(kept: int, tokens: int) -> list[int]:
    """Tokens that each round merges away, at most half of those there are, until ``kept`` are left.

    For a half, a quarter and an eighth of the tokens these are the rounds of llava_arch.py@edc24e9.
    """
    rounds = []
    while tokens > kept:
        rounds.append(min(tokens // 2, tokens - kept))
        tokens -= rounds[-1]
    return rounds


def merge_round(x: Tensor, r: int) -> Choice:
    """Merge r of the tokens in even places into their most similar tokens in odd places (token_merge.py@edc24e9).

    The matching of ToMe (2210.09461) by the tokens themselves, without sizes: a token that was merged before counts
    once in the mean. Those in even places that are left come first, the best matched in front, then all in odd places.

    Args:
        x: (B, N, C).
        r: At most N // 2.
    """
    best, match = alternating_match(x.detach(), 0)  # (B, |A|)
    even, odd = (torch.arange(start, x.shape[1], 2, device=x.device).expand(x.shape[0], -1) for start in (0, 1))
    order = best.argsort(dim=1, descending=True)
    gone, left = order[:, :r], order[:, r:]
    into = match.gather(1, gone)
    members = 1 + count_members(into, odd.shape[1]).unsqueeze(-1)
    merged = (add_rows(widened(x[:, 1::2]), into, widened(rows_of(x, 2 * gone))) / members).to(x.dtype)
    ids = torch.cat([2 * left, odd], dim=1)
    places = torch.arange(ids.shape[1], device=x.device).expand_as(ids)
    group = torch.zeros_like(torch.cat([even, odd], dim=1)).scatter(1, ids, places)
    group = group.scatter(1, 2 * gone, into + left.shape[1])
    return Choice(ids, torch.cat([rows_of(x, 2 * left), merged], dim=1), group)


class AIM(Selector):
    """Merge tokens in rounds until K are left (AIM, 2412.03248, ICCV 2025; its part in front of the language model).

    The release merges video frames behind the projector and a 2-D pooling, to a quarter; give those tokens, frame by
    frame, for its results. A merged token has the position of its token in the odd place.
    """

    name = "aim"
    summary = "merge the most similar tokens in rounds that halve their number (2412.03248)"

    def cost(self, at: SelectionSizes) -> int:
        macs, left = 0, at.tokens
        for r in rounds_to(at.kept, at.tokens):
            macs += alternating_pairs(left, at.dim)
            left -= r
        return macs

    def choose(self, features: Features, kept: int) -> Choice:
        x = features.x
        ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        group = ids
        for r in rounds_to(kept, x.shape[1]):
            merged = merge_round(x, r)
            assert merged.tokens is not None
            assert merged.group is not None
            x, ids, group = merged.tokens, ids.gather(1, merged.ids), merged.group.gather(1, group)
        return Choice(ids, x, group)
