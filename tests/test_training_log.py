"""What the log of a training in stages is summed up to; the logged numbers are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from scripts import TOOLS, load_tool

pytest.importorskip("mmengine")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return load_tool("training_log")


def line(step: int, loss: float, seconds: float = 6.0) -> dict[str, float]:
    """A line of the log of a training with two iterations an epoch."""
    return {"step": step, "iter": step, "epoch": (step + 1) // 2, "loss": loss, "time": seconds, "lr": 0.1}


def write_run(work_dir: Path, name: str, lines: Sequence[dict[str, float]]) -> None:
    folder = work_dir / name / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def write_config(work_dir: Path, epochs: int, data: str = "length=40") -> None:
    (work_dir / f"{work_dir.name}.py").write_text(f"train_dataloader = dict(dataset=dict({data}))\n")
    (work_dir / f"epoch_{epochs}.pth").touch()


def test_epochs_of_all_runs_and_stages_are_summed_up(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run resumes after the first epoch and repeats an iteration; it is stopped within the third epoch."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_run(first, "1", [line(1, 4.0), line(2, 3.0, 9.0), {"accuracy/top1": 20.0, "step": 1}, line(3, 9.0)])
    write_run(first, "2", [line(3, 2.0), line(4, 2.0), {"accuracy/top1": 30.004, "step": 2}, line(5, 1.0)])
    write_run(second, "1", [line(1, 1.0), line(2, 0.5)])
    write_config(first, 2)
    write_config(second, 1)
    out = tmp_path / "log.json"
    assert tool.main([str(first), str(second), "--json", str(out)]) == 0
    stages = json.loads(out.read_text())["stages"]
    assert [own["config"] for own in stages] == ["first", "second"]
    assert [own["images_per_epoch"] for own in stages] == [40, 40]
    assert stages[0]["by_epoch"] == [
        {"epoch": 1, "iterations": 2, "minutes": 0.25, "lr": 0.1, "loss": 3.5, "top1": 20.0},
        {"epoch": 2, "iterations": 2, "minutes": 0.2, "lr": 0.1, "loss": 2.0, "top1": 30.0},
    ]
    assert [(entry["minutes"], entry["top1"]) for entry in stages[1]["by_epoch"]] == [(0.2, None)]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| first | 1 | 40 | 0.0 | 3.50 | 20.0 |",
        "| first | 2 | 80 | 0.0 | 2.00 | 30.0 |",
    ]


def test_other_folders_are_refused(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "1", [line(1, 1.0)])
    assert tool.main([str(tmp_path)]) == 2
    assert "it has 0 configs, 0 checkpoints and 1 logged losses" in capsys.readouterr().err
    write_config(tmp_path, 1, "data_root='x'")
    assert tool.main([str(tmp_path)]) == 2
    assert "must say the length of its training set" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "nowhere")]) == 2
    assert "must be the work directory of one training" in capsys.readouterr().err
