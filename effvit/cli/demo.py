"""``effvit demo``: all methods on images that are installed already, offline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

import effvit
from effvit.cli import options
from effvit.cli.models import create, has_random_weights
from effvit.cli.output import (
    LONGEST_LINE,
    draw_figure,
    figure_file,
    file_stem,
    measure,
    output,
    progress,
    tell,
    told_on_interrupt,
)
from effvit.data.preparation import load_images
from effvit.hosts.host import ReducedHost
from effvit.hosts.surface import Reduced
from effvit.measure.accuracy import top1, with_accuracies
from effvit.measure.controls import CONTROLS, control_names, with_controls
from effvit.measure.ideal import plain_parts
from effvit.measure.records import write_records
from effvit.measure.values import Record, TokenRecord
from effvit.measure.variants import build, reduced
from effvit.messages import plain
from effvit.protocols import Settings
from effvit.reducers import METHODS, DyMU
from effvit.show.pictures import (
    Labelled,
    cutout_classes,
    cutout_pictures,
    fashion_classes,
    fashion_pictures,
    photographs,
)
from effvit.show.plots import plot_accuracy, plot_costs
from effvit.show.report import write_report
from effvit.show.tables import describe, print_accuracies, print_record
from effvit.show.visualize import stack, token_figure, token_record

__all__ = ["NEXT", "SEEN", "Seen", "add_command", "demo_variants"]


class Seen(NamedTuple):
    """A model whose weights come with the package, and the labelled images that it is shown.

    Attributes:
        model: timm's name.
        key: Of the images, in the names of files.
        what: The images, for a reader.
        images: Makes them, by name.
        classes: Makes the names of the classes.
        shown: Those that are drawn.
    """

    model: str
    key: str
    what: str
    images: Callable[[], dict[str, Labelled]]
    classes: Callable[[], list[str]]
    shown: Sequence[str]


BESIDE = "random"  # the control that stands beside every method
SEEN = (
    Seen(
        "vit_nano_patch4_28",
        "fashion_mnist",
        "test images of Fashion-MNIST",
        fashion_pictures,
        fashion_classes,
        ("pullover-0", "sandal-1", "sneaker-0", "bag-1"),  # clothes of four shapes
    ),
    Seen(
        "vit_nano_patch8_96",
        "cutouts",
        "test images of objects on photographs",
        cutout_pictures,
        cutout_classes,
        ("face", "hand", "clock", "sneaker"),  # that the dense model knows
    ),
)

NEXT = (
    "effvit visualize 'fashion_mnist:bag-*' --model vit_nano_patch4_28 --pretrained --method tome --out runs/bags",
    "effvit tune vit_nano_patch4_28 'fashion_mnist:*' --pretrained --speedup 1.3 --minutes 2",
    "effvit profile deit_small_patch16_224 --method evit tome --batch-size 1 8",
)
"""What to type after the demo; all of it works offline."""


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "demo",
        parents=[options.weights(), options.entry()],
        help="all methods on images that are installed already, offline",
    )
    command.add_argument("--out", type=options.output_folder, default=Path("runs/demo"), metavar="DIR")
    command.add_argument("--model", default="deit_small_patch16_224", type=options.model_name, metavar="NAME")
    command.set_defaults(run=run_demo)


def run_demo(arguments: options.FigureArguments) -> None:
    """Show what models with weights see under each method, and what the methods cost at the usual size."""
    start = time.perf_counter()
    console, out = output(), arguments.out
    photos = photographs()
    out.mkdir(parents=True, exist_ok=True)
    with told_on_interrupt(lambda: f"what was drawn so far is in {plain(out)}"):
        seen = [demo_accuracy(console, out, each) for each in SEEN]
        costs, figures = demo_costs(console, arguments, photos)
    numbers: dict[str, Sequence[Record | TokenRecord]] = {
        "costs.json": [*(each.record for each in seen), costs],
        "tokens.json": [record for each in seen for record in each.tokens],
    }
    for name, records in numbers.items():
        write_records(out / name, records)
    write_report([out / name for name in numbers], out / "report.html")
    written = [out / "report.html", *(path for each in seen for path in each.files), out / "costs.png", *figures]
    console.print(f"\nWritten in {time.perf_counter() - start:.0f} s:")
    for path in (*written, *(out / name for name in numbers)):
        tell(path)
    console.print("\nWhat to try next:")
    for line in NEXT:
        tell(f"  {line}")


class Answers(NamedTuple):
    """What the demo found out about a model that sees.

    Attributes:
        record: Costs and accuracies.
        tokens: Of the images that are drawn.
        files: What was drawn.
    """

    record: Record
    tokens: list[TokenRecord]
    files: list[Path]


def demo_accuracy(console: Console, out: Path, seen: Seen) -> Answers:
    """Classify images of the package by all methods and their controls."""
    pictures, classes = seen.images(), seen.classes()
    torch.manual_seed(0)
    dense = build(seen.model, {}, pretrained=True).eval()
    images = load_images(dense, [picture.image for picture in pictures.values()])
    labels = torch.tensor([picture.label for picture in pictures.values()])
    variants = reduced(dense, demo_variants(dense))
    calibrate_all(console, variants, images)
    models = beside_controls(console, {seen.model: dense}, variants, images)
    data = f"{len(pictures)} {seen.what}"
    record = measure(models, len(images), images, [data], rounds=4, warmup=1, ideal=False)
    record = with_accuracies(record, top1(models, [(images, labels)]), data)
    print_accuracies(console, record)
    files = [out / f"accuracy-{seen.key}.png"]
    plot_accuracy([record], f"{seen.model} with its trained weights, on {data} only", files[0])
    shown = {name: pictures[name] for name in seen.shown}
    tokens: list[TokenRecord] = []
    for name, model in strongest(variants).items():
        both = [own for own in control_names([seen.model, name], [BESIDE])[1:] if own in models]
        figures = [
            answer_figure(own, dense, cast(Reduced, models[own]), picture, classes)
            for picture in shown.values()
            for own in both
        ]
        files.append(out / f"{seen.key}-{file_stem(name)}.png")
        stack(figures).save(files[-1])
        tokens += [token_record(model, p.image, name=n, model_name=name, host=seen.model) for n, p in shown.items()]
    return Answers(record, tokens, files)


def beside_controls(
    console: Console, dense: Mapping[str, nn.Module], variants: Mapping[str, Reduced], images: Tensor
) -> dict[str, nn.Module]:
    """The dense model and each of the others followed by its control; of one that has none it is said why."""
    models = dict(dense)
    for name, model in variants.items():
        models[name] = model
        try:
            models |= with_controls({**dense, name: model}, [BESIDE], images)
        except (TypeError, ValueError) as error:  # a method from outside may act where no control does
            console.print(f"{name} without control: {plain(error, LONGEST_LINE)}", style="yellow")
    return models


def answer_figure(
    name: str, dense: nn.Module, model: Reduced, picture: Labelled, classes: Sequence[str]
) -> Image.Image:
    """The image's tokens under the answers of the dense model and of the reduced one."""
    x = load_images(dense, [picture.image])
    with torch.inference_mode():
        said, dense_said = (classes[int(m(x).argmax())] for m in (model, dense))
    title = f"{name}: {said}; the dense model: {dense_said}; it is: {classes[picture.label]}"
    return token_figure(model, picture.image, title=title)


