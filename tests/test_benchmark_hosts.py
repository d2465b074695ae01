"""The benchmark of hosts: what it compares, and how a row follows from what was timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import load_tool

from effvit.measure.profiler import measurement

TOOL = load_tool("benchmark_hosts")


@pytest.mark.parametrize("name", TOOL.HOSTS)
def test_models_of_a_host_share_its_weights_and_nothing_reduced_is_timms_bit_for_bit(name: str) -> None:
    models = TOOL.models_of(name, 128, 2)
    assert list(models) == ["timm", TOOL.NOTHING, "expedite", "tome"]
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = models["timm"](x)
        assert torch.equal(models[TOOL.NOTHING](x), expected)
        assert not torch.equal(models["tome"](x), expected)
    weight = next(models["timm"].parameters())
    assert all(next(model.parameters()) is weight for model in models.values())


def test_tower_goes_on_with_a_third_of_its_patches() -> None:
    model = TOOL.models_of("qwen3_vit_88m", 1024, 4)["tome"]
    assert model.token_counts((64, 64))[-1] == pytest.approx(4096 / 3, rel=0.01)


def test_share_is_the_time_saved_over_the_multiply_adds_saved() -> None:
    """Worked by hand: 0.8 of the time at 0.6 of the multiply-adds is half of what they promise."""
    dense, own = (
        measurement(name, np.full(3, seconds), np.ones(3), 1) for name, seconds in (("timm", 1.0), ("tome", 0.8))
    )
    row = TOOL.row("host", own, dense, 60, 100)
    assert row["ratio"] == pytest.approx(0.8)
    assert row["share"] == pytest.approx(0.5)
    assert TOOL.row("host", own, dense, 100, 100)["share"] is None


@pytest.mark.slow
def test_command_writes_a_row_for_each_model(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "hosts.json"
    assert TOOL.main(["--size", "128", "--depth", "2", "--rounds", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["results"]
    assert [(row["host"], row["model"]) for row in rows] == [
        (host, model) for host in TOOL.HOSTS for model in (TOOL.NOTHING, "expedite", "tome")
    ]
    assert all(row["macs"] < row["dense_macs"] for row in rows if row["model"] != TOOL.NOTHING)
    assert "of timm's time" in capsys.readouterr().out
