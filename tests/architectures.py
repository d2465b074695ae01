"""Small models of every architecture, built through their registered names."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

# Registered name and the arguments that make it small; the key names the case in the tests.
STVIT = {"embed_dim": 48, "num_heads": 3, "depth": 6, "num_base": 2, "semantic_grid": 3}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
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
}
# Side lengths, (H, W), the small model is built for, and another that set_input_size changes it to.
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "stvit": ((112, 80), (64, 176)),
    "stvit learned": ((64, 112), (80, 48)),
    "stvit recovery": ((64, 64), (48, 112)),
    "stvit dynamic": ((64, 64), (80, 112)),
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
