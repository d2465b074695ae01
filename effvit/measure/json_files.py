"""JSON files: read with limits on what they hold, written whole and with finite numbers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

from effvit.measure.written_files import write_whole
from effvit.messages import plain, shown
from effvit.protocols import Json

__all__ = ["parse_json", "read_json", "write_json"]

LARGEST_FILE = 64 << 20  # bytes; a record of ten models has 10 kB, an image with tokens 200 kB


def read_json(path: Path) -> Json:
    """The content of a JSON file in UTF-8 of moderate size, with finite numbers and each name once in an object.

    Raises:
        OSError: No such file, or one that cannot be read.
        ValueError: Anything else; the message names the file.
    """
    if path.is_dir():
        raise ValueError(f"{plain(path)} is a folder, not a JSON file of results")
    if path.exists() and not path.is_file():
        raise ValueError(f"{plain(path)} is a pipe, socket or device, not a JSON file of results")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{plain(path)} has {path.stat().st_size} bytes, a file of results at most {LARGEST_FILE}; "
            "split it by its records"
        )
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{plain(path)} is not a JSON file of results ({plain(error)})") from error


def parse_json(content: str) -> Json:
    """The value of a JSON text with finite numbers and each name once in an object; a ValueError for any other."""
    try:
        value: Json = json.loads(content, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_each_once)
        return value
    except RecursionError:
        raise ValueError("its lists are nested too deep") from None


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{plain(digits, 60)} is not a number a page can read")
    return value


def _each_once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {shown(again)} twice")
    return found


def write_json(path: Path, value: Json) -> None:
    """Write the value, making the folder if there is none; the file holds all of it or what it held before.

    Raises:
        OSError: As ``effvit.measure.written_files.write_whole``.
        ValueError: A number that is not finite, for which JSON has no words.
    """
    try:
        content = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{plain(path)} is not written: {error}; the outputs of a model are not finite") from error
    write_whole(path, f"{content}\n".encode())
