"""The ViT whose weights the package has, the command that measures accuracy and the script that exports weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from labelled_sets import write_fashion, write_folders, write_handed_out
from PIL import Image
from scripts import load_tool

import effvit
from effvit.cli import main
from effvit.data.opening import open_labelled
from effvit.data.preparation import data_config, load_images
from effvit.measure.controls import Resized, control_of, resolution_control
from effvit.measure.records import read_profiles, read_results
from effvit.show.pictures import fashion_pictures
from effvit.show.tables import mean_and_range
from effvit.show.visualize import token_figure

NANO = "vit_nano_patch4_28"


COMMAND = ["evaluate", NANO, "--pretrained", "--data"]


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's images of Fashion-MNIST in folders named by the numbers of their classes."""
    return write_fashion(tmp_path_factory.mktemp("fashion") / "ten")


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


class TestCommand:
    def test_accuracies_are_those_of_the_models_scores(self, fashion: Path, tmp_path: Path, capsys: Any) -> None:
        """The expectation comes from the scores themselves, all images in one batch."""
        path = tmp_path / "new" / "accuracy.json"
        command = [*COMMAND, str(fashion), "--method", "evit", "tome", "--set", "keep_rate=0.5", "--set", "r=3"]
        assert main([*command, "--batch-size", "7", "--json", str(path)]) == 0
        dense = timm.create_model(NANO, pretrained=True).eval()
        pictures = fashion_pictures().values()
        images = load_images(dense, [picture.image for picture in pictures])
        labels = torch.tensor([picture.label for picture in pictures])
        models = {NANO: dense, "evit keep_rate=0.5": effvit.sparsify(dense, "evit", keep_rate=0.5)}
        models["tome r=3"] = effvit.sparsify(dense, "tome", r=3)
        (record,) = read_results(path)
        assert record["kind"] == "accuracy"
        printed = capsys.readouterr().out
        for entry, (name, model) in zip(record["models"], models.items(), strict=True):
            with torch.no_grad():
                right = int((model.eval()(images).argmax(-1) == labels).sum())
            assert (entry["name"], entry["accuracy"]["images"]) == (name, 60)
            assert entry["accuracy"]["value"] == 100 * right / 60
            assert entry["macs"] == effvit.count_flops(model, (1, 28, 28)).total
            share = right / 60
            assert f"{100 * share:.2f} ± {100 * (share * (1 - share) / 60) ** 0.5:.2f}" in printed
        assert f"evit keep_rate=0.5: {models_gap(record):.2f} points below {NANO}, at" in printed

    def test_controls_stand_behind_the_method_they_belong_to(self, fashion: Path, tmp_path: Path) -> None:
        """The expectation comes from the calls of Python that make the same controls."""
        path = tmp_path / "accuracy.json"
        command = [*COMMAND, str(fashion), "--method", "evit", "tome", "--set", "keep_rate=0.5", "--set", "r=3"]
        controls = ["--control", "random", "uniform", "resolution", "--seeds", "0", "4"]
        assert main([*command, *controls, "--json", str(path)]) == 0
        (record,) = read_results(path)
        entries = {entry["name"]: entry for entry in record["models"]}
        labels = ("random, seed 0", "random, seed 4", "uniform", "resolution")
        names = [NANO]
        for name in ("evit keep_rate=0.5", "tome r=3"):
            names += [name, *(f"{name}, control {label}" for label in labels)]
        assert list(entries) == names

        dense = timm.create_model(NANO, pretrained=True).eval()
        pictures = fashion_pictures().values()
        images = load_images(dense, [picture.image for picture in pictures])
        labels_of_images = torch.tensor([picture.label for picture in pictures])
        cheap = effvit.sparsify(dense, "evit", keep_rate=0.5).eval()
        smaller = resolution_control(dense, entries["evit keep_rate=0.5"]["macs"])
        expected = {
            "random, seed 4": control_of(cheap, "random", seed=4),
            "uniform": control_of(cheap, "uniform"),
            "resolution": Resized(smaller.model, smaller.size),
        }
        for label, model in expected.items():
            entry = entries[f"evit keep_rate=0.5, control {label}"]
            with torch.no_grad():
                right = int((model.eval()(images).argmax(-1) == labels_of_images).sum())
            assert entry["accuracy"]["value"] == 100 * right / 60
        assert entries["evit keep_rate=0.5, control uniform"]["tokens"] == entries["evit keep_rate=0.5"]["tokens"]
        with_resizing = entries["evit keep_rate=0.5, control resolution"]["macs"]
        assert smaller.macs <= with_resizing < 1.001 * smaller.macs

    def test_costs_that_depend_on_the_image_are_of_images_all_over_the_set(self, fashion: Path, tmp_path: Path) -> None:
        """A folder is sorted by class, so that the first ones would be of one kind."""
        path = tmp_path / "accuracy.json"
        assert main([*COMMAND, str(fashion), "--method", "ats", "--json", str(path)]) == 0
        (record,) = read_results(path)
        dense = timm.create_model(NANO, pretrained=True).eval()
        labelled = open_labelled(fashion)
        spread = load_images(dense, [labelled.read(place * 60 // 16) for place in range(16)])
        ats = effvit.sparsify(dense, "ats").eval()
        assert record["models"][1]["macs"] == effvit.count_flops(ats, (1, 28, 28), images=spread).total

    def test_controls_of_counts_that_depend_on_the_image(self, fashion: Path, tmp_path: Path) -> None:
        """The control keeps the mean counts, rounded; its speed is measured beside."""
        path = tmp_path / "accuracy.json"
        command = [*COMMAND, str(fashion), "--limit", "20", "--method", "ats", "--control", "random", "resolution"]
        assert main([*command, "--rounds", "1", "--batch-size", "10", "--json", str(path)]) == 0
        (record,) = read_profiles(path)
        _, ats, control, smaller = record.models
        assert ats.tokens is not None
        assert control.tokens == [round(count) for count in ats.tokens]
        assert smaller.macs <= ats.macs
        assert smaller.accuracy is not None

    def test_report_shows_the_record(self, fashion: Path, tmp_path: Path) -> None:
        path, page = tmp_path / "accuracy.json", tmp_path / "report.html"
        assert main([*COMMAND, str(fashion), "--limit", "10", "--json", str(path)]) == 0
        assert main(["report", str(path), "--out", str(page)]) == 0
        assert f'"data":"{fashion}, 10 images of 60"' in page.read_text()

    def test_rounds_measure_speed_in_a_record_for_plots(self, fashion: Path, tmp_path: Path) -> None:
        path = tmp_path / "accuracy.json"
        command = [*COMMAND, str(fashion), "--limit", "8", "--rounds", "1", "--batch-size", "4", "--json", str(path)]
        for method in ("evit", "tome"):
            assert main([*command, "--method", method]) == 0
        records = read_profiles(path)
        rows = load_tool("make_accuracy_page").table(records)[2:]
        assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in (NANO, "evit", "tome")]
        assert records[0].models[0].accuracy is not None
        assert records[0].models[0].accuracy.images == 8

    def test_trained_model_of_other_keywords_stands_beside_a_baseline(self, fashion: Path, tmp_path: Path) -> None:
        options = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24}
        stvit = timm.create_model("stvit_deit_tiny_patch16_224", **options)
        torch.save({"state_dict": stvit.state_dict()}, tmp_path / "epoch_4.pth")
        command = ["evaluate", "stvit_deit_tiny_patch16_224", "--checkpoint", str(tmp_path / "epoch_4.pth")]
        command += ["--model-kwargs", *(f"{key}={value}" for key, value in options.items()), "--baseline", NANO]
        command += ["--weights", "4 epochs", "--data", str(fashion), "--limit", "10"]
        assert main([*command, "--json", str(tmp_path / "a.json")]) == 0
        baseline, trained = json.loads((tmp_path / "a.json").read_text())[0]["models"]
        assert (baseline["name"], trained["name"]) == (NANO, "stvit_deit_tiny_patch16_224, 4 epochs")
        assert trained["macs"] == effvit.count_flops(stvit.eval(), (1, 28, 28)).total
        assert trained["mac_ratio"] == baseline["macs"] / trained["macs"]

    def test_weights_trained_otherwise_follow_the_names(self, fashion: Path, tmp_path: Path) -> None:
        path = tmp_path / "accuracy.json"
        command = [*COMMAND, str(fashion), "--limit", "4", "--rounds", "1", "--batch-size", "4", "--json", str(path)]
        assert main([*command, "--method", "evit"]) == 0
        assert main([*command, "--method", "evit", "--weights", "fine-tuned"]) == 0
        first, second = json.loads(path.read_text())
        assert [record["conditions"]["weights"] for record in (first, second)] == [None, "fine-tuned"]
        rows = load_tool("make_accuracy_page").table(read_profiles(path))[2:]
        assert [row.split(" | ")[0] for row in rows] == [f"| {NANO}", "| evit", "| evit, fine-tuned"]

    def test_thresholds_are_learnt_on_images_without_labels(self, fashion: Path, tmp_path: Path, capsys: Any) -> None:
        command = [*COMMAND, str(fashion), "--method", "dymu", "--set", "r_total=12", "--limit", "10"]
        assert main(command) == 2
        assert (
            "dymu r_total=12 must be calibrated on images before it can run; name a folder" in capsys.readouterr().err
        )
        assert main([*command, "--calibrate", str(fashion)]) == 2
        assert "has 60 images, cannot take 512 of them; ask for 1 to 60" in capsys.readouterr().err
        path = tmp_path / "a.json"
        calibration = ["--calibrate", str(fashion), "--calibration-images", "30"]
        assert main([*command, *calibration, "--json", str(path)]) == 0
        (record,) = read_results(path)
        assert record["models"][1]["macs"] < record["models"][0]["macs"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model-kwargs", "img_size=big"], "--model-kwargs img_size=big: 'big' is not JSON"),
            (["--limit", "61"], "has 60 images, cannot take 61 of them; ask for 1 to 60"),
            (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
            (["--workers", "-1"], "--workers must be at least 0, got -1"),
            (["--set", "r=2"], "settings belong to a method: name one with --method"),
            (["--control", "random"], "a control belongs to a method: name one with --method"),
            (
                ["--paper", "tome", "--control", "random"],
                "--paper brings models, settings and weights along, so --cont",
            ),
            (
                ["--method", "evit", "--control", "uniform", "--baseline", NANO],
                "a control is of the first model, which --baseline puts another in place of",
            ),
            (
                ["--method", "expedite", "--set", "restore_at=8", "--control", "uniform", "--limit", "2"],
                "a control has no features to give back to the patches it dropped",
            ),
            (["--checkpoints", "x"], "--checkpoints holds weights for --paper; of one MODEL they are given with"),
            (["--paper", "tome"], "--paper brings models, settings and weights along, so --pretrained has no place"),
            (["--device", "tpu7"], "unknown device 'tpu7'"),
            pytest.param(
                ["--device", "cuda"],
                "device 'cuda' asks for CUDA, but torch finds none here; use 'cpu'",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
            ),
        ],
    )
    def test_arguments_that_do_not_go_together_are_refused(
        self, fashion: Path, capsys: Any, arguments: list[str], message: str
    ) -> None:
        assert main([*COMMAND, str(fashion), *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_model_or_paper_must_be_named(self, fashion: Path, capsys: Any) -> None:
        assert main(["evaluate", "--data", str(fashion)]) == 2
        assert "name a MODEL, or with --paper what to repeat" in capsys.readouterr().err

    def test_unreadable_images_stop_it_before_anything_is_measured(self, tmp_path: Path, capsys: Any) -> None:
        folder = write_fashion(tmp_path / "ten")
        (folder / "3" / "dress-2.png").write_bytes(b"no image")
        assert main([*COMMAND, str(folder)]) == 2
        assert re.search(r"1 of 60 images of .* --skip-bad: .*dress-2\.png", capsys.readouterr().err)

    def test_models_of_other_classes_do_not_share_labels(self, fashion: Path, capsys: Any) -> None:
        command = ["evaluate", NANO, "--model-kwargs", "num_classes=12", "--baseline", NANO, "--data", str(fashion)]
        assert main(command) == 2
        assert f"--baseline {NANO} has the name of a model beside it; say with --weights" in capsys.readouterr().err
        assert main([*command, "--weights", "untrained"]) == 2
        assert "models that share labels must have the same classes, got" in capsys.readouterr().err

    def test_subset_of_imagenet_takes_the_columns_of_its_classes(self, tmp_path: Path) -> None:
        """A head that always says class 217 is right on the folder of its WordNet id alone."""
        model = timm.create_model(NANO, num_classes=1000)
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
        model.head.bias.data[217] = 1
        torch.save(model.state_dict(), tmp_path / "says_217.pth")
        path = tmp_path / "a.json"
        command = ["evaluate", NANO, "--model-kwargs", "num_classes=1000", "--json", str(path)]
        command += ["--checkpoint", str(tmp_path / "says_217.pth"), "--data"]
        assert main([*command, str(write_folders(tmp_path / "val"))]) == 0
        (tmp_path / "root").mkdir()
        assert main([*command, str(write_handed_out(tmp_path / "root"))]) == 0
        assert [record["models"][0]["accuracy"]["value"] for record in read_results(path)] == [100 / 3, 100 / 3]


def models_gap(record: Any) -> float:
    """Points between the first two models."""
    first, second = (model["accuracy"]["value"] for model in record["models"][:2])
    return float(first - second)


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

    def test_training_starts_from_the_blocks_of_a_trained_model(self, tmp_path: Path, capsys: Any) -> None:
        """The expectation comes from both models, made by timm."""
        path = tmp_path / "new" / "start.pth"
        assert load_tool("start_weights").main(["vit_nano_patch8_96", "--like", NANO, "--out", str(path)]) == 0
        random = "pos_embed, patch_embed.proj.weight, head.weight, head.bias"
        assert f"148 of 152 tensors from {NANO}; random: {random}" in capsys.readouterr().out
        state = torch.load(path, weights_only=True)["state_dict"]
        torch.manual_seed(0)
        model = timm.create_model("vit_nano_patch8_96")
        own, former = model.state_dict(), timm.create_model(NANO, pretrained=True).state_dict()
        model.load_state_dict(state)
        assert torch.equal(state["blocks.7.attn.qkv.weight"], former["blocks.7.attn.qkv.weight"])
        assert torch.equal(state["pos_embed"], own["pos_embed"])

    def test_training_does_not_start_from_what_fits_nowhere(self, tmp_path: Path, capsys: Any) -> None:
        command = ["deit_tiny_patch16_224", "--like", NANO, "--out", str(tmp_path / "start.pth")]
        assert load_tool("start_weights").main(command) == 2
        assert "take one of its width and depth" in capsys.readouterr().err

    def test_checkpoint_of_another_model_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        torch.save({"state_dict": {"head.weight": torch.zeros(1)}}, tmp_path / "epoch_1.pth")
        command = [str(tmp_path / "epoch_1.pth"), "--model", NANO, "--out", str(tmp_path / "a.safetensors")]
        assert load_tool("export_weights").main(command) == 2
        assert "is a checkpoint of another model" in capsys.readouterr().err


def test_means_show_the_range_where_there_is_one() -> None:
    assert mean_and_range([25.9]) == mean_and_range([25.91, 25.86]) == "25.9"
    assert mean_and_range([26.0, 25.5]) == "25.8 (25.5 to 26.0)"
