"""Pictures that need no network: what the package has, what others bring, and how the command line names them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from data.cutouts import CLASSES, Split, make_bank, make_scenery
from data.scenes import draw_scenes
from PIL import Image
from scripts import load_tool

from effvit.cli.demo import SEEN, Seen
from effvit.data.preparation import load_images
from effvit.measure.accuracy import top1
from effvit.show import pictures


class TestFashion:
    def test_six_pictures_of_each_class_come_with_the_package(self) -> None:
        found = pictures.fashion_pictures()
        assert len(pictures.fashion_classes()) == 10
        assert Counter(picture.label for picture in found.values()) == dict.fromkeys(range(10), 6)
        assert {(picture.image.mode, picture.image.size) for picture in found.values()} == {("L", (28, 28))}
        assert len({picture.image.tobytes() for picture in found.values()}) == 60
        assert {"t-shirt-0", "ankle-boot-5"} <= set(found)
        assert pictures.fashion_classes()[found["ankle-boot-5"].label] == "Ankle boot"

    def test_their_licence_lies_beside_them(self) -> None:
        assert "Copyright (c) 2017 Zalando SE" in pictures.SHEET.with_suffix(".LICENSE").read_text()
        assert pictures.SHEET.stat().st_size < 30_000


@pytest.mark.parametrize("seen", SEEN, ids=[seen.key for seen in SEEN])
class TestSeen:
    def test_the_weights_of_the_package_see_what_they_are(self, seen: Seen) -> None:
        """Of images that were not trained on, five times as many as by chance, at least."""
        model = timm.create_model(seen.model, pretrained=True).eval()
        found = seen.images().values()
        images, labels = load_images(model, [p.image for p in found]), torch.tensor([p.label for p in found])
        assert top1({"dense": model}, [(images, labels)])["dense"] > 500 / len(seen.classes())

    def test_what_is_drawn_is_there_and_classes_are_the_model_s(self, seen: Seen) -> None:
        assert set(seen.shown) <= set(seen.images())
        assert len(seen.classes()) == timm.create_model(seen.model).num_classes


class TestCutouts:
    def test_classes_are_those_that_the_weights_were_trained_for(self) -> None:
        labels = timm.get_pretrained_cfg("vit_nano_patch8_96").label_names
        assert labels == CLASSES
        assert pictures.cutout_classes() == [*CLASSES]

    def test_an_image_of_each_class_comes_with_the_package(self) -> None:
        found = pictures.cutout_pictures()
        assert [*found] == [*CLASSES]
        assert [entry.label for entry in found.values()] == [*range(len(CLASSES))]
        assert {(entry.image.mode, entry.image.size) for entry in found.values()} == {("RGB", (96, 96))}

    def test_their_licences_lie_beside_them(self) -> None:
        text = pictures.CUTOUTS.with_suffix(".LICENSE").read_text()
        for owner in ("Google", "Twitter", "EmojiOne", "Microsoft", "Zalando", "Aitzol Berasategi", "Freespace"):
            assert owner in text
        assert pictures.CUTOUTS.stat().st_size < 500_000


class TestPhotographs:
    def test_they_are_real_and_need_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("socket.socket", None)
        photos = pictures.photographs()
        assert set(photos) == {"astronaut", "chelsea", "coffee", "rocket", "china", "flower"}
        assert all(photo.mode == "RGB" and min(photo.size) >= 300 for photo in photos.values())

    def test_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pictures, "PHOTOGRAPHS", {"no_such_package": ("a.png",)})
        with pytest.raises(FileNotFoundError, match=r"no_such_package, which is not installed; install effvit\[demo\]"):
            pictures.photographs()


class TestSheet:
    @pytest.fixture
    def made_up(self) -> Any:
        """Twenty pictures of 4 x 3 whose grey is their number, of two classes in turn."""

        class Pictures(list[tuple[Image.Image, int]]):
            classes = ("Even", "Odd/one")
            targets = torch.arange(20) % 2

        return Pictures((Image.new("L", (4, 3), number), number % 2) for number in range(20))

    def test_rows_are_evenly_spread_over_each_class(self, made_up: Any) -> None:
        sheet = load_tool("make_picture_sheet").make_sheet(made_up, 3)
        assert sheet.indices == [[0, 1], [6, 7], [12, 13]]  # of ten the numbers 0, 3 and 6
        assert sheet.image.size == (8, 9)
        assert [sheet.image.getpixel((x, y)) for y in (0, 4, 8) for x in (3, 4)] == [0, 1, 6, 7, 12, 13]

    def test_class_with_too_few_is_named(self, made_up: Any) -> None:
        with pytest.raises(ValueError, match="needs 11 pictures of each class, but the set has 10 of 'Even'"):
            load_tool("make_picture_sheet").make_sheet(made_up, 11)

    def test_command_writes_the_sheet_and_its_facts(
        self, made_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tool = load_tool("make_picture_sheet")
        monkeypatch.setattr(tool, "load_pictures", lambda *_: made_up)
        assert tool.main(["fashion_mnist", "--out", str(tmp_path / "sheet.png")]) == 0
        facts = json.loads((tmp_path / "sheet.json").read_text())
        assert (facts["classes"], len(facts["indices"])) == (["Even", "Odd/one"], 6)
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.getpixel((4, 3)) == facts["indices"][1][1]

    def test_missing_pictures_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert load_tool("make_picture_sheet").main(["fashion_mnist", "--root", str(tmp_path)]) == 2
        assert "fetch it: python tools/get_data.py fashion_mnist" in capsys.readouterr().err
        assert load_tool("make_picture_sheet").main(["cutouts", "--root", str(tmp_path)]) == 2
        assert "python tools/get_data.py emoji fashion_mnist photographs" in capsys.readouterr().err

    def test_objects_lie_on_photographs_that_may_be_passed_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Photographs of one colour each: blue, which may be, and red, which may not."""
        tool = load_tool("make_picture_sheet")
        photographs = {name: Image.new("RGB", (700, 700), name) for name in ("blue", "red")}
        classes = [[(f"square-{n}", Image.new("RGBA", (9, 9), (0, 200 + n, 0, 255)))] for n in range(len(CLASSES))]
        other = make_bank([[("other", Image.new("RGBA", (9, 9), (0, 255, 0, 200)))]])
        split = Split(make_bank(classes), other, make_scenery(photographs))
        monkeypatch.setattr(tool, "CC_BY", ("blue",))
        monkeypatch.setattr(tool, "open_split", lambda *_: split)
        assert tool.main(["cutouts", "--out", str(tmp_path / "sheet.png")]) == 0
        facts = json.loads((tmp_path / "sheet.json").read_text())
        indices = [index for row in facts["indices"] for index in row]
        assert draw_scenes(split, "test", indices).labels.tolist() == [*range(len(CLASSES))]
        with Image.open(tmp_path / "sheet.png") as sheet:
            red, _, blue = (np.asarray(band, int) for band in sheet.split())
        assert sheet.size == (5 * 96, 5 * 96)
        assert (blue >= red).all()
        monkeypatch.setattr(tool, "CC_BY", ())
        with pytest.raises(ValueError, match="an image of each class, but 2000 have none of t-shirt-top, trouser"):
            tool.make_cutouts_sheet(split)
