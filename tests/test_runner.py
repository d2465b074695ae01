"""Training and testing configs: learning, resuming, several processes, and what is refused."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from drawn_set import PATTERNS
from PIL import Image
from scripts import load_tool

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.apis import init_model

from effvit.cli import main
from effvit.dense.runner import (
    build_runner,
    check_annotations,
    prepare_config,
    read_launcher,
    read_options,
    without_pretrained,
)
from effvit.measure.records import read_results

# Every Runner of a process after the first, and one that draws nothing, make mmengine say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*(instance named of|The draw is False).*:UserWarning")

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = {
    "_delete_": True,
    "type": "EffViT",
    "model_name": "evit_deit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "img_size": 64,
    "reduce_at": (1, 2),
    "out_indices": (3,),
}


def write_config(folder: Path, base: str, **changes: Any) -> Path:
    """A config that changes one of those for the generated set to the drawn one and to a minute model."""
    config = Config({"_base_": str(ROOT / "configs" / base), **changes})
    path = folder / f"{Path(base).stem}.py"
    config.dump(path)
    return path


@pytest.fixture
def detector(drawn_set: Path, tmp_path: Path) -> Path:
    """Config of a minute Mask R-CNN on the drawn set."""
    classes = tuple(PATTERNS)
    data = {"data_root": f"{drawn_set}/", "metainfo": {"classes": classes}}
    return write_config(
        tmp_path,
        "mmdet/composites/mask-rcnn_evit.py",
        model={
            "backbone": BACKBONE,
            "neck": {"in_channels": [32]},
            "roi_head": {"bbox_head": {"num_classes": 3}, "mask_head": {"num_classes": 3}},
        },
        train_dataloader={"batch_size": 2, "dataset": data},
        val_dataloader={"batch_size": 1, "dataset": data},
        test_dataloader={"batch_size": 1, "dataset": data},
        val_evaluator={"ann_file": f"{drawn_set}/annotations/instances_validation.json"},
        test_evaluator={"ann_file": f"{drawn_set}/annotations/instances_validation.json"},
        train_cfg={"max_epochs": 2, "val_interval": 2},
    )


@pytest.fixture
def segmenter(drawn_set: Path, tmp_path: Path) -> Path:
    """Config of a minute UPerNet on the drawn set, without anything random but the order of pictures."""
    classes = ("background", *PATTERNS)
    data = {"data_root": str(drawn_set), "metainfo": {"classes": classes}}
    pipeline = [{"type": name} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    norm = {"type": "GN", "num_groups": 4}  # batch norm would see another batch in each process
    return write_config(
        tmp_path,
        "mmseg/composites/upernet_evit.py",
        model={
            "data_preprocessor": {"size": (64, 64)},
            "backbone": {**BACKBONE, "out_indices": (1, 3)},
            "decode_head": {
                "in_channels": [32, 32],
                "in_index": [0, 1],
                "channels": 16,
                "num_classes": 4,
                "dropout_ratio": 0.0,
                "norm_cfg": norm,
                "loss_decode": {"class_weight": None},  # that of the config is for its own classes
            },
            "auxiliary_head": None,
        },
        train_dataloader={"batch_size": 4, "dataset": {**data, "pipeline": pipeline}},
        val_dataloader={"dataset": data},
        test_dataloader={"dataset": data},
        train_cfg={"max_iters": 4, "val_interval": 4},
        default_hooks={"checkpoint": {"interval": 2}, "logger": {"interval": 1}},
    )


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Config that evaluates a minute GTP with weights of a file on two pictures."""
    model, dataset = classifier_parts(tmp_path)
    return write_config(
        tmp_path,
        "mmpretrain/gtp-deit-s_in1k.py",
        model=model,
        test_dataloader={"num_workers": 0, "persistent_workers": False, "dataset": dataset},
    )


@pytest.fixture
def finetuning(tmp_path: Path) -> Path:
    """Config that trains a minute ATS from weights of a file on two pictures."""
    model, dataset = classifier_parts(tmp_path)
    loader = {"batch_size": 2, "num_workers": 0, "persistent_workers": False, "dataset": dataset}
    return write_config(
        tmp_path,
        "mmpretrain/ats-deit-s_8xb256-30e_in1k.py",
        model=model,
        train_dataloader={**loader, "sampler": {"_delete_": True, "type": "DefaultSampler", "shuffle": False}},
        val_dataloader=loader,
        test_dataloader=loader,
        train_cfg={"max_epochs": 1},
    )


