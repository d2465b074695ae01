"""Hard clusters of tokens, merged into weighted means: what DPC-KNN and ATC share."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.tokens import flat_rows, fx_leaf, widened

__all__ = ["merge_clusters", "merge_patches"]


@fx_leaf
def merge_clusters(
    x: Tensor, weight: Tensor, size: Tensor, cluster: Tensor, number: int, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted means of the tokens of each cluster, and how many patches they stand for.

    Args:
        x: (B, N, C) tokens.
        weight: (B, N) their weights, in float32 (float64 for float64).
        size: (B, N) patches each stands for, likewise.
        cluster: (B, N) cluster of each.
        number: K, clusters of each image.
        eps: Added to the sum of the weights of a cluster before it divides.

    Returns:
        (B, K, C) in the dtype of x, and sizes (B, K).
    """
    columns = torch.cat([widened(x) * weight.unsqueeze(-1), weight.unsqueeze(-1), size.unsqueeze(-1)], dim=-1)
    rows = flat_rows(cluster, number).flatten()  # (B * N,) of all clusters
    sums = columns.new_zeros(x.shape[0] * number, columns.shape[-1]).index_add(0, rows, columns.flatten(0, 1))
    merged, weights, sizes = sums.unflatten(0, (-1, number)).split([x.shape[-1], 1, 1], dim=-1)
    return (merged / (weights + eps)).to(x.dtype), sizes.squeeze(-1)


def merge_patches(
    x: Tensor, weight: Tensor, size: Tensor, cluster: Tensor, number: int, num_prefix: int, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``merge_clusters`` of the patch tokens, behind prefix tokens that stay as they are.

    Args:
        x: (B, P+N, C) tokens.
        weight: (B, N) weights of the patch tokens.
        size: (B, P+N) patches each token stands for.
        cluster: (B, N) cluster of each patch token.
        number: K, clusters of each image.
        num_prefix: P.
        eps: As for ``merge_clusters``.

    Returns:
        (B, P+K, C), and sizes (B, P+K).
    """
    merged, sizes = merge_clusters(x[:, num_prefix:], weight, size[:, num_prefix:], cluster, number, eps)
    return torch.cat([x[:, :num_prefix], merged], dim=1), torch.cat([size[:, :num_prefix], sizes], dim=1)
