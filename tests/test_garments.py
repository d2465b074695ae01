"""Garments of Fashion-MNIST as cut-outs: outlines, the division of the set, and the tool that composes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data.composites import OPAQUE, Settings, make_composites
from data.datasets import load_pictures
from data.garments import GARMENTS, outline, read_garments
from PIL import Image
from scripts import load_tool

from effvit.dense.coco import decode_rle, read_coco


def write_idx(path: Path, values: np.ndarray) -> None:
    """An idx file of bytes, as the set is published."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST with two garments a class to train and one to test: rectangles, as wide as their class is high."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "fashion_mnist" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, number in (("train", 2), ("t10k", 1)):
        labels = np.repeat(np.arange(len(GARMENTS)), number)
        pictures = np.zeros((len(labels), 28, 28), np.uint8)
        for picture, label in zip(pictures, labels, strict=True):
            picture[4:24, 5 : 11 + label] = 100 if prefix == "train" else 200
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pictures)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
    return root


def test_outline_is_cropped_to_the_garment_and_closes_gaps_of_a_pixel() -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:20, 6:17] = 90
    pixels[10, 6:17] = 0  # a dark seam
    pixels[25:27, 0:2] = 10  # dirt on the black ground
    cut = np.array(outline(Image.fromarray(pixels)))
    assert cut.shape == (17, 11, 4)
    assert (cut[..., 3] == 255).all()
    assert (cut[7, :, :3] == 0).all()


def test_outline_leaves_what_is_between_the_legs() -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:25, 4:10] = pixels[3:25, 18:24] = pixels[3:8, 4:24] = 200
    cut = np.array(outline(Image.fromarray(pixels)))
    assert (cut[10:, 8:12, 3] < OPAQUE).all()
    assert (cut[:, :5, 3] == 255).all()


def test_division_is_that_of_the_set(root: Path) -> None:
    training, validation = read_garments(root)
    assert list(validation) == [*GARMENTS]
    assert list(training) == [*GARMENTS]
    assert [len(own) for own in training.values()] == [2] * len(GARMENTS)
    assert [len(own) for own in validation.values()] == [1] * len(GARMENTS)
    for part, grey in ((training, 100), (validation, 200)):
        for label, own in enumerate(part.values()):
            assert {sprite.image.size for sprite in own} == {(6 + label, 20)}
            assert {sprite.image.getpixel((0, 0)) for sprite in own} == {(grey, grey, grey, 255)}
    names = [sprite.name for part in (training, validation) for own in part.values() for sprite in own]
    assert len({*names}) == len(names)


def test_missing_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fetch it: python tools/get_data\.py fashion_mnist"):
        read_garments(tmp_path)


def test_tool_composes_them(
    root: Path, drawn_sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    numbers = ["--train", "4", "--val", "3", "--size", "64", "--scale", "0.3", "0.75", "--objects", "1", "2"]
    own = ["--garments", "--root", str(root), "--backgrounds", str(drawn_sources / "backgrounds")]
    assert load_tool("make_composites").main([*own, *numbers, "--out", str(out), "--classes", "bag", "coat"]) == 0
    assert "bag: " in capsys.readouterr().out
    assert (out / "classes.txt").read_text() == "bag\ncoat\n"
    record = json.loads((out / "composites.json").read_text())
    shown = {split: {*part["sprites"]["bag"], *part["sprites"]["coat"]} for split, part in record["splits"].items()}
    assert {name.split("/")[0] for name in shown["training"]} == {"train"}
    assert {name.split("/")[0] for name in shown["validation"]} == {"test"}
    for split, grey in (("training", 100), ("validation", 200)):
        content = read_coco(out / "annotations" / f"instances_{split}.json")
        for entry in content["annotations"]:
            with Image.open(out / "images" / split / f"{entry['image_id'] - 1:06d}.jpg") as picture:
                pixels = np.asarray(picture)[decode_rle(entry["segmentation"])]
            assert np.median(pixels) == pytest.approx(grey, rel=0.3)


def test_class_without_cut_outs_is_named(root: Path, drawn_sources: Path, tmp_path: Path) -> None:
    training, validation = read_garments(root)
    divided = training, {**validation, "bag": []}
    with pytest.raises(ValueError, match="there are no cut-outs for validation of the classes bag"):
        make_composites(
            divided,
            drawn_sources / "backgrounds",
            tmp_path / "set",
            train=1,
            val=1,
            settings=Settings(size=64),
            classes={"coat": (), "bag": ()},
        )
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--classes", "hat"], "unknown classes hat; there are t-shirt-top"), ([], "exists; name another folder")],
)
def test_tool_refuses_before_it_reads_the_set(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert load_tool("make_composites").main(["--garments", "--root", nowhere, "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_names_are_those_of_the_set(root: Path) -> None:
    classes = load_pictures("fashion_mnist", "test", root).classes
    assert [*GARMENTS] == [name.lower().replace("/", "-").replace(" ", "-") for name in classes]


def test_tool_takes_garments_or_own_cut_outs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_tool("make_composites").main(["--garments", "--sprites", str(tmp_path), "--out", str(tmp_path / "set")])
    assert "not allowed with argument" in capsys.readouterr().err
