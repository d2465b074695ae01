"""timm's builder for the models of this package: keywords are recorded, and unknown ones named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from timm.models import build_model_with_cfg
from torch import nn

from effvit.hosts.feature_pyramid import feature_settings
from effvit.hosts.refusals import name_arguments
from effvit.hosts.surface import record_args

__all__ = ["build_model"]


def build_model(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    given: Mapping[str, object],
    defaults: Mapping[str, object] | None = None,
    out_indices: int | Sequence[int] = 3,
    **options: object,
) -> nn.Module:
    """The model of a registered name, which tells the keywords it was made with (``record_args``).

    Args:
        model_class: Its class.
        name: The registered name.
        pretrained: Load timm's weights of that name.
        given: Keywords of the caller.
        defaults: Keywords of that name, which those given replace.
        out_indices: Default of ``features_only``.
        options: Of timm's ``build_model_with_cfg``.

    Raises:
        TypeError: A keyword that the class does not have.
    """
    defaults, kwargs = defaults or {}, dict(given)
    feature_cfg = feature_settings(kwargs, out_indices)
    with name_arguments(name, defaults.keys()):
        model: nn.Module = build_model_with_cfg(
            model_class, name, pretrained, feature_cfg=feature_cfg, **options, **{**defaults, **kwargs}
        )
    record_args(model, given)
    return model
