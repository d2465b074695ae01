"""Virtual unmerging (DyMU, arXiv 2504.17040, section 3.2): attention for decoders that read merged image tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed
from torch import Tensor

from effvit.tokens import flat_rows, take_rows, widened

__all__ = ["remerge", "virtual_unmerge", "virtual_unmerged_attention"]


def virtual_unmerge(x: Tensor, group: Tensor) -> Tensor:
    """What every position sees of the token that stands for it: x (B, heads, n, D) -> (B, heads, N, D).

    Args:
        x: Values of the n tokens.
        group: (B, N) or (N,) position -> token, e.g. ``TokenMap.source``.
    """
    group = group.expand(x.shape[0], -1)  # (B, N)
    return take_rows(x.transpose(1, 2), flat_rows(group, x.shape[2])).transpose(1, 2)


def remerge(x: Tensor, group: Tensor, num_tokens: int) -> Tensor:
    """Mean over the positions that share a token: x (B, heads, N, D) -> (B, heads, num_tokens, D).

    The inverse of ``virtual_unmerge``. A token no position belongs to gets zeros.
    """
    batch, heads, _, width = x.shape
    group = group.expand(batch, -1)  # (B, N)
    rows = flat_rows(group, num_tokens).flatten()  # (B * N,)
    flat = widened(x).transpose(1, 2).reshape(-1, heads * width)  # (B * N, heads * D)
    total = flat.new_zeros(batch * num_tokens, heads * width).index_add(0, rows, flat)
    number = flat.new_zeros(batch * num_tokens).index_add(0, rows, torch.ones_like(flat[:, 0]))
    mean = total / number.clamp(min=1).unsqueeze(-1)  # (B * num_tokens, heads * D)
    return mean.view(batch, num_tokens, heads, width).transpose(1, 2).to(x.dtype)


def virtual_unmerged_attention(
    q: Tensor, k: Tensor, v: Tensor, group: Tensor, cos: Tensor, sin: Tensor, is_causal: bool = False
) -> Tensor:
    """Attention as if merged tokens stood at all their positions again (VTU of DyMU, 2504.17040, section 3.2).

    For a decoder, such as a language model, that reads merged image tokens but was trained on whole images: norms,
    projections and MLP run on the n tokens, only attention sees the N positions and their rotary embedding.

    The cost of attention is that of N positions; only the rest becomes cheaper. The paper's factorised scores
    (n x n products, combined by the rotations of each pair of positions) are equal but hold N x N x D/2 numbers,
    and the official code too expands q, k and v by default (README@c57d75a, "Implementation Notes").

    Args:
        q: (B, heads, n, D) queries of the tokens, before rotation.
        k: Keys, likewise.
        v: Values, likewise.
        group: (B, N) or (N,) position -> token.
        cos: (N, D) or (B, N, D) rotary table of the positions, for the two halves of D as pairs.
        sin: Likewise.
        is_causal: Position i attends to positions up to i only.

    Returns:
        (B, heads, n, D): the outputs of the positions, averaged over those that share a token.
    """
    number = q.shape[2]
    cos, sin = (table.unsqueeze(-3) for table in (cos, sin))  # (1, N, D) or (B, 1, N, D), for all heads
    q, k = (apply_rot_embed(virtual_unmerge(y, group), sin, cos, half=True) for y in (q, k))  # (B, heads, N, D)
    out = F.scaled_dot_product_attention(q, k, virtual_unmerge(v, group), is_causal=is_causal)
    return remerge(out, group, number)
