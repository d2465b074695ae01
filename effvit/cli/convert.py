"""``effvit convert``: a checkpoint of another house under our names, and what was left out of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save

from effvit.cli import options
from effvit.cli.models import runner_types
from effvit.cli.output import tell
from effvit.hosts.checkpoints import convert_checkpoint
from effvit.measure.variants import build, parse_setting
from effvit.measure.written_files import write_whole

__all__ = ["add_command"]

MOST_DROPPED = 200  # entries of a checkpoint that are named without --keys; an official one drops less than 50


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit convert``."""

    file: Path
    model: str
    out: Path | None
    key: str | None
    keys: bool
    settings: list[str]


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "convert",
        parents=[options.entry(), options.settings()],
        help="a checkpoint of another house under our names, and what was left out of it",
        description="Read FILE (.pth without code, or .safetensors) of an official repository, of transformers or of "
        "open_clip into MODEL strictly, say what became of its entries, and write it as .safetensors.",
    )
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument(
        "--model", required=True, type=options.model_name, metavar="NAME", help="the model it was saved from"
    )
    command.add_argument("--out", type=options.output_file, metavar="FILE", help="without it the file is only checked")
    command.add_argument("--keys", action="store_true", help="name every entry, not only the dropped ones")
    command.set_defaults(run=run_convert)


def run_convert(arguments: Arguments) -> None:
    """Write a checkpoint under our names and print which of its entries were used, renamed and dropped."""
    if arguments.out is not None and arguments.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {arguments.out}")
    settings = dict(parse_setting(text) for text in arguments.settings)
    model = build(arguments.model, settings)
    conversion = convert_checkpoint(model, arguments.file, runner_types(), arguments.key)
    lines = [] if conversion.family is None else [f"named as {conversion.family}"]
    lines += [
        f"{len(conversion.state)} entries for {arguments.model}: {len(conversion.same)} under the file's names, "
        f"{len(conversion.renamed)} renamed, {len(conversion.made)} joined, split or new; "
        f"{len(conversion.dropped)} dropped"
    ]
    if arguments.out is not None:
        metadata = {"format": "pt", "architecture": arguments.model}
        state = {name: value.contiguous() for name, value in conversion.state.items()}
        write_whole(arguments.out, save(state, metadata))
        lines.insert(0, str(arguments.out))
    if arguments.keys:
        lines += [f"used: {name}" for name in conversion.same]
        lines += [f"renamed: {theirs} -> {ours}" for ours, theirs in conversion.renamed.items()]
        lines += [f"joined, split or new: {name}" for name in conversion.made]
    dropped = conversion.dropped if arguments.keys else conversion.dropped[:MOST_DROPPED]
    lines += [f"dropped: {name}" for name in dropped]
    if len(dropped) < len(conversion.dropped):
        lines.append(f"and {len(conversion.dropped) - len(dropped)} more dropped, which --keys names")
    for line in lines:
        tell(line)
