"""Measured records as one HTML page: plots, tables and token pictures that open offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from effvit.costs import SCHEMA, Cost

__all__ = ["read_records", "write_report"]

# What a record of each kind holds, and the names of the entries of its list.
KEYS = {
    "profile": {"machine", "conditions", "models"},
    "tokens": {"model", "host", "method", "settings", "name", "picture", "stages"},
}
LISTS = {
    "profile": ("models", {field.name for field in fields(Cost)}),
    "tokens": ("stages", {"block", "tokens", "labels", "fused", "soft"}),
}
SCRIPTS = ("report_plots.js", "report_tokens.js", "report.js")


def write_report(results: Sequence[Path], out: Path) -> None:
    """Write the records of the files as one HTML page with all it needs inside.

    Args:
        results: JSON files that ``effvit profile --json`` and ``effvit visualize --json`` wrote.
        out: The page to write; its folder is made if there is none.

    Raises:
        ValueError: No file, a file of another form, a record without what the page shows, or a picture that is not
            in the file itself.
    """
    if not results:
        raise ValueError("a report needs at least one file of results; write one with effvit profile --json FILE")
    records = [record for path in results for record in read_records(path)]
    # Without "<" nothing in the data can end the element it stands in.
    data = json.dumps(records, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join(asset(name) for name in SCRIPTS)
    page = asset("report.html").replace("{{style}}", asset("report.css")).replace("{{script}}", script)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.replace("{{data}}", data), encoding="utf-8")


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return files("effvit").joinpath(name).read_text(encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of results, checked.

    Raises:
        ValueError: As ``write_report``; the message names the file and what is wrong in it.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a JSON file of results ({error})") from error
    if not isinstance(records, list) or not records:
        raise ValueError(
            f"{path} must hold a list of records, at least one, got {type(records).__name__}; "
            "effvit profile --json and effvit visualize --json write such files"
        )
    for number, record in enumerate(records):
        _check_record(record, f"{path}, record {number}")
    return records


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number a page can read")


def _check_record(record: Any, place: str) -> None:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("kind") not in KEYS:
        found = {key: record.get(key) for key in ("schema", "kind")} if isinstance(record, dict) else record
        raise ValueError(
            f'{place} must have "schema": {SCHEMA} and "kind": {" or ".join(map(repr, KEYS))}, got {found!r:.80}; '
            "measure again with this version of effvit"
        )
    kind = record["kind"]
    _check_keys(record, KEYS[kind], place)
    entries, keys = LISTS[kind]
    if not isinstance(record[entries], list):
        raise ValueError(f'{place}: "{entries}" must be a list, got a {type(record[entries]).__name__}')
    for number, entry in enumerate(record[entries]):
        _check_keys(entry, keys, f"{place}, {entries} {number}")
    if kind == "tokens" and not str(record["picture"]).startswith("data:image/"):
        raise ValueError(f'{place}: "picture" must be a data URI, got {str(record["picture"])!r:.60}')


def _check_keys(value: Any, keys: set[str], place: str) -> None:
    missing = sorted(keys - set(value)) if isinstance(value, dict) else sorted(keys)
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}; measure again with this version of effvit")
