"""The contract of architectures for those of this package; a case added to ``architectures.py`` inherits all."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from architectures import CASES, SIZES, SMALL
from safetensors.torch import save_file
from timm.models import save_for_hf

import effvit
import effvit.testing
from effvit.architectures.variants import VARIANTS
from effvit.testing import SmallModel

# A host of timm, as somebody's own architecture: what it must hold is not only what this package's models do.
OUTSIDE = {"vit": SmallModel("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 48, "img_size": 64}, (64, 64), (48, 80))}


def test_every_class_has_a_small_case() -> None:
    assert {VARIANTS[name].model for name, _ in SMALL.values()} == {variant.model for variant in VARIANTS.values()}
    assert set(SIZES) == set(SMALL)


@effvit.testing.parametrize_models(OUTSIDE)
class TestModelOfTimm(effvit.testing.ArchitectureContract):
    pass


@effvit.testing.parametrize_models(CASES)
class TestEveryArchitecture(effvit.testing.ArchitectureContract):
    """The contract, and what this package adds: files, and words for wrong images."""

    def test_settings_survive_the_round_trip_through_a_hub_folder(self, case: SmallModel, tmp_path: Path) -> None:
        model, x = case.make(), case.images()
        save_for_hf(model, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))

    def test_own_checkpoint_loads_back(self, case: SmallModel, tmp_path: Path) -> None:
        model, x = case.make(), case.images()
        save_file(model.state_dict(), tmp_path / "own.safetensors")

        other = timm.create_model(case.name, **({"num_classes": 7} | case.settings)).eval()
        assert effvit.load_checkpoint(other, tmp_path / "own.safetensors") == []
        assert torch.equal(other(x), model(x))

    def test_wrong_images_are_refused_in_words(self, case: SmallModel) -> None:
        model, (height, width) = case.make(), case.size
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got a tensor of shape"):
            model(torch.randn(3, height, width))
        with pytest.raises(ValueError, match="the batch holds no image"):
            model(torch.randn(0, 3, height, width))
        with pytest.raises(TypeError, match=r"expected images of dtype torch.float32, the model's, got torch.uint8"):
            model(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        with pytest.raises(ValueError, match="output_fmt must be"):
            model.forward_intermediates(case.images(), output_fmt="NHCW")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_name_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        features = timm.create_model(name, features_only=True)
    assert model.pretrained_cfg["architecture"] == name
    assert len(features.feature_info.channels()) >= 3
    assert name in effvit.list_models()
