"""The terms that every closed form is a sum of: layers on a number of rows, attention between numbers of tokens.

The conventions are those of ``effvit.measure.flops``: one MAC for each weight and row, 5 for each element of an affine
LayerNorm and 4 without weights, 2 for each of an affine BatchNorm in eval mode, 1 for each element an adaptive average
pooling reads.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

__all__ = ["Size", "Terms", "attention", "convolutions", "layers", "norm", "windows"]

Size = tuple[int, int]  # (H, W)
Terms = Counter[str]  # term -> MACs


def norm(module: nn.Module, rows: int) -> Terms:
    """A norm over the channels of so many tokens or positions; nothing for an Identity."""
    if isinstance(module, nn.LayerNorm):  # timm's LayerNorm2d too
        return Terms(norm=rows * module.normalized_shape[-1] * (4 if module.weight is None else 5))
    if isinstance(module, nn.BatchNorm2d):
        return Terms(norm=rows * module.num_features * (2 if module.affine else 1))
    if "Norm" in type(module).__name__ and not list(module.children()):
        raise TypeError(f"closed forms know LayerNorm and BatchNorm2d, not {type(module).__name__}; use count_flops")
    return Terms()


def layers(term: str, module: nn.Module, rows: int) -> Terms:
    """All linear layers, convolutions and norms in a module, each of them applied at ``rows`` tokens or positions."""
    terms = Terms()
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            terms[term] += rows * layer.weight.numel()
        terms += norm(layer, rows)
    return terms


def convolutions(term: str, module: nn.Module, size: Size) -> tuple[Terms, Size]:
    """A chain of convolutions and norms on a map of that size, and the size of what comes out."""
    terms = Terms()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            padding: Any = layer.padding
            height, width = ((size[i] + 2 * padding[i] - layer.kernel_size[i]) // layer.stride[i] + 1 for i in range(2))
            size = height, width
            terms[term] += height * width * layer.weight.numel()
        terms += norm(layer, size[0] * size[1])
    return terms, size


def attention(pairs: int, dim: int) -> Terms:
    """Two products, q k^T and map times v, over so many pairs of query and key of ``dim`` channels in all heads."""
    return Terms(attention=2 * pairs * dim)


def windows(size: Size, window: Size | int) -> int:
    """Windows that cover a map, the last of each side partly if need be."""
    sides: Any = (window, window) if isinstance(window, int) else window
    return -(-size[0] // sides[0]) * -(-size[1] // sides[1])
