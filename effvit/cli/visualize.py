"""``effvit visualize``: figures of the tokens a model leaves of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from effvit.cli import options
from effvit.cli.images import named_images
from effvit.cli.models import RANDOM_WEIGHTS, create, has_random_weights
from effvit.cli.output import draw_figure, figure_file, output, progress, tell, told_on_interrupt
from effvit.measure.records import write_records
from effvit.measure.selections import Views, selected
from effvit.measure.values import TokenRecord
from effvit.measure.variants import list_all, parse_setting, reduced
from effvit.messages import plain
from effvit.show.named_images import NamedImages
from effvit.show.visualize import token_record

__all__ = ["add_command"]


class Arguments(options.FigureArguments, options.VariantArguments, options.SelectionArguments, options.ImageArguments):
    """Parsed arguments of ``effvit visualize``."""

    images: list[str]
    video: bool
    json: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "visualize",
        parents=[options.weights(), options.entry(), options.variants(), options.selection(), options.images()],
        help="figures of the tokens a model leaves of each image",
        description="Draw which patches a model keeps, merges and drops; with --select which of them leave a tower.",
    )
    command.add_argument("images", nargs="+", type=options.image_name, metavar="IMAGE", help=options.IMAGES)
    command.add_argument(
        "--model",
        required=True,
        type=options.model_name,
        metavar="NAME",
        help="the dense host, or a model to show as it is",
    )
    command.add_argument("--out", required=True, type=options.output_folder, metavar="DIR")
    command.add_argument(
        "--video", action="store_true", help="IMAGEs are the frames of one video, in the order of the numbers they have"
    )
    command.add_argument(
        "--json", type=options.output_file, metavar="FILE", help="write the tokens there too, for effvit report"
    )
    command.set_defaults(run=run_visualize)


def run_visualize(arguments: Arguments) -> None:
    """Write a figure for every image, method and setting."""
    leaving = options.leaving(arguments, bool(arguments.select))
    assignments = [parse_setting(text) for text in arguments.settings]
    images = named_images(arguments.images, arguments.skip_bad)
    views = options.views_from(arguments.crops, len(images) if arguments.video else None, "--video")
    if arguments.json is not None and views != Views():
        raise ValueError(
            f"--json holds the tokens of single images, got {'--video' if arguments.video else '--crops'} too; leave "
            "one of them out"
        )
    variants, selections = list_all(arguments.method, arguments.select, arguments.keep, assignments, views)
    model = create(arguments.model, arguments)
    models: Mapping[str, nn.Module] = reduced(model, variants) if variants else {arguments.model: model}
    if selections:
        models = selected(models if variants else {"": model}, selections, leaving, views)
    clip = {clip_name(images): images.in_natural_order()} if arguments.video else None
    figures = figure_files(arguments.out, images.names if clip is None else list(clip), list(models))
    host = arguments.model if variants or selections else None
    note = RANDOM_WEIGHTS if has_random_weights(arguments) else None
    if note is not None:
        output(stderr=True).print(note, style="yellow")
    drawn: list[Path] = []
    records: list[TokenRecord] = []
    with progress() as bars, told_on_interrupt(lambda: interrupted(arguments, len(drawn), len(figures))):
        bar = bars.add("drawing tokens", len(figures))
        try:
            for stem, image in zip(images.names, images, strict=True) if clip is None else clip.items():
                for name, model in models.items():
                    path = figures[stem, name]
                    draw_figure(model, name, image, path, arguments)
                    if arguments.json is not None and isinstance(image, Image.Image):
                        records.append(token_record(model, image, name=stem, model_name=name, host=host, note=note))
                    tell(path)
                    drawn.append(path)
                    bar.advance()
        finally:  # of what was drawn, whatever ends it
            if arguments.json is not None and records:
                write_records(arguments.json, records)


def clip_name(frames: NamedImages) -> str:
    """What a video is called in the names of files: as the folder of its first frame."""
    return frames.sources[0].path.parent.name or "video"


def figure_files(folder: Path, images: Sequence[str], models: Sequence[str]) -> dict[tuple[str, str], Path]:
    """(image, model) -> the file of its figure.

    Raises:
        ValueError: Two would be written to one file.
    """
    found = {(image, model): figure_file(folder, image, model) for image in images for model in models}
    shared = next((path for path, number in Counter(found.values()).items() if number > 1), None)
    if shared is not None:
        raise ValueError(f"{plain(shared)} would hold two figures; give images names that differ in letters or digits")
    return found


def interrupted(arguments: Arguments, drawn: int, total: int) -> str:
    """What becomes of figures that were not all drawn."""
    records = "" if arguments.json is None or not drawn else f", their tokens in {plain(arguments.json)}"
    return f"{drawn} of {total} figures are in {plain(arguments.out)}{records}"
