"""Peaks of density among tokens (DPC-kNN), which several methods cluster by."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from effvit.recording import is_recorded
from effvit.tokens import fx_leaf, wide_product, widened

__all__ = ["density_peaks", "highest", "peak_scores", "squared_distances"]

# The distances of all pairs are held where there are at most so many times as many tokens as channels: then they take
# no more memory than the MLP.
WIDTHS_WHOLE = 2
LEAST_BLOCK = 512  # tokens of a block of distances


def squared_distances(x: Tensor) -> Tensor:
    """(B, N, N) squared distances of x (B, N, C), divided by C: symmetric to the last bit, exact zeros to itself."""
    product = wide_product(x, x.transpose(1, 2))  # (B, N, N)
    twice = product + product.transpose(1, 2)
    norm = twice.diagonal(dim1=1, dim2=2) / 2  # (B, N)
    return (norm.unsqueeze(1) + norm.unsqueeze(2) - twice).clamp(min=0) / x.shape[2]


@fx_leaf
@torch.no_grad()
def peak_scores(x: Tensor, k: int = 2, compat: bool = False) -> Tensor:
    """How much each token is a peak of density (DPC-kNN; HoT, 2311.12028, token pruning cluster).

    The density of a token is exp(-mean of its k smallest squared distances), its own, 0, among them; the score
    is that density times the distance to the nearest denser token, for the densest one the largest distance there
    is. Distances are divided by sqrt(C). Its logarithm is what is computed: of tokens that lie far apart all densities
    would be 0, and the choice the same in every image.

    Two tokens that are nearest to each other have the same density for k = 2, so who counts as denser decides
    which of them is a peak. hot_mixste.py@873b5bd parts them by uniform noise of 1e-6, in evaluation too. Here it
    is the first of them in the sequence, so that the result is repeatable and no matter of rounding.

    Args:
        x: (B, N, C) tokens.
        k: Neighbours in the density, the token itself included; at least 2 and at most N.
        compat: The official code with its noise set to zero: tokens of equal density are not denser than each
            other, and equal is what ``torch.cdist`` rounds to, in the distance of a token to itself too.

    Returns:
        (B, N) logarithms of the scores, in float32 (float64 for float64); -inf for a token that equals a denser one.

    Raises:
        ValueError: k out of range.
    """
    length = x.shape[1]
    if not 2 <= k <= length:
        raise ValueError(f"k must be at least 2 and at most the number of tokens, got {k} for {length} tokens")
    x = widened(x)
    # Recording is asked for first: there the length may be open, and a comparison would fix on which side it is.
    if not (compat or is_recorded(x) or torch.jit.is_tracing() or length <= WIDTHS_WHOLE * x.shape[2]):
        return _scores_by_blocks(x, k)
    squared: Tensor = (torch.cdist(x, x) / x.shape[2] ** 0.5).square() if compat else squared_distances(x)
    log_density = squared.topk(k, dim=-1, largest=False).values.mean(-1).neg()  # (B, N)
    density = log_density.exp() if compat else log_density  # which are equal
    denser = _denser(density, first_of_equals=not compat)
    farthest = squared.flatten(1).amax(1)[:, None, None]  # (B, 1, 1)
    return torch.where(denser, squared, farthest).amin(-1).log() / 2 + log_density


def _denser(density: Tensor, first_of_equals: bool = True) -> Tensor:
    """(B, N, N) True where the token of the column is denser than that of the row; density, or its log, is (B, N)."""
    other, own = density.unsqueeze(1), density.unsqueeze(2)  # (B, 1, N), (B, N, 1)
    if not first_of_equals:
        return other > own
    place = torch.arange(density.shape[1], device=density.device)
    return (other > own) | ((other == own) & (place.unsqueeze(1) > place))


def _scores_by_blocks(x: Tensor, k: int) -> Tensor:
    """``peak_scores`` of x (B, N, C) that holds the distances of a block of tokens to another, and not all of them."""
    best = x.new_full((*x.shape[:2], k), math.inf)  # (B, N, k) smallest squared distances
    farthest = x.new_zeros(x.shape[0], 1)
    for rows, columns, squared in _distances_by_blocks(x):
        farthest = torch.maximum(farthest, squared.flatten(1).amax(1, keepdim=True))
        for span, near in ((rows, squared), (columns, squared.transpose(1, 2)))[: 1 + (rows != columns)]:
            best[:, span] = torch.cat([best[:, span], near], dim=-1).topk(k, dim=-1, largest=False).values
    log_density = best.mean(-1).neg()  # (B, N)
    nearest = farthest.repeat(1, x.shape[1])  # (B, N) squared distance to a denser token
    for rows, columns, squared in _distances_by_blocks(x):
        if rows == columns:
            denser = _denser(log_density[:, rows])
        else:  # of equal ones the first is denser, and that is the row
            denser = log_density[:, columns].unsqueeze(1) > log_density[:, rows].unsqueeze(2)
            near = squared.masked_fill(denser, math.inf).amin(1)  # (B, columns)
            nearest[:, columns] = torch.minimum(nearest[:, columns], near)
        near = squared.masked_fill(~denser, math.inf).amin(2)  # (B, rows)
        nearest[:, rows] = torch.minimum(nearest[:, rows], near)
    return nearest.log() / 2 + log_density


def _distances_by_blocks(x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """``squared_distances`` of x (B, N, C) in blocks on and above the diagonal: rows, columns, (B, rows, columns).

    A block stands for its mirror image too, so that the distance of two tokens is the same from both sides.
    """
    length, dim = x.shape[1:]
    side = max(LEAST_BLOCK, dim)
    spans = [slice(start, min(start + side, length)) for start in range(0, length, side)]
    norm = x.square().sum(-1)  # (B, N)
    for number, rows in enumerate(spans):
        yield rows, rows, squared_distances(x[:, rows])
        for columns in spans[number + 1 :]:
            product = wide_product(x[:, rows], x[:, columns].transpose(1, 2))
            squared = norm[:, rows].unsqueeze(2) + norm[:, columns].unsqueeze(1) - 2 * product
            yield rows, columns, squared.clamp(min=0) / dim


def density_peaks(x: Tensor, num_clusters: int, k: int = 2, compat: bool = False) -> Tensor:
    """The ``num_clusters`` tokens of x (B, N, C) that are most a peak of density: (B, num_clusters), ascending.

    Their cluster members are dropped, not averaged: the peaks stay as they are. Arguments as in ``peak_scores``.
    """
    return highest(peak_scores(x, k, compat), num_clusters)


def highest(scores: Tensor, number: int) -> Tensor:
    """The tokens with the ``number`` highest scores (B, N), in the order of the sequence: (B, number)."""
    return scores.topk(number, dim=1).indices.sort(dim=1).values
