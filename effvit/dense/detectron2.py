"""The zoo in detectron2: the backbone ``EffViT`` for lazy configs, and ``build_effvit_backbone`` for those of yacs.

detectron2 is on no package index; install it from its repository (github.com/facebookresearch/detectron2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from effvit.dense.backbone import DenseBackbone

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EffViT", "add_effvit_config", "build_effvit_backbone"]


class EffViT(DenseBackbone, Backbone):
    """``effvit.dense.backbone.DenseBackbone`` as a backbone of detectron2, of the same arguments and state_dict keys.

    Maps are named as timm names the blocks, stages or levels they are of (``map_names``): "blocks.11", "layers.3",
    "level0".
    """

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Images (B, 3, H, W) -> {name: map (B, C_i, H_i, W_i)}."""
        return dict(zip(self.map_names, super().forward(x), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        shapes = zip(self.map_names, self.channels, self.strides, strict=True)
        return {name: ShapeSpec(channels=channels, stride=stride) for name, channels, stride in shapes}

    @property
    def size_divisibility(self) -> int:
        """The largest stride: images padded to it give maps that fit each other where a neck adds them up."""
        return max(self.strides)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What detectron2 pads batches to; images need not be square."""
        return {"size_divisibility": self.size_divisibility, "square_size": 0}


def add_effvit_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.EFFVIT``, whose entries are the arguments of ``EffViT``."""
    cfg.MODEL.EFFVIT = CfgNode({"model_name": ""}, new_allowed=True)


@BACKBONE_REGISTRY.register()
def build_effvit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EffViT:
    """The backbone of ``MODEL.EFFVIT`` for images of so many channels.

    ``pretrained`` weights are loaded here, unless ``MODEL.WEIGHTS`` names a checkpoint of the whole model.
    """
    backbone = EffViT(**{"in_chans": input_shape.channels, **cfg.MODEL.EFFVIT})
    if not cfg.MODEL.WEIGHTS:
        backbone.load_pretrained()
    return backbone
