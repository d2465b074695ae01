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
from effvit.models.casvit import CASViT
from effvit.models.supertoken import SuperTokenViT

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
# hhb072/STViT@c9ed9a4, models/stvit.py (MIT by its header) and README; drop_path_rate is left at 0, the trainings
# used 0.1 (S), 0.4 (B) and 0.6 (L). Evaluation resizes to 256 for 224 and does not crop at 384.
_SUPERTOKEN_SIZES: dict[str, dict[str, Any]] = {
    "small": {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)},
    "base": {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 14, 6),
        "num_heads": (2, 3, 6, 8),
        "layerscale": (False, False, True, True),
    },
    "large": {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (2, 3, 7, 10),
        "layerscale": (False, False, True, True),
    },
}
SUPERTOKEN: dict[str, Variant] = {
    f"supertoken_{size}_{pixels}": Variant(
        SuperTokenViT,
        args,
        f"SViT-{size[0].upper()} of 2211.11167, hhb072/STViT@c9ed9a4 models/stvit.py, for {pixels} pixels",
        PYRAMID
        | {
            "input_size": (3, pixels, pixels),
            "pool_size": (pixels // 32, pixels // 32),
            "crop_pct": 0.875 if pixels == 224 else 1.0,
            "first_conv": "stem.0",
            "paper_ids": "arXiv:2211.11167",
            "origin_url": "https://github.com/hhb072/STViT",
            "license": "mit",
        },
        EVERY_STAGE,
    )
    for size, args in _SUPERTOKEN_SIZES.items()
    for pixels in (224, 384)
}

# -- LookupViT (2407.12753) -------------------------------------------------------------------------------------
LOOKUPVIT: dict[str, Variant] = {}

# -- SiT (2111.12624) -------------------------------------------------------------------------------------------
SIT: dict[str, Variant] = {}

# -- CAS-ViT (2408.03703) ---------------------------------------------------------------------------------------
# Tianfang-Zhang/CAS-ViT@041d2d6 (MIT), classification/model/rcvit.py; drop_path_rate is left at 0, the training used
# 0.1. Evaluation (classification/data/datasets.py) resizes to 256 for 224 and warps the whole image to 384.
_CASVIT_SIZES: dict[str, dict[str, Any]] = {
    "xs": {"dims": (48, 56, 112, 220), "depths": (2, 2, 4, 2)},
    "s": {"dims": (48, 64, 128, 256), "depths": (3, 3, 6, 3)},
    "m": {"dims": (64, 96, 192, 384), "depths": (3, 3, 6, 3)},
    "t": {"dims": (96, 128, 256, 512), "depths": (3, 3, 6, 3)},
}
CASVIT: dict[str, Variant] = {
    f"casvit_{size}_{pixels}": Variant(
        CASViT,
        args,
        f"CAS-ViT-{size.upper()} of 2408.03703, Tianfang-Zhang/CAS-ViT@041d2d6 classification/model/rcvit.py, for "
        f"{pixels} pixels",
        PYRAMID
        | {
            "input_size": (3, pixels, pixels),
            "pool_size": (pixels // 32, pixels // 32),
            "crop_pct": 0.875 if pixels == 224 else 1.0,
            "crop_mode": "center" if pixels == 224 else "squash",
            "first_conv": "stem.0.conv",
            "classifier": ("head.fc", "head.fc_dist"),
            "paper_ids": "arXiv:2408.03703",
            "origin_url": "https://github.com/Tianfang-Zhang/CAS-ViT",
            "license": "mit",
        },
        EVERY_STAGE,
    )
    for size, args in _CASVIT_SIZES.items()
    for pixels in (224, 384)
}

VARIANTS: dict[str, Variant] = STVIT | STVIT_SWIN | SUPERTOKEN | LOOKUPVIT | SIT | CASVIT

default_cfgs = generate_default_cfgs({name: _cfg(**variant.cfg) for name, variant in VARIANTS.items()})


def _own_names(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights of an official or own file under the model's names; timm calls this while it loads a checkpoint."""
    return model.adapt_state_dict(official_state_dict(state_dict)[0])[0]


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    variant = VARIANTS[name]
    feature_cfg = {"out_indices": kwargs.pop("out_indices", variant.out_indices), "feature_cls": "getter"}
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
