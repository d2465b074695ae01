"""Options that several commands share, as parents of their parsers."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TypeAlias

from effvit.measure.selections import Exit, Views
from effvit.measure.written_files import check_file, check_folder
from effvit.schedule import check_count

__all__ = [
    "DTYPES",
    "IMAGES",
    "Commands",
    "FigureArguments",
    "ImageArguments",
    "MachineArguments",
    "RunnerArguments",
    "SelectionArguments",
    "SelectorArguments",
    "VariantArguments",
    "WeightArguments",
    "check_outputs",
    "config_file",
    "config_name",
    "entry",
    "image_name",
    "images",
    "leaves",
    "leaving",
    "machine",
    "method_name",
    "model_name",
    "output_file",
    "output_folder",
    "parse_crops",
    "parse_keep",
    "parse_size",
    "runner",
    "selection",
    "selector_name",
    "selectors",
    "settings",
    "variants",
    "views_from",
    "weights",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
IMAGES = (
    "a file, a folder, a pattern such as 'photos/**/*.jpg', - for a list of paths on stdin, or installed images: "
    "'fashion_mnist:sneaker-*', cutouts:clock, photographs:coffee"
)
DTYPES = ("float32", "bfloat16", "float16")


class WeightArguments(argparse.Namespace):
    """Parsed arguments of ``weights`` and ``entry``."""

    checkpoint: Path | None
    pretrained: bool
    key: str | None


class ImageArguments(argparse.Namespace):
    """Parsed arguments of ``images``."""

    skip_bad: bool


class FigureArguments(WeightArguments):
    """Parsed arguments that figures of one host's tokens need."""

    model: str
    out: Path


class VariantArguments(argparse.Namespace):
    """Parsed arguments of ``variants``."""

    method: list[str]
    settings: list[str]


class SelectorArguments(argparse.Namespace):
    """Parsed arguments of ``selectors``."""

    select: list[str]
    block: int | None
    scores: str | None
    max_norm: float | None


class SelectionArguments(SelectorArguments):
    """Parsed arguments of ``selection``."""

    keep: list[int | float]
    merge: int | None
    crops: tuple[int, int] | None


class MachineArguments(argparse.Namespace):
    """Parsed arguments of ``machine``."""

    threads: int | None
    device: str
    dtype: str


class RunnerArguments(argparse.Namespace):
    """Parsed arguments of ``runner``."""

    config: str
    work_dir: str | None
    cfg_options: list[str]
    launcher: str | None


def weights() -> argparse.ArgumentParser:
    """Where the weights of the dense host come from."""
    parent = argparse.ArgumentParser(add_help=False)
    source = parent.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of the dense host")
    source.add_argument(
        "--pretrained", action="store_true", help="timm's weights (asks the network unless the package has them)"
    )
    return parent


def images() -> argparse.ArgumentParser:
    """What becomes of images that cannot be read."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--skip-bad", action="store_true", help="leave out images that cannot be read, and say which and how many"
    )
    return parent


def entry() -> argparse.ArgumentParser:
    """Which entry of a checkpoint has the weights."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--key", metavar="NAME", help="entry of the checkpoint with the weights, where it has several, e.g. teacher"
    )
    return parent


def variants() -> argparse.ArgumentParser:
    """Methods to reduce a model with, and their settings."""
    parent = argparse.ArgumentParser(add_help=False, parents=[settings()])
    parent.add_argument(
        "--method", nargs="+", default=[], type=method_name, metavar="NAME", help="methods to reduce each model with"
    )
    return parent


def settings() -> argparse.ArgumentParser:
    """Settings of methods."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="a setting for every method that has it, in JSON; given again: a variant for each value",
    )
    return parent


def selectors() -> argparse.ArgumentParser:
    """Selectors of the tokens that leave a tower, and where these leave it."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--select",
        nargs="+",
        default=[],
        type=selector_name,
        metavar="NAME",
        help="selectors of the tokens that MODEL hands over as a vision tower",
    )
    parent.add_argument(
        "--block", type=int, metavar="N", help="whose tokens leave the tower (default: -2; -1 of one with a projector)"
    )
    parent.add_argument(
        "--scores",
        choices=("class", "received"),
        help="what selectors rank by (default: class); received needs no class token",
    )
    parent.add_argument("--max-norm", type=float, metavar="NORM", help="patches of a larger norm rank last")
    return parent


