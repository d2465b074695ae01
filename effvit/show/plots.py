"""Records of ``effvit.measure.costs.profile`` as plots: speed against multiply-adds, accuracy against both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from effvit.measure.accuracy import shown_models
from effvit.measure.choices import Choice, choices_of
from effvit.measure.values import Cost, Evaluated, Evaluation, Record
from effvit.reducers import METHODS

__all__ = ["Line", "accuracy_lines", "plot_accuracy", "plot_choices", "plot_costs"]

DENSE_COLOUR = "#343a40"
COLOURS = ("#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#e03131", "#0c8599", "#b08900", "#74512d", "#d6336c", "#5c940d")
MARKERS = "osD^vPXph<>"
OWN_MARKERS = "*Hd8p>X<"  # of models without a method
DASHES = ("-", "--", ":", "-.")  # for each way the weights were trained
CONTROL_COLOURS = {"random": "#868e96", "uniform": "#c2a33a", "resolution": "#343a40"}
CONTROL_MARKERS = {"random": "x", "uniform": "+", "resolution": "*"}
COLUMNS = 4  # of panels
FAINT, GRID = "#adb5bd", "#f1f3f5"
ACCURACY_TICKS = (10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 92, 94, 96, 97, 98, 98.5, 99, 99.3, 99.5)
LEAST_ERROR = 0.1  # percent; the axis ends there
Numbers: TypeAlias = NDArray[np.float64]
TEXT: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10}  # comes with matplotlib
# Text stays text: half the size, and where another font takes its place it is narrower.
VECTORS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "effvit"}


@dataclass
class Line:
    """Models of one method whose weights were trained in one way.

    Attributes:
        method: Name of the method; None for models that are what they are.
        weights: How the weights were trained where they are not those of the first record's models.
        models: What they cost, by multiply-adds.
    """

    method: str | None
    weights: str | None
    models: list[Cost] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each model, in percent."""
        return [model.accuracy.value for model in self.models if model.accuracy is not None]

    @property
    def name(self) -> str:
        """Text of the legend; a model without a method has a line of its own."""
        if self.method is None:
            return self.models[0].name
        return self.method if self.weights is None else f"{self.method}, {self.weights}"


def accuracy_lines(records: Iterable[Record]) -> list[Line]:
    """The lines of ``plot_accuracy``: all models that have an accuracy, the dense host first, then by method.

    Raises:
        ValueError: The first model, or all others, have no accuracy.
    """
    lines: dict[tuple[str, str | None], Line] = {}
    shown = shown_models(records)
    for model, weights, _ in shown:
        if model.accuracy is not None:
            key = model.method or model.name, weights
            lines.setdefault(key, Line(model.method, weights)).models.append(model)
    if not shown or shown[0].model.accuracy is None or len(lines) < 2:
        raise ValueError(
            "a plot needs the accuracy of the first model and of one more; effvit evaluate --rounds measures it"
        )
    for line in lines.values():
        line.models.sort(key=lambda model: model.macs)
    places: list[str | None] = [None, *METHODS]
    return sorted(lines.values(), key=lambda line: places.index(line.method))


class Style(TypedDict, total=False):
    """Keywords of matplotlib's lines."""

    color: str
    marker: str
    markersize: float
    markerfacecolor: str
    linestyle: str
    linewidth: float
    label: str


def look(method: str | None, number: int) -> Style:
    """Colour and marker of a method, the same in every plot; ``number`` tells models without one apart."""
    if method is None:
        return {"color": DENSE_COLOUR, "marker": OWN_MARKERS[number % len(OWN_MARKERS)], "markersize": 11}
    place = list(METHODS).index(method)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 6}


