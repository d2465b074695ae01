"""The benchmark of official code, beside checkouts made up here: its rows, its reasons, and that it goes on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from scripts import load_tool

TOOL = load_tool("benchmark_official")
AIM = "AIM/llava/model/token_merge.py"
DIVPRUNE = "divprune/LLaVA/llava/model/llava_arch.py"
FIRST_TOKENS = """
def bipartite_soft_matching_merge(metric, r, x):
    return x[:, r:]
"""
FIRST_IDS = """
from llava.constants import IGNORE_INDEX
from .multimodal_encoder.builder import build_vision_tower
import torch

class LlavaMetaForCausalLM:
    def pairwise_cosine_similarity(self, matrix):
        return matrix @ matrix.T

    def DivPrune(self, features, number, cosines, share):
        return torch.arange(round(share * number)), self.pairwise_cosine_similarity(features)
"""


def measured(folder: Path, *only: str) -> dict[str, Any]:
    path = folder / "official.json"
    options = ["--code", str(folder), "--json", str(path), "--tokens", "36", "--rounds", "2"]
    assert TOOL.main([*options, "--only", *only]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_a_checkout_is_timed_and_a_missing_one_is_a_row_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / AIM, FIRST_TOKENS)
    rows = {(row["method"], row["asked"]): row for row in measured(tmp_path, "aim", "divprune", "atc")["cells"]}
    assert rows["aim", "N / 3"]["ratio"] > 0
    assert rows["aim", "N / 9"]["equal"] == "number of tokens equal"  # but not what is in them
    assert len(rows["aim", "N / 3"]["ours"]) == 2
    assert rows["divprune", "N / 3"]["refused"] == (
        f"FileNotFoundError: there is no {DIVPRUNE} among the checkouts; check out what the row names"
    )
    reason = "FileNotFoundError: there is no ATC/ATC_setup among the checkouts; check out what the row names"
    (refused,) = {row["refused"] for (method, _), row in rows.items() if method == "atc"}
    assert refused == reason
    lines, asked = capsys.readouterr().out.splitlines(), "0.7 in blocks 3, 6, 9"
    assert lines[-1].startswith(f"| atc | {asked} | 196 x 8 | n/a | n/a | n/a | n/a | {reason} |")


def test_it_goes_on_and_tries_refused_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / AIM, FIRST_TOKENS)
    before = measured(tmp_path, "aim", "divprune")["cells"]
    write(tmp_path / DIVPRUNE, FIRST_IDS)
    monkeypatch.setattr(TOOL, "interleaved", lambda *_, **__: {"official": [2.0, 3.0], "ours": [1.0, 1.0]})
    after = measured(tmp_path, "aim", "divprune")["cells"]
    assert [row for row in after if row["method"] == "aim"] == [row for row in before if row["method"] == "aim"]
    assert [row["ratio"] for row in after if row["method"] == "divprune"] == [2.5, 2.5]
    assert measured(tmp_path, "matryoshka")["cells"][: len(after)] == after


def test_official_code_of_any_kind_of_fault_is_a_row(tmp_path: Path) -> None:
    write(tmp_path / AIM, "raise KeyError('no such thing')")
    assert {row["refused"] for row in measured(tmp_path, "aim")["cells"]} == {"KeyError: 'no such thing'"}


def test_other_numbers_and_a_missing_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TOOL.main(["--code", str(tmp_path), "--json", str(tmp_path / "a.json"), "--tokens", "40"]) == 2
    assert "--tokens must be squares of even numbers" in capsys.readouterr().err
    assert TOOL.main(["--code", str(tmp_path / "none"), "--json", str(tmp_path / "a.json")]) == 2
    assert "--code must be the folder of the checkouts" in capsys.readouterr().err


def test_packages_of_a_checkout_hide_others_only_while_it_is_imported(tmp_path: Path) -> None:
    importing = load_tool("official_code").importing
    write(tmp_path / "timm" / "__init__.py", "from torch._six import container_abcs\n__version__ = 'old'")
    with importing([tmp_path], ("timm",), ("llava",)):
        assert importlib.import_module("timm").__version__ == "old"
        assert isinstance(importlib.import_module("llava.model.builder").build, type)
    assert sys.modules["timm"] is timm
    assert not {"llava", "torch._six"} & sys.modules.keys()
    assert str(tmp_path) not in sys.path


def test_sets_are_compared_in_any_order() -> None:
    found_equal = load_tool("official_code").found_equal
    x = torch.tensor([[3.0, 1.0, 2.0]])
    assert found_equal(x, x.flip(1), "ids") == "ids equal"
    assert found_equal(x, x.flip(1), "ids", ordered=True) == "number of ids equal"
    assert found_equal(x, x[:, 1:], "ids") == "3 ids against 2 of ours"
    assert found_equal(x, x + 1e-3, "tokens") == "tokens equal"
    places = torch.tensor([[1000, 2000]])
    assert found_equal(places, places + 1, "ids") == "number of ids equal"


def test_a_checkout_at_another_commit_is_refused(tmp_path: Path) -> None:
    check_commit = load_tool("official_code").check_commit
    check_commit(tmp_path, "0123456")  # no checkout of Git
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], [*name, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    with pytest.raises(ValueError, match=r"is checked out at \w{7}; check out 0123456"):
        check_commit(tmp_path, "0123456")
