"""Tokens far apart from each other, picked one by one: what DivPrune and ToDRE have in common."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.selectors.base import SelectionSizes, rows_of, unit_rows
from effvit.tokens import wide_product, widened

__all__ = ["Cosines", "cosine_macs", "cosines_of", "holds_table", "isolated", "spread"]

ROWS_AT_ONCE = 1024  # of the similarities of all pairs, where these are not held whole
HELD_TOKENS = 4096  # of an image at most, whose similarities are held: 64 MiB
# One product for all pairs takes as long as one for each of about N / 10 rows (CPU, one thread, C 1,024).
HELD_SHARE = 10


class Cosines(NamedTuple):
    """The cosines of all pairs of tokens, held or made row by row.

    Attributes:
        unit: (B, N, C) tokens of norm 1, in float32 (float64 for float64).
        table: (B, N, N) the cosines where they are held.
    """

    unit: Tensor
    table: Tensor | None

    def rows(self, span: slice) -> Tensor:
        """(B, rows, N) of a span of tokens with all."""
        return self._with_all(self.unit[:, span]) if self.table is None else self.table[:, span]

    def of(self, token: Tensor) -> Tensor:
        """(B, N) of one token (B, 1) of each image with all."""
        row = self._with_all(rows_of(self.unit, token)) if self.table is None else rows_of(self.table, token)
        return row.squeeze(1)

    def _with_all(self, some: Tensor) -> Tensor:
        return wide_product(some, self.unit.transpose(1, 2))


def holds_table(tokens: int, number: int) -> bool:
    """Whether the cosines of all pairs of ``tokens`` are held where ``number`` rows are asked for one by one."""
    return tokens <= HELD_TOKENS and HELD_SHARE * number >= tokens


def cosine_macs(at: SelectionSizes) -> int:
    """MACs of the cosines for one image: of all pairs where they are held, else of a row for each pick but the last."""
    rows = at.tokens if holds_table(at.tokens, at.kept) else at.kept - 1
    return rows * at.tokens * at.dim


@torch.no_grad()
def cosines_of(x: Tensor, number: int) -> Cosines:
    """The cosines of tokens x (B, N, C), of which ``number`` rows will be asked for one by one.

    Whether they are held depends on N and the number alone, so that it is the same whatever else is in the batch.
    """
    unit = unit_rows(widened(x))
    return Cosines(unit, wide_product(unit, unit.transpose(1, 2)) if holds_table(x.shape[1], number) else None)


@torch.no_grad()
def isolated(cosines: Cosines) -> Tensor:
    """(B, 1) the token whose nearest other token is farthest, by the cosine; the first of equals."""
    number = cosines.unit.shape[1]
    place = torch.arange(number, device=cosines.unit.device)
    nearest = []
    for start in range(0, number, ROWS_AT_ONCE):
        span = slice(start, start + ROWS_AT_ONCE)
        itself = place[span].unsqueeze(1) == place
        nearest.append(cosines.rows(span).masked_fill(itself, -math.inf).amax(dim=-1))
    return torch.cat(nearest, dim=1).argmin(dim=1, keepdim=True)


@torch.no_grad()
def spread(cosines: Cosines, first: Tensor, number: int, total: bool = False) -> tuple[Tensor, Tensor]:
    """Pick tokens one by one, each as far as can be from those picked before.

    The distance is 1 - cosine, in float32 (float64 for float64). A picked token is out, so that no duplicate of it
    makes it be picked twice; the first of equals wins. One row of distances a step, and a running minimum or sum.

    Args:
        cosines: Of the N tokens.
        first: (B, 1) token to begin with.
        number: K, tokens to pick.
        total: Far by the sum of the distances to those picked before; else by the smallest of them.

    Returns:
        (B, K) tokens in the order they were picked, and (B, K) how far each was then; 0 for the first.
    """
    u = cosines.unit
    picks, far = [first], [torch.zeros_like(first, dtype=u.dtype)]
    apart = u.new_zeros(u.shape[:2]) if total else u.new_full(u.shape[:2], math.inf)  # (B, N)
    taken = torch.zeros_like(apart, dtype=torch.bool)
    for _ in range(number - 1):
        distance = 1 - cosines.of(picks[-1])  # (B, N)
        apart = apart + distance if total else torch.minimum(apart, distance)
        taken = taken.scatter(1, picks[-1], torch.ones_like(picks[-1], dtype=torch.bool))
        picks.append(apart.masked_fill(taken, -math.inf).argmax(dim=1, keepdim=True))
        far.append(apart.gather(1, picks[-1]))
    return torch.cat(picks, dim=1), torch.cat(far, dim=1)
