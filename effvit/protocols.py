"""Types that the parts of the package agree on: plain settings, and what is expected of a module without knowing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "Device",
    "Factory",
    "Host",
    "HostBlocks",
    "Json",
    "Layer",
    "PatchEmbedding",
    "Setting",
    "Settings",
    "Size",
    "TakesViews",
    "check_views",
    "views_of",
]

Size: TypeAlias = tuple[int, int]
"""(H, W), in pixels or in patches."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What a JSON file holds."""

Setting: TypeAlias = "bool | int | float | str | Sequence[Setting] | Mapping[str, Setting] | None"
"""The value of one setting of a method or model: JSON-plain, sequences and mappings of any kind."""

Settings: TypeAlias = dict[str, Setting]

Device: TypeAlias = "torch.device | str | None"


class Factory(TypedDict):
    """Where and how a module makes its parameters: the keywords of torch's factories."""

    device: Device
    dtype: torch.dtype | None


class Layer(Protocol):
    """A module from one tensor to one."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class TakesViews(Protocol):
    """A model that takes several images (views, channels, H, W) as one: crops of an image, frames of a video."""

    views: int


def views_of(model: nn.Module) -> int:
    """How many images the model takes as one; 1 for a model that says nothing of it."""
    return model.views if isinstance(model, TakesViews) else 1


def check_views(images: int, views: int) -> None:
    """Raise a ValueError unless so many images are a multiple of those that a model takes as one."""
    if images % views:
        raise ValueError(
            f"the model takes {views} images as one, crops or frames, so that their number must be a multiple of it, "
            f"got {images}; leave out {images % views}, or give {views - images % views} more"
        )


class PatchEmbedding(Protocol):
    """What is asked of timm's ``PatchEmbed``."""

    img_size: Size
    patch_size: Size
    grid_size: Size
    num_patches: int
    dynamic_img_pad: bool

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""
        ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Its layers by name."""
        ...

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """(H, W) patch grid of images of another size."""
        ...


class Host(Protocol):
    """What a method may ask of the model it takes its place in, see ``Reducer.settle``."""

    @property
    def embed_dim(self) -> int:
        """Channels of a token."""
        ...

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        ...

    @property
    def blocks(self) -> HostBlocks:
        """The blocks, in order."""
        ...

    @property
    def patch_embed(self) -> PatchEmbedding:
        """The patch embedding, for the grid of its images."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, for their device and dtype."""
        ...


class HostBlocks(Protocol):
    """The blocks of a host, in order."""

    def __getitem__(self, i: int, /) -> nn.Module: ...

    def __len__(self) -> int: ...
