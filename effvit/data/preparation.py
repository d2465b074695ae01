"""Images as a model takes them: timm's data configuration of the model, and the transform that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypedDict

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from effvit.hosts.host import patch_embedding
from effvit.images import as_rgb
from effvit.protocols import Size

__all__ = ["DataConfig", "data_config", "image_transform", "load_images"]


class DataConfig(TypedDict):
    """What timm says of the images a model takes."""

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str


def data_config(model: nn.Module) -> DataConfig:
    """timm's data configuration of the model (mean, std, crop ...) with the input size the model has now."""
    config: DataConfig = resolve_model_data_config(model)
    img_size: Size | None = getattr(patch_embedding(model), "img_size", None)
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], *img_size)
    return config


def load_images(model: nn.Module, images: Iterable[Image.Image]) -> Tensor:
    """Images as the model takes them: resized, cropped and normalised, (B, 3, H, W); (B, 1, H, W) grey.

    Args:
        model: The model.
        images: Taken one after the other, so that those which are decoded on the way are not held together.
    """
    transform = image_transform(model)
    return torch.stack([transform(image) for image in images])


def image_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """What makes of an image, read as ``effvit.images`` says, what the model takes: (3, H, W), or (1, H, W) grey."""
    config = data_config(model)
    transform: Callable[[Image.Image], Tensor] = create_transform(**config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    return partial(_prepared, transform, mode)  # no closure: processes that read images are handed a copy


def _prepared(transform: Callable[[Image.Image], Tensor], mode: str, image: Image.Image) -> Tensor:
    return transform(as_rgb(image).convert(mode))
