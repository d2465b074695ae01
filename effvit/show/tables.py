"""Records of ``effvit.measure.costs.profile`` as tables in the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from effvit.measure.values import (
    DIVERGENCE,
    LOSS,
    MEASURES,
    Accuracy,
    BlockTime,
    Candidate,
    Conditions,
    Cost,
    Evaluation,
    FreeChoices,
    Record,
    Tuning,
)
from effvit.measure.written_files import write_whole
from effvit.messages import counted
from effvit.protocols import Settings

__all__ = [
    "DEFAULTS",
    "candidate_text",
    "choice_text",
    "describe",
    "free_lines",
    "mean_and_range",
    "measure_text",
    "print_accuracies",
    "print_evaluations",
    "print_record",
    "print_tuning",
    "settings_text",
    "write_csv",
]


DEFAULTS = "defaults"  # in place of settings that name none


def describe(conditions: Conditions) -> str:
    """What a measurement holds for, in words."""
    _, height, width = conditions.input_size
    images = conditions.images
    extras = ["compile"] if conditions.compile else []
    extras += ["cuda graphs"] if conditions.cuda_graphs else []
    return ", ".join(
        [
            f"batch {conditions.batch_size}{_views(conditions)}, {conditions.dtype}, {conditions.device}",
            counted(conditions.threads, "thread"),
            *extras,
            f"{images if isinstance(images, str) else ', '.join(images)} at {height} x {width}",
        ]
    )


def _views(conditions: Conditions) -> str:
    """What one of a batch is, where it is more than an image."""
    crops, frames = conditions.options.get("crops"), conditions.options.get("frames")
    if isinstance(crops, list):
        return f" (an image in {crops[0]} x {crops[1]} crops and a thumbnail)"
    return "" if frames is None else f" (a video of {frames} frames)"


def print_record(console: Console, record: Record) -> None:
    """Print what the models cost; speed-ups refer to the first."""
    rounds = len(record.models[0].seconds)
    table = Table(
        caption=f"{describe(record.conditions)}; {rounds} interleaved rounds, 95 % intervals",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    rows = [_cells(record, cost) for cost in record.models]
    for heading in rows[0]:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (cost, row) in enumerate(zip(record.models, rows, strict=True)):
        table.add_row(cost.name, *row.values(), end_section=number == 0)
    console.print(table)
    read = next((cost.handed for cost in record.models if cost.handed and cost.handed.reader), None)
    if read is not None:
        console.print(f"read by {read.reader}, with {read.text} tokens of text; counted, not measured", soft_wrap=True)
    for cost in record.models:
        if cost.breakdown:
            console.print(_breakdown(cost.name, cost.breakdown))
        if cost.uncounted:
            calls = ", ".join(f"{number} calls of {operator}" for operator, number in cost.uncounted.items())
            console.print(f"{cost.name}: not in its GMACs are {calls}", style="yellow")


def _cells(record: Record, cost: Cost) -> dict[str, str]:
    """Heading -> cell of one model; the headings are those of the whole record."""
    cells = {
        "params (M)": f"{cost.parameters / 1e6:.2f}",
        "GMACs": f"{cost.macs / 1e9:.3f}",
        "tokens left": f"{cost.tokens[-1]:.4g}" if cost.tokens else "-",
        "videos/s" if "frames" in record.conditions.options else "images/s": f"{cost.images_per_second:.1f}",
        "p50 / p99 (ms)": f"{1e3 * cost.latency['p50']:.1f} / {1e3 * cost.latency['p99']:.1f}",
        "memory (MB)": f"{cost.peak_memory / 1e6:.1f}",
    }
    if any(model.handed for model in record.models):
        handed = cost.handed
        cells["handed over"] = f"{handed.tokens:.4g}" if handed else "-"
        if any(model.handed and model.handed.reader for model in record.models):
            macs, size = (handed.prefill_macs, handed.cache_bytes) if handed else (None, None)
            cells["prefill GMACs"] = "-" if macs is None else f"{macs / 1e9:.4g}"
            cells["cache (MB)"] = "-" if size is None else f"{size / 1e6:.4g}"
    if len(record.models) > 1:
        bounds = _interval(cost.interval) if cost is not record.models[0] else ""
        cells["speed-up"] = f"{cost.speedup:.2f}{bounds}"
        cells["MAC ratio"] = _number(cost.mac_ratio)
    if any(model.ideal_speedup for model in record.models):
        bounds = _interval(cost.efficiency_interval) if cost.efficiency_interval else ""
        cells["ideal"] = _number(cost.ideal_speedup)
        cells["efficiency"] = _number(cost.efficiency) + bounds
    if any(model.fidelity for model in record.models):
        cells["divergence"] = f"{cost.fidelity.divergence:.3g}" if cost.fidelity else "-"
    return cells


def _number(value: float | None) -> str:
    return f"{value:.2f}" if value else "-"


def print_accuracies(console: Console, record: Record) -> None:
    """Print how well the models of a record with accuracies classify, beside what they save."""
    said = [cost.accuracy for cost in record.models if cost.accuracy is not None]
    table = Table(
        title=f"{said[0].metric} on {said[0].data}, {said[0].origin}",
        title_justify="left",
        caption=f"same class: as the dense model; {len(record.models[0].seconds)} interleaved rounds",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    for heading in (f"{said[0].metric} (%)", "same class (%)", "MMACs", "MAC ratio", "tokens left", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (cost, accuracy) in enumerate(zip(record.models, said, strict=True)):
        same = cost.fidelity.agreement if cost.fidelity else None
        table.add_row(
            cost.name,
            f"{accuracy.value:.1f}",
            "-" if same is None else f"{100 * same:.1f}",
            f"{cost.macs / 1e6:.1f}",
            _number(cost.mac_ratio),
            f"{cost.tokens[-1]:.3g}" if cost.tokens else "-",
            f"{cost.speedup:.2f}{_interval(cost.interval) if number else ''}",
            end_section=number == 0,
        )
    console.print(table)


def print_evaluations(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """Print how well models classify, beside what they cost and what was published of them, and what that comes to."""
    models = [model for evaluation in evaluations for model in evaluation.models]
    accuracy, conditions = models[0].accuracy, evaluations[0].conditions
    console.print(f"{accuracy.metric} on {accuracy.data}, {accuracy.origin}", soft_wrap=True)
    table = Table(
        caption=f"± one standard error; batch {conditions.batch_size}, {conditions.dtype}, {conditions.device}",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    is_published = any(model.published for model in models)
    for heading in (
        "top-1 (%)",
        *(["published (%)", "difference"] if is_published else []),
        "images",
        "GMACs",
        "MAC ratio",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for evaluation in evaluations:
        for number, model in enumerate(evaluation.models):
            own = model.accuracy
            published = model.published
            figures = (f"{published.value:.2f}", f"{own.value - published.value:+.2f}") if published else ("-", "-")
            table.add_row(
                model.name,
                with_error(own),
                *(figures if is_published else ()),
                str(own.images),
                f"{model.macs / 1e9:.4g}",
                _number(model.mac_ratio),
                end_section=number == len(evaluation.models) - 1 or number == 0,
            )
    console.print(table)
    for line in [line for evaluation in evaluations for line in evaluation_lines(evaluation)]:
        console.print(line, soft_wrap=True)


def with_error(accuracy: Accuracy) -> str:
    """An accuracy and its standard error, where that is known: "79.30 ± 0.18"."""
    error = accuracy.standard_error
    return f"{accuracy.value:.2f}" + ("" if error is None else f" ± {error:.2f}")


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """What an evaluation comes to, a sentence for each reduced model and each published figure."""
    baseline = evaluation.models[0]
    lines = []
    for model in evaluation.models:
        if model.host is not None and model.mac_ratio is not None:
            points = model.accuracy.value - baseline.accuracy.value
            place = f"{abs(points):.2f} points {'above' if points > 0 else 'below'}" if points else "as accurate as"
            lines.append(f"{model.name}: {place} {model.host}, at {100 / model.mac_ratio:.1f} % of its multiply-adds")
        if model.published is not None:
            error = model.accuracy.standard_error
            gap = abs(model.accuracy.value - model.published.value)
            near = error is not None and gap <= 2 * error
            where = "within two standard errors of" if near else "further than two standard errors from"
            lines.append(
                f"{model.name}: {where} the "
                f"{model.published.value:g} % published ({model.published.data}; {model.published.source})"
            )
    return lines


def mean_and_range(values: Sequence[float]) -> str:
    """Mean of a figure over several trainings, with the least and the largest where they differ: one decimal."""
    mean, low, high = (f"{value:.1f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _interval(bounds: Sequence[float]) -> str:
    return f" ({bounds[0]:.2f}-{bounds[1]:.2f})"


def _breakdown(name: str, blocks: Sequence[BlockTime]) -> Table:
    """Milliseconds of a batch by block and part."""
    parts = list(dict.fromkeys(part for block in blocks for part in block.seconds))
    table = Table("block", title=f"{name}: milliseconds by block", title_justify="left")
    for part in parts:
        table.add_column(part, justify="right")
    for block in blocks:
        cells = [f"{1e3 * block.seconds[part]:.2f}" if part in block.seconds else "" for part in parts]
        table.add_row(str(block.block), *cells)
    return table


def print_tuning(console: Console, result: Tuning) -> None:
    """Print the front that ``effvit.measure.tune`` found and its best setting."""
    console.print(measure_text(result), soft_wrap=True)
    if result.front:
        better = "nearer" if result.dense is None else "of less loss"
        title = f"No other of the {len(result.tried)} settings measured is faster and {better}"
        rows = [(settings_text(own.settings) or DEFAULTS, own) for own in result.front]
        console.print(_candidates(title, rows, result.best))
    if result.free is not None:
        console.print(_candidates("The choice beside what needs no search, timed together", _rows(result.free)))
        for line in free_lines(result.free):
            console.print(line, soft_wrap=True)
    why = "not tried" if "tokens" in result.target else "not tried for want of time"
    for left in result.untried or ():
        console.print(f"{why}: {left}", style="yellow")
    console.print(choice_text(result), soft_wrap=True)


def _rows(free: FreeChoices) -> list[tuple[str, Candidate]]:
    """The choice and what it is held against, the settings of each in words."""
    controls = [(f"tokens of the choice, seed {own.settings.get('seed')}", own) for own in free.random]
    return [(settings_text(free.choice.settings), free.choice), *controls, *((DEFAULTS, own) for own in free.defaults)]


def _candidates(title: str, rows: Sequence[tuple[str, Candidate]], best: Candidate | None = None) -> Table:
    """A row for each text of settings and what has them, the best in bold, loss and top-1 where images have labels."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column("settings", max_width=60)
    labelled = ("loss", "top-1 (%)") if any(own.classified for _, own in rows) else ()
    for heading in ("GMACs", "speed-up", *labelled, "divergence", "same class (%)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for settings, candidate in rows:
        same, known = candidate.fidelity.agreement, candidate.classified
        table.add_row(
            candidate.method,
            settings,
            f"{candidate.macs / 1e9:.3f}",
            f"{candidate.speedup:.2f}{_interval(candidate.interval)}",
            *(() if known is None else (f"{known.loss:.4g}", f"{known.top1:.2f}")),
            f"{candidate.fidelity.divergence:.4g}",
            "-" if same is None else f"{100 * same:.0f}",
            style="bold" if candidate == best else None,
        )
    return table


def measure_text(result: Tuning) -> str:
    """What settings were chosen by and on which images, and how the dense model does on labelled ones."""
    options = result.conditions.options
    text = f"chosen by {MEASURES[result.measure]}"
    images = options.get("data") or (f"{options['images']} images" if "images" in options else None)
    text += "" if images is None else f", on {images}"
    if result.dense is not None:
        text += f"; the dense model has a loss of {result.dense.loss:.4g} and top-1 {result.dense.top1:.2f} %"
    return text


def free_lines(free: FreeChoices) -> list[str]:
    """What the comparison with choices that need no search says of the one that was searched for."""
    choice = free.choice
    name = f"{choice.method} {settings_text(choice.settings)}"
    what = DIVERGENCE if choice.classified is None else LOSS
    own = f"{what} {choice.penalty:.4g}"
    lines = []
    if free.random_penalty is None:
        lines.append(f"no random control: {free.no_random}")
    else:
        theirs = f"{what} {free.random_penalty:.4g}, the mean of {len(free.random)} draws"
        word = "better" if free.beats_random else "NOT better"
        lines.append(f"{name} ({own}) is {word} than patches dropped at random to its token counts ({theirs})")
    better = free.better_default
    if better is not None:
        lines.append(
            f"{name} ({own}, {choice.speedup:.2f}x) is NOT better than the defaults of {better.method} "
            f"({what} {better.penalty:.4g}, {better.speedup:.2f}x), which are named instead"
        )
    elif free.defaults:
        methods = ", ".join(default.method for default in free.defaults)
        lines.append(f"no default that is at least as fast is as good; those that reach the aim: {methods}")
    else:
        lines.append("no method reaches the aim at its defaults")
    slower = [default for default in free.as_near_defaults if default.speedup < choice.speedup]
    lines += [
        f"the defaults of {default.method} are slower ({default.speedup:.2f}x), but reach the aim with "
        f"{what} {default.penalty:.4g}"
        for default in slower
    ]
    return lines


def choice_text(result: Tuning) -> str:
    """The best setting of a search, or why none is named."""
    if result.best is not None:
        return f"best: {candidate_text(result.best)}"
    if not result.tried:
        return "none is named: no setting was measured"
    fastest = max(result.tried, key=lambda candidate: candidate.interval[0])
    if result.untried and fastest.interval[0] > 1:
        return f"none is named: time was over before one reached the aim; fastest so far: {candidate_text(fastest)}"
    return (
        "none is named: no setting was measured faster than the dense model (a 95 % interval above 1); "
        f"fastest: {candidate_text(fastest)}. Larger batches or images gain more"
    )


def candidate_text(candidate: Candidate) -> str:
    """A setting that was measured, in one line."""
    known = candidate.classified
    return (
        f"{candidate.method} {settings_text(candidate.settings) or 'at its defaults'}, speed-up {candidate.speedup:.2f}"
        f"{_interval(candidate.interval)}, {candidate.macs / 1e9:.3f} GMACs, "
        + ("" if known is None else f"loss {known.loss:.4g}, top-1 {known.top1:.2f} %, ")
        + f"divergence {candidate.fidelity.divergence:.4g}"
    )


def settings_text(settings: Settings) -> str:
    """Settings as they are written in Python."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write one row for each model of the records: conditions, machine and numbers, in the units of the record."""
    rows = [_row(record, cost) for record in records for cost in record.models]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue().encode())


def _row(record: Record, cost: Cost) -> dict[str, object]:
    """Column -> value of one model."""
    conditions = record.conditions
    return {
        "name": cost.name,
        "method": cost.method,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "images_per_second": cost.images_per_second,
        "peak_memory": cost.peak_memory,
        "speedup": cost.speedup,
        "mac_ratio": cost.mac_ratio,
        "ideal_speedup": cost.ideal_speedup,
        "efficiency": cost.efficiency,
        "low": cost.interval[0],
        "high": cost.interval[1],
        **cost.latency,
        "tokens_left": cost.tokens[-1] if cost.tokens else None,
        "handed_over": cost.handed.tokens if cost.handed else None,
        "prefill_macs": cost.handed.prefill_macs if cost.handed else None,
        "cache_bytes": cost.handed.cache_bytes if cost.handed else None,
        "batch_size": conditions.batch_size,
        "input_size": "x".join(map(str, conditions.input_size)),
        "dtype": conditions.dtype,
        "device": conditions.device,
        "threads": conditions.threads,
        "compile": conditions.compile,
        "cuda_graphs": conditions.cuda_graphs,
        **record.machine,
    }
