"""``effvit run``: a script behaves as python runs it, but for the package's names in timm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effvit.cli import main

ROOT = Path(__file__).resolve().parents[1]
# A stand-in for timm's train.py: it knows timm alone, takes its own options, and imports a module beside it.
SCRIPT = """
import json, os, sys
import beside
import timm
model = timm.create_model(sys.argv[1], depth=2)
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "beside": beside.VALUE,
    "class": type(model).__name__, "rank": os.environ.get("RANK"),
}))
"""
MODEL = "evit_deit_tiny_patch16_224"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    path = tmp_path / "stand_in.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(autouse=True)
def _own_interpreter_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command changes for the script, and the script's own modules, are put back."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside", raising=False)


def test_script_finds_our_names_and_its_own_arguments(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(script), MODEL, "--help", "-b", "4", "--", "--version"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["name"] == "__main__"
    assert seen["argv"] == [str(script), MODEL, "--help", "-b", "4", "--", "--version"]
    assert seen["file"] == str(script)
    assert (seen["path"], seen["beside"]) == (str(script.parent), 7)
    assert seen["class"] == "ReducedViT"


def test_script_is_run_as_python_runs_it(script: Path) -> None:
    """By the same arguments to python and to the command; the model is timm's, which both know."""
    seen = []
    for command in ([], ["-m", "effvit.cli", "run"]):
        done = subprocess.run(
            [sys.executable, *command, script.name, "vit_tiny_patch16_224", "--epochs", "3"],
            capture_output=True,
            text=True,
            cwd=script.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        seen.append(json.loads(done.stdout))
    seen[0]["file"] = script.name  # python makes it absolute, runpy does not
    assert seen[0] == seen[1]


def test_torchrun_starts_it_in_every_process(script: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "effvit.cli", "run", str(script), MODEL, "--amp"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(each["rank"] for each in seen) == ["0", "1"]
    assert all(each["argv"] == [str(script), MODEL, "--amp"] for each in seen)


def test_status_is_the_one_the_script_ends_with(tmp_path: Path) -> None:
    path = tmp_path / "ends.py"
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(SystemExit, match="3"):
        main(["run", str(path)])


def test_error_of_the_script_keeps_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fails.py"
    path.write_text("\n\nint('x')\n")
    assert main(["run", str(path)]) == 1
    message = capsys.readouterr().err
    assert f'File "{path}", line 3' in message
    assert message.splitlines()[-1].startswith("ValueError: invalid literal for int()")


@pytest.mark.parametrize("name", ["absent.py", ""])
def test_missing_script_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is none either."""
    assert main(["run", str(tmp_path / name), "--model", MODEL]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"effvit: error: no script at {tmp_path / name}".rstrip("/"))
    assert "takes a Python file, then its arguments" in message
