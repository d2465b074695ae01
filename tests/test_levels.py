"""Levels of the tests: what is fast needs neither OpenMMLab nor files beside the checkout."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import FAST

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
