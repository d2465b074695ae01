"""Whether the images of a batch that keep different numbers of tokens are padded or packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effvit.recording import is_recorded

__all__ = ["RAGGED", "packs", "padded_if"]

RAGGED = ("auto", "padded", "packed")

# What an image of a packed batch costs a block beside its tokens, in MACs that take as long: calls of its own, and
# copies that grow with its features. Fitted on blocks of 64 to 768 channels, batches of 2 to 32 images of 49 and 196
# patches and spreads of 0 to 40 % (one thread of a CPU, float32), with room for the reduction of packed tokens.
MACS_PER_IMAGE = 3_000_000
MACS_PER_FEATURE = 160


def padded_if(compat: bool, ragged: str) -> str:
    """``ragged``; "padded" with ``compat``, which reproduces an official batch: a ValueError if it is to be packed."""
    if not compat:
        return ragged
    if ragged == "packed":
        raise ValueError("compat=True reproduces the official padded batch; it needs ragged='padded'")
    return "padded"


def packs(ragged: str, lengths: Sequence[int] | None, num_prefix: int, q: Tensor) -> bool:
    """Whether a batch goes on packed.

    With "auto" it does where that is faster: if a block would compute more for the padding than packing costs. A batch
    is padded all the same in grad mode, since later blocks may train and stochastic depth drops single images; where
    the numbers of tokens are not known, as in what is exported; and on other devices than a CPU, for which nothing is
    measured yet.

    Args:
        ragged: One of ``RAGGED``.
        lengths: Patch tokens that each image keeps, if they were read.
        num_prefix: Prefix tokens.
        q: (B, heads, P+N, D) queries of the block.
    """
    if ragged != "auto":
        return ragged == "packed"
    if is_recorded(q) or torch.jit.is_tracing() or lengths is None:
        return False
    if torch.is_grad_enabled() or q.device.type != "cpu":
        return False
    longest, dim = num_prefix + max(lengths), q.shape[1] * q.shape[3]
    padding = len(lengths) * max(lengths) - sum(lengths)
    macs = padding * (12 * dim**2 + 2 * longest * dim)  # of a block with an MLP of four times its width
    return macs > len(lengths) * (MACS_PER_IMAGE + MACS_PER_FEATURE * longest * dim)
