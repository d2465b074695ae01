"""``effvit report``: one page of what was measured and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from effvit.cli import options
from effvit.cli.output import tell
from effvit.show.report import write_report

__all__ = ["add_command"]


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit report``."""

    results: list[Path]
    out: Path


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser("report", help="one HTML file of the results of other commands")
    command.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS.json",
        help="files that other commands wrote with --json, test with --out, doctor on stdout",
    )
    command.add_argument("--out", type=options.output_file, default=Path("report.html"), metavar="FILE")
    command.set_defaults(run=run_report)


def run_report(arguments: Arguments) -> None:
    """Write the report and print where it is."""
    write_report(arguments.results, arguments.out)
    tell(arguments.out)
