"""What ``effvit demo`` shows: photographs inside installed packages, the variants it compares, their plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["VARIANTS", "photographs", "plot_costs"]

# Package -> files of its wheel; all are public domain, CC0 or CC BY photographs. Read from the folder: the
# packages' own loaders may ask the network.
PHOTOGRAPHS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("evit", {"keep_rate": 0.7}),
    ("evit", {"keep_rate": 0.5}),
    ("tome", {"r": 8}),
    ("tome", {"r": 13}),
    ("gtp", {"num_prop": 8}),
    ("ats", {}),
    ("zero_tprune", {}),
    ("dymu", {"r_total": 96}),  # calibrated on the photographs
    ("expedite", {}),
    ("hot", {}),
)
DENSE_COLOUR = "#343a40"
COLOURS = ("#1c7ed6", "#e8590c", "#2f9e44", "#9c36b5", "#e03131", "#0c8599", "#f08c00", "#862e9c", "#5c940d")
MARKERS = "osD^v"


def photographs() -> dict[str, Image.Image]:
    """The demo's photographs by name, in RGB; nothing is downloaded.

    Raises:
        FileNotFoundError: A package that carries some is not installed.
    """
    found = {}
    for package, files in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the demo's photographs come with the package {package}, which is not installed; install effvit[demo]"
            )
        for file in files:
            with Image.open(Path(spec.origin).parent / file) as image:
                found[Path(file).stem] = image.convert("RGB")
    return found


def plot_costs(costs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw GMACs against images/s: up and left is better; the dashed line is what fewer MACs alone promise.

    Args:
        costs: The models of a record of ``effvit.costs.profile``, the dense host first.
        title: Text above the plot.
        path: PNG to write.
    """
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dense = costs[0]
    baseline = dense["images_per_second"]
    methods = list(dict.fromkeys(cost["method"] for cost in costs))
    for cost in costs:
        own = [other["name"] for other in costs if other["method"] == cost["method"]]
        number = methods.index(cost["method"])
        speed = cost["speedup"] * baseline
        low, high = (bound * baseline for bound in cost["interval"])
        axes.errorbar(
            cost["macs"] / 1e9,
            speed,
            yerr=[[max(0.0, speed - low)], [max(0.0, high - speed)]],
            fmt=MARKERS[own.index(cost["name"]) % len(MARKERS)],
            color=COLOURS[(number - 1) % len(COLOURS)] if number else DENSE_COLOUR,
            markersize=8,
            capsize=3,
            label=cost["name"],
            zorder=3,
        )
    gmacs = [cost["macs"] / 1e9 for cost in costs]
    fewest, most = min(gmacs), max(gmacs)
    promised = [fewest + (most - fewest) * i / 50 for i in range(51)]
    axes.plot(
        promised,
        [baseline * dense["macs"] / 1e9 / x for x in promised],
        "--",
        color="#ced4da",
        label="speed if only MACs counted",
        zorder=1,
    )
    axes.set_xlabel("GMACs of one image")
    axes.set_ylabel("images/s (speed-up over dense with 95 % interval)")
    axes.set_title(title, fontsize=11)
    axes.grid(color="#f1f3f5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
