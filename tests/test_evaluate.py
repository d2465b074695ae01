"""The ViT whose weights the package has, the script that measures accuracy and the one that exports weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import load_tool
from torchvision.datasets import FakeData

import effvit
from effvit.data.preparation import data_config, load_images
from effvit.measure.records import read_profiles
from effvit.show.tables import mean_and_range
from effvit.show.visualize import token_figure

NANO = "vit_nano_patch4_28"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on sixteen pictures of noise."""
    tool = load_tool("evaluate")
    data = FakeData(16, (1, 28, 28), 10, transform=None)
    grey = [(image.convert("L"), label) for image, label in (data[index] for index in range(16))]
    monkeypatch.setattr(tool, "load_pictures", lambda *_: grey)
    return tool


class TestWeights:
    def test_they_come_with_the_package(self) -> None:
        model = timm.create_model(NANO, pretrained=True)
        file = Path(model.pretrained_cfg["file"])
        assert file.is_relative_to(Path(effvit.__file__).parent)
        assert file.stat().st_size < 3e6
        assert sum(p.numel() for p in model.parameters()) == 1_349_770
        assert next(model.parameters()).dtype == torch.float32

    def test_they_see_clothes(self) -> None:
        """Drawn outlines are no photographs of clothes, yet trousers and a bag are told from each other."""
        trousers, bag = np.zeros((2, 28, 28), np.uint8)
        trousers[1:27, 8:13] = trousers[1:27, 15:20] = 200
        trousers[1:7, 8:20] = 200
        bag[11:26, 3:25] = 200
        bag[4:11, 8:10] = bag[4:11, 18:20] = bag[4:6, 8:20] = 200
        model = timm.create_model(NANO, pretrained=True).eval()
        with torch.no_grad():
            scores = model(load_images(model, [Image.fromarray(trousers), Image.fromarray(bag)]))
        assert scores.argmax(-1).tolist() == [1, 8]  # numbers of the data set

    def test_a_tag_and_another_size_load_too(self) -> None:
        model = timm.create_model(f"{NANO}.fashion_mnist", pretrained=True, num_classes=3, img_size=32, in_chans=3)
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
        assert data_config(model)["mean"] == (0.286,)

    def test_token_sheet_is_drawn_of_grey_pictures(self) -> None:
        model = effvit.sparsify(timm.create_model(NANO, pretrained=True), "evit", keep_rate=0.5)
        assert token_figure(model, Image.new("L", (28, 28), 90)).mode == "RGB"


