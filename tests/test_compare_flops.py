"""The page of multiply-adds: its table is that of the committed counts, and these are what models cost today."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hosts import released
from scripts import load_tool

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = json.loads((ROOT / "docs/benchmarks/published_flops.json").read_text())
MACS = json.loads((ROOT / "docs/benchmarks/counted_flops.json").read_text())["macs"]
SETTINGS: list[dict[str, Any]] = PUBLISHED["settings"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("compare_flops")


def test_page_shows_the_committed_counts(tool: ModuleType) -> None:
    page = tool.PAGE.read_text()
    assert page == tool.with_table(page, tool.table(PUBLISHED, MACS))


def test_every_setting_is_counted_once(tool: ModuleType) -> None:
    assert [tool.key(setting) for setting in SETTINGS] == list(dict.fromkeys(map(tool.key, SETTINGS)))
    assert {tool.key(setting) for setting in SETTINGS} == set(MACS)
    assert {setting["group"] for setting in SETTINGS} == set(tool.GROUPS)


@pytest.mark.parametrize("index", released(range(len(SETTINGS)), range(0, len(SETTINGS), 4)))
def test_committed_counts_are_what_the_models_cost(tool: ModuleType, index: int) -> None:
    setting = SETTINGS[index]
    assert tool.closed_form(setting) == MACS[tool.key(setting)], "run tools/compare_flops.py"


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224, 224",
        "evit_deit_tiny_patch16_224, keep 0.5, fused, 224",
        "sit_lvvit_tiny_224, 224",
        "stvit_r_swin_tiny_patch4_window7_224, 224",
    ],
)
def test_committed_counts_are_those_of_a_trace(tool: ModuleType, name: str) -> None:
    (setting,) = (setting for setting in SETTINGS if tool.key(setting) == name)
    assert tool.count(setting) == MACS[name]


def test_counts_are_within_one_percent_of_the_others_or_have_a_remark(tool: ModuleType) -> None:
    for setting in SETTINGS:
        macs = MACS[tool.key(setting)]
        shares = [tool.deviation(macs, setting["reference"]), tool.deviation(macs, setting.get("published"))]
        assert any(share is not None for share in shares), f"nothing to compare {tool.key(setting)} with"
        if max(abs(share) for share in shares if share is not None) > 0.01:
            assert setting.get("remark") in PUBLISHED["remarks"], tool.key(setting)


def test_every_figure_has_an_origin() -> None:
    for entry in (*SETTINGS, *PUBLISHED["elsewhere"]):
        assert (entry["reference"] is None) or entry["reference_from"] in PUBLISHED["sources"]
        assert ("published" in entry) == bool(entry.get("published_in"))
    assert all(entry["reason"] for entry in PUBLISHED["elsewhere"])


def test_printed_figures_are_compared_to_the_digits_they_have(tool: ModuleType) -> None:
    assert tool.deviation(1_258_400_000, "1.3") == 0
    assert tool.deviation(1_258_400_000, "1.2") == pytest.approx(0.0487, abs=1e-4)
    assert tool.deviation(1_258_400_000, 1.25) == pytest.approx(0.0067, abs=1e-4)
    assert tool.deviation(1_258_400_000, None) is None
