"""From the tokens that are left back to full (B, C, H, W) maps: fills that need no weights, and a trained recovery.

A fill is exact where nothing was reduced. Merged patches take the feature of their token ("unmerge by
source"); the fills differ in what a patch gets that no token stands for any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effvit.cross_attention import CrossBlock, WindowCrossBlock
from effvit.tokens import TokenMap, flat_rows, take_rows

__all__ = ["FILLS", "RestoreBlock", "TokenRecovery", "check_fill", "to_grid", "to_map"]

FILLS = ("last", "nearest", "zero")


def check_fill(fill: str) -> None:
    """Raise a ValueError unless ``fill`` names one of FILLS."""
    if fill not in FILLS:
        raise ValueError(f"recover must be one of {', '.join(FILLS)}, got {fill!r}")


def nearest_token(tokens: TokenMap) -> Tensor:
    """(B, H*W) token whose anchor is closest on the grid to each patch (Euclidean; ties: the first token)."""
    width = tokens.grid[1]
    patch = torch.arange(tokens.grid[0] * width, device=tokens.source.device)
    row = torch.div(tokens.anchor, width, rounding_mode="floor")  # (B, N)
    column = tokens.anchor - row * width
    patch_row = torch.div(patch, width, rounding_mode="floor")[None, :, None]
    patch_column = patch[None, :, None] - patch_row * width
    distance = (row.unsqueeze(1) - patch_row) ** 2 + (column.unsqueeze(1) - patch_column) ** 2  # (B, H*W, N)
    if tokens.valid is not None:
        far = tokens.grid[0] ** 2 + width**2
        distance = distance.masked_fill(~tokens.valid.unsqueeze(1), far)
    return distance.argmin(-1)


def to_grid(x: Tensor, tokens: TokenMap, fill: str = "last") -> Tensor:
    """Patch tokens of x (B, P+N, C) put back on the full grid: (B, H*W, C) in image order.

    Args:
        x: Tokens as the reduced blocks return them; packed (1, T, C) if ``tokens.packed``.
        tokens: The map that came with x.
        fill: What a dropped patch gets. "last": the feature it had when it entered the block that dropped it
            (needs ``tokens.memory``); "nearest": the feature of the nearest token that is left; "zero": zeros.
            Patches summed up in a fused token count as dropped for "last", as carried for the others.

    Raises:
        ValueError: An unknown fill, or "last" for a map made without memory.
    """
    check_fill(fill)
    _, patches = tokens.split(tokens.unpack(x) if tokens.packed else x)
    if not tokens.moved:
        return patches
    source = tokens.source
    if fill == "nearest":
        source = torch.where(source < 0, nearest_token(tokens), source)
    grid = take_rows(patches, flat_rows(source.clamp(min=0), patches.shape[1]))  # (B, H*W, C)
    if fill == "zero":
        return grid.masked_fill((source < 0).unsqueeze(-1), 0)
    if fill == "last":
        if tokens.memory is None:
            raise ValueError(
                "recover 'last' needs the features the dropped patches had, but this TokenMap holds no memory; "
                "get it from forward_tokens(x, memory=True) or use recover 'nearest' or 'zero'"
            )
        grid = torch.where(tokens.on_its_own().unsqueeze(-1), grid, tokens.memory)
    return grid


def to_map(x: Tensor, tokens: TokenMap, fill: str = "last") -> Tensor:
    """Full feature map (B, C, H, W) of x; arguments and errors as in to_grid."""
    return to_grid(x, tokens, fill).transpose(1, 2).unflatten(2, tokens.grid).contiguous()


class TokenRecovery(CrossBlock):
    """Trained recovery of image tokens X from a few tokens S, ``X' = MHA(X, S) + X`` and an MLP (STViT-R, 2303.08685).

    ``forward(x, s)``: image tokens x (B, N, C), as they were before S was made of them, ask the tokens s (B, Ns, C)
    and keep their place: (B, N, C). This is the last layer of the released dumbbell unit on global attention
    (changsn/STViT-R@b4a27a0 models/swin_transformer.py, blocks 5, 11 and 17 of stage 2). Arguments as ``CrossBlock``.
    """


class RestoreBlock(WindowCrossBlock):
    """``TokenRecovery`` by windows, for dense tasks on maps of any size (STViT-R on Swin, 2303.08685).

    The image tokens of a window ask the semantic tokens in a larger window around theirs: with the released sizes,
    49 image tokens ask 27 x 27 semantic tokens, of which the 3 x 3 in the middle came from their own window
    (``RestoreBlock`` of mmdet/models/backbones/layers.py@8b8eb1e of changsn/STViT-R-Object-Detection).

    Args:
        dim: Channels.
        num_heads: Heads.
        window: Side of a window of image tokens.
        samples: Side of its semantic tokens.
        kernel: Side of the key windows on the semantic grid; 9 times ``samples`` if None.
        mask_mode: As for ``WindowCrossBlock``.
        kwargs: Those of ``CrossBlock``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 7,
        samples: int = 3,
        kernel: int | None = None,
        mask_mode: str = "correct",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dim, num_heads, window, samples, 9 * samples if kernel is None else kernel, mask_mode, **kwargs
        )

    def forward(self, x: Tensor, s: Tensor) -> Tensor:  # type: ignore[override]  # maps, and one map of keys
        """Image tokens x (B, H, W, C), as they were before s was made of them, and s (B, h, w, C) -> (B, H, W, C).

        s has ``samples`` rows for each window of x; rows and columns of which no part is on the map may be missing.
        """
        x = x + self.drop_path1(self.cross(x, s, x.shape[1:3], self.window))
        return self.feedforward(x)
