"""TinyViT: weights under the names of official files, and of the file of MobileSAM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import effvit
from effvit.models._checkpoint import convert_checkpoint
from effvit.sources import default_root

SMALL = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
MOBILE_SAM = default_root() / "mobile_sam" / "mobile_sam.pt"
needs_mobile_sam = pytest.mark.skipif(
    not MOBILE_SAM.is_file(), reason="tools/get_data.py mobile_sam has not been run, or EFFVIT_DATA is another folder"
)
# Entry of the released files (microsoft/Cream, ChaoningZhang/MobileSAM) -> timm's name.
NAMES = {
    "patch_embed.seq.0.c.weight": "patch_embed.conv1.conv.weight",
    "patch_embed.seq.2.bn.running_var": "patch_embed.conv2.bn.running_var",
    "layers.0.blocks.0.conv3.c.weight": "stages.0.blocks.0.conv3.conv.weight",
    "layers.0.downsample.conv1.c.weight": "stages.1.downsample.conv1.conv.weight",
    "layers.1.downsample.conv2.bn.bias": "stages.2.downsample.conv2.bn.bias",
    "layers.2.blocks.1.attn.attention_biases": "stages.2.blocks.1.attn.attention_biases",
    "layers.3.blocks.0.local_conv.c.weight": "stages.3.blocks.0.local_conv.conv.weight",
    "layers.3.blocks.0.mlp.norm.weight": "stages.3.blocks.0.mlp.norm.weight",
    "norm_head.bias": "head.norm.bias",
}


def small(**settings: object) -> nn.Module:
    """A narrow TinyViT with weights, biases and statistics that all matter."""
    model = timm.create_model("tiny_vit_5m_224", **({"num_classes": 0} | SMALL | settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the released files."""
    names = {}
    for name in state:
        old = re.sub(r"\.conv\.weight$", ".c.weight", name)
        old = re.sub(r"^patch_embed\.conv(\d)", lambda m: f"patch_embed.seq.{2 * int(m[1]) - 2}", old)
        old = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", old)
        old = old.replace("stages.", "layers.").replace("head.norm.", "norm_head.").replace("head.fc.", "head.")
        names[old] = name
    assert NAMES.items() <= names.items()
    return {old: state[name] for old, name in names.items()}


class TestWeights:
    def test_official_file_loads_with_its_classifier(self, tmp_path: Path) -> None:
        model, other = small(num_classes=3), small(num_classes=3)
        torch.nn.init.zeros_(other.head.fc.weight)
        file = released(model.state_dict()) | {"layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(49, 49)}
        torch.save({"model": file}, tmp_path / "official.pth")
        assert effvit.load_checkpoint(other, tmp_path / "official.pth") == [
            "layers.1.blocks.0.attn.attention_bias_idxs"
        ]
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(other(x), model(x))

    def test_encoder_of_mobile_sam_loads_without_its_stale_classifier(self, tmp_path: Path) -> None:
        model = small()
        file = {f"image_encoder.{name}": value for name, value in released(model.state_dict()).items()}
        rest = ("image_encoder.head.weight", "image_encoder.neck.0.weight", "prompt_encoder.x", "mask_decoder.x")
        torch.save(file | dict.fromkeys(rest, torch.zeros(3)), tmp_path / "sam.pt")
        conversion = convert_checkpoint(small(), tmp_path / "sam.pt")
        assert conversion.dropped == ["head.weight", "neck.0.weight", "prompt_encoder.x", "mask_decoder.x"]
        assert conversion.state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, conversion.state[name]) for name, value in model.state_dict().items())
        with pytest.raises(ValueError, match=r"head\.fc\.weight is missing.*num_classes"):
            convert_checkpoint(small(num_classes=3), tmp_path / "sam.pt")

    def test_biases_are_resampled_for_other_windows(self, tmp_path: Path) -> None:
        torch.save(released(small().state_dict()), tmp_path / "sam.pt")
        wide = small(window_sizes=(7, 7, 8, 7))
        effvit.load_checkpoint(wide, tmp_path / "sam.pt")
        assert wide.stages[2].blocks[0].attn.attention_biases.shape == (3, 64)

    def test_file_of_another_size_is_refused(self, tmp_path: Path) -> None:
        torch.save(released(small(num_heads=(1, 2, 6, 4)).state_dict()), tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"attention_biases has shape \(6, 196\), the model's \(3, 196\)"):
            effvit.load_checkpoint(small(), tmp_path / "other.pt")

    @needs_mobile_sam
    def test_real_file_fits_timms_model(self) -> None:
        model = timm.create_model("tiny_vit_5m_224", num_classes=0)
        conversion = convert_checkpoint(model, MOBILE_SAM)
        assert len(conversion.state) == 294
        assert conversion.dropped[:2] == ["head.weight", "head.bias"]
        assert {name.split(".")[0] for name in conversion.dropped[2:]} == {"neck", "prompt_encoder", "mask_decoder"}
