"""``effvit list``: methods with their settings, and the names of models."""

from __future__ import annotations

import argparse

from rich.columns import Columns
from rich.table import Table

import effvit
from effvit.cli import options
from effvit.cli.output import output, tell
from effvit.reducers import METHODS

__all__ = ["add_command"]


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit list``."""

    pattern: str


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser("list", help="methods with their settings, and the zoo's model names")
    command.add_argument(
        "pattern", nargs="?", default="*", type=options.model_name, help="shell-style pattern, e.g. 'evit*'"
    )
    command.set_defaults(run=run_list)


def run_list(arguments: Arguments) -> None:
    """Print the methods and zoo names that match the pattern: tables on a terminal, else one on each line."""
    methods = effvit.list_methods(arguments.pattern)
    names = effvit.list_models(arguments.pattern)
    if not methods and not names:
        raise ValueError(f"no method and no model matches {arguments.pattern!r}")
    console = output()
    if not console.is_terminal:
        for method in methods:
            tell(method, *settings_of(method))
        for name in names:
            tell(name)
        return
    if methods:
        table = Table("method", "what it does", "settings and defaults", title="Methods", title_justify="left")
        for method in methods:
            table.add_row(method, METHODS[method].summary, "\n".join(settings_of(method)), end_section=True)
        console.print(table)
    if names:
        console.print(f"Models for timm.create_model ({len(names)})")
        console.print(Columns(names))


def settings_of(method: str) -> list[str]:
    """The settings of a method with their defaults, as they are written in Python."""
    return [f"{name}={value!r}" for name, value in effvit.method_settings(method).items()]
