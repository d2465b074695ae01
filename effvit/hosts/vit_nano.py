"""A plain ViT with weights that come in the package: DeiT's form (2012.12877) at 96 channels, for pictures of 28 x 28.

It is small so that everything can be tried offline on a model that sees; it was trained here on Fashion-MNIST
(1708.07747, MIT licence), as ``docs/accuracy.md`` tells.
"""

from __future__ import annotations

from pathlib import Path

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from effvit.hosts._builder import build_model
from effvit.hosts.checkpoints import host_state_dict
from effvit.hosts.surface import model_cfg

WEIGHTS = Path(__file__).parents[1] / "weights"

default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch4_28.fashion_mnist": model_cfg(
            file=str(WEIGHTS / "vit_nano_patch4_28.fashion_mnist.safetensors"),
            input_size=(1, 28, 28),
            num_classes=10,
            mean=(0.286,),
            std=(0.353,),
            crop_pct=1.0,
            fixed_input_size=True,
            first_conv="patch_embed.proj",
            classifier="head",
            license="apache-2.0",
        )
    }
)


@register_model
def vit_nano_patch4_28(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """1.35 M parameters: 12 blocks of 3 heads on 49 patches of a grey picture, and a class token."""
    args = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 96,
        "depth": 12,
        "num_heads": 3,
    }
    return build_model(
        VisionTransformer, "vit_nano_patch4_28", pretrained, kwargs, args, pretrained_filter_fn=host_state_dict
    )
