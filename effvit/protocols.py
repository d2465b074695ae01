"""Types that the parts of the package agree on: plain settings, and what is expected of a module without knowing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

__all__ = ["Device", "Factory", "Host", "HostBlocks", "Json", "Layer", "PatchEmbedding", "Setting", "Settings", "Size"]

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
