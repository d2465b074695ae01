"""``effvit tune``: the setting that reaches a target speed-up here with the least change to the outputs."""

from __future__ import annotations

from pathlib import Path

import torch

import effvit
from effvit.cli import options
from effvit.cli.models import RANDOM_WEIGHTS, check_device, create, has_random_weights
from effvit.cli.output import output, progress
from effvit.measure.json_files import write_json
from effvit.measure.records import as_json, as_object
from effvit.measure.tune import TUNED, tune
from effvit.protocols import Json
from effvit.show.pictures import open_images
from effvit.show.tables import print_tuning
from effvit.show.visualize import load_images

__all__ = ["add_command"]


class Arguments(options.WeightArguments, options.MachineArguments):
    """Parsed arguments of ``effvit tune``."""

    model: str
    images: list[str]
    speedup: float | None
    gmacs: float | None
    method: list[str]
    batch_size: int
    rounds: int
    final_rounds: int
    json: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "tune",
        parents=[options.weights(), options.entry(), options.machine()],
        help="the setting that reaches a target speed-up here with the least change to the outputs",
        description="Measure settings of several methods on this machine, and compare their outputs on the IMAGEs.",
    )
    command.add_argument("model", metavar="MODEL", help="a plain ViT of timm")
    command.add_argument("images", nargs="+", metavar="IMAGE", help=options.IMAGES)
    aim = command.add_mutually_exclusive_group(required=True)
    aim.add_argument("--speedup", type=float, metavar="FACTOR", help="target speed-up over MODEL, e.g. 1.5")
    aim.add_argument("--gmacs", type=float, help="billions of multiply-adds of one image not to exceed")
    command.add_argument("--method", nargs="+", default=TUNED, metavar="NAME", help="methods to choose from")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--rounds", type=int, default=8, help="of each step of the search")
    command.add_argument("--final-rounds", type=int, default=40, help="of the measurement that decides")
    command.add_argument("--json", type=Path, metavar="FILE", help="write model_name and settings for timm there")
    command.set_defaults(run=run_tune)


def run_tune(arguments: Arguments) -> None:
    """Print the front of settings and the best one for the aim."""
    check_device(arguments.device)
    photos = open_images(arguments.images)
    dense = create(arguments.model, arguments)
    images = load_images(dense, list(photos.values()))
    console = output()
    if has_random_weights(arguments):
        console.print(f"{arguments.model} has {RANDOM_WEIGHTS}", style="yellow")
    with progress() as bars:
        task = bars.add_task("measuring", total=None)
        result = tune(
            dense,
            images,
            speedup=arguments.speedup,
            macs=None if arguments.gmacs is None else round(1e9 * arguments.gmacs),
            methods=arguments.method,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            final_rounds=arguments.final_rounds,
            on_run=lambda _: bars.advance(task),
            threads=arguments.threads,
            device=arguments.device,
            dtype=getattr(torch, arguments.dtype),
        )
    print_tuning(console, result)
    if arguments.json is not None:
        name = f"{result.best.method}_{arguments.model}"
        known = name.partition(".")[0] in effvit.list_models()
        ready: dict[str, Json] = {
            "model_name": name if known else None,
            "settings": as_json(result.best.settings),
            "method": result.best.method,
            "host": arguments.model,
        }
        write_json(arguments.json, ready | as_object(result))
