"""COCO annotations: run lengths in closed form and against pycocotools, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.annotations import colour, draw_objects, encode_rle
from PIL import Image

from effvit.dense.coco import check_coco, decode_rle, read_coco, repair_coco, run_lengths


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
    (annotations(annotations=[BOX | {"bbox": [1, 2, -3, 4]}]), r"annotation 1 must have a box .* got \[1, 2, -3, 4\]"),
    (annotations(annotations=[BOX | {"bbox": [1, 2, 3, -4]}]), r"annotation 1 must have a box .* got \[1, 2, 3, -4\]"),
    (annotations(annotations=[BOX | {"bbox": [1, 2, 3]}]), r"annotation 1 must have a box .* got \[1, 2, 3\]"),
    (annotations(annotations=[BOX | {"bbox": [1, 2, float("nan"), 4]}]), r"annotation 1 must have a box .* got .*nan"),
    (annotations(annotations=[BOX | {"bbox": [1, 2, float("inf"), 4]}]), r"annotation 1 must have a box .* got .*inf"),
    (
        annotations(annotations=[BOX | {"bbox": [1, 2, 10**400, 4]}]),
        r"annotation 1 must have a box .* got \[1, 2, 1000",
    ),
    (
        annotations(annotations=[BOX | {"bbox": [1, 2, "3", 4]}]),
        r"annotation 1 must have a box .* got \[1, 2, '3', 4\]",
    ),
    (annotations(annotations=[{**BOX, "bbox": None}]), "annotation 1 must have a box .* got None"),
    (
        annotations(annotations=[BOX | {"image_id": "7"}]),
        r"annotation 1 has image_id '7', .* images \(a str, where theirs are int\)",
    ),
    (annotations(annotations=[BOX | {"image_id": [7]}]), r"annotation 1 has image_id \[7\], which is not among"),
    (
        annotations(annotations=[BOX | {"category_id": 0}, BOX | {"id": 2, "category_id": 0}]),
        r"annotation 1 \(the first of 2\) has category_id 0",
    ),
    (annotations(annotations=[BOX, {}]), "annotations must have ids, whole numbers or text, but number 1 has None"),
    (annotations(annotations=[BOX | {"id": 1.5}]), "annotations must have ids, .* but number 0 has 1.5"),
    (annotations(images=[7]), "images must be objects, but number 0 is a int"),
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
    with pytest.raises(ValueError, match="annotation 1 has no image_id"):
        read_coco(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is empty; write or fetch it again"),
        (b" \n", "it is empty"),
        ('{"images": "\xe4"}'.encode("latin-1"), "byte 12 is not UTF-8; convert it, e.g. by iconv"),
        (b"[" * 100_000, "it is nested too deep"),
    ],
    ids=["empty", "blank", "latin-1", "deep"],
)
def test_text_that_is_no_json_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (path := tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.json is no intact COCO annotation file: {message}"):
        read_coco(path)


def test_mark_of_the_byte_order_and_unicode_are_read(tmp_path: Path) -> None:
    content = annotations(categories=[{"id": 3, "name": "Größe 猫"}])
    (path := tmp_path / "x.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8-sig")
    assert read_coco(path) == content


SQUARE = [[1, 1, 3, 1, 3, 3, 1, 3]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "has no mask"),
        ([], "has an empty mask"),
        ([[1, 1, 4, 4]], "has no polygon of at least 3 points"),
        ([[1, 1, 4, 4, 5]], "has a polygon of 5 numbers, which are no pairs of x and y"),
        ([SQUARE[0], [1, 1, 3, 1, 3, 3, 1]], "has a polygon of 7 numbers"),
        ([[1, 1, 4, float("nan"), 5, 5]], "has a polygon with coordinates that are no finite numbers"),
        ([1, 1, 4, 4, 5, 5], "has a mask that is neither a list of polygons"),
        ({"size": [6, 8]}, "has run lengths without size and counts"),
        ({"size": [8, 6], "counts": [48]}, r"has run lengths of size \[8, 6\] on an image of \[6, 8\]"),
        ({"size": [6, 8], "counts": [40, 7]}, "has run lengths that do not add up to the 48 pixels of its image"),
        ({"size": [6, 8], "counts": [50, -2]}, "has run lengths that do not add up"),
        ({"size": [6, 8], "counts": "P"}, "has broken run lengths end in the middle of a number"),
        ({"size": [6, 8], "counts": "ä"}, "has broken run lengths have no character 'ä'"),
        ({"size": [6, 8], "counts": "5"}, "has run lengths that do not add up"),
    ],
)
def test_masks_without_a_reading_are_named(mask: Any, message: str) -> None:
    content = annotations(annotations=[BOX | {"segmentation": mask}])
    check_coco(content)  # boxes need none
    with pytest.raises(ValueError, match=rf"annotation 1 ({message})"):
        check_coco(content, masks=True)


def test_the_zero_boxes_of_coco_are_left_out() -> None:
    """Annotations 918 and 2206849 of instances_train2017.json (cocodataset/cocoapi#355)."""
    entries = [
        {"id": 918, "image_id": 200365, "bbox": [296.65, 388.33, 1.03, 0.0], "category_id": 58, "area": 0.0},
        {"id": 2206849, "image_id": 550395, "bbox": [9.98, 188.56, 5.54, 0.0], "category_id": 1, "area": 0.0},
    ]
    content = {
        "images": [{"id": 200365}, {"id": 550395}],
        "categories": [{"id": 1}, {"id": 58}],
        "annotations": [entry | {"iscrowd": 0, "segmentation": []} for entry in entries],
    }
    check_coco(content, masks=True)
    repaired, done = repair_coco(content)
    assert repaired["annotations"] == []
    assert (done.annotations, done.no_area, done.bare) == (2, 2, 2)
    assert str(done) == ("annotations: 2; images: 2; boxes without area, left out: 2; images without annotations: 2")


def test_intact_content_is_not_repaired() -> None:
    content = annotations(annotations=[BOX, BOX | {"id": 2, "iscrowd": 1}])
    repaired, done = repair_coco(content)
    assert repaired == content
    assert not done.changes
    assert done.crowds == 1


def test_repairs_are_counted_and_leave_the_content_alone() -> None:
    """Areas: 2 x 2 by the shoelace formula, two pixels of run lengths, and the box where there is no mask."""
    bare = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}
    runs = {"size": [6, 8], "counts": [3, 2, 43]}
    content = annotations(
        annotations=[
            bare | {"id": 0, "segmentation": [*SQUARE, [1, 1, 2, 2]], "area": -1},
            bare | {"id": 5, "iscrowd": 1, "segmentation": runs},
            bare | {"id": 6, "iscrowd": 0, "area": None},
            BOX | {"id": 8, "bbox": [8, 0, 2, 2]},
            BOX | {"id": 9, "bbox": [0, -3, 2, 3]},
            BOX | {"id": 10, "bbox": [1, 1, 0.5, 4]},
        ]
    )
    before = json.dumps(content)
    repaired, done = repair_coco(content)
    assert json.dumps(content) == before
    entries = repaired["annotations"]
    assert [entry["id"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["area"] for entry in entries] == [4, 2, 12, 12]
    assert [entry["iscrowd"] for entry in entries] == [0, 1, 0, 0]
    assert entries[0]["segmentation"] == SQUARE
    assert (done.outside, done.thin, done.polygons, done.area, done.iscrowd, done.crowds, done.ids) == (
        2,
        1,
        1,
        3,
        1,
        1,
        4,
    )
    check_coco(repaired)


def test_repaired_ids_are_found_by_the_evaluation() -> None:
    """pycocotools writes down the id of the object that was found: 0 means none, and a right answer counts as wrong."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    content = annotations(annotations=[BOX | {"id": 0}])
    recalls = []
    for value in (content, repair_coco(content)[0]):
        truth = pycocotools.COCO()
        truth.dataset = value
        truth.createIndex()
        found = truth.loadRes([{"image_id": 7, "category_id": 3, "bbox": BOX["bbox"], "score": 1.0}])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        recalls.append(float(evaluation.eval["recall"][0, 0, 0, -1]))
    assert recalls == [0.0, 1.0]


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
        text = coder.frPyObjects(rle, *shape)
        compressed = {"size": text["size"], "counts": text["counts"].decode()}
        assert run_lengths(compressed) == rle["counts"]
        assert np.array_equal(decode_rle(compressed), mask)


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
