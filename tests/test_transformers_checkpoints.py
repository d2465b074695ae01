"""Files that models of transformers save compute the same in timm's hosts: `make test-transformers` runs this."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="the transformers extra is not installed")

import compare_transformers
from compare_transformers import CASES, Case, compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.host}")
def test_features_are_those_of_transformers(case: Case) -> None:
    found = compare(case)
    assert found.largest > 0.2
    assert found.difference < 1e-5


def test_the_page_counts_what_is_found_here() -> None:
    recorded = json.loads((compare_transformers.ROOT / compare_transformers.RECORD).read_text())["models"]
    counts = ("model", "host", "family", "used", "dropped", "features")
    for row, case in zip(recorded, CASES, strict=True):
        found = compare(case)._asdict()
        assert {name: row[name] for name in counts} == {name: found[name] for name in counts}
