"""Merging of alternating tokens from the paper (ToMe, 2210.09461, section 3.1), one pair after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def most_similar(metric: Tensor, num_prefix: int) -> tuple[dict[int, int], dict[int, float]]:
    """Place of each token of set A -> that of the most similar one of set B by (N, D) features, and the cosine."""
    places = range(num_prefix, num_prefix + len(metric))
    into, best = {}, {}
    for a in (place for place in places if place % 2 == 0):
        cosines = {
            b: float(F.cosine_similarity(metric[a - num_prefix], metric[b - num_prefix], dim=0))
            for b in places
            if b % 2
        }
        into[a] = max(cosines, key=cosines.__getitem__)
        best[a] = cosines[into[a]]
    return into, best


def slow_merge(x: Tensor, size: Tensor, metric: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens (P+N-r, C) and sizes of one image after its merging, pair by pair, in places of the sequence.

    Args:
        x: (P+N, C) tokens.
        size: (N,) patches that each stands for.
        metric: (N, D) what is compared.
        r: Tokens to merge.
        num_prefix: P.
    """
    into, best = most_similar(metric, num_prefix)
    falling = sorted(best, key=lambda place: -best[place])
    set_b = [place for place in range(num_prefix, len(x)) if place % 2]
    left = sorted(falling[r:]) if num_prefix else falling[r:]
    tokens, sizes = [x[place] for place in range(num_prefix)], []
    for place in [*left, *set_b]:
        members = [place, *(a for a in falling[:r] if into[a] == place)]
        weights = size[[member - num_prefix for member in members]]
        tokens.append((weights[:, None] * x[members]).sum(0) / weights.sum())
        sizes.append(weights.sum())
    return torch.stack(tokens), torch.stack(sizes)
