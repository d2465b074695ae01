"""COCO annotations: run lengths in closed form and against pycocotools, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from effvit.coco import check_coco, colour, decode_rle, draw_objects, encode_rle, read_coco


def annotations(**changes: Any) -> dict[str, Any]:
    box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0, "segmentation": []}
    return {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 8, "height": 6}],
        "categories": [{"id": 3, "name": "x"}],
        "annotations": [box],
    } | changes


BOX = annotations()["annotations"][0]
BROKEN = [
    ([], "it must hold an object, got a list"),
    ({"images": []}, "it has no list of categories"),
    (annotations(annotations=None), "it has no list of annotations"),
    (annotations(annotations=[BOX, BOX]), "ids of annotations must be unique, but 1 stand twice"),
    (annotations(annotations=[BOX | {"image_id": 8}]), "annotation 1 has image_id 8, which is not among the images"),
    (annotations(annotations=[BOX | {"category_id": 1}]), "annotation 1 has category_id 1, .* among the categories"),
    (annotations(annotations=[BOX | {"bbox": [1, 2, 0, 4]}]), r"annotation 1 must have a box .* got \[1, 2, 0, 4\]"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_contents_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (path := tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"x\.json is no intact COCO annotation file: {message}"):
        read_coco(path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "x.json").write_text(json.dumps(annotations())[:-5])
    with pytest.raises(ValueError, match=r"x\.json is no intact COCO annotation file: Expecting"):
        read_coco(path)


def test_missing_field_is_named(tmp_path: Path) -> None:
    content = annotations(annotations=[{"id": 1}])
    (path := tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="an entry lacks 'image_id'"):
        read_coco(path)
    with pytest.raises(KeyError, match="image_id"):
        check_coco(content)


def test_intact_file_is_read(tmp_path: Path) -> None:
    (path := tmp_path / "x.json").write_text(json.dumps(annotations()))
    assert read_coco(path) == annotations()


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[0, 0], [0, 0]], [4]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[0, 1], [0, 0]], [2, 1, 1]),  # column by column
        ([[1, 0], [0, 1]], [0, 1, 2, 1]),
    ],
)
def test_run_lengths_start_with_zeros_and_go_down_the_columns(mask: list[list[int]], counts: list[int]) -> None:
    array = np.array(mask, bool)
    assert encode_rle(array) == {"size": [2, 2], "counts": counts}
    assert np.array_equal(decode_rle(encode_rle(array)), array)


def test_run_lengths_are_those_of_pycocotools() -> None:
    coder = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 3), (20, 31)):
        mask = rng.random(shape) < 0.4
        rle = encode_rle(mask)
        assert np.array_equal(coder.decode(coder.frPyObjects(rle, *shape)), mask)
        assert np.array_equal(decode_rle(rle), mask)


def test_run_lengths_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="run lengths of a 2 x 3 mask must sum to 6, got 5"):
        decode_rle({"size": [2, 3], "counts": [1, 4]})


def test_drawn_box_lies_on_the_edge_of_the_object() -> None:
    mask = np.zeros((40, 60), bool)
    mask[20:30, 10:30] = True
    entry = {"bbox": [10, 20, 20, 10], "category_id": 1, "segmentation": encode_rle(mask)}
    drawn = np.asarray(draw_objects(Image.new("RGB", (60, 40)), [entry], [""]))
    assert np.array_equal(drawn.any(-1), mask)
    assert (drawn[20, 10:30] == colour(1)).all()
