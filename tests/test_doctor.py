"""``effvit doctor``: what it finds here, and what it says of an installation that lacks something."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

import effvit
from effvit.cli import doctor, main

ROOT = Path(__file__).resolve().parents[1]
# The metadata of an installation, in the form of core metadata 2.1.
METADATA = [
    "torch>=2.6",
    "scikit-image>=0.24; extra == 'demo'",
    "onedl-mmcv==2.3.6; extra == 'mm'",
    "torch<2.14; extra == 'mm'",
    "transformers<6,>=5.24; python_version < '3' and extra == 'transformers'",
    "scipy>=1.11; extra == 'imagenet'",
]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions installed, to be changed; mmcv, if it is among them, is compiled."""
    found = {"torch": "2.11.0", "scikit-image": "0.26.0", "onedl-mmcv": "2.3.6", "scipy": "1.11.0"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    return found


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_installation_that_runs_these_tests_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = printed(capsys)
    assert lines[0].startswith(f"effvit {effvit.__version__}, Python {sys.version_info.major}.{sys.version_info.minor}")
    assert lines[1].startswith("devices: cpu")
    assert f"torch {torch.__version__.split('+')[0]}" in lines[2]
    assert lines[3].startswith("  a reduced model runs on cpu")


def test_json_says_the_same(versions: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    del versions["scipy"]
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["effvit"] == effvit.__version__
    assert found["core"]["problem"] is None
    (torch_here,) = found["core"]["packages"]
    assert torch_here == {"name": "torch", "needed": ">=2.6", "found": "2.11.0", "fits": True}
    assert found["extras"].keys() == {"mm", "transformers", "demo", "export", "imagenet"}
    assert found["extras"]["demo"]["problems"] == []
    assert found["extras"]["imagenet"]["problems"] == ["needs scipy>=1.11, found none"]
    assert found["extras"]["imagenet"]["install"] == "pip install 'effvit[imagenet]'"


def test_missing_extra_is_no_failure_and_named_with_the_command(
    versions: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del versions["scikit-image"]
    assert main(["doctor"]) == 0
    lines = printed(capsys)
    place = lines.index("demo (effvit demo, images named photographs:*): scikit-image missing")
    assert lines[place + 1] == "  needs scikit-image>=0.24, found none"
    assert lines[place + 2] == "  install: pip install 'effvit[demo]'"


def test_extra_of_another_python_has_no_command(versions: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = printed(capsys)
    (place,) = (index for index, line in enumerate(lines) if line.startswith("transformers ("))
    assert lines[place + 1].startswith("  the installed effvit has no such extra for Python 3.")
    assert not lines[place + 2].startswith("  install")


def test_openmmlab_is_installed_in_three_steps(versions: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """In one step pip builds mmcv where it finds no torch, and so without operators (README, Set-up)."""
    del versions["onedl-mmcv"]
    assert main(["doctor"]) == 0
    (line,) = (line for line in printed(capsys) if "--no-build-isolation" in line)
    first, second, third = line.removeprefix("  install: ").split(" && ")
    assert first.startswith("pip install 'torch<2.14' 'setuptools")
    assert second == "CFLAGS='-O2 -g0' CXXFLAGS='-O2 -g0' pip install --no-build-isolation 'onedl-mmcv==2.3.6'"
    assert third == "pip install 'effvit[mm]'"


def test_what_mmcv_is_built_with_is_that_of_the_checkout() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"^onedl-mmcv = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert tuple(re.findall(r'^    "([^"]+)"', table[1], re.MULTILINE)) == doctor.MMCV_BUILD
    assert f'onedl-mmcv = {{ CFLAGS = "{doctor.FLAGS}", CXXFLAGS = "{doctor.FLAGS}" }}' in text


def test_extras_are_those_of_the_checkout() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert set(re.findall(r"^(\w+) = ", table[1], re.MULTILINE)) == {*doctor.PURPOSES, "dev", "docs"}


def test_mmcv_without_operators_is_noticed(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "__init__.py")))
    assert "mmcv is installed without its compiled operators (mmcv._ext)" in doctor.extras()[0].problems[0]
    (tmp_path / "_ext.cpython-311-x86_64-linux-gnu.so").touch()
    assert doctor.extras()[0].problems == []


def test_distributions_that_overwrite_each_other_are_noticed(versions: dict[str, str]) -> None:
    versions["mmcv"] = "2.2.0"
    assert doctor.extras()[0].problems == [
        "onedl-mmcv and mmcv overwrite each other's files: pip uninstall both, then install again"
    ]


def test_version_out_of_range_breaks_the_core(versions: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    versions["torch"] = "2.5.1"
    assert main(["doctor"]) == 1
    assert "  needs torch>=2.6, found 2.5.1: pip install --upgrade effvit" in printed(capsys)


def test_model_that_does_not_run_breaks_the_core(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(effvit, "sparsify", broken)
    assert main(["doctor"]) == 1
    assert "  a reduced model does not run on cpu: RuntimeError: no kernel" in printed(capsys)


def test_values_that_are_not_finite_break_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effvit, "sparsify", lambda *args, **kwargs: torch.nn.Threshold(1, float("nan")))
    assert doctor.core_problem([], ["cpu"]) == "a reduced model gives values on cpu that are not finite"


def test_package_that_was_never_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith(f"effvit: error: effvit is imported from {ROOT} without being installed")
