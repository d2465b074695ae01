"""Write the tables of docs/accuracy.md, its plots in docs/images and a short table in README.md from the records.

python tools/make_accuracy_page.py           # after effvit evaluate --rounds 10 --json, tools/measure_choices.py
python tools/make_accuracy_page.py --check   # name what is stale, exit with 1 if anything is
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from marked_table import put_table, write_pages

from effvit.measure.accuracy import shown_models
from effvit.measure.choices import Choice, choices_of
from effvit.measure.controls import CONTROLS
from effvit.measure.records import evaluation_of, profile_of, read_profiles, read_records
from effvit.measure.values import Cost, Evaluated, Evaluation, Record
from effvit.messages import run_command
from effvit.protocols import Json
from effvit.show.plots import plot_accuracy, plot_choices
from effvit.show.tables import mean_and_range, with_error

__all__ = ["Choices", "choices_table", "main", "origin", "page", "table"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/accuracy.md"
TOOL = "make_accuracy_page.py"
# Table of the page -> what effvit evaluate --rounds wrote of it, and its plot.
ACCURACIES = {"accuracy": "docs/benchmarks/fashion_accuracy_cpu.json"}
# Table of choices and their controls -> what tools/measure_choices.py or effvit evaluate --control wrote of it.
CHOICES = {
    "cutouts main choices": "docs/benchmarks/cutouts_main_choices_cpu.json",
    "cutouts choices": "docs/benchmarks/cutouts_choices_cpu.json",
    "fashion choices": "docs/benchmarks/fashion_choices_cpu.json",
}
# Table of settings of one method -> what effvit evaluate wrote of it.
SETTINGS = {
    "cutouts open choices": "docs/benchmarks/zero_tprune_cutouts_choices_cpu.json",
    "fashion open choices": "docs/benchmarks/zero_tprune_fashion_choices_cpu.json",
}
PLOTTED = [*ACCURACIES.values(), *(path for name, path in CHOICES.items() if name != "cutouts main choices")]
MARK = "†"
README, SHORT = "README.md", "short accuracy"
SHOWN, SHARE = "cutouts choices", 0.6  # README.md shows the rows nearest to this share of the dense multiply-adds


def table(records: Sequence[Record]) -> list[str]:
    """Lines of a Markdown table of records; speed-ups refer to the first model of the same record."""
    lines = ["| model | top-1 (%) | MMACs | MAC ratio | speed-up | tokens left |", "|---|---|---|---|---|---|"]
    for cost, _, accuracies in shown_models(records):
        cells = [
            cost.name,
            mean_and_range(accuracies),
            f"{cost.macs / 1e6:.1f}",
            f"{cost.mac_ratio:.2f}",
            speedup(cost),
            f"{cost.tokens[-1]:.1f}" if cost.tokens else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speedup(cost: Cost) -> str:
    """Its speed-up with the interval."""
    low, high = cost.interval
    return f"{cost.speedup:.2f} ({low:.2f} to {high:.2f})"


class Choices(NamedTuple):
    """What tools/measure_choices.py wrote.

    Attributes:
        evaluation: Accuracies, with controls.
        costs: Name -> cost with measured speed; empty if none was measured.
    """

    evaluation: Evaluation
    costs: Mapping[str, Cost]


def choices_table(measured: Choices) -> list[str]:
    """Lines of a Markdown table: each choice of tokens, what it gains over its controls, and what it keeps.

    A row is marked where a gain is not positive. Controls have no rows of their own.

    Raises:
        ValueError: As ``choices_of``.
    """
    evaluation, costs = measured
    choices = choices_of(evaluation)
    shifts = next((list(model.consistency.shifts) for model in evaluation.models if model.consistency), [])
    of_objects = any(model.object_patches for model in evaluation.models)
    heads = [
        "model",
        "top-1 (%)",
        "MMACs",
        *["speed-up"] * (costs != {}),
        *(f"minus {control}" for control in CONTROLS),
    ]
    heads += ["object patches kept (%)"] * of_objects
    heads += [f"same class, {distance} px (%)" for distance in shifts]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for choice in (Choice(evaluation.models[0], {}), *choices):
        model, gains = choice.model, choice.gains
        cells = [
            model.name + (f" {MARK}" if not_better(choice) else ""),
            with_error(model.accuracy),
            f"{model.macs / 1e6:.1f}",
            *([speedup(costs[model.name])] if costs else []),
            *(f"{gains[control]:+.1f}" if control in gains else "-" for control in CONTROLS),
            *[kept_of_object(model)] * of_objects,
            *same_class(model, shifts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    said = notes(evaluation)
    return [*lines, "", " ".join(said)] if said else lines


def settings_table(evaluation: Evaluation) -> list[str]:
    """Lines of a Markdown table of models without controls."""
    rows = [(own.name, with_error(own.accuracy), f"{own.macs / 1e6:.1f}") for own in evaluation.models]
    return ["| model | top-1 (%) | MMACs |", "|---|---|---|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def short_table(measured: Choices) -> list[str]:
    """Lines of a Markdown table: each method where it is nearest to SHARE of the dense multiply-adds, and controls."""
    dense = measured.evaluation.models[0]
    nearest: dict[str | None, Choice] = {}
    for choice in sorted(choices_of(measured.evaluation), key=lambda own: abs(own.model.macs / dense.macs - SHARE)):
        nearest.setdefault(choice.model.method, choice)
    lines = [
        f"| model | MACs (%) | top-1 (%) | {' | '.join(CONTROLS)} |",
        "| --- | --- | --- |" + " --- |" * len(CONTROLS),
    ]
    lines.append(f"| dense | 100 | {dense.accuracy.value:.1f} |" + " - |" * len(CONTROLS))
    for choice in sorted(nearest.values(), key=lambda own: -own.model.accuracy.value):
        top1 = choice.model.accuracy.value
        beside = [f"{top1 - choice.gains[control]:.1f}" if control in choice.gains else "-" for control in CONTROLS]
        share = 100 * choice.model.macs / dense.macs
        lines.append(f"| {choice.model.name} | {share:.0f} | {top1:.1f} | {' | '.join(beside)} |")
    return lines


def not_better(choice: Choice) -> bool:
    """Whether a control is at least as good."""
    return any(gain <= 0 for gain in choice.gains.values())


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table has to know."""
    found = []
    if any(not_better(own) for own in choices_of(evaluation)):
        found.append(f"{MARK} Not better than one of its controls.")
    for text, numbers in (
        ("Object patches", {model.object_patches.images for model in evaluation.models if model.object_patches}),
        ("Shifts", {model.consistency.images for model in evaluation.models if model.consistency}),
    ):
        found += [f"{text}: {' or '.join(map(str, sorted(numbers)))} images."] if numbers else []
    return found


