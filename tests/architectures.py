"""Small models of every architecture, built through their registered names."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

# Registered name and the arguments that make it small; the key names the case in the tests.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
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
# Side lengths, (H, W), the small model is built for, and another that set_input_size changes it to.
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "sit": ((112, 80), (75, 130)),
    "sit_6c": ((75, 64), (96, 48)),
    "sit_dense": ((64, 48), (48, 81)),
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
