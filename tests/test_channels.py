"""Channels of necks and heads against the maps of their backbone: configs that cannot take an image are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import init_default_scope

from effvit.dense.channels import backbone_channels, check_channels
from effvit.dense.openmmlab import load_config

ROOT = Path(__file__).resolve().parents[1]
HEAD = {"type": "UPerHead", "in_channels": [384] * 4, "in_index": [0, 1, 2, 3]}


def model(**parts: Any) -> dict[str, Any]:
    return {"backbone": {"type": "EffViT", "model_name": "some"}, **parts}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mmdet/retinanet_evit-deit-s_fpn_1x_coco.py", [384]),
        ("mmseg/fpn_supertoken-s_4xb4-80k_ade20k-512x512.py", [64, 128, 320, 512]),
    ],
)
def test_channels_are_those_of_the_papers_tables(name: str, expected: list[int]) -> None:
    """DeiT-S (2012.12877) and SViT-S (2211.11167). tests/test_configs.py holds all configs to ``check_channels``."""
    config = load_config(ROOT / "configs" / name)
    init_default_scope(config.default_scope)
    assert backbone_channels(config) == expected
    check_channels(config.model, expected)


@pytest.mark.parametrize(
    ("neck", "channels", "message"),
    [
        (
            {"type": "SimpleFeaturePyramid", "in_channels": 384},
            [192],
            "the maps of the backbone some have 192 channels, but model.neck.in_channels=384, set it to 192",
        ),
        (
            {"type": "FPN", "in_channels": [64, 128], "out_channels": 256, "num_outs": 5},
            [64, 96],
            "have 64, 96 channels, but model.neck.in_channels=[64, 128], set it to [64, 96]",
        ),
        (
            {"type": "FPN", "in_channels": [64], "out_channels": 256, "num_outs": 5},
            [64, 96],
            "model.neck.in_channels=[64], set it to [64, 96]",
        ),
        (
            {"type": "Feature2Pyramid", "embed_dim": 768},
            [192] * 4,
            "model.neck.embed_dim=768, set it to 192",
        ),
        (
            [{"type": "FPN", "in_channels": [64], "out_channels": 256}, {"type": "BFP", "in_channels": 256}],
            [96],
            "model.neck[0].in_channels=[64], set it to [96]",
        ),
    ],
)
def test_neck_for_another_backbone_is_named(neck: Any, channels: list[int], message: str) -> None:
    """The rule is that of each neck's first convolution."""
    with pytest.raises(ValueError, match=re.escape(message)):
        check_channels(model(neck=neck), channels)


def test_head_without_a_neck_takes_the_maps_of_the_backbone() -> None:
    check_channels(model(decode_head=HEAD), [384] * 4)
    head = {"type": "FCNHead", "in_channels": 384, "in_index": 3}
    with pytest.raises(ValueError, match=r"model\.auxiliary_head\[1\]\.in_channels=384, set it to 192$"):
        check_channels(model(auxiliary_head=[{**head, "in_channels": 192}, head]), [48, 96, 192, 192])


def test_head_behind_a_neck_takes_what_the_neck_gives() -> None:
    neck = {"type": "MultiLevelNeck", "in_channels": [192] * 4, "out_channels": 256, "scales": [4, 2, 1, 0.5]}
    with pytest.raises(
        ValueError, match=r"model\.decode_head\.in_channels=\[384, 384, 384, 384\], set it to \[256, 256, 256, 256\]"
    ):
        check_channels(model(neck=neck, decode_head=HEAD), [192] * 4)
    check_channels(model(neck={**neck, "out_channels": 384}, decode_head=HEAD), [192] * 4)


def test_head_that_wants_more_maps_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"in_index=\[0, 1, 2, 3\], set it to places among 1 maps, or give the backb"):
        check_channels(model(decode_head=HEAD), [384])


def test_unknown_neck_and_other_backbones_are_left_alone() -> None:
    check_channels(model(neck={"type": "Mine", "in_channels": 5}, decode_head=HEAD), [192])
    assert backbone_channels(Config({"default_scope": "mmdet", "model": {"backbone": {"type": "ResNet"}}})) is None
    assert backbone_channels(Config({"model": {"type": "ImageClassifier"}})) is None
