"""Bipartite matching of alternating tokens (ToMe, arXiv 2210.09461, section 3.1), which several methods build on."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.tokens import fx_leaf, wide_dtype, wide_product, widened

__all__ = ["alternating_match", "falling", "mean_keys", "merge_sizes", "move_shares"]

SMALLEST_NORM = 1e-12  # of ``F.normalize``
GRAIN = 4096  # parts of 1 in which similarities of tokens that are equal in all but rounding are equal


@fx_leaf
def mean_keys(k: Tensor) -> Tensor:
    """Keys (B, heads, P+N, D) averaged over heads, in float32 (float64 for float64), for matching: (B, P+N, D).

    Cut off from autograd, which a choice gives nothing to follow.
    """
    return k.detach().mean(dim=1, dtype=wide_dtype(k.dtype))


def falling(similarity: Tensor, by_place: bool) -> Tensor:
    """Places (B, N) of similarities (B, N) by falling value.

    Args:
        similarity: From -1 to 1 or little more.
        by_place: Those that round to the same part of ``GRAIN`` stand in the order of their places. Equal tokens, as
            padding of windows is, would otherwise stand as rounding and the sort of a device or runtime have it.
    """
    if not by_place:
        return similarity.argsort(dim=-1, descending=True)
    number = similarity.shape[-1]
    parts = (similarity * GRAIN).round().long() * number - torch.arange(number, device=similarity.device)
    return parts.argsort(dim=-1, descending=True)


@fx_leaf
def alternating_match(
    metric: Tensor, num_prefix: int, valid: Tensor | None = None, by_place: bool = False
) -> tuple[Tensor, Tensor]:
    """For every token of set A its most similar token of set B, by cosine.

    The sets alternate along the whole sequence, prefix tokens included: A has its even, B its odd places. Prefix
    tokens themselves are in neither, so they are never matched, whatever their number.

    Args:
        metric: (B, N, D) features of the patch tokens; at least one of them must fall into B. Cosines are taken in
            float32 (float64 for float64), also under autocast: in bfloat16 those near 1 are 0.004 apart.
        num_prefix: Prefix tokens in front of the patches.
        valid: (B, N) False for padding, which matches nothing.
        by_place: Of tokens whose similarities round to the same part of ``GRAIN`` the first is matched.

    Returns:
        Largest similarity (B, |A|), -inf for padding and where B is all padding; and the number (B, |A|) of the
        matched token within B. Token i of A is patch token ``2 * i + num_prefix % 2``.
    """
    metric = widened(metric)
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    first_a, first_b = num_prefix % 2, (num_prefix + 1) % 2
    similarity = wide_product(metric[:, first_a::2], metric[:, first_b::2].transpose(1, 2))  # (B, |A|, |B|)
    if by_place:
        similarity = similarity.mul_(GRAIN).round_()
    if valid is not None:
        similarity = similarity.masked_fill(~valid[:, None, first_b::2], float("-inf"))
    best, match = similarity.max(dim=-1)
    best = best / GRAIN if by_place else best
    if valid is not None:
        best = best.masked_fill(~valid[:, first_a::2], float("-inf"))
    return best, match


def merge_sizes(size: Tensor, gain: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes (T,) after merging, and the share (r, 1) that each merged token has of what it went into.

    Args:
        size: (T,) sizes of the rows that tokens go into, and others.
        gain: (r,) sizes of the tokens, 0 for one that is not merged after all.
        destination: (r,) rows they go into.
    """
    size = size.index_add(0, destination, gain)
    return size, (gain / size.index_select(0, destination)).unsqueeze(1)


@fx_leaf
def move_shares(x: Tensor, moved: Tensor, destination: Tensor, share: Tensor) -> Tensor:
    """x, of which the rows that something is merged into have become means with it, in place.

    A row takes a share of the difference, so two equal ones merge without any rounding.

    Args:
        x: (T, C).
        moved: (r, C) features that are merged away.
        destination: (r,) rows they go into.
        share: (r, 1) part of the sum that is theirs.
    """
    if share.dtype != x.dtype:
        share = share.to(x.dtype)
    return x.index_add_(0, destination, (moved - x.index_select(0, destination)) * share)
