"""The architectures with weights of their own: one table of published sizes, and their names in timm.

Each row gives the class, the arguments of the published size and where they are from. No pretrained file is
named where none is known to be public; ``effvit.load_checkpoint`` reads the official ones from a path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from effvit.models._checkpoint import official_state_dict
from effvit.models.feature_pyramid import feature_settings
from effvit.models.sit import SiT

__all__ = ["VARIANTS", "Variant"]


class Variant(NamedTuple):
    """One published size.

    Attributes:
        model: The class.
        args: Its constructor arguments.
        source: Where the size is from.
        cfg: Entries of timm's pretrained configuration that differ from ``_cfg``.
        out_indices: Default of ``features_only``.
    """

    model: type[nn.Module]
    args: dict[str, Any]
    source: str
    cfg: dict[str, Any]
    out_indices: int | tuple[int, ...] = 3


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **kwargs,
    }


PYRAMID = {"pool_size": (7, 7), "classifier": "head.fc"}
COLUMN = {"fixed_input_size": True, "first_conv": "patch_embed.proj"}
EVERY_STAGE = (0, 1, 2, 3)

# -- STViT on DeiT (2303.08685) ---------------------------------------------------------------------------------
STVIT: dict[str, Variant] = {}

# -- STViT and STViT-R on Swin (2303.08685) ---------------------------------------------------------------------
STVIT_SWIN: dict[str, Variant] = {}

# -- super-token SViT (2211.11167) ------------------------------------------------------------------------------
SUPERTOKEN: dict[str, Variant] = {}

# -- LookupViT (2407.12753) -------------------------------------------------------------------------------------
LOOKUPVIT: dict[str, Variant] = {}


# -- SiT (2111.12624) -------------------------------------------------------------------------------------------
def _lvvit(
    embed_dim: int, depth: int, stage_blocks: list[int] | None = None, img_size: int = 224, **kwargs: Any
) -> dict[str, Any]:
    heads = {"num_heads": embed_dim // 64, "mlp_ratio": 3.0, "qkv_bias": False}
    sizes = {"img_size": img_size, "embed_dim": embed_dim, "depth": depth, "stage_blocks": stage_blocks}
    return sizes | heads | kwargs


SIT_CFG = COLUMN | {
    "first_conv": "patch_embed.proj.0.conv",
    "crop_pct": 0.875,  # datasets.py@f577808 resizes to 256/224 of the input size
    "paper_ids": "arXiv:2111.12624",
    "origin_url": "https://github.com/Sense-X/SiT",
    "license": "apache-2.0",  # the text of its LICENSE file; its README says MIT
}
SIT_CFG_288 = SIT_CFG | {"input_size": (3, 288, 288)}
LVVIT_LARGE: dict[str, Any] = {"stem": "6c", "skip_lam": 3.0, "img_size": 288}
SIT: dict[str, Variant] = {
    "sit_lvvit_tiny_224": Variant(
        SiT, _lvvit(320, 14, [1, 1, 1, 11]), "SiT-T of README@f577808, 15.6 M parameters", SIT_CFG
    ),
    "sit_lvvit_xsmall_224": Variant(
        SiT, _lvvit(384, 16, [1, 1, 1, 13]), "SiT-XS of README@f577808, 25.2 M parameters", SIT_CFG
    ),
    "sit_lvvit_small_224": Variant(
        SiT, _lvvit(384, 16, [9, 3, 2, 2]), "SiT-S of README@f577808, 25.2 M parameters", SIT_CFG
    ),
    "sit_lvvit_medium_224": Variant(
        SiT, _lvvit(512, 20, [10, 4, 3, 3]), "SiT-M of README@f577808, 55.1 M parameters", SIT_CFG
    ),
    "sit_lvvit_large_288": Variant(
        SiT, _lvvit(768, 24, [10, 4, 3, 7], **LVVIT_LARGE), "SiT-L of README@f577808, 147.4 M parameters", SIT_CFG_288
    ),
    "lvvit_tiny_4c_224": Variant(SiT, _lvvit(320, 14), "LV-ViT-T, dense teacher of SiT-T", SIT_CFG),
    "lvvit_small_4c_224": Variant(SiT, _lvvit(384, 16), "LV-ViT-S, dense teacher of SiT-XS and SiT-S", SIT_CFG),
    "lvvit_medium_4c_224": Variant(SiT, _lvvit(512, 20), "LV-ViT-M, dense teacher of SiT-M", SIT_CFG),
    "lvvit_large_6c_288": Variant(SiT, _lvvit(768, 24, **LVVIT_LARGE), "LV-ViT-L, dense teacher of SiT-L", SIT_CFG_288),
}

# -- CAS-ViT (2408.03703) ---------------------------------------------------------------------------------------
CASVIT: dict[str, Variant] = {}

VARIANTS: dict[str, Variant] = STVIT | STVIT_SWIN | SUPERTOKEN | LOOKUPVIT | SIT | CASVIT

default_cfgs = generate_default_cfgs({name: _cfg(**variant.cfg) for name, variant in VARIANTS.items()})


def _own_names(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights of an official or own file under the model's names; timm calls this while it loads a checkpoint."""
    return model.adapt_state_dict(official_state_dict(state_dict)[0])[0]


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]
    feature_cfg = feature_settings(kwargs, variant.out_indices)
    return build_model_with_cfg(
        variant.model,
        name,
        pretrained,
        pretrained_filter_fn=_own_names,
        feature_cfg=feature_cfg,
        **(variant.args | kwargs),
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{VARIANTS[name].model.__name__}: {VARIANTS[name].source}."
    return create


for _name in VARIANTS:
    globals()[_name] = register_model(_entry_point(_name))  # listed in __all__ by timm
