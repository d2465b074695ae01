"""Small plain ViTs: DeiT's form (2012.12877) at 96 channels, for images of 28 x 28 and of 96 x 96.

They are small so that everything can be tried offline on a model that sees: their weights come in the package. The
first was trained here on Fashion-MNIST (1708.07747, MIT licence), the second on the objects on photographs of
``tools/data/scenes.py``, as ``docs/accuracy.md`` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from effvit.hosts._builder import build_model
from effvit.hosts.checkpoints import host_state_dict
from effvit.hosts.surface import model_cfg

WEIGHTS = Path(__file__).parents[1] / "weights"
CUTOUTS = (
    *("t-shirt-top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"),
    *("face", "person", "athlete", "hand", "heart", "mammal", "bird", "insect", "sea-animal", "flower", "fruit"),
    *("building", "vehicle", "clock", "flag"),
)
"""Classes of ``tools/data/scenes.py``."""

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
        ),
        "vit_nano_patch8_96.cutouts": model_cfg(
            file=str(WEIGHTS / "vit_nano_patch8_96.cutouts.safetensors"),
            input_size=(3, 96, 96),
            num_classes=len(CUTOUTS),
            label_names=CUTOUTS,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            crop_pct=1.0,
            fixed_input_size=True,
            first_conv="patch_embed.proj",
            classifier="head",
            license="apache-2.0",
        ),
    }
)

SHAPE = {"embed_dim": 96, "depth": 12, "num_heads": 3}


@register_model
def vit_nano_patch4_28(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """1.35 M parameters: 12 blocks of 3 heads on 49 patches of a grey image, and a class token."""
    return nano("vit_nano_patch4_28", pretrained, kwargs, img_size=28, patch_size=4, in_chans=1)


@register_model
def vit_nano_patch8_96(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """1.38 M parameters: the same blocks on 144 patches of a colour image, and a class token."""
    return nano("vit_nano_patch8_96", pretrained, kwargs, img_size=96, patch_size=8)


def nano(name: str, pretrained: bool, given: Mapping[str, object], **size: int) -> nn.Module:
    """The model of a name, with its sizes of image and patch."""
    return build_model(
        VisionTransformer, name, pretrained, given, {**SHAPE, **size}, pretrained_filter_fn=host_state_dict
    )
