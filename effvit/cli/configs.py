"""``effvit configs``: the configs of the package for mmdet, mmseg and mmpretrain, and copies to work on."""

from __future__ import annotations

import argparse
from pathlib import Path

from effvit.cli import options
from effvit.cli.output import output, tell
from effvit.dense.shipped_configs import copy_config, list_configs

__all__ = ["add_command"]


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit configs list`` and ``effvit configs copy``."""

    pattern: str
    name: str
    folder: Path


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser("configs", help="configs to train and test with, and copies to work on")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="names of the configs, with a line on each")
    listing.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, e.g. 'mmdet/*evit*'")
    listing.set_defaults(run=run_list)
    copying = actions.add_parser("copy", help="a config and its bases as files of your own; none is overwritten")
    copying.add_argument("name", type=options.config_name, metavar="NAME", help="one that `effvit configs list` prints")
    copying.add_argument("folder", type=options.output_folder, metavar="DIR")
    copying.set_defaults(run=run_copy)


def run_list(arguments: Arguments) -> None:
    """Print the configs that match the pattern, a line for each."""
    configs = list_configs(arguments.pattern)
    if not configs:
        raise ValueError(f"no config matches {arguments.pattern!r}; `effvit configs list` prints all names")
    width, console = max(len(config.name) for config in configs), output()
    for config in configs:
        note = f"[imports {', '.join(config.outside)} of a checkout's tools/] " if config.outside else ""
        if console.is_terminal:
            console.print(f"{config.name:<{width}}  {note}{config.summary}", no_wrap=True, overflow="ellipsis")
        else:
            tell(config.name, note + config.summary)


def run_copy(arguments: Arguments) -> None:
    """Print which files were copied, and the command that trains with them."""
    copies = copy_config(arguments.name, arguments.folder)
    for path in copies:
        tell(path)
