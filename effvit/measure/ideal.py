"""The speed that token counts alone allow: the dense blocks on exactly the reduced numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost
from effvit.measure.flops import eval_twin
from effvit.protocols import Layer, PatchEmbedding

__all__ = ["IDEAL_HOSTS", "IdealViT", "PlainViT", "mean_counts"]

IDEAL_HOSTS = (VisionTransformer, VisionTransformerDistilled)


class PlainViT(Protocol):
    """What is asked of timm's plain ViTs."""

    num_prefix_tokens: int
    patch_embed: PatchEmbedding
    blocks: Sequence[PlainBlock]
    norm_pre: Layer
    norm: Layer

    def _pos_embed(self, x: Tensor, /) -> Tensor: ...

    def forward_head(self, x: Tensor, /) -> Tensor: ...


class PlainBlock(Protocol):
    """What is asked of their blocks."""

    norm1: Layer
    attn: Layer
    ls1: Layer
    norm2: Layer
    mlp: Layer
    ls2: Layer


class IdealViT(nn.Module):
    """A timm ViT whose token count follows a list, at no cost.

    It runs timm's own blocks and shortens the sequence by a leading slice between attention and MLP, with no scores,
    no matching and no index: efficiency is the speed of a method over this one's. The blocks are given explicitly, so
    a compiler cannot drop what a swapped buffer would cut off: every token that is left depends on the image.

    Args:
        dense: The ViT, of a class in ``IDEAL_HOSTS``.
        counts: Patch tokens that leave each block.
    """

    dense: PlainViT

    def __init__(self, dense: nn.Module, counts: Sequence[int]) -> None:
        super().__init__()
        self.dense = cast("PlainViT", dense)
        self.lengths = [self.dense.num_prefix_tokens + count for count in counts]

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense.norm_pre(self.dense._pos_embed(self.dense.patch_embed(x)))
        for block, length in zip(self.dense.blocks, self.lengths, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x[:, :length]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.dense.forward_head(self.dense.norm(x))


@torch.no_grad()
def mean_counts(model: ReducedHost, images: Tensor) -> list[float]:
    """Patch tokens that leave each block, the mean over images (B, channels, H, W)."""
    return [float(f.tokens.counts().double().mean()) for f in eval_twin(model).trace_tokens(images)]
