"""``effvit list``: methods and selectors with their settings, and the names of models."""

from __future__ import annotations

import argparse

from rich.columns import Columns
from rich.table import Table

import effvit
from effvit.cli import options
from effvit.cli.output import output, tell
from effvit.protocols import Settings
from effvit.reducers import METHODS
from effvit.selectors import SELECTORS

__all__ = ["add_command"]


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit list``."""

    pattern: str


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser("list", help="methods and selectors with their settings, and the zoo's model names")
    command.add_argument(
        "pattern", nargs="?", default="*", type=options.model_name, help="shell-style pattern, e.g. 'evit*'"
    )
    command.set_defaults(run=run_list)


def run_list(arguments: Arguments) -> None:
    """Print the methods, selectors and zoo names that match: tables on a terminal, else one on each line.

    Where a method and a selector have one name, as the controls do, the selector's line follows with the word selector.
    """
    methods = effvit.list_methods(arguments.pattern)
    selectors = effvit.list_selectors(arguments.pattern)
    names = effvit.list_models(arguments.pattern)
    if not methods and not selectors and not names:
        raise ValueError(f"no method, no selector and no model matches {arguments.pattern!r}")
    console = output()
    if not console.is_terminal:
        for method in methods:
            tell(method, *settings_of(method))
        for selector in selectors:
            tell(selector, "selector", *as_text(SELECTORS[selector].defaults()))
        for name in names:
            tell(name)
        return
    if methods:
        table = Table("method", "what it does", "settings and defaults", title="Methods", title_justify="left")
        for method in methods:
            table.add_row(method, METHODS[method].summary, "\n".join(settings_of(method)), end_section=True)
        console.print(table)
    if selectors:
        title = "Selectors of the tokens that leave a vision tower"
        table = Table("selector", "what it does", "needs", "settings and defaults", title=title, title_justify="left")
        for selector in selectors:
            kind = SELECTORS[selector]
            settings = "\n".join(as_text(kind.defaults()))
            table.add_row(selector, kind.summary, ", ".join(kind.needs()), settings, end_section=True)
        console.print(table)
    if names:
        console.print(f"Models for timm.create_model ({len(names)})")
        console.print(Columns(names))


def settings_of(method: str) -> list[str]:
    """The settings of a method with their defaults, as they are written in Python."""
    return as_text(effvit.method_settings(method))


def as_text(settings: Settings) -> list[str]:
    """Settings as they are written in Python."""
    return [f"{name}={value!r}" for name, value in settings.items()]
