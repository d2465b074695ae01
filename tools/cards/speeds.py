"""Throughputs measured here, from the records in docs/benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_overhead import CONFIGURATIONS

from cards.facts import BENCHMARKS, belongs, native_size, read, words
from effvit.profiler import median_interval

__all__ = ["Speed", "of_profiles", "speeds_of"]


class Speed(NamedTuple):
    """A measured throughput.

    Attributes:
        model: Its name.
        settings: Its settings in words.
        images_per_second: Throughput.
        speedup: Over the dense model of the same run.
        interval: 95 % interval of the speed-up.
        conditions: Batch, size, type, machine and file of the measurement.
        accuracy: Accuracy measured in the same run with its origin; empty if none was.
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
    at, dense = record["arguments"], np.array(record["seconds"]["dense"])
    weights = f"random weights with queries times {at['sharpen']}"
    conditions = _conditions(native_size(at["model"]), at, record["machine"], path, weights)
    speeds = []
    for name in (result["name"] for result in record["results"]):
        method, settings = CONFIGURATIONS[name]
        if method == family:
            seconds = np.array(record["seconds"][name])
            rate, speedup = int(at["batch_size"]) / np.median(seconds), np.median(dense / seconds)
            measured = float(rate), float(speedup), median_interval(dense / seconds)
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


def of_profiles(family: str, facts: dict[str, Any], paths: Iterable[Path]) -> list[Speed]:
    """Those of a family in files that ``effvit profile --json`` wrote."""
    speeds = []
    for path in paths:
        for record in (record for record in read(path) if record["kind"] == "profile"):
            at = record["conditions"]
            images = "noise" if at["images"] == "noise" else f"{len(at['images'])} pictures"
            how = [name for name in ("compile", "cuda_graphs") if at[name]]
            conditions = _conditions(at["input_size"][1:], at, record["machine"], path, images, *how)
            for entry in record["models"]:
                model = f"{entry['method']}_{entry['host']}" if entry["method"] else entry["host"] or entry["name"]
                if belongs(model, family, facts):
                    measured = entry["images_per_second"], entry["speedup"], tuple(entry["interval"])
                    got = entry["accuracy"]
                    accuracy = f"{got['value']:.1f} % {got['metric']}, {got['data']}, {got['origin']}" if got else ""
                    speeds.append(Speed(model, words(entry["settings"]), *measured, conditions, accuracy))
    return speeds


def speeds_of(family: str, facts: dict[str, Any]) -> list[Speed]:
    """All measured throughputs of a family."""
    profiles = sorted(BENCHMARKS.glob("profile_*.json"))
    return _of_overhead(family) + _of_pairs(facts) + of_profiles(family, facts, profiles)
