"""The backbone for transformers, in heads of transformers itself and through its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers", reason="the transformers extra is not installed")

from architectures import SMALL as ARCHITECTURES
from pages import example
from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

import effvit
from effvit.dense.backbone import DenseBackbone
from effvit.dense.transformers import EffViTBackbone, EffViTConfig

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}
EVIT: dict[str, Any] = {"model_name": "evit_deit_tiny_patch16_224", "keep_rate": 0.5, "reduce_at": (1,), **SMALL}
ARCHITECTURE, SETTINGS = ARCHITECTURES["supertoken"]
CASES: dict[str, dict[str, Any]] = {
    "named": {**EVIT, "out_indices": (1, 2)},
    "live": {
        "model_name": "deit_tiny_patch16_224",
        "sparsify": {"method": "evit", "keep_rate": 0.4, "reduce_at": [1], "recover": "attention"},
        **SMALL,
    },
    "pyramid": {**EVIT, "pyramid": True, "out_indices": (1, 2)},
    "frozen": {**EVIT, "frozen": True, "final_norm": True, "centre_padding": True},
    "buffers of no file": {"model_name": "tome_vit_small_patch16_dinov3", "r": 2, **SMALL},
    "swin": {
        "model_name": "swin_tiny_patch4_window7_224",
        **{"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "out_norm": True},
    },
    "architecture": {"model_name": ARCHITECTURE, **SETTINGS},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def backbone(**options: Any) -> EffViTBackbone:
    model = AutoBackbone.from_config(EffViTConfig(options=options)).eval()
    assert isinstance(model, EffViTBackbone)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_maps_and_channels_are_those_of_the_framework_free_backbone(case: str) -> None:
    model = backbone(**CASES[case])
    plain = DenseBackbone(**CASES[case]).eval()
    plain.load_state_dict(model.backbone.state_dict())
    maps = model(images()).feature_maps
    assert model.channels == [features.shape[1] for features in maps]
    assert all(torch.equal(own, expected) for own, expected in zip(maps, plain(images()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_gives_the_same_model_back(case: str, tmp_path: Path) -> None:
    model = backbone(**CASES[case])
    model.save_pretrained(tmp_path)
    again = EffViTBackbone.from_pretrained(tmp_path).eval()
    options = json.loads(json.dumps(model.backbone.options()))
    assert json.loads(json.dumps(again.backbone.options())) == AutoConfig.from_pretrained(tmp_path).options == options
    for own, expected in zip(again(images()).feature_maps, model(images()).feature_maps, strict=True):
        assert torch.equal(own, expected)


def test_settings_changed_after_the_model_was_made_are_saved(tmp_path: Path) -> None:
    model = backbone(**EVIT)
    model.backbone.model.set_keep_rate(0.3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["options"]["keep_rate"] == 0.3
    again = EffViTBackbone.from_pretrained(tmp_path)
    assert again.backbone.model.settings == model.backbone.model.settings


def test_calibrated_thresholds_are_saved(tmp_path: Path) -> None:
    model = backbone(model_name="dymu_deit_tiny_patch16_224", r_total=6, **SMALL)
    effvit.calibrate(model.backbone.model, [images()])
    model.save_pretrained(tmp_path)
    again = EffViTBackbone.from_pretrained(tmp_path).eval()
    for own, expected in zip(again(images()).feature_maps, model(images()).feature_maps, strict=True):
        assert torch.equal(own, expected)


def test_a_head_of_transformers_trains_on_it_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    """UPerNet builds its neck by ``channels``, and reads its backbone's config from its own."""
    config = UperNetConfig(
        backbone_config=EffViTConfig(options={**EVIT, "pyramid": True}),
        **{"hidden_size": 16, "pool_scales": [1, 2], "num_labels": 5, "use_auxiliary_head": False},
    )
    model = UperNetForSemanticSegmentation(config)
    labels = torch.randint(0, 5, (2, 64, 64))
    loss = model(images(), labels=labels).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("backbone."))
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert again.backbone.backbone.model.settings["keep_rate"] == 0.5
    assert torch.equal(again(images()).logits, model(images()).logits)


def test_example_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    exec(example("dense.md", "UperNet"), names)
    with torch.no_grad():
        assert names["model"].eval()(torch.zeros(1, 3, 512, 512)).logits.shape == (1, 150, 512, 512)


def test_pretrained_weights_are_loaded_once(tmp_path: Path) -> None:
    dense = timm.create_model("deit_tiny_patch16_224", **SMALL)
    file = tmp_path / "dense.safetensors"
    save_file(dense.state_dict(), file)
    model = backbone(**EVIT, pretrained=str(file))
    assert torch.equal(model.backbone.model.pos_embed, dense.pos_embed)
    model.save_pretrained(tmp_path / "saved")
    file.unlink()
    again = EffViTBackbone.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.backbone.model.pos_embed, dense.pos_embed)


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    backbone(**EVIT).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.features.model.blocks.1.attn.qkv.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks weight of a Linear of the backbone; load one of"):
        EffViTBackbone.from_pretrained(tmp_path)
