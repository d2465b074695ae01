"""Merging of as many tokens of each image as are similar enough, at most so many: what DyMU and ToMe share.

The images of a batch lose different numbers of tokens, padded or packed. (ToMe on images of equal grids, which lose
equal numbers, has a matching without masks of its own.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.recording import is_exported, is_exported_again, is_recorded
from effvit.reducers.matching import alternating_match, merge_sizes, move_shares
from effvit.tokens import (
    TokenMap,
    fix_traced_size,
    fx_leaf,
    position_of,
    rows_in_sequence,
    take_rows,
    trimmed,
    true_places,
    wide_dtype,
)

__all__ = ["Merge", "apply_merge", "descending_rank", "number_merged", "plan_merge", "top_of_batch"]

# Similarities this near the threshold count as equal to it: another batch size changes the order of sums, and with
# it the last digits, and an image must not depend on that.
TIE = 1e-6
OFFICIAL_EPS = 1e-4  # what the official batch path adds to every size it divides by


class Merge(NamedTuple):
    """Which of the N patch tokens go where.

    Attributes:
        source: (B, |A|) the tokens of set A.
        destination: (B, |A|) the token of set B most similar to each of them.
        merged: (B, |A|) True where the source is merged into its destination.
        order: (B, K) the tokens that stay, in their new order.
        valid: (B, K) False for the padding of images that keep fewer; None if no slot is empty.
        lengths: Tokens that each image keeps, if they were read from the device.
        threshold: The similarity above which tokens were merged: the given one, or that of the batch.
        official: The order, and so the division, of the official batch path.
    """

    source: Tensor
    destination: Tensor
    merged: Tensor
    order: Tensor
    valid: Tensor | None
    lengths: tuple[int, ...] | None
    threshold: Tensor
    official: bool
    fuses: bool = False

    def target(self, like: Tensor) -> Tensor:
        """(B, N) new place of every old token, -1 for padding; ``like`` is any (B, N) int64."""
        return merge_target(self, like)


@fx_leaf
def merge_target(merge: Merge, like: Tensor) -> Tensor:
    """(B, N) new place of every old token, -1 for padding; ``like`` is any (B, N) int64."""
    itself = torch.arange(like.shape[1], device=like.device).expand_as(like)
    into = itself.scatter(1, merge.source, torch.where(merge.merged, merge.destination, merge.source))  # (B, N)
    return position_of(merge.order, like, merge.valid).gather(1, into)


def descending_rank(values: Tensor) -> Tensor:
    """Rank of every entry of values (B, N) in its row, 0 for the largest; equal values by position."""
    ordered, order = values.sort(dim=1, descending=True)
    level = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))  # (B, N)
    by_position = (level * values.shape[1] + order).argsort(1)  # unique whole numbers: no stable sort is needed
    place = torch.ones_like(order).cumsum(1) - 1
    return torch.zeros_like(order).scatter(1, order.gather(1, by_position), place)


def top_of_batch(best: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """The r * B largest similarities of a batch, whatever image they are in (DyMU section 3.1, rank mode).

    Args:
        best: (B, |A|), -inf for what may not be merged.
        r: Tokens an average image is to lose.
        num_prefix: Prefix tokens; those in set A count as rows that are never merged, as in the official code.

    Returns:
        (B, |A|) True for the rows to merge, and the threshold of the batch: the largest similarity that is not
        merged, at least 0. Merging what is strictly above it merges the same rows.
    """
    rows = F.pad(best, ((num_prefix + 1) // 2, 0), value=float("-inf"))
    rank = descending_rank(rows.reshape(1, -1)).view_as(rows)[:, (num_prefix + 1) // 2 :]
    number = r * len(best)
    ordered = rows.flatten().sort(descending=True).values  # (B * rows,)
    return (rank < number) & best.isfinite(), ordered[min(number, len(ordered) - 1)].clamp(min=0)


@fx_leaf
def plan_merge(
    metric: Tensor,
    valid: Tensor | None,
    num_prefix: int,
    threshold: Tensor | None,
    r: int = 0,
    max_r: int | None = None,
    compat: bool = False,
    trim: bool = True,
    keep_mask: bool = False,
    packed: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> Merge:
    """Choose the tokens to merge (DyMU, 2504.17040, section 3.1).

    By default an image merges, in any batch, what tome.py@c57d75a merges when the image is alone: at most half of
    its tokens; what is left of A comes first, then B; A keeps its order if there is a prefix token and falls by
    similarity if not; an image that merges nothing keeps its order.

    Args:
        metric: (B, N, D) features of the patch tokens, compared by cosine.
        valid: (B, N) False for padding.
        num_prefix: Prefix tokens in front of the patches.
        threshold: Merge what is more similar. None: merge the most similar of the batch and find its threshold.
        r: Tokens an average image is to lose, for ``threshold=None``.
        max_r: At most so many are merged in each image.
        compat: Reproduce the official batch: more than one image, or a batch without threshold, is merged without
            the limit of one half, and left as A, then B, each in its order, even where nothing was merged.
        trim: Cut the padding to the longest image.
        keep_mask: Return the mask even if no slot is empty.
        packed: The tokens are to be packed.
        lengths: Tokens that each image keeps, where they are known before; None: read from the device.
    """
    if compat:
        metric = fix_traced_size(metric, 0)  # one image is merged otherwise than several
    batch, number = metric.shape[:2]
    if compat and (is_exported_again() or (is_exported() and isinstance(batch, torch.SymInt))):
        raise ValueError(
            "dymu with compat=True merges a batch of one image otherwise than a larger one, as the official code does, "
            "so it cannot be exported with a dynamic batch; export with a fixed batch, or use compat=False"
        )
    official = compat and (threshold is None or batch > 1)
    patch = torch.arange(number, device=metric.device).expand(batch, -1)  # (B, N)
    first_a, first_b = num_prefix % 2, (num_prefix + 1) % 2
    in_a, in_b = slice(first_a, None, 2), slice(first_b, None, 2)
    source = patch[:, in_a]  # (B, |A|)
    if number < 2:
        best, destination = metric.new_full(source.shape, -math.inf), source
    else:
        best, match = alternating_match(metric, num_prefix, valid)
        destination = 2 * match + first_b
        best = best.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)  # nothing is merged by such values
    falling = not official and num_prefix == 0
    rank = None
    if falling or max_r is not None or (not official and num_prefix % 2 == 0):
        rank = descending_rank(best)
        limit = torch.full_like(patch[:, :1], number) if valid is None else valid.sum(1, keepdim=True)
        limit = torch.full_like(limit, number) if official else limit // 2
        best = best.masked_fill(rank >= (limit if max_r is None else limit.clamp(max=max_r)), -math.inf)
    if threshold is None:
        merged, threshold = top_of_batch(best, min(r, number // 2), num_prefix)
    else:
        merged = best > threshold.to(best.dtype) + (0 if compat else TIE)

    # Sorted by numbers that are places modulo N: A comes first, then B, then what is dropped and padding. An image that
    # merges nothing keeps its order.
    behind = number * (number + 1)
    merges = merged.sum(1, keepdim=True)  # (B, 1)
    place, counts = patch, number - merges.squeeze(1)
    if valid is not None:
        place, counts = torch.where(valid, patch, patch + behind), counts - number + valid.sum(1)
    place_a, place_b = place[:, in_a], place[:, in_b]
    if falling and rank is not None:
        place_a = place_a + torch.where(merges > 0, 2 * rank - source, 0)
    place_b = torch.add(place_b, 1 if official else merges, alpha=number)
    order = torch.cat([place_a + behind * merged, place_b], dim=1).sort(dim=1).values % number  # (B, N)
    if falling and rank is not None:
        order = torch.where(merges > 0, patch.scatter(1, 2 * rank, source), patch).gather(1, order)
    kept = trimmed(order, counts, number, trim, keep_mask, packed, lengths)
    return Merge(source, destination, merged, *kept, threshold, official)


@fx_leaf
def number_merged(tokens: TokenMap, merge: Merge) -> int | None:
    """How many tokens of the batch are merged: how many fewer are left, where that was read from the device."""
    if merge.lengths is None:
        return None
    before = tokens.sequence_lengths()
    return sum(before) - len(before) * tokens.num_prefix - sum(merge.lengths)


def apply_merge(x: Tensor, tokens: TokenMap, merge: Merge, packed: bool) -> tuple[Tensor, TokenMap]:
    """Size-weighted mean of merged tokens.

    Each merged token adds its share of the difference to its destination, so two equal tokens merge without any
    rounding, and rows that do not merge are not computed with.

    Args:
        x: (B, P+N, C) tokens, or (1, T, C) packed.
        tokens: Their map.
        merge: Which tokens go where.
        packed: Return a packed sequence.

    Returns:
        (B, P+K, C), or packed, and its map with sizes.
    """
    size = tokens.size
    if size is None:
        one = torch.ones_like(tokens.layout.ranges.images, dtype=wide_dtype(x.dtype))  # (B, 1)
        size = one.expand(-1, tokens.num_prefix + tokens.width)
    number = None if is_recorded(x) else number_merged(tokens, merge)
    first = tokens.layout.ranges.first(tokens.num_prefix + tokens.width, tokens.num_prefix)
    source = (merge.source + first).flatten()  # (B * |A|,) rows of all images, padded
    destination = (merge.destination + first).flatten()
    merged: Tensor | None = merge.merged.flatten()
    if number is not None:  # only the merged rows are computed with
        place = true_places(merge.merged, number)
        source, destination, merged = source.index_select(0, place), destination.index_select(0, place), None
    sizes = size.flatten()
    gain = sizes.index_select(0, source)
    gain = gain if merged is None else torch.where(merged, gain, 0)
    sizes, share = merge_sizes(sizes, gain, destination)
    share = share if merged is None else torch.where(merged.unsqueeze(1), share, 0)  # of padding it is 0 / 0
    kept = tokens.rows(merge.order)  # (B, P+K)
    size = sizes.index_select(0, kept.flatten()).view(kept.shape)
    if merge.valid is not None:
        size = size * F.pad(merge.valid, (tokens.num_prefix, 0), value=True)
    left = tokens.relabel(
        merge,
        tokens.num_tokens,
        size=size,
        key_weight=size,
        valid=merge.valid,
        packed=packed,
        keeps_every_patch=True,
        lengths=merge.lengths,
    )
    source, destination, kept = rows_in_sequence(tokens, source, destination, kept)
    rows = x.flatten(0, 1)
    rows = move_shares(rows.clone(), rows.index_select(0, source), destination, share)
    x = take_rows(rows.unsqueeze(0), left.pack(kept) if packed else kept)
    return official_division(x, size, merge.official), left


@fx_leaf
def official_division(x: Tensor, size: Tensor, official: bool) -> Tensor:
    """x (B, P+N, C) as if its weighted sums had been divided by their size + 1e-4, if ``official``."""
    if not official:
        return x
    return x * (size / (size + OFFICIAL_EPS)).unsqueeze(-1).to(x.dtype)
