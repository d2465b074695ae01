"""The zoo's names for ``timm.create_model``: method first, then the timm host, from one table."""

from __future__ import annotations

import fnmatch
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import timm
from timm.models import build_model_with_cfg, get_arch_pretrained_cfgs, model_entrypoint, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from torch import nn

from effvit.architectures import variants
from effvit.hosts import illama, lvvit, naflex, relpos, towers, vit_nano
from effvit.hosts.checkpoints import host_state_dict
from effvit.hosts.feature_pyramid import feature_settings
from effvit.hosts.host import WINDOW_CLASSES, check_model_name, check_settings, sparsify
from effvit.hosts.published_settings import PUBLISHED
from effvit.hosts.refusals import name_arguments
from effvit.hosts.surface import SPARSIFIED, Reduced, record_args, record_name
from effvit.hosts.windows import window_methods
from effvit.protocols import Setting
from effvit.reducers import METHODS, Reducer
from effvit.reducers.registry import on_registration

__all__ = ["list_models", "register_pyramid"]

CLASS_TOKEN_HOSTS = (
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
    "deit_base_patch16_384",
    "deit3_base_patch16_384",
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(f"vit_{size}_patch16_384" for size in ("tiny", "small", "base", "large")),
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_224",
    *(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")),
    *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large")),
    *(f"vit_{size}_patch16_dinov3" for size in ("small", "base", "large")),
    *(f"eva02_{size}_patch14_336" for size in ("tiny", "small")),
    "eva02_base_patch14_448",
    "eva02_large_patch14_448",
    *relpos.CLASS_TOKEN_HOSTS,
    "lvvit_small_patch16_224",
    "lvvit_medium_patch16_224",
    *(f"illama_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(f"illama_{size}_patch16_384" for size in ("base", "large")),
    *naflex.CLASS_TOKEN_HOSTS,
)
NO_CLASS_TOKEN_HOSTS = (
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_384",
    "vit_so400m_patch14_siglip_384",
    "vit_medium_patch16_gap_256",
    *relpos.NO_CLASS_TOKEN_HOSTS,
    *towers.NAMES,
    *naflex.NO_CLASS_TOKEN_HOSTS,
)
WIDER = ((16, 256), (24, 384))  # windows and pixels of Swin V2 behind its pretraining at 12 and 192
PYRAMID_HOSTS = (
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")),
    *(f"swin_{size}_patch4_window12_384" for size in ("base", "large")),
    *(f"swinv2_{size}_window{window}_256" for size in ("tiny", "small", "base") for window in (8, 16)),
    *(f"swinv2_{size}_window12to{window}_192to{pixels}" for size in ("base", "large") for window, pixels in WIDER),
    *(f"hiera_{size}_224" for size in ("tiny", "small", "base", "base_plus", "large", "huge")),
    *(f"hiera_{size}_abswin_256" for size in ("small", "base")),
    *(f"sam2_hiera_{size}" for size in ("tiny", "small", "base_plus", "large")),
    "hieradet_small",
)
WINDOW_HOSTS = (
    *(f"samvit_{size}_patch16" for size in ("base", "large", "huge")),
    "samvit_base_patch16_224",
    *PYRAMID_HOSTS,
)
HOST_KEYWORDS = {name for host in WINDOW_CLASSES for name in inspect.signature(host).parameters}
"""Keywords of hosts with windows, of which ``window_size`` is a setting of Expedite too."""
default_cfgs: dict[str, DefaultCfg] = {}
_PYRAMIDS: dict[str, dict[str, object]] = {}  # names that register_pyramid made, and their settings


def _host_cfgs(host: str, variant: str) -> DefaultCfg:
    """The host's pretrained configurations under the variant's name: same tags, same weights."""
    cfgs = {}
    for name, cfg in get_arch_pretrained_cfgs(host).items():
        tag = name.partition(".")[2]
        cfgs[tag] = replace(cfg, architecture=variant)
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _create(
    variant: str,
    cfg: PretrainedCfg,
    host: str,
    method: str,
    recover: str | None,
    settings: Mapping[str, Setting],
    pretrained: bool,
    **kwargs: object,
) -> nn.Module:
    """A host of timm with a method, through timm's own builders.

    Args:
        variant: The name timm knows the model by.
        cfg: Its pretrained configuration.
        host: timm's name of the host, without tag.
        method: One of ``effvit.list_methods()``.
        recover: As for ``sparsify``.
        settings: Settings of the method.
        pretrained: Load the weights of the configuration.
        kwargs: Keywords of the host and of ``build_model_with_cfg``.
    """
    # A folder of ``save_for_hf``, or the file of a model that learns, may hold more than the host: load it at the end.
    saved = cfg.source in ("hf-hub", "local-dir")
    behind = saved or METHODS[method].learns or recover == "attention"
    strict = saved or "siglip" not in host or kwargs.get("global_pool", "map") == "map"  # timm's rule for SigLIP
    loading = {name: kwargs.pop(name) for name in ("cache_dir", "pretrained_model_args") if name in kwargs}
    args = dict(kwargs)
    feature_cfg = feature_settings(kwargs, out_indices=(0, 1, 2, 3) if host in PYRAMID_HOSTS else 3)

    def reduced_host(**host_kwargs: object) -> nn.Module:
        as_timm = pretrained and not behind
        dense: nn.Module = model_entrypoint(host)(pretrained=as_timm, pretrained_cfg=cfg, **loading, **host_kwargs)
        record_args(dense, args)
        reduced = sparsify(dense, method, recover=recover, share=True, **settings)
        reduced.host_name = host
        return reduced

    model: nn.Module = build_model_with_cfg(
        reduced_host,
        variant,
        pretrained=pretrained and behind,
        pretrained_cfg=cfg,
        pretrained_filter_fn=host_state_dict,
        pretrained_strict=strict,
        feature_cfg=feature_cfg,
        **loading,
        **kwargs,
    )
    if isinstance(model, Reduced):
        record_name(model)
    return model


def _entry_point(
    method: str, host: str, variant: str, published: Mapping[str, Setting] | None = None
) -> Callable[..., nn.Module]:
    """What timm calls for a name; ``published`` are settings of its own, which keywords may change."""

    def create(pretrained: bool = False, *, recover: str | None = None, **kwargs: Any) -> nn.Module:
        own = METHODS[method].defaults().keys()
        foreign = {name for other in METHODS.values() for name in other.defaults()} - own - HOST_KEYWORDS
        check_settings(method, {name: value for name, value in kwargs.items() if name in foreign})
        settings: dict[str, Setting] = {**(published or {}), **{name: kwargs.pop(name) for name in own & kwargs.keys()}}
        cfg = _resolved_cfg(variant, kwargs)
        with name_arguments(variant, {*own, "recover"}):
            return _create(variant, cfg, host, method, recover, settings, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"{host} with {METHODS[method].name}: {METHODS[method].summary}."
    return create


def _resolved_cfg(variant: str, kwargs: dict[str, object]) -> PretrainedCfg:
    """timm's pretrained configuration of a name; takes the keywords it follows from out of ``kwargs``."""
    own = {name: kwargs.pop(name, None) for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
    return resolve_pretrained_cfg(variant, **own)


class Recipe(NamedTuple):
    """How a model without a name of its own is made; ``host`` may hold a tag."""

    host: str
    method: str
    recover: str | None
    settings: Mapping[str, Setting]


def _take_recipe(kwargs: dict[str, object]) -> Recipe:
    """The keywords of a recipe, taken out of ``kwargs``; what stays there is the host's.

    Raises:
        ValueError: No host or method, or an unknown one; a setting that the method does not have.
        TypeError: A value of another type, or a setting beside the dict of them.
    """
    names = [name for name in ("host", "method", "recover", "settings") if name in kwargs]
    for name in ("host", "method"):
        if kwargs.get(name) is None:
            raise ValueError(
                f"{SPARSIFIED!r} needs {name!r}; give host=, the name of a timm model, method=, settings=dict(...) and "
                "the keywords the host was made with"
            )
    words: dict[str, str] = {}
    settings: dict[str, Setting] = {}
    for name in names:
        value = kwargs.pop(name)
        if name == "settings" and isinstance(value, dict):
            settings = value
        elif name != "settings" and isinstance(value, str):
            words[name] = value
        else:
            wanted = "a dict of the method's settings" if name == "settings" else "a string"
            raise TypeError(f"{SPARSIFIED!r} takes {name} as {wanted}, got {value!r}")
    recipe = Recipe(words["host"], words["method"], words.get("recover"), settings)
    check_model_name(recipe.host)
    if recipe.host == SPARSIFIED:
        raise ValueError(f"host must name the model to reduce, got {SPARSIFIED!r}, which is one reduced already")
    check_settings(recipe.method, settings)
    beside = sorted((METHODS[recipe.method].defaults().keys() & kwargs.keys()) - HOST_KEYWORDS)
    if beside:
        raise TypeError(
            f"{SPARSIFIED!r} takes the settings of {recipe.method} as a dict, got {', '.join(beside)} beside it; give "
            f"settings=dict({', '.join(f'{name}=...' for name in beside)})"
        )
    return recipe


@register_model
def sparsified(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """Any host of timm with any method, for folders of timm's ``save_for_hf`` whose model has no name of its own.

    Args:
        pretrained: Load the weights of the folder, or those of the host.
        kwargs: ``host``, the name of a timm model (a tag may follow), ``method``, ``recover`` and ``settings`` as for
            ``effvit.sparsify``, and keywords of the host.

    Raises:
        ValueError: No host or method; or as ``effvit.sparsify``.
        TypeError: One of them of another type, or a keyword that the host does not have.
    """
    recipe = _take_recipe(kwargs)
    host, _, tag = recipe.host.partition(".")
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or tag or None
    cfg = replace(_resolved_cfg(host, kwargs), architecture=SPARSIFIED)
    with name_arguments(f"{SPARSIFIED} {host}", Recipe._fields):
        return _create(SPARSIFIED, cfg, host, recipe.method, recipe.recover, recipe.settings, pretrained, **kwargs)


def _register_names(method: type[Reducer]) -> None:
    """Names for ``timm.create_model``: the method with each of the hosts it can have."""
    hosts = CLASS_TOKEN_HOSTS + (() if method.needs_class_token else NO_CLASS_TOKEN_HOSTS)
    hosts += WINDOW_HOSTS if method.name in window_methods() else ()
    variants = {f"{method.name}_{host}": host for host in hosts}
    taken = next((variant for variant in variants if timm.is_model(variant)), None)
    if taken is not None:
        raise ValueError(f"timm knows a model {taken!r} already; give the method {method.name!r} another name")
    for variant, host in variants.items():
        default_cfgs[variant] = _host_cfgs(host, variant)
        globals()[variant] = register_model(_entry_point(method.name, host, variant))  # listed in __all__ by timm


on_registration(_register_names)
for _name, _named in PUBLISHED.items():
    default_cfgs[_name] = _host_cfgs(_named.host, _name)
    globals()[_name] = register_model(_entry_point(_named.method, _named.host, _name, _named.settings))


def register_pyramid(name: str, **settings: object) -> str:
    """Register ``<name>_pyramid`` with timm: the model whose ``features_only`` is a pyramid at strides 4 to 32.

    For libraries that create an encoder from its name alone, such as segmentation_models.pytorch:
    ``smp.Unet("tu-" + effvit.register_pyramid("evit_deit_small_patch16_224", keep_rate=0.5))``.

    Args:
        name: A model of this package at patch size 16.
        settings: Keywords the model is always created with.

    Returns:
        The new name. Registering the same again changes nothing.

    Raises:
        ValueError: A name this package does not have, or one registered with other settings.
    """
    if name not in list_models():
        raise ValueError(f"{name!r} is not a model of effvit, see effvit.list_models()")
    variant = f"{name}_pyramid"
    if variant in _PYRAMIDS:
        if _PYRAMIDS[variant] != settings:
            raise ValueError(f"{variant} is registered already, with the settings {_PYRAMIDS[variant]}")
        return variant

    def create(pretrained: bool = False, **kwargs: object) -> nn.Module:
        if kwargs.get("features_only", False):
            kwargs.setdefault("pyramid", True)
        return model_entrypoint(name)(pretrained=pretrained, **(settings | kwargs))

    create.__name__ = create.__qualname__ = variant
    default_cfgs[variant] = _host_cfgs(name, variant)
    globals()[variant] = register_model(create)
    _PYRAMIDS[variant] = settings
    return variant


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's models that match a shell-style pattern.

    ``sparsified`` is not among them: timm lists it, but it makes a model only together with a host and a method.
    """
    own = {*default_cfgs, *lvvit.default_cfgs, *illama.default_cfgs, *vit_nano.default_cfgs, *variants.default_cfgs}
    return [name for name in timm.list_models() if name in own and fnmatch.fnmatch(name, pattern)]
