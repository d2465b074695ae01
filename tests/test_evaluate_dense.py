"""The script that puts methods into a trained segmenter, on a minute one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_set import PATTERNS
from scripts import load_tool

pytest.importorskip("mmseg", reason="the mm extra is not installed")

from mmengine.config import Config

from effvit.dense.runner import build_runner, prepare_config

# Every Runner of a process after the first, and one that draws nothing, make mmengine say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*(instance named of|The draw is False).*:UserWarning")

TOOL = load_tool("evaluate_dense")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def trained(drawn_set: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Config of a minute UPerNet on a plain ViT, and a checkpoint of it."""
    data = {"data_root": str(drawn_set), "metainfo": {"classes": ("background", *PATTERNS)}}
    config = Config(
        {
            "_base_": str(ROOT / "configs/mmseg/composites/upernet_vit.py"),
            "model": {
                "backbone": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "out_indices": (1, 3)},
                "decode_head": {"in_channels": [32, 32], "in_index": [0, 1], "channels": 16, "num_classes": 4},
                "auxiliary_head": None,
            },
            **{f"{split}_dataloader": {"dataset": data} for split in ("train", "val", "test")},
        }
    )
    config.model.decode_head.pool_scales = (1, 2)
    path = tmp_path / "upernet.py"
    config.dump(path)
    runner = build_runner(prepare_config(path, work_dir=tmp_path / "work"))
    runner.model.init_weights()
    torch.save({"state_dict": runner.model.state_dict(), "meta": {}}, tmp_path / "trained.pth")
    return path, tmp_path / "trained.pth"


def test_controls_are_given_the_counts_of_the_method_in_its_blocks() -> None:
    found = dict(TOOL.controls_of([64, 40, 40, 10], 64, ["random", "uniform"]))
    assert found["random"] == found["uniform"]
    assert found["random"] == {"num_tokens": [40, 10], "reduce_at": [1, 3], "place": "mlp"}


def test_methods_and_their_controls_stand_in_one_row(trained: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    config, checkpoint = trained
    file = tmp_path / "found.json"
    command = [str(config), str(checkpoint), "--control", "random", "--work-dir", str(tmp_path / "out")]
    first = ["--method", "evit", "--set", "keep_rate=0.5", "--set", "reduce_at=[1]"]
    assert TOOL.main([*command, *first, "--json", str(file)]) == 0
    assert TOOL.main([*command, "--method", "expedite", "--set", "keep_rate=0.5", "--json", str(file)]) == 0
    other = [str(ROOT / "configs/mmseg/composites/upernet_vit.py"), *command[1:]]
    assert TOOL.main([*other, *first, "--json", str(file)]) == 2
    assert "holds rows of" in capsys.readouterr().err
    record = json.loads(file.read_text())
    rows = record["results"]
    assert [row["method"] for row in rows] == ["dense", "evit", "random", "expedite", "random"]
    dense, evit, random = rows[:3]
    assert dense["counts"] is None
    assert evit["counts"] == [64, 33, 33, 33]  # 32, and the token that sums up the rest
    assert random["counts"] == evit["counts"]
    assert random["macs"] < evit["macs"] < dense["macs"]
    lines = TOOL.table(record)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| evit", "| expedite"]
    assert lines[3].endswith(f"| {random['metrics']['mIoU']:.1f} |")


def test_what_is_not_there_is_named(tmp_path: Path, capsys: Any) -> None:
    config = ROOT / "configs/mmseg/composites/upernet_vit.py"
    assert TOOL.main([str(config), str(tmp_path / "none.pth"), "--method", "evit", "--set", "theta=1"]) == 2
    assert "no method named here has a setting 'theta'" in capsys.readouterr().err