def kept_of_object(model: Evaluated) -> str:
    """Object patches that are tokens behind the last block, and those represented where they are more."""
    if model.object_patches is None:
        return "-"
    last = model.object_patches.tokens[-1], model.object_patches.represented[-1]
    tokens, represented = (f"{100 * share:.0f}" for share in last)
    return tokens if tokens == represented else f"{tokens} (represented {represented})"


def same_class(model: Evaluated, shifts: Sequence[int]) -> list[str]:
    """A cell for each shift.

    Raises:
        ValueError: The model was shifted by other distances.
    """
    if model.consistency is None:
        return ["-"] * len(shifts)
    if list(model.consistency.shifts) != list(shifts):
        raise ValueError(f"all models must be shifted by {shifts}, {model.name} by {list(model.consistency.shifts)}")
    return [f"{100 * share:.1f}" for share in model.consistency.same]


def page(
    text: str,
    records: Mapping[str, Sequence[Record]],
    choices: Mapping[str, Choices],
    settings: Mapping[str, Evaluation],
) -> str:
    """The page with its tables made anew.

    Args:
        text: The page as it is.
        records: Name of a table of ``ACCURACIES`` -> its records.
        choices: Name of a table of ``CHOICES`` -> what was measured for it.
        settings: Name of a table of ``SETTINGS`` -> what was measured for it.

    Raises:
        ValueError: A mark is missing.
    """
    for name, own in records.items():
        text = put_table(text, PAGE, name, TOOL, ["", *table(own), ""])
    for name, measured in choices.items():
        text = put_table(text, PAGE, name, TOOL, ["", *choices_table(measured), ""])
    for name, evaluation in settings.items():
        text = put_table(text, PAGE, name, TOOL, ["", *settings_table(evaluation), ""])
    return text


