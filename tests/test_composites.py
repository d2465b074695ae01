"""Composites on drawn cut-outs and gradients: exact annotations, no leak, and readers of other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from data import composites
from data.annotations import describe_objects
from data.composites import (
    CLASSES,
    EXCLUDED,
    Settings,
    Sprite,
    compose,
    family,
    read_backgrounds,
    read_sprites,
    split_families,
)
from data.datasets import open_dataset
from drawn_set import NAMES, PATTERNS, SIZE, draw_sprite, make
from PIL import Image
from scripts import load_tool

from effvit.dense.coco import decode_rle, read_coco


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def coco(root: Path, split: str) -> dict:
    return read_coco(root / "annotations" / f"instances_{split}.json")


# -- the set ---------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes_with_any_number_of_workers(
    drawn_sources: Path, drawn_set: Path, tmp_path: Path
) -> None:
    make(drawn_sources, tmp_path / "again", workers=1)
    assert files(tmp_path / "again") == files(drawn_set)


def test_another_seed_gives_other_pictures(drawn_sources: Path, drawn_set: Path, tmp_path: Path) -> None:
    make(drawn_sources, tmp_path / "other", settings=Settings(size=SIZE, seed=4))
    first = "images/training/000000.jpg"
    assert (tmp_path / "other" / first).read_bytes() != (drawn_set / first).read_bytes()


def test_larger_set_begins_with_the_pictures_of_a_smaller_one(
    drawn_sources: Path, drawn_set: Path, tmp_path: Path
) -> None:
    make(drawn_sources, tmp_path / "small", train=3, val=1)
    whole = files(drawn_set)
    for name, content in files(tmp_path / "small").items():
        if "/training/" in name or "/validation/" in name:
            assert whole[name] == content


def test_no_cut_out_and_no_background_is_in_both_splits(drawn_set: Path) -> None:
    record = json.loads((drawn_set / "composites.json").read_text())
    train, val = record["splits"]["training"], record["splits"]["validation"]
    assert set(train["backgrounds"]) | set(val["backgrounds"]) == {"sea.png", "sky.png", "wall.png", "wood.png"}
    assert not set(train["backgrounds"]) & set(val["backgrounds"])
    for label in PATTERNS:
        assert train["sprites"][label]
        assert val["sprites"][label]
        assert len(train["sprites"][label]) + len(val["sprites"][label]) == len(NAMES)
        assert not set(train["sprites"][label]) & set(val["sprites"][label])
        families = [{family(name) for name in part["sprites"][label]} for part in (train, val)]
        assert not families[0] & families[1]


def test_pictures_hold_only_the_cut_outs_of_their_split(
    drawn_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[str]] = {}

    def spy(rng, sprites, backgrounds, settings):
        key = str(sorted(sprite.name for part in sprites for sprite in part))
        used.setdefault(key, set()).update(str(background.tobytes()) for background in backgrounds)
        return compose(rng, sprites, backgrounds, settings)

    monkeypatch.setattr(composites, "compose", spy)
    record = make(drawn_sources, tmp_path / "set")
    expected = [
        str(sorted(name for part in record["splits"][split]["sprites"].values() for name in part))
        for split in ("training", "validation")
    ]
    assert list(used) == expected
    assert not set.intersection(*used.values())


def test_boxes_areas_masks_and_label_maps_agree(drawn_set: Path) -> None:
    for split in ("training", "validation"):
        content = coco(drawn_set, split)
        for image in content["images"]:
            with Image.open(drawn_set / "annotations" / split / image["file_name"].replace(".jpg", ".png")) as labels:
                assert labels.mode == "L"
                expected = np.asarray(labels)
            painted = np.zeros_like(expected)
            for entry in (e for e in content["annotations"] if e["image_id"] == image["id"]):
                mask = decode_rle(entry["segmentation"])
                assert not (painted[mask] != 0).any()  # no pixel belongs to two objects
                painted[mask] = entry["category_id"]
                x, y, width, height = entry["bbox"]
                rows, columns = np.nonzero(mask)
                assert (x, y) == (columns.min(), rows.min())
                assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
                assert entry["area"] == mask.sum()
                assert entry["iscrowd"] == 0
            assert np.array_equal(painted, expected)


def test_record_and_class_list_say_what_is_there(drawn_set: Path) -> None:
    assert (drawn_set / "classes.txt").read_text().splitlines() == list(PATTERNS)
    record = json.loads((drawn_set / "composites.json").read_text())
    assert record["settings"]["size"] == SIZE
    for split, number in (("training", 12), ("validation", 5)):
        content = coco(drawn_set, split)
        assert [category["name"] for category in content["categories"]] == list(PATTERNS)
        assert len(content["images"]) == len(list((drawn_set / "images" / split).iterdir())) == number
        counts = dict.fromkeys(PATTERNS, 0)
        for entry in content["annotations"]:
            counts[list(PATTERNS)[entry["category_id"] - 1]] += 1
        assert record["splits"][split]["objects"] == counts


def test_existing_folder_is_not_overwritten(drawn_sources: Path, drawn_set: Path) -> None:
    before = files(drawn_set)
    with pytest.raises(ValueError, match="set exists; name another folder or remove it"):
        make(drawn_sources, drawn_set)
    assert files(drawn_set) == before


def test_interrupted_run_leaves_no_folder(drawn_sources: Path, tmp_path: Path) -> None:
    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(drawn_sources, tmp_path / "set", progress=stop)
    assert not (tmp_path / "set").exists()
    make(drawn_sources, tmp_path / "set")  # what was begun does not stand in the way
    assert not (tmp_path / "set.partial").exists()


def test_progress_is_called_for_each_picture(drawn_sources: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    make(drawn_sources, tmp_path / "set", progress=calls.append)
    assert calls == [1] * 17


# -- one picture -----------------------------------------------------------------------------------------


def plain_sprite(side: int = 40, ink: tuple[int, int, int] = (200, 10, 10)) -> Sprite:
    return Sprite("plain", Image.new("RGBA", (side, side), (*ink, 255)))


@pytest.mark.parametrize("min_visible", [0.3, 0.7, 1.0])
def test_share_of_every_object_stays_visible(min_visible: float) -> None:
    """With equal opaque squares, not rotated, the whole of an object is known."""
    settings = Settings(
        size=96, objects=(5, 8), scale=(0.4, 0.4), rotation=0.0, min_visible=min_visible, brightness=0.0
    )
    whole = round(0.4 * 96) ** 2
    numbers, least = set(), 1.0
    for seed in range(30):
        composite = compose(
            np.random.default_rng(seed), [[plain_sprite()]], [Image.new("RGB", (96, 96), "blue")], settings
        )
        areas = [entry["area"] for entry in describe_objects(composite.owner, composite.labels, 1)]
        numbers.add(len(areas))
        least = min(least, *(area / whole for area in areas))
    assert least >= min_visible
    assert max(numbers) > 2
    assert least == 1 if min_visible == 1 else least < 1  # objects do overlap where they may


def test_opaque_object_has_its_own_colour_and_background_is_untouched() -> None:
    settings = Settings(size=64, objects=(1, 1), rotation=0.0, brightness=0.0)
    image, owner, labels = compose(
        np.random.default_rng(0), [[plain_sprite()]], [Image.new("RGB", (64, 64), "blue")], settings
    )
    assert labels == [1]
    assert (np.asarray(image)[owner == 1] == (200, 10, 10)).all()
    assert (np.asarray(image)[owner == 0] == (0, 0, 255)).all()


def test_half_transparent_pixels_are_mixed_and_belong_to_the_object_from_one_half() -> None:
    settings = Settings(size=64, objects=(1, 1), scale=(40 / 64, 40 / 64), rotation=0.0, brightness=0.0)  # as it is
    for alpha, is_object in ((128, True), (127, False)):
        pixels = np.full((40, 40, 4), (255, 0, 0, 255), np.uint8)
        pixels[:, 20:, 3] = alpha
        sprite = Sprite("half", Image.fromarray(pixels))
        image, owner, _ = compose(np.random.default_rng(1), [[sprite]], [Image.new("RGB", (64, 64), "blue")], settings)
        mixed = np.abs(np.asarray(image).astype(int) - (alpha, 0, 255 - alpha)).max(-1) <= 1
        assert mixed.sum() >= 20 * 30  # at most a quarter sticks out
        assert (owner[mixed] == is_object).all()


def test_small_cut_outs_are_not_enlarged_more_than_twice() -> None:
    settings = Settings(size=512, objects=(1, 1), scale=(0.9, 1.0), rotation=0.0)
    composite = compose(np.random.default_rng(0), [[plain_sprite(50)]], [Image.new("RGB", (512, 512))], settings)
    assert describe_objects(composite.owner, composite.labels, 1)[0]["bbox"][2:] == [100, 100]


def test_object_without_a_place_is_left_out() -> None:
    settings = Settings(size=64, objects=(8, 8), scale=(1.0, 1.0), rotation=0.0, min_visible=1.0)
    composite = compose(np.random.default_rng(0), [[plain_sprite()]], [Image.new("RGB", (64, 64))], settings)
    assert len(composite.labels) == len(describe_objects(composite.owner, composite.labels, 1)) <= 1


# -- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("animals/mammals/bovines/gnu-baby-stand.png", "gnu"),
        ("gnu_2.png", "gnu"),
        ("Strawberry2.png", "strawberry"),
        ("001penny.png", "penny"),
        ("5_jupiter.png", "jupiter"),
        ("020.png", ""),
        ("summer_1am.jpg", "summer"),
    ],
)
def test_family_is_the_first_word_of_the_file_name(name: str, word: str) -> None:
    assert family(name) == word


def test_families_are_never_divided_and_the_share_is_kept() -> None:
    names = [f"flower{i}.png" for i in range(10)] + [f"{word}.png" for word in "abcdefghij"]
    for seed in range(20):
        train, val = split_families(names, 0.25, np.random.default_rng(seed))
        assert sorted(train + val) == sorted(names)
        assert len(val) == 5  # single names fill the quarter; the ten flowers never fit
        assert not {family(name) for name in train} & {family(name) for name in val}


def test_smallest_family_is_kept_for_validation_if_none_fits() -> None:
    assert split_families(["a1", "a2", "b1"], 0.25, np.random.default_rng(0)) == (["a1", "a2"], ["b1"])


def test_single_family_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="a1, a2 cannot be divided: their names begin with the same word"):
        split_families(["a1", "a2"], 0.25, np.random.default_rng(0))


def test_cut_outs_are_cropped_and_repeated_small_and_excluded_ones_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "animals" / "insects"
    folder.mkdir(parents=True)
    for name, number in (("ash", 0), ("birch", 1), ("same", 0), ("Brown_slug", 2), ("elm_mirror", 3)):
        draw_sprite("disc", number).save(folder / f"{name}.png")
    draw_sprite("disc", 4).resize((30, 30)).save(folder / "small.png")
    Image.new("RGBA", (90, 90)).save(folder / "empty.png")
    found = read_sprites(tmp_path, {"insect": CLASSES["insect"]})
    assert [(sprite.name, sprite.image.size) for sprite in found["insect"]] == [
        ("animals/insects/ash.png", (49, 49)),
        ("animals/insects/birch.png", (53, 53)),
    ]


def test_cut_out_without_alpha_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"photo\.png has no alpha channel, so nothing says where its object ends"):
        read_sprites(tmp_path, {"any": ("*.png",)})


def test_empty_class_is_refused(drawn_sources: Path) -> None:
    with pytest.raises(
        ValueError, match=r"class 'tree' must have two cut-outs of at least 40 .* got 0 .* tree/\*\.png"
    ):
        read_sprites(drawn_sources / "sprites", {"tree": ("tree/*.png",)})


def test_missing_folders_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"of cut-outs; fetch them: python tools/get_data\.py stamps"):
        read_sprites(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"of backgrounds; fetch some: python tools/get_data\.py photographs"):
        read_backgrounds(tmp_path / "none", 64)


def test_backgrounds_are_reduced_to_two_pictures(drawn_sources: Path, tmp_path: Path) -> None:
    assert {image.size for image in read_backgrounds(drawn_sources / "backgrounds", 64).values()} == {(150, 100)}
    assert {image.size for image in read_backgrounds(drawn_sources / "backgrounds", 40).values()} == {(120, 80)}
    with pytest.raises(ValueError, match=r"at least 128 x 128, .*sea\.png is 150 x 100"):
        read_backgrounds(drawn_sources / "backgrounds", 128)
    with pytest.raises(ValueError, match="must be two backgrounds, one to train and one to validate, got 0"):
        read_backgrounds(tmp_path, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 16}, "size must be at least 32, got 16"),
        ({"objects": (3, 2)}, r"objects must be a smallest and a largest value, got \(3, 2\)"),
        ({"objects": (0, 2)}, "objects must be at least 1, got 0"),
        ({"objects": (1, 256)}, "objects must be at most 255, got 256"),
        ({"scale": (0.0, 0.5)}, r"scale must be in \(0, 1\], got 0"),
        ({"scale": (0.5, 1.5)}, r"scale must be in \(0, 1\], got 1.5"),
        ({"min_visible": 0.0}, r"min_visible must be in \(0, 1\], got 0"),
        ({"val_share": 1.0}, r"val_share must be in \(0, 1\), got 1"),
        ({"brightness": 1.0}, r"brightness must be in \[0, 1\), got 1"),
        ({"rotation": 200.0}, r"rotation must be in \[0, 180\] degrees, got 200"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_numbers_of_pictures_and_classes_are_checked(drawn_sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val must be at least 1, got 0"):
        make(drawn_sources, tmp_path / "set", val=0)
    with pytest.raises(ValueError, match="there must be 1 to 255 classes, since label maps have 8 bits, got 0"):
        make(drawn_sources, tmp_path / "set", classes={})


def test_exclusions_are_of_the_stamps_alone() -> None:
    """Somebody's own class folders are not thinned out behind their back."""
    for name in ("vehicles/construction/7spoke256", "symbols/money/us/coins/dime_mirror", "space/planets/0_sun"):
        assert EXCLUDED.fullmatch(name)
    for name in ("disc/wings", "disc/elm_mirror", "vehicles/farming/cartoon/tux_tractor", "space/planets/5_jupiter"):
        assert not EXCLUDED.fullmatch(name)


