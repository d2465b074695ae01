"""The page of hosts: how outcomes of checks become numbers of names, and that the page shows what was counted."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import timm
from scripts import TOOLS, load_tool
from timm.models import list_modules

from effvit.hosts._unserved import UNSERVED

CONVOLUTIONAL = {"byobnet", "resnest"}  # networks of convolutions, some of whose blocks attend


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return load_tool("make_hosts_page")


def test_page_shows_what_was_counted(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([("good", "good"), ("refused: no class token", "refused: no class token")], "exact"),
        ([("refused: block class", "refused: block class")] * 2, "refused: block class"),
        ([("good", "good"), ("good", "wrong: output is not finite")], "wrong"),
    ],
)
def test_a_name_is_exact_if_a_method_runs_and_none_is_wrong(
    tool: ModuleType, outcomes: list[tuple[str, str]], expected: str
) -> None:
    methods = {f"method {i}": {"off": off, "default": default} for i, (off, default) in enumerate(outcomes)}
    assert tool.result_of(methods) == expected


def test_names_are_counted_by_module(tool: ModuleType) -> None:
    good, refused = {"evit": {"off": "good", "default": "good"}}, {"evit": {"off": "refused: block class"}}
    hosts = {"deit_tiny_patch16_224": good, "vit_tiny_patch16_224": good, "vit_base_patch16_xp_224": refused}
    record = tool.counted({"versions": {"timm": "1"}, "hosts": hosts})
    assert record["modules"] == {"deit": {"exact": 1}, "vision_transformer": {"exact": 1, "refused: block class": 1}}
    lines = tool.table(record)
    assert "| `vision_transformer` | 2 | 1 | 1: block class |" in lines
    assert "| all of these | 3 | 2 | 1 |" in lines


def test_every_transformer_of_timm_is_counted_or_has_a_reason(tool: ModuleType) -> None:
    """A transformer is here a module that defines attention, or names a ViT whose class another module defines."""
    record = tool.read_record()

    def attends(module: str) -> bool:
        content = vars(sys.modules.get(f"timm.models.{module}", object)).items()  # others register modules too
        return any(inspect.isclass(value) and ("Attention" in name or "Attn" in name) for name, value in content)

    modules = {module for module in list_modules() if timm.list_models(module=module) and attends(module)}
    assert modules - CONVOLUTIONAL <= {*record["modules"], *UNSERVED}
    assert not {*record["modules"]} & {*UNSERVED}
