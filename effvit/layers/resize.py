"""Bilinear resize of token maps as two products with small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.protocols import Factory
from effvit.tokens import fx_leaf, wide_dtype

__all__ = ["resize_map", "resize_weights"]


def resize_weights(old: int, new: int, antialias: bool, like: Tensor) -> Tensor:
    """Matrix (new, old) of the bilinear resize of ``old`` samples to ``new``, in ``wide_dtype`` of ``like``.

    Half-pixel centres, as in ``F.interpolate(mode="bilinear")``; with ``antialias`` the triangle widens by old / new
    when it shrinks. Distances are taken in units of 1 / (2 * old * new), which makes them whole numbers: only the
    division that normalises a row rounds.
    """
    options: Factory = {"dtype": wide_dtype(like.dtype), "device": like.device}
    targets = torch.arange(old, old * (2 * new), 2 * old, **options)  # (new,) (2i + 1) * old
    sources = torch.arange(new, new * (2 * old), 2 * new, **options)  # (old,) (2j + 1) * new
    support = max(old, new) if antialias else new
    weights = (2 * support - (sources - targets[:, None]).abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@fx_leaf
def resize_map(x: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Bilinear resize of a map x (B, H, W, C) to tokens (B, h * w, C) of a grid ``size`` = (h, w).

    Two products with small matrices: a resize is separable and linear. Unlike the antialiased ``F.interpolate`` it
    needs no channels-first copy and no operator of its own in an exported graph.
    """
    rows, columns = (
        resize_weights(old, new, antialias, x).to(x.dtype) for old, new in zip(x.shape[1:3], size, strict=True)
    )
    x = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])  # (B, h, W, C)
    return (columns @ x).flatten(1, 2)
