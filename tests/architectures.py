"""Small models of every architecture, built through their registered names."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

# Registered name and the arguments that make it small; the key names the case in the tests.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {}
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
# Side lengths, (H, W), the small model is built for, and another that set_input_size changes it to.
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
SIZES |= {
    "lookupvit": ((40, 56), (72, 24)),
    "lookupvit_softmax": ((48, 48), (56, 40)),
    "lookupvit_normalized": ((64, 48), (48, 48)),
    "lookupvit_dynamic": ((48, 32), (40, 72)),
}


def make_architecture(case: str, **kwargs: Any) -> nn.Module:
    """A small model with weights far enough from their initialisation that tokens differ."""
    name, small = SMALL[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **({"num_classes": 7} | small | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter.ndim) ** 0.5)
    return model


def make_images(case: str, batch: int = 2, resized: bool = False) -> Tensor:
    return torch.randn(batch, 3, *SIZES[case][int(resized)], generator=torch.Generator().manual_seed(1))
