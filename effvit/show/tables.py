"""Records of ``effvit.measure.costs.profile`` as tables in the terminal and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["describe", "mean_and_range", "print_accuracies", "print_record", "print_tuning", "write_csv"]

CONDITIONS = ("batch_size", "input_size", "dtype", "device", "threads", "compile", "cuda_graphs")
NUMBERS = (
    "parameters",
    "macs",
    "images_per_second",
    "peak_memory",
    "speedup",
    "mac_ratio",
    "ideal_speedup",
    "efficiency",
)


def describe(conditions: Mapping[str, Any]) -> str:
    """What a measurement holds for, in words."""
    _, height, width = conditions["input_size"]
    images = conditions["images"]
    extras = [name.replace("_", " ") for name in ("compile", "cuda_graphs") if conditions[name]]
    return ", ".join(
        [
            f"batch {conditions['batch_size']}, {conditions['dtype']}, {conditions['device']}",
            f"{conditions['threads']} threads",
            *extras,
            f"{images if isinstance(images, str) else ', '.join(images)} at {height} x {width}",
        ]
    )


def print_record(console: Console, record: Mapping[str, Any]) -> None:
    """Print what the models cost; speed-ups refer to the first."""
    rounds = len(record["models"][0]["seconds"])
    table = Table(
        caption=f"{describe(record['conditions'])}; {rounds} interleaved rounds, 95 % intervals",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    compared = len(record["models"]) > 1
    has_ideal = any(model["ideal_speedup"] for model in record["models"])
    has_fidelity = any(model["fidelity"] for model in record["models"])
    headings = ["params (M)", "GMACs", "tokens left", "images/s", "p50 / p99 (ms)", "memory (MB)"]
    headings += ["speed-up", "MAC ratio"] if compared else []
    headings += ["ideal", "efficiency"] if has_ideal else []
    headings += ["divergence"] if has_fidelity else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, model in enumerate(record["models"]):
        latency = model["latency"]
        cells = [
            f"{model['parameters'] / 1e6:.2f}",
            f"{model['macs'] / 1e9:.3f}",
            f"{model['tokens'][-1]:.4g}" if model["tokens"] else "-",
            f"{model['images_per_second']:.1f}",
            f"{1e3 * latency['p50']:.1f} / {1e3 * latency['p99']:.1f}",
            f"{model['peak_memory'] / 1e6:.1f}",
        ]
        if compared:
            interval = _interval(model["interval"]) if number else ""
            cells += [f"{model['speedup']:.2f}{interval}", f"{model['mac_ratio']:.2f}" if model["mac_ratio"] else "-"]
        if has_ideal:
            cells += ["-", "-"]
            if model["ideal_speedup"]:
                share = f"{model['efficiency']:.2f}{_interval(model['efficiency_interval'])}"
                cells[-2:] = [f"{model['ideal_speedup']:.2f}", share]
        if has_fidelity:
            cells.append(f"{model['fidelity']['divergence']:.3g}" if model["fidelity"] else "-")
        table.add_row(model["name"], *cells, end_section=number == 0)
    console.print(table)
    for model in record["models"]:
        if model["breakdown"]:
            console.print(_breakdown(model))
        if model["uncounted"]:
            calls = ", ".join(f"{number} calls of {operator}" for operator, number in model["uncounted"].items())
            console.print(f"{model['name']}: not in its GMACs are {calls}", style="yellow")


def print_accuracies(console: Console, record: Mapping[str, Any]) -> None:
    """Print how well the models of a record with accuracies and distances classify, beside what they save."""
    accuracy = record["models"][0]["accuracy"]
    table = Table(
        title=f"{accuracy['metric']} on {accuracy['data']}, {accuracy['origin']}",
        title_justify="left",
        caption=f"same class: as the dense model; {len(record['models'][0]['seconds'])} interleaved rounds",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    for heading in (f"{accuracy['metric']} (%)", "same class (%)", "MMACs", "MAC ratio", "tokens left", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, model in enumerate(record["models"]):
        same = model["fidelity"]
        table.add_row(
            model["name"],
            f"{model['accuracy']['value']:.1f}",
            f"{100 * same['agreement']:.1f}" if same else "-",
            f"{model['macs'] / 1e6:.1f}",
            f"{model['mac_ratio']:.2f}",
            f"{model['tokens'][-1]:.3g}",
            f"{model['speedup']:.2f}{_interval(model['interval']) if number else ''}",
            end_section=number == 0,
        )
    console.print(table)


def mean_and_range(values: Sequence[float]) -> str:
    """Mean of a figure over several trainings, with the least and the largest where they differ: one decimal."""
    mean, low, high = (f"{value:.1f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _interval(bounds: Sequence[float]) -> str:
    return f" ({bounds[0]:.2f}-{bounds[1]:.2f})"


def _breakdown(model: Mapping[str, Any]) -> Table:
    """Milliseconds of a batch by block and part."""
    parts = list(dict.fromkeys(part for row in model["breakdown"] for part in row["seconds"]))
    table = Table("block", title=f"{model['name']}: milliseconds by block", title_justify="left")
    for part in parts:
        table.add_column(part, justify="right")
    for row in model["breakdown"]:
        cells = [f"{1e3 * row['seconds'][part]:.2f}" if part in row["seconds"] else "" for part in parts]
        table.add_row(row["block"], *cells)
    return table


def print_tuning(console: Console, result: Mapping[str, Any]) -> None:
    """Print the front that ``effvit.measure.tune`` found and its best setting."""
    table = Table(
        title=f"No other of the {len(result['tried'])} settings tried is faster and nearer", title_justify="left"
    )
    table.add_column("method")
    table.add_column("settings", max_width=60)
    for heading in ("GMACs", "speed-up", "divergence", "same class (%)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in result["front"]:
        table.add_row(
            candidate["method"],
            settings_of(candidate),
            f"{candidate['macs'] / 1e9:.3f}",
            f"{candidate['speedup']:.2f}{_interval(candidate['interval'])}",
            f"{candidate['fidelity']['divergence']:.4g}",
            f"{100 * candidate['fidelity']['agreement']:.0f}",
            style="bold" if candidate == result["best"] else None,
        )
    console.print(table)
    best = result["best"]
    console.print(
        f"best: {best['method']} {settings_of(best)}, speed-up {best['speedup']:.2f}{_interval(best['interval'])}, "
        f"{best['macs'] / 1e9:.3f} GMACs, divergence {best['fidelity']['divergence']:.4g}"
    )


def settings_of(candidate: Mapping[str, Any]) -> str:
    """The settings of a candidate as they are written in Python."""
    return ", ".join(f"{name}={value}" for name, value in candidate["settings"].items())


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one row for each model of the records: conditions, machine and numbers, in the units of the record."""
    rows = []
    for record in records:
        conditions = {name: record["conditions"][name] for name in CONDITIONS}
        conditions["input_size"] = "x".join(map(str, conditions["input_size"]))
        for model in record["models"]:
            row = {"name": model["name"], "method": model["method"], **{name: model[name] for name in NUMBERS}}
            row |= {"low": model["interval"][0], "high": model["interval"][1], **model["latency"]}
            row |= {"tokens_left": model["tokens"][-1] if model["tokens"] else None}
            rows.append(row | conditions | record["machine"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