def plot_accuracy(records: Sequence[Record], title: str, path: Path, note: str | None = None) -> None:
    """Draw accuracy against multiply-adds and against measured speed-up, a line for each method.

    The axis of accuracies is logarithmic in the errors, so that one point more counts more where few are missing.

    Args:
        records: Of ``effvit.measure.costs.profile`` with accuracies; the first model of the first is the dense
            host, and of each the speed-ups refer to its own first model.
        title: Text above the plot.
        path: .svg or .png to write; the same records give the same bytes with the same matplotlib.
        note: What the file says of its origin.

    Raises:
        ValueError: As ``accuracy_lines``.
    """
    lines = accuracy_lines(records)
    ways = list(dict.fromkeys(line.weights for line in lines))
    dense = lines[0].models[0]
    unit, letter = (1e9, "G") if dense.macs >= 1e9 else (1e6, "M")
    with matplotlib.rc_context(TEXT | VECTORS):
        figure = Figure(figsize=(11.6, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        by_macs: Axes
        by_speed: Axes
        by_macs, by_speed = figure.subplots(1, 2, sharey=True)
        for axes in (by_macs, by_speed):
            axes.axhline(lines[0].accuracies[0], color=FAINT, linestyle=":", linewidth=1, zorder=1)
        for number, line in enumerate(lines):
            way = ways.index(line.weights)
            style = look(line.method, number)
            style |= {"linestyle": DASHES[way % len(DASHES)], "linewidth": 1.4}
            if way:
                style["markerfacecolor"] = "white"
            by_macs.plot(
                [model.macs / unit for model in line.models], line.accuracies, label=line.name, zorder=3, **style
            )
            speeds: Numbers = np.array([model.speedup for model in line.models])
            bounds: Numbers = np.array([model.interval for model in line.models])
            errors: Numbers = np.maximum(0, [speeds - bounds[:, 0], bounds[:, 1] - speeds])
            by_speed.errorbar(speeds, line.accuracies, xerr=errors, elinewidth=0.8, zorder=3, **style)
        scale_by_errors(by_macs, [value for line in lines for value in line.accuracies])
        by_macs.set_ylabel("top-1 accuracy, %")
        by_macs.set_xlabel(f"{letter}MACs of one picture")
        by_speed.set_xlabel("speed-up over the dense model")
        for axes in (by_macs, by_speed):
            tidy(axes)
        figure.suptitle(title, fontsize=11)
        figure.legend(loc="outside right center", frameon=False)
        save(figure, path, note)


def scale_by_errors(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis of accuracies in percent logarithmic in the errors, around the values."""

    def up(accuracy: Numbers) -> Numbers:
        return -np.log(np.maximum(100 - np.asarray(accuracy), LEAST_ERROR))

    def down(height: Numbers) -> Numbers:
        return 100 - np.exp(-np.asarray(height))

    axes.set_yscale("function", functions=(up, down))
    largest, smallest = (100 - value for value in (min(values), max(values)))  # errors
    low = 100 - min(100, max(largest * 1.2, 10 * LEAST_ERROR))
    high = 100 - max(smallest * 0.78, LEAST_ERROR)  # there is a tick between them
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ACCURACY_TICKS if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def plot_choices(evaluation: Evaluation, title: str, path: Path, note: str | None = None) -> None:
    """Draw accuracy against multiply-adds, a panel for each method with its controls in it.

    A method is worth its cost where its line is above those of its controls. Of random controls the mean over the seeds
    is drawn, with a bar from the least to the largest.

    Args:
        evaluation: With controls; the dotted line is its first model.
        title: Text above the plot.
        path: .svg or .png to write; the same record gives the same bytes with the same matplotlib.
        note: What the file says of its origin.

    Raises:
        ValueError: An evaluation without controls.
    """
    choices = choices_of(evaluation)
    methods = [name for name in METHODS if any(choice.model.method == name for choice in choices)]
    columns = min(COLUMNS, len(methods))
    rows = -(-len(methods) // columns)
    dense = evaluation.models[0].accuracy.value
    with matplotlib.rc_context(TEXT | VECTORS):
        figure = Figure(figsize=(2.9 * columns + 0.8, 2.6 * rows + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        panels: list[Axes] = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for number, (axes, method) in enumerate(zip(panels, methods, strict=False)):
            axes.axhline(dense, color=FAINT, linestyle=":", linewidth=1, zorder=1)
            draw_choices(axes, method, [choice for choice in choices if choice.model.method == method])
            axes.set_title(method, fontsize=10)
            tidy(axes)
            if number + columns >= len(methods):  # no panel below
                axes.set_xlabel("MMACs of one image")
                axes.tick_params(labelbottom=True)
        for axes in panels[len(methods) :]:
            axes.remove()
        figure.supylabel("top-1 accuracy, %", fontsize=10)
        figure.suptitle(title, fontsize=11)
        lines = {line.get_label(): line for axes in panels[: len(methods)] for line in axes.get_lines()}
        known = [control for control in CONTROL_COLOURS if control in lines]
        figure.legend([lines[control] for control in known], known, loc="outside lower center", ncols=3, frameon=False)
        save(figure, path, note)


def draw_choices(axes: Axes, method: str, choices: Sequence[Choice]) -> None:
    """A line for one method, and one for each of its controls."""
    for control, colour in CONTROL_COLOURS.items():
        groups = [choice.controls[control] for choice in choices if control in choice.controls]
        if groups:
            points = sorted(spread_of(group) for group in groups)
            macs, means, *bars = np.array(points).T
            style: Style = {"color": colour, "marker": CONTROL_MARKERS[control], "markersize": 5, "linestyle": "--"}
            axes.plot(macs, means, label=control, linewidth=1, zorder=2, **style)
            axes.errorbar(macs, means, np.stack(bars), color=colour, linestyle="none", elinewidth=0.8, zorder=2)
    own = sorted((choice.model.macs / 1e6, choice.model.accuracy.value) for choice in choices)
    axes.plot(*zip(*own, strict=True), label=method, linewidth=1.6, zorder=3, **look(method, 0))


def spread_of(models: Sequence[Evaluated]) -> tuple[float, float, float, float]:
    """MMACs and mean accuracy of controls that differ in their seed, and how far the others are below and above."""
    values = [model.accuracy.value for model in models]
    mean = sum(values) / len(values)
    # A mean of equal numbers may differ from them by rounding; a bar has no negative length.
    return models[0].macs / 1e6, mean, max(0.0, mean - min(values)), max(0.0, max(values) - mean)


def plot_costs(costs: Sequence[Cost], title: str, path: Path) -> None:
    """Draw GMACs against images/s: up and left is better; the dashed line is what fewer MACs alone promise.

    Args:
        costs: The models of a record of ``effvit.measure.costs.profile``, the dense host first.
        title: Text above the plot.
        path: .svg or .png to write.

    Raises:
        ValueError: No models.
    """
    if not costs:
        raise ValueError("a plot of costs needs the models of a record, got none; effvit profile --json writes one")
    baseline = costs[0].images_per_second
    gmacs = [cost.macs / 1e9 for cost in costs]
    promised = np.linspace(min(gmacs), max(gmacs))
    seen: dict[str | None, int] = {}
    with matplotlib.rc_context(TEXT):
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for cost, x in zip(costs, gmacs, strict=True):
            again = seen[cost.method] = seen.get(cost.method, -1) + 1
            style = look(cost.method, 0)
            style |= {"markersize": 8, "label": cost.name, "linestyle": "none"}
            if again:
                style["markerfacecolor"] = "white"
            speed = cost.speedup * baseline
            low, high = (bound * baseline for bound in cost.interval)
            errors = [[max(0.0, speed - low)], [max(0.0, high - speed)]]
            axes.errorbar(x, speed, yerr=errors, capsize=3, zorder=3, **style)
        ideal = baseline * gmacs[0] / promised
        axes.plot(promised, ideal, "--", color=FAINT, label="speed if only MACs counted", zorder=1)
        axes.set_xlabel("GMACs of one image")
        axes.set_ylabel("images/s (speed-up over dense with 95 % interval)")
        figure.suptitle(title, fontsize=10)
        tidy(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        save(figure, path)


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(color=GRID)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, note: str | None = None) -> None:
    """Write the figure without what changes from run to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, str | None] = dict.fromkeys(("Date", "Creator") if path.suffix == ".svg" else ("Software",))
    figure.savefig(path, dpi=130, metadata=metadata | ({"Description": note} if note else {}))
