"""HoT: keep the tokens that are peaks of density, the rest is dropped (arXiv 2311.12028)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effvit.protocols import Settings
from effvit.recording import is_recorded
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import KeepRate, kept_in_blocks
from effvit.schedule import check_blocks, check_count
from effvit.tokens import TokenMap, fx_leaf, wide_product, widened

__all__ = ["HoT", "density_peaks", "peak_scores", "squared_distances"]

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
    is. Distances are divided by sqrt(C).

    Two tokens that are nearest to each other have the same density for k = 2, so who counts as denser decides
    which of them is a peak. hot_mixste.py@873b5bd parts them by uniform noise of 1e-6, in evaluation too. Here it
    is the first of them in the sequence, so that the result is repeatable and no matter of rounding.

    Args:
        x: (B, N, C) tokens.
        k: Neighbours in the density, the token itself included; at least 2 and at most N.
        compat: The official code with its noise set to zero: tokens of equal density are not denser than each
            other, and equal is what ``torch.cdist`` rounds to, in the distance of a token to itself too.

    Returns:
        (B, N), in float32 (float64 for float64).

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
    density = squared.topk(k, dim=-1, largest=False).values.mean(-1).neg().exp()  # (B, N)
    denser = _denser(density, first_of_equals=not compat)
    farthest = squared.flatten(1).amax(1)[:, None, None]  # (B, 1, 1)
    return torch.where(denser, squared, farthest).amin(-1).sqrt() * density


def _denser(density: Tensor, first_of_equals: bool = True) -> Tensor:
    """(B, N, N) True where the token of the column is denser than that of the row; density is (B, N)."""
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
    density = best.mean(-1).neg().exp()  # (B, N)
    nearest = farthest.repeat(1, x.shape[1])  # (B, N) squared distance to a denser token
    for rows, columns, squared in _distances_by_blocks(x):
        if rows == columns:
            denser = _denser(density[:, rows])
        else:  # of equal ones the first is denser, and that is the row
            denser = density[:, columns].unsqueeze(1) > density[:, rows].unsqueeze(2)
            near = squared.masked_fill(denser, math.inf).amin(1)  # (B, columns)
            nearest[:, columns] = torch.minimum(nearest[:, columns], near)
        near = squared.masked_fill(~denser, math.inf).amin(2)  # (B, rows)
        nearest[:, rows] = torch.minimum(nearest[:, rows], near)
    return nearest.sqrt() * density


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


class HoT(KeepRate):
    """Keep the K patches that are peaks of density before a block, in image order (HoT, 2311.12028).

    The token pruning cluster of the Hourglass Tokenizer, made for frames of a pose sequence and applied to
    patches here. It needs no class token and no attention, only the (N, N) distances of the patches. The second
    half, attention that recovers the full sequence, has weights to train: ``effvit.recover.TokenRecoveringAttention``.
    """

    name = "hot"
    summary = "keep the peaks of density among the patches, drop the rest (2311.12028)"

    def __init__(self, keep_rate: float, k: int, num_tokens: int | None) -> None:
        super().__init__(keep_rate, num_tokens)
        self.k = k

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 1 / 3,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        k: int = 2,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction of the patch tokens that stay, in (0, 1]; one value, or one for each block. The
                published one is 81 of 243 frames.
            reduce_at: 0-based blocks before which tokens are dropped; None means the published 3 of 8, in
                proportion for another depth.
            num_tokens: Absolute numbers of tokens to keep in place of a rate; one value or one for each block.
            k: Neighbours in the density, the token itself included, at least 2.
        """
        check_count("k", k, 2)
        blocks = check_blocks("reduce_at", (3 * depth // 8,) if reduce_at is None else reduce_at, depth)
        kept = kept_in_blocks(blocks, keep_rate, num_tokens)
        return {b: cls(rate, k, number) for b, (rate, number) in kept.items()}

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.5, "reduce_at": (1, 3)}

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return []  # published for pose sequences: effvit.tune does not try it

    def count(self, num_tokens: int, num_patches: int) -> int:
        return self.num_kept(num_tokens)

    def cost(self, at: BlockSizes) -> Change:
        kept = math.ceil(self.keep_rate * at.tokens) if self.num_tokens is None else self.num_tokens
        if kept >= at.tokens:
            return Change(at.tokens, at.tokens, at.tokens, 0)
        return Change(kept, kept, kept, at.tokens**2 * at.dim)  # distances of all pairs

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        kept = self.num_kept(tokens.num_tokens)
        return (x, tokens) if kept >= tokens.num_tokens else self.prune(x, tokens, kept)

    def prune(self, x: Tensor, tokens: TokenMap, kept: int) -> tuple[Tensor, TokenMap]:
        """x (B, P+N, C) -> (B, P+kept, C) and the map of the kept tokens."""
        k = min(self.k, tokens.num_tokens) if self.any_size else self.k
        scores = check_finite(peak_scores(tokens.split(x)[1], k), self.origin("peak scores"), x)  # (B, N)
        return tokens.select(x, highest(scores, kept), kept)
