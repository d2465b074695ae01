"""Types that the parts of the package agree on: plain settings, and what is expected of a module without knowing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

__all__ = ["Json", "Layer", "PatchEmbedding", "Setting", "Settings", "Size"]

Size: TypeAlias = tuple[int, int]
"""(H, W), in pixels or in patches."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What a JSON file holds."""

Setting: TypeAlias = "bool | int | float | str | Sequence[Setting] | Mapping[str, Setting] | None"
"""The value of one setting of a method or model: JSON-plain, sequences and mappings of any kind."""

Settings: TypeAlias = dict[str, Setting]


class Layer(Protocol):
    """A module from one tensor to one."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class PatchEmbedding(Protocol):
    """What is asked of timm's ``PatchEmbed``."""

    img_size: Size | None
    patch_size: Size
    grid_size: Size
    num_patches: int

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """(H, W) patch grid of images of another size."""
        ...
