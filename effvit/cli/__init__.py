"""The ``effvit`` command, a file for each of its commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import effvit
from effvit.cli import (
    check_data,
    completion,
    configs,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    listing,
    options,
    profile,
    report,
    run,
    test,
    train,
    tune,
    visualize,
)
from effvit.messages import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after an error the caller can fix."""
    arguments = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.run

    def checked() -> int | None:
        options.check_outputs(arguments.parser, arguments)
        return command(arguments)

    return run_command("effvit", checked, debug=getattr(arguments, "debug", False))


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands; ``run`` of the parsed ones is the function to call."""
    root = argparse.ArgumentParser("effvit", description="Token-sparsifying vision transformers on timm.")
    root.add_argument("--version", action="version", version=f"effvit {effvit.__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        *(listing, profile, evaluate, visualize, report, tune, convert, export, demo),
        *(configs, check_data, train, test, run, doctor, completion),
    ):
        command.add_command(commands)
    for leaf in (root, *options.leaves(commands).values()):
        leaf.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="traceback of an error, too")
        leaf.set_defaults(parser=leaf)
    return root
