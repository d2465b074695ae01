"""Token slimming (SiT, arXiv 2111.12624): tokens mixed into fewer ones, and the ways back.

Source: ``TokenSlimmingModule`` and ``ReverseTSM`` in models/lvvit.py of Sense-X/SiT@f577808. Deviation: scores and
softmax are computed in float32 (float64 for float64). ``unpooling`` is ours.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from effvit.protocols import Device, Factory
from effvit.tokens import wide_dtype

__all__ = ["ReverseTokenSlimming", "TokenSlimming", "unpooling"]


class TokenSlimming(nn.Module):
    """Token slimming module: K convex combinations of the tokens, with weights from an MLP on each token.

    The softmax runs over the tokens, so N may differ from call to call while K is fixed by the parameters.

    Args:
        dim: Channels.
        num_tokens: K, tokens to form.
        ratio: Hidden channels of the MLP over ``dim``.
    """

    def __init__(
        self, dim: int, num_tokens: int, ratio: float = 0.5, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * ratio), num_tokens, **dd)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, **dd))

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x (B, N, C) -> new tokens (B, K, C) and the scores (B, N, K) whose softmax over N mixed them."""
        scores = self.mlp(self.norm(x)).to(wide_dtype(x.dtype)) * self.scale  # (B, N, K)
        mixed = scores.softmax(1).to(x.dtype).transpose(1, 2) @ x  # (B, K, C)
        return mixed.to(x.dtype), scores  # autocast multiplies in half precision; the residual stream keeps its dtype


class ReverseTokenSlimming(nn.Module):
    """Reverse token slimming module: K tokens -> N, by an MLP over the tokens, then one over the channels.

    Args:
        dim: Channels.
        num_tokens: K, tokens it is given.
        num_patches: N, tokens to rebuild.
        ratio: Hidden size of the two MLPs over N and ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        num_patches: int,
        ratio: float = 4.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mlp_tokens = Mlp(num_tokens, int(num_patches * ratio), num_patches, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp_channels = Mlp(dim, int(dim * ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C)."""
        x = self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # (B, N, C)
        return x + self.mlp_channels(self.norm2(x))


def unpooling(scores: Tensor) -> Tensor:
    """Weights (B, N, K) that give each old token back as a mean of the new ones; ``scores`` as of TokenSlimming.

    A new token took part W[k, n] = softmax over n of scores; an old token takes from each new one in proportion to
    what it gave: W normalised over k. Computed on logarithms, since all of a token's shares may underflow.
    Not from the paper.
    """
    return scores.log_softmax(1).softmax(-1)
