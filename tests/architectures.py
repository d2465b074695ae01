"""Small models of every architecture, built through their registered names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effvit.testing import SmallModel

# Registered name and the arguments that make it small; the key names the case in the tests.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {}
# Side lengths, (H, W), the small model is built for, and another that set_input_size changes it to.
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

LOOKUPVIT = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SMALL |= {
    # 2 x 3 compressed tokens of 5 x 7 patches: neither grid is square, and neither divides the other
    "lookupvit": (
        "lookupvit_small_patch16_224",
        LOOKUPVIT | {"img_size": (40, 56), "compressed_grid": (2, 3), "compressed_pos_grid": 4},
    ),
    "lookupvit_softmax": (
        "lookupvit_base_patch16_224",
        LOOKUPVIT
        | {"img_size": 48, "compressed_grid": 4, "infusion": "softmax", "infuse_proj": False, "antialias": False},
    ),
    "lookupvit_normalized": (
        "lookupvit_large_patch16_224",
        LOOKUPVIT | {"img_size": (64, 48), "infusion": "transpose_normalized", "lookup_mlp_ratio": 1.0},
    ),
    "lookupvit_dynamic": (
        "lookupvit_small_patch16_224",
        LOOKUPVIT | {"img_size": (48, 32), "dynamic_img_size": True, "compressed_grid": 3},
    ),
}
SIZES |= {
    "lookupvit": ((40, 56), (72, 24)),
    "lookupvit_softmax": ((48, 48), (56, 40)),
    "lookupvit_normalized": ((64, 48), (48, 48)),
    "lookupvit_dynamic": ((48, 32), (40, 72)),
}

STVIT = {"embed_dim": 48, "num_heads": 3, "depth": 6, "num_base": 2, "semantic_grid": 3}
# Without stochastic depth, whose nodes a trace of the training mode has and one of eval mode has not.
SWIN = {"drop_path_rate": 0.0, "embed_dim": 16, "depths": (1, 2, 6, 2), "num_heads": (1, 2, 2, 4)}
SMALL |= {
    "stvit": ("stvit_deit_tiny_patch16_224", STVIT | {"img_size": (112, 80)}),
    "stvit learned": (
        "stvit_deit_tiny_patch16_224",
        STVIT | {"img_size": (64, 112), "num_stgm": 3, "semantic_grid": [2, 3], "seed_pool": "learned"},
    ),
    "stvit recovery": (
        "stvit_deit_small_patch16_224",
        STVIT | {"img_size": 64, "num_stgm": 1, "use_global": False, "recovery": True, "init_values": 0},
    ),
    "stvit dynamic": ("stvit_deit_base_patch16_224", STVIT | {"img_size": 64, "dynamic_img_size": True}),
    "stvit_r_swin": ("stvit_r_swin_tiny_patch4_window7_224", SWIN),
    "stvit_r_swin tables": (
        "stvit_r_swin_small_patch4_window7_224",
        SWIN | {"window_size": 4, "use_global": True, "relative_pos": True, "shortcut": True, "img_size": (128, 96)},
    ),
    # out_norm has a norm for each map, of which the class scores use the last alone.
    "stvit_r_swin dense": (
        "stvit_r_swin_tiny_patch4_window7_dense",
        SWIN | {"depths": (1, 1, 12, 1), "use_conv_pos": True, "out_norm": False},
    ),
    "stvit_r_swin dense as released": (
        "stvit_r_swin_base_patch4_window7_dense",
        SWIN | {"mask_mode": "official", "window_size": 5, "seed_pool": "learned", "out_norm": False},
    ),
    "stvit_swin": ("stvit_swin_tiny_patch4_window7_224", SWIN | {"use_global": False}),
    "stvit_swin 16": (
        "stvit_swin_base_patch4_window7_224",
        SWIN | {"window_samples": 4, "img_size": (224, 96), "relative_pos": True},
    ),
}
SIZES |= {
    "stvit": ((112, 80), (64, 176)),
    "stvit learned": ((64, 112), (80, 48)),
    "stvit recovery": ((64, 64), (48, 112)),
    "stvit dynamic": ((64, 64), (80, 112)),
    "stvit_r_swin": ((130, 97), (31, 45)),
    "stvit_r_swin tables": ((128, 96), (100, 160)),
    "stvit_r_swin dense": ((96, 131), (31, 45)),
    "stvit_r_swin dense as released": ((128, 80), (112, 61)),
    "stvit_swin": ((131, 96), (31, 45)),
    "stvit_swin 16": ((224, 96), (160, 256)),
}

SUPERTOKEN = {"dims": (16, 24, 32, 40), "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 4), "projection": 48}
CASVIT = {"dims": (16, 24, 32, 40), "depths": (1, 2, 1, 1)}

SMALL |= {
    "supertoken": ("supertoken_small_224", SUPERTOKEN),
    "supertoken_options": (
        "supertoken_base_384",
        SUPERTOKEN
        | {
            "stoken_size": (4, (2, 3), 2, 1),
            "n_iter": (2, 1, 2, 1),
            "layerscale": (True, False, True, True),
            "init_values": 0.1,
            "qk_scale": 0.2,
            "qkv_bias": False,
        },
    ),
    "casvit": ("casvit_xs_224", CASVIT),
    "casvit_options": ("casvit_t_384", CASVIT | {"qkv_bias": True, "mlp_ratio": 2.5}),
}
SIZES |= {
    "supertoken": ((96, 64), (75, 101)),
    "supertoken_options": ((72, 104), (64, 129)),
    "casvit": ((96, 64), (75, 101)),
    "casvit_options": ((72, 104), (64, 129)),
}

SMALL |= {
    "sit": (
        "sit_lvvit_tiny_224",
        {"img_size": (112, 80), "embed_dim": 32, "depth": 5, "num_heads": 2, "stage_blocks": [1, 1, 1, 2]},
    ),
    "sit_6c": (
        "sit_lvvit_large_288",
        {"img_size": (75, 64), "embed_dim": 32, "depth": 4, "num_heads": 2, "stage_blocks": [3, 1]},
    ),
    "sit_dense": ("lvvit_tiny_4c_224", {"img_size": (64, 48), "embed_dim": 32, "depth": 3, "num_heads": 2}),
}
SIZES |= {
    "sit": ((112, 80), (75, 130)),
    "sit_6c": ((75, 64), (96, 48)),
    "sit_dense": ((64, 48), (48, 81)),
}


CASES = {case: SmallModel(name, small, *SIZES[case]) for case, (name, small) in SMALL.items()}


def make_architecture(case: str, **kwargs: Any) -> nn.Module:
    """A small model with weights far enough from their initialisation that tokens differ."""
    return CASES[case].make(**kwargs)


def make_images(case: str, batch: int = 2, resized: bool = False) -> Tensor:
    return CASES[case].images(batch, resized)
