"""Reading image files: values by the documented rule in closed form, and files that are refused with their name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from effvit.cli import main
from effvit.data.preparation import load_images
from effvit.images import as_rgb, open_image
from effvit.show.visualize import draw_tokens

RAMP = np.array([[0, 1, 2], [50, 128, 255]], np.uint8)  # (2, 3), so that a turn shows


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def grey(image: Image.Image) -> np.ndarray:
    """The values of an image whose channels are equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path, name: str) -> None:
    """65535 / 257 = 255, so 257 v becomes v."""
    path = save(tmp_path / name, RAMP.astype(np.uint16) * 257)
    assert np.array_equal(grey(open_image(path)), RAMP)


def test_dark_image_of_sixteen_bits_stays_dark(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.full((2, 3), 2570, np.uint16))
    assert (grey(open_image(path)) == 10).all()


@pytest.mark.parametrize(
    ("floats", "values"),
    [
        ([[0.0, 0.2, 1.0]], [[0, 51, 255]]),  # 255 times
        ([[0.25, 0.5, 0.5]], [[64, 128, 128]]),  # 63.75 and 127.5, to even
        ([[0.0, 51.4, 255.0]], [[0, 51, 255]]),  # as they are
        ([[-1.0, 0.0, 1.0]], [[0, 128, 255]]),  # stretched
        ([[1000.0, 1200.0, 2000.0]], [[0, 51, 255]]),
    ],
)
def test_floats_are_scaled_by_their_range(tmp_path: Path, floats: list[list[float]], values: list[list[int]]) -> None:
    path = save(tmp_path / "a.tiff", np.array(floats, np.float32))
    assert grey(open_image(path)).tolist() == values


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0.5, np.nan]], np.float32), "its float pixels contain NaN or infinity"),
        (np.array([[0.5, np.inf]], np.float32), "its float pixels contain NaN or infinity"),
        (np.array([[300, 300]], np.float32), "its float pixels are all 300, outside 0 to 255"),
        (np.array([[1, 70000]], np.int32), "its pixels are integers of 32 bits, which have no usual range"),
    ],
)
def test_pixels_without_a_range_are_refused(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    path = save(tmp_path / "a.tiff", pixels)
    with pytest.raises(ValueError, match=rf"a\.tiff cannot be read as an image: {message}"):
        open_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(tmp_path: Path, orientation: int) -> None:
    """Exif 2.32, tag 274: where row 0 and column 0 of the stored pixels are in the upright image."""
    upright = {
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.T,
        6: np.rot90(RAMP, -1),  # a quarter turn clockwise
        7: RAMP[::-1, ::-1].T,
        8: np.rot90(RAMP),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", RAMP, exif=exif)
    assert np.array_equal(grey(open_image(path)), upright)
    with Image.open(path) as image:
        assert np.array_equal(grey(as_rgb(image)), upright)


def test_exif_turn_is_that_of_the_annotations(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", RAMP, exif=exif)
    assert np.array_equal(grey(open_image(path, (3, 2))), np.rot90(RAMP, -1))
    assert np.array_equal(grey(open_image(path, (2, 3))), RAMP)
    with pytest.raises(ValueError, match=r"a\.png is 2 x 3 pixels, but its annotations are made for 4 x 3; correct"):
        open_image(path, (4, 3))


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    """Composited: opacity * colour + (1 - opacity) * 255."""
    colours = np.array([[[200, 10, 30, 0], [200, 10, 30, 51], [200, 10, 30, 255]]], np.uint8)
    expected = [[[255, 255, 255], [244, 206, 210], [200, 10, 30]]]  # opacities 0, 0.2 and 1
    assert np.asarray(open_image(save(tmp_path / "a.png", colours))).tolist() == expected
    grey_alpha = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")
    assert grey(open_image(save(tmp_path / "la.png", grey_alpha))).tolist() == [[255, 0]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 40, 50, 60])
    path = save(tmp_path / "p.png", palette, transparency=0)
    assert np.asarray(open_image(path)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_other_modes_are_converted(tmp_path: Path) -> None:
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert grey(open_image(save(tmp_path / "bits.png", bits))).tolist() == [[0, 255]]
    ink = Image.new("CMYK", (2, 2), (0, 255, 255, 0))  # magenta and yellow
    assert open_image(save(tmp_path / "ink.tiff", ink)).getpixel((0, 0)) == (255, 0, 0)
    frames = [Image.new("L", (2, 2), value) for value in (70, 90)]
    path = save(tmp_path / "frames.tiff", frames[0], save_all=True, append_images=frames[1:])
    assert (grey(open_image(path)) == 70).all()


class TestRefusals:
    def test_what_is_no_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
        os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
        for name, message in {
            "none.png": r"there is no file .*none\.png",
            "empty.png": r"empty\.png is empty; write or fetch it again",
            "text.png": r"text\.png is no image of a format that Pillow reads",
            "loop.png": r"loop\.png cannot be opened: Too many levels of symbolic links",
            "pipe.png": r"pipe\.png is a pipe, socket or device, not a file",
            ".": "is a folder; name the images in it",
            "a\0b.png": "cannot be opened: embedded null",
        }.items():
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                open_image(f"{tmp_path}/{name}")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "gif", "bmp", "webp"])
    def test_image_that_is_cut_off_is_named(self, tmp_path: Path, suffix: str) -> None:
        rng = np.random.default_rng(0)
        path = save(tmp_path / f"cut.{suffix}", rng.integers(0, 255, (64, 64), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        message = "cannot be read as an image: .*; write or fetch it again|is no image of a format"
        with pytest.raises(ValueError, match=rf"cut\.{suffix} ({message})"):
            open_image(path)

    def test_image_of_too_many_pixels_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        big = save(tmp_path / "big.png", Image.new("L", (7, 6)))
        with pytest.raises(ValueError, match=r"big\.png has more pixels than the 40 that are decoded; make it smaller"):
            open_image(big)
        assert open_image(save(tmp_path / "fair.png", Image.new("L", (6, 5)))).size == (6, 5)  # Pillow alone warns

    def test_all_bad_files_are_named_before_anything_runs(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty.png").touch()
        save(tmp_path / "fine.png", RAMP)
        names = [str(tmp_path / name) for name in ("empty.png", "fine.png", "none.png")]
        assert main(["visualize", *names, "--model", "no_such_model", "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert message.startswith(
            "effvit: error: 2 of 3 images cannot be read; mend them, take them out, or leave them"
        )
        assert "empty.png is empty; write or fetch it again; there is no file " in message
        assert message.count("\n") == 1


class TestModels:
    @pytest.mark.parametrize(("name", "channels"), [("vit_nano_patch4_28", 1), ("deit_tiny_patch16_224", 3)])
    def test_models_see_the_same_of_eight_and_sixteen_bits(self, name: str, channels: int) -> None:
        """Models for colour images take grey ones and the other way round."""
        model = timm.create_model(name, img_size=28, patch_size=4, depth=1)
        pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
        eight, sixteen = Image.fromarray(pixels), Image.fromarray(pixels.astype(np.uint16) * 257)
        colour = eight.convert("RGB")
        seen = load_images(model, [eight, sixteen, colour])
        assert seen.shape == (3, channels, 28, 28)
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])

    def test_drawing_reads_pixels_by_the_same_rule(self) -> None:
        drawn = draw_tokens(Image.fromarray(RAMP.astype(np.uint16) * 257), torch.arange(6).reshape(2, 3))
        assert np.array_equal(grey(drawn), RAMP)
