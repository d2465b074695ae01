"""Parts of a Swin for images of any size: a convolutional stem, and timm's block with padding before the shift."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerScale
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from effvit.layers.windows import from_windows, shift_mask, to_windows
from effvit.protocols import Device
from effvit.tokens import fix_traced_size, fx_leaf

__all__ = ["ConvStem", "WindowBlock"]


@fx_leaf
def pad_images(x: Tensor, multiple: int = 4) -> Tensor:
    """Images (B, 3, H, W) with zeros at the bottom and right up to a multiple of the stride."""
    x = fix_traced_size(x, 2, 3)
    bottom, right = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with batch norm and Hardswish: images of any size -> (B, H/4, W/4, C)."""

    def __init__(self, in_chans: int, dim: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        layer = partial(ConvNormAct, kernel_size=3, stride=2, act_layer=nn.Hardswish, device=device, dtype=dtype)
        self.conv1, self.conv2 = layer(in_chans, dim // 2), layer(dim // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(pad_images(x))).permute(0, 2, 3, 1)  # (B, H/4, W/4, C)


class WindowBlock(SwinTransformerBlock):
    """timm's Swin block for maps of any size, with the order of the released detection code: pad, then shift.

    timm shifts first, so that its windows differ wherever a map is padded. Padded positions are zeros behind the
    norm and visible, as in Swin.

    Args:
        dim: Channels.
        num_heads: Heads.
        window_size: Side of a window.
        shifted: Shift the windows by half of one.
        shift_small: Shift sides that one window covers, too, as detection code does and classification does not.
        init_values: Initial LayerScale of both branches; None for none, as in Swin.
        kwargs: Those of timm's block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shifted: bool,
        shift_small: bool = False,
        init_values: float | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(
            dim,
            input_resolution=(window_size, window_size),
            num_heads=num_heads,
            window_size=window_size,
            shift_size=window_size // 2 if shifted else 0,
            always_partition=True,
            dynamic_mask=True,
            **kwargs,
        )
        self.shift_small = shift_small
        scale: Callable[[], nn.Module] = nn.Identity
        if init_values is not None:
            dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
            scale = partial(LayerScale, dim, init_values=init_values, **dd)
        self.ls1, self.ls2 = scale(), scale()

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, C) -> (B, H, W, C)."""
        y: Tensor = self.drop_path1(self.ls1(self._attn(self.norm1(x))))
        x = x + y
        y = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + y

    def _attn(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        if attn.relative_position_index.is_meta and not attn.relative_position_bias_table.is_meta:
            # torch 2.11 gathers rows of a CPU table by a meta index without a word: they hold whatever memory held.
            raise ValueError(
                "relative_position_index, which no state_dict holds, is still on the meta device; after "
                "model.to_empty(device=...) call model.init_weights(), and load the weights after that"
            )
        window, shift = self.window_size[0], self.shift_size[0]
        mask = shift_mask(x, window, shift, self.shift_small) if shift else None
        y = self.attn(to_windows(x, window, shift, self.shift_small), mask=mask)  # (B * nW, N, C)
        return from_windows(y, window, x.shape[1:3], shift, self.shift_small)  # (B, H, W, C)
