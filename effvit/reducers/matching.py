"""Bipartite matching of alternating tokens (ToMe, arXiv 2210.09461, section 3.1), which several methods build on."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.tokens import fx_leaf, wide_dtype, wide_product

__all__ = ["alternating_match", "merge_sizes", "move_shares"]

SMALLEST_NORM = 1e-12  # of ``F.normalize``


@fx_leaf
def alternating_match(metric: Tensor, num_prefix: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every token of set A its most similar token of set B, by cosine.

    The sets alternate along the whole sequence, prefix tokens included: A has its even, B its odd places. Prefix
    tokens themselves are in neither, so they are never matched, whatever their number.

    Args:
        metric: (B, N, D) features of the patch tokens; at least one of them must fall into B. Cosines are taken in
            float32 (float64 for float64), also under autocast: in bfloat16 those near 1 are 0.004 apart.
        num_prefix: Prefix tokens in front of the patches.
        valid: (B, N) False for padding, which matches nothing.

    Returns:
        Largest similarity (B, |A|), -inf for padding and where B is all padding; and the place (B, |A|) of the
        matched token among the N patch tokens. Token i of A is patch token ``2 * i + num_prefix % 2``.
    """
    metric = metric.to(wide_dtype(metric.dtype))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    first_a, first_b = num_prefix % 2, (num_prefix + 1) % 2
    similarity = wide_product(metric[:, first_a::2], metric[:, first_b::2].transpose(1, 2))  # (B, |A|, |B|)
    if valid is not None:
        similarity = similarity.masked_fill(~valid[:, None, first_b::2], float("-inf"))
    best, match = similarity.max(dim=-1)
    if valid is not None:
        best = best.masked_fill(~valid[:, first_a::2], float("-inf"))
    return best, 2 * match + first_b if first_b else 2 * match


def merge_sizes(
    size: Tensor, source: Tensor, destination: Tensor, merged: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sizes (T,) after merging, and the share (r, 1) that each source has of what it goes into.

    Args:
        size: Sizes of all rows.
        source: (r,) rows that are merged away.
        destination: (r,) the row each of them goes into.
        merged: (r,) False for pairs that are not merged after all, whose share is 0. None: all are.
    """
    gain = size.index_select(0, source)
    if merged is not None:
        gain = torch.where(merged, gain, 0)
    size = size.index_add(0, destination, gain)
    share = gain / size.index_select(0, destination)
    if merged is not None:
        share = torch.where(merged, share, 0)  # of padding it is 0 / 0
    return size, share.unsqueeze(1)


def move_shares(x: Tensor, source: Tensor, destination: Tensor, share: Tensor) -> Tensor:
    """Rows of x (T, C) after merging: each destination becomes a mean with what goes into it.

    It takes a share of the difference, so two equal rows merge without any rounding.

    Args:
        x: Rows of all images.
        source: (r,) rows that are merged away.
        destination: (r,) the row each of them goes into.
        share: (r, 1) part of the sum that is the source's.
    """
    difference = x.index_select(0, source) - x.index_select(0, destination)
    return x.index_add(0, destination, difference * share)
