"""Measured records as one HTML page: plots, tables and token figures that open offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from effvit.measure.records import read_results
from effvit.measure.written_files import write_whole

__all__ = ["write_report"]

SCRIPTS = ("report_plots.js", "report_tokens.js", "report.js")


def write_report(results: Sequence[Path], out: Path) -> None:
    """Write the records of the files as one HTML page with all it needs inside.

    Args:
        results: JSON files that the commands of ``effvit`` wrote.
        out: The page to write; its folder is made if there is none.

    Raises:
        OSError, ValueError: No file, or one that ``effvit.measure.records.read_results`` refuses.
    """
    if not results:
        raise ValueError("a report needs at least one file of results; write one with effvit profile --json FILE")
    records = [record for path in results for record in read_results(path)]
    # Without "<" nothing in the data can end the element it stands in.
    data = json.dumps(records, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = "\n".join(asset(name) for name in SCRIPTS)
    page = asset("report.html").replace("{{style}}", asset("report.css")).replace("{{script}}", script)
    write_whole(out, page.replace("{{data}}", data).encode())


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return files("effvit.show").joinpath(name).read_text(encoding="utf-8")
