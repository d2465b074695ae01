"""Kernels for attention inside each image of a packed batch, beside each other: which of them is fastest is a device's.

``effvit.attention`` takes jagged nested tensors, which any device has. The two others need a newer torch or a compiler.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from effvit import attention
from effvit.attention import Images, attend_together, bias_as_features
from effvit.tokens import TokenMap, wide_dtype

__all__ = ["KERNELS", "WithKernel", "packed_attention", "reason_against"]

BLOCK = 128  # rows and columns of a tile of FlexAttention


class Packed(NamedTuple):
    """A packed batch.

    Attributes:
        q: (1, heads, Tq, D) queries of all images, one image after another.
        k: (1, heads, Tk, D), likewise.
        v: (1, heads, Tk, D), likewise.
        queries: Map of the tokens of the queries.
        keys: Map of those of the keys.
        key_bias: (1, Tk) bias on the logits of each key, None for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: TokenMap
    keys: TokenMap
    key_bias: Tensor | None

    def without_bias(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """q, k, v with the bias, if any, as more features, and the factor on q k^T."""
        scale: float = self.q.shape[-1] ** -0.5
        if self.key_bias is None:
            return self.q, self.k, self.v, scale
        return (*bias_as_features(self.q, self.k, self.v, self.key_bias, scale), scale)


Kernel: TypeAlias = Callable[[Packed], Tensor]


def jagged(batch: Packed) -> Tensor:
    """One call on jagged nested tensors: (1, heads, Tq, D)."""
    images = Images.of(batch.queries), Images.of(batch.keys)
    return attend_together(batch.q, batch.k, batch.v, *images, 0.0, batch.key_bias)


def varlen(batch: Packed) -> Tensor:
    """``torch.nn.attention.varlen``: (1, heads, Tq, D). No length is read from the device."""
    q, k, v, scale = batch.without_bias()
    rows = (y.squeeze(0).transpose(0, 1).contiguous() for y in (q, k, v))  # (T, heads, D)
    images = [Images.of(tokens) for tokens in (batch.queries, batch.keys)]
    ends = (each.offsets.int() for each in images)
    longest = (max(each.lengths) for each in images)
    run: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    out: Tensor = run(*rows, *ends, *longest, scale=scale)
    return out.transpose(0, 1).unsqueeze(0)[..., : batch.v.shape[-1]]


def flex(batch: Packed) -> Tensor:
    """FlexAttention with a tile mask: (1, heads, Tq, D). Compiled on CUDA alone, since elsewhere it is only tried."""
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")
    of_query, of_key = (image_of_each(tokens) for tokens in (batch.queries, batch.keys))  # (Tq,), (Tk,)
    bias = None if batch.key_bias is None else batch.key_bias[0].to(wide_dtype(batch.key_bias.dtype))

    def same_image(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_query[query] == of_key[key]

    def biased(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if bias is None else score + bias[key]

    number, tiles = tiles_of_images(of_query, Images.of(batch.keys).offsets, len(of_key))
    mask = module.BlockMask.from_kv_blocks(
        number[None, None],
        tiles[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=same_image,
        seq_lengths=(len(of_query), len(of_key)),
        compute_q_blocks=False,
    )
    run = compiled_flex() if batch.q.is_cuda else module.flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        out: Tensor = run(batch.q, batch.k, batch.v, score_mod=None if bias is None else biased, block_mask=mask)
    return out


def image_of_each(tokens: TokenMap) -> Tensor:
    """(T,) image of each token of a packed sequence."""
    images = tokens.layout.ranges.images.expand(-1, tokens.num_prefix + tokens.width)  # (B, P+N)
    return tokens.pack(images)[0]


def tiles_of_images(of_query: Tensor, key_ends: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """For each tile of queries how many tiles of keys hold tokens of its images, and which, those first.

    The images of a tile follow one another, and so do their keys: no mask of queries and keys is made.

    Args:
        of_query: (Tq,) image of each query.
        key_ends: (B+1,) first key of each image, and the end.
        num_keys: Tk.

    Returns:
        (Q,) and (Q, K) int32.
    """
    first_query = torch.arange(0, len(of_query), BLOCK, device=of_query.device)
    last_query = (first_query + BLOCK - 1).clamp(max=len(of_query) - 1)
    first = key_ends[of_query[first_query]] // BLOCK
    last = (key_ends[of_query[last_query] + 1] - 1) // BLOCK
    columns = torch.arange(-(-num_keys // BLOCK), device=of_query.device)
    tiles = (first.unsqueeze(1) + columns) % len(columns)
    return (last - first + 1).int(), tiles.int()


_compiled: list[Any] = []


def compiled_flex() -> Any:
    """FlexAttention compiled once, for sequences of any length."""
    if not _compiled:
        module = importlib.import_module("torch.nn.attention.flex_attention")
        _compiled.append(torch.compile(module.flex_attention, dynamic=True))
    return _compiled[0]


KERNELS: dict[str, Kernel] = {"varlen": varlen, "flex": flex, "jagged": jagged}
"""By name, the one to take first before the others."""


def reason_against(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run there; None if nothing speaks against it."""
    if kernel == "jagged":
        return None
    try:
        module = importlib.import_module(f"torch.nn.attention.{'varlen' if kernel == 'varlen' else 'flex_attention'}")
    except ImportError:
        return f"torch {torch.__version__} has none"
    if kernel == "flex":
        return None
    if "scale" not in inspect.signature(module.varlen_attn).parameters:
        return f"torch {torch.__version__} has one without scale, which a bias needs"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it needs CUDA and bfloat16 or float16, got {device.type} and {str(dtype).removeprefix('torch.')}"
    return None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: TokenMap,
    keys: TokenMap,
    dropout_p: float,
    key_bias: Tensor | None = None,
    *,
    kernel: str | None = None,
) -> Tensor:
    """``effvit.attention.variable_length_attention`` by the kernel of that name; None: the first that can run there.

    Raises:
        ValueError: A kernel that cannot run there, or dropout, which not all of them have.
    """
    if kernel is None:
        kernel = next(name for name in KERNELS if reason_against(name, q.device, q.dtype) is None)
    reason = reason_against(kernel, q.device, q.dtype)
    if reason is not None:
        raise ValueError(f"the kernel {kernel!r} cannot run here: {reason}; take 'jagged', which runs everywhere")
    if dropout_p:
        raise ValueError(f"packed kernels are compared without dropout, got {dropout_p}; call eval() on the model")
    return KERNELS[kernel](Packed(q, k, v, queries, keys, key_bias))


@contextmanager
def taking(kernel: str | None) -> Iterator[None]:
    """Let packed models take the kernel of that name inside the context."""
    before = attention.variable_length_attention
    attention.variable_length_attention = partial(packed_attention, kernel=kernel)
    try:
        yield
    finally:
        attention.variable_length_attention = before


class WithKernel(nn.Module):
    """A model with packed batches that takes one of the kernels; None: the first that can run there."""

    def __init__(self, model: nn.Module, kernel: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        with taking(self.kernel):
            out: Tensor = self.model(x)
        return out
