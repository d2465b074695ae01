"""Tokens far apart from each other, picked one by one: what DivPrune and ToDRE have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effvit.selectors.base import SelectionSizes, unit_rows
from effvit.tokens import wide_product, widened

__all__ = ["isolated", "picking_macs", "spread"]

ROWS_AT_ONCE = 1024  # of the similarities of all pairs, which are never held whole


@torch.no_grad()
def isolated(x: Tensor) -> Tensor:
    """(B, 1) the token of x (B, N, C) whose nearest other token is farthest, by the cosine; the first of equals."""
    u = unit_rows(widened(x))
    place = torch.arange(x.shape[1], device=x.device)
    nearest = []
    for start in range(0, x.shape[1], ROWS_AT_ONCE):
        similarity = wide_product(u[:, start : start + ROWS_AT_ONCE], u.transpose(1, 2))  # (B, rows, N)
        itself = place[start : start + ROWS_AT_ONCE].unsqueeze(1) == place
        nearest.append(similarity.masked_fill(itself, -math.inf).amax(dim=-1))
    return torch.cat(nearest, dim=1).argmin(dim=1, keepdim=True)


def picking_macs(at: SelectionSizes) -> int:
    """MACs of ``spread`` for one image: a row of distances for each pick but the last."""
    return (at.kept - 1) * at.tokens * at.dim


@torch.no_grad()
def spread(x: Tensor, first: Tensor, number: int, total: bool = False) -> tuple[Tensor, Tensor]:
    """Pick tokens one by one, each as far as can be from those picked before.

    The distance is 1 - cosine, in float32 (float64 for float64). A picked token is out, so that no duplicate of it
    makes it be picked twice; the first of equals wins. One row of distances a step, and a running minimum or sum.

    Args:
        x: (B, N, C).
        first: (B, 1) token to begin with.
        number: K, tokens to pick.
        total: Far by the sum of the distances to those picked before; else by the smallest of them.

    Returns:
        (B, K) tokens in the order they were picked, and (B, K) how far each was then; 0 for the first.
    """
    u = unit_rows(widened(x))
    picks, far = [first], [torch.zeros_like(first, dtype=u.dtype)]
    apart = u.new_zeros(x.shape[:2]) if total else u.new_full(x.shape[:2], math.inf)  # (B, N)
    taken = torch.zeros_like(apart, dtype=torch.bool)
    for _ in range(number - 1):
        picked = u.gather(1, picks[-1].unsqueeze(-1).expand(-1, -1, u.shape[2]))  # (B, 1, C)
        distance = 1 - wide_product(picked, u.transpose(1, 2)).squeeze(1)  # (B, N)
        apart = apart + distance if total else torch.minimum(apart, distance)
        taken = taken.scatter(1, picks[-1], torch.ones_like(picks[-1], dtype=torch.bool))
        picks.append(apart.masked_fill(taken, -math.inf).argmax(dim=1, keepdim=True))
        far.append(apart.gather(1, picks[-1]))
    return torch.cat(picks, dim=1), torch.cat(far, dim=1)
