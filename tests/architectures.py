"""Small models of every architecture, built through their registered names."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

SUPERTOKEN = {"dims": (16, 24, 32, 40), "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 4), "projection": 48}
CASVIT = {"dims": (16, 24, 32, 40), "depths": (1, 2, 1, 1)}

# Registered name and the arguments that make it small; the key names the case in the tests.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
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
# Side lengths, (H, W), the small model is built for, and another that set_input_size changes it to.
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "supertoken": ((96, 64), (75, 101)),
    "supertoken_options": ((72, 104), (64, 129)),
    "casvit": ((96, 64), (75, 101)),
    "casvit_options": ((72, 104), (64, 129)),
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
