"""Data sets of configs: what is refused before the first iteration, and what mmdet and mmseg read after a repair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.registry import DATASETS

import effvit.dense.openmmlab  # noqa: F401  (registers the transforms)
from effvit.dense.data_checks import DataPart, check_annotations, inspect_data

CLASSES = ("cat", "dog", "bird")
SIZES = [(20, 30), (30, 20), (24, 24)]  # (height, width)


def box(number: int, image: int, category: int, **changes: Any) -> dict[str, Any]:
    """An annotation of a square of ten pixels."""
    square = {"id": number, "image_id": image, "category_id": category, "bbox": [2, 3, 10, 10], "area": 100}
    return square | {"iscrowd": 0, "segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]]} | changes


def content(*more: dict[str, Any]) -> dict[str, Any]:
    """Three images with an object of each class, ids with gaps, and further annotations."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
            for i, (height, width) in enumerate(SIZES, 1)
        ],
        "categories": [{"id": 0, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "bird"}],
        "annotations": [box(11, 1, 0), box(12, 2, 3), box(13, 3, 7), *more],
    }


class Detection:
    """A detection set on disk and the config of a Mask R-CNN for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        for i, (height, width) in enumerate(SIZES, 1):
            Image.new("RGB", (width, height)).save(folder / "images" / f"{i}.png")
        self.write(content())

    def write(self, value: Any, name: str = "set.json") -> None:
        (self.folder / name).write_text(value if isinstance(value, str) else json.dumps(value))

    def config(self, classes: Any = CLASSES, **changes: Any) -> Config:
        data = {"type": "CocoDataset", "data_root": str(self.folder), "ann_file": "set.json"}
        data |= {"data_prefix": {"img": "images"}, "metainfo": {"classes": classes}}
        load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}]
        number = 1 if isinstance(classes, str) else len(classes)
        head = {"type": "Shared2FCBBoxHead", "num_classes": number}
        config = {
            "default_scope": "mmdet",
            "work_dir": str(self.folder / "work"),
            "model": {
                "type": "MaskRCNN",
                "rpn_head": {"type": "RPNHead"},
                "roi_head": {"bbox_head": head, "mask_head": {"type": "FCNMaskHead", "num_classes": number}},
            },
            "train_dataloader": {"dataset": {**data, "pipeline": load, "filter_cfg": {"filter_empty_gt": True}}},
            "val_dataloader": {"dataset": {**data, "pipeline": load, "test_mode": True}},
            "val_evaluator": {"type": "CocoMetric", "ann_file": f"{self.folder}/set.json", "metric": ["bbox", "segm"]},
        }
        made = Config(config)
        made.merge_from_dict(changes)
        return made


@pytest.fixture
def detection(tmp_path: Path) -> Detection:
    return Detection(tmp_path)


def loaded(config: Config, split: str = "train_dataloader") -> Any:
    """The data set of a checked config, as mmdet or mmseg builds it."""
    with DATASETS.switch_scope_and_registry(config.default_scope):  # what it leaves behind is that of before
        return DATASETS.build({**config[split].dataset, "_scope_": config.default_scope})


def instances(config: Config) -> list[dict[str, Any]]:
    """The objects that mmdet trains on."""
    dataset = loaded(config)
    return [entry for i in range(len(dataset)) for entry in dataset.get_data_info(i)["instances"]]


class TestCocoRefusals:
    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (
                ("kitty", "doggy"),
                r"no class of the config \(kitty, doggy\) is among .* \(cat, dog, bird\); set metainfo"
                r'=dict\(classes=\("cat", "dog", "bird"\)\) of the data sets, the names of the file, and num_classes=3',
            ),
            (("cat", "zebra", "bird"), r"\(cat, dog, bird\): zebra; leave them out of metainfo and num_classes"),
            (("cat", "dgo", "bird"), r"1 of 3 classes .* \(cat, dog, bird\): dgo; did you mean 'dog'\?"),
            ("cta", r"no class of the config \(cta\) is among"),
            (("cat", "dog", "cat"), "the class 'cat' stands twice"),
        ],
    )
    def test_class_names_that_the_file_has_not(self, detection: Detection, classes: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_annotations(detection.config(classes))

    @pytest.mark.parametrize("number", [2, 4, 80])
    @pytest.mark.parametrize("head", ["bbox_head", "mask_head"])
    def test_heads_of_other_numbers_of_classes(self, detection: Detection, head: str, number: int) -> None:
        config = detection.config(**{f"model.roi_head.{head}.num_classes": number})
        with pytest.raises(
            ValueError, match=rf"has 3 classes \(cat, .* model\.roi_head\.{head}\.num_classes={number}; set"
        ):
            check_annotations(config)

    def test_head_that_leaves_the_number_to_its_default(self, detection: Detection) -> None:
        config = detection.config()
        del config.model.roi_head.mask_head["num_classes"]
        with pytest.raises(ValueError, match=r"model\.roi_head\.mask_head\.num_classes=80; set num_classes=3 there"):
            check_annotations(config)

    def test_every_stage_of_a_cascade_is_looked_at(self, detection: Detection) -> None:
        heads = [{"type": "Shared2FCBBoxHead", "num_classes": number} for number in (3, 3, 5)]
        config = detection.config()
        config.model.roi_head.bbox_head = heads
        with pytest.raises(ValueError, match=r"model has model\.roi_head\.bbox_head\[2\]\.num_classes=5; set"):
            check_annotations(config)

    def test_dense_head_is_looked_at(self, detection: Detection) -> None:
        config = detection.config()
        config.model = {"type": "RetinaNet", "bbox_head": {"type": "RetinaHead", "num_classes": 80}}
        with pytest.raises(ValueError, match=r"model\.bbox_head\.num_classes=80"):
            check_annotations(config)

    def test_missing_image(self, detection: Detection) -> None:
        (detection.folder / "images" / "2.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 of 3 images of .*set\.json are not in .*, the first is 2\.png"):
            check_annotations(detection.config())

    def test_missing_folder(self, detection: Detection) -> None:
        config = detection.config(**{"train_dataloader.dataset.data_prefix.img": "none"})
        with pytest.raises(
            FileNotFoundError, match=r"train_dataloader looks for its images in .*none, which is no folder"
        ):
            check_annotations(config)

    def test_size_other_than_that_of_the_file(self, detection: Detection) -> None:
        Image.new("RGB", (31, 20)).save(detection.folder / "images" / "1.png")
        with pytest.raises(
            ValueError, match=r"image 1 of .* is 20 x 30 pixels \(height x width\), but .*1\.png 20 x 31"
        ):
            check_annotations(detection.config())

    def test_image_that_is_cut_off(self, detection: Detection) -> None:
        path = detection.folder / "images" / "3.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(ValueError, match=r"3\.png cannot be read as an image: "):
            check_annotations(detection.config())

    def test_float_image(self, detection: Detection) -> None:
        value = content()
        value["images"][2]["file_name"] = "3.tiff"
        Image.fromarray(np.zeros((24, 24), np.float32)).save(detection.folder / "images" / "3.tiff")
        detection.write(value)
        with pytest.raises(ValueError, match=r"3\.tiff has pixels of 32 bits, which mmcv does not read"):
            check_annotations(detection.config())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"file_name": None}, "image 1 must have a file_name, got None"),
            ({"height": "20"}, r"image 1 \(1\.png\) must have a height in pixels, got '20'"),
            ({"width": 0}, r"image 1 \(1\.png\) must have a width in pixels, got 0"),
        ],
    )
    def test_image_entries_without_a_file_or_size(
        self, detection: Detection, change: dict[str, Any], message: str
    ) -> None:
        value = content()
        value["images"][0] |= change
        detection.write(value)
        with pytest.raises(ValueError, match=rf"set\.json is no intact COCO annotation file: {message}"):
            check_annotations(detection.config())

    @pytest.mark.parametrize(
        "entries", [[], [box(1, 1, 0, iscrowd=1)], [box(1, 1, 0, bbox=[2, 3, 0, 10])]], ids=["none", "crowd", "no area"]
    )
    def test_nothing_to_learn(self, detection: Detection, entries: list[dict[str, Any]]) -> None:
        detection.write(content() | {"annotations": entries})
        with pytest.raises(ValueError, match=r"has no annotation of an object of cat, dog, bird, so train_dataloader"):
            check_annotations(detection.config())

    def test_mask_head_without_masks(self, detection: Detection) -> None:
        value = content(box(20, 1, 0))
        del value["annotations"][3]["segmentation"]
        detection.write(value)
        with pytest.raises(ValueError, match=r"annotation 20 has no mask; correct its segmentation, leave"):
            check_annotations(detection.config())
        config = detection.config()
        config.train_dataloader.dataset.pipeline[1].with_mask = False
        with pytest.raises(
            ValueError, match="the model has a mask head, but train_dataloader loads no masks; set with_mask"
        ):
            check_annotations(config)
        config.model.roi_head.mask_head = None
        config.val_dataloader.dataset.pipeline[1].with_mask = False
        config.val_evaluator.metric = "bbox"
        assert check_annotations(config) == [f"{detection.folder}/set.json: annotations: 4; images: 3"]

    def test_objects_are_counted_by_class(self, detection: Detection) -> None:
        """Crowd regions are no objects."""
        detection.write(content(box(20, 1, 0), box(21, 2, 3, iscrowd=1)))
        found = inspect_data(detection.config())
        assert [summary.counts for summary in found.sets] == ["objects by class: cat 2, dog 1, bird 1"]
        assert found.faults == []

    def test_metric_of_other_images(self, detection: Detection) -> None:
        value = content()
        value["images"].append({"id": 9, "file_name": "1.png", "height": 20, "width": 30})
        detection.write(value, "other.json")
        config = detection.config(**{"val_evaluator.ann_file": f"{detection.folder}/other.json"})
        with pytest.raises(
            ValueError, match=r"whose images are not those of val_dataloader: 1 are in one .* \(9\); give both"
        ):
            check_annotations(config)
        config.val_evaluator.ann_file = "nowhere.json"
        with pytest.raises(FileNotFoundError, match=r"val_evaluator asks for nowhere\.json, which is not there"):
            check_annotations(config)

    def test_splits_of_other_classes(self, detection: Detection) -> None:
        config = detection.config(**{"val_dataloader.dataset.metainfo.classes": ("cat", "bird", "dog")})
        with pytest.raises(
            ValueError, match=r"val_dataloader has the classes cat, bird, dog, but train_dataloader has cat"
        ):
            check_annotations(config)

    @pytest.mark.parametrize(
        "wrapper", ["RepeatDataset", "ConcatDataset", "MultiImageMixDataset", "ClassBalancedDataset"]
    )
    def test_wrapped_sets_are_looked_into(self, detection: Detection, wrapper: str) -> None:
        config = detection.config(("kitty",))
        inner = config.train_dataloader.dataset
        key, value = ("datasets", [inner]) if wrapper == "ConcatDataset" else ("dataset", inner)
        config.train_dataloader = {"dataset": {"type": wrapper, key: value}}
        with pytest.raises(ValueError, match="no class of the config"):
            check_annotations(config)

    def test_number_of_checked_files(self, detection: Detection) -> None:
        (detection.folder / "images" / "3.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"3\.png is no image"):
            check_annotations(detection.config(checked_files="all"))
        assert check_annotations(detection.config(checked_files=1))  # the first only
        with pytest.raises(ValueError, match="checked_files must be a number of files from 0 on, or 'all', got -1"):
            check_annotations(detection.config(checked_files=-1))


def test_checked_files_are_spread_over_the_set() -> None:
    part = DataPart(Config({"checked_files": 4}), "train_dataloader", {}, object)
    assert part.sample(range(10)) == [0, 2, 5, 7]


class TestCocoRepairs:
    def test_intact_file_is_used_as_it_is(self, detection: Detection) -> None:
        config = detection.config()
        lines = check_annotations(config)
        assert lines == [f"{detection.folder}/set.json: annotations: 3; images: 3"]
        assert config.train_dataloader.dataset.ann_file == "set.json"
        assert config.val_evaluator.ann_file == f"{detection.folder}/set.json"
        assert not (detection.folder / "work").exists()
        assert [entry["bbox_label"] for entry in instances(config)] == [0, 1, 2]

    def test_boxes_without_area_train_without_a_copy_and_are_not_measured(self, detection: Detection) -> None:
        """mmdet's CocoDataset leaves them out by itself; COCO's evaluation would count them as objects not found."""
        detection.write(content(box(20, 1, 0, bbox=[2, 3, 1.5, 0.0], area=0.0)))
        config = detection.config()
        train, val = check_annotations(config)
        assert train.endswith("annotations: 4; images: 3; boxes without area, left out: 1")
        assert config.train_dataloader.dataset.ann_file == "set.json"
        assert len(instances(config)) == 3
        assert f"in use is the repaired copy {config.val_evaluator.ann_file}" in val
        assert config.val_evaluator.ann_file == config.val_dataloader.dataset.ann_file
        assert len(json.loads(Path(config.val_evaluator.ann_file).read_text())["annotations"]) == 3

    def test_missing_area_and_iscrowd_are_filled_in(self, detection: Detection) -> None:
        value = content()
        for entry in value["annotations"]:
            del entry["area"], entry["iscrowd"]
        detection.write(value)
        config = detection.config()
        line = check_annotations(config)[0]
        assert "iscrowd set to 0: 3; area computed: 3; in use is the repaired copy" in line
        assert len(instances(config)) == 3
        copy = json.loads(Path(config.val_evaluator.ann_file).read_text())
        assert [(entry["area"], entry["iscrowd"]) for entry in copy["annotations"]] == [(100, 0)] * 3

    def test_categories_come_in_the_order_of_the_config(self, detection: Detection) -> None:
        """mmdet would call cats birds: it numbers categories as the file has them and names them as the config does."""
        config = detection.config(("bird", "cat", "dog"))
        assert "categories put in the order of the config" in check_annotations(config)[0]
        dataset = loaded(config)
        labels = {
            dataset.metainfo["classes"][entry["bbox_label"]]: dataset.get_data_info(i)["img_id"]
            for i in range(3)
            for entry in dataset.get_data_info(i)["instances"]
        }
        assert labels == {"cat": 1, "dog": 2, "bird": 3}

    def test_mark_of_the_byte_order_is_left_out(self, detection: Detection) -> None:
        (detection.folder / "set.json").write_text(json.dumps(content()), encoding="utf-8-sig")
        config = detection.config()
        assert "mark of the byte order left out; in use is the repaired copy" in check_annotations(config)[0]
        assert len(instances(config)) == 3

    def test_single_name_of_a_class_is_made_a_tuple(self, detection: Detection) -> None:
        config = detection.config("cat")
        check_annotations(config)
        assert config.train_dataloader.dataset.metainfo.classes == ("cat",)
        assert [entry["bbox_label"] for entry in instances(config)] == [0]

    def test_images_without_annotations_follow_the_filter(self, detection: Detection) -> None:
        value = content()
        del value["annotations"][2]
        detection.write(value)
        config = detection.config()
        assert "images without annotations are left out, as filter_cfg says" in check_annotations(config)[0]
        assert len(loaded(config)) == 2
        config = detection.config(**{"train_dataloader.dataset.filter_cfg.filter_empty_gt": False})
        assert "images without annotations are background, as filter_cfg says" in check_annotations(config)[0]
        assert len(loaded(config)) == 3

    def test_metric_with_a_file_of_its_own_is_repaired_too(self, detection: Detection) -> None:
        value = content()
        for entry in value["annotations"]:
            del entry["iscrowd"]
        detection.write(value, "other.json")
        config = detection.config(**{"val_evaluator.ann_file": f"{detection.folder}/other.json"})
        check_annotations(config)
        copy = json.loads(Path(config.val_evaluator.ann_file).read_text())
        assert [entry["iscrowd"] for entry in copy["annotations"]] == [0] * 3

    def test_second_check_changes_nothing(self, detection: Detection) -> None:
        value = content(box(20, 1, 0, bbox=[2, 3, 0, 4]))
        del value["annotations"][0]["area"]
        detection.write(value)
        config = detection.config()
        check_annotations(config)
        before = config.pretty_text
        check_annotations(config)
        assert config.pretty_text == before

    @pytest.mark.parametrize("made_for", ["upright", "stored"])
    def test_image_is_turned_as_its_annotations_are(self, detection: Detection, made_for: str) -> None:
        """Orientation 6 asks for a quarter turn clockwise: the first stored row is the last upright column."""
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[0] = 200
        Image.fromarray(pixels).save(detection.folder / "images" / "1.png", exif=exif)
        value = content()
        if made_for == "upright":
            value["images"][0] |= {"height": 30, "width": 20}
        detection.write(value)
        config = detection.config()
        check_annotations(config)
        results = loaded(config)[0]
        expected = np.rot90(pixels, -1) if made_for == "upright" else pixels
        assert np.array_equal(results["img"], expected)
        assert results["gt_masks"].masks.shape[1:] == expected.shape[:2] == results["ori_shape"]

    def test_image_that_is_not_opened_before_is_checked_while_it_is_loaded(self, detection: Detection) -> None:
        Image.new("RGB", (31, 20)).save(detection.folder / "images" / "3.png")
        config = detection.config(checked_files=0)
        check_annotations(config)
        with pytest.raises(ValueError, match=r"3\.png is 20 x 31 pixels, but its annotations are made for 24 x 24"):
            loaded(config)[2]


Draw = Callable[[int, int], np.ndarray]


def three_classes(height: int, width: int) -> np.ndarray:
    """Columns of the labels 0, 1, 2 and the ignored 255."""
    return np.repeat(np.array([[0, 1, 2, 255]], np.uint8), height, 0)[:, np.arange(width) * 4 // width]


class TestLabelMaps:
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[..., Config]:
        """Writes two images with drawn label maps and returns the config of a segmenter."""

        def write(draw: Draw, classes: tuple[str, ...] = CLASSES, **changes: Any) -> Config:
            for split in ("train", "val"):
                (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
                (tmp_path / "labels" / split).mkdir(parents=True, exist_ok=True)
                for i, (height, width) in enumerate(SIZES[:2]):
                    Image.new("RGB", (width, height)).save(tmp_path / "images" / split / f"{i}.jpg")
                    Image.fromarray(draw(height, width)).save(tmp_path / "labels" / split / f"{i}.png")
            data = {"type": "BaseSegDataset", "data_root": str(tmp_path), "metainfo": {"classes": classes}}
            load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
            sets = {
                split: {**data, "data_prefix": {"img_path": f"images/{split}", "seg_map_path": f"labels/{split}"}}
                for split in ("train", "val")
            }
            head = {"type": "FCNHead", "num_classes": len(classes)}
            config = Config(
                {
                    "default_scope": "mmseg",
                    "model": {"type": "EncoderDecoder", "decode_head": head, "auxiliary_head": [dict(head)]},
                    "train_dataloader": {"dataset": {**sets["train"], "pipeline": load}},
                    "val_dataloader": {"dataset": {**sets["val"], "pipeline": load}},
                }
            )
            config.merge_from_dict(changes)
            return config

        return write

    def test_intact_set_is_loaded(self, make: Any, tmp_path: Path) -> None:
        config = make(three_classes)
        assert check_annotations(config) == [
            f"{tmp_path}/labels/{split}: 2 of 2 label maps read" for split in ("train", "val")
        ]
        results = loaded(config)[0]
        assert np.array_equal(results["gt_seg_map"], three_classes(*SIZES[0]))

    @pytest.mark.parametrize(
        ("draw", "message"),
        [
            (
                lambda h, w: np.where(three_classes(h, w) == 2, 9, three_classes(h, w)),
                r"0\.png has the label 9, but classes",
            ),
            (
                lambda h, w: three_classes(h, w).astype(np.uint16) + 300,
                r"0\.png has the labels 300, 301, 302, 555, but",
            ),
            (
                lambda h, w: np.stack([three_classes(h, w)] * 3, -1),
                r"0\.png has pixels of mode RGB, not one label each",
            ),
            (lambda h, w: three_classes(h // 2, w // 2), r"0\.png is 10 x 15 pixels, but its image 20 x 30; make"),
            (
                lambda h, w: np.uint8(255) * (three_classes(h, w) == 1),
                r"no labels but 0 and 255, .* one of 3 classes is left",
            ),
            (lambda h, w: np.full((h, w), 255, np.uint8), "all pixels of the label maps in .* are ignored"),
        ],
        ids=["too high", "16 bit", "colours", "size", "0 and 255", "ignored"],
    )
    def test_label_maps_that_mean_nothing_are_named(self, make: Any, draw: Draw, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_annotations(make(draw))

    def test_broken_files_are_named(self, make: Any, tmp_path: Path) -> None:
        config = make(three_classes)
        (tmp_path / "labels" / "val" / "1.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"labels/val/1\.png is empty"):
            check_annotations(config)
        Image.fromarray(three_classes(*SIZES[1])).save(tmp_path / "labels" / "val" / "1.png", format="JPEG")
        with pytest.raises(ValueError, match=r"labels/val/1\.png is a JPEG file, whose compression changes labels"):
            check_annotations(config)
        config = make(three_classes)
        (tmp_path / "images" / "train" / "0.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"images/train/0\.jpg is no image"):
            check_annotations(config)

    def test_sixteen_bits_and_palettes_hold_the_same_labels(self, make: Any, tmp_path: Path) -> None:
        config = make(lambda h, w: three_classes(h, w).astype(np.uint16))
        palette = Image.fromarray(three_classes(*SIZES[0])).convert("P")
        palette.putpalette(list(range(256)) * 3)
        palette.putdata(three_classes(*SIZES[0]).ravel().tolist())
        palette.save(tmp_path / "labels" / "val" / "0.png")
        check_annotations(config)
        for split in ("train_dataloader", "val_dataloader"):
            assert np.array_equal(loaded(config, split)[0]["gt_seg_map"], three_classes(*SIZES[0]))

    def test_palettes_are_not_read_as_colours(self, make: Any) -> None:
        config = make(three_classes)
        config.train_dataloader.dataset.pipeline[1].imdecode_backend = "cv2"
        with pytest.raises(
            ValueError, match="LoadAnnotations reads label maps by cv2, which makes colours of palettes"
        ):
            check_annotations(config)

    def test_zero_label_is_reduced_alike_everywhere(self, make: Any) -> None:
        config = make(three_classes, **{"train_dataloader.dataset.reduce_zero_label": True})
        with pytest.raises(
            ValueError, match="reduce_zero_label is True in train_dataloader, but False in val_dataloader"
        ):
            check_annotations(config)
        config = make(three_classes)
        config.val_dataloader.dataset.pipeline[1].reduce_zero_label = True
        with pytest.raises(
            ValueError, match="reduce_zero_label is False in the data set, but True in its LoadAnnotations"
        ):
            check_annotations(config)

    def test_pipelines_follow_what_the_data_sets_say_of_the_zero_label(self, make: Any) -> None:
        """As inherited from ADE20K: LoadAnnotations reduces label 0. mmseg itself fails an assertion when it loads."""
        own = {f"{split}_dataloader.dataset.reduce_zero_label": False for split in ("train", "val")}
        config = make(three_classes, **own)
        for split in ("train", "val"):
            config[f"{split}_dataloader"].dataset.pipeline[1].reduce_zero_label = True
        lines = check_annotations(config)
        assert all(line.endswith("=True of its LoadAnnotations gives way to False of the data set") for line in lines)
        assert set(np.unique(loaded(config, "val_dataloader")[0]["gt_seg_map"]).tolist()) == {0, 1, 2, 255}

    @pytest.mark.parametrize(
        ("draw", "classes", "remedy"),
        [
            (three_classes, CLASSES, "False fits, since the label maps hold 0, 1, 2 for 3 classes"),
            (three_classes, ("cat", "dog"), "True fits, since the label maps hold 0, 1, 2 for 2 classes"),
        ],
    )
    def test_undecided_zero_label_is_told_what_fits(
        self, make: Any, draw: Draw, classes: tuple[str, ...], remedy: str
    ) -> None:
        """With as many labels above 0 as classes, 0 is none; validation is looked at before training begins."""
        config = make(draw, classes)
        config.val_dataloader.dataset.pipeline[1].reduce_zero_label = True
        said = "val_dataloader: reduce_zero_label is False in the data set, but True in its LoadAnnotations; set it in"
        (fault,) = (str(fault) for fault in inspect_data(config).faults if str(fault).startswith(said))
        assert fault.endswith(f": {remedy}")

    def test_data_set_without_classes_is_refused(self, make: Any) -> None:
        config = make(three_classes)
        del config.train_dataloader.dataset["metainfo"]
        with pytest.raises(
            ValueError,
            match=r"train_dataloader names no classes, .* for each label; the label maps hold 0, 1, 2",
        ):
            check_annotations(config)

    def test_own_classes_in_a_known_set_are_refused(self, make: Any) -> None:
        config = make(three_classes, ("ground", "leaf"), **{"train_dataloader.dataset.type": "ADE20KDataset"})
        with pytest.raises(ValueError, match=r"ground, leaf, .* the 150 of ADE20KDataset .*set type='BaseSegDataset'"):
            check_annotations(config)

    def test_forgotten_classes_of_a_known_set_are_told(self, make: Any) -> None:
        config = make(three_classes)
        for split in ("train_dataloader", "val_dataloader"):
            config[split].dataset.type = "ADE20KDataset"
            del config[split].dataset["metainfo"]
        with pytest.raises(ValueError, match=r"has 150 classes .*num_classes=3.* type='BaseSegDataset'"):
            check_annotations(config)

    def test_label_one_too_high_may_mean_that_zero_is_no_class(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"has the label 2, but .*, or reduce_zero_label=True if 0 is no class"):
            check_annotations(make(three_classes, ("cat", "dog")))

    def test_all_faults_are_found_and_sets_without_one_summed_up(self, make: Any, tmp_path: Path) -> None:
        config = make(three_classes, **{"model.decode_head.num_classes": 5})
        Image.fromarray(np.full((20, 30), 7, np.uint8)).save(tmp_path / "labels" / "val" / "0.png")
        config.test_dataloader = config.val_dataloader  # said once
        found = inspect_data(config)
        assert [summary.counts for summary in found.sets] == ["maps by label: 0 (cat) 2, 1 (dog) 2, 2 (bird) 2"]
        assert [str(fault).split(", but")[0] for fault in found.faults] == [
            f"{tmp_path}/labels/val/0.png has the label 7",
            "train_dataloader has 3 classes (cat, dog, bird)",
        ]

    def test_reduced_labels_count_from_one(self, make: Any) -> None:
        """As loaded: 0 is ignored, 1 and 2 become 0 and 1."""
        reduced = {f"{split}_dataloader.dataset.reduce_zero_label": True for split in ("train", "val")}
        config = make(three_classes, ("cat", "dog"), **reduced)
        check_annotations(config)
        assert set(np.unique(loaded(config)[0]["gt_seg_map"]).tolist()) == {0, 1, 255}
        line = check_annotations(make(three_classes, **reduced))[0]
        assert line.endswith("2 of 2 label maps read, classes that occur in none: bird")

    @pytest.mark.parametrize("head", ["decode_head", "auxiliary_head"])
    def test_heads_of_other_numbers_of_classes(self, make: Any, head: str) -> None:
        config = make(three_classes)
        part = config.model[head]
        (part[0] if isinstance(part, list) else part).num_classes = 150
        with pytest.raises(ValueError, match=rf"has 3 classes \(cat, dog, bird\), .* model\.{head}.*num_classes=150"):
            check_annotations(config)

    def test_label_map_that_is_not_opened_before_is_checked_while_it_is_loaded(self, make: Any) -> None:
        config = make(lambda h, w: three_classes(h, w) + np.uint8(1), checked_files=0)
        check_annotations(config)
        with pytest.raises(ValueError, match=r"0\.png has the label 3 \(as loaded\), but there are 3 classes"):
            loaded(config)[0]
        config = make(lambda h, w: three_classes(h // 2, w), checked_files=0)
        check_annotations(config)
        with pytest.raises(ValueError, match=r"0\.jpg is 20 x 30 pixels, but its annotations are made for 10 x 30"):
            loaded(config)[0]

    def test_image_is_turned_as_its_label_map_is(self, make: Any, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        config = make(three_classes)
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / "train" / "0.jpg", exif=exif)
        check_annotations(config)
        assert loaded(config)[0]["img"].shape == (20, 30, 3)
        Image.fromarray(three_classes(30, 20)).save(tmp_path / "labels" / "train" / "0.png")
        assert loaded(config)[0]["img"].shape == (30, 20, 3)


class TestClassifiers:
    def config(self, number: int, **dataset: Any) -> Config:
        return Config(
            {
                "default_scope": "mmpretrain",
                "model": {"type": "ImageClassifier", "head": {"type": "LinearClsHead", "num_classes": number}},
                "train_dataloader": {"dataset": {"type": "CustomDataset", "pipeline": [], **dataset}},
            }
        )

    def test_folders_are_the_classes(self, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
        check_annotations(self.config(2, data_root=str(tmp_path)))
        with pytest.raises(
            ValueError, match=r"has 2 classes \(cat, dog\), but the model has model\.head\.num_classes=3"
        ):
            check_annotations(self.config(3, data_root=str(tmp_path)))

    def test_classes_of_a_known_set_are_counted(self) -> None:
        config = self.config(1000, data_prefix="data/cifar10")
        config.train_dataloader.dataset.type = "CIFAR10"
        with pytest.raises(
            ValueError, match=r"has 10 classes .* model\.head\.num_classes=1000; set num_classes=10 there"
        ):
            check_annotations(config)
