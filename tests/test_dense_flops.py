"""Multiply-adds of whole detectors and segmenters against counts of their parts and closed forms of their heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import load_tool
from torch import nn

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")

from mmengine.registry import MODELS, init_default_scope

from effvit.dense.dense_flops import count_dense_flops, count_parts, random_regions
from effvit.dense.openmmlab import load_config
from effvit.dense.runner import without_pretrained
from effvit.measure.flops import FlopReport, count_flops

ROOT = Path(__file__).resolve().parents[1]
SIZE = (96, 128)


def build(config: str, **changes: Any) -> nn.Module:
    content = load_config(ROOT / "configs" / config)
    content.merge_from_dict(changes)
    init_default_scope(content.default_scope)
    return MODELS.build(without_pretrained(content).model)


def convolution(module: nn.Module) -> int:
    """MACs of a convolution for each place of its output."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 4)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return build("mmdet/garments/mask-rcnn_evit-nano.py")


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("get_flops")


class TestDetector:
    def test_parts_add_up_and_the_backbone_counts_as_alone(self, detector: nn.Module) -> None:
        report = count_dense_flops(detector, SIZE)
        parts = count_parts(detector, report)
        assert list(parts) == ["backbone", "neck", "rpn_head", "roi_head"]
        assert sum(macs for _, macs in parts.values()) == report.total
        assert parts["backbone"][1] == count_flops(detector.backbone, (1, *SIZE)).total
        assert parts["backbone"][0] == sum(p.numel() for p in detector.backbone.parameters())

    def test_heads_get_as_many_regions_as_the_settings_let_through(self, detector: nn.Module) -> None:
        report = count_dense_flops(detector, SIZE)
        proposals, detections = 200, 100  # test_cfg of the config
        linear = sum(p.numel() for p in detector.roi_head.bbox_head.parameters() if p.ndim == 2)
        assert report.by_module["roi_head.bbox_head"] == proposals * linear
        head = detector.roi_head.mask_head
        upsampling, logits = convolution(head.upsample), convolution(head.conv_logits)
        places = 14**2 * (convolution(head.convs) + upsampling) + 28**2 * logits
        assert report.by_module["roi_head.mask_head"] == detections * places

    def test_sampling_of_regions_is_listed(self, detector: nn.Module) -> None:
        assert list(count_dense_flops(detector, SIZE).uncounted) == ["prim::PythonOp.RoIAlignFunction"]

    def test_cascade_runs_its_box_heads_one_after_another(self) -> None:
        model = build("mmdet/cascade-mask-rcnn_stvit-r-swin-s_fpn_3x_coco.py", **{"model.test_cfg.rpn.max_per_img": 10})
        report = count_dense_flops(model, (64, 64))
        for stage in range(3):
            head = model.roi_head.bbox_head[stage]
            linear = sum(p.numel() for p in head.parameters() if p.ndim == 2)
            own = report.by_module[f"roi_head.bbox_head.{stage}"]
            norms = own - 10 * (linear + 49 * convolution(head))
            assert 0 <= norms < 0.01 * own

    def test_one_stage_detector(self) -> None:
        model = build("mmdet/retinanet_casvit-m_fpn_1x_coco.py")
        report = count_dense_flops(model, (128, 128))
        places = sum((128 // stride) ** 2 for stride in (8, 16, 32, 64, 128))
        assert report.by_module["bbox_head"] == places * convolution(model.bbox_head)


def test_regions_lie_on_the_image() -> None:
    """(index of the image, left, top, right, bottom) on 20 rows of 60 pixels."""
    index, left, top, right, bottom = random_regions(200, (20, 60)).unbind(1)
    assert (index == 0).all()
    assert (left.min() >= 0) & (left <= right).all() & (top <= bottom).all()
    assert bottom.max() <= 20 < right.max() <= 60


def test_what_belongs_to_no_part_is_told_apart() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 3)})
    report = FlopReport(10, {}, {"backbone": 7}, {}, (10,))
    assert count_parts(model, report) == {"backbone": (9, 7), "elsewhere": (0, 3)}


class TestSegmenter:
    def test_auxiliary_head_does_not_run(self) -> None:
        model = build("mmseg/composites/upernet_stvit-r.py")
        report = count_dense_flops(model, SIZE)
        parts = count_parts(model, report)
        assert parts["auxiliary_head"][1] == 0
        assert parts["backbone"][1] + parts["decode_head"][1] == report.total
        assert not report.uncounted

    def test_count_leaves_the_model_as_it_is(self) -> None:
        model = build("mmseg/composites/upernet_vit.py").train()
        count_dense_flops(model, SIZE)
        assert model.training
        assert not [m for m in model.modules() if m._forward_hooks]

    def test_size_is_checked(self) -> None:
        with pytest.raises(ValueError, match=r"size of an image is \(H, W\), both at least 1, got \(0, 64\)"):
            count_dense_flops(nn.Identity(), (0, 64))


class TestTool:
    def test_options_change_the_count(self, tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = str(ROOT / "configs/mmdet/garments/mask-rcnn_evit-nano.py")
        macs = []
        for keep_rate in (1.0, 0.5):
            out = tmp_path / f"{keep_rate}.json"
            options = ["--cfg-options", f"model.backbone.sparsify.keep_rate={keep_rate}"]
            assert tool.main([config, "--shape", "128", "--json", str(out), *options]) == 0
            macs.append(json.loads(out.read_text())["parts"]["backbone"]["macs"])
        assert macs[1] < 0.6 * macs[0]
        assert "GMACs" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.py"], "nowhere.py"),
            (["configs/mmseg/composites/upernet_vit.py", "--shape", "0"], "--shape takes one side"),
            (
                ["configs/mmseg/composites/upernet_vit.py", "--cfg-options", "model.backbone.model_name=vitt"],
                "unknown model 'vitt'",
            ),
        ],
    )
    def test_errors_are_one_line(
        self, tool: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, *rest = arguments
        path = config if config == "nowhere.py" else str(ROOT / config)
        assert tool.main([path, *rest]) == 2
        error = capsys.readouterr().err
        assert error.startswith("get_flops: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_trace_does_not_depend_on_the_thread_count() -> None:
    """Regions are drawn once and by seed: two counts agree."""
    model = build("mmdet/garments/mask-rcnn_vit-nano.py")
    assert count_dense_flops(model, (64, 64)) == count_dense_flops(model, (64, 64))
    assert torch.is_grad_enabled()
