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
from effvit.models.stvit import STViT

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
# The size of a DeiT; 4 base, 2 STGM and 6 semantic layers on 4 x 4 tokens, STViT's defaults. No weights are public.
STVIT: dict[str, Variant] = {
    f"stvit_deit_{size}_patch16_224": Variant(
        model=STViT,
        args={"patch_size": 16, "embed_dim": embed_dim, "depth": 12, "num_heads": num_heads},
        source=f"STViT on DeiT-{size[0].upper()} with 16 semantic tokens (2303.08685, table 1 and supplement A.1)",
        cfg=COLUMN | {"paper_ids": "arXiv:2303.08685"},
    )
    for size, embed_dim, num_heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
}

# -- STViT and STViT-R on Swin (2303.08685) ---------------------------------------------------------------------
STVIT_SWIN: dict[str, Variant] = {}

# -- super-token SViT (2211.11167) ------------------------------------------------------------------------------
SUPERTOKEN: dict[str, Variant] = {}

# -- LookupViT (2407.12753) -------------------------------------------------------------------------------------
LOOKUPVIT: dict[str, Variant] = {}

# -- SiT (2111.12624) -------------------------------------------------------------------------------------------
SIT: dict[str, Variant] = {}

# -- CAS-ViT (2408.03703) ---------------------------------------------------------------------------------------
CASVIT: dict[str, Variant] = {}

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
