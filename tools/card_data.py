"""What the model cards show: the facts in model_cards/data joined with what was counted, measured and configured.

Facts are those no program can compute (paper, licence, published results); every figure has its source beside it.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import yaml
from benchmark_overhead import CONFIGURATIONS
from compare_flops import COUNTED, PUBLISHED, build, closed_form, key

from effvit.models import lvvit
from effvit.models.architectures import VARIANTS
from effvit.profiler import median_interval
from effvit.reducers import METHODS

__all__ = [
    "ARCHITECTURES",
    "Family",
    "Result",
    "Row",
    "Speed",
    "count",
    "families",
    "measured_settings",
]

ROOT = Path(__file__).resolve().parents[1]
DATA, BENCHMARKS = ROOT / "model_cards/data", ROOT / "docs/benchmarks"
MODELS = BENCHMARKS / "models.json"
ARCHITECTURES = (*VARIANTS, *lvvit.default_cfgs)
DEFAULT_HOSTS = tuple(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
CLASSIFICATION = "Image Classification"
COMPOSITES = {"coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP", "mIoU": "mIoU"}


class Result(NamedTuple):
    """What a model reaches on a data set.

    Attributes:
        model: Its name.
        settings: Arguments that differ from the name's own.
        task: As OpenMMLab's metafiles name it.
        dataset: The data set.
        metrics: Name -> value in percent.
        source: Where the figures are from.
        method: The detector or segmenter around the model.
        dense: The first metric of the model it is made of, by the same source.
        config: File of configs/ of that training.
    """

    model: str
    settings: dict[str, Any]
    task: str
    dataset: str
    metrics: dict[str, float]
    source: str
    method: str = ""
    dense: float | None = None
    config: str | None = None


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


class Speed(NamedTuple):
    """A measured throughput.

    Attributes:
        model: Its name.
        setting: Its settings in words.
        images_per_second: Throughput.
        speedup: Over the dense model of the same run.
        interval: 95 % interval of the speed-up.
        conditions: Batch, size, type, machine and file of the measurement.
        accuracy: Accuracy measured in the same run, with its origin, or nothing.
    """

    model: str
    setting: str
    images_per_second: float
    speedup: float
    interval: tuple[float, float]
    conditions: str
    accuracy: str = ""


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


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def words(settings: dict[str, Any]) -> str:
    """Settings in words: "num_prop 8, alpha 0.1"."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _size_words(size: Sequence[int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


def _native_size(model: str) -> list[int]:
    return list(timm.get_pretrained_cfg(model).input_size[1:])


def _method(model: str) -> str | None:
    return next((method for method in METHODS if model.startswith(f"{method}_")), None)


def belongs(model: str, family: str, facts: dict[str, Any]) -> bool:
    """Whether a name is of the family: of its method, or among its architectures."""
    if family in METHODS:
        return _method(model) == family
    return any(fnmatch.fnmatch(model, pattern) for pattern in facts["architectures"])


def _complete(model: str, args: dict[str, Any]) -> Any:
    """All arguments, defaults included and as JSON has them, so that equal models compare equal."""
    method = _method(model)
    if method is not None:
        defaults = METHODS[method].defaults()
    elif model in VARIANTS:
        parameters = inspect.signature(VARIANTS[model].model).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        defaults |= VARIANTS[model].args
    else:
        defaults = {}
    return json.loads(json.dumps(defaults | args, default=str))


def _results(facts: dict[str, Any]) -> list[Result]:
    return [
        Result(
            entry["model"],
            entry.get("settings", {}),
            group["task"],
            group["dataset"],
            dict(zip(group["metrics"], entry["values"], strict=True)),
            group["source"],
            group.get("method", ""),
            entry.get("dense"),
            entry.get("config"),
        )
        for group in facts.get("results", [])
        for entry in group["of"]
    ]


