"""Attention of one set of tokens to another, and the transformer block built on it.

timm's blocks attend to their own tokens only. Semantic-token generation and recovery (STViT) and other two-set
methods share these two modules; the parameters are those of the released STViT-R code, whose names are ``q``,
``kv`` and ``proj``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from effvit.layers.windows import (
    MASK_MODES,
    from_windows,
    key_mask,
    near_mask,
    num_windows,
    overlapping_windows,
    to_windows,
)
from effvit.protocols import Device, Factory
from effvit.schedule import check_choice
from effvit.tokens import fx_leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CrossAttention", "CrossBlock", "CrossSettings", "SharedSettings", "WindowCrossBlock", "window_attention"]


class SharedSettings(TypedDict, total=False):
    """Keywords of ``CrossBlock`` that all blocks of a model usually share."""

    mlp_ratio: float
    qkv_bias: bool
    init_values: float | None
    proj_drop: float
    attn_drop: float
    norm_layer: Callable[..., nn.Module]
    device: Device
    dtype: torch.dtype | None


class CrossSettings(SharedSettings, total=False):
    """Keywords of ``CrossBlock``."""

    drop_path: float


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., N, heads * D) -> (..., heads, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def mix_heads(q: Tensor, kv: Tensor, num_heads: int, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Values weighted by attention, head by head: q (..., Nq, C) and kv (..., Nk, 2C) -> (..., Nq, C)."""
    k, v = kv.chunk(2, dim=-1)  # (..., Nk, C) each
    q, k, v = (split_heads(x, num_heads) for x in (q, k, v))  # (..., heads, Nq, D), (..., heads, Nk, D) twice
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)  # (..., heads, Nq, D)
    return out.transpose(-3, -2).flatten(-2)


@fx_leaf
def window_attention(
    q: Tensor,
    kv: Tensor,
    num_heads: int,
    window: int,
    stride: int,
    kernel: int,
    border: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Queries of each window of a map attend to an overlapping window of another: (B, H, W, C).

    Where a key window is about as large as the map of keys, masking that map takes fewer products than all windows,
    and nothing is copied: the choice is made by size and changes no result.

    Args:
        q: Projected queries (B, H, W, C).
        kv: Projected keys and values (B, h, w, 2C).
        num_heads: Heads.
        window: Side of the windows of queries.
        stride: Side of the same windows on the map of keys.
        kernel: Side of the key windows.
        border: (2C,) key and value outside the map. None: there is nothing outside.
        attn_mask: Mask of the key windows (B * nW, 1, 1, kernel²), only with ``border``.
        dropout_p: Dropout of the attention weights.
    """
    size, keys = q.shape[1:3], kv.shape[1:3]
    windows = [num_windows(side, window) for side in size]
    in_windows = windows[0] * windows[1] * window**2 * kernel**2
    if border is None and size[0] * size[1] * keys[0] * keys[1] <= in_windows:
        mask = near_mask(q, kv, window, stride, kernel)
        return mix_heads(q.flatten(1, 2), kv.flatten(1, 2), num_heads, mask, dropout_p).view_as(q)
    if border is None:
        attn_mask = key_mask(kv, kernel, stride)
    key_windows = overlapping_windows(kv, kernel, stride, border)  # (B * nW, kernel², 2C)
    return from_windows(mix_heads(to_windows(q, window), key_windows, num_heads, attn_mask, dropout_p), window, size)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values of another set of tokens, by the fused kernel.

    Args:
        dim: Channels of both sets.
        num_heads: Heads; must divide ``dim`` unless ``head_dim`` is given.
        qkv_bias: Biases of the three projections.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        head_dim: Channels of a head; None means ``dim // num_heads``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, and there is no ``head_dim``; a ``head_dim`` below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        head_dim: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {dim} channels")
            head_dim = dim // num_heads
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        dd: Factory = {"device": device, "dtype": dtype}
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.q = nn.Linear(dim, inner, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * inner, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(inner, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., N, heads * D) -> (..., heads, N, D)."""
        return split_heads(x, self.num_heads)

    def mix(self, q: Tensor, kv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``attend`` without the output projection, for queries of which some are thrown away before it."""
        return mix_heads(q, kv, self.num_heads, attn_mask, self.attn_drop.p if self.training else 0.0)

    def project(self, x: Tensor) -> Tensor:
        """Output projection of what ``mix`` returned, (..., N, C) -> (..., N, C)."""
        return self.proj_drop(self.proj(x))

    def attend(self, q: Tensor, kv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attention of projected tokens: q (..., Nq, C) and kv (..., Nk, 2C) -> (..., Nq, C).

        Args:
            q: What ``self.q`` returned.
            kv: What ``self.kv`` returned, keys first; several of them may have been concatenated or unfolded.
            attn_mask: As in ``scaled_dot_product_attention``, broadcast to (..., heads, Nq, Nk).
        """
        return self.project(self.mix(q, kv, attn_mask))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Queries x (B, Nq, C) attend to the tokens y (B, Nk, C): (B, Nq, C)."""
        return self.attend(self.q(x), self.kv(y))


class CrossBlock(nn.Module):
    """A pre-norm transformer block whose queries attend to another set of tokens (STViT, 2303.08685, eq. 1-6).

    ``x = x + ls1(attn(norm1(x), norm1(y)))``, ``x = x + ls2(mlp(norm2(x)))``: one norm serves queries and keys, as in
    the released code (models/layers.py@b4a27a0 ``Block`` of changsn/STViT-R).

    Args:
        dim: Channels.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        qkv_bias: Biases of the projections.
        init_values: Initial LayerScale; None or 0 for none, as in timm's ``Block``.
        drop_path: Rate of stochastic depth on both branches.
        norm_layer: Norm, called with the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 1e-5,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}

        def layer_scale() -> nn.Module:
            return LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()

        def stochastic_depth() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1: nn.Module = norm_layer(dim, **dd)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **dd)
        self.ls1, self.drop_path1 = layer_scale(), stochastic_depth()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2, self.drop_path2 = layer_scale(), stochastic_depth()

    def feedforward(self, x: Tensor) -> Tensor:
        """x plus the MLP branch, (..., N, C) -> (..., N, C)."""
        y: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + y

    def forward(self, x: Tensor, *keys: Tensor) -> Tensor:
        """Queries x (B, Nq, C) attend to all the tokens of ``keys``, each (B, Nk, C); returns (B, Nq, C)."""
        y = keys[0] if len(keys) == 1 else torch.cat(keys, dim=1)  # (B, Nk, C) of all keys
        z: Tensor = self.drop_path1(self.ls1(self.attn(self.norm1(x), self.norm1(y))))
        return self.feedforward(x + z)


