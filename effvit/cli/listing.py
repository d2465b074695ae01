"""``effvit list``: methods with their settings, and the names of models."""

from __future__ import annotations

import argparse

from rich.columns import Columns
from rich.table import Table

import effvit
from effvit.cli import options
from effvit.cli.output import output
from effvit.reducers import METHODS

__all__ = ["add_command"]


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit list``."""

    pattern: str


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser("list", help="methods with their settings, and the zoo's model names")
    command.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, e.g. 'evit*'")
    command.set_defaults(run=run_list)


def run_list(arguments: Arguments) -> None:
    """Print the methods and zoo names that match the pattern."""
    methods = effvit.list_methods(arguments.pattern)
    names = effvit.list_models(arguments.pattern)
    if not methods and not names:
        raise ValueError(f"no method and no model matches {arguments.pattern!r}")
    console = output()
    if methods:
        table = Table("method", "what it does", "settings and defaults", title="Methods", title_justify="left")
        for method in methods:
            defaults = effvit.method_settings(method)
            settings = "\n".join(f"{name}={value!r}" for name, value in defaults.items())
            table.add_row(method, METHODS[method].summary, settings, end_section=True)
        console.print(table)
    if names:
        console.print(f"Models for timm.create_model ({len(names)})")
        console.print(Columns(names))
