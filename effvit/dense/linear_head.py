"""The linear classifier that probes frozen maps in mmseg: dropout, batch norm and a 1 x 1 convolution.

mmseg finds it after ``custom_imports = dict(imports=["effvit.dense.linear_head"])``. Needs the ``mm`` extra.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmseg", "mm", "effvit.dense.linear_head"):
    import mmseg  # noqa: F401

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

__all__ = ["LinearHead"]


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """A linear classifier of every position of frozen maps, as DINOv2 (2304.07193) and DINOv3 (2508.10104) train one.

    The order is that of DINOv3 (dinov3/eval/segmentation/models/heads/linear_head.py@6876159): dropout of whole
    channels, batch norm, convolution. The ``BNHead`` of DINOv2 is the same without dropout.

    Args:
        in_channels: Channels of the map, or of each of several, which are resized to the first and concatenated.
        norm_cfg: mmcv's norm of the channels; SyncBN takes its statistics over all processes, as there.
        options: Further keywords of mmseg's ``BaseDecodeHead``: ``num_classes``, ``dropout_ratio``, ``in_index`` ...
    """

    def __init__(self, in_channels: int | Sequence[int], *, norm_cfg: dict[str, Any], **options: Any) -> None:
        if isinstance(in_channels, int):
            several: dict[str, Any] = {}
            channels = in_channels
        else:
            several = {"input_transform": "resize_concat", "in_index": list(range(len(in_channels)))}
            channels = sum(in_channels)
        super().__init__(in_channels, channels, norm_cfg=norm_cfg, **(several | options))
        _, self.norm = build_norm_layer(norm_cfg, channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps of the backbone (B, C_i, H_i, W_i) -> class scores (B, num_classes, H, W)."""
        x = self._transform_inputs(inputs)  # (B, C, H, W)
        return self.conv_seg(self.norm(x if self.dropout is None else self.dropout(x)))
