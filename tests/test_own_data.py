"""`effvit check-data` of a COCO file and of a folder of label maps: counts, faults, and lines that make a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_parts import save_as_jpeg, write_parts
from PIL import Image

from effvit.cli import main
from effvit.dense.image_files import sampled
from effvit.dense.own_data import inspect_coco, inspect_label_maps, literal, shown_counts


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    write_parts(tmp_path / "parts")
    return tmp_path / "parts"


def change(path: Path, **parts: Any) -> None:
    """Replace parts of an annotation file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def draw(path: Path, values: object) -> None:
    """Write a label map of the values in columns, as large as the drawn ones."""
    row = np.resize(np.asarray(values, np.uint8), 96)
    Image.fromarray(np.tile(np.sort(row), (72, 1))).save(path)


def lines(config: list[str]) -> dict[str, Any]:
    """What lines of a config assign."""
    values: dict[str, Any] = {}
    exec("\n".join(config), values)
    return values


class TestCoco:
    def test_objects_are_counted_and_repairs_told(self, parts: Path) -> None:
        """Eight images with a bolt and a nut each, without iscrowd and area; see drawn_parts.py."""
        found = inspect_coco(parts / "train.json", parts / "images" / "train")
        assert found.faults == []
        (summary,) = found.sets
        assert summary.line.endswith("annotations: 16; images: 8; iscrowd set to 0: 16; area computed: 16")
        assert summary.counts == "objects by class: bolt 8, nut 8"

    def test_class_without_objects_is_named(self, parts: Path) -> None:
        categories = [{"id": label, "name": name} for label, name in enumerate(("bolt", "nut", "washer"), 1)]
        change(parts / "train.json", categories=categories)
        found = inspect_coco(parts / "train.json")
        assert found.sets[0].counts == "objects by class: bolt 8, nut 8; none of washer"

    def test_lines_name_classes_heads_and_files(self, parts: Path) -> None:
        found = inspect_coco(parts / "train.json", parts / "images" / "train")
        values = lines(found.config)
        assert values["_base_"] == "effvit::mmdet/mask-rcnn_evit-deit-s_fpn_1x_coco.py"
        assert values["model"] == {"roi_head": {"bbox_head": {"num_classes": 2}, "mask_head": {"num_classes": 2}}}
        dataset = values["train_dataloader"]["dataset"]
        assert dataset["metainfo"] == {"classes": ("bolt", "nut")}
        assert dataset["ann_file"] == str(parts / "train.json")

    def test_boxes_alone_ask_for_a_detector_without_masks(self, parts: Path) -> None:
        entries = json.loads((parts / "train.json").read_text())["annotations"]
        change(parts / "train.json", annotations=[entry | {"segmentation": []} for entry in entries])
        values = lines(inspect_coco(parts / "train.json").config)
        assert values["_base_"] == "effvit::mmdet/retinanet_evit-deit-s_fpn_1x_coco.py"
        assert values["model"] == {"bbox_head": {"num_classes": 2}}

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                {"segmentation": []},
                "annotation 1 has an empty mask; correct its segmentation, leave the ",
            ),
            ({"category_id": 9}, "annotation 1 has category_id 9, which is not among the categories; correct it"),
            ({"bbox": [1, 2, 3]}, "annotation 1 must have a box"),
        ],
    )
    def test_broken_annotation_is_named(self, parts: Path, entry: dict[str, Any], message: str) -> None:
        entries = json.loads((parts / "train.json").read_text())["annotations"]
        change(parts / "train.json", annotations=[entries[0] | entry, *entries[1:]])
        found = inspect_coco(parts / "train.json")
        assert message in str(found.faults[0])
        assert found.config == []

    def test_category_that_stands_twice_is_named(self, parts: Path) -> None:
        change(parts / "train.json", categories=[{"id": 1, "name": "bolt"}, {"id": 2, "name": "bolt"}])
        (fault,) = inspect_coco(parts / "train.json").faults
        assert str(fault).startswith("the category 'bolt' stands twice in")

    def test_missing_image_is_named(self, parts: Path) -> None:
        (parts / "images" / "train" / "2.png").unlink()
        found = inspect_coco(parts / "train.json", parts / "images" / "train")
        assert "1 of 8 images of" in str(found.faults[0])
        assert inspect_coco(parts / "train.json").faults == []  # nobody asked for them

    def test_file_without_objects_has_nothing_to_learn(self, parts: Path) -> None:
        change(parts / "train.json", annotations=[])
        found = inspect_coco(parts / "train.json")
        assert "has no annotation of an object, so that there is nothing to learn" in str(found.faults[0])


