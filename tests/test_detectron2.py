"""The backbone for detectron2 against the interface that its documentation describes (detectron2_stub.py)."""

from __future__ import annotations

import itertools
import math
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from detectron2_stub import Backbone, CfgNode, ShapeSpec
from safetensors.torch import save_file

from effvit.dense.backbone import DenseBackbone

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}
REDUCED: dict[str, Any] = {"model_name": "evit_deit_tiny_patch16_224", "keep_rate": 0.5, "reduce_at": (1,), **SMALL}


@pytest.fixture
def adapter(detectron2: None) -> ModuleType:
    return import_module("effvit.dense.detectron2")


def config(adapter: ModuleType, weights: str = "", **options: Any) -> CfgNode:
    """As a project of detectron2 makes it: the default, what the project adds, and a YAML file."""
    cfg = CfgNode({"MODEL": CfgNode({"WEIGHTS": "", "BACKBONE": CfgNode({"NAME": ""})})})
    adapter.add_effvit_config(cfg)
    backbone = {"NAME": "build_effvit_backbone"}
    cfg.merge({"MODEL": {"WEIGHTS": weights, "BACKBONE": backbone, "EFFVIT": {**REDUCED, **options}}})
    return cfg


def built(cfg: CfgNode, channels: int = 3) -> Any:
    """As detectron2's ``build_backbone`` does it."""
    registry = sys.modules["detectron2.modeling"].BACKBONE_REGISTRY
    backbone = registry[cfg.MODEL.BACKBONE.NAME](cfg, ShapeSpec(channels=channels))
    assert isinstance(backbone, Backbone)
    return backbone


def test_maps_are_those_of_the_framework_free_backbone_under_timms_names(adapter: ModuleType) -> None:
    torch.manual_seed(0)
    plain = DenseBackbone(**REDUCED, out_indices=(1, 3)).eval()
    model = built(config(adapter, out_indices=(1, 3))).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 40, 56)
    maps = model(x)
    assert list(maps) == ["blocks.1", "blocks.3"]
    assert all(torch.equal(own, expected) for own, expected in zip(maps.values(), plain(x), strict=True))


@pytest.mark.parametrize(
    ("options", "strides"),
    [
        ({"pyramid": True}, [4, 8, 16, 32]),
        ({"pyramid": True, "out_indices": (1, 2)}, [8, 16]),
        ({"sparsify": {"method": "tome", "r": 2}, "model_name": "deit_tiny_patch16_224"}, [16, 16, 16]),
    ],
)
def test_shapes_told_are_those_of_the_maps(adapter: ModuleType, options: dict[str, Any], strides: list[int]) -> None:
    model = adapter.EffViT(**(REDUCED | options)) if "pyramid" in options else adapter.EffViT(**SMALL, **options)
    shapes, maps = model.output_shape(), model.eval()(torch.randn(1, 3, 64, 96))
    assert shapes.keys() == maps.keys()
    assert [shape.stride for shape in shapes.values()] == strides
    for name, shape in shapes.items():
        assert maps[name].shape[1:] == (shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_padded_images_give_levels_that_fit_each_other(adapter: ModuleType) -> None:
    """What an FPN asks: each level is exactly twice as fine as the next, at the size that batches are padded to."""
    model = built(config(adapter, pyramid=True)).eval()
    step = model.size_divisibility
    assert model.padding_constraints == {"size_divisibility": step, "square_size": 0}
    height, width = (step * math.ceil(side / step) for side in (70, 41))
    sizes = [level.shape[-2:] for level in model(torch.randn(1, 3, height, width)).values()]
    assert all(tuple(fine) == (2 * coarse[0], 2 * coarse[1]) for fine, coarse in itertools.pairwise(sizes))


def test_channels_of_the_images_reach_the_model(adapter: ModuleType) -> None:
    assert built(config(adapter), channels=1).model.patch_embed.proj.in_channels == 1


def test_pretrained_weights_are_loaded_unless_the_config_names_a_checkpoint(
    adapter: ModuleType, tmp_path: Path
) -> None:
    dense = timm.create_model("deit_tiny_patch16_224", **SMALL)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    model = built(config(adapter, pretrained=str(tmp_path / "dense.safetensors")))
    assert torch.equal(model.model.pos_embed, dense.pos_embed)
    built(config(adapter, weights="model_final.pth", pretrained="no/such/file.pth"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at no/such/file\.pth"):
        built(config(adapter, pretrained="no/such/file.pth"))


def test_example_of_the_page_runs(adapter: ModuleType) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "dense.md"
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "detectron2" in block
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    shapes = names["backbone"].output_shape()
    assert [(name, shape.stride) for name, shape in shapes.items()] == [(f"level{i}", 4 << i) for i in range(4)]
    assert shapes["level0"].channels == 96
