"""Pyramids from plain ViTs: shapes by their definition, and real decoders of segmentation_models.pytorch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import LastLevelMaxPool
from torchvision.ops import FeaturePyramidNetwork

import effvit
from effvit.hosts.feature_pyramid import FeaturePyramid, SimpleFeaturePyramid

TINY = "evit_deit_tiny_patch16_224"


def small(name: str = TINY, **kwargs: object) -> nn.Module:
    size = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3}
    return timm.create_model(name, features_only=True, pyramid=True, **(size | kwargs)).eval()


@pytest.mark.parametrize("name", [TINY, "tome_vit_base_patch16_siglip_224", "ats_vit_small_patch16_dinov3"])
def test_levels_have_the_strides_and_channels_of_feature_info(name: str) -> None:
    model = small(name)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.randn(2, 3, 64, 64))
    for level, channels, stride in zip(maps, model.feature_info.channels(), (4, 8, 16, 32), strict=True):
        assert level.shape == (2, channels, 64 // stride, 64 // stride)


def test_levels_are_read_after_each_quarter_of_the_blocks() -> None:
    plain = timm.create_model(TINY, features_only=True, out_indices=(2, 5, 8, 11)).eval()
    pyramid = timm.create_model(TINY, features_only=True, pyramid=True).eval()
    pyramid.model.load_state_dict(plain.model.state_dict())
    x = torch.randn(1, 3, 224, 224)
    third = pyramid(x)[2]
    assert torch.equal(third, plain(x)[2])  # level 2 keeps the resolution


def test_odd_maps_are_rounded_up_at_the_coarsest_level() -> None:
    maps = small(img_size=80)(torch.randn(1, 3, 80, 80))
    assert [m.shape[-1] for m in maps] == [20, 10, 5, 3]


def test_chosen_levels_cut_the_blocks_behind_them() -> None:
    model = small(out_indices=(0, 2))
    assert model.feature_info.reduction() == [4, 16]
    assert len(model.model.blocks) == 3


def test_every_parameter_of_a_pyramid_gets_a_gradient() -> None:
    model = small().train()
    sum(level.square().sum() for level in model(torch.randn(2, 3, 64, 64))).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("decoder", ["unet", "unetplusplus", "fpn", "upernet", "linknet", "manet", "segformer"])
def test_decoders_of_segmentation_models_pytorch_train_on_it(decoder: str) -> None:
    name = effvit.register_pyramid(TINY)
    model = smp.create_model(decoder, f"tu-{name}", encoder_weights=None, classes=3, img_size=64)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 3, 64, 64)
    out.square().mean().backward()
    assert model.encoder.model.model.patch_embed.proj.weight.grad is not None


def test_dpt_of_segmentation_models_pytorch_takes_the_maps_without_a_pyramid() -> None:
    model = smp.create_model("dpt", f"tu-{TINY}", encoder_weights=None, classes=3).eval()
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 3, 224, 224)


def test_depth_example_of_the_page_learns_and_leaves_its_encoder_alone() -> None:
    """With random weights in place of timm's; the loss has its closed form and falls on one pair of images."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "dense.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "smp.DPT" in block]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code.replace('encoder_weights="imagenet"', "encoder_weights=None"), names)
    model, loss = names["model"], names["depth_loss"]
    truth = torch.rand(2, 1, 64, 64) * 9 + 1
    assert loss(2 * truth, truth, balance=1.0).item() == pytest.approx(0, abs=1e-6)  # a scale alone is no error
    assert loss(2 * truth, truth).item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-4)
    unknown = truth.clone()
    unknown[..., :32] = 0
    assert loss(torch.where(unknown > 0, 2 * truth, 7), unknown).item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-4)
    before = {name: weight.clone() for name, weight in model.encoder.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    losses = [names["train_step"](images, truth).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in model.encoder.state_dict().items())


def test_dynamic_image_sizes_reach_the_decoder() -> None:
    name = effvit.register_pyramid(TINY)
    model = smp.create_model("unet", f"tu-{name}", encoder_weights=None, classes=3, dynamic_img_size=True).eval()
    assert model(torch.randn(1, 3, 96, 160)).shape == (1, 3, 96, 160)


def test_feature_pyramid_network_of_torchvision_sits_on_it() -> None:
    backbone = small()
    fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), 16, extra_blocks=LastLevelMaxPool())
    levels = fpn({str(i): level for i, level in enumerate(backbone(torch.randn(1, 3, 64, 64)))})
    assert [level.shape[-1] for level in levels.values()] == [16, 8, 4, 2, 1]


def test_neck_of_vitdet_gives_equal_widths_from_the_last_map() -> None:
    neck = SimpleFeaturePyramid(32, out_channels=8, num_outs=5)
    levels = neck([torch.randn(1, 7, 9, 9), torch.randn(1, 32, 7, 6)])
    assert [level.shape[1:] for level in levels] == [(8, 28, 24), (8, 14, 12), (8, 7, 6), (8, 4, 3), (8, 2, 2)]


def test_registering_a_name_twice_needs_the_same_settings() -> None:
    name = effvit.register_pyramid("evit_deit_base_patch16_224", keep_rate=0.5)
    assert effvit.register_pyramid("evit_deit_base_patch16_224", keep_rate=0.5) == name
    with pytest.raises(ValueError, match=r"registered already, with the settings {'keep_rate': 0.5}"):
        effvit.register_pyramid("evit_deit_base_patch16_224", keep_rate=0.7)


def test_what_has_no_pyramid_is_refused() -> None:
    with pytest.raises(ValueError, match="'resnet18' is not a model of effvit"):
        effvit.register_pyramid("resnet18")
    with pytest.raises(ValueError, match="create the model with features_only=True too"):
        timm.create_model(TINY, pyramid=True)
    with pytest.raises(ValueError, match="from a patch size of 16, but this model has 14"):
        small("evit_vit_small_patch14_dinov2", img_size=56)
    with pytest.raises(ValueError, match=r"levels of a pyramid are 0 to 3, got out_indices=\(0, 4\)"):
        small(out_indices=(0, 4))
    with pytest.raises(ValueError, match="there are only 3"):
        small(depth=3)
    with pytest.raises(ValueError, match=r"scales of a feature pyramid are 4.0, 2.0, 1.0, 0.5, got 3"):
        FeaturePyramid(8, (3,))
    with pytest.raises(ValueError, match="num_outs must be at least the number of scales, 4, got 3"):
        SimpleFeaturePyramid(8, num_outs=3)
