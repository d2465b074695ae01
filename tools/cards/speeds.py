"""Throughputs and accuracies measured here, from the records in docs/benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
from benchmark_overhead import CONFIGURATIONS

from cards.facts import BENCHMARKS, Result, belongs, native_size, read, words
from effvit.measure.profiler import median_ratio
from effvit.reducers import METHODS

__all__ = ["Speed", "accuracies_of", "of_profiles", "profiles", "speeds_of"]


class Speed(NamedTuple):
    """A measured throughput.

    Attributes:
        model: Its name.
        settings: Its settings in words.
        images_per_second: Throughput.
        speedup: Over the dense model of the same run.
        interval: 95 % interval of the speed-up.
        conditions: Batch, size, type, machine and file of the measurement.
        accuracy: Accuracy of the same model and the pictures; empty if it was not measured.
    """

    model: str
    settings: str
    images_per_second: float
    speedup: float
    interval: tuple[float, float]
    conditions: str
    accuracy: str = ""


def _conditions(size: Sequence[int], at: dict[str, Any], machine: dict[str, Any], path: Path, *more: str) -> str:
    threads = f"{at['threads']} thread" + ("" if int(at["threads"]) == 1 else "s")
    how = [f"batch {at['batch_size']}", f"{size[0]} x {size[1]}", at["dtype"], at["device"], threads]
    return (
        f"{', '.join([*how, *more])}; {machine['processor']}, torch {machine['torch']}, timm {machine['timm']}; "
        f"[{path.name}](../docs/benchmarks/{path.name})"
    )


def _of_overhead(family: str) -> list[Speed]:
    path = BENCHMARKS / "overhead_cpu.json"
    record = read(path)
    at, dense = record["arguments"], record["seconds"]["dense"]
    weights = f"random weights with queries times {at['sharpen']}"
    conditions = _conditions(native_size(at["model"]), at, record["machine"], path, weights)
    speeds = []
    for name in (result["name"] for result in record["results"]):
        method, settings = CONFIGURATIONS[name]
        if method == family:
            seconds = record["seconds"][name]
            measured = int(at["batch_size"]) / float(np.median(seconds)), *median_ratio(dense, seconds)
            speeds.append(Speed(f"{method}_{at['model']}", words(settings), *measured, conditions))
    return speeds


def _of_pairs(facts: dict[str, Any]) -> list[Speed]:
    path = BENCHMARKS / "architectures_cpu.json"
    record = read(path)
    speeds = []
    for entry in facts.get("speeds", []):
        result = record["results"][entry["pair"]]
        at = record["arguments"] | {"batch_size": result["batch_size"]}
        conditions = _conditions(result["input_size"][1:], at, record["machine"], path, "random weights")
        measured = result["images_per_second"][1], result["speedup"], tuple(result["interval"])
        speeds.append(Speed(entry["model"], words(entry.get("settings", {})), *measured, conditions))
    return speeds


def profiles() -> list[Path]:
    """The files that ``effvit profile --json`` and ``effvit evaluate --json`` wrote: lists of records."""
    return [path for path in sorted(BENCHMARKS.glob("*.json")) if isinstance(read(path), list)]


def _profiled(family: str, facts: dict[str, Any], paths: Iterable[Path]) -> Iterator[tuple[Path, Any, Any]]:
    """(file, record, model in it) of a family."""
    for path in paths:
        for record in (record for record in read(path) if record["kind"] == "profile"):
            for entry in record["models"]:
                if entry["method"] == family if family in METHODS else belongs(_name(entry), family, facts):
                    yield path, record, entry


def _name(entry: dict[str, Any]) -> str:
    """The registered name of a profiled model; for a host that has none with the method, both."""
    if entry["method"] is None:
        return str(entry["name"])
    name = f"{entry['method']}_{entry['host']}"
    return name if timm.is_model(name) else f"{entry['method']} on {entry['host']}"


def _set(entry: dict[str, Any]) -> dict[str, Any]:
    """The settings of a profiled model that differ from the method's defaults."""
    if entry["method"] is None:
        return {}
    defaults = json.loads(json.dumps(METHODS[entry["method"]].defaults()))
    return {name: value for name, value in entry["settings"].items() if value != defaults.get(name)}


def of_profiles(family: str, facts: dict[str, Any], paths: Iterable[Path]) -> list[Speed]:
    """Speeds of a family in profiles; a baseline that several records share is given once."""
    speeds = {}
    for path, record, entry in _profiled(family, facts, paths):
        at, got = record["conditions"], entry["accuracy"]
        images = "noise" if at["images"] == "noise" else " and ".join(at["images"])
        default = "" if entry["method"] is None else "defaults"
        how = [name for name in ("compile", "cuda_graphs") if at[name]]
        conditions = _conditions(at["input_size"][1:], at, record["machine"], path, images, *how)
        measured = entry["images_per_second"], entry["speedup"], tuple(entry["interval"])
        accuracy = f"{got['value']:.1f} % {got['metric']} ({got['data']})" if got else ""
        speed = Speed(_name(entry), words(_set(entry)) or default, *measured, conditions, accuracy)
        speeds.setdefault((speed.model, speed.settings, conditions), speed)
    return list(speeds.values())


def accuracies_of(family: str, facts: dict[str, Any], paths: Iterable[Path]) -> list[Result]:
    """Accuracies of a family in profiles; one that several records share is given once."""
    results = {}
    for path, _, entry in _profiled(family, facts, paths):
        got = entry["accuracy"]
        if got is not None:
            source = f"{got['origin']}, docs/benchmarks/{path.name}"
            metrics = {"Top 1 Accuracy": round(got["value"], 2)}
            result = Result(_name(entry), _set(entry), "Image Classification", got["data"], metrics, source)
            results.setdefault((result.model, words(result.settings), result.dataset, source), result)
    return list(results.values())


def speeds_of(family: str, facts: dict[str, Any], paths: Iterable[Path]) -> list[Speed]:
    """All measured throughputs of a family, those in profiles last."""
    return _of_overhead(family) + _of_pairs(facts) + of_profiles(family, facts, paths)
