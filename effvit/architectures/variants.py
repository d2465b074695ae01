"""The architectures with weights of their own: one table of sizes, and their names in timm.

Each row gives the class, the arguments of the size and where they are from. Those whose official weights lie on the
Hugging Face Hub have them as timm's tags; of others ``effvit.load_checkpoint`` reads the official files from a path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from effvit.architectures.casvit import CASViT
from effvit.architectures.lookupvit import LookupViT
from effvit.architectures.sit import SiT
from effvit.architectures.stvit import STViT
from effvit.architectures.stvit_swin import STViTSwin
from effvit.architectures.supertoken import SuperTokenViT
from effvit.hosts._builder import build_model
from effvit.hosts.checkpoints import official_state_dict
from effvit.hosts.surface import model_cfg
from effvit.protocols import Setting, Settings

__all__ = ["VARIANTS", "Variant"]


class AdaptsWeights(Protocol):
    """A model that puts weights of official files under its own names."""

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights under the model's names, and the names of those dropped."""
        ...


class Variant(NamedTuple):
    """One size.

    Attributes:
        model: The class.
        args: Its constructor arguments.
        source: Where the size is from.
        cfg: Entries of timm's pretrained configuration that differ from ``model_cfg``.
        out_indices: Default of ``features_only``.
        weights: Tag -> entries of timm's pretrained configuration that say where its weights are; none are known to be
            on a hub if empty.
    """

    model: type[nn.Module]
    args: Settings
    source: str
    cfg: Settings
    out_indices: int | tuple[int, ...] = 3
    weights: Mapping[str, Settings] = {}


PYRAMID: Settings = {"pool_size": (7, 7), "classifier": "head.fc"}
COLUMN: Settings = {"fixed_input_size": True, "first_conv": "patch_embed.proj"}
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
# Swin's three sizes. Official weights of S and B are on Hugging Face (csncsn/STViT-R); T is used in the paper alone.
SWIN: dict[str, Settings] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
SWIN_CFG: Settings = PYRAMID | {
    "first_conv": "stem.conv1.conv",
    "paper_ids": "arXiv:2303.08685",
    "origin_url": "https://github.com/changsn/STViT-R",
    "license": "mit",
}
# The README of changsn/STViT-R links to both files.
STVIT_R_WEIGHTS: dict[str, Mapping[str, Settings]] = {
    size: {"in1k": {"hf_hub_id": "csncsn/STViT-R", "hf_hub_filename": f"STViT-R-Swin-{size[0].upper()}.pth"}}
    for size in ("small", "base")
}
DENSE: Settings = {"key_windows": "dense", "shortcut": True, "shift_small": True, "out_norm": True}
STVIT_SWIN: dict[str, Variant] = {
    **{
        f"stvit_r_swin_{size}_patch4_window7_224": Variant(
            model=STViTSwin,
            args=args,
            source=f"STViT-R on Swin-{size[0].upper()}, changsn/STViT-R@b4a27a0 (2303.08685, table 3)",
            cfg=SWIN_CFG,
            out_indices=EVERY_STAGE,
            weights=STVIT_R_WEIGHTS.get(size, {}),
        )
        for size, args in SWIN.items()
    },
    **{
        f"stvit_r_swin_{size}_patch4_window7_dense": Variant(
            model=STViTSwin,
            args=args | DENSE | {"num_classes": 0},
            source=f"STViT-R on Swin-{size[0].upper()} as a dense backbone, "
            "changsn/STViT-R-Object-Detection@8b8eb1e (2303.08685, table 5)",
            cfg=SWIN_CFG
            | {
                "input_size": (3, 800, 1280),
                "pool_size": None,
                "num_classes": 0,
                "origin_url": "https://github.com/changsn/STViT-R-Object-Detection",
            },
            out_indices=EVERY_STAGE,
        )
        for size, args in SWIN.items()
    },
    **{
        f"stvit_swin_{size}_patch4_window7_224": Variant(
            model=STViTSwin,
            args=args | {"recovery": False, "stem": "patch", "shortcut": True, "use_global": True},
            source=f"STViT on Swin-{size[0].upper()} with 9 tokens a window, wiring ours (2303.08685, table 2)",
            cfg=SWIN_CFG | {"first_conv": "stem.proj", "pool_size": (3, 3), "fixed_input_size": True},
            out_indices=EVERY_STAGE,
        )
        for size, args in SWIN.items()
    },
}

