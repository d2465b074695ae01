"""CDPruner: tokens that are relevant and unlike each other, by a determinantal point process (arXiv 2506.10967)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effvit.reducers.base import check_weights
from effvit.selectors.base import Choice, Features, SelectionSizes, Selector, unit_rows
from effvit.selectors.spread import cosine_macs, cosines_of
from effvit.tokens import wide_product, widened

__all__ = ["CDPruner", "determinant_order", "relevance_to_text"]

LEAST = 1e-6  # relevance of the least relevant patch, before it is divided by the range


def relevance_to_text(patches: Tensor, texts: Tensor) -> Tensor:
    """Relevance (B, N) in (0, 1] of patches (B, N, E) to texts (M, E) of the same space (CDPruner, 2506.10967).

    r = (q - min q + 1e-6) / (max q - min q), q = -(mean cosine to the texts): the minus is the authors', since
    background patches of CLIP are more similar to texts. Minimum and maximum are those of the image; the release
    (llava_arch.py@9541616) takes them over the batch, so that an image's tokens depend on its neighbours. 1 where all
    patches are equally similar, for which the release divides by zero.
    """
    patches, texts = unit_rows(widened(patches)), unit_rows(widened(texts).unsqueeze(0))
    q = -wide_product(patches, texts.transpose(1, 2)).mean(dim=-1)  # (B, N)
    least, most = q.amin(dim=1, keepdim=True), q.amax(dim=1, keepdim=True)
    flat = most == least
    return torch.where(flat, 1.0, (q - least + LEAST) / torch.where(flat, 1.0, most - least))


@torch.no_grad()
def determinant_order(x: Tensor, number: int, relevance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy maximum of the determinant of r_i cos(x_i, x_j) r_j: the tokens in picking order, and what each adds.

    The fast form that updates an incomplete Cholesky factor, one row a step. The diagonal is r^2 exactly, so that with
    equal relevances the first token is picked first and not one that rounding favours. Where the rank of the features
    is used up, the most relevant of the tokens left follow.

    Args:
        x: (B, N, C).
        number: K.
        relevance: (B, N); None: 1, diversity alone.

    Returns:
        (B, K) tokens, and (B, K) conditional variance of each when it was picked.
    """
    cosines = cosines_of(x, number)
    u = cosines.unit
    r = torch.ones_like(u[..., 0]) if relevance is None else relevance.to(u.dtype)
    left = r.square()  # (B, N) conditional variances
    # Rounding alone: a bound that grows with the channels would take tokens of low relevance for dependent ones.
    spent = left.amax(dim=1, keepdim=True) * torch.finfo(u.dtype).eps * 8
    least = spent * r / r.amax(dim=1, keepdim=True)  # (B, N) ranks of dependent tokens
    factor = u.new_zeros(u.shape[0], number, u.shape[1])  # (B, K, N)
    picks, gains = [], []
    for step in range(number):
        pick = torch.where(left > spent, left, least).argmax(dim=1, keepdim=True)  # (B, 1)
        gain = left.gather(1, pick)
        picks.append(pick)
        gains.append(gain)
        if step == number - 1:
            break
        row = r.gather(1, pick) * r * cosines.of(pick)  # (B, N)
        if step:
            known = factor[:, :step]
            column = known.gather(2, pick.unsqueeze(1).expand(-1, step, -1))  # (B, step, 1)
            row = row - wide_product(column.transpose(1, 2), known).squeeze(1)
        row = row * torch.where(gain > spent, gain.clamp(min=0).rsqrt(), 0)
        factor[:, step] = row
        left = (left - row.square()).scatter(1, pick, -math.inf)  # picked tokens are out
        least = least.scatter(1, pick, -math.inf)
    return torch.cat(picks, dim=1), torch.cat(gains, dim=1)


class CDPruner(Selector):
    """Keep the K tokens with the largest determinant of relevance and similarity (CDPruner, 2506.10967).

    Relevance comes from the caller (``relevance_to_text``); without it the choice is by diversity alone, as OpenVINO
    GenAI does for an empty instruction. The release (llava_arch.py@9541616) takes cosines behind the projector: give
    those tokens for its results.
    """

    name = "cdpruner"
    summary = "keep tokens that are relevant and unlike each other, by their determinant (2506.10967)"
    reads_relevance = True

    def check(self, kept: int, features: Features) -> None:
        channels = features.x.shape[2]
        if kept > channels:
            raise ValueError(
                f"cdpruner can tell at most as many tokens apart as they have channels, {channels}, got keep={kept}; "
                "keep fewer, or use 'divprune'"
            )
        if features.relevance is not None:
            check_weights(
                features.relevance,
                "cdpruner: the relevances",
                "similarities are scaled by them, so give numbers above 0, as relevance_to_text does, or no relevance",
            )

    def cost(self, at: SelectionSizes) -> int:
        steps = at.kept - 1  # each with the rows of the factor before it
        return cosine_macs(at) + at.tokens * steps * (steps - 1) // 2

    def choose(self, features: Features, kept: int) -> Choice:
        return Choice(determinant_order(features.x, kept, features.relevance)[0])
