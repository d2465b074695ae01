"""Pickles that say little and mean much are found without being built.

A pickle may name one tuple twice inside the next, and so on: sixty lines for 2^60 entries, on which whatever walks the
result, as hashing or comparing does, never ends ("billion laughs"). Here the stack machine of the format is run on
numbers of entries alone.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

__all__ = ["check_pickles"]

MOST_ENTRIES = 10_000_000  # a checkpoint with its optimizer has some ten thousand
MOST_OPERATIONS = 20_000_000
# Operations that change an object in place: it may have a name already, under which it grows too.
GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
MARK = None


def check_pickles(path: Path) -> None:
    """Raise a ValueError for a checkpoint of more than ``MOST_ENTRIES`` entries, shared ones counted where they stand.

    Args:
        path: A zip archive as torch writes them, or pickles one after the other as torch before 1.6 did.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as file:
                        _count(file)
        return
    with path.open("rb") as file:
        for _ in range(5):  # magic number, protocol, system, object, names of the storages; then raw numbers
            if not file.peek(1):
                return
            _count(file)


def _count(file: IO[bytes]) -> None:
    """Run one pickle on sizes; each value is a list of its one size, so that names see it grow."""
    stack: list[list[int] | None] = []
    names: dict[object, list[int]] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        name = operation.name
        if number > MOST_OPERATIONS:
            raise ValueError(f"its pickle has more than {MOST_OPERATIONS} operations")
        if name == "MARK":
            stack.append(MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            names[len(names) if name == "MEMOIZE" else argument] = _top(stack)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(names[argument])
        elif name == "DUP":
            stack.append(_top(stack))
        elif name not in ("PROTO", "FRAME", "STOP"):
            taken = _take(stack, operation)
            value = taken[0] if name in GROWING else [1]
            value[0] += sum(size for (size,) in (taken[1:] if name in GROWING else taken))
            if value[0] > MOST_ENTRIES:
                raise ValueError(f"its pickle holds more than {MOST_ENTRIES} entries")
            if operation.stack_after:
                stack.append(value)


def _take(stack: list[list[int] | None], operation: pickletools.OpcodeInfo) -> list[list[int]]:
    """What the operation takes off the stack, without its mark."""
    taken: list[list[int]] = []
    before = operation.stack_before
    if pickletools.markobject in before:
        while (value := stack.pop()) is not MARK:
            taken.append(value)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(_top(stack))
        stack.pop()
    return taken[::-1]


def _top(stack: list[list[int] | None]) -> list[int]:
    value = stack[-1]
    if value is MARK:
        raise ValueError("its pickle uses a mark as a value")
    return value
