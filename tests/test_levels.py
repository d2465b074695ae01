"""Levels of the tests: what is fast needs neither OpenMMLab nor files beside the checkout."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import FAST
from scripts import load_tool

TESTS = Path(__file__).parent
OPENMMLAB = {"mmcv", "mmdet", "mmengine", "mmpretrain", "mmseg"}


def test_files_of_the_fast_level_exist() -> None:
    assert {path.name for path in TESTS.glob("test_*.py")} >= FAST


@pytest.mark.parametrize("name", sorted(FAST))
def test_a_file_of_the_fast_level_imports_without_openmmlab(name: str) -> None:
    imported = set()
    for node in ast.parse((TESTS / name).read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert not imported & OPENMMLAB


def test_a_test_has_the_marks_of_its_level(request: pytest.FixtureRequest) -> None:
    """This file is in no list; of those that are, the tests for a release and the slow ones are left out."""
    assert request.node.get_closest_marker("fast") is None
    for item in request.session.items:
        marks = {mark.name for mark in item.iter_markers()}
        assert ("fast" in marks) == (item.path.name in FAST and not marks & {"slow", "release"}), item.nodeid


class TestSeconds:
    CASE = '<testcase classname="{}" name="a" time="{}" />'

    def test_seconds_are_summed_by_file_and_the_slowest_is_first(self) -> None:
        cases = [("tests.test_tokens.TestKeep", 0.5), ("tests.test_tokens", 0.25), ("tests.test_export", 2.0)]
        record = "".join(self.CASE.format(*case) for case in cases)
        assert load_tool("time_tests").table(f"<testsuites><testsuite>{record}</testsuite></testsuites>") == [
            "| file | tests | seconds |",
            "|---|---:|---:|",
            "| `test_export.py` | 1 | 2.0 |",
            "| `test_tokens.py` | 2 | 0.8 |",
            "| all | 3 | 2.8 |",
        ]

    @pytest.mark.parametrize(("record", "message"), [("{}", "got no XML"), ("<testsuites />", "tells of no test")])
    def test_what_is_no_record_is_refused(self, record: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_tool("time_tests").table(record)
