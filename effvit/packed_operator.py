"""Attention inside the images of a packed batch as one operator, for graphs that do not know the lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effvit.attention import Images, attend_one_by_one, attend_together
from effvit.tokens import wide_dtype

__all__ = ["packed_attention"]


@torch.library.custom_op("effvit::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, key_bias: Tensor | None) -> Tensor:
    """``effvit.attention.variable_length_attention`` where the numbers of tokens are tensors, read when it runs.

    Args:
        q: (1, heads, Tq, D) queries of all images, one image after another.
        k: (1, heads, Tk, D) keys, likewise.
        v: (1, heads, Tk, D) values, likewise.
        queries: (B,) queries of each image.
        keys: (B,) keys of each image.
        key_bias: (1, Tk) bias on the logits of each key, None for none; it gets no gradient.

    Returns:
        (1, heads, Tq, D).
    """
    of_queries, of_keys = Images(queries, queries.tolist()), Images(keys, keys.tolist())
    if q.device.type == "cpu":
        return attend_one_by_one(q, k, v, of_queries.lengths, of_keys.lengths, 0.0, key_bias)
    return attend_together(q, k, v, of_queries, of_keys, 0.0, key_bias).contiguous()


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, key_bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("effvit::packed_attention_gradients", mutates_args=())
def packed_attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the result, with the softmax map of one image at a time."""
    q_lengths, k_lengths, wide = queries.tolist(), keys.tolist(), wide_dtype(q.dtype)
    biases = [None] * len(k_lengths) if key_bias is None else key_bias[:, None, None].to(wide).split(k_lengths, dim=3)
    apart = [y.to(wide).split(q_lengths, dim=2) for y in (q, grad)]
    apart += [y.to(wide).split(k_lengths, dim=2) for y in (k, v)]
    images = zip(*apart, biases, strict=True)
    found = [_gradients_of_one(qi, of_out, ki, vi, bias) for qi, of_out, ki, vi, bias in images]
    of_q, of_k, of_v = (torch.cat(parts, dim=2).to(q.dtype) for parts in zip(*found, strict=True))
    return of_q, of_k, of_v


def _gradients_of_one(
    q: Tensor, grad: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    logits = q * scale @ k.transpose(-2, -1)  # (1, heads, Nq, Nk)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    of_weights = grad @ v.transpose(-2, -1)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    return of_logits @ k * scale, of_logits.transpose(-2, -1) @ q * scale, weights.transpose(-2, -1) @ grad


@packed_attention_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*packed_attention_gradients(grad, *ctx.saved_tensors), None, None, None)


packed_attention.register_autograd(_backward, setup_context=_keep)