def strongest(variants: Mapping[str, Reduced]) -> dict[str, Reduced]:
    """The last variant of each method."""
    last = {model.method: name for name, model in variants.items()}
    return {name: variants[name] for name in last.values()}


def demo_costs(
    console: Console, arguments: options.FigureArguments, photos: Mapping[str, Image.Image]
) -> tuple[Record, list[Path]]:
    """What all methods cost on the photographs; returns the record, and figures of the tokens if weights were given."""
    host = create(arguments.model, arguments)
    variants = reduced(host, demo_variants(host))
    images = load_images(host, list(photos.values()))
    calibrate_all(console, variants, images)
    is_random = has_random_weights(arguments)
    weights = f"{arguments.model} with random weights: for its costs alone" if is_random else ""
    if is_random:
        console.print(f"\n{weights}; --checkpoint or --pretrained loads some", style="yellow")
    models: dict[str, nn.Module] = {arguments.model: host, **variants}
    record = measure(models, len(photos), images, list(photos), rounds=3, warmup=1, ideal=False)
    record = record.with_weights("random weights" if is_random else None)
    print_record(console, record)
    title = "\n".join([weights or arguments.model, describe(record.conditions)])
    plot_costs(record.models, title, arguments.out / "costs.png")
    return record, [] if is_random else draw_figures(strongest(variants), photos, arguments)


def draw_figures(
    models: Mapping[str, Reduced], photos: Mapping[str, Image.Image], arguments: options.FigureArguments
) -> list[Path]:
    """Write a token figure for every photograph and model, named after both; returns the paths."""
    paths: list[Path] = []
    with progress() as bars:
        bar = bars.add("drawing tokens", len(photos) * len(models))
        for name, model in models.items():
            for stem, photo in photos.items():
                paths.append(figure_file(arguments.out, stem, name))
                draw_figure(model, name, photo, paths[-1], arguments)
                bar.advance()
    return paths


def calibrate_all(console: Console, models: Mapping[str, Reduced], images: Tensor) -> None:
    """Let those of the models that learn from images without labels do so on these, and say so."""
    learning = {
        name: model
        for name, model in models.items()
        if isinstance(model, ReducedHost) and issubclass(METHODS[model.method], DyMU)
    }
    for model in learning.values():
        effvit.calibrate(model, [images])
    if learning:
        console.print(f"{', '.join(learning)}: calibrated on these very pictures, without their labels")


def demo_variants(host: nn.Module) -> list[tuple[str, Settings]]:
    """(method, settings) of every method that has something to show on that host, but of no control."""
    num_patches = plain_parts(host).patch_embed.num_patches
    methods = {name: method for name, method in METHODS.items() if name not in CONTROLS}
    return [(name, settings) for name, method in methods.items() for settings in method.demo(num_patches)]
