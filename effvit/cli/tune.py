"""``effvit tune``: the setting that reaches a target speed-up here with the least loss or change to the outputs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import effvit
from effvit.cli import options
from effvit.cli.images import look_at, named_images
from effvit.cli.models import RANDOM_WEIGHTS, check_device, create, has_random_weights
from effvit.cli.output import Bar, output, progress, told_on_interrupt
from effvit.data.opening import FORMS, open_labelled
from effvit.data.preparation import load_images
from effvit.measure.evaluation import Selection, load_labelled
from effvit.measure.json_files import write_json
from effvit.measure.records import as_json, as_object, read_tuning
from effvit.measure.selections import Exit
from effvit.measure.tune import SEARCHES, tune
from effvit.measure.tune_tokens import tune_tokens
from effvit.measure.values import Candidate, Judged, Tuning
from effvit.measure.variants import python_line, selector_line, timm_line
from effvit.messages import plain
from effvit.protocols import Json, Settings, Size
from effvit.show.tables import candidate_text, free_lines, print_tuning

__all__ = ["add_command"]

Known: TypeAlias = "Candidate | Judged"


class Arguments(options.WeightArguments, options.SelectorArguments, options.MachineArguments, options.ImageArguments):
    """Parsed arguments of ``effvit tune``."""

    model: str
    images: list[str]
    data: Path | None
    limit: int | None
    speedup: float | None
    gmacs: float | None
    tokens: int | None
    crops: Size | None
    methods: list[str] | None
    batch_size: int
    img_size: Size | None
    rounds: int
    final_rounds: int
    moves: int
    search: str
    minutes: float | None
    json: Path | None
    resume: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "tune",
        parents=[options.weights(), options.entry(), options.selectors(), options.machine(), options.images()],
        help="the setting that reaches a target speed-up here with the least loss or change to the outputs",
        description="Measure settings of several methods on this machine, and choose among them by their loss on "
        "labelled images (--data), or by how far outputs on the IMAGEs are from MODEL's. With --tokens, choose among "
        "selectors of what MODEL hands over as a vision tower, likewise, as its own last blocks read it.",
    )
    command.add_argument(
        "model", type=options.model_name, metavar="MODEL", help="a plain ViT of timm, or a host with windows"
    )
    images = command.add_argument(
        "images", nargs="+", default=[], type=options.image_name, metavar="IMAGE", help=options.IMAGES
    )
    images.required = False  # nargs="*" would take no image at all where options stand in front of the first
    command.add_argument("--data", type=Path, metavar="PATH", help=f"labelled images in place of IMAGEs: {FORMS}")
    command.add_argument("--limit", type=int, metavar="N", help="only so many of them, evenly spread over the set")
    aim = command.add_mutually_exclusive_group(required=True)
    aim.add_argument("--speedup", type=float, metavar="FACTOR", help="target speed-up over MODEL, e.g. 1.5")
    aim.add_argument("--gmacs", type=float, help="billions of multiply-adds of one image not to exceed")
    aim.add_argument("--tokens", type=int, metavar="K", help="tokens that a vision tower is to hand over at most")
    command.add_argument(
        *("--methods", "--method"),
        nargs="+",
        type=options.method_name,
        metavar="NAME",
        help="methods to choose from (default: all that can be); with --tokens those to try inside the tower",
    )
    command.add_argument("--crops", type=options.parse_crops, help=argparse.SUPPRESS)  # refused with the reason
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--img-size", type=options.parse_size, metavar="SIZE", help="side or HxW (default: MODEL's)")
    command.add_argument("--rounds", type=int, default=8, help="of each step of the search")
    command.add_argument("--final-rounds", type=int, default=40, help="of the measurement that decides")
    command.add_argument(
        "--moves", type=int, default=60, help="schedules block by block to compare for each method; 0 for none"
    )
    command.add_argument(
        "--search", choices=SEARCHES, default="moves", help="how these are found: step by step, or drawn at random"
    )
    command.add_argument("--minutes", type=float, help="stop in so many, and say what was not tried")
    command.add_argument(
        "--json", type=options.output_file, metavar="FILE", help="write all that is found there, as it is found"
    )
    command.add_argument(
        "--resume", type=options.output_file, metavar="FILE", help="go on with the search in FILE, and write there"
    )
    command.set_defaults(run=run_tune)


def run_tune(arguments: Arguments) -> None:
    """Print the front of settings and the best one for the aim."""
    if arguments.crops is not None:
        rows, columns = arguments.crops
        raise ValueError(
            f"--tokens chooses by what the tower's own blocks and head make of the tokens of one image, and none of "
            f"them reads those of {rows * columns + 1} parts together, got --crops {rows}x{columns}; leave it out, or "
            "compare costs by effvit profile --crops"
        )
    check_device(arguments.device)
    leaving = options.leaving(arguments, arguments.tokens is not None)
    if arguments.tokens is not None:
        run_tokens(arguments, arguments.tokens, leaving)
        return
    before = None if arguments.resume is None else read_tuning(arguments.resume)
    path = arguments.json or arguments.resume
    read = opened(arguments)
    dense = create(arguments.model, arguments, arguments.img_size)
    given = read(dense)
    console = output()
    if has_random_weights(arguments):
        console.print(f"{arguments.model} has {RANDOM_WEIGHTS}", style="yellow")
    with progress() as bars:
        report = Report(bars.add("measuring, runs"), lambda found: write(path, arguments, found))
        with told_on_interrupt(lambda: interrupted(path, report.known)):
            result = tune(
                dense,
                given.images,
                labels=given.labels,
                data=given.data,
                speedup=arguments.speedup,
                macs=None if arguments.gmacs is None else round(1e9 * arguments.gmacs),
                methods=arguments.methods,
                batch_size=arguments.batch_size,
                rounds=arguments.rounds,
                final_rounds=arguments.final_rounds,
                moves=arguments.moves,
                search=arguments.search,
                minutes=arguments.minutes,
                host=arguments.model,
                before=before,
                on_run=report.run,
                on_candidate=report.candidate,
                threads=arguments.threads,
                device=arguments.device,
                dtype=getattr(torch, arguments.dtype),
            )
    print_tuning(console, result)
    for line in lines(arguments, result.best):
        console.print(line, soft_wrap=True)
    write(path, arguments, result)


def run_tokens(arguments: Arguments, tokens: int, leaving: Exit) -> None:
    """Print the selectors that hand over so many tokens, and the best one."""
    for name, value in (("resume", arguments.resume), ("minutes", arguments.minutes)):
        if value is not None:
            raise ValueError(
                f"--{name} is of a search for a speed-up; --tokens measures each selector once, so leave it out"
            )
    read = opened(arguments)
    dense = create(arguments.model, arguments, arguments.img_size)
    given = read(dense)
    console = output()
    if has_random_weights(arguments):
        console.print(f"{arguments.model} has {RANDOM_WEIGHTS}", style="yellow")
    with progress() as bars:
        bar = bars.add("measuring, runs")
        result = tune_tokens(
            dense,
            given.images,
            tokens,
            labels=given.labels,
            data=given.data,
            selectors=arguments.select or None,
            methods=arguments.methods or (),
            leaving=leaving,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            host=arguments.model,
            on_run=lambda _: bar.advance(),
            threads=arguments.threads,
            device=arguments.device,
            dtype=getattr(torch, arguments.dtype),
        )
    print_tuning(console, result)
    assert result.best is not None
    line = selector_line(arguments.model, host_options(arguments), result.best, leaving)
    console.print(line, soft_wrap=True)
    if arguments.json is not None:
        said: dict[str, Json] = {} if result.free is None else {"said": as_json(free_lines(result.free))}
        write_json(arguments.json, as_object(result) | said)


class Given(NamedTuple):
    """What settings are compared on.

    Attributes:
        images: (B, channels, H, W), as the model takes them.
        labels: (B,) their classes; None for images without.
        data: What records call the labelled set.
    """

    images: Tensor
    labels: Tensor | None = None
    data: str | None = None


def opened(arguments: Arguments) -> Callable[[nn.Module], Given]:
    """What reads the images for a model, once it is known that they are there.

    Raises:
        ValueError: Not one of IMAGEs and --data, or as ``named_images``, ``open_labelled``,
            ``Selection.of`` and ``look_at``.
    """
    if arguments.data is None:
        if arguments.limit is not None:
            raise ValueError("--limit takes some images of a labelled set; name one with --data, or leave it out")
        if not arguments.images:
            raise ValueError("name IMAGEs to compare outputs on, or a labelled set with --data, to choose by its loss")
        photos = named_images(arguments.images, arguments.skip_bad)
        return lambda dense: Given(load_images(dense, photos))
    if arguments.images:
        raise ValueError(
            f"settings are chosen by the loss on --data or by the outputs on IMAGEs, got both "
            f"({plain(arguments.data)} and {plain(arguments.images[0])}); leave out one of them"
        )
    chosen = Selection.of(open_labelled(arguments.data), arguments.limit)
    selection = replace(chosen, indices=look_at(chosen.images, chosen.indices, arguments.skip_bad))
    return lambda dense: Given(*load_labelled(dense, selection, arguments.model), selection.text)


@dataclass
class Report:
    """What a search tells while it runs: a bar on a terminal, else a line for each setting that was measured, and one
    every few seconds between them.

    Attributes:
        bar: That of this search.
        keep: Called with the search as far as it is.
        known: Settings so far.
    """

    bar: Bar
    keep: Callable[[Tuning], None]
    known: int = 0

    def run(self, _: str) -> None:
        """After a timed run."""
        self.bar.advance(self.text("measuring"))

    def candidate(self, candidate: Known, found: Tuning) -> None:
        """After a setting was judged or measured."""
        self.known = len(found.tried) + len(found.judged or ())
        self.keep(found)
        if isinstance(candidate, Candidate):
            self.bar.bars.say(self.text(candidate_text(candidate)))
        else:
            self.bar.bars.now_and_then(self.text("comparing schedules"))

    def text(self, what: str) -> str:
        """How far the search is."""
        return f"{self.known} settings: {what}"


def interrupted(path: Path | None, known: int) -> str:
    """What becomes of a search that was stopped."""
    if path is None:
        return "nothing of the search is kept; with --json FILE it would go on from there"
    if known == 0:
        return "no setting was measured yet, so that there is nothing to go on from"
    return f"{known} settings are in {plain(path)}; the same command with --resume {plain(path)} goes on from there"


def host_options(arguments: Arguments) -> Settings:
    """The keywords that the host was created with."""
    size: Settings = {} if arguments.img_size is None else {"img_size": list(arguments.img_size)}
    return ({"pretrained": True} if arguments.pretrained else {}) | size


def lines(arguments: Arguments, best: Candidate | None) -> list[str]:
    """Python that makes the chosen model."""
    if best is None:
        return []
    given = (arguments.model, host_options(arguments), best.method, best.settings)
    named = timm_line(*given)
    found = [python_line(*given), named or f"# {best.method} on {arguments.model} has no name of its own in timm"]
    if arguments.checkpoint is not None:
        found.append(f"# then effvit.load_checkpoint(model, {str(arguments.checkpoint)!r}) loads the weights")
    return found


def write(path: Path | None, arguments: Arguments, result: Tuning) -> None:
    """Write the search, and beside its best setting what timm takes."""
    if path is None:
        return
    best = result.best
    ready: dict[str, Json] = {"model_name": None, "settings": None, "method": None, "host": arguments.model}
    if best is not None:
        name = f"{best.method}_{arguments.model}"
        known = name.partition(".")[0] in effvit.list_models()
        ready |= {"model_name": name if known else None, "settings": as_json(best.settings), "method": best.method}
        ready["python"] = as_json(lines(arguments, best))
    said: dict[str, Json] = {} if result.free is None else {"said": as_json(free_lines(result.free))}
    write_json(path, ready | as_object(result) | said)
