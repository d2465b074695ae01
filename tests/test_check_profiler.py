"""The check of the profiler, on durations that are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripts import load_tool

from effvit.profiler import measurement


def test_findings_are_the_truth_that_was_put_in():
    tool = load_tool("check_profiler")
    model = np.random.default_rng(0).uniform(0.09, 0.11, 50)
    durations = (model, 1.01 * model, model + 0.02, np.full(50, 1e-4))
    measured = [measurement("x", seconds, model, 1) for seconds in durations]
    found = tool.findings(*measured)
    assert found["twin_speedup"] == pytest.approx(1 / 1.01)
    assert found["twin_interval"] == pytest.approx((1 / 1.01, 1 / 1.01))
    assert found["delay"] == pytest.approx(0.02)
    assert found["overhead"] == pytest.approx(1e-4 / np.median(model))


def test_script_measures_and_writes(tmp_path, capsys):
    path = tmp_path / "check.json"
    tool = load_tool("check_profiler")
    tool.main(["--rounds", "3", "--batch-size", "1", "--delay", "2", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["findings"]["delay"] >= record["conditions"]["inserted_delay"] / 2
    assert [len(seconds) for seconds in record["seconds"].values()] == [3, 3, 3, 3]
    assert capsys.readouterr().out.splitlines() == tool.table(record)
