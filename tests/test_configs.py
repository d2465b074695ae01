"""Every config builds its model and makes a step of its own optimizer, on small pictures.

Detectors and segmenters have their true size; the classifiers for ImageNet-1k are smaller. Configs without an optimizer
evaluate.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from effvit.garments import GARMENTS
from effvit.openmmlab import load_config
from effvit.runner import nested_dicts, without_pretrained

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if "_base_" not in path.parts)
SIDE = 96
PICTURES = {"fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
HOST = {"embed_dim": 48, "num_heads": 3}
SMALLER: dict[str, dict[str, Any]] = {
    "stvit_r": {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 6, 1)},
    "supertoken": {"dims": (8, 16, 32, 64), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "casvit": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1)},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*(instance named of|__floordiv__|torch.meshgrid).*:UserWarning")


def read(path: Path) -> Config:
    """A config that asks for no weights, with few regions, and tokens to remove as a small picture allows."""
    config = without_pretrained(load_config(path))
    init_default_scope(config.default_scope)
    for part in nested_dicts(config.model):
        if part.get("type") == "RandomSampler":
            part["num"] = 32
        if "num_prop" in part:
            part["num_prop"] = 1
        if path.stem.endswith("in1k") and "model_name" in part:
            part.update(next((sizes for name, sizes in SMALLER.items() if part["model_name"].startswith(name)), HOST))
    return config


def inputs(config: Config) -> dict[str, Any]:
    """Two random pictures with annotations, as the data preprocessor takes them."""
    if config.default_scope == "mmdet":
        with_masks = "mask_head" in config.model.get("roi_head", {})
        channels = len(config.model.data_preprocessor.mean)
        shapes, classes = [(channels, SIDE, SIDE)] * 2, len(config.get("classes", range(80)))
        return demo_mm_inputs(2, shapes, num_items=[2, 2], num_classes=classes, with_mask=with_masks)
    generator = torch.Generator().manual_seed(0)
    if config.default_scope == "mmpretrain":
        shape = PICTURES.get(Path(str(config.filename)).parent.name, (3, 224, 224))
        pictures = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(2)]
        return {"inputs": pictures, "data_samples": [DataSample().set_gt_label(label) for label in (3, 7)]}
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)})
        labels = torch.randint(0, config.model.decode_head.num_classes, (1, SIDE, SIDE), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    pictures = [torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"inputs": pictures, "data_samples": samples}


def anchor_strides(model: Any) -> list[tuple[int, int]]:
    """Strides (W, H) a detector lays its anchors at, level by level; none for a segmenter."""
    head = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    return head.prior_generator.strides if head is not None else []


def train_a_step(model: Any, config: Config) -> None:
    """A step with the config's optimizer: losses are finite, maps fit their anchors, and weights change."""
    # Mixed precision with a loss scale is asked for on the command line.
    assert config.optim_wrapper.get("type", "OptimWrapper") in ("OptimWrapper", "BFloat16OptimWrapper")
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    sizes: list[tuple[int, ...]] = []
    if anchor_strides(model):
        model.neck.register_forward_hook(lambda module, args, maps: sizes.extend(tuple(x.shape[-2:]) for x in maps))
    backbone = getattr(model, "backbone", model)
    weight = next(p for p in backbone.parameters() if p.ndim > 1 and p.requires_grad)
    before = weight.detach().clone()
    model.train()
    losses = model.train_step(inputs(config), wrapper)
    assert sizes == [(-(-SIDE // height), -(-SIDE // width)) for width, height in anchor_strides(model)]
    assert losses
    assert all(bool(torch.as_tensor(value).isfinite().all()) for value in losses.values())
    assert not torch.equal(before, weight)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_predicts(path: Path) -> None:
    config = read(path)
    if config.default_scope == "mmseg":
        config.model.data_preprocessor.size = (SIDE, SIDE)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    if "optim_wrapper" in config:
        train_a_step(model, config)
    model.eval()
    with torch.no_grad():
        predictions = model.test_step(inputs(config))
    assert len(predictions) == 2


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/mmdet/composites/mask-rcnn_tiny-vit.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at data/mobile_sam/mobile_sam\.pt"):
        MODELS.build(config.model.backbone)


def test_detectors_on_garments_know_the_classes_of_the_set() -> None:
    config = load_config(ROOT / "configs/mmdet/garments/mask-rcnn_vit-nano.py")
    assert config.train_dataloader.dataset.metainfo.classes == GARMENTS


def test_every_config_says_where_its_settings_are_from() -> None:
    for path in CONFIGS:
        assert path.read_text().startswith("# "), path


def test_page_lists_every_config() -> None:
    page = (ROOT / "configs" / "README.md").read_text()
    listed = re.findall(r"\]\(([^)]+\.py)\)", page)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS)
