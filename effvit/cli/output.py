"""What commands print, measure and draw: consoles, progress bars, figures."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from effvit.cli.models import RANDOM_WEIGHTS, has_random_weights, shared_input_size
from effvit.cli.options import FigureArguments
from effvit.measure.costs import profile
from effvit.measure.profiler import ProfileOptions
from effvit.measure.reader import Reader
from effvit.measure.values import Record
from effvit.measure.written_files import write_whole
from effvit.messages import plain
from effvit.selectors import CropSelector, VideoSelector
from effvit.show.crops import crops_figure
from effvit.show.video import video_figure
from effvit.show.visualize import token_figure

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "LONGEST_LINE",
    "Bar",
    "Bars",
    "Stop",
    "draw_figure",
    "figure_file",
    "file_stem",
    "finish_on_interrupt",
    "measure",
    "output",
    "progress",
    "say",
    "tell",
    "told_on_interrupt",
]

PIPE_WIDTH = 200  # columns of tables where the output is not a terminal
LONGEST_LINE = 4096  # as many characters as a path of Linux may have
SILENCE = 10.0  # seconds without a line, at most, where there is no terminal to draw a bar on


def output(stderr: bool = False) -> Console:
    """The console for tables, or for what stands beside results: as wide as the terminal, or PIPE_WIDTH."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def tell(*fields: object) -> None:
    """An item on a line of stdout of its own, whole and at once, for what reads it in a pipe; tabs between fields."""
    print("\t".join(plain(field, LONGEST_LINE) for field in fields), flush=True)


def say(text: str) -> None:
    """A line beside the results."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Stop:
    """Whether Ctrl-C was pressed, in the body of ``finish_on_interrupt``."""

    is_asked: bool = False


@contextmanager
def finish_on_interrupt(what_ends: str) -> Iterator[Stop]:
    """The first Ctrl-C in the body only asks for an end, and a line says so; the second ends it at once, as ever.

    If the body comes to its end once it was asked, a KeyboardInterrupt follows.

    Args:
        what_ends: What the body still does, for the line.
    """
    stop = Stop()

    def ask(*_: object) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.is_asked = True
        say(f"Ctrl-C: {what_ends}; press it again to end at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.is_asked:
        raise KeyboardInterrupt


@contextmanager
def told_on_interrupt(what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C in the body ends it as ever, once a line has said what is kept of its work and where."""
    try:
        yield
    except KeyboardInterrupt:
        say(what_is_kept())
        raise


@contextmanager
def progress() -> Iterator[Bars]:
    """Progress on stderr, so that stdout holds only results."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed meanwhile would not reach the pipe
        disable=not sys.stderr.isatty(),  # in a file even a cleared bar leaves an empty line
    ) as drawn:
        yield Bars(drawn)


@dataclass
class Bars:
    """Bars on a terminal; without one a line every ``SILENCE`` seconds says how far the last of them is.

    Attributes:
        drawn: The bars.
        said: When the last line was written.
    """

    drawn: Progress
    said: float = field(default_factory=lambda: monotonic())

    def add(self, what: str, total: int | None = None) -> Bar:
        """A bar of so many steps, None for one whose end is not known."""
        return Bar(self, what, total, self.drawn.add_task(what, total=total))

    def say(self, text: str) -> None:
        """One more line, where no bars are drawn."""
        self.said = monotonic()
        if self.drawn.disable:
            say(text)

    def now_and_then(self, text: str) -> None:
        """One more line, if there was none for a while."""
        if monotonic() - self.said > SILENCE:
            self.say(text)


@dataclass
class Bar:
    """How far one piece of work is.

    Attributes:
        bars: Those it is among.
        what: The work.
        total: Steps in all, None if not known.
        task: Its number among those that are drawn.
        done: Steps done.
    """

    bars: Bars
    what: str
    total: int | None
    task: TaskID
    done: int = 0

    def reach(self, done: int, line: str | None = None) -> None:
        """So many steps are done; the line is what is said of it now and then, None for their number."""
        self.done = done
        self.bars.drawn.update(self.task, completed=done)
        of = "" if self.total is None else f" of {self.total}"
        self.bars.now_and_then(f"{self.what}: {done}{of}" if line is None else line)

    def advance(self, line: str | None = None) -> None:
        """One more step is done; otherwise as ``reach``."""
        self.reach(self.done + 1, line)


def measure(
    models: Mapping[str, nn.Module],
    batch_size: int,
    images: Tensor | None,
    image_names: list[str],
    *,
    ideal: bool = True,
    breakdown: bool = False,
    reader: Reader | None = None,
    text: int = 0,
    is_enough: Callable[[], bool] = lambda: False,
    **options: Unpack[ProfileOptions],
) -> Record:
    """The record of ``effvit.measure.costs.profile``, with progress."""
    input_size = shared_input_size(models)
    with progress() as bars:
        speed = bars.add("measuring speed, runs")
        count = bars.add("counting multiply-adds, models", len(models))
        return profile(
            models,
            input_size,
            batch_size,
            images=images,
            image_names=image_names or None,
            ideal=ideal,
            breakdown=breakdown,
            reader=reader,
            text=text,
            on_run=lambda _: speed.advance(),
            on_count=lambda _: count.advance(),
            is_enough=is_enough,
            **options,
        )


def file_stem(name: str) -> str:
    """A model's name as part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)


def figure_file(folder: Path, image: str, model: str) -> Path:
    """Where the figure of an image's tokens is written."""
    return folder / f"{file_stem(image)}-{file_stem(model)}.png"


def draw_figure(
    model: nn.Module, name: str, image: Image.Image | Iterable[Image.Image], path: Path, arguments: FigureArguments
) -> None:
    """Write a figure of the tokens that the model leaves of the image, or of the frames of a video."""
    note = f" ({RANDOM_WEIGHTS})" if has_random_weights(arguments) else ""
    place = "" if name == arguments.model else f" in {arguments.model}"
    file = BytesIO()
    title = f"{name}{place}{note}"
    if not isinstance(image, Image.Image):
        assert isinstance(model, VideoSelector), "what else takes frames"
        figure = video_figure(model, image, title=title)
    elif isinstance(model, CropSelector):
        figure = crops_figure(model, image, title=title)
    else:
        figure = token_figure(model, image, title=title)
    figure.save(file, "PNG")
    write_whole(path, file.getvalue())
