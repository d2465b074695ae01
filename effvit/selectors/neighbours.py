"""Tokens with their neighbours added: what PruMerge and Recoverable Compression make of those they keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effvit.selectors.base import rows_of, unit_rows
from effvit.tokens import wide_product

__all__ = ["add_neighbours"]


def add_neighbours(
    x: Tensor, keys: Tensor, scores: Tensor, centres: Tensor, neighbours: int, favour: Tensor | None = None
) -> Tensor:
    """Each centre plus the sum of its nearest other tokens, weighted by their scores: (B, K, C).

    Nearest by the cosine of the keys, other centres too; weights are not normalised and the centre's is 1, as in the
    release of PruMerge (clip_encoder.py@097c041).

    Args:
        x: (B, N, C).
        keys: (B, N, D).
        scores: (B, N) attention.
        centres: (B, K) tokens.
        neighbours: Nearest tokens of each.
        favour: (B, N) added to the cosine with each token.
    """
    unit = unit_rows(keys.detach())
    similarity = wide_product(rows_of(unit, centres), unit.transpose(1, 2))  # (B, K, N)
    similarity = similarity if favour is None else similarity + favour.unsqueeze(1)
    near = similarity.scatter(2, centres.unsqueeze(-1), -math.inf).topk(neighbours, dim=-1).indices
    weight = scores.unsqueeze(1).expand_as(similarity)  # (B, K, N)
    weight = torch.zeros_like(weight).scatter(2, near, weight.gather(2, near))
    return rows_of(x, centres) + wide_product(weight, x).to(x.dtype)
