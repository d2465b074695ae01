"""``effvit visualize``: figures of the tokens a model leaves of each image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from effvit.cli import options
from effvit.cli.models import RANDOM_WEIGHTS, create, has_random_weights
from effvit.cli.output import draw_figures, output
from effvit.measure.records import write_records
from effvit.measure.variants import list_variants, parse_setting, reduced
from effvit.messages import plain
from effvit.show.pictures import open_images
from effvit.show.visualize import token_record

__all__ = ["add_command"]


class Arguments(options.FigureArguments):
    """Parsed arguments of ``effvit visualize``."""

    images: list[str]
    method: list[str]
    settings: list[str]
    json: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "visualize",
        parents=[options.weights(), options.entry(), options.settings()],
        help="figures of the tokens a model leaves of each image",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help=options.IMAGES)
    command.add_argument("--model", required=True, metavar="NAME", help="the dense host, or a model to show as it is")
    command.add_argument("--method", nargs="+", default=[], metavar="NAME", help="methods to reduce the host with")
    command.add_argument("--out", required=True, type=Path, metavar="DIR")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the tokens there too, for effvit report")
    command.set_defaults(run=run_visualize)


def run_visualize(arguments: Arguments) -> None:
    """Write a figure for every image, method and setting."""
    assignments = [parse_setting(text) for text in arguments.settings]
    if assignments and not arguments.method:
        raise ValueError("settings belong to a method: name one with --method")
    variants = list_variants(arguments.method, assignments)
    images = open_images(arguments.images)
    model = create(arguments.model, arguments)
    models: Mapping[str, nn.Module] = reduced(model, variants) if variants else {arguments.model: model}
    console = output()
    if has_random_weights(arguments):
        console.print(RANDOM_WEIGHTS, style="yellow")
    for path in draw_figures(models, images, arguments):
        console.print(plain(path))
    if arguments.json is not None:
        host = arguments.model if variants else None
        note = RANDOM_WEIGHTS if has_random_weights(arguments) else None
        records = [
            token_record(model, image, name=stem, model_name=name, host=host, note=note)
            for name, model in models.items()
            for stem, image in images.items()
        ]
        write_records(arguments.json, records)
