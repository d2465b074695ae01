"""Attention between the soft superpixels of a map: super-token attention (arXiv 2211.11167).

A map is cut into cells. The mean of a cell is its first super token; every pixel is softly associated with the
super tokens of its own cell and the eight around it, super tokens become the weighted means of their pixels,
attend to each other, and hand the result back to the pixels by the same weights. The functions below are these
steps for maps whose channels come last; ``SuperTokenAttention`` joins them.

Facts from hhb072/STViT@c9ed9a4 (models/stvit.py). Its decisions, kept because the released weights were trained
with them:

- padding to whole cells happens behind the norm, and padded zeros are pixels of their cells;
- a neighbour outside the grid has logit 0, not minus infinity: what a pixel gives to it is lost;
- the association has no parameters and passes no gradient.

Deviation: the neighbourhoods are slices of the padded grid instead of convolutions with identity kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from effvit.protocols import Device
from effvit.tokens import fix_traced_size, fx_leaf, wide_product, widened

__all__ = [
    "SuperTokenAttention",
    "associate",
    "from_cells",
    "nearest_super_token",
    "neighbours",
    "sum_from_neighbours",
    "to_cells",
    "to_pixels",
    "to_super_tokens",
]

EPSILON = 1e-12  # of the official division by the association mass


@fx_leaf
def to_cells(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """Pixels grouped by cell.

    Args:
        x: Map (B, H, W, C).
        cell: Rows h and columns w of a cell.

    Returns:
        (B, rows, columns, h * w, C), where rows = ceil(H / h) and columns = ceil(W / w); zeros below and right of
        the map.
    """
    x = fix_traced_size(x, 1, 2)
    height, width = x.shape[1:3]
    below, right = -height % cell[0], -width % cell[1]
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))  # (B, rows * h, columns * w, C)
    x = x.unflatten(1, (-1, cell[0])).unflatten(3, (-1, cell[1]))  # (B, rows, h, columns, w, C)
    return x.transpose(2, 3).flatten(3, 4)


@fx_leaf
def from_cells(pixels: Tensor, cell: tuple[int, int], like: Tensor) -> Tensor:
    """Inverse of ``to_cells``: (B, rows, columns, h * w, C) -> (B, H, W, C), cropped to the map ``like``."""
    x = pixels.unflatten(3, cell).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows * h, columns * w, C)
    return x[:, : like.shape[1], : like.shape[2]]


@fx_leaf
def neighbours(grid: Tensor) -> Tensor:
    """The 3 x 3 neighbourhood of every cell: (B, rows, columns, C) -> (B, rows, columns, 9, C).

    In raster order, the cell itself fifth; zeros outside the grid.
    """
    rows, columns = grid.shape[1:3]
    padded = F.pad(grid, (0, 0, 1, 1, 1, 1))  # (B, rows + 2, columns + 2, C)
    return torch.stack([padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], dim=3)


@fx_leaf
def sum_from_neighbours(values: Tensor) -> Tensor:
    """Transpose of ``neighbours``: what nine cells hold for each cell, summed; the share outside the grid is lost.

    (B, rows, columns, 9, C) -> (B, rows, columns, C).
    """
    rows, columns = values.shape[1:3]
    padded = F.pad(values, (0, 0, 0, 0, 1, 1, 1, 1))  # (B, rows + 2, columns + 2, 9, C)
    shares = [padded[:, 2 - i : 2 - i + rows, 2 - j : 2 - j + columns, 3 * i + j] for i in range(3) for j in range(3)]
    return torch.stack(shares).sum(0)


def associate(pixels: Tensor, n_iter: int = 1) -> Tensor:
    """How much every pixel belongs to the nine super tokens around it (2211.11167).

    The softmax of scaled products of pixel and super token; each further round computes the super tokens anew
    with the weights of the one before. Nothing here passes a gradient, as in the official code.

    Args:
        pixels: (B, rows, columns, p, C) as ``to_cells`` groups them.
        n_iter: Rounds.

    Returns:
        (B, rows, columns, 9, p), float32 or float64; order of the nine as in ``neighbours``. They do not come
        last because a softmax over the last nine numbers takes 20 times as long on a CPU as over pixel rows.
    """
    pixels = widened(pixels.detach())
    centres = pixels.mean(3)  # (B, rows, columns, C)
    weights = _weights(pixels, centres)  # (B, rows, columns, 9, p)
    for _ in range(n_iter - 1):
        weights = _weights(pixels, _means(weights, wide_product(weights, pixels)))
    return weights


def _weights(pixels: Tensor, centres: Tensor) -> Tensor:
    keys = neighbours(centres * pixels.shape[-1] ** -0.5)  # (B, rows, columns, 9, C); scale on the smaller factor
    return wide_product(keys, pixels.transpose(-1, -2)).softmax(3)  # (B, rows, columns, 9, p)


def to_super_tokens(pixels: Tensor, association: Tensor) -> Tensor:
    """Super tokens as the weighted means of their pixels: (B, rows, columns, C).

    Args:
        pixels: (B, rows, columns, p, C).
        association: (B, rows, columns, 9, p), as ``associate`` returns it.
    """
    return _means(association, association.to(pixels.dtype) @ pixels).to(pixels.dtype)


def _means(association: Tensor, sums: Tensor) -> Tensor:
    """Weighted means (B, rows, columns, C) from the weighted sums (B, rows, columns, 9, C), in the former's dtype."""
    mass = sum_from_neighbours(association.sum(-1, keepdim=True))  # (B, rows, columns, 1)
    return sum_from_neighbours(sums.to(association.dtype)) / (mass + EPSILON)


