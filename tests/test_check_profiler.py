"""The check of the profiler, on durations that are known; none is measured."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import load_tool

from effvit.measure.profiler import measurement


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


def test_script_writes_what_a_clock_tells_that_goes_on_by_a_second_a_look(tmp_path, capsys, monkeypatch):
    """A run takes the second between two looks. The delayed one takes four: the two of the delay, and one look more."""
    path, tool = tmp_path / "check.json", load_tool("check_profiler")
    clock = SimpleNamespace(perf_counter=itertools.count(0.0).__next__)
    monkeypatch.setattr("effvit.measure.profiler.time", clock)
    monkeypatch.setattr(tool, "time", clock)
    tool.main(["--model", "test_vit", "--rounds", "3", "--batch-size", "1", "--delay", "2", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["conditions"]["inserted_delay"] == 2
    assert record["seconds"] == {"model": [1] * 3, "twin": [1] * 3, "delayed": [4] * 3, "nothing": [1] * 3}
    assert record["findings"] == {
        "twin_speedup": 1,
        "twin_interval": [1, 1],
        "delay": 3,
        "delay_interval": [3, 3],
        "overhead": 1,
    }
    assert capsys.readouterr().out.splitlines() == tool.table(record)