# -- super-token SViT (2211.11167) ------------------------------------------------------------------------------
# hhb072/STViT@c9ed9a4, models/stvit.py (MIT by its header) and README; drop_path_rate is left at 0, the trainings
# used 0.1 (S), 0.4 (B) and 0.6 (L). Evaluation resizes to 256 for 224 and does not crop at 384.
_SUPERTOKEN_SIZES: dict[str, Settings] = {
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
# The shapes of ViT-B/16 and ViT-L/16; no official code or file is public. S/16 is ours, for small experiments.
LOOKUPVIT_CFG = COLUMN | {"classifier": ("head", "head_lookup"), "paper_ids": "arXiv:2407.12753"}
LOOKUPVIT: dict[str, Variant] = {
    "lookupvit_small_patch16_224": Variant(
        LookupViT, {"embed_dim": 384, "depth": 12, "num_heads": 6}, "shape of ViT-S/16, ours", LOOKUPVIT_CFG
    ),
    "lookupvit_base_patch16_224": Variant(
        LookupViT, {"embed_dim": 768, "depth": 12, "num_heads": 12}, "shape of ViT-B/16 (2407.12753)", LOOKUPVIT_CFG
    ),
    "lookupvit_large_patch16_224": Variant(
        LookupViT,
        {"embed_dim": 1024, "depth": 24, "num_heads": 16},
        "shape of ViT-L/16 (2407.12753)",
        LOOKUPVIT_CFG,
    ),
}


# -- SiT (2111.12624) -------------------------------------------------------------------------------------------
def _lvvit(embed_dim: int, depth: int, stage_blocks: list[int] | None = None) -> Settings:
    heads: Settings = {"num_heads": embed_dim // 64, "mlp_ratio": 3.0, "qkv_bias": False}
    sizes: Settings = {"img_size": 224, "embed_dim": embed_dim, "depth": depth, "stage_blocks": stage_blocks}
    return sizes | heads


SIT_CFG: Settings = COLUMN | {
    "first_conv": "patch_embed.proj.0.conv",
    "crop_pct": 0.875,  # datasets.py@f577808 resizes to 256/224 of the input size
    "paper_ids": "arXiv:2111.12624",
    "origin_url": "https://github.com/Sense-X/SiT",
    "license": "apache-2.0",  # the text of its LICENSE file; its README says MIT
}
SIT_CFG_288: Settings = SIT_CFG | {"input_size": (3, 288, 288)}
LVVIT_LARGE: Settings = {"stem": "6c", "skip_lam": 3.0, "img_size": 288}
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
        SiT, _lvvit(768, 24, [10, 4, 3, 7]) | LVVIT_LARGE, "SiT-L of README@f577808, 147.4 M parameters", SIT_CFG_288
    ),
    "lvvit_tiny_4c_224": Variant(SiT, _lvvit(320, 14), "LV-ViT-T, dense teacher of SiT-T", SIT_CFG),
    "lvvit_small_4c_224": Variant(SiT, _lvvit(384, 16), "LV-ViT-S, dense teacher of SiT-XS and SiT-S", SIT_CFG),
    "lvvit_medium_4c_224": Variant(SiT, _lvvit(512, 20), "LV-ViT-M, dense teacher of SiT-M", SIT_CFG),
    "lvvit_large_6c_288": Variant(SiT, _lvvit(768, 24) | LVVIT_LARGE, "LV-ViT-L, dense teacher of SiT-L", SIT_CFG_288),
}

# -- CAS-ViT (2408.03703) ---------------------------------------------------------------------------------------
# Tianfang-Zhang/CAS-ViT@041d2d6 (MIT), classification/model/rcvit.py; drop_path_rate is left at 0, the training used
# 0.1. Evaluation (classification/data/datasets.py) resizes to 256 for 224 and warps the whole image to 384.
_CASVIT_SIZES: dict[str, Settings] = {
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

default_cfgs = generate_default_cfgs(
    {
        f"{name}.{tag}" if tag else name: model_cfg(**(variant.cfg | source))
        for name, variant in VARIANTS.items()
        for tag, source in (variant.weights or {"": {}}).items()
    }
)


def _own_names(state_dict: dict[str, Tensor], model: AdaptsWeights) -> dict[str, Tensor]:
    """Weights of an official or own file under the model's names; timm calls this while it loads a checkpoint."""
    return model.adapt_state_dict(official_state_dict(state_dict)[0])[0]


def _create(name: str, pretrained: bool = False, **kwargs: Setting) -> nn.Module:
    variant = VARIANTS[name]
    if "recover" in kwargs:
        raise ValueError(
            f"{name} has no setting 'recover': no patch is dropped, so its maps are full as they are; leave it out"
        )
    return build_model(
        variant.model,
        name,
        pretrained,
        kwargs,
        variant.args,
        variant.out_indices,
        pretrained_filter_fn=_own_names,
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Setting) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{VARIANTS[name].model.__name__}: {VARIANTS[name].source}."
    return create


for _name in VARIANTS:
    globals()[_name] = register_model(_entry_point(_name))  # listed in __all__ by timm