def settings_of(family: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Models to show: those of published_flops.json and of the facts, those with an accuracy, and every default."""
    listed = [s for s in _read(PUBLISHED)["settings"] if belongs(s["model"], family, facts)]
    listed += facts.get("models", [])
    if family not in METHODS:
        wanted: list[tuple[str, dict[str, Any]]] = [(n, {}) for n in ARCHITECTURES if belongs(n, family, facts)]
    elif not METHODS[family].variable_length:
        wanted = [(f"{family}_{host}", {}) for host in DEFAULT_HOSTS]
    else:  # what the defaults cost depends on the image
        wanted = []
    wanted += [(r.model, r.settings) for r in _results(facts) if r.task == CLASSIFICATION]
    for model, args in wanted:
        size = _native_size(model)
        if not any(_is(setting, model, args, size) for setting in listed):
            named = words(args) or ("defaults" if family in METHODS else "")
            setting = ", ".join(filter(None, [named, _size_words(size)]))
            listed.append({"model": model, "setting": setting, "args": args, "size": size})
    order = list(dict.fromkeys(setting["model"] for setting in listed))
    return sorted(listed, key=lambda setting: order.index(setting["model"]))


def _is(setting: dict[str, Any], model: str, args: dict[str, Any], size: list[int]) -> bool:
    own = (setting["model"], setting["size"])
    return own == (model, size) and _complete(model, setting["args"]) == _complete(model, args)


def dense_of(setting: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """The setting of the dense model to compare with: the host of a method, or what the facts name."""
    method = _method(setting["model"])
    dense = facts.get("dense", {}).get(setting["model"])
    if method is not None:
        dense = {"model": setting["model"].removeprefix(f"{method}_")}
    if dense is None:
        return None
    model, args, size = dense["model"], dense.get("args", {}), setting["size"]
    for known in _read(PUBLISHED)["settings"]:
        sized = {name: value for name, value in known["args"].items() if name != "img_size"}
        if (known["model"], known["size"], sized) == (model, size, args):
            return known
    args = args if size == _native_size(model) else args | {"img_size": size}
    return {"model": model, "setting": _size_words(size), "args": args, "size": size}


def measured_settings() -> dict[str, dict[str, Any]]:
    """Key -> setting of every model the cards count."""
    settings = {}
    for family, facts in read_facts().items():
        for setting in settings_of(family, facts):
            settings[key(setting)] = setting
            dense = dense_of(setting, facts)
            if dense is not None:
                settings[key(dense)] = dense
    return settings


def count(setting: dict[str, Any]) -> dict[str, int]:
    """Parameters, and MACs in closed form unless counted_flops.json has them."""
    record = {"parameters": sum(p.numel() for p in build(setting, "meta").parameters())}
    return record if key(setting) in _read(COUNTED)["macs"] else record | {"macs": closed_form(setting)}


def _conditions(
    size: Sequence[int],
    batch_size: int | str,
    dtype: str,
    device: str,
    threads: int | str,
    machine: dict[str, Any],
    path: Path,
    extra: str = "",
) -> str:
    return (
        f"batch {batch_size}, {size[0]} x {size[1]}, {dtype}, {device}, {threads} thread(s){extra}; "
        f"{machine['processor']}, torch {machine['torch']}, timm {machine['timm']}; "
        f"[{path.name}](../{path.relative_to(ROOT).as_posix()})"
    )


def _overhead_speeds(family: str) -> list[Speed]:
    path = BENCHMARKS / "overhead_cpu.json"
    record = _read(path)
    arguments, dense = record["arguments"], np.array(record["seconds"]["dense"])
    conditions = _conditions(
        _native_size(arguments["model"]),
        *(arguments[name] for name in ("batch_size", "dtype", "device", "threads")),
        record["machine"],
        path,
    )
    speeds = []
    for name in (result["name"] for result in record["results"]):
        method, settings = CONFIGURATIONS[name]
        if method == family:
            seconds = np.array(record["seconds"][name])
            rate = int(arguments["batch_size"]) / float(np.median(seconds))
            ratios = dense / seconds
            model = f"{method}_{arguments['model']}"
            speedup = float(np.median(ratios))
            speeds.append(Speed(model, words(settings), rate, speedup, median_interval(ratios), conditions))
    return speeds


def _pair_speeds(facts: dict[str, Any]) -> list[Speed]:
    path = BENCHMARKS / "architectures_cpu.json"
    record = _read(path)
    speeds = []
    for entry in facts.get("speeds", []):
        result = record["results"][entry["pair"]]
        arguments = (record["arguments"][name] for name in ("dtype", "device", "threads"))
        conditions = _conditions(result["input_size"][1:], result["batch_size"], *arguments, record["machine"], path)
        rate, settings = result["images_per_second"][1], words(entry.get("settings", {}))
        speeds.append(Speed(entry["model"], settings, rate, result["speedup"], tuple(result["interval"]), conditions))
    return speeds


def _profile_speeds(family: str, facts: dict[str, Any]) -> list[Speed]:
    """Speeds of the files that ``effvit profile --json`` writes, docs/benchmarks/profile_*.json."""
    speeds = []
    for path in sorted(BENCHMARKS.glob("profile_*.json")):
        for record in (record for record in _read(path) if record["kind"] == "profile"):
            at = record["conditions"]
            extra = "".join(f", {name}" for name in ("compile", "cuda_graphs") if at[name])
            common = (at["input_size"][1:], at["batch_size"], at["dtype"], at["device"], at["threads"])
            conditions = _conditions(*common, record["machine"], path, extra)
            for entry in record["models"]:
                model = f"{entry['method']}_{entry['host']}" if entry["method"] else entry["host"] or entry["name"]
                if belongs(model, family, facts):
                    speed = (entry["images_per_second"], entry["speedup"], tuple(entry["interval"]))
                    got = entry["accuracy"]
                    accuracy = f"{got['value']:.1f} % {got['metric']}, {got['data']}, {got['origin']}" if got else ""
                    speeds.append(Speed(model, words(entry["settings"]), *speed, conditions, accuracy))
    return speeds


def backbone_of(config: Path) -> str:
    """The model name of a config's backbone, its own or that of the config it changes."""
    text = config.read_text()
    name = re.search(r'model_name="([^"]+)"', text)
    if name is not None:
        return name.group(1)
    base = re.search(r'"([^":]+\.py)"', text)
    assert base is not None, f"{config} names no backbone"
    return backbone_of(config.parent / base.group(1))


def all_configs() -> dict[str, str]:
    """File of configs/, relative to the repository -> name of its backbone."""
    paths = sorted(path for path in (ROOT / "configs").rglob("*.py") if "_base_" not in path.parts)
    return {path.relative_to(ROOT).as_posix(): backbone_of(path) for path in paths}


def _trained_here(configs: dict[str, str]) -> list[Result]:
    path = BENCHMARKS / "composites_cpu.json"
    results = []
    for record in _read(path)["results"]:
        if record["config"] in configs:
            metrics = {COMPOSITES[name]: value for name, value in record["trained"].items()}
            task = "Semantic Segmentation" if "mIoU" in metrics else "Instance Segmentation"
            source = f"measured here, {record['iterations']} iterations from random weights, {path.relative_to(ROOT)}"
            common = (task, "composites (generated, see docs/dense.md)", metrics, source)
            model = configs[record["config"]]
            results.append(Result(model, {}, *common, method="of the config", config=record["config"]))
    return results


def read_facts() -> dict[str, dict[str, Any]]:
    """Family -> its file in model_cards/data: methods first, both in the order of their tables in the package."""
    facts = {path.stem: yaml.safe_load(path.read_text()) for path in DATA.glob("*.yml")}

    def place(name: str) -> int:
        if name in METHODS:
            return list(METHODS).index(name)
        return len(METHODS) + next(i for i, model in enumerate(ARCHITECTURES) if belongs(model, name, facts[name]))

    return {name: facts[name] for name in sorted(facts, key=place)}


def families() -> list[Family]:
    """All cards, methods first."""
    counted, models, configs = _read(COUNTED)["macs"], _read(MODELS)["models"], all_configs()

    def macs(setting: dict[str, Any]) -> int:
        name = key(setting)
        return counted[name] if name in counted else models[name]["macs"]

    cards = []
    for name, facts in read_facts().items():
        own_configs = {path: model for path, model in configs.items() if belongs(model, name, facts)}
        results = _results(facts)
        rows = []
        for setting in settings_of(name, facts):
            dense = dense_of(setting, facts)
            reached = [
                r
                for r in results
                if r.task == CLASSIFICATION and _is(setting, r.model, r.settings, _native_size(r.model))
            ]
            dense_macs = None if dense is None else macs(dense)
            rows.append(Row(setting, models[key(setting)]["parameters"], macs(setting), dense_macs, reached))
        others = [r for r in results if r.task != CLASSIFICATION] + _trained_here(own_configs)
        speeds = _overhead_speeds(name) + _pair_speeds(facts) + _profile_speeds(name, facts)
        cards.append(Family(name, facts, rows, others, speeds, own_configs))
    return cards
