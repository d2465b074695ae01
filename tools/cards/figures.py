"""The facts of every family joined with what was counted: the content of the cards."""

from __future__ import annotations

import inspect
import json
from typing import Any, NamedTuple

import timm
from compare_flops import COUNTED, PUBLISHED, build, key

from cards.facts import (
    ARCHITECTURES,
    BENCHMARKS,
    Result,
    belongs,
    configs,
    facts_of_all,
    method_of,
    native_size,
    read,
    results_here,
    results_of,
    size_words,
    words,
)
from cards.speeds import Speed, accuracies_of, profiles, speeds_of
from effvit.architectures.variants import VARIANTS
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers import METHODS

__all__ = ["MODELS", "Family", "Row", "count", "families", "settings_to_count"]

MODELS = BENCHMARKS / "models.json"
DEFAULT_HOSTS = tuple(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))


class Row(NamedTuple):
    """What a model with its settings costs at a size, and how well it classifies.

    Attributes:
        setting: Model, arguments and size in the form of published_flops.json, with other counts where there are any.
        parameters: Number of parameters.
        macs: Multiply-accumulates of one image.
        dense_macs: Those of the model it is made of or compared with; None without one.
        results: Its accuracies.
    """

    setting: dict[str, Any]
    parameters: int
    macs: int
    dense_macs: int | None
    results: list[Result]

    @property
    def is_default(self) -> bool:
        """Whether it is what the name alone gives, at a cost that does not depend on the image."""
        return "token_counts" not in self.setting and _is(self.setting, self.setting["model"], {})


class Family(NamedTuple):
    """One card: a method on its hosts, or an architecture in its sizes.

    Attributes:
        name: Name of the card.
        facts: The family's file in model_cards/data.
        rows: Its models, in the order they are shown.
        results: What they reach beside classification.
        speeds: Measured throughputs.
        configs: File of configs/ -> name of the backbone.
    """

    name: str
    facts: dict[str, Any]
    rows: list[Row]
    results: list[Result]
    speeds: list[Speed]
    configs: dict[str, str]


def _complete(model: str, args: dict[str, Any]) -> Any:
    """All arguments, defaults included and as JSON has them, so that equal models compare equal."""
    method = method_of(model)
    defaults: dict[str, Any] = {}
    if method is not None:
        defaults = METHODS[method].defaults()
    elif model in VARIANTS:
        parameters = inspect.signature(VARIANTS[model].model).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        defaults |= VARIANTS[model].args
    return json.loads(json.dumps(defaults | args, default=str))


def _is(setting: dict[str, Any], model: str, args: dict[str, Any]) -> bool:
    """Whether a setting is the model with these arguments at the size it is made for."""
    if setting["model"] != model or setting["size"] != native_size(model):
        return False
    return bool(_complete(model, setting["args"]) == _complete(model, args))


def settings_of(family: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Models to show: those of published_flops.json and of the facts, those with an accuracy, and every default."""
    listed = [setting for setting in read(PUBLISHED)["settings"] if belongs(setting["model"], family, facts)]
    listed += facts.get("models", [])
    wanted: list[tuple[str, dict[str, Any]]] = []
    if family not in METHODS:
        wanted += [(name, {}) for name in ARCHITECTURES if belongs(name, family, facts)]
    elif not METHODS[family].variable_length:  # else what the defaults cost depends on the image
        wanted += [(f"{family}_{host}", {}) for host in DEFAULT_HOSTS]
    wanted += [(result.model, result.settings) for result in results_of(family, facts) if result.classifies]
    for model, args in wanted:
        if not any(_is(setting, model, args) for setting in listed):
            named = words(args) or ("defaults" if family in METHODS else "")
            size = native_size(model)
            setting = ", ".join(filter(None, [named, size_words(size)]))
            listed.append({"model": model, "setting": setting, "args": args, "size": size})
    names = list(dict.fromkeys([*ARCHITECTURES, *(setting["model"] for setting in listed)]))
    return sorted(listed, key=lambda setting: (names.index(setting["model"]), bool(setting["args"])))


def dense_of(setting: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """The setting of the dense model to compare with: the host of a method, or what the facts name."""
    method = method_of(setting["model"])
    if method is not None:
        dense = {"model": setting["model"].removeprefix(f"{method}_")}
    elif setting["model"] in facts.get("dense", {}):
        dense = facts["dense"][setting["model"]]
    else:
        return None
    model, args, size = dense["model"], dense.get("args", {}), setting["size"]
    for known in read(PUBLISHED)["settings"]:
        unsized = {name: value for name, value in known["args"].items() if name != "img_size"}
        if (known["model"], known["size"], unsized) == (model, size, args):
            return dict(known)
    args = args if size == native_size(model) else args | {"img_size": size}
    return {"model": model, "setting": size_words(size), "args": args, "size": size}


def settings_to_count() -> dict[str, dict[str, Any]]:
    """Key -> setting of every model whose figures the cards show."""
    settings = {}
    for family, facts in facts_of_all().items():
        for setting in settings_of(family, facts):
            settings[key(setting)] = setting
            dense = dense_of(setting, facts)
            if dense is not None:
                settings[key(dense)] = dense
    return settings


def count(setting: dict[str, Any]) -> dict[str, int]:
    """Parameters, and MACs in closed form unless counted_flops.json has them."""
    model = build(setting, "meta")
    record = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if key(setting) not in read(COUNTED)["macs"]:
        channels = timm.get_pretrained_cfg(setting["model"]).input_size[0]
        terms = closed_form_macs(model, (channels, *setting["size"]), token_counts=setting.get("token_counts"))
        record["macs"] = sum(terms.values())
    return record


def _recorded(setting: dict[str, Any]) -> dict[str, int]:
    """Parameters and MACs of a setting; raises ValueError if it was not counted."""
    name, models, macs = key(setting), read(MODELS)["models"], read(COUNTED)["macs"]
    if name not in models:
        raise ValueError(f"{name!r} is not in {MODELS.name}; run python tools/make_model_cards.py --measure")
    return models[name] | ({"macs": macs[name]} if name in macs else {})


def _row(setting: dict[str, Any], facts: dict[str, Any], results: list[Result]) -> Row:
    own, dense = _recorded(setting), dense_of(setting, facts)
    reached = [result for result in results if result.classifies and _is(setting, result.model, result.settings)]
    return Row(setting, own["parameters"], own["macs"], None if dense is None else _recorded(dense)["macs"], reached)


def families() -> list[Family]:
    """All cards, methods first."""
    cards, records = [], profiles()
    for name, facts in facts_of_all().items():
        own = {path: model for path, model in configs().items() if belongs(model, name, facts)}
        results = results_of(name, facts) + results_here(own) + accuracies_of(name, facts, records)
        rows = [_row(setting, facts, results) for setting in settings_of(name, facts)]
        others = [result for result in results if not result.classifies]
        cards.append(Family(name, facts, rows, others, speeds_of(name, facts, records), own))
    return cards