def origin(name: str) -> str:
    """What a plot says of the records it is from, ``name`` of the project; changes with them."""
    return f"tools/{TOOL}, {name}, sha256 {hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page and its plots; returns 1 if one is stale, 2 after records that cannot be read."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that are stale")
    arguments = parser.parse_args(argv)
    return run_command("make_accuracy_page", lambda: write_page(arguments.check))


def read_choices(path: Path) -> Choices:
    """What tools/measure_choices.py wrote.

    Raises:
        ValueError: Other than one evaluation and at most one profile, which has all of its choices.
    """
    records = cast("list[dict[str, Json]]", read_records(path, (Evaluation.kind, Record.kind)))
    evaluations = [evaluation_of(record) for record in records if record["kind"] == Evaluation.kind]
    profiles = [profile_of(record) for record in records if record["kind"] == Record.kind]
    if len(evaluations) != 1 or len(profiles) > 1:
        raise ValueError(
            f"{path.name} must hold one evaluation and at most one profile, got {len(evaluations)} and "
            f"{len(profiles)}; measure again with tools/measure_choices.py"
        )
    costs = {cost.name: cost for own in profiles for cost in own.models}
    names = [choice.model.name for choice in choices_of(evaluations[0])]
    if profiles and (missing := [name for name in names if name not in costs]):
        raise ValueError(f"the profile in {path.name} lacks {missing[0]}; measure again with tools/measure_choices.py")
    return Choices(evaluations[0], costs)


def read_settings(path: Path) -> Evaluation:
    """What effvit evaluate wrote of settings of a method, in one record."""
    (record,) = cast("list[dict[str, Json]]", read_records(path, (Evaluation.kind,)))
    return evaluation_of(record)


def plot_of(records: str) -> str:
    """The plot of a file of records."""
    return f"docs/images/{Path(records).stem.removesuffix('_cpu')}.svg"


def write_page(only_check: bool) -> int:
    """Write the page and its plots, or name those that are stale; returns 1 if one is."""
    records = {name: read_profiles(ROOT / path) for name, path in ACCURACIES.items()}
    choices = {name: read_choices(ROOT / path) for name, path in CHOICES.items()}
    settings = {name: read_settings(ROOT / path) for name, path in SETTINGS.items()}
    pages = {PAGE: page((ROOT / PAGE).read_text(), records, choices, settings)}
    pages[README] = put_table((ROOT / README).read_text(), README, SHORT, TOOL, short_table(choices[SHOWN]))
    # Plot -> what it says of its origin. Another matplotlib draws other bytes, so that a plot is stale when its records
    # have changed.
    origins = {plot_of(path): origin(path) for path in PLOTTED}
    plots = {name: ROOT / name for name in origins}
    stale = [name for name, plot in plots.items() if not plot.is_file() or origins[name] not in plot.read_text()]
    status = write_pages(pages, ROOT, TOOL, only_check, stale)
    if only_check:
        return status
    for name, path in ACCURACIES.items():
        dense, plot = records[name][0].models[0], plot_of(path)
        data = "" if dense.accuracy is None else dense.accuracy.data
        plot_accuracy(records[name], f"{dense.name}: {data}", ROOT / plot, note=origins[plot])
    for name, path in CHOICES.items():
        if path in PLOTTED:
            measured, plot = choices[name].evaluation, plot_of(path)
            first = measured.models[0]
            plot_choices(measured, f"{first.name}: {first.accuracy.data}", ROOT / plot, note=origins[plot])
    return status


if __name__ == "__main__":
    sys.exit(main())
