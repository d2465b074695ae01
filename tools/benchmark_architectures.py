"""Plain formulations that the architectures' own are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.super_tokens import SuperTokenAttention


def unfold_super_tokens(attn: SuperTokenAttention, x: Tensor) -> Tensor:
    """Super-token attention by im2col: what ``attn`` computes, with ``F.unfold`` and ``F.fold`` on (B, C, H, W) maps.

    Args:
        attn: Holds the weights and settings; cells larger than one pixel.
        x: (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    batch, dim, height, width = x.shape
    h, w = attn.cell
    padded = F.pad(x, (0, -width % w, 0, -height % h))
    rows, columns = padded.shape[2] // h, padded.shape[3] // w
    centres = F.adaptive_avg_pool2d(padded, (rows, columns))
    pixels = padded.reshape(batch, dim, rows, h, columns, w).permute(0, 2, 4, 3, 5, 1)
    pixels = pixels.reshape(batch, rows * columns, h * w, dim)

    def unfold(grid: Tensor) -> Tensor:  # (B, C, rows, columns) -> (B, n, C, 9)
        return F.unfold(grid, 3, padding=1).transpose(1, 2).reshape(batch, rows * columns, dim, 9)

    def fold(shares: Tensor) -> Tensor:  # (B, n, C', 9) -> (B, C', rows, columns)
        columned = shares.permute(0, 2, 3, 1).flatten(1, 2)
        return F.fold(columned, (rows, columns), 3, padding=1)

    def means(weights: Tensor) -> Tensor:
        mass = fold(weights.sum(2).unsqueeze(2))
        return fold(pixels.transpose(-1, -2) @ weights) / (mass + 1e-12)

    with torch.no_grad():
        weights = (pixels @ unfold(centres) * dim**-0.5).softmax(-1)
        for _ in range(attn.n_iter - 1):
            weights = (pixels @ unfold(means(weights)) * dim**-0.5).softmax(-1)
    tokens = means(weights)
    tokens = pointwise_attention(attn, tokens)
    out = unfold(tokens) @ weights.transpose(-1, -2)  # (B, n, C, p)
    out = out.reshape(batch, rows, columns, dim, h, w).permute(0, 3, 1, 4, 2, 5).reshape(padded.shape)
    return out[:, :, :height, :width]


def pointwise_attention(attn: SuperTokenAttention, x: Tensor) -> Tensor:
    """Self-attention of all pixels of x (B, C, H, W), its projections as 1 x 1 convolutions and no fused kernel."""
    refine = attn.refine
    qkv = F.conv2d(x, refine.qkv.weight[:, :, None, None], refine.qkv.bias)
    q, k, v = qkv.flatten(2).unflatten(1, (3, refine.num_heads, -1)).unbind(1)  # (B, heads, D, N)
    attention = (k.transpose(-1, -2) @ refine.q_norm(q) * refine.scale).softmax(-2)
    y = (v @ attention).reshape(x.shape)
    return F.conv2d(y, refine.proj.weight[:, :, None, None], refine.proj.bias)