def classifier_parts(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    """What makes a model of a config minute, with weights of a file, and a data set of two pictures."""
    data = folder / "imagenet"
    data.mkdir()
    for label in (3, 7):
        Image.fromarray(np.full((40, 50, 3), 20 * label, np.uint8)).save(data / f"{label}.png")
    (data / "val.txt").write_text("3.png 3\n7.png 7\n")
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.save(timm.create_model("deit_small_patch16_224", **sizes).state_dict(), folder / "deit.pth")
    model = {**sizes, "pretrained": str(folder / "deit.pth")}
    return model, {"data_root": str(data), "split": "", "ann_file": "val.txt"}


def scalars(work_dir: Path, key: str) -> list[float]:
    """Values of a key in the order they were logged."""
    lines = [
        line for path in sorted(work_dir.glob("*/vis_data/scalars.json")) for line in path.read_text().splitlines()
    ]
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


class TestTraining:
    def test_detector_trains_and_its_checkpoint_is_tested(self, detector: Path, tmp_path: Path) -> None:
        work = tmp_path / "work"
        assert main(["train", str(detector), "--work-dir", str(work), "--cfg-options", "log_level=ERROR"]) == 0
        losses = scalars(work, "loss")
        assert losses
        assert torch.tensor(losses).isfinite().all()
        out = tmp_path / "metrics.json"
        arguments = [str(detector), str(work / "epoch_2.pth"), "--work-dir", str(work), "--out", str(out)]
        assert main(["test", *arguments]) == 0
        (record,) = read_results(out)
        assert (record["config"], record["checkpoint"]) == (str(detector), str(work / "epoch_2.pth"))
        metrics = record["metrics"]
        assert all(0 <= value <= 1 or value == -1 for value in metrics.values())

    def test_classifier_is_tested_with_the_weights_of_its_config(self, classifier: Path, tmp_path: Path) -> None:
        out = tmp_path / "metrics.json"
        assert main(["test", str(classifier), "--work-dir", str(tmp_path), "--out", str(out)]) == 0
        (record,) = read_results(out)
        assert record["checkpoint"] is None
        assert record["metrics"].keys() == {"accuracy/top1", "accuracy/top5"}

    def test_trainings_are_compared_and_not_repeated(
        self, segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, work = tmp_path / "compared.json", tmp_path / "works"
        arguments = [str(segmenter), "--work-dirs", str(work), "--json", str(out)]
        records = []
        for _ in range(2):
            assert load_tool("compare_training").main(arguments) == 0
            records.append(json.loads(out.read_text()))
        (row,) = records[0]["results"]
        assert row["iterations"] == 4
        assert row["untrained"].keys() == row["trained"].keys() == {"mIoU"}
        assert row["backbone_macs"] > 0
        assert records[0] == records[1]
        assert "| [upernet_evit](" in capsys.readouterr().out

    def test_classifiers_are_compared_before_and_after_training(
        self, finetuning: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both seeds begin with the weights of a file, which are tested once."""
        tests: list[Runner] = []
        test = Runner.test
        monkeypatch.setattr(Runner, "test", lambda self: tests.append(self) or test(self))
        out = tmp_path / "compared.json"
        arguments = [str(finetuning), "--work-dirs", str(tmp_path / "works"), "--seeds", "0", "1", "--json", str(out)]
        assert load_tool("compare_training").main(arguments) == 0
        rows = json.loads(out.read_text())["results"]
        assert [row["seed"] for row in rows] == [0, 1]
        for row in rows:
            assert row["untrained"].keys() == row["trained"].keys() == {"accuracy/top1"}
            assert row["backbone_parameters"] == row["parameters"]
            assert row["iterations"] == 1
        assert rows[0]["untrained"] == rows[1]["untrained"]
        assert len(tests) == 3
        assert "| 0, 1 |" in capsys.readouterr().out

    def test_fine_tuning_is_compared_with_the_checkpoint_it_starts_from(
        self, segmenter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not with the first weights of its config, and of every seed what it has learned."""
        work, out = tmp_path / "work", tmp_path / "compared.json"
        build_runner(prepare_config(segmenter, work_dir=work)).train()
        tuned = tmp_path / "tuned.py"
        config = Config.fromfile(segmenter)
        config.load_from = str(work / "iter_4.pth")
        config.dump(tuned)
        tested: list[torch.Tensor] = []
        test = Runner.test

        def weigh_and_test(runner: Runner) -> dict[str, float]:
            metrics = test(runner)
            tested.append(sum(p.detach().double().abs().sum() for p in runner.model.parameters()))
            return metrics

        monkeypatch.setattr(Runner, "test", weigh_and_test)
        arguments = [str(tuned), "--work-dirs", str(tmp_path / "works"), "--seeds", "0", "1", "--json", str(out)]
        assert load_tool("compare_training").main(arguments) == 0
        paths = (work / "iter_4.pth", *(tmp_path / "works" / "tuned" / f"seed-{i}" / "iter_4.pth" for i in range(2)))
        model = build_runner(prepare_config(segmenter, work_dir=work)).model
        names = dict(model.named_parameters())
        weights = [torch.load(path, weights_only=False)["state_dict"] for path in paths]
        assert tested == [sum(state[name].double().abs().sum() for name in names) for state in weights]

    def test_interrupted_training_goes_on_where_it_stopped(self, segmenter: Path, tmp_path: Path) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        build_runner(prepare_config(segmenter, work_dir=whole)).train()
        parts.mkdir()
        shutil.copy(whole / "iter_2.pth", parts)
        (parts / "last_checkpoint").write_text(str(parts / "iter_2.pth"))
        resumed = build_runner(prepare_config(segmenter, work_dir=parts, resume="auto"))
        resumed.train()
        assert resumed.iter == 4
        a, b = (
            torch.load(folder / "iter_4.pth", weights_only=False)["optimizer"]["state"] for folder in (whole, parts)
        )
        assert a[0]["step"] == b[0]["step"] == 4

    def test_resumed_before_it_began_starts_from_the_checkpoint_of_the_config(
        self, segmenter: Path, tmp_path: Path
    ) -> None:
        start = tmp_path / "start.pth"
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, start)
        options = {"load_from": str(start)}
        config = prepare_config(segmenter, work_dir=tmp_path / "work", options=options, resume="auto")
        assert (bool(config.get("resume")), config.load_from) == (False, str(start))
        (tmp_path / "work").mkdir()
        latest = tmp_path / "work" / "iter_2.pth"
        (tmp_path / "work" / "last_checkpoint").write_text(str(latest))
        config = prepare_config(segmenter, work_dir=tmp_path / "work", options=options, resume="auto")
        assert (config.resume, config.load_from) == (True, str(latest))

    def test_two_processes_make_the_step_of_one(self, segmenter: Path, tmp_path: Path) -> None:
        """The mean of the gradients of two halves of a batch is the gradient of the batch."""
        one = {"train_cfg.max_iters": 1, "val_cfg": None, "val_dataloader": None, "val_evaluator": None}
        build_runner(prepare_config(segmenter, work_dir=tmp_path / "alone", options=one)).train()
        options = [f"{key}={value}" for key, value in {**one, "train_dataloader.batch_size": 2}.items()]
        train = ["-m", "effvit.cli", "train", segmenter, "--work-dir", tmp_path / "together", "--cfg-options", *options]
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, train)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-2000:]
        alone, together = (
            torch.load(tmp_path / name / "iter_1.pth", weights_only=False)["optimizer"]["state"]
            for name in ("alone", "together")
        )
        largest = max(float(state["exp_avg"].abs().max()) for state in alone.values())
        assert largest > 0
        for parameter, state in alone.items():
            assert torch.allclose(state["exp_avg"], together[parameter]["exp_avg"], rtol=1e-4, atol=1e-6 * largest)


