"""Maps of several strides from a plain vision transformer, whose blocks all work at one.

Dense heads made for convolutional backbones want maps at strides 4, 8, 16 and 32. The pyramid here is that of
ViTDet (2203.16527, section 3): transposed convolutions for the finer maps, pooling for the coarser one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

import torch
from timm.layers import LayerNorm2d
from timm.models._features import FeatureGetterNet, FeatureInfo
from torch import Tensor, nn

from effvit.protocols import Device, Factory

__all__ = [
    "SCALES",
    "FeaturePyramid",
    "PyramidFeatures",
    "SimpleFeaturePyramid",
    "StageInfo",
    "feature_settings",
    "rescaled_channels",
]

SCALES = (4.0, 2.0, 1.0, 0.5)


def rescaled_channels(channels: int, scale: float) -> int:
    """Channels of a map after it was rescaled: halved with every doubling of the resolution."""
    return channels if scale <= 1 else channels // int(scale)


def _rescale(channels: int, scale: float, dd: Factory) -> nn.Module:
    """Module that changes the resolution of a map (B, channels, H, W) by ``scale``, one of SCALES."""
    if scale == 1:
        return nn.Identity()
    if scale == 0.5:
        return nn.MaxPool2d(2, ceil_mode=True)
    half = nn.ConvTranspose2d(channels, channels // 2, 2, stride=2, **dd)
    if scale == 2:
        return half
    return nn.Sequential(
        half,
        LayerNorm2d(channels // 2, **dd),
        nn.GELU(),
        nn.ConvTranspose2d(channels // 2, channels // 4, 2, stride=2, **dd),
    )


class FeaturePyramid(nn.Module):
    """Brings maps of one stride to several.

    Args:
        channels: Channels of the maps.
        scales: Change of resolution of each level, of 4, 2, 1 and 0.5.

    Raises:
        ValueError: Another scale.
    """

    def __init__(
        self,
        channels: int,
        scales: Sequence[float] = SCALES,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for scale in scales:
            if scale not in SCALES:
                raise ValueError(f"scales of a feature pyramid are {', '.join(map(str, SCALES))}, got {scale}")
        self.levels = nn.ModuleList(_rescale(channels, scale, {"device": device, "dtype": dtype}) for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, H, W), one a level -> (B, C_i, H * scale_i, W * scale_i), C_i as ``rescaled_channels``."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class SimpleFeaturePyramid(nn.Module):
    """The neck of ViTDet: several levels of equal width from the last map of a plain ViT (2203.16527, section 3).

    Every level is rescaled from the same map, then passes a 1x1 and a 3x3 convolution, each with LayerNorm; further
    levels subsample the coarsest by 2.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of every level.
        scales: Resolution of the levels over that of the map.
        num_outs: Levels in all; at least ``len(scales)``.

    Raises:
        ValueError: ``num_outs`` below the number of scales, or an unknown scale.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = SCALES,
        num_outs: int = 5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        if num_outs < len(scales):
            raise ValueError(f"num_outs must be at least the number of scales, {len(scales)}, got {num_outs}")
        self.pyramid = FeaturePyramid(in_channels, scales, **dd)
        self.laterals = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(rescaled_channels(in_channels, scale), out_channels, 1, bias=False, **dd),
                LayerNorm2d(out_channels, **dd),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd),
                LayerNorm2d(out_channels, **dd),
            )
            for scale in scales
        )
        self.extra = nn.ModuleList(nn.MaxPool2d(1, stride=2) for _ in range(num_outs - len(scales)))

    def forward(self, maps: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A map (B, C, H, W), or a sequence of which the last is used -> ``num_outs`` maps, finest first."""
        x = maps if isinstance(maps, Tensor) else maps[-1]
        rescaled = self.pyramid([x] * len(self.laterals))
        levels = [lateral(y) for lateral, y in zip(self.laterals, rescaled, strict=True)]
        for pool in self.extra:
            levels.append(pool(levels[-1]))
        return tuple(levels)


class StageInfo(TypedDict):
    """What timm notes of a feature map: channels, stride in pixels, and the module it leaves."""

    num_chs: int
    reduction: int
    module: str


class HasFeatureInfo(Protocol):
    """A model of timm with maps."""

    feature_info: Sequence[StageInfo]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters."""
        ...


class PyramidFeatures(FeatureGetterNet):
    """timm's ``features_only`` of a plain ViT as a pyramid at strides 4, 8, 16 and 32.

    Level i is read after the last block of the i-th quarter of the model, as dense heads on plain ViTs do
    (BEiT and MAE on UPerNet), and rescaled by trainable transposed convolutions or pooling.

    Args:
        model: A plain ViT of patch size 16.
        out_indices: Levels, of 0 to 3.
        kwargs: As ``FeatureGetterNet``.

    Raises:
        ValueError: Another patch size, fewer than four blocks, or a level that does not exist.
    """

    def __init__(self, model: HasFeatureInfo, out_indices: Sequence[int] = (0, 1, 2, 3), **kwargs: object) -> None:
        info = list(model.feature_info)
        stride, depth, channels = info[-1]["reduction"], len(info), info[-1]["num_chs"]
        if stride != 16:
            raise ValueError(
                f"pyramid=True makes strides 4, 8, 16 and 32 from a patch size of 16, but this model has {stride}; "
                "use a model of patch size 16, or take its maps without pyramid"
            )
        if depth < 4:
            raise ValueError(f"pyramid=True reads a map from each quarter of the blocks, but there are only {depth}")
        levels = [range(4)[level] for level in out_indices] if _are_levels(out_indices) else None
        if not levels:
            raise ValueError(f"the levels of a pyramid are 0 to 3, got out_indices={out_indices}")
        super().__init__(model, out_indices=[depth * (level + 1) // 4 - 1 for level in levels], **kwargs)
        weight = next(model.parameters())
        scales = [SCALES[level] for level in levels]
        self.pyramid = FeaturePyramid(channels, scales, device=weight.device, dtype=weight.dtype)
        self.feature_info = FeatureInfo(
            [
                {"num_chs": rescaled_channels(channels, scale), "reduction": int(stride / scale), "module": f"level{i}"}
                for i, scale in enumerate(scales)
            ],
            tuple(range(len(levels))),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> maps (B, C_i, H / stride_i, W / stride_i), finest first."""
        return self.pyramid(super().forward(x))


def _are_levels(out_indices: object) -> bool:
    return isinstance(out_indices, (list, tuple)) and all(isinstance(i, int) and -4 <= i < 4 for i in out_indices)


def feature_settings(kwargs: dict[str, object], out_indices: int | Sequence[int]) -> dict[str, object]:
    """timm's ``feature_cfg`` for a model whose maps come from ``forward_intermediates``.

    Args:
        kwargs: Keywords of the model; ``out_indices`` and ``pyramid`` are taken out of it.
        out_indices: Default of the former.

    Raises:
        ValueError: ``pyramid=True`` without ``features_only=True``.
    """
    if not kwargs.pop("pyramid", False):
        return {"out_indices": kwargs.pop("out_indices", out_indices), "feature_cls": "getter"}
    if not kwargs.get("features_only", False):
        raise ValueError("pyramid=True shapes the maps of a backbone: create the model with features_only=True too")
    return {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": PyramidFeatures}
