"""``effvit check-data``: what is wrong with data before training, what is repaired, and the config lines they need."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from effvit.cli import options
from effvit.cli.output import LONGEST_LINE, output
from effvit.dense.image_files import CHECKED_FILES
from effvit.dense.own_data import Findings, inspect_coco, inspect_label_maps
from effvit.messages import one_line, plain

__all__ = ["add_command"]


class Arguments(options.RunnerArguments):
    """Parsed arguments of ``effvit check-data``."""

    images: Path | None
    checked_files: int | str | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "check-data",
        parents=[options.runner("; or a COCO file (.json); or a folder of label maps")],
        help="what is wrong with the data of a config, a COCO file or a folder of label maps",
        description="Say before training what is wrong with data, what is repaired, and what they hold: for a config "
        "with the checks that effvit train begins with, for data alone with the lines of a config that they need. The "
        "status is 1 if anything is wrong.",
    )
    command.add_argument(
        "--images", type=Path, metavar="DIR", help="the images of a COCO file or a folder of label maps, to check too"
    )
    command.add_argument(
        "--checked-files",
        type=parse_number,
        metavar="N",
        help=f"files of each data set that are opened, evenly spread, or all (default: {CHECKED_FILES})",
    )
    command.set_defaults(run=run_check)


def parse_number(text: str) -> int | str:
    """A number, or "all"."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of files nor 'all'")
    return text if text == "all" else int(text)


def run_check(arguments: Arguments) -> int:
    """Print what was found; returns 1 if anything is wrong."""
    path = Path(arguments.config)
    if path.suffix == ".json" and not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a config, a COCO file (.json), or a folder of label maps")
    if path.is_dir() or path.suffix == ".json":
        inspect = inspect_label_maps if path.is_dir() else inspect_coco
        number = CHECKED_FILES if arguments.checked_files is None else arguments.checked_files
        findings = inspect(path, arguments.images, number)
    elif arguments.images is not None:
        raise ValueError(f"--images belongs to a COCO file or a folder of label maps; {path} names its images itself")
    else:
        with redirect_stdout(sys.stderr):  # what mmdet and mmseg print while they are imported is no result
            findings = inspect_config(arguments)
    console = output()
    lines = [text for summary in findings.sets for text in (summary.line, f"  {summary.counts}")]
    good = "nothing is wrong"
    if findings.config and arguments.images is None:
        good += "; the images were not looked at, which --images DIR asks for"
    lines += [f"wrong: {one_line(fault)}" for fault in findings.faults] or [good]
    if findings.config:
        lines += ["lines of a config for these data:", *(f"    {line}" for line in findings.config)]
    for line in lines:
        console.print(plain(line, LONGEST_LINE), soft_wrap=True)
    return int(bool(findings.faults))


def inspect_config(arguments: Arguments) -> Findings:
    """What is found in the data of a config and in its model; copies of repaired files are written as for training."""
    from effvit.dense.channels import backbone_channels, check_channels  # needs the extra mm
    from effvit.dense.data_checks import inspect_data
    from effvit.dense.runner import prepare_config, read_options

    values = read_options(arguments.cfg_options)
    if arguments.checked_files is not None:
        values["checked_files"] = arguments.checked_files
    config = prepare_config(arguments.config, work_dir=arguments.work_dir, options=values, launcher=arguments.launcher)
    findings = inspect_data(config)
    with findings.noted():
        channels = backbone_channels(config)
        if channels is not None:
            check_channels(config.model, channels)
    return findings
