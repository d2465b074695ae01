"""Models and their reduced variants, as users name them: a name, a method, KEY=VALUE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product

import timm
from torch import nn

import effvit
from effvit.hosts.host import check_model_name
from effvit.hosts.surface import Reduced
from effvit.measure.json_files import parse_json
from effvit.measure.selections import Exit, Selecting, Views, list_selections
from effvit.measure.values import Candidate
from effvit.messages import plain, shown
from effvit.protocols import Setting, Settings
from effvit.selectors import SELECTORS
from effvit.selectors.base import Keep

__all__ = [
    "build",
    "check_dense",
    "list_all",
    "list_variants",
    "parse_setting",
    "python_line",
    "reduce_by",
    "reduced",
    "selector_line",
    "timm_line",
]


def parse_setting(text: str, option: str = "--set") -> tuple[str, Setting]:
    """("key", value) of "key=value" with the value in JSON; errors name the option it was given to."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{option} takes KEY=VALUE, e.g. r=8, got {text!r}")
    try:
        return key, parse_json(value)
    except ValueError as error:
        raise ValueError(
            f"{option} {plain(text)}: {shown(value)} is not JSON ({plain(error)}); write numbers as r=8, lists as "
            f"reduce_at=[3,6,9], true, false, null, and text in double quotes: '{key}=\"...\"'"
        ) from error


def list_variants(methods: Sequence[str], assignments: Sequence[tuple[str, Setting]]) -> list[tuple[str, Settings]]:
    """(method, settings) for every method and combination of values of the settings it has.

    Raises:
        ValueError: Settings without a method, an unknown method, or a setting that none of them has.
    """
    if assignments and not methods:
        raise ValueError("settings belong to a method: name one with --method")
    values: dict[str, list[Setting]] = {}
    for key, value in assignments:
        values.setdefault(key, []).append(value)
    taken = {method: [key for key in values if key in effvit.method_settings(method)] for method in methods}
    for key in values:
        if not any(key in keys for keys in taken.values()):
            known = "; ".join(f"{method} takes {', '.join(effvit.method_settings(method))}" for method in methods)
            raise ValueError(f"no method named here has a setting {key!r}: {known}")
    return [
        (method, dict(zip(keys, combination, strict=True)))
        for method, keys in taken.items()
        for combination in product(*(values[key] for key in keys))
    ]


def list_all(
    methods: Sequence[str],
    selectors: Sequence[str],
    keeps: Sequence[Keep],
    assignments: Sequence[tuple[str, Setting]],
    views: Views | None = None,
    untrained: bool = False,
) -> tuple[list[tuple[str, Settings]], list[Selecting]]:
    """``list_variants`` and ``list_selections``, whose settings are given together: a setting goes to all that have it.

    Raises:
        ValueError: As both, or a setting that neither a method nor a selector has.
    """
    selections = list_selections(selectors, keeps, assignments, views, untrained)
    taken = {key for selector in selectors for key in SELECTORS[selector].defaults()}
    of_methods = {key for method in methods for key in effvit.method_settings(method)}
    others = [item for item in assignments if item[0] in of_methods or item[0] not in taken]
    if others and selectors and not methods:
        known = "; ".join(f"{name} takes {', '.join(SELECTORS[name].defaults()) or 'none'}" for name in selectors)
        raise ValueError(f"no selector named here has a setting {others[0][0]!r}: {known}")
    return list_variants(methods, others), selections


def check_dense(model: nn.Module) -> None:
    """Raise a ValueError for a model that is reduced already."""
    if isinstance(model, Reduced):
        raise ValueError(
            f"the model is reduced by {model.method} already, so that there is no dense model to compare with; give "
            f"its host{f', {model.host_name}' if model.host_name else ''}"
        )


def reduced(host: nn.Module, variants: Sequence[tuple[str, Settings]]) -> dict[str, Reduced]:
    """Name -> the host with that method and those settings; a ValueError for variants of a model reduced already."""
    if variants:
        check_dense(host)
    models: dict[str, Reduced] = {}
    for method, settings in variants:
        name = " ".join([method, *(f"{key}={value}" for key, value in settings.items())])
        models[name] = reduce_by(host, method, settings)
    return models


def reduce_by(host: nn.Module, method: str, settings: Settings) -> Reduced:
    """The host with that method and those settings."""
    return effvit.sparsify(host, method, recover=None, share=True, **settings)


def python_line(host: str, options: Settings, method: str, settings: Settings) -> str:
    """The call that makes the reduced form of timm's model ``host``, created with ``options``."""
    dense = call("timm.create_model", [host], options)
    return f"effvit.sparsify({', '.join([dense, text_of(method), *keywords(settings)])})"


def selector_line(host: str, options: Settings, best: Candidate, leaving: Exit) -> str:
    """The call that makes a tower of timm's model ``host`` with the selector that was chosen."""
    *within, selector = best.method.split(" + ")
    tower = python_line(host, options, within[0], {}) if within else call("timm.create_model", [host], options)
    asked = {**leaving.of(selector).settings(), **best.settings}
    return f"effvit.TokenSelector({', '.join([tower, text_of(selector), *keywords(asked)])})"


def timm_line(host: str, options: Settings, method: str, settings: Settings) -> str | None:
    """The call of timm alone that makes the same model; None where this form of the host has no name."""
    name = f"{method}_{host}"
    if name.partition(".")[0] not in effvit.list_models():
        return None
    return call("timm.create_model", [name], {**options, **settings})


def call(function: str, texts: Sequence[str], options: Settings) -> str:
    """A call in Python."""
    return f"{function}({', '.join([*map(text_of, texts), *keywords(options)])})"


def keywords(settings: Settings) -> list[str]:
    """Settings as arguments of a call."""
    return [f"{name}={text_of(value) if isinstance(value, str) else value!r}" for name, value in settings.items()]


def text_of(text: str) -> str:
    """A text as Python has it, in double quotes."""
    return json.dumps(text)


def build(name: str, options: Mapping[str, Setting], pretrained: bool = False) -> nn.Module:
    """The named model; a ValueError for an unknown name, which names the nearest."""
    check_model_name(name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return model
    except Exception as error:  # downloads fail with the exceptions of several libraries
        if not pretrained and not isinstance(error, RuntimeError):
            raise
        raise ValueError(f"cannot create {name}: {error}") from error
