"""Results of a long measurement in one JSON file, cell by cell, from which an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from effvit.measure.json_files import read_json, write_json
from effvit.measure.resume import refuse_differences
from effvit.messages import plain
from effvit.protocols import Json

__all__ = ["KeptCells"]

Cell = dict[str, Json]


class KeptCells:
    """The cells of a measurement, kept in a file as soon as they are measured.

    Args:
        path: The file, read now if there is one.
        kind: What was measured, as the file says it.
        conditions: What must be the same for cells of an earlier run to hold.
        machine: What it is measured on, written for readers.

    Raises:
        ValueError: A file that another tool wrote, or cells measured under other conditions.
    """

    def __init__(self, path: Path, kind: str, conditions: Mapping[str, Json], machine: Mapping[str, Json]) -> None:
        self.path = path
        self.head: Cell = {"record": kind, "machine": dict(machine), "conditions": dict(conditions)}
        self.cells: list[Cell] = self._read(kind, conditions) if path.exists() else []

    def _read(self, kind: str, conditions: Mapping[str, Json]) -> list[Cell]:
        content = read_json(self.path)
        before = content.get("conditions") if isinstance(content, dict) else None
        cells = content.get("cells") if isinstance(content, dict) else None
        if not isinstance(content, dict) or content.get("record") != kind or not isinstance(before, dict):
            raise ValueError(f"{plain(self.path)} must hold {kind}, and does not; name another file")
        if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
            raise ValueError(f"{plain(self.path)} must hold a list of cells, and does not; name another file")
        refuse_differences(
            {name: (before.get(name), now) for name, now in conditions.items()},
            f"the measurement in {plain(self.path)} was begun",
            "give what it was begun with, or name another file; this one is left as it is",
        )
        return [cell for cell in cells if isinstance(cell, dict)]

    def has(self, **key: Json) -> bool:
        """Whether there is a cell with these entries."""
        return any(all(cell.get(name) == value for name, value in key.items()) for cell in self.cells)

    def keep(self, cell: Cell) -> None:
        """Put the cell behind those in the file, which is written whole or left as it was."""
        self.cells.append(cell)
        write_json(self.path, self.record())

    def record(self) -> Cell:
        """What the file holds."""
        return {**self.head, "cells": list(self.cells)}
