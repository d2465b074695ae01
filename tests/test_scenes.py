"""Objects on photographs: a function of split, seed and index; true boxes and masks; splits that share nothing.

The banks are drawn here, but for `TestFetched`, which reads the fetched sources where they are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from data import cutouts
from data.cutouts import CLASSES, CONTENT, SIDE, SPLITS, Split, emoji_codes, family, make_bank, make_scenery, open_split
from data.labelled_scenes import LabelledScenes
from data.scenes import (
    COVERAGE,
    MAX_HIDDEN,
    MAX_MARGIN,
    SIZE,
    Cutouts,
    crop_scenery,
    draw_scenes,
    patch_coverage,
    scene_labels,
    uniforms,
)
from data.sources import SOURCES, default_root, emoji_code
from drawn_scenes import drawn_split
from drawn_set import draw_sprite
from PIL import Image, ImageDraw
from scripts import load_tool
from torch.nn import functional as F
from torch.utils.data import DataLoader

import effvit
from effvit.data.labelled import digest
from effvit.data.preparation import load_images
from effvit.measure.accuracy import top1
from effvit.measure.evaluation import EvaluationOptions, Selection, evaluate


@pytest.fixture(scope="module")
def parts() -> Split:
    return drawn_split()


class TestScenes:
    def test_image_is_the_same_in_every_batch(self, parts: Split) -> None:
        indices = [*range(40), 10**12, 3]
        whole = draw_scenes(parts, "train", indices)
        for size in (1, 5, 17):
            chunks = [draw_scenes(parts, "train", indices[i : i + size]) for i in range(0, len(indices), size)]
            for once, again in zip(whole, zip(*chunks, strict=True), strict=True):
                assert torch.equal(once, torch.cat(again))
        assert torch.equal(whole.images[3], whole.images[-1])

    def test_seed_split_and_index_each_make_another_image(self, parts: Split) -> None:
        base = draw_scenes(parts, "train", range(8)).images
        for others in (
            draw_scenes(parts, "train", range(8), seed=1),
            draw_scenes(parts, "test", range(8)),
            draw_scenes(parts, "train", range(8, 16)),
        ):
            assert all(not torch.equal(a, b) for a in base for b in others.images)

    def test_image_is_the_same_with_several_threads(self, parts: Split) -> None:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = draw_scenes(parts, "train", range(64))
            torch.set_num_threads(2)
            two = draw_scenes(parts, "train", range(64))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    def test_image_is_the_same_inside_autocast(self, parts: Split) -> None:
        """In bfloat16 the sums of resampling would not be exact."""
        outside = draw_scenes(parts, "train", range(20))
        with torch.autocast("cpu", torch.bfloat16):
            inside = draw_scenes(parts, "train", range(20))
        assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))

    def test_boxes_are_the_extents_of_masks(self, parts: Split) -> None:
        scenes = draw_scenes(parts, "train", range(200))
        for mask, box in zip(scenes.masks, scenes.boxes.tolist(), strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]

    def test_every_class_is_drawn_equally_often(self, parts: Split) -> None:
        counts = draw_scenes(parts, "train", range(600)).labels.bincount(minlength=3)
        assert counts.sum() == 600
        assert (counts > 200 - 5 * (600 * 2 / 9) ** 0.5).all()  # five standard deviations

    def test_object_covers_the_share_of_the_image_that_was_asked_for(self) -> None:
        """A full square on its own: its mask is its outline, up to a pixel of its border."""
        square = Image.new("RGBA", (30, 30), (200, 0, 0, 255))
        dust = Image.new("RGBA", (1, 1), (0, 0, 0, 9))  # too faint to hide anything
        scenes = draw_scenes(drawn_split([dust], [[("square", square)]]), "train", range(300))
        share = scenes.masks.flatten(1).double().mean(1)
        border = 4 * share.sqrt() / SIZE
        assert (share >= COVERAGE[0] - border).all()
        assert (share <= COVERAGE[1] + border).all()
        assert share.min() < 0.05
        assert share.max() > 0.2

    def test_mask_shows_the_object(self) -> None:
        """Green objects on grey photographs, magenta distractors: green exceeds the others where the mask says so."""
        green = Image.new("RGBA", (30, 30), (0, 255, 0, 255))
        magenta = Image.new("RGBA", (30, 30), (255, 0, 255, 255))
        scenes = draw_scenes(drawn_split([magenta], [[("green", green)]]), "train", range(200))
        red, middle, blue = scenes.images.int().unbind(1)
        excess = middle - torch.maximum(red, blue)
        assert (excess[scenes.masks] > 40).float().mean() > 0.97  # the rest is its soft border
        assert (excess[~scenes.masks] > 100).float().mean() < 0.01

    def test_distractors_never_hide_more_than_a_third(self) -> None:
        """Full squares as both: what is missing of a mask's box is hidden."""
        square = Image.new("RGBA", (30, 30), (0, 255, 0, 255))
        other = Image.new("RGBA", (30, 30), (255, 0, 0, 255))
        objects = [[("square", square)]]
        scenes = draw_scenes(drawn_split([other], objects), "train", range(500))
        alone = draw_scenes(drawn_split([Image.new("RGBA", (1, 1), (0, 0, 0, 9))], objects), "train", range(500))
        left = scenes.masks.sum((1, 2)) / alone.masks.sum((1, 2))
        assert left.min() >= 1 - MAX_HIDDEN
        assert ((left > 0.7) & (left < 0.99)).any()  # some are hidden in part
        assert not (scenes.masks & ~alone.masks).any()

    def test_coverage_of_patches_is_the_mean_of_their_pixels(self, parts: Split) -> None:
        masks = draw_scenes(parts, "train", range(20)).masks
        coverage = patch_coverage(masks, 8)
        assert coverage.shape == (20, 144)
        for row, column in ((0, 0), (5, 7), (11, 11)):
            patch = masks[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(coverage[:, 12 * row + column], patch.float().mean((1, 2)))
        with pytest.raises(ValueError, match=r"patch_size must divide the sides \(96, 96\) of the masks, got 7"):
            patch_coverage(masks, 7)

    @pytest.mark.parametrize("margin", [1, 4, MAX_MARGIN])
    def test_margin_is_around_the_same_objects(self, parts: Split, margin: int) -> None:
        """On photographs of one colour, which look the same everywhere, the middle is the image to the last bit."""
        plain = make_scenery({"grey": Image.new("RGB", (900, 620), (90, 120, 150))})
        alike = parts._replace(scenery=plain)
        image, wide = (draw_scenes(alike, "train", range(60), margin=m) for m in (0, margin))
        inner = slice(margin, margin + SIZE)
        assert wide.images.shape == (60, 3, SIZE + 2 * margin, SIZE + 2 * margin)
        assert torch.equal(wide.images[..., inner, inner], image.images)
        assert torch.equal(wide.masks[..., inner, inner], image.masks)
        assert wide.masks.sum() == image.masks.sum()  # the labelled object lies inside the image
        assert torch.equal(wide.boxes, image.boxes + margin)
        assert torch.equal(wide.labels, image.labels)
        margins = wide.images.clone()
        margins[..., inner, inner] = margins[..., :1, :1]
        assert (margins != margins[..., :1, :1]).any()  # a distractor reaches into it

    def test_margin_shows_the_photograph(self) -> None:
        """A photograph whose red counts columns and green rows: both go on by one a pixel through the margin."""
        ramp = np.zeros((120, 200, 3), dtype=np.uint8)
        ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(120)[:, None]
        scenery = make_scenery({"ramp": Image.fromarray(ramp)})
        draws = torch.zeros(1, 12)
        draws[:, 5:9] = torch.tensor([0.8, 0.5, 0.5, 0.5])  # contrast and colours as they are
        draws[:, 9] = 0.5
        for uniform in (0.0, 0.999):
            draws[:, 2:4] = uniform
            crop = crop_scenery(scenery, torch.tensor([0]), draws, margin=4)[0].permute(0, 2, 1)  # (L, L, 3)
            steps = (crop[:, 1:, 0] - crop[:, :-1, 0], crop[1:, :, 1] - crop[:-1, :, 1])
            assert all(torch.allclose(step, torch.tensor(1 / 255), atol=1e-6) for step in steps)

    def test_margin_without_room_is_refused(self, parts: Split) -> None:
        with pytest.raises(ValueError, match="margin must be at most 12, since the smallest photographs have 120 pix"):
            draw_scenes(parts, "train", [0], margin=13)
        with pytest.raises(ValueError, match="margin must be at least 0, got -1"):
            draw_scenes(parts, "train", [0], margin=-1)

    def test_labels_are_known_without_an_image(self, parts: Split) -> None:
        assert torch.equal(scene_labels(parts, "test", range(50), 3), draw_scenes(parts, "test", range(50), 3).labels)

    def test_numbers_are_those_of_splitmix64(self) -> None:
        """The first outputs for seed 1234567, as the author's C code prints them."""
        from data.scenes import mix, shift

        states = torch.tensor(1234567) + torch.arange(1, 4) * (0x9E3779B97F4A7C15 - (1 << 64))
        outputs = [value % (1 << 64) for value in mix(states).tolist()]
        assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
        assert shift(torch.tensor(-1), 60).item() == 15

    def test_numbers_are_uniform(self) -> None:
        values = uniforms(0, 0, torch.arange(4000), 5)
        assert ((values >= 0) & (values < 1)).all()
        assert torch.allclose(values.mean(0), torch.full((5,), 0.5, dtype=torch.float64), atol=5 / (12 * 4000) ** 0.5)
        assert values.T.corrcoef().triu(1).abs().max() < 5 / 4000**0.5

    @pytest.mark.parametrize("indices", [[-1], [], [[1]], [3, -2]])
    def test_indices_that_no_image_has_are_refused(self, parts: Split, indices: Any) -> None:
        with pytest.raises(ValueError, match="indices must be whole numbers of at least 0, and there must be one"):
            draw_scenes(parts, "train", indices)

    def test_negative_seed_is_refused(self, parts: Split) -> None:
        with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
            draw_scenes(parts, "train", [0], seed=-1)


class TestDataset:
    def test_loader_gives_what_is_drawn(self, parts: Split) -> None:
        dataset = Cutouts("test", length=20, parts=parts)
        drawn = draw_scenes(parts, "test", range(20))
        for workers in (0, 1):
            batches = list(DataLoader(dataset, batch_size=8, num_workers=workers))
            assert torch.equal(torch.cat([images for images, _ in batches]), drawn.images)
            assert torch.equal(torch.cat([labels for _, labels in batches]), drawn.labels)
        image, label = dataset[7]
        assert torch.equal(image, drawn.images[7])
        assert label == drawn.labels[7]

    def test_unknown_split_and_empty_set_are_refused(self, parts: Split) -> None:
        with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
            Cutouts("val", length=1, parts=parts)
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            Cutouts("train", length=0, parts=parts)

    def test_missing_sources_are_named_with_the_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "emoji").mkdir()
        (tmp_path / "emoji" / "source.json").touch()
        with pytest.raises(
            FileNotFoundError,
            match=r"no fashion_mnist and no photographs; fetch: .*get_data\.py fashion_mnist photographs",
        ):
            Cutouts("train", tmp_path, length=1)


