"""Write the tables of docs/accuracy.md and its plots in docs/images from the measured records.

python tools/make_accuracy_page.py           # after effvit evaluate --rounds 10 --json, tools/measure_choices.py
python tools/make_accuracy_page.py --check   # name what is stale, exit with 1 if anything is
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from marked_table import has_table, put_table, write_pages

from effvit.measure.accuracy import shown_models
from effvit.measure.choices import Choice, choices_of
from effvit.measure.controls import CONTROLS
from effvit.measure.records import read_evaluations, read_profiles
from effvit.measure.values import Evaluated, Evaluation, Record
from effvit.messages import run_command
from effvit.show.plots import plot_accuracy, plot_choices
from effvit.show.tables import mean_and_range, with_error

__all__ = ["choices_table", "main", "origin", "page", "table"]

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "docs/benchmarks/fashion_accuracy_cpu.json"
PAGE = "docs/accuracy.md"
PLOT = "docs/images/fashion_accuracy.svg"
TOOL = "make_accuracy_page.py"
# Table of choices and their controls -> what tools/measure_choices.py wrote of it; on the page once it is measured.
CHOICES = {
    "cutouts choices": "docs/benchmarks/cutouts_choices_cpu.json",
    "fashion choices": "docs/benchmarks/fashion_choices_cpu.json",
}
MARK = "†"


def table(records: Sequence[Record]) -> list[str]:
    """Lines of a Markdown table of records; speed-ups refer to the first model of the same record."""
    lines = ["| model | top-1 (%) | MMACs | MAC ratio | speed-up | tokens left |", "|---|---|---|---|---|---|"]
    for cost, _, accuracies in shown_models(records):
        low, high = cost.interval
        cells = [
            cost.name,
            mean_and_range(accuracies),
            f"{cost.macs / 1e6:.1f}",
            f"{cost.mac_ratio:.2f}",
            f"{cost.speedup:.2f} ({low:.2f} to {high:.2f})",
            f"{cost.tokens[-1]:.1f}" if cost.tokens else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def choices_table(evaluation: Evaluation) -> list[str]:
    """Lines of a Markdown table: each choice of tokens, what it gains over its controls, and what it keeps.

    A row is marked where a gain is not positive. Controls have no rows of their own.

    Raises:
        ValueError: As ``choices_of``.
    """
    choices = choices_of(evaluation)
    shifts = next((list(model.consistency.shifts) for model in evaluation.models if model.consistency), [])
    of_objects = any(model.object_patches for model in evaluation.models)
    heads = ["model", "top-1 (%)", "MMACs", *(f"minus {control}" for control in CONTROLS)]
    heads += ["object patches kept (%)"] * of_objects
    heads += [f"same class, {distance} px (%)" for distance in shifts]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for choice in (Choice(evaluation.models[0], {}), *choices):
        model, gains = choice.model, choice.gains
        cells = [
            model.name + (f" {MARK}" if any(gain <= 0 for gain in gains.values()) else ""),
            with_error(model.accuracy),
            f"{model.macs / 1e6:.1f}",
            *(f"{gains[control]:+.1f}" if control in gains else "-" for control in CONTROLS),
            *[kept_of_object(model)] * of_objects,
            *same_class(model, shifts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", " ".join(notes(evaluation))]


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table has to know."""
    found = [f"{MARK} Not better than one of its controls."]
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


def page(text: str, records: Sequence[Record], choices: Mapping[str, Evaluation]) -> str:
    """The page with its tables made anew.

    Args:
        text: The page as it is.
        records: Of its first table.
        choices: Name of a table of ``CHOICES`` -> its evaluation, for those that are measured.

    Raises:
        ValueError: A mark is missing, or there is one of a table that is not measured.
    """
    text = put_table(text, PAGE, "accuracy", TOOL, ["", *table(records), ""])
    for name, path in CHOICES.items():
        if name in choices:
            text = put_table(text, PAGE, name, TOOL, ["", *choices_table(choices[name]), ""])
        elif has_table(text, name, TOOL):
            raise ValueError(f"{PAGE} has a table {name!r}, but there is no {path}; run tools/measure_choices.py")
    return text


def origin(records: Path, name: str = RECORDS) -> str:
    """What the plot says of where it is from; changes with the records, which the page calls ``name``."""
    return f"tools/{TOOL}, {name}, sha256 {hashlib.sha256(records.read_bytes()).hexdigest()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page and its plots; returns 1 if one is stale, 2 after records that cannot be read."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that are stale")
    arguments = parser.parse_args(argv)
    return run_command("make_accuracy_page", lambda: write_page(arguments.check))


def measured_choices() -> dict[str, Evaluation]:
    """Name of a table of ``CHOICES`` -> its evaluation, for those whose file is there.

    Raises:
        ValueError: A file that does not hold one evaluation.
    """
    found = {name: read_evaluations(ROOT / path) for name, path in CHOICES.items() if (ROOT / path).is_file()}
    for name, evaluations in found.items():
        if len(evaluations) != 1:
            raise ValueError(f"{CHOICES[name]} must hold one evaluation, got {len(evaluations)}; measure it again")
    return {name: evaluation for name, [evaluation] in found.items()}


def plot_of(records: str) -> str:
    """The plot of a file of choices."""
    return f"docs/images/{Path(records).stem.removesuffix('_cpu')}.svg"


def write_page(only_check: bool) -> int:
    """Write the page and its plots, or name those that are stale; returns 1 if one is."""
    records, choices = read_profiles(ROOT / RECORDS), measured_choices()
    text = page((ROOT / PAGE).read_text(), records, choices)
    # Plot -> what it says of its origin. Another matplotlib draws other bytes, so that a plot is stale when its records
    # have changed.
    origins = {PLOT: origin(ROOT / RECORDS)}
    origins |= {plot_of(CHOICES[name]): origin(ROOT / CHOICES[name], CHOICES[name]) for name in choices}
    plots = {name: ROOT / name for name in origins}
    stale = [name for name, plot in plots.items() if not plot.is_file() or origins[name] not in plot.read_text()]
    status = write_pages({PAGE: text}, ROOT, TOOL, only_check, stale)
    if only_check:
        return status
    dense = records[0].models[0]
    data = "" if dense.accuracy is None else dense.accuracy.data
    plot_accuracy(records, f"{dense.name}: {data}", ROOT / PLOT, note=origins[PLOT])
    for name, evaluation in choices.items():
        first, drawn = evaluation.models[0], plot_of(CHOICES[name])
        plot_choices(evaluation, f"{first.name}: {first.accuracy.data}", ROOT / drawn, note=origins[drawn])
    return status


if __name__ == "__main__":
    sys.exit(main())