class TestLabelMaps:
    def test_maps_are_counted_by_label(self, parts: Path) -> None:
        draw(parts / "masks" / "train" / "1.png", [0, 1, 255])
        found = inspect_label_maps(parts / "masks" / "train", parts / "images" / "train")
        assert found.faults == []
        (summary,) = found.sets
        assert summary.line.endswith("8 of 8 label maps read")
        assert summary.counts == "maps by label: 0 8, 1 8, 2 7"

    def test_lines_count_classes_from_zero(self, parts: Path) -> None:
        save_as_jpeg(parts)
        found = inspect_label_maps(parts / "masks" / "train", parts / "images" / "train")
        values = lines(found.config)
        dataset = values["train_dataloader"]["dataset"]
        assert (dataset["reduce_zero_label"], len(values["classes"])) == (False, 3)
        assert (dataset["img_suffix"], dataset["seg_map_suffix"]) == (".jpg", ".png")
        assert values["model"] == {"decode_head": {"num_classes": 3}, "auxiliary_head": {"num_classes": 3}}

    def test_lines_count_classes_from_one_where_no_map_has_zero(self, parts: Path) -> None:
        for path in (parts / "masks" / "train").iterdir():
            draw(path, [1, 2, 255])
        values = lines(inspect_label_maps(parts / "masks" / "train").config)
        assert values["train_dataloader"]["dataset"]["reduce_zero_label"] is True
        assert values["classes"] == ("class_1", "class_2")
        assert values["model"]["decode_head"] == {"num_classes": 2}

    def test_many_classes_are_named_by_counting(self, parts: Path) -> None:
        draw(parts / "masks" / "train" / "1.png", range(30))
        values = lines(inspect_label_maps(parts / "masks" / "train").config)
        assert values["classes"][::29] == ("class_0", "class_29")

    def test_gaps_between_labels_are_told(self, parts: Path) -> None:
        for path in (parts / "masks" / "train").iterdir():
            draw(path, [0, 3])
        found = inspect_label_maps(parts / "masks" / "train")
        assert "no map holds the labels 1, 2: as classes they could not be learnt" in found.sets[0].line

    def test_end_of_the_names_is_found(self, parts: Path) -> None:
        for path in sorted((parts / "masks" / "train").iterdir()):
            path.rename(path.with_name(f"{path.stem}_labels.png"))
        found = inspect_label_maps(parts / "masks" / "train", parts / "images" / "train")
        assert lines(found.config)["train_dataloader"]["dataset"]["seg_map_suffix"] == "_labels.png"

    def test_colours_are_named_and_many_faults_counted(self, parts: Path) -> None:
        found = inspect_label_maps(parts / "images" / "train")
        assert "1.png has pixels of mode RGB, not one label each; save a label map" in str(found.faults[0])
        assert str(found.faults[5]).startswith("3 more label maps in")
        assert (len(found.faults), found.sets, found.config) == (6, [], [])

    @pytest.mark.parametrize(
        ("values", "message"),
        [([0, 255], "have no labels but 0 and 255, which is ignored"), ([255], "all pixels of the label maps in")],
    )
    def test_maps_without_classes_are_refused(self, parts: Path, values: list[int], message: str) -> None:
        for path in (parts / "masks" / "train").iterdir():
            draw(path, values)
        found = inspect_label_maps(parts / "masks" / "train")
        assert message in str(found.faults[0])
        assert found.config == []

    def test_images_and_maps_that_miss_each_other(self, parts: Path) -> None:
        folders = parts / "masks" / "train", parts / "images" / "train"
        (folders[0] / "3.png").unlink()
        found = inspect_label_maps(*folders)
        assert "1 images have no label map, the first is" in str(found.faults[0])
        (folders[1] / "3.png").unlink()
        (folders[1] / "4.png").unlink()
        assert "1 label maps have no image, the first is" in str(inspect_label_maps(*folders).faults[0])

    def test_images_of_several_formats(self, parts: Path) -> None:
        folder = parts / "images" / "train"
        Image.open(folder / "1.png").save(folder / "1.jpg")
        (folder / "1.png").unlink()
        found = inspect_label_maps(parts / "masks" / "train", folder)
        assert "holds images of several formats (" in str(found.faults[0])

    def test_size_other_than_that_of_the_image(self, parts: Path) -> None:
        Image.new("L", (96, 70)).save(parts / "masks" / "train" / "5.png")
        found = inspect_label_maps(parts / "masks" / "train", parts / "images" / "train")
        assert "5.png is 70 x 96 pixels, but its image 72 x 96; make label maps of the size" in str(found.faults[0])

    @pytest.mark.parametrize("folder", ["masks", "images"])
    def test_empty_folder_is_named(self, parts: Path, tmp_path: Path, folder: str) -> None:
        (tmp_path / "empty").mkdir()
        folders = {"masks": parts / "masks" / "train", "images": parts / "images" / "train"}
        folders[folder] = tmp_path / "empty"
        found = inspect_label_maps(folders["masks"], folders["images"])
        assert "empty holds no " in str(found.faults[0])


class TestCommand:
    def test_status_tells_whether_anything_is_wrong(self, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check-data", str(parts / "masks" / "train"), "--checked-files", "2"]) == 0
        out = capsys.readouterr().out
        assert "2 of 8 label maps read\n  maps by label: 0 2, 1 2, 2 2\nnothing is wrong; the images were not" in out
        assert main(["check-data", str(parts / "images" / "train")]) == 1
        out = capsys.readouterr().out
        assert out.count("wrong: ") == 6
        assert "nothing is wrong" not in out

    def test_file_that_is_not_there_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check-data", str(tmp_path / "none.json")]) == 2
        assert "none.json is not there; give a config, a COCO file (.json), or a folder of" in capsys.readouterr().err

    def test_images_are_not_for_configs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check-data", "parts.py", "--images", str(tmp_path)]) == 2
        assert "--images belongs to a COCO file or a folder of label maps; parts.py names" in capsys.readouterr().err

    def test_number_of_files_is_a_number(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["check-data", "parts.py", "--checked-files", "-1"])
        assert "is neither a number of files nor 'all'" in capsys.readouterr().err


def test_sampled_files_are_evenly_spread() -> None:
    assert sampled(range(10), 4) == [0, 2, 5, 7]
    assert list(sampled(range(3), "all")) == list(sampled(range(3), 3)) == [0, 1, 2]


def test_names_are_written_as_python_has_them() -> None:
    assert literal(["cat"]) == '("cat",)'
    assert eval(literal(['a "b"', "größe"])) == ('a "b"', "größe")


def test_counts_leave_zeros_to_the_end() -> None:
    assert shown_counts("maps", {"a": 1, "b": 0, "c": 2}) == "maps: a 1, c 2; none of b"