class TestSettings:
    def test_command_line_changes_the_config(self, segmenter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = prepare_config(segmenter, options={"train_cfg.max_iters": 7}, resume="some.pth")
        assert config.work_dir == "work_dirs/upernet_evit"
        assert config.train_cfg.max_iters == 7
        assert (config.resume, config.load_from) == (True, "some.pth")
        monkeypatch.setattr("effvit.dense.runner.get_device", lambda: "cuda")
        amp = prepare_config(segmenter, amp=True)
        assert (amp.optim_wrapper.type, amp.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")

    def test_processes_without_accelerator_use_gloo_and_plain_batch_norm(self, tmp_path: Path) -> None:
        path = tmp_path / "config.py"
        path.write_text("model = dict(head=[dict(norm_cfg=dict(type='SyncBN'))])")
        config = prepare_config(path, launcher="pytorch")
        assert config.env_cfg.dist_cfg.backend == "gloo"
        assert config.model_wrapper_cfg.device_ids is None
        assert config.model.head[0].norm_cfg.type == "BN"
        assert prepare_config(path).model.head[0].norm_cfg.type == "SyncBN"  # mmengine reverts it itself

    def test_torchrun_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert read_launcher(None) == "none"
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert read_launcher(None) == "pytorch"
        with pytest.raises(ValueError, match="launcher 'none' in one of 2 processes would train 2 models apart"):
            read_launcher("none")

    def test_unknown_launcher_is_refused(self) -> None:
        with pytest.raises(ValueError, match="launcher must be one of none, pytorch, slurm, mpi, got 'torchrun'"):
            read_launcher("torchrun")

    def test_values_are_read_as_mmengine_reads_them(self) -> None:
        """After its DictAction: numbers, lists, tuples in brackets, None."""
        texts = ["a.b=3", "lr=1e-4", "sizes=[1,2]", "pair=(1,2)", "flag=True", "none=None", "name=x=y"]
        assert read_options(texts) == {
            **{"a.b": 3, "lr": 1e-4, "sizes": [1, 2], "pair": (1, 2)},
            **{"flag": True, "none": None, "name": "x=y"},
        }
        assert read_options([]) == {}

    @pytest.mark.parametrize("text", ["r", "=8"])
    def test_value_without_key_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=rf"is written KEY=VALUE, got '{text}'"):
            read_options([text])

    @pytest.mark.parametrize("tool", ["train", "test"])
    def test_tools_are_doors_to_the_commands(
        self, tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", "missing.py"])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        assert capsys.readouterr().err.startswith("effvit: error: no config at missing.py; those of the package are")

    def test_mixed_precision_without_accelerator_is_refused(self, segmenter: Path) -> None:
        with pytest.raises(ValueError, match="mixed precision needs an accelerator"):
            prepare_config(segmenter, amp=True)

    def test_scaling_of_the_learning_rate_needs_a_base(self, segmenter: Path) -> None:
        with pytest.raises(ValueError, match=r"auto_scale_lr needs auto_scale_lr=dict\(base_batch_size"):
            prepare_config(segmenter, auto_scale_lr=True)

    def test_neck_for_another_backbone_is_refused_before_training(
        self, segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its first convolution would say "expected input to have 64 channels", when the first batch comes."""
        options = ["--cfg-options", "model.decode_head.in_channels=[32,64]"]
        assert main(["train", str(segmenter), "--work-dir", str(tmp_path), *options]) == 2
        message = capsys.readouterr().err
        assert "have 32, 32 channels, but model.decode_head.in_channels=[32, 64], set it to [32, 32]" in message
        assert message.startswith("effvit: error: the maps of the backbone evit_deit_tiny_patch16_224 have")


class TestCheckpoints:
    def test_checkpoint_of_another_model_is_refused(
        self, segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "other.pth"
        torch.save({"state_dict": {"backbone.features.model.pos_embed": torch.ones(1, 5, 7)}, "meta": {}}, path)
        assert main(["test", str(segmenter), str(path), "--work-dir", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"effvit: error: {path} is a checkpoint of another model than this EncoderDecoder")

    def test_config_without_weights_needs_a_checkpoint(
        self, segmenter: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["test", str(segmenter)]) == 2
        assert "names no weights for its whole model; give a checkpoint" in capsys.readouterr().err

    def test_config_that_only_evaluates_is_not_trained(
        self, classifier: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["train", str(classifier)]) == 2
        assert "has no training data; it only evaluates, by effvit test" in capsys.readouterr().err

    def test_truncated_checkpoint_is_refused(self, segmenter: Path, tmp_path: Path) -> None:
        path = tmp_path / "broken.pth"
        path.write_bytes(b"PK\x03\x04")
        config = prepare_config(segmenter, work_dir=tmp_path, resume=str(path))
        with pytest.raises(ValueError, match=r"broken.pth cannot be read as a checkpoint"):
            build_runner(config)


class TestPretrainedConfigs:
    """A config that names weights which are not there: only a model that starts from nothing asks for them."""

    @pytest.fixture
    def trained(self, segmenter: Path, tmp_path: Path) -> tuple[Config, str]:
        """The config, which names a missing file, and a checkpoint of its model."""
        config = prepare_config(segmenter, work_dir=tmp_path, options={"log_level": "ERROR"})
        model = MODELS.build(config.model)
        path = str(tmp_path / "trained.pth")
        torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": ("a",) * 4}}}, path)
        config.model.backbone.pretrained = str(tmp_path / "missing.pth")
        return config, path

    def test_config_can_be_made_to_name_none(self) -> None:
        """Of no part of the model, however deep."""
        teacher = {"pretrained": "teacher.pth", "depth": 12}
        config = without_pretrained(Config({"model": {"backbone": {"pretrained": True}, "heads": [teacher]}}))
        assert config.model.to_dict() == {
            "backbone": {"pretrained": False},
            "heads": [{"pretrained": False, "depth": 12}],
        }

    def test_training_asks_for_them_before_it_begins(self, trained: tuple[Config, str]) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.pth"):
            build_runner(trained[0])

    def test_a_checkpoint_takes_their_place(self, trained: tuple[Config, str]) -> None:
        config, path = trained
        config.load_from, config.train_cfg.max_iters, config.resume = path, 1, False
        runner = build_runner(config)
        runner.train()
        assert runner.iter == 1
        assert config.model.backbone.pretrained.endswith("missing.pth")  # the saved config still names them

    def test_init_model_of_mmseg_does_not_ask(self, trained: tuple[Config, str]) -> None:
        config, path = trained
        model = init_model(config, path, device="cpu")
        saved = torch.load(path, weights_only=False)["state_dict"]
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        assert model.backbone(torch.rand(1, 3, 64, 64))[0].isfinite().all()


class TestAnnotations:
    def test_broken_annotation_file_is_named(self, detector: Path, drawn_set: Path, tmp_path: Path) -> None:
        content = (drawn_set / "annotations" / "instances_training.json").read_text()
        config = prepare_config(detector)
        path = tmp_path / "annotations.json"
        config.train_dataloader.dataset.ann_file = str(path)
        with pytest.raises(
            FileNotFoundError, match=r"train_dataloader asks for .*annotations.json, which is not there"
        ):
            check_annotations(config)
        path.write_text(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"annotations.json is no intact COCO annotation file"):
            check_annotations(config)
        entries = json.loads(content)
        entries["annotations"][0]["category_id"] = 9
        path.write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=r"has category_id 9, which is not among the categories"):
            check_annotations(config)

    def test_missing_label_map_is_named(self, segmenter: Path, drawn_set: Path, tmp_path: Path) -> None:
        shutil.copytree(drawn_set, tmp_path / "set")
        (tmp_path / "set" / "annotations" / "training" / "000003.png").unlink()
        config = prepare_config(segmenter)
        config.train_dataloader.dataset.data_root = str(tmp_path / "set")
        with pytest.raises(ValueError, match=r"1 of 12 images in .*set have no label map, .*000003.png"):
            check_annotations(config)
        config.train_dataloader.dataset.data_root = str(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match=r"train_dataloader cannot list its images in .*nothing"):
            check_annotations(config)
        config.train_dataloader.dataset.img_suffix = ".webp"
        config.train_dataloader.dataset.data_root = str(drawn_set)
        with pytest.raises(FileNotFoundError, match="train_dataloader finds no images"):
            check_annotations(config)

    def test_command_ends_with_status_2_and_one_line(
        self, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["--cfg-options", "train_dataloader.dataset.data_root=nowhere/"]
        assert main(["train", str(detector), "--work-dir", str(tmp_path), *options]) == 2
        message = capsys.readouterr().err
        assert message.startswith("effvit: error: train_dataloader asks for nowhere/annotations")
        assert message.count("\n") == 1
