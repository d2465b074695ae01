"""Attention of one set of tokens to another, and the transformer block built on it.

timm's blocks attend to their own tokens only. Semantic-token generation and recovery (STViT) and other two-set
methods share these two modules; the parameters are those of the released STViT-R code, whose names are ``q``,
``kv`` and ``proj``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

__all__ = ["CrossAttention", "CrossBlock"]


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values of another set of tokens, by the fused kernel.

    Args:
        dim: Channels of both sets.
        num_heads: Heads; must divide ``dim``.
        qkv_bias: Biases of the three projections.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {dim} channels")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., N, heads * D) -> (..., heads, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def attend(self, q: Tensor, kv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attention of projected tokens: q (..., Nq, C) and kv (..., Nk, 2C) -> (..., Nq, C).

        Args:
            q: What ``self.q`` returned.
            kv: What ``self.kv`` returned, keys first; several of them may have been concatenated or unfolded.
            attn_mask: As in ``scaled_dot_product_attention``, broadcast to (..., heads, Nq, Nk).
        """
        k, v = kv.chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(
            self.split_heads(q),
            self.split_heads(k),
            self.split_heads(v),
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.transpose(-3, -2).flatten(-2)))

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
        norm_layer: Any = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def layer_scale() -> nn.Module:
            return LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()

        def stochastic_depth() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = norm_layer(dim, **dd)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **dd)
        self.ls1, self.drop_path1 = layer_scale(), stochastic_depth()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2, self.drop_path2 = layer_scale(), stochastic_depth()

    def feedforward(self, x: Tensor) -> Tensor:
        """x plus the MLP branch, (..., N, C) -> (..., N, C)."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor, *keys: Tensor) -> Tensor:
        """Queries x (B, Nq, C) attend to all the tokens of ``keys``, each (B, Nk, C); returns (B, Nq, C)."""
        y = keys[0] if len(keys) == 1 else torch.cat(keys, dim=1)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), self.norm1(y))))
        return self.feedforward(x)