# -- readers of other libraries --------------------------------------------------------------------------


def test_torchvision_reads_boxes_and_pycocotools_the_masks(drawn_set: Path) -> None:
    pytest.importorskip("pycocotools")
    dataset = open_dataset("composites", drawn_set, "val")
    content = coco(drawn_set, "validation")
    assert len(dataset) == 5
    for index, (image, objects) in enumerate(dataset):
        assert image.size == (SIZE, SIZE)
        own = [entry for entry in content["annotations"] if entry["image_id"] == dataset.ids[index]]
        assert objects == own
        for entry in objects:
            assert np.array_equal(dataset.coco.annToMask(entry), decode_rle(entry["segmentation"]))


def test_perfect_detections_have_an_average_precision_of_one(
    drawn_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A law of the measure: the annotations, given back as detections with score 1, are all right."""
    pytest.importorskip("pycocotools")
    from pycocotools.cocoeval import COCOeval

    truth = open_dataset("composites", drawn_set, "train").coco
    answers = [entry | {"score": 1.0} for entry in truth.dataset["annotations"]]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes([dict(answer) for answer in answers]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_mmdet_reads_boxes_and_masks_unchanged(drawn_set: Path) -> None:
    pytest.importorskip("mmdet")
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules
    from mmengine.registry import init_default_scope

    register_all_modules(init_default_scope=False)
    init_default_scope("mmdet")
    dataset = CocoDataset(
        data_root=str(drawn_set),
        ann_file="annotations/instances_training.json",
        data_prefix={"img": "images/training/"},
        metainfo={"classes": tuple(PATTERNS)},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "PackDetInputs"},
        ],
    )
    content = coco(drawn_set, "training")
    assert len(dataset) == 12
    for i, image in enumerate(content["images"]):
        instances = dataset[i]["data_samples"].gt_instances
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (entry["bbox"] for entry in own)]
        assert instances.bboxes.tensor.tolist() == [list(map(float, box)) for box in corners]
        assert instances.labels.tolist() == [entry["category_id"] - 1 for entry in own]
        masks = [decode_rle(entry["segmentation"]) for entry in own]
        assert np.array_equal(instances.masks.to_ndarray().astype(bool), np.array(masks))


@pytest.mark.parametrize("reduce_zero_label", [True, False])
def test_mmseg_reads_label_maps_unchanged(drawn_set: Path, reduce_zero_label: bool) -> None:
    pytest.importorskip("mmseg")
    from mmengine.registry import init_default_scope
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    classes = tuple(PATTERNS) if reduce_zero_label else ("background", *PATTERNS)
    dataset = BaseSegDataset(
        data_root=str(drawn_set),
        data_prefix={"img_path": "images/validation", "seg_map_path": "annotations/validation"},
        metainfo={"classes": classes, "palette": [[i, i, i] for i in range(len(classes))]},
        reduce_zero_label=reduce_zero_label,
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}],
    )
    assert len(dataset) == 5
    for i, (_, labels) in enumerate(open_dataset("ade20k", drawn_set, "val")):
        expected = np.asarray(labels)
        if reduce_zero_label:
            expected = np.where(expected == 0, 255, expected - 1)
        assert np.array_equal(dataset[i]["data_samples"].gt_sem_seg.data[0].numpy(), expected)


# -- the tool --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("make_composites")


def test_tool_makes_a_set_of_own_cut_outs_and_a_sheet(
    tool: ModuleType, drawn_sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--sprites", str(drawn_sources / "sprites"), "--backgrounds", str(drawn_sources / "backgrounds")]
    numbers = ["--train", "2", "--val", "3", "--size", "64", "--classes", "disc", "bar"]
    files = ["--out", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]
    assert tool.main([*own, *numbers, *files]) == 0
    printed = capsys.readouterr().out
    assert "training: 2 pictures on 3 backgrounds" in printed
    assert "objects from 4 cut-outs" in printed
    assert (tmp_path / "set" / "classes.txt").read_text() == "disc\nbar\n"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 64, 3 * 64)


def test_tool_ends_with_status_2_and_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--out", str(tmp_path / "set"), "--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("make_composites: error: there is no folder")
    assert tool.main(["--out", str(tmp_path / "set"), "--classes", "tree"]) == 2
    assert "unknown classes tree; there are bird, insect" in capsys.readouterr().err
