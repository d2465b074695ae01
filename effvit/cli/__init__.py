"""The ``effvit`` command, a file for each of its commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import effvit
from effvit.cli import (
    configs,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    listing,
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
    return run_command("effvit", lambda: command(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands; ``run`` of the parsed ones is the function to call."""
    root = argparse.ArgumentParser("effvit", description="Token-sparsifying vision transformers on timm.")
    root.add_argument("--version", action="version", version=f"effvit {effvit.__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        *(listing, profile, evaluate, visualize, report, tune, convert, export, demo),
        *(configs, train, test, run, doctor),
    ):
        command.add_command(commands)
    return root
