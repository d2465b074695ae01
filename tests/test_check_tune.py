"""The second measurement of what `effvit tune` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import load_tool

from effvit.measure.records import SCHEMA, read_tuning

TOOL = load_tool("check_tune")


def candidate(method: str, speedup: float, divergence: float, **settings: Any) -> dict[str, Any]:
    return {
        "method": method,
        "settings": settings,
        "macs": 30_000_000,
        "speedup": speedup,
        "interval": [speedup, speedup],
        "fidelity": {"divergence": divergence, "feature_distance": 0.1},
    }


BEST = candidate("tome", 1.5, 0.1, r=2)
TUNED = {
    "schema": SCHEMA,
    "kind": "tune",
    "machine": {
        **dict.fromkeys(("system", "processor", "device", "python", "torch", "timm", "effvit"), ""),
        "cores": 2,
    },
    "host": "vit_nano_patch4_28",
    "target": {"speedup": 1.5},
    "best": BEST,
    "front": [BEST],
    "tried": [
        BEST,
        candidate("tome", 1.6, 0.2, r=3),
        candidate("evit", 1.4, 0.05, keep_rate=0.9),
        candidate("evit", 1.5, 0.4, keep_rate=0.7),
        candidate("evit", 1.9, 0.6, keep_rate=0.5),
        candidate("evit", 1.5, 0.3, keep_rate=0.8, reduce_at=[2]),
    ],
    "conditions": {"batch_size": 4, "input_size": [1, 28, 28], "threads": 1, "device": "cpu", "dtype": "float32"},
}


def test_contenders_are_the_best_and_the_nearest_of_every_other_method_and_place(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps(TUNED))
    assert [c.settings for c in TOOL.contenders(read_tuning(tuned))] == [
        {"r": 2},
        {"keep_rate": 0.8, "reduce_at": [2]},
        {"keep_rate": 0.7},
    ]


def test_all_are_measured_again_and_records_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, out = tmp_path / "tuned.json", tmp_path / "out.json"
    tuned.write_text(json.dumps(TUNED))
    for _ in range(2):
        TOOL.main([str(tuned), "fashion_mnist:*", "--pretrained", "--rounds", "2", "--json", str(out)])
    records = json.loads(out.read_text())
    assert len(records) == 2
    assert [row["method"] for row in records[0]["results"]] == ["tome", "evit", "evit"]
    assert all(row["again"]["speedup"] > 0 for row in records[0]["results"])
    assert "| vit_nano_patch4_28 | 1.50 | **tome** | r=2 | 0.1 |" in capsys.readouterr().out


def test_a_result_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"kind": "profile"}))
    assert TOOL.main([str(tuned), "fashion_mnist:*"]) == 2
    assert (
        "must have \"schema\": 1 and \"kind\": 'tune', got {'schema': None, 'kind': 'profile'}"
        in capsys.readouterr().err
    )
    tuned.write_text(json.dumps({**TUNED, "best": None}))
    assert TOOL.main([str(tuned), "fashion_mnist:*"]) == 2
    assert "names no best setting to measure again; give the file of another search" in capsys.readouterr().err
    tuned.write_text(json.dumps({**TUNED, "target": {"macs": 1e6}}))
    assert TOOL.main([str(tuned), "fashion_mnist:*"]) == 2
    assert "is not the result of `effvit tune --speedup`" in capsys.readouterr().err
