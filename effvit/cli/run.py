"""``effvit run``: another script with this package's names in timm, such as timm's own train.py and validate.py."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from effvit.cli import options
from effvit.messages import plain, run_with_traceback

__all__ = ["add_command"]


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit run``."""

    script: Path
    arguments: list[str]


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "run",
        help="another script, e.g. timm's train.py, with this package's models in timm.create_model",
        description="Run SCRIPT as `python SCRIPT` would, after this package has registered its models with timm; in "
        "several processes: torchrun --nproc-per-node 2 -m effvit.cli run SCRIPT ...",
    )
    command.add_argument("script", type=Path, metavar="SCRIPT")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    command.set_defaults(run=run_script)


def run_script(arguments: Arguments) -> int:
    """Run the script as the main module: arguments and the first folder of imports are what python would give it."""
    script = arguments.script
    if not script.is_file():
        raise FileNotFoundError(f"no script at {plain(script)}; `effvit run` takes a Python file, then its arguments")
    sys.argv = [str(script), *arguments.arguments]
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11: nothing is put in front of the path
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    return run_with_traceback(lambda: runpy.run_path(str(script), run_name="__main__"))
