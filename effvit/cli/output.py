"""What commands print, measure and draw: consoles, progress bars, figures."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from effvit.cli.models import RANDOM_WEIGHTS, has_random_weights, shared_input_size
from effvit.cli.options import FigureArguments
from effvit.measure.costs import profile
from effvit.measure.profiler import ProfileOptions
from effvit.measure.values import Record
from effvit.show.visualize import token_figure

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LONGEST_LINE", "Lines", "draw_figures", "file_stem", "measure", "output", "progress", "say"]

PIPE_WIDTH = 200  # columns where the output is not a terminal
LONGEST_LINE = 1000
SILENCE = 10.0  # seconds without a line, at most, where there is no terminal to draw a bar on


def output() -> Console:
    """The console for results: as wide as the terminal, or PIPE_WIDTH."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def progress() -> Progress:
    """Progress bars on stderr, so that stdout holds only results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),  # in a file even a cleared bar leaves an empty line
    )


@dataclass
class Lines:
    """Lines on stderr where there is no terminal to draw a bar on.

    Attributes:
        bars: The progress bars; while they are drawn, nothing is written.
        said: When the last line was written.
    """

    bars: Progress
    said: float = field(default_factory=lambda: monotonic())

    def say(self, text: str) -> None:
        """One more line."""
        self.said = monotonic()
        if self.bars.disable:
            say(text)

    def now_and_then(self, text: str) -> None:
        """One more line, if there was none for a while."""
        if monotonic() - self.said > SILENCE:
            self.say(text)


def say(text: str) -> None:
    """A line beside the results."""
    print(text, file=sys.stderr, flush=True)


def measure(
    models: Mapping[str, nn.Module],
    batch_size: int,
    images: Tensor | None,
    image_names: list[str],
    *,
    ideal: bool = True,
    breakdown: bool = False,
    **options: Unpack[ProfileOptions],
) -> Record:
    """The record of ``effvit.measure.costs.profile``, with progress bars."""
    input_size = shared_input_size(models)
    with progress() as bars:
        speed = bars.add_task("measuring speed", total=None)
        count = bars.add_task("counting multiply-adds", total=len(models))
        return profile(
            models,
            input_size,
            batch_size,
            images=images,
            image_names=image_names or None,
            ideal=ideal,
            breakdown=breakdown,
            on_run=lambda _: bars.advance(speed),
            on_count=lambda _: bars.advance(count),
            **options,
        )


def file_stem(name: str) -> str:
    """A model's name as part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)


def draw_figures(
    models: Mapping[str, nn.Module], images: Mapping[str, Image.Image], arguments: FigureArguments
) -> list[Path]:
    """Write a token figure for every image and model, named after both; returns the paths."""
    note = f" ({RANDOM_WEIGHTS})" if has_random_weights(arguments) else ""
    paths: list[Path] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    with progress() as bars:
        task = bars.add_task("drawing tokens", total=len(images) * len(models))
        for name, model in models.items():
            for stem, image in images.items():
                path = arguments.out / f"{stem}-{file_stem(name)}.png"
                place = "" if name == arguments.model else f" in {arguments.model}"
                token_figure(model, image, title=f"{name}{place}{note}").save(path)
                paths.append(path)
                bars.advance(task)
    return paths
