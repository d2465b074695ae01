"""The speed that token counts alone allow: the dense blocks on exactly the reduced numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from contextlib import suppress
from typing import Protocol, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from effvit.hosts.closed_form import Attends, block_sizes
from effvit.hosts.host import ReducedHost, as_host
from effvit.measure.flops import eval_twin
from effvit.protocols import Layer, PatchEmbedding

__all__ = [
    "IDEAL_HOSTS",
    "IdealEva",
    "IdealViT",
    "Parts",
    "PlainViT",
    "entering_counts",
    "ideal_of",
    "mean_counts",
    "plain_parts",
]

IDEAL_HOSTS = (VisionTransformer, VisionTransformerDistilled)
BATCH = 32  # images whose tokens are counted at a time


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

    It runs timm's own blocks and shortens the sequence by leading slices, before attention and between attention and
    MLP, with no scores, no matching and no index: efficiency is the speed of a method over this one's. The blocks are
    given explicitly, so a compiler cannot drop what a swapped buffer would cut off: every token that is left depends on
    the image.

    Args:
        dense: The ViT, of a class in ``IDEAL_HOSTS``.
        counts: Patch tokens that leave each block.
        entering: Those that enter its attention; None for all that left the block before.
    """

    dense: PlainViT

    def __init__(self, dense: nn.Module, counts: Sequence[int], entering: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dense = cast("PlainViT", dense)
        prefix = self.dense.num_prefix_tokens
        self.lengths = [prefix + count for count in counts]
        self.entering = [None if entering is None else prefix + entering[block] for block in range(len(counts))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense.norm_pre(self.dense._pos_embed(self.dense.patch_embed(x)))
        for block, entering, length in zip(self.dense.blocks, self.entering, self.lengths, strict=True):
            x = x[:, :entering]
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x[:, :length]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.dense.forward_head(self.dense.norm(x))


class Parts(Protocol):
    """What schedules are made for."""

    num_prefix_tokens: int

    @property
    def patch_embed(self) -> PatchEmbedding:
        """Its grid is that of the images."""
        ...

    @property
    def blocks(self) -> Sized:
        """The blocks, of which only the number is asked."""
        ...


def plain_parts(dense: nn.Module) -> Parts:
    """Blocks and patch embedding of a plain ViT, whatever part of the model holds them."""
    holds_them = hasattr(dense, "blocks") and hasattr(getattr(dense, "patch_embed", None), "img_size")
    return cast("Parts", dense) if holds_them else as_host(dense)


class EvaAttention(Protocol):
    """What is asked of the attention of timm's Eva."""

    def __call__(self, x: Tensor, /, rope: Tensor | None = None) -> Tensor: ...


class RotaryBlock(Protocol):
    """What is asked of the blocks of timm's Eva."""

    norm1: Layer
    attn: EvaAttention
    gamma_1: Tensor | None
    norm2: Layer
    mlp: Layer
    gamma_2: Tensor | None


class RotaryViT(Protocol):
    """What is asked of timm's Eva."""

    num_prefix_tokens: int
    patch_embed: PatchEmbedding
    blocks: Sequence[RotaryBlock]
    norm_pre: Layer
    norm: Layer

    def _pos_embed(self, x: Tensor, /) -> tuple[Tensor, Tensor | None]: ...

    def forward_head(self, x: Tensor, /) -> Tensor: ...


class IdealEva(nn.Module):
    """``IdealViT`` for timm's Eva (EVA, DINOv3), whose rotary table is shortened with the sequence.

    Args:
        dense: The Eva, whose blocks are all of timm's class ``EvaBlock``.
        counts: As for ``IdealViT``.
        entering: Likewise.
    """

    dense: RotaryViT

    def __init__(self, dense: nn.Module, counts: Sequence[int], entering: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dense = cast("RotaryViT", dense)
        self.counts = list(counts)
        self.entering: list[int | None] = [None] * len(counts) if entering is None else list(entering)
        self.table_of_each = bool(getattr(dense, "rope_mixed", False))

    def forward(self, x: Tensor) -> Tensor:
        x, rope = self.dense._pos_embed(self.dense.patch_embed(x))
        x = self.dense.norm_pre(x)
        for number, block in enumerate(self.dense.blocks):
            x, rope = self.shortened(x, rope, self.entering[number])
            table = rope[number] if self.table_of_each and rope is not None else rope
            y = block.attn(block.norm1(x), rope=table)
            x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
            x, rope = self.shortened(x, rope, self.counts[number])
            y = block.mlp(block.norm2(x))
            x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
        return self.dense.forward_head(self.dense.norm(x))

    def shortened(self, x: Tensor, rope: Tensor | None, count: int | None) -> tuple[Tensor, Tensor | None]:
        """x (B, P+N, C) and the table (..., N, D) of its first ``count`` patch tokens; None for all."""
        if count is None:
            return x, rope
        return x[:, : self.dense.num_prefix_tokens + count], None if rope is None else rope[..., :count, :]


def ideal_of(dense: nn.Module, counts: Sequence[int], reduced: ReducedHost | None = None) -> nn.Module | None:
    """The ideal of a host whose blocks leave so many patch tokens each; None for a class of host without one.

    Args:
        dense: The host.
        counts: Patch tokens that leave each block.
        reduced: The model that leaves them, which may reduce before attention; None for one that does behind it.
    """
    is_eva = type(dense) is Eva and all(type(block) is EvaBlock for block in cast("RotaryViT", dense).blocks)
    if not is_eva and type(dense) not in IDEAL_HOSTS:
        return None
    entering = None if reduced is None else entering_counts(reduced, counts)
    return IdealEva(dense, counts, entering) if is_eva else IdealViT(dense, counts, entering)


def entering_counts(model: ReducedHost, counts: Sequence[int]) -> list[int]:
    """Patch tokens that enter the attention of each block of a model whose blocks leave ``counts``.

    They are fewer than left the block before where a method reduces before attention, as its closed form says; one
    without a closed form is taken to reduce behind it.
    """
    grid = model.patch_embed.grid_size
    entering = [grid[0] * grid[1], *counts[:-1]]
    for number, reducer in model.reducers.items():
        sizes = block_sizes(model, cast("Attends", model.blocks[number]), grid, entering[number])
        with suppress(NotImplementedError):
            entering[number] = min(entering[number], reducer.cost(sizes._replace(left=counts[number])).keys)
    return entering


@torch.no_grad()
def mean_counts(model: ReducedHost, images: Tensor) -> list[float]:
    """Patch tokens that leave each block, the mean over images (B, channels, H, W)."""
    twin = eval_twin(model)
    counts = [[f.tokens.counts() for f in twin.trace_tokens(chunk)] for chunk in images.split(BATCH)]
    return [float(torch.cat(block).double().mean()) for block in zip(*counts, strict=True)]