class TestLabelled:
    """Scenes as ``evaluate`` takes them."""

    def test_images_and_labels_are_what_is_drawn_in_any_order(self, parts: Split) -> None:
        images = LabelledScenes(Cutouts("test", length=40, parts=parts))
        drawn = draw_scenes(parts, "test", range(40))
        assert len(images) == 40
        assert images.labels == drawn.labels.tolist()
        assert images.place == "cutouts, split test, seed 0"
        for index in (3, 20, 4, 39, 16, 15):
            images.check(index)
            assert np.array_equal(np.asarray(images.read(index)), drawn.images[index].permute(1, 2, 0))
            assert images.size(index) == drawn.images[index].numel()

    def test_digest_tells_splits_and_seeds_apart(self, parts: Split) -> None:
        sets = [Cutouts("test", length=5, parts=parts, seed=seed) for seed in (0, 1)]
        sets.append(Cutouts("train", length=5, parts=parts))
        assert len({digest(LabelledScenes(scenes), range(5)) for scenes in sets}) == 3

    def test_evaluate_neither_resizes_nor_crops_them(self, parts: Split) -> None:
        """What a model gets is the pixels under the model's own mean and standard deviation, and nothing else."""
        model = timm.create_model("vit_nano_patch8_96", num_classes=3)
        images = LabelledScenes(Cutouts("test", length=6, parts=parts))
        mean, std = torch.tensor(model.pretrained_cfg["mean"]), torch.tensor(model.pretrained_cfg["std"])
        drawn = draw_scenes(parts, "test", range(6)).images / 255
        expected = (drawn - mean[:, None, None]) / std[:, None, None]
        assert torch.equal(load_images(model, [images.read(index) for index in range(6)]), expected)

    def test_evaluate_counts_right_answers_on_them(self, parts: Split) -> None:
        """As a count over the drawn images does, with a reduced model and a control beside the dense one."""
        dense = timm.create_model("vit_nano_patch8_96", num_classes=3).eval()
        images = LabelledScenes(Cutouts("test", length=20, parts=parts))
        models = {"dense": dense, "hot": effvit.sparsify(dense, "hot", keep_rate=0.5)}
        record = evaluate(models, Selection.of(images), EvaluationOptions(batch_size=8), controls=["uniform"])
        assert [model.name for model in record.models] == ["dense", "hot", "hot, control uniform"]
        batch = load_images(dense, [images.read(index) for index in range(20)]), torch.tensor(images.labels)
        assert top1(models, [batch]) == {model.name: model.accuracy.value for model in record.models[:2]}


