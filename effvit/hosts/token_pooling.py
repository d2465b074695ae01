"""TAP, token-aware average pooling: every patch attends from a mixture of its neighbourhoods (2303.11126)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from effvit.block import copy_shared
from effvit.layers.macs import Terms, norm
from effvit.protocols import Layer, Size
from effvit.schedule import check_blocks, check_count

__all__ = ["TokenAwarePooling", "dilated_mean", "pool_tokens", "pooling_macs"]


def dilated_mean(x: Tensor, dilation: int) -> Tensor:
    """Mean of x (B, C, H, W) over 3 x 3 positions ``dilation`` apart, of which those outside count as zeros.

    As in the release the sum is divided by 9 at the border too, where it shrinks.
    """
    kernel = torch.full((x.shape[1], 1, 3, 3), 1 / 9, dtype=x.dtype, device=x.device)
    return F.conv2d(x, kernel, padding=dilation, dilation=dilation, groups=x.shape[1])


def pooling_macs(num_patches: int, dim: int, num_scales: int) -> int:
    """MACs of the pooling in front of one block: two convolutions that weigh the scales, and a mean for all but one."""
    return 9 * num_patches * (dim * num_scales + num_scales**2 + (num_scales - 1) * dim)


class TokenAwarePooling(nn.Module):
    """A mixture of each patch and the means of its neighbourhoods, weighed for each patch by what is there.

    TAP of "Robustifying Token Attention" (2303.11126; tap_robust_models.py@6e4dbff, whose names the
    parameters of ``dilation_predictor`` have). Neighbourhoods are 3 x 3 patches 1 to S - 1 apart; the weights are the
    same for all channels and sum to 1. Prefix tokens stay as they are: no official host has any.

    Args:
        dim: Channels.
        grid: (H, W) patch grid; the official code takes square ones.
        num_prefix: Prefix tokens in front of the patches.
        num_scales: S, the patch itself and S - 1 neighbourhoods.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        grid: Size,
        num_prefix: int = 0,
        num_scales: int = 4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scales = check_count("num_scales", num_scales, 1)
        self.dim = dim
        self.grid = grid
        self.num_prefix = num_prefix
        self.num_scales = scales
        made = {"device": device, "dtype": dtype}
        layers = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False, **made),  # type: ignore[arg-type]
            nn.BatchNorm2d(scales, **made),  # type: ignore[arg-type]
            nn.Conv2d(scales, scales, 3, padding=1, bias=False, **made),  # type: ignore[arg-type]
        )
        self.dilation_predictor = nn.ModuleDict({"proj": layers})

    def scale_weights(self, x: Tensor) -> Tensor:
        """(B, S, H, W) weights of the patch itself and of its neighbourhoods, of a map x (B, C, H, W)."""
        scores: Tensor = self.dilation_predictor["proj"](x)
        return scores.softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x (B, P + H*W, C) of the full grid -> the same with mixed patches.

        Raises:
            ValueError: Another number of tokens.
        """
        self.check_number(x.shape[1])
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        maps = patches.transpose(1, 2).unflatten(2, self.grid)  # (B, C, H, W)
        weights = self.scale_weights(maps)
        scales = [maps, *(dilated_mean(maps, dilation) for dilation in range(1, self.num_scales))]
        mixed = torch.stack([weights[:, i : i + 1] * scale for i, scale in enumerate(scales)]).sum(0)
        return torch.cat([prefix, mixed.flatten(2).transpose(1, 2)], dim=1)

    def check_number(self, num_tokens: int) -> None:
        """Raise a ValueError for another number of tokens than those of the full grid and the prefix."""
        expected = self.num_prefix + self.grid[0] * self.grid[1]
        if num_tokens != expected:
            raise ValueError(
                f"token-aware pooling mixes neighbours on the {self.grid[0]} x {self.grid[1]} grid it was made for, "
                f"{expected} tokens with the prefix, got {num_tokens}; pool in blocks before the first reduction, and "
                "give images of that size"
            )

    def closed_form(self, num_tokens: int) -> Terms:
        """MACs for one image of so many tokens, by term; errors as for ``forward``."""
        self.check_number(num_tokens)
        patches = self.grid[0] * self.grid[1]
        weighing = norm(self.dilation_predictor["proj"].get_submodule("1"), patches)
        return Terms(token_pooling=pooling_macs(patches, self.dim, self.num_scales)) + weighing

    def before_norm(self, norm: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook in front of a block's first norm: the residual around attention carries what is not mixed."""
        return (self(given[0]), *given[1:])


class PatchEmbedding(Protocol):
    """timm's patch embedding."""

    grid_size: Size


class PlainViT(Protocol):
    """What is asked of a plain ViT of timm, reduced or not."""

    blocks: Sequence[nn.Module]
    embed_dim: int
    num_prefix_tokens: int
    patch_embed: PatchEmbedding


def pool_tokens(
    model: nn.Module, *, num_scales: int = 4, blocks: Sequence[int] | None = None, share: bool = True
) -> nn.Module:
    """A plain ViT of timm or of this package whose blocks pool in front of attention (TAP, 2303.11126).

    The new parameters lie at ``blocks.i.norm1.pool``; all others keep their names. Reduce the model before, by
    ``effvit.sparsify``: a pooled block needs the full grid, so name the blocks up to the first that reduces.

    Args:
        model: timm's ``VisionTransformer`` or ``Eva``, or one reduced by a method; left as it is.
        num_scales: The patch itself and its neighbourhoods 1 to ``num_scales`` - 1 apart, of 3 x 3 patches each.
        blocks: 0-based blocks that pool; None: all.
        share: Whether the new model has the parameters of the old one, or copies.

    Raises:
        TypeError: Another model, or one without timm's pre-norm blocks.
        ValueError: Blocks that it does not have, or that pool already.
    """
    dense: PlainViT = copy_shared(model, share)  # type: ignore[assignment]
    known = isinstance(model, (VisionTransformer, Eva))
    if not known or not all(isinstance(block, (Block, EvaBlock)) for block in dense.blocks):
        raise TypeError(
            "token-aware pooling mixes neighbours on the patch grid of a VisionTransformer or an Eva, in front of "
            f"norm1 of timm's Block and EvaBlock, got a {type(model).__name__}; give one of these, or what sparsify "
            "makes of it"
        )
    depth = len(dense.blocks)
    for number in check_blocks("blocks", range(depth) if blocks is None else blocks, depth):
        first_norm: Layer = dense.blocks[number].norm1  # type: ignore[assignment]
        if hasattr(first_norm, "pool"):
            raise ValueError(f"block {number} pools already; give the model without pooling")
        weight = next(dense.blocks[number].parameters())
        grid, prefix = dense.patch_embed.grid_size, dense.num_prefix_tokens
        pool = TokenAwarePooling(dense.embed_dim, grid, prefix, num_scales, weight.device, weight.dtype)
        first_norm.pool = pool  # type: ignore[attr-defined]
        first_norm.register_forward_pre_hook(pool.before_norm)  # type: ignore[attr-defined]
    return dense  # type: ignore[return-value]
