"""Pairs of two sets of tokens and their merges: what ToMe, PiToMe, vid-TLDR and DiffRate share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.reducers.base import check_finite
from effvit.reducers.matching import alternating_match, falling, merge_sizes, move_shares
from effvit.tokens import (
    Ranges,
    flat_rows,
    fx_leaf,
    position_of,
    ranges_of,
    take_rows,
    wide_dtype,
    wide_product,
    widened,
)

__all__ = [
    "Matching",
    "MergedGrids",
    "bipartite_soft_matching",
    "kth_bipartite_target",
    "matching_target",
    "merge_tokens",
]


class Matching(NamedTuple):
    """Pairs of tokens to merge, by their places in the sequence, prefix tokens included: a ``Step`` of a token map.

    Attributes:
        merged: (B, r) places of the tokens that are merged away, most similar first.
        kept: (B, P+N-r) places of the tokens that stay, in the order of the new sequence.
        into: (B, r) place in the new sequence of the token that each merged one goes into.
        num_prefix: P.
    """

    merged: Tensor
    kept: Tensor
    into: Tensor
    num_prefix: int
    fuses: bool = False

    @property
    def source(self) -> Tensor:
        """(B, r) patch tokens that are merged away, most similar first."""
        return self.merged - self.num_prefix

    @property
    def order(self) -> Tensor:
        """(B, N-r) patch tokens that stay, in the order of the new sequence."""
        return self.kept[:, self.num_prefix :] - self.num_prefix

    @property
    def destination(self) -> Tensor:
        """(B, r) the patch token each merged one goes into."""
        return self.kept.gather(1, self.into) - self.num_prefix

    def target(self, like: Tensor) -> Tensor:
        """(B, N) new place of every old token; ``like`` is any (B, N) int64."""
        return matching_target(self, like)


@fx_leaf
def matching_target(matching: Matching, like: Tensor) -> Tensor:
    """(B, N) new place of every old token under the matching; ``like`` is any (B, N) int64."""
    return position_of(matching.order, like).scatter(1, matching.source, matching.into - matching.num_prefix)


@fx_leaf
def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    num_prefix: int,
    ranges: Ranges | None = None,
    origin: str = "tokens",
    x: Tensor | None = None,
    in_order: bool | None = None,
    by_place: bool = False,
) -> Matching:
    """Match the r tokens of set A that are most similar to one of set B (ToMe, 2210.09461, section 3.1).

    The sets alternate along the whole sequence, prefix tokens included: A has its even, B its odd places.
    Prefix tokens are never matched, whatever their number (merge.py@af95e4b protects the first two only).

    Args:
        metric: (B, N, D) features of the patch tokens, compared by cosine.
        r: Tokens to merge, at most N // 2.
        num_prefix: Prefix tokens in front of the patches.
        ranges: Those of the batch, for P + N places at least; None: made here.
        origin: What the features are, for messages.
        x: (B, P+N, C) tokens that entered the block, for messages; of fewer images, each has as many rows of features.
        in_order: Whether what is left of A keeps its order in the sequence, or is ordered by falling similarity. None:
            it keeps its order if there is a prefix token, as in the official code.
        by_place: What is equal but for rounding is matched by place, see ``falling``.

    Returns:
        The matching. The new order is what is left of A, then B.

    Raises:
        ValueError: Similarities that are NaN, see ``check_finite``.
    """
    length = num_prefix + metric.shape[1]
    places = (ranges_of(metric, length, num_prefix) if ranges is None else ranges).sequence
    first_a, first_b = num_prefix + num_prefix % 2, num_prefix + (num_prefix + 1) % 2
    best, match = alternating_match(metric, num_prefix, by_place=by_place)  # (B, |A|) each
    rows = 1 if x is None else max(1, best.shape[0] // x.shape[0])
    ranked = falling(check_finite(best, origin, x, rows), by_place)  # (B, |A|)
    in_a = torch.add(places[:, first_a : first_a + 1], ranked, alpha=2)
    left = in_a[:, r:]  # (B, |A|-r)
    if num_prefix if in_order is None else in_order:
        left = left.sort(dim=-1).values
    kept = torch.cat([places[:, :num_prefix], left, places[:, first_b:length:2]], dim=1)
    behind = num_prefix + left.shape[1]  # in the new sequence B follows what is left of A
    return Matching(in_a[:, :r], kept, match.gather(1, ranked[:, :r]) + behind, num_prefix)


def kth_bipartite_target(metric: Tensor, k: int) -> Tensor:
    """Where each token goes if every k-th one absorbs the tokens most similar to it (merge.py@af95e4b).

    Args:
        metric: (B, N, D); a tail of N % k tokens is left out, as in the official code.
        k: At least 2.

    Returns:
        (B, N - N % k) index of the absorbing token, 0 to N // k - 1.
    """
    metric = F.normalize(widened(metric), dim=-1)
    groups: Tensor = metric[:, : metric.shape[1] // k * k].unflatten(1, (-1, k))  # (B, N // k, k, D)
    others, absorbing = groups[:, :, :-1].flatten(1, 2), groups[:, :, -1]  # (B, N // k * (k - 1), D), (B, N // k, D)
    similarity = wide_product(others, absorbing.transpose(1, 2))  # (B, N // k * (k - 1), N // k)
    nearest = similarity.argmax(-1)  # (B, N // k * (k - 1))
    itself = torch.ones_like(nearest[:, :: k - 1]).cumsum(1) - 1  # (B, N // k)
    return torch.cat([nearest.unflatten(1, (-1, k - 1)), itself.unsqueeze(-1)], dim=2).flatten(1)


@fx_leaf
def merge_tokens(
    x: Tensor, size: Tensor | None, matching: Matching, ranges: Ranges | None = None, part: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of merged tokens (merge.py@af95e4b ``merge_wavg``).

    Only the r merged rows are computed with: each adds its share of the difference to its destination, so two
    equal tokens merge without any rounding.

    Args:
        x: (B, P+N, C).
        size: (B, P+N) patches each token stands for; None: one each.
        matching: Which tokens go where.
        ranges: Those of the batch, for P + N places at least; None: made here.
        part: (B, r) part of each merged token that counts, in [0, 1]; None: all of it.

    Returns:
        (B, P+N-r, C) and the new sizes (B, P+N-r).
    """
    kept, length = matching.kept, x.shape[1]
    images = (ranges_of(x, length, matching.num_prefix) if ranges is None else ranges).images
    rows = torch.add(kept, images, alpha=length).flatten()  # (B * (P+N-r),) of the flattened sequence
    source = torch.add(matching.merged, images, alpha=length).flatten()  # (B * r,)
    destination = torch.add(matching.into, images, alpha=kept.shape[1]).flatten()  # (B * r,) of the new sequence
    x = x.flatten(0, 1)
    sizes = x.new_ones(x.shape[0], dtype=wide_dtype(x.dtype)) if size is None else size.flatten()
    gain = sizes.index_select(0, source)
    gain = gain if part is None else gain * part.flatten()
    new_sizes, share = merge_sizes(sizes.index_select(0, rows), gain, destination)
    new = move_shares(x.index_select(0, rows), x.index_select(0, source), destination, share)
    return new.view(*kept.shape, -1), new_sizes.view(kept.shape)


class MergedGrids(NamedTuple):
    """Groups of the tokens of small grids, see ``effvit.reducers.grids``.

    Attributes:
        matching: The pairs.
        target: (B, N) group of each token.
        sizes_count: A group counts as a key by its size.
    """

    matching: Matching
    target: Tensor
    sizes_count: bool

    @property
    def anchor(self) -> Tensor:
        """(B, N-r) token whose position each group keeps."""
        return self.matching.order

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, C) -> means (B, N-r, C), and the sizes (B, N-r) if they count."""
        means, sizes = merge_tokens(x, None, self.matching)
        return means, sizes if self.sizes_count else None

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets what its group became: y (B, N-r, C) -> (B, N, C)."""
        return take_rows(y, flat_rows(self.target, y.shape[1]))
