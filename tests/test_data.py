"""Opening folders: what is read is what lies there, and wrong layouts are named when a set is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.datasets import SegmentationFolder, load_pictures, open_dataset
from PIL import Image


def picture(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(path)


@pytest.mark.parametrize(("name", "splits"), [("imagenet", ("train", "val")), ("cifar10", ("train", "test"))])
def test_classes_are_numbered_in_the_order_of_their_folders(
    tmp_path: Path, name: str, splits: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFVIT_DATA", str(tmp_path))
    folder = tmp_path / name
    for split in splits:
        for number, label in enumerate(("n01", "n02", "n03")):
            picture(folder / split / label / "x.png", number)
    for split in splits:
        dataset = open_dataset(name, folder if name == "imagenet" else None, split)
        assert [(image.getpixel((0, 0))[0], label) for image, label in dataset] == [(0, 0), (1, 1), (2, 2)]


def test_pictures_that_are_not_fetched_are_named_with_the_remedy(tmp_path: Path) -> None:
    for name in ("cifar10", "fashion_mnist"):
        with pytest.raises(FileNotFoundError, match=rf"fetch it: python tools/get_data\.py {name}"):
            load_pictures(name, root=tmp_path)


def test_pictures_outside_class_folders_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match=r"must hold one folder a class, but 1 pictures lie in it \(ILSVRC2012_val"):
        open_dataset("imagenet", tmp_path, "val")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'none'}"):
        open_dataset("imagenet", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'train'}"):
        open_dataset("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*images/training"):
        open_dataset("ade20k", tmp_path)


def test_names_and_splits_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'voc'; there are cifar10, fashion_mnist, imagenet, coco"):
        open_dataset("voc", tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'coco'; there are cifar10, fashion_mnist, imagenet"):
        load_pictures("coco", root=tmp_path)
    with pytest.raises(ValueError, match="imagenet has the splits train and val, got 'test'"):
        open_dataset("imagenet", tmp_path, "test")
    with pytest.raises(ValueError, match="ade20k is not fetched: give the folder that holds it as root"):
        open_dataset("ade20k")


class TestSegmentation:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for number in range(3):
            picture(tmp_path / "images" / "validation" / f"ADE_{number}.jpg", 100)
            labels = tmp_path / "annotations" / "validation" / f"ADE_{number}.png"
            labels.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 8), number, np.uint8)).save(labels)
        return tmp_path

    def test_pictures_come_with_their_label_maps(self, root: Path) -> None:
        dataset = open_dataset("ade20k", root, "val")
        assert len(dataset) == 3
        for number in range(3):
            image, labels = dataset[number]
            assert (image.mode, image.size) == ("RGB", (8, 6))
            assert (np.asarray(labels) == number).all()

    def test_transforms_see_both(self, root: Path) -> None:
        folders = root / "images" / "validation", root / "annotations" / "validation"
        dataset = SegmentationFolder(*folders, transforms=lambda image, labels: (image.size, np.asarray(labels)[0, 0]))
        assert dataset[2] == ((8, 6), 2)
        dataset = SegmentationFolder(*folders, transform=np.asarray, target_transform=lambda labels: labels.size)
        assert dataset[1][0].shape == (6, 8, 3)
        assert dataset[1][1] == (8, 6)

    def test_picture_without_a_label_map_is_refused(self, root: Path) -> None:
        (root / "annotations" / "validation" / "ADE_1.png").unlink()
        with pytest.raises(ValueError, match=r"1 pictures of .* have no label map, the first would be .*ADE_1\.png"):
            open_dataset("ade20k", root, "val")

    def test_empty_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        with pytest.raises(FileNotFoundError, match=r"holds no \.jpg pictures"):
            SegmentationFolder(tmp_path / "images", tmp_path)


def annotations(**changes: Any) -> dict[str, Any]:
    box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0, "segmentation": []}
    return {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 8, "height": 6}],
        "categories": [{"id": 3, "name": "x"}],
        "annotations": [box],
    } | changes


BOX = annotations()["annotations"][0]


class TestCoco:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        picture(tmp_path / "train2017" / "7.jpg")
        self.write(tmp_path, json.dumps(annotations()))
        return tmp_path

    def write(self, root: Path, text: str) -> Path:
        path = root / "annotations" / "instances_train2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def test_pictures_come_with_their_boxes(self, root: Path) -> None:
        pytest.importorskip("pycocotools")
        [(image, objects)] = open_dataset("coco", root)
        assert image.size == (8, 6)
        assert objects == [BOX]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (json.dumps(annotations())[:-5], "Expecting"),
            (json.dumps(annotations(annotations=[BOX | {"category_id": 1}])), "annotation 1 has category_id 1"),
            (json.dumps(annotations(annotations=[{"id": 1}])), "annotation 1 has no image_id"),
            (json.dumps(annotations(categories=None)), "it has no list of categories"),
            ("[]", "it must hold an object, got a list"),
        ],
    )
    def test_broken_annotations_are_refused_when_opened(self, root: Path, text: str, message: str) -> None:
        pytest.importorskip("pycocotools")
        self.write(root, text)
        with pytest.raises(
            ValueError, match=rf"instances_train2017\.json is no intact COCO annotation file: {message}"
        ):
            open_dataset("coco", root)

    def test_annotations_are_repaired_and_images_turned_as_they_are(self, root: Path) -> None:
        pytest.importorskip("pycocotools")
        no_area = BOX | {"id": 2, "bbox": [1, 2, 3, 0]}
        self.write(root, json.dumps(annotations(annotations=[BOX, no_area])))
        exif = Image.Exif()
        exif[0x0112] = 6  # upright 8 high and 6 wide, but the annotations are made for 6 x 8
        Image.new("RGB", (8, 6)).save(root / "train2017" / "7.jpg", exif=exif)
        [(image, objects)] = open_dataset("coco", root)
        assert image.size == (8, 6)
        assert objects == [BOX]

    def test_missing_pictures_and_annotations_are_named(self, root: Path) -> None:
        pytest.importorskip("pycocotools")
        (root / "train2017" / "7.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 annotated images are not in .*train2017, the first is 7\.jpg"):
            open_dataset("coco", root)
        (root / "annotations" / "instances_train2017.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no annotation file .*instances_train2017\.json"):
            open_dataset("coco", root)

    def test_missing_pycocotools_is_named_with_the_extra(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data.datasets.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pycocotools, which comes with the extra effvit\[mm\]"):
            open_dataset("coco", root)