def to_pixels(super_tokens: Tensor, association: Tensor) -> Tensor:
    """Every pixel's mixture of super tokens: (B, rows, columns, C) -> (B, rows, columns, p, C)."""
    return association.to(super_tokens.dtype).transpose(-1, -2) @ neighbours(super_tokens)


def nearest_super_token(association: Tensor) -> Tensor:
    """(B, rows, columns, p) number, in raster order, of the super token each pixel belongs to most.

    Only super tokens that exist are eligible, though others may have been given weight.
    """
    rows, columns = association.shape[1:3]
    numbers = torch.arange(1, rows * columns + 1, device=association.device).view(1, rows, columns, 1)
    table = neighbours(numbers) - 1  # (1, rows, columns, 9, 1), -1 outside the grid
    choice = association.masked_fill(table < 0, -1.0).argmax(3)  # (B, rows, columns, p)
    return table.squeeze(-1).expand(len(association), -1, -1, -1).gather(-1, choice)


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class SuperTokenAttention(nn.Module):
    """Attention between super tokens, or between all pixels where a cell is one pixel.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        cell: Rows and columns of a cell.
        n_iter: Rounds of association.
        qkv_bias: Biases of q, k and v.
        qk_scale: Factor on the attention logits; None for head width ** -0.5. The association always uses
            dim ** -0.5.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cell: tuple[int, int],
        n_iter: int = 1,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cell, self.n_iter = cell, n_iter
        self.refine = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        if qk_scale:  # timm's attention multiplies by its own scale, in the fused kernel too
            self.refine.q_norm = Scale(qk_scale / self.refine.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if self.cell == (1, 1):
            return self.refine(x.flatten(1, 2)).view_as(x)
        pixels = to_cells(x, self.cell)  # (B, rows, columns, p, C)
        association = associate(pixels, self.n_iter)  # (B, rows, columns, 9, p)
        tokens = to_super_tokens(pixels, association)  # (B, rows, columns, C)
        tokens = self.refine(tokens.flatten(1, 2)).view_as(tokens)
        return from_cells(to_pixels(tokens, association), self.cell, like=x)
