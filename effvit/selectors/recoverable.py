"""Recoverable Compression: tokens that attention or a text single out, clusters of the rest (arXiv 2409.01179)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from effvit.schedule import check_count
from effvit.selectors.base import Choice, Features, Selector, left_over, required_scores
from effvit.selectors.neighbours import add_neighbours

__all__ = ["Recoverable", "Recovered", "local_outliers", "recover_image"]

OUTLYING = 1.5  # local outlier factor, from which on scikit-learn's contamination="auto" takes a value for an outlier
FAVOUR = 50.0  # weight of the similarity to the text beside the cosine of two keys
OF_ALL, OF_REST = 20, 10  # neighbours in the local outlier factor


def local_outliers(values: Tensor, k: int) -> Tensor:
    """(n,) for values (n,) in rising order, True where the local outlier factor with k neighbours is above 1.5.

    Breunig et al. (2000), as in scikit-learn's LocalOutlierFactor. On a line the k nearest lie among k places on either
    side.

    Raises:
        ValueError: Not more than k values.
    """
    number = values.shape[0]
    if number <= k:
        raise ValueError(
            f"the local outlier factor takes {k} neighbours, so it needs more values than that, got {number}"
        )
    order = values.sort().values
    offsets = torch.cat([torch.arange(-k, 0), torch.arange(1, k + 1)]).to(values.device)
    places = torch.arange(number, device=values.device).unsqueeze(1) + offsets  # (n, 2k)
    inside = (places >= 0) & (places < number)
    places = places.clamp(0, number - 1)
    distance = (order[places] - order.unsqueeze(1)).abs().masked_fill(~inside, math.inf)
    near = distance.topk(k, dim=1, largest=False)
    neighbour = places.gather(1, near.indices)  # (n, k)
    reach = torch.maximum(near.values, near.values[:, -1][neighbour])
    density = 1 / (reach.mean(dim=1) + 1e-10)
    return density[neighbour].mean(dim=1) / density > OUTLYING


class Recovered(NamedTuple):
    """What is left of one image.

    Attributes:
        ids: (K,) kept tokens, ascending, then centres, then the anchor of the token of all others if there is one.
        tokens: (K, C).
        group: (N,) place in ``ids`` of each token.
        num_kept: How many are kept unchanged.
        num_centres: How many are centres.
    """

    ids: Tensor
    tokens: Tensor
    group: Tensor
    num_kept: int
    num_centres: int


def recover_image(x: Tensor, scores: Tensor, keys: Tensor, text: Tensor | None, neighbours: int) -> Recovered:
    """One image's tokens (N, C) by its scores (N,), keys (N, D) and similarities (N,) to a text.

    Raises:
        ValueError: Too few tokens are left for the neighbours of a centre.
    """
    number, channels = x.shape
    by_attention = scores.topk(max(1, int(local_outliers(scores, OF_ALL).sum()))).indices
    kept, favour = by_attention, None
    if text is not None:
        text = text.index_fill(0, by_attention, text.min())
        share = int(local_outliers(text, OF_ALL).sum()) / number
        kept = torch.cat([by_attention, text.topk(int((number - len(by_attention)) * share)).indices])
        favour = FAVOUR * text
    kept = kept.sort().values
    rest = left_over(kept.unsqueeze(0), number)[0]  # (R,)
    if len(rest) <= neighbours:
        raise ValueError(
            f"recoverable adds {neighbours} neighbours to a token, but keeps {len(kept)} of {number} tokens, which "
            f"leaves {len(rest)}; give fewer neighbours"
        )
    of_rest = scores[rest]
    outlying = int(local_outliers(of_rest, OF_REST).sum())
    centres = of_rest.topk(min(channels * outlying // len(rest), len(rest) - 1)).indices  # places in the rest
    group = torch.full_like(scores, -1, dtype=torch.int64)
    if not len(centres):
        group[kept] = torch.arange(len(kept), device=x.device)
        return Recovered(kept, x[kept], group, len(kept), 0)
    merged = add_neighbours(
        x[rest].unsqueeze(0),
        keys[rest].unsqueeze(0),
        of_rest.unsqueeze(0),
        centres.unsqueeze(0),
        neighbours,
        None if favour is None else favour[rest].unsqueeze(0),
    )[0]
    weight = of_rest.index_fill(0, centres, 0)
    summed = (weight.unsqueeze(0) @ x[rest].to(weight.dtype)).to(x.dtype)  # (1, C)
    anchor = rest[of_rest.index_fill(0, centres, -math.inf).argmax()].unsqueeze(0)
    ids = torch.cat([kept, rest[centres], anchor])
    group[rest] = len(ids) - 1
    group[ids[:-1]] = torch.arange(len(ids) - 1, device=x.device)
    return Recovered(ids, torch.cat([x[kept], merged, summed]), group, len(kept), len(centres))


class Recoverable(Selector):
    """Keep tokens that attention or a text single out, and cluster the rest (Recoverable Compression, 2409.01179).

    clip_encoder.py@d927594, one image at a time: scores and keys are those of PruMerge. As many tokens are kept as have
    an outlying score, and as many of the others as have an outlying similarity to the text (``relevance``; without it
    that step is left out). Of the rest int(C * share of outliers) tokens, C channels as the release has it, are centres
    to which 32 neighbours are added; one last token sums up all others.
    Deviations: a token is compared by its own key, for which the release takes that of another patch; at least one
    token is kept.

    Args:
        neighbours: Tokens that are added to each centre.
    """

    name = "recoverable"
    summary = "keep tokens that attention or a text single out, cluster the rest (2409.01179)"
    row = "one_head"
    keys = "joined"
    weighs_scores = True
    reads_last = True
    reads_relevance = True

    def __init__(self, *, neighbours: int = 32) -> None:
        super().__init__()
        self.neighbours = check_count("neighbours", neighbours, 1)

    def adapt(self, features: Features) -> Choice:
        scores, keys, text = required_scores(self, features), features.keys, features.relevance
        assert keys is not None
        images = [
            recover_image(x, scores[i], keys[i], None if text is None else text[i].to(scores.dtype), self.neighbours)
            for i, x in enumerate(features.x)
        ]
        ids = pad_sequence([image.ids for image in images], batch_first=True)
        tokens = pad_sequence([image.tokens for image in images], batch_first=True)
        counts = torch.tensor([len(image.ids) for image in images], device=ids.device)
        valid = torch.arange(ids.shape[1], device=ids.device) < counts.unsqueeze(1)
        return Choice(ids, tokens, torch.stack([image.group for image in images]), valid)