def selection() -> argparse.ArgumentParser:
    """Selectors, and how many tokens or cells they hand over."""
    parent = argparse.ArgumentParser(add_help=False, parents=[selectors()])
    parent.add_argument(
        "--keep",
        nargs="+",
        default=[],
        type=parse_keep,
        metavar="K",
        help="tokens to hand over, a number or a share of the cells such as 0.25; each is a variant",
    )
    parent.add_argument(
        "--merge",
        type=int,
        metavar="M",
        help="side of a merger's cells (default: 1; that of the tower's own projector)",
    )
    parent.add_argument(
        "--crops",
        type=parse_crops,
        metavar="ROWSxCOLUMNS",
        help="cut each image into so many crops, with a thumbnail in front, as LLaVA-NeXT does",
    )
    return parent


def leaving(arguments: SelectorArguments, selects: bool) -> Exit:
    """Where tokens leave the tower; a ValueError for options of a selection where the command makes none."""
    exits = ("block", "merge", "scores", "max_norm")
    names = ("select", "keep", "crops", "frames", "video", *exits)
    values = {name: getattr(arguments, name, None) for name in names}
    given = {name: value for name, value in values.items() if value not in (None, []) and value is not False}
    if given and not selects:
        raise ValueError(
            f"--{next(iter(given)).replace('_', '-')} belongs to a selection behind a tower; leave it out, or name a "
            "selector with --select (in effvit tune a number of --tokens)"
        )
    found = Exit(**{name: value for name, value in given.items() if name in exits})
    if arguments.select:
        found.check(arguments.select)
    return found


def views_from(crops: tuple[int, int] | None, frames: int | None, option: str) -> Views:
    """What is selected of; a ValueError for both, or for less than one frame, that names the option they come from."""
    if crops is not None and frames is not None:
        raise ValueError(
            f"--crops cuts single images and {option} takes the frames of one video, got both; give one of them"
        )
    return Views(crops, None if frames is None else check_count(option, frames, 1))


def machine() -> argparse.ArgumentParser:
    """What the models run on, and in which dtype."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parent.add_argument("--device", default="cpu")
    parent.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and images")
    return parent


def runner(also: str = "") -> argparse.ArgumentParser:
    """What mmengine's Runner is built from; ``also`` is what may be given in place of a config."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "config",
        type=config_file,
        metavar="CONFIG",
        help=f"a file, or effvit::NAME for one that `effvit configs list` prints{also}",
    )
    parent.add_argument("--work-dir", metavar="DIR", help="for logs and checkpoints (default: work_dirs/CONFIG)")
    parent.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values in place of the config's, e.g. train_dataloader.batch_size=4",
    )
    parent.add_argument(
        "--launcher", metavar="NAME", help="none, pytorch, slurm or mpi (default: pytorch under torchrun, else none)"
    )
    return parent


# Types of arguments: what a text stands for. Places to write to are checked before a command begins, and shells
# complete each by what it is (``effvit.cli.completion``).


def output_file(text: str) -> Path:
    """A file that the command writes."""
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder that the command writes files into."""
    return Path(text)


def image_name(text: str) -> str:
    """Images, as ``IMAGES`` says."""
    return text


def model_name(text: str) -> str:
    """A name for ``timm.create_model``."""
    return text


def method_name(text: str) -> str:
    """The name of a method."""
    return text


def selector_name(text: str) -> str:
    """The name of a selector."""
    return text


def config_name(text: str) -> str:
    """The name of a config that comes with the package."""
    return text


def config_file(text: str) -> str:
    """A config: a file, or "effvit::" and the name of one that comes with the package."""
    return text


def leaves(commands: Commands) -> dict[str, argparse.ArgumentParser]:
    """Words of a command, such as "profile" or "configs list" -> its parser; not those with commands below them."""
    found: dict[str, argparse.ArgumentParser] = {}
    for word, parser in commands.choices.items():
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        found |= {f"{word} {words}": leaf for action in below for words, leaf in leaves(action).items()}
        if not below:
            found[word] = parser
    return found


def check_outputs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise an OSError if a place that the arguments name takes nothing that is written to it."""
    for action in parser._actions:
        place: Path | None = getattr(arguments, action.dest, None)
        if place is not None and action.type is output_file:
            check_file(place)
        elif place is not None and action.type is output_folder:
            check_folder(place)


def parse_keep(text: str) -> int | float:
    """A number of tokens, or a share of them: "64" or "0.25"."""
    try:
        return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor a share such as 0.25") from error


def parse_crops(text: str) -> tuple[int, int]:
    """(rows, columns) of "ROWSxCOLUMNS"."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ROWSxCOLUMNS, two whole numbers of at least 1; give e.g. 2x2 for four crops"
        )
    return int(match[1]), int(match[2])


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "SIDE" or "HEIGHTxWIDTH"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side such as 224 nor HxW such as 224x320")
    return int(match[1]), int(match[2] or match[1])
