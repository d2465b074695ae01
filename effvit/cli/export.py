"""``effvit export``: a model as a file for another runtime, compared with its eager run before it is written."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from effvit.cli import options
from effvit.cli.images import named_images
from effvit.cli.models import RANDOM_WEIGHTS, create, has_random_weights
from effvit.cli.output import LONGEST_LINE, file_stem, output, say
from effvit.data.preparation import data_config, load_images
from effvit.deployment.exporting import TOLERANCE, Agreement, export
from effvit.deployment.formats import FORMATS, INPUT, OUTPUT
from effvit.measure.variants import list_variants, parse_setting, reduced
from effvit.messages import plain
from effvit.protocols import Size

__all__ = ["add_command"]


class Arguments(options.WeightArguments):
    """Parsed arguments of ``effvit export``."""

    model: str
    method: str | None
    settings: list[str]
    to: str
    dynamic_batch: bool
    batch_size: int
    img_size: Size | None
    images: list[str] | None
    skip_bad: bool
    tolerance: float
    out: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "export",
        parents=[options.weights(), options.entry(), options.settings(), options.images()],
        help="a file for ONNX Runtime, OpenVINO or torch, checked against the model before it is written",
        description="Record MODEL, or its form reduced by --method, run the file on other images and other batches, "
        "and write it only if its scores are those of the model. See docs/deployment.md.",
    )
    command.add_argument("model", type=options.model_name, metavar="MODEL", help="any name of timm or of the zoo")
    command.add_argument("--method", type=options.method_name, metavar="NAME", help="the method to reduce MODEL with")
    command.add_argument("--to", required=True, choices=[*FORMATS])
    batch = command.add_mutually_exclusive_group()
    batch.add_argument("--dynamic-batch", action="store_true", help="a file that takes batches of any size")
    batch.add_argument("--batch-size", type=int, default=1, metavar="N", help="the one that it takes (default: 1)")
    command.add_argument("--img-size", type=options.parse_size, metavar="SIZE", help="side or HxW (default: MODEL's)")
    command.add_argument(
        "--images",
        nargs="+",
        type=options.image_name,
        metavar="IMAGE",
        help=f"to record and compare with (default: those of the package): {options.IMAGES}",
    )
    command.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="SHARE",
        help="largest difference of a score, as a share of the largest one of its image (default: %(default)s)",
    )
    endings = ", ".join(form.suffix for form in FORMATS.values())
    command.add_argument(
        "--out", type=options.output_file, metavar="FILE", help=f"{endings} (default: named after the model)"
    )
    command.set_defaults(run=run_export)


def run_export(arguments: Arguments) -> None:
    """Write the file, and print what it takes and how near it is to the model."""
    name, model = named_model(arguments)
    out = arguments.out or Path(file_stem(name) + FORMATS[arguments.to].suffix)
    images = images_for(model, arguments.images, arguments.skip_bad)
    if has_random_weights(arguments):
        say(f"{name} has {RANDOM_WEIGHTS}")
    batch_size = None if arguments.dynamic_batch else arguments.batch_size
    found = export(model, out, images, to=arguments.to, batch_size=batch_size, tolerance=arguments.tolerance)
    console = output()
    for line in (plain(out), *lines(model, found, batch_size)):
        console.print(plain(line, LONGEST_LINE), soft_wrap=True)


def named_model(arguments: Arguments) -> tuple[str, nn.Module]:
    """The model that is asked for, with the name that it is given in messages and files."""
    methods = [] if arguments.method is None else [arguments.method]
    variants = list_variants(methods, [parse_setting(text) for text in arguments.settings])
    if len(variants) > 1:
        raise ValueError(f"one file holds one model, but --set gives {len(variants)}: give each setting once")
    host = create(arguments.model, arguments, arguments.img_size)
    if not variants:
        return arguments.model, host
    ((variant, model),) = reduced(host, variants).items()
    return f"{arguments.model} {variant}", model.eval()


def images_for(model: nn.Module, texts: list[str] | None, skip_bad: bool) -> Tensor:
    """Images as the model takes them: those named, else those of the package, grey ones for a model of one channel."""
    grey = data_config(model)["input_size"][0] == 1
    return load_images(model, named_images(texts or ["fashion_mnist:*" if grey else "cutouts:*"], skip_bad))


def lines(model: nn.Module, found: Agreement, batch_size: int | None) -> list[str]:
    """What the file takes, and how near it came to the model."""
    config = data_config(model)
    size = ", ".join(map(str, (batch_size or "batch", *config["input_size"])))
    sizes = ", ".join(map(str, found.batch_sizes))
    return [
        f"takes {INPUT} ({size}) float32, mean {config['mean']}, std {config['std']}; gives {OUTPUT}",
        f"agrees with the model on other images, in batches of {sizes}: scores differ by at most {found.distance:.1e} "
        f"of the largest, and {found.same_class} of {sum(found.batch_sizes)} images get the same class",
    ]