class TestBanks:
    def test_cut_out_fills_the_bank_and_keeps_its_shape(self) -> None:
        image = Image.new("RGBA", (50, 40))
        ImageDraw.Draw(image).rectangle((10, 5, 29, 14), (10, 20, 30, 255))  # 20 x 10
        bank = make_bank([[("bar", image)]])
        assert bank.pixels.shape == (1, SIDE, 4, SIDE)
        assert bank.extents.tolist() == [[CONTENT // 2, CONTENT]]
        assert bank.pixels[0, SIDE // 2, :, SIDE // 2].tolist() == [10, 20, 30, 255]
        assert bank.areas.item() == pytest.approx(CONTENT * CONTENT / 2, rel=0.05)  # its border is soft

    def test_colours_are_multiplied_by_opacity(self) -> None:
        bank = make_bank([[("glass", Image.new("RGBA", (20, 20), (200, 100, 0, 128)))]])
        assert bank.pixels[0, SIDE // 2, :, SIDE // 2].tolist() == [100, 50, 0, 128]

    def test_equal_cut_outs_count_once(self) -> None:
        a, b = draw_sprite("disc", 0), draw_sprite("cross", 0)
        bank = make_bank([[("a", a), ("again", a)], [("b", b), ("a in b", a)]])
        assert bank.names == ["a", "b"]
        assert bank.counts.tolist() == [1, 1]

    def test_class_without_a_cut_out_is_refused(self) -> None:
        with pytest.raises(ValueError, match="every class must have a cut-out, class 1 has none"):
            make_bank([[("a", draw_sprite("disc", 0))], []])
        with pytest.raises(ValueError, match="a cut-out must have an opaque pixel"):
            make_bank([[("nothing", Image.new("RGBA", (9, 9)))]])
        with pytest.raises(ValueError, match="there must be a photograph, got none"):
            make_scenery({})


class TestDivision:
    def test_skin_tone_gender_and_direction_make_no_other_family(self) -> None:
        cook = [emoji_code(code) for code in ("1F468-200D-1F373", "1F469-1F3FD-200D-1F373", "1F9D1-200D-1F373")]
        assert {family(code) for code in cook} == {"1f9d1-1f373"}
        runner = ("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FF-200D-2642-FE0F-200D-27A1-FE0F")
        assert {family(emoji_code(code)) for code in runner} == {"1f3c3"}
        assert family("1f44b-1f3fb") == "1f44b"
        assert family("1f1e7-1f1fb") == family("1f1f3-1f1f4")  # Bouvet Island flies Norway's
        assert family("1f1fa-1f1f8") != family("1f1fa-1f1e6")

    def test_families_are_divided_as_a_whole(self) -> None:
        """A made-up table: forty emoji of a subcategory, each in two skin tones."""
        table = [
            {
                "unified": f"1F4{n:02d}",
                "subcategory": "x",
                "short_name": f"emoji{n}",
                "skin_variations": {tone: {"unified": f"1F4{n:02d}-{tone}"} for tone in ("1F3FB", "1F3FF")},
            }
            for n in range(40)
        ]
        train, test = (emoji_codes(table, ("x",), split) for split in SPLITS)
        assert len(train) + len(test) == 120
        assert len(test) == 3 * round(cutouts.TEST_SHARE * 40)
        assert not {family(code) for code in train} & {family(code) for code in test}
        assert emoji_codes(table, ("x",), "test") == test
        with pytest.raises(ValueError, match=r"there must be two families, .* got \['1f400'\]"):
            emoji_codes(table[:1], ("x",), "train")

    def test_distractors_are_of_no_class(self) -> None:
        shown = {kind for kinds in cutouts.EMOJI_CLASSES.values() for kind in kinds}
        assert not shown & {*cutouts.OTHERS}
        assert "clothing" not in cutouts.OTHERS  # garments
        assert len(CLASSES) == len({*CLASSES}) == 25


def fetched() -> bool:
    return all((default_root() / name / "source.json").is_file() for name in cutouts.SOURCE_NAMES)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {split: open_split(split) for split in SPLITS}


@pytest.mark.skipif(not fetched(), reason="the sources of cutouts were not fetched")
class TestFetched:
    def test_every_class_has_enough_objects(self, splits: dict[str, Split]) -> None:
        assert len(splits["train"].objects.counts) == len(splits["test"].objects.counts) == len(CLASSES)
        assert splits["train"].objects.counts.min() >= 25
        assert splits["test"].objects.counts.min() >= 8

    def test_splits_share_no_family_no_drawing_and_no_photograph(self, splits: dict[str, Split]) -> None:
        train, test = splits["train"], splits["test"]
        assert not {*train.scenery.names} & {*test.scenery.names}
        assert not {*cutouts.UNUSED_PHOTOGRAPHS} & {*train.scenery.names, *test.scenery.names}
        assert {*test.scenery.names} == {*cutouts.TEST_PHOTOGRAPHS}
        drawings = [{row.numpy().tobytes() for bank in split[:2] for row in bank.pixels} for split in (train, test)]
        assert not drawings[0] & drawings[1]
        families = [
            {family(Path(name).name) for bank in split[:2] for name in bank.names if name.startswith("emoji/")}
            for split in (train, test)
        ]
        assert not families[0] & families[1]

    def test_no_distractor_is_of_a_class(self, splits: dict[str, Split]) -> None:
        table = json.loads((default_root() / "emoji" / "emoji.json").read_text())
        kinds = {emoji_code(emoji["unified"]): emoji["subcategory"] for emoji in table}
        for split in splits.values():
            assert {kinds[Path(name).name] for name in split.distractors.names} <= {*cutouts.OTHERS}

    def test_names_in_the_lists_are_those_of_the_table(self) -> None:
        table = json.loads((default_root() / "emoji" / "emoji.json").read_text())
        kinds = {kind for own in cutouts.EMOJI_CLASSES.values() for kind in own} | {*cutouts.OTHERS}
        assert kinds <= {emoji["subcategory"] for emoji in table}
        assert {emoji["short_name"] for emoji in table if emoji["subcategory"] in kinds} >= cutouts.EXCLUDED

    def test_images_are_the_same_in_another_process(self, splits: dict[str, Split]) -> None:
        code = (
            "import sys; sys.path.insert(0, 'tools'); from data.scenes import Cutouts\n"
            "print(int(Cutouts('test', length=1).scenes(range(9)).images.long().sum()))"
        )
        root = Path(__file__).resolve().parents[1]
        ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
        drawn = draw_scenes(splits["test"], "test", range(9))
        assert int(ended.stdout) == int(drawn.images.long().sum())


class TestTool:
    def test_grid_and_speed(
        self, parts: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tool = load_tool("show_scenes")
        monkeypatch.setattr("data.scenes.open_split", lambda *_: parts)
        out = tmp_path / "grid.png"
        assert tool.main(["--number", "12", "--out", str(out), "--speed", "130", "--first", "5"]) == 0
        assert re.fullmatch(r"[1-9]\d* images per second on 1 thread\n", capsys.readouterr().out)
        first = draw_scenes(parts, "train", [5]).images[0].permute(1, 2, 0)
        with Image.open(out) as grid:
            assert grid.size == (10 * 2 * SIZE, 2 * (2 * SIZE + 14))
            assert np.array_equal(np.asarray(grid)[: 2 * SIZE : 2, : 2 * SIZE : 2], first)

    def test_folder_is_a_labelled_set(
        self, parts: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tool = load_tool("show_scenes")
        monkeypatch.setattr("data.scenes.open_split", lambda *_: parts)
        monkeypatch.setattr(tool, "BATCH", 8)  # so that the last batch is smaller
        assert tool.main(["--first", "3", "--number", "20", "--folder", str(tmp_path)]) == 0
        drawn, files = draw_scenes(parts, "train", range(3, 23)), sorted(tmp_path.glob("*/*.png"), key=lambda f: f.stem)
        assert [path.stem for path in files] == [f"{index:06d}" for index in range(3, 23)]
        assert [path.parent.name for path in files] == [CLASSES[label] for label in drawn.labels]
        assert {path.name for path in tmp_path.iterdir()} == {*CLASSES}
        for path, pixels in zip(files, drawn.images, strict=True):
            with Image.open(path) as image:
                assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0))
        assert tool.main(["--first", "-1", "--folder", str(tmp_path)]) == 2
        assert "--first must be" in capsys.readouterr().err

    def test_missing_sources_end_with_a_sentence(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tool = load_tool("show_scenes")
        assert tool.main(["--root", str(tmp_path), "--speed", "1"]) == 2
        assert "python tools/get_data.py emoji fashion_mnist photographs" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            tool.main([])
        assert "say what to do: --out FILE.png, --folder DIR" in capsys.readouterr().err


class TestMmpretrain:
    @pytest.fixture
    def sets(self) -> Any:
        return pytest.importorskip("data.mmpretrain_sets", reason="the mm extra is not installed")

    def test_set_gives_what_is_drawn(self, sets: Any, parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data.scenes.open_split", lambda *_: parts)
        dataset = sets.CutoutScenes("test", 9)
        drawn = draw_scenes(parts, "test", range(9))
        assert dataset.metainfo["classes"] == CLASSES
        assert len(dataset) == 9
        for number, sample in enumerate(dataset.__getitems__(range(9))):
            assert torch.equal(sample["inputs"], drawn.images[number])
            assert sample["data_samples"].gt_label.tolist() == [drawn.labels[number]]
        assert torch.equal(dataset[4]["inputs"], drawn.images[4])

    def test_colours_are_exchanged_in_a_share_of_the_images(
        self, sets: Any, parts: Split, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("data.scenes.open_split", lambda *_: parts)
        drawn = draw_scenes(parts, "train", range(60))
        dataset = sets.CutoutScenes("train", 60, exchange_colours=0.5)
        samples = dataset.__getitems__(range(60))
        orders = set()
        for image, sample in zip(drawn.images, samples, strict=True):
            known = [order for order in permutations(range(3)) if torch.equal(sample["inputs"], image[list(order)])]
            assert len(known) == 1
            orders |= {*known}
        same = sum(torch.equal(image, own["inputs"]) for image, own in zip(drawn.images, samples, strict=True))
        assert 20 < same < 40  # 30 of 60, within 2.6 standard deviations
        assert len(orders) == 6
        assert torch.equal(dataset[7]["inputs"], samples[7]["inputs"])

    @pytest.mark.parametrize("share", [0.0, 1.5])
    def test_a_share_outside_of_its_range_is_refused(
        self, sets: Any, parts: Split, share: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("data.scenes.open_split", lambda *_: parts)
        with pytest.raises(ValueError, match=rf"exchange_colours must be in \(0, 1\], got {share}"):
            sets.CutoutScenes("train", 9, exchange_colours=share)

    def test_patches_are_labelled_by_what_covers_them(
        self, sets: Any, parts: Split, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("data.scenes.open_split", lambda *_: parts)
        samples = sets.CutoutScenes("train", 9, patch_size=8).__getitems__(range(9))
        drawn = draw_scenes(parts, "train", range(9))
        for mask, label, sample in zip(drawn.masks, drawn.labels, samples, strict=True):
            patches = mask.unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1).flatten(1).sum(1)  # (144,), pixels of 64
            found = sample["data_samples"].patch_label
            assert torch.equal(found == label, patches >= 32)
            assert torch.equal(found == len(CLASSES), patches == 0)
            assert torch.equal(found == -100, (patches > 0) & (patches < 32))
        with pytest.raises(AttributeError, match="patch_label"):
            sets.CutoutScenes("train", 9)[0]["data_samples"].patch_label  # noqa: B018

    def test_a_classifier_taught_by_patches_is_timm_s_model_beside_one_head(self, sets: Any, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = sets.PatchTaughtClassifier(
            "vit_nano_patch8_96", num_classes=25, patch_weight=2.0, background_weight=0.25
        )
        samples = [sets.DataSample().set_gt_label(label) for label in (3, 7)]
        for sample in samples:
            sample.patch_label = torch.full((144,), sets.UNTAUGHT)
            sample.patch_label[:2] = torch.tensor([sample.gt_label.item(), 25])
        inputs = torch.randn(2, 3, 96, 96)
        losses = classifier.loss(inputs, samples)
        tokens = classifier.model.forward_features(inputs)
        assert torch.allclose(losses["loss"], F.cross_entropy(classifier(inputs), torch.tensor([3, 7])))
        # Of an image, half of whose two labelled patches weigh a quarter: 2 (own + 1/4 background) / (1 + 1/4)
        negative = -classifier.model.patch_head(tokens[:, 1:3]).log_softmax(-1)  # (2, 2, 26)
        expected = 2 * (negative[[0, 1], 0, [3, 7]] + negative[:, 1, 25] / 4).sum() / 2.5
        assert torch.allclose(losses["patch_loss"], expected)

        path, out = tmp_path / "epoch_1.pth", tmp_path / "exported.safetensors"
        torch.save({"state_dict": classifier.state_dict()}, path)
        tool = load_tool("export_weights")
        order = [str(path), "--model", "vit_nano_patch8_96", "--out", str(out)]
        assert tool.main(order) == 2  # the head of the patches is none of the model's
        assert tool.main([*order, "--without", "patch_head"]) == 0
        assert tool.main([*order, "--without", "patch"]) == 2
        exported = timm.create_model("vit_nano_patch8_96", checkpoint_path=str(out)).state_dict()
        assert {*exported} == {name for name in classifier.state_dict() if not name.startswith("patch_head.")}

    def test_epochs_are_ranges_that_follow_each_other(self, sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        sampler = sets.FreshSampler(range(10), first_epoch=2)
        assert [*sampler] == [*range(20, 30)]
        sampler.set_epoch(3)
        assert [*sampler] == [*range(50, 60)]
        assert len(sampler) == 10
        for rank, own in enumerate(([50, 53, 56, 59], [51, 54, 57], [52, 55, 58])):
            monkeypatch.setattr(sets, "get_dist_info", lambda rank=rank: (rank, 3))
            part = sets.FreshSampler(range(10), first_epoch=5)
            assert [*part] == own
            assert len(part) == len(own)
        with pytest.raises(ValueError, match="first_epoch must be at least 0, got -1"):
            sets.FreshSampler(range(10), first_epoch=-1)


def test_sources_are_known() -> None:
    assert {*cutouts.SOURCE_NAMES} <= {*SOURCES}
