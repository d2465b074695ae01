"""PruMerge: tokens that stand out, each with its neighbours added (LLaVA-PruMerge, arXiv 2403.15388)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_count
from effvit.selectors.base import Choice, Features, Keep, SelectionSizes, Selector, required_scores
from effvit.selectors.neighbours import add_neighbours
from effvit.tokens import compact, wide_product

__all__ = ["PruMerge", "PruMergePlus", "num_outliers"]


def num_outliers(scores: Tensor) -> Tensor:
    """(B,) how many scores (B, N) of an image are above its third quartile by 1.5 quartile ranges; at least 1.

    The release (clip_encoder.py@097c041) takes the quartiles over the batch, so that an image's tokens depend on its
    neighbours, and an image without outliers keeps no token of its own.
    """
    quartiles = torch.quantile(scores, torch.tensor([0.25, 0.75], dtype=scores.dtype, device=scores.device), dim=1)
    low, high = quartiles.unsqueeze(-1)  # (B, 1) each
    return (scores > high + 1.5 * (high - low)).sum(dim=1).clamp(min=1)


class PruMerge(Selector):
    """Keep the tokens whose attention stands out, with their neighbours added (LLaVA-PruMerge, 2403.15388).

    clip_encoder.py@097c041: attention of the class token in the LAST block, all heads as one of C channels; the number
    of kept tokens is that of its outliers (``num_outliers``), or one less than ``keep``. The last token is the sum of
    all tokens that are not kept, weighted by attention; it has the position of the most attended of them. Queries and
    keys are those that attention multiplies, behind norms and RoPE where a tower has them; CLIP has neither.

    Args:
        neighbours: Tokens that are added to each kept one.
    """

    name = "prumerge"
    summary = "keep tokens whose attention stands out, with their neighbours added (2403.15388)"
    row = "one_head"
    keys = "joined"
    weighs_scores = True
    reads_last = True

    def __init__(self, *, neighbours: int = 32) -> None:
        super().__init__()
        self.neighbours = check_count("neighbours", neighbours, 1)

    def count(self, keep: Keep, grid: Size) -> int | None:
        kept, cells = super().count(keep, grid), math.prod(grid)
        if kept != cells:
            self._check_sizes(kept, cells)
        return kept

    def check(self, kept: int, features: Features) -> None:
        self._check_sizes(kept, features.num_tokens)

    def _check_sizes(self, kept: int | None, number: int) -> None:
        """Raise a ValueError unless ``number`` tokens can become ``kept`` ones, or as many as an image needs."""
        if number <= self.neighbours:
            raise ValueError(
                f"{self.name} adds {self.neighbours} neighbours to a token, so it needs more tokens than that, got "
                f"{number}; give fewer neighbours"
            )
        if kept is not None and kept < 2:
            raise ValueError(f"{self.name} needs keep of at least 2, one token for those not kept, got {kept}")

    def cost(self, at: SelectionSizes) -> int:
        centres = at.kept - 1
        near = centres * at.tokens * (at.key_dim + at.dim)  # similarities to the centres, and sums of the neighbours
        return near + at.tokens * at.dim  # and the token of all others

    def choose(self, features: Features, kept: int) -> Choice:
        scores = required_scores(self, features)
        return self.merged(features, scores.topk(kept - 1, dim=1).indices, None)

    def adapt(self, features: Features) -> Choice:
        self._check_sizes(None, features.num_tokens)
        scores = required_scores(self, features)
        rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # (B, N)
        return self.merged_where(features, self.standing_out(features, rank, num_outliers(scores).unsqueeze(1)))

    def standing_out(self, features: Features, rank: Tensor, outliers: Tensor) -> Tensor:
        """(B, N) True for the tokens to keep, by their ranks (B, N) and the number (B, 1) of outliers."""
        return rank < outliers

    def merged_where(self, features: Features, kept: Tensor) -> Choice:
        """``merged`` of the tokens that are True in ``kept`` (B, N); reads how many they are, to make no more slots."""
        place = torch.arange(features.num_tokens, device=kept.device).expand_as(kept)
        centres = compact(place, kept, features.num_tokens, trim=True, keep_mask=True)
        return self.merged(features, centres.order, centres.valid)

    def merged(self, features: Features, centres: Tensor, valid: Tensor | None) -> Choice:
        """The kept tokens (B, K) with their neighbours, and one token for all others."""
        scores, width = required_scores(self, features), centres.shape[1]
        assert features.keys is not None
        tokens = add_neighbours(features.x, features.keys, scores, centres, self.neighbours)
        held = torch.ones_like(centres) if valid is None else valid.long()
        slots = torch.arange(width, device=centres.device).expand_as(centres)
        rest = torch.zeros_like(scores, dtype=torch.int64).scatter_add(1, centres, held) == 0  # (B, N)
        weight = scores.masked_fill(~rest, 0).unsqueeze(1)  # (B, 1, N)
        summed = wide_product(weight, features.x).to(features.x.dtype)  # (B, 1, C)
        anchor = scores.masked_fill(~rest, -math.inf).argmax(dim=1, keepdim=True)
        group = torch.where(rest, width, -1)
        group = group.scatter_reduce(1, centres, torch.where(held > 0, slots, -1), "amax")
        ids, left = torch.cat([centres, anchor], dim=1), torch.cat([tokens, summed], dim=1)
        if valid is None:
            return Choice(ids, left, group)
        return Choice(ids, left, group, torch.cat([valid, rest.any(dim=1, keepdim=True)], dim=1))


class PruMergePlus(PruMerge):
    """PruMerge and evenly spaced tokens beside those that stand out (LLaVA-PruMerge+, 2403.15388).

    Without ``keep`` every s-th token is kept too, s = max(1, int(int(N / outliers) / 3)), but for the last token, as in
    the release, whose 575 is N - 1; about four times as many tokens as PruMerge. With ``keep`` half of the kept tokens
    are evenly spaced and the others the most attended ones beside them: the release keeps doubles, and only ratios at
    which its two halves are of equal length. The spaced ones are the middles of equal stretches of the image, which at
    the release's ratio of 1/8 are its own.
    """

    name = "prumerge_plus"
    summary = "PruMerge with evenly spaced tokens beside those that stand out (2403.15388)"

    def choose(self, features: Features, kept: int) -> Choice:
        number, spaced = features.num_tokens, (kept - 1) // 2
        scores = required_scores(self, features)
        middles = (2 * torch.arange(spaced, device=scores.device) + 1) * number // (2 * max(1, spaced))
        even = middles.expand(scores.shape[0], -1)
        attended = scores.scatter(1, even, -math.inf).topk(kept - 1 - spaced, dim=1).indices
        return self.merged(features, torch.cat([attended, even], dim=1), None)

    def standing_out(self, features: Features, rank: Tensor, outliers: Tensor) -> Tensor:
        number = features.num_tokens
        step = (number // outliers // 3).clamp(min=1)  # (B, 1)
        place = torch.arange(number, device=rank.device)
        return (rank < outliers) | ((place % step == 0) & (place < number - 1))
