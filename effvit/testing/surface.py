"""What the contracts ask of a model, as types: timm's own classes have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, overload

from torch import Tensor, nn

from effvit.hosts.feature_pyramid import StageInfo
from effvit.protocols import PatchEmbedding, Setting, Size

__all__ = ["Backbone", "MakeModel", "MapModel", "MapsInfo", "PretrainedCfg"]


class PretrainedCfg(TypedDict):
    """What is asked of timm's configuration of a model."""

    architecture: str
    classifier: str | tuple[str, ...]
    first_conv: str


class MakeModel(Protocol):
    """A class, or a function that makes a model."""

    def __call__(self, **settings: Setting) -> nn.Module: ...


class Backbone(nn.Module):
    """A model of timm's kind; for annotations alone, as is ``MapModel``."""

    cls_token: Tensor | None
    patch_embed: PatchEmbedding
    pretrained_cfg: PretrainedCfg
    feature_info: list[StageInfo]
    num_classes: int
    num_features: int
    head_hidden_size: int

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

        def forward_features(self, x: Tensor) -> Tensor: ...

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...

        @overload
        def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            *,
            intermediates_only: Literal[True],
            stop_early: bool = False,
            norm: bool = False,
        ) -> list[Tensor]: ...

        @overload
        def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]: ...

        def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            *,
            intermediates_only: bool = False,
            stop_early: bool = False,
            norm: bool = False,
        ) -> list[Tensor] | tuple[Tensor, list[Tensor]]: ...

        def set_input_size(self, img_size: Size) -> None: ...

        def set_grad_checkpointing(self, enable: bool = True) -> None: ...

        def reset_classifier(self, num_classes: int) -> None: ...


class MapsInfo(Protocol):
    """``feature_info`` of a model made with ``features_only``."""

    def channels(self) -> list[int]: ...

    def reduction(self) -> list[int]: ...


class MapModel(Protocol):
    """A model made with ``features_only``: dense maps alone."""

    feature_info: MapsInfo

    def __call__(self, x: Tensor) -> list[Tensor]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