class TestEvaluate:
    def test_record_holds_accuracies_beside_costs(self, pictures: Any, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "new" / "accuracy.json"
        command = [NANO, "--pretrained", "--data", "fashion_mnist", "--method", "evit", "dymu", "--rounds", "1"]
        command += ["--set", "keep_rate=0.5", "--set", "r_total=12", "--batch-size", "4", "--json", str(path)]
        assert pictures.main([*command, "--limit", "8"]) == 2
        assert "the set has 16 pictures, cannot take 512 of them" in capsys.readouterr().err
        pictures.CALIBRATION_IMAGES = 16
        assert pictures.main([*command, "--limit", "8"]) == 0
        (record,) = json.loads(path.read_text())
        assert capsys.readouterr().out.splitlines() == pictures.table(read_profiles(path))
        assert [m["name"] for m in record["models"]] == [NANO, "evit keep_rate=0.5", "dymu r_total=12"]
        for model in record["models"]:
            assert model["accuracy"]["data"] == "fashion_mnist test, 8 pictures"
            assert 0 <= model["accuracy"]["value"] <= 100

    def test_records_of_one_baseline_share_a_table(self, pictures: Any, tmp_path: Path) -> None:
        path = tmp_path / "accuracy.json"
        for method in ("evit", "tome"):
            command = [NANO, "--data", "fashion_mnist", "--method", method, "--rounds", "1", "--batch-size", "4"]
            assert pictures.main([*command, "--json", str(path)]) == 0
        rows = pictures.table(read_profiles(path))[2:]
        assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in (NANO, "evit", "tome")]

    def test_trained_model_of_other_keywords_stands_beside_a_baseline(self, pictures: Any, tmp_path: Path) -> None:
        options = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24}
        stvit = timm.create_model("stvit_deit_tiny_patch16_224", **options)
        torch.save({"state_dict": stvit.state_dict()}, tmp_path / "epoch_4.pth")
        command = ["stvit_deit_tiny_patch16_224", "--checkpoint", str(tmp_path / "epoch_4.pth")]
        command += ["--model-kwargs", *(f"{key}={value}" for key, value in options.items()), "--baseline", NANO]
        command += [
            "--weights",
            "4 epochs",
            "--data",
            "fashion_mnist",
            "--rounds",
            "1",
            "--batch-size",
            "4",
            "--json",
            str(tmp_path / "a.json"),
        ]
        assert pictures.main(command) == 0
        baseline, trained = json.loads((tmp_path / "a.json").read_text())[0]["models"]
        assert (baseline["name"], trained["name"]) == (NANO, "stvit_deit_tiny_patch16_224, 4 epochs")
        assert trained["macs"] == effvit.count_flops(stvit.eval(), (1, 28, 28)).total
        assert trained["mac_ratio"] == baseline["macs"] / trained["macs"]

    def test_keyword_that_is_not_json_is_refused(self, pictures: Any, capsys: Any) -> None:
        command = [NANO, "--data", "fashion_mnist", "--model-kwargs", "img_size=big"]
        assert pictures.main(command) == 2
        assert "--model-kwargs img_size=big: 'big' is not JSON" in capsys.readouterr().err

    def test_weights_trained_otherwise_follow_the_names(self, pictures: Any, tmp_path: Path) -> None:
        path = tmp_path / "accuracy.json"
        command = [NANO, "--data", "fashion_mnist", "--rounds", "1", "--batch-size", "4", "--json", str(path)]
        assert pictures.main([*command, "--method", "evit"]) == 0
        assert pictures.main([*command, "--method", "evit", "--weights", "fine-tuned"]) == 0
        first, second = json.loads(path.read_text())
        assert [record["conditions"]["weights"] for record in (first, second)] == [None, "fine-tuned"]
        rows = pictures.table(read_profiles(path))[2:]
        assert [row.split(" | ")[0] for row in rows] == [f"| {NANO}", "| evit", "| evit, fine-tuned"]

    def test_missing_pictures_are_named(self, tmp_path: Path, capsys: Any) -> None:
        assert load_tool("evaluate").main([NANO, "--data", "fashion_mnist", "--root", str(tmp_path)]) == 2
        assert "fetch it: python tools/get_data.py fashion_mnist" in capsys.readouterr().err


class TestExport:
    def test_checkpoint_of_the_runner_becomes_a_file_for_timm(self, tmp_path: Path) -> None:
        model = timm.create_model(NANO, pretrained=True)
        torch.save({"meta": {}, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pth")
        out = tmp_path / "nano.safetensors"
        tool = load_tool("export_weights")
        assert tool.main([str(tmp_path / "epoch_1.pth"), "--model", NANO, "--out", str(out)]) == 0
        again = timm.create_model(NANO, checkpoint_path=str(out))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)

    def test_checkpoint_of_another_model_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        torch.save({"state_dict": {"head.weight": torch.zeros(1)}}, tmp_path / "epoch_1.pth")
        command = [str(tmp_path / "epoch_1.pth"), "--model", NANO, "--out", str(tmp_path / "a.safetensors")]
        assert load_tool("export_weights").main(command) == 2
        assert "is a checkpoint of another model" in capsys.readouterr().err


def test_means_show_the_range_where_there_is_one() -> None:
    assert mean_and_range([25.9]) == mean_and_range([25.91, 25.86]) == "25.9"
    assert mean_and_range([26.0, 25.5]) == "25.8 (25.5 to 26.0)"
