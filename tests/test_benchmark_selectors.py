"""The benchmark of selectors: its cells, that it goes on from a file, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import load_tool

from effvit.measure import profiler
from effvit.selectors import SELECTORS

TOOL = load_tool("benchmark_selectors")
SMALL = ["--width", "48", "--depth", "1", "--heads", "3", "--tokens", "144", "--batch-sizes", "2", "--rounds", "2"]


def measured(path: Path, *more: str) -> dict[str, Any]:
    assert TOOL.main([*SMALL, "--json", str(path), *more]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_every_selector_of_images_has_a_row_or_says_why_not(tmp_path: Path) -> None:
    """Of 144 tokens 16 are whole windows and 48 are not; 48 channels tell 48 tokens apart."""
    (cell,) = measured(tmp_path / "cells.json")["cells"]
    rows = {(row["method"], row["divisor"]): row for row in cell["rows"]}
    images = {name for name, kind in SELECTORS.items() if kind.takes == "select_tokens" and not kind.learns}
    assert {method for method, _ in rows} == images
    assert {divisor for method, divisor in rows if method != "recoverable"} == {3, 9}
    assert "of 12 x 12 cells it gives" in rows["matryoshka", 3]["refused"]
    assert rows["matryoshka", 9]["kept"] == 16
    assert all(row["share"] > 0 for row in rows.values() if "refused" not in row)


def test_it_goes_on_from_the_cells_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cells.json"
    first = measured(path)
    monkeypatch.setattr(TOOL, "interleaved", lambda *args, **kwargs: pytest.fail("the cell was there"))
    assert measured(path) == first
    assert TOOL.interleaved is not profiler.interleaved


def test_other_conditions_and_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.json"
    path.write_text(json.dumps({"record": TOOL.KIND, "conditions": {"width": 64}, "cells": []}))
    assert TOOL.main([*SMALL, "--json", str(path)]) == 2
    assert "width" in capsys.readouterr().err
    path.write_text("[]")
    assert TOOL.main([*SMALL, "--json", str(path)]) == 2
    assert "must hold shares of selectors" in capsys.readouterr().err
    assert TOOL.main(["--tokens", "150", "--json", str(path)]) == 2
    assert "--tokens must be squares, the cells of a square image, got 150; 144 is one" in capsys.readouterr().err


def test_table_has_a_column_for_each_cell() -> None:
    row = {"method": "divprune", "divisor": 3}
    cells = [
        {"tokens": 576, "batch_size": 1, "rows": [row | {"share": 0.0123}]},
        {"tokens": 2304, "batch_size": 1, "rows": [row | {"share": 0.0312}]},
        {"tokens": 4096, "batch_size": 8, "rows": [row | {"refused": "too many"}]},
    ]
    assert TOOL.table({"cells": cells})[2:] == ["| divprune | N / 3 | 1.23 | **3.12** | n/a |"]