class WindowCrossBlock(CrossBlock):
    """A ``CrossBlock`` whose queries attend to overlapping windows of another map (STViT-R on Swin, 2303.08685).

    The queries of a window of one map attend to a larger window around the same place of the other. As in the
    released detection code (mmdet/models/backbones/layers.py@8b8eb1e of changsn/STViT-R-Object-Detection), but
    norm and projection are computed once for each token and not once for each window that holds it, which is what
    the paper's costs count: up to 81 times fewer products, same result. What lies outside the map costs nothing:
    the released code pads with zeros before the norm, so that all of it has one key and one value.

    Stochastic depth drops the branch of an image, not of single windows.

    Args:
        dim: Channels.
        num_heads: Heads.
        window: Side of the windows of queries.
        stride: Side of the same windows on the map of keys.
        kernel: Side of the key windows.
        mask_mode: What queries see outside the map: "correct", nothing; "none", zeros in front of the norm;
            "official", what the released code lets them see (see ``effvit.layers.windows.key_mask``).
        kwargs: Those of ``CrossBlock``.

    Raises:
        ValueError: An unknown ``mask_mode``, or key windows smaller than what they are centred on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        stride: int,
        kernel: int,
        mask_mode: str = "correct",
        **kwargs: Unpack[CrossSettings],
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        check_choice("mask_mode", mask_mode, MASK_MODES)
        if kernel < stride:
            raise ValueError(f"key windows must be at least as large as what they surround, got {kernel} for {stride}")
        self.window, self.stride, self.kernel, self.mask_mode = window, stride, kernel, mask_mode

    def cross(self, x: Tensor, y: Tensor, image: Sequence[int], image_window: int) -> Tensor:
        """The attention branch alone: x (B, H, W, C) asks windows of the map y (B, h, w, C); (B, H, W, C).

        Args:
            x: The map of queries.
            y: The map of keys.
            image: (H, W) of the image tokens, for mask_mode="official".
            image_window: Side of a window of image tokens, likewise.
        """
        q: Tensor = self.attn.q(self.norm1(x))
        kv: Tensor = self.attn.kv(self.norm1(y))  # (B, h, w, 2C)
        border = mask = None
        if self.mask_mode != "correct":
            border = self.attn.kv(self.norm1(y.new_zeros(1, self.attn.q.in_features)))[0]  # (2C,)
            # Softmax does not see one vector added to all keys. Without this one the many border keys are zero, and
            # the gradient of the queries is no difference of large sums.
            key = F.pad(border.chunk(2)[0], (0, self.attn.q.in_features))  # (2C,), zeros for the value
            kv, border = kv - key, border - key
            mask = key_mask(y, self.kernel, self.stride, self.mask_mode, image, image_window)
        sides = self.window, self.stride, self.kernel
        dropout_p = self.attn.attn_drop.p if self.training else 0.0
        y = window_attention(q, kv, self.attn.num_heads, *sides, border, mask, dropout_p)
        return self.ls1(self.attn.project(y))
