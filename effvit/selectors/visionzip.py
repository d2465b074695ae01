"""VisionZip: the most attended tokens, and a few that sum up the others (arXiv 2412.04467)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_count
from effvit.selectors.base import (
    Choice,
    Features,
    Keep,
    SelectionSizes,
    Selector,
    add_rows,
    count_members,
    left_over,
    required_scores,
    rows_of,
    unit_rows,
)
from effvit.tokens import wide_product, widened

__all__ = ["Context", "VisionZip", "contextual_tokens"]


class Context(NamedTuple):
    """Tokens that sum up others.

    Attributes:
        tokens: (B, M, C).
        targets: (B, M) the token each is built on.
        group: (B, N) which of them each token went into, -1 for none.
    """

    tokens: Tensor
    targets: Tensor
    group: Tensor


def contextual_tokens(
    x: Tensor, keys: Tensor, dominant: Tensor, number: int, outliers: Tensor | None = None
) -> Context:
    """Sum up the tokens that are not dominant in ``number`` contextual ones (VisionZip, 2412.04467, section 3.2).

    Every max(1, n // M)-th of the n tokens left is a target; each other one goes to the target of largest cosine of the
    keys. A contextual token is its target PLUS the mean of the others, as in clip_encoder.py@3151f6d, so that its norm
    is about twice that of a token; the target alone if no other went to it.

    Args:
        x: (B, N, C).
        keys: (B, N, D) keys, the mean over the heads.
        dominant: (B, K) tokens that are kept.
        number: M, at most N - K.
        outliers: (B, N) True for tokens that go into none, and are targets only where nothing else is left.
    """
    outlying = torch.zeros_like(x[..., 0], dtype=torch.bool) if outliers is None else outliers
    rest = left_over(dominant, x.shape[1])  # (B, n)
    behind = outlying.gather(1, rest)
    rest = torch.where(behind, rest + x.shape[1], rest).sort(dim=1).values % x.shape[1]
    step = ((~behind).sum(dim=1, keepdim=True) // number).clamp(min=1)  # (B, 1)
    order = torch.arange(number, device=x.device)
    targets = rest.gather(1, step * order)  # (B, M)
    others = left_over(torch.cat([dominant, targets], dim=1), x.shape[1])  # (B, n - M)
    counted = ~outlying.gather(1, others)
    unit = unit_rows(keys.detach())
    similarity = wide_product(rows_of(unit, others), rows_of(unit, targets).transpose(1, 2))  # (B, n - M, M)
    best = similarity.argmax(dim=-1) if others.shape[1] else others
    place = torch.where(counted, best, number)  # one more, which is left out again
    built = widened(rows_of(x, targets))
    sums = add_rows(built.new_zeros(x.shape[0], number + 1, x.shape[2]), place, widened(rows_of(x, others)))
    counts = count_members(place, number + 1).clamp(min=1).unsqueeze(-1)
    built = (built + (sums / counts)[:, :number]).to(x.dtype)
    group = torch.full(x.shape[:2], -1, device=x.device).scatter(1, targets, order.expand_as(targets))
    return Context(built, targets, group.scatter(1, others, torch.where(counted, best, -1)))


class VisionZip(Selector):
    """Keep the most attended tokens, and sum up the rest in contextual ones (VisionZip, 2412.04467, CVPR 2025).

    Scores and keys are those of the block the tokens leave, clip_encoder.py@3151f6d. ``keep`` counts dominant and
    contextual tokens; the class token, which the release puts in front, is in ``Selection.prefix``. A contextual token
    has the position of its target, and all stand in image order.

    Args:
        contextual: How many of the tokens are contextual, 0 for none; None: 10 of 64, as in the release's README.
    """

    name = "visionzip"
    summary = "keep the most attended tokens, sum up the others in a few (2412.04467)"
    row = "attention"
    keys = "mean"

    def __init__(self, *, contextual: int | None = None) -> None:
        super().__init__()
        self.contextual = None if contextual is None else check_count("contextual", contextual)

    def num_contextual(self, kept: int) -> int:
        """How many of ``kept`` tokens are contextual."""
        return kept * 10 // 64 if self.contextual is None else self.contextual

    def count(self, keep: Keep, grid: Size) -> int | None:
        kept = self.number(keep, math.prod(grid))
        if kept < math.prod(grid) and self.num_contextual(kept) >= kept:
            raise ValueError(
                f"contextual={self.contextual} of keep={kept} tokens leaves no dominant one; keep more tokens, or "
                "fewer contextual ones"
            )
        return kept

    def cost(self, at: SelectionSizes) -> int:
        return (at.tokens - at.kept) * self.num_contextual(at.kept) * at.key_dim

    def choose(self, features: Features, kept: int) -> Choice:
        number = self.num_contextual(kept)
        dominant = required_scores(self, features).topk(kept - number, dim=1).indices
        if not number:
            return Choice(dominant)
        assert features.keys is not None
        context = contextual_tokens(features.x, features.keys, dominant, number, features.outliers)
        places = torch.arange(kept - number, device=dominant.device).expand_as(dominant)
        group = torch.where(context.group < 0, -1, context.group + kept - number).scatter(1, dominant, places)
        tokens = torch.cat([rows_of(features.x, dominant), context.tokens], dim=1)
        return Choice(torch.cat([dominant, context.targets], dim=1), tokens, group)
