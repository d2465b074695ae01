"""Crops and videos behind towers: their modules, what they cost by two counts, and what commands measure and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hosts import make_host, make_images
from PIL import Image
from test_selection_costs import STATIC, make_tower
from test_towers import SIZES, build
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import effvit
from effvit.cli import main
from effvit.hosts.stages import ALONE, DROPPED, MERGED
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.costs import handed_over, profile
from effvit.measure.flops import count_flops
from effvit.measure.reader import Reader
from effvit.measure.records import read_profiles
from effvit.measure.selections import Exit, Selecting, Views, all_tokens, list_selections, select
from effvit.protocols import views_of
from effvit.selectors import QueryPooler
from effvit.selectors.hired import share_budget
from effvit.selectors.parts import Parts, PartSelector
from effvit.show.crops import crops_figure, parts_figure
from effvit.show.named_images import find_images
from effvit.show.report import write_report
from effvit.show.video import video_figure, video_stage

NANO = "vit_nano_patch4_28"  # 7 x 7 patches; weights and images come with the package
BAG = "fashion_mnist:bag-0"
SIZE = (3, 48, 48)
FEW = {"prumerge": {"neighbours": 4}, "prumerge_plus": {"neighbours": 4}}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny models gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(number: int) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(0))


def clip(frames: int = 4) -> Tensor:
    """Frames of which the left half stays the same."""
    x = images(frames)
    x[:, :, :, :24] = x[:1, :, :, :24]
    return x


def cropped(method: Any, tower: nn.Module | None = None, **asked: Any) -> effvit.CropSelector:
    return effvit.CropSelector(make_tower() if tower is None else tower, method, **({"crops": (2, 3)} | asked)).eval()


def video(method: Any, tower: nn.Module | None = None, **asked: Any) -> effvit.VideoSelector:
    return effvit.VideoSelector(make_tower() if tower is None else tower, method, **({"frames": 4} | asked)).eval()


def check_agreement(module: nn.Module, size: tuple[int, int, int] = SIZE) -> dict[str, int]:
    """The closed form and the count on a trace; the terms of the closed form."""
    terms = closed_form_macs(module, size)
    assert sum(terms.values()) == count_flops(module, size, strict=True).total
    return terms


class TestModules:
    @pytest.mark.parametrize(
        ("method", "asked"), [("hired", {"keep": 0.3}), ("globalcom2", {"keep": 0.3}), ("visionzip", {"keep": 9})]
    )
    def test_crops_are_those_of_select_parts(self, method: str, asked: dict[str, Any]) -> None:
        tower = make_tower()
        found = cropped(method, tower, **asked)(images(7))
        expected = effvit.select_parts(tower, images(7), method, crops=(2, 3), **asked)
        assert torch.equal(found.canvas_ids(), expected.canvas_ids())
        assert torch.equal(found.selection.tokens, expected.selection.tokens)

    def test_the_size_of_the_image_tells_padding(self) -> None:
        tower = make_tower()
        found = cropped("globalcom2", tower, keep=0.3)(images(7), image_size=(20, 200))
        expected = effvit.select_parts(tower, images(7), "globalcom2", crops=(2, 3), keep=0.3, image_size=(20, 200))
        assert torch.equal(found.canvas_ids(), expected.canvas_ids())

    @pytest.mark.parametrize(("method", "keep"), [("holitom", 0.3), ("divprune", 9)])
    def test_videos_are_those_of_select_video(self, method: str, keep: float) -> None:
        tower = make_tower()
        found = video(method, tower, keep=keep)(clip())
        assert torch.equal(found.ids, effvit.select_video(tower, clip(), method, keep=keep).ids)

    def test_they_say_how_many_images_they_take_as_one(self) -> None:
        modules = cropped("hired", keep=0.3), cropped("divprune", keep=9, thumbnail=None), video("divprune", keep=9)
        assert [views_of(module) for module in (*modules, make_tower())] == [7, 6, 4, 1]
        assert modules[0].settings["crops"] == [2, 3]
        assert modules[2].settings["frames"] == 4

    @pytest.mark.parametrize("make", [cropped, video])
    def test_exports_choose_as_they_do_where_the_number_is_known(self, make: Any) -> None:
        module = make("visionzip", keep=9, contextual=2)
        x = images(module.views)
        exported = torch.export.export(module, (x,), strict=False).module()(x)
        pairs = zip(tree_leaves(exported), tree_leaves(module(x)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs if isinstance(other, Tensor))

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (cropped("hired", keep=0.3), "hired leaves as many tokens of a part as its image needs, so it cannot be"),
            (video("holitom", keep=0.3), "holitom leaves as many tokens as the video needs, so it cannot be"),
        ],
    )
    def test_numbers_that_depend_on_the_image_are_not_exported(self, module: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            torch.export.export(module, (images(module.views),), strict=False)

    def test_numbers_that_are_known_are_those_of_count_tokens(self) -> None:
        known = cropped("hired", keep=0.3, exact=True)
        count = effvit.count_tokens("hired", (6, 6), keep=0.3, frames=7, exact=True)
        assert known.count(SIZE[1:]) == count == int(known(images(7)).selection.counts.sum())
        assert cropped("hired", keep=0.3).count(SIZE[1:]) is None, "rounding down loses some"
        assert video("holitom", keep=0.3).count(SIZE[1:]) is None
        assert video("divprune", keep=9).count(SIZE[1:]) == 4 * 9
        assert cropped("hired", keep=1.0).keeps_all(SIZE[1:])

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: cropped("hired", crops=(2, 0), keep=0.3), ValueError, "crops must be at least 1, got 0"),
            (lambda: cropped("hired", crops=4, keep=0.3), TypeError, "crops must be two whole numbers, rows and"),
            (lambda: cropped("hired", keep=0.3, thumbnail=None), ValueError, "hired shares its budget by what the"),
            (lambda: cropped("hired", keep=9000), ValueError, "keep must be in 1 to 252, the cells of the grid, got"),
            (
                lambda: cropped("hired", crops=(2, 7), keep=0.3),
                ValueError,
                "by the cells of the thumbnail, 6 x 6 here, which show no part of some of 2 x 7 crops; cut at most",
            ),
            (lambda: cropped("hired", keep=0.3)(images(6)), ValueError, "2 x 3 crops and a thumbnail are 7 parts, got"),
            (lambda: cropped("holitom", keep=0.3)(images(7)), ValueError, "use effvit.select_video, or"),
            (lambda: video("holitom", keep=0.3, frames=0), ValueError, "frames must be at least 1, got 0"),
            (lambda: video("holitom"), ValueError, "holitom shares out a ratio, got keep=None; give a share"),
            (lambda: video("holitom", keep=9), ValueError, "holitom shares out a ratio, got keep=9; give a share"),
            (lambda: video("divprune", keep=9)(images(3)), ValueError, "for videos of 4 frames, got 3; make one with"),
        ],
    )
    def test_what_cannot_be_is_refused(self, make: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make()


class TestBudget:
    @pytest.mark.parametrize("seed", range(6))
    def test_what_rounding_leaves_over_goes_to_the_largest_remainders(self, seed: int) -> None:
        """Against giving it one by one; of equals to the crop in which more was found, then to the first."""
        generator = torch.Generator().manual_seed(seed)
        early, crops, cells = torch.rand(36, generator=generator), (2, 3), 36
        total = int(torch.randint(40, 7 * 36, (1,), generator=generator))
        whole, *shares = share_budget(early, (6, 6), crops, total, 0.4).tolist()
        rest = min(total - whole, 6 * cells)
        top = early.topk(int(36 * 0.6)).indices.tolist()
        found = [sum(cell // 6 // 3 * 3 + cell % 6 // 2 == crop for cell in top) for crop in range(6)]
        remainders = [number * rest % len(top) for number in found]
        while sum(shares) < rest:
            crop = max((i for i in range(6) if shares[i] < cells), key=lambda i: (remainders[i], found[i], -i))
            shares[crop], remainders[crop] = shares[crop] + 1, -1
        exact = share_budget(early, (6, 6), crops, total, 0.4, exact=True).tolist()
        assert exact == [total - rest, *shares]


class TestCounts:
    @pytest.mark.parametrize("method", STATIC)
    def test_counts_of_every_selector_agree_in_crops_and_frames(self, method: str) -> None:
        few = FEW.get(method, {})
        check_agreement(cropped(method, crops=(1, 2), keep=9, **few))
        check_agreement(video(method, frames=3, keep=9, **few))

    @pytest.mark.parametrize(
        ("method", "asked"),
        [
            ("hired", {"keep": 0.3}),
            ("hired", {"keep": 50, "exact": True, "alpha": 1.0}),
            ("hired", {"keep": 0.3, "merge": 2, "scores": "received"}),
            ("globalcom2", {"keep": 0.3, "thumbnail": "last"}),
            ("globalcom2", {"keep": 1.0, "block": 0}),
        ],
    )
    def test_counts_of_budgets_agree(self, method: str, asked: dict[str, Any]) -> None:
        check_agreement(cropped(method, **asked))

    def test_globalcom2_is_counted_by_hand(self) -> None:
        """A row of logits of 37 keys for each of 7 parts, and four taps for each of 6 x 36 cells."""
        terms = closed_form_macs(cropped("globalcom2", keep=0.3), SIZE)
        assert terms["selection"] == 7 * 37 * 32 + 4 * 6 * 36

    def test_hired_reads_two_blocks(self) -> None:
        assert closed_form_macs(cropped("hired", keep=0.3), SIZE)["selection"] == 2 * 7 * 37 * 32

    @pytest.mark.parametrize("case", ["qwen3 encoder", "deepseek encoder", "gemma4 soft"])
    def test_counts_of_towers_of_language_models_agree(self, case: str) -> None:
        check_agreement(cropped("divprune", build(case), crops=(1, 2), keep=3), (3, *SIZES[case.split()[0]]))

    @pytest.mark.parametrize("host", ["class_token", "eva02"])
    def test_counts_of_other_towers_agree(self, host: str) -> None:
        tower = make_host(host)
        check_agreement(cropped("hired", tower, keep=0.3), (3, *make_images(tower).shape[2:]))

    def test_positions_on_another_grid_are_made_once_for_all_views(self) -> None:
        tower = make_tower(dynamic_img_size=True)
        check_agreement(cropped("hired", tower, keep=0.3), (3, 64, 48))
        check_agreement(video("divprune", tower, keep=5), (3, 64, 48))

    def test_merging_over_time_is_counted_by_hand(self) -> None:
        """On a video of four frames of which half stays the same: the densities of 18 means, and their groups.

        Three parts: all pairs, those that leave against those that stay, and the weighted sums of these.
        """
        tower = make_tower(class_token=False, global_pool="avg", depth=1, pos_embed="none")
        nn.init.zeros_(tower.blocks[0].attn.proj.weight)  # each patch stays what it was without its neighbours
        module = video("holitom", tower, keep=0.3, block=0)
        selection = module(clip())
        still = 18
        into = int((selection.ids < 36).sum()) - int(np.ceil(18 * (0.3 / (1 - 18 * 3 / (4 * 36)))))
        left = still - into
        merging = still**2 * 32 + 2 * left * into * 32
        of_tower = check_agreement(video("uniform", tower, keep=1.0, block=0))
        reading = 4 * 36 * 36 * 32
        report = count_flops(module, SIZE, images=clip(), strict=True)
        assert report.total == sum(of_tower.values()) + reading + merging

    def test_a_video_has_to_be_looked_at(self) -> None:
        module = video("holitom", keep=0.3)
        assert module.adapts
        with pytest.raises(ValueError, match=r"holitom merges what stays the same, so its cost depends on the video"):
            closed_form_macs(module, SIZE)
        assert len(count_flops(module, SIZE, images=images(8), strict=True).per_image) == 2
        with pytest.raises(ValueError, match=r"takes 4 images as one, .*, got 6; leave out 2, or give 2 more"):
            count_flops(module, SIZE, images=images(6))

    def test_what_has_no_form_is_refused_by_name(self) -> None:
        class Half(PartSelector):
            name = "half"
            summary = "keep the first half of each part"

            def choose_parts(self, features: Any, parts: Parts, keep: Any) -> Tensor:
                return torch.arange(features.x.shape[1]).expand(features.x.shape[:2]) < features.x.shape[1] // 2

        with pytest.raises(TypeError, match="the selector 'half' has no closed form; give it a cost_parts"):
            closed_form_macs(cropped(Half()), SIZE)
        with pytest.raises(TypeError, match="the queries of llava_mini are made once for all 7 views"):
            closed_form_macs(cropped(QueryPooler(32, num_heads=2)), SIZE)


class TestProfile:
    def test_tokens_of_all_parts_are_handed_over_and_read(self) -> None:
        module, reader = cropped("hired", keep=0.3, exact=True), Reader(2, 24, 4)
        handed = handed_over(module, images(14), reader, 5)
        assert handed.tokens == 75  # int(0.3 * 7 * 36)
        assert handed.prefill_macs == reader.prefill_macs(75, 5)
        counts = [int(video("holitom", keep=0.3)(x).counts) for x in (clip(), images(4))]
        assert counts[0] != counts[1]
        found = handed_over(video("holitom", keep=0.3), torch.cat([clip(), images(4)]))
        assert found.tokens == sum(counts) / 2

    def test_one_image_is_measured_with_all_its_parts(self) -> None:
        tower, views = make_tower(), Views(crops=(2, 3))
        models = {
            "all": all_tokens(tower, Exit(), views),
            "hired": select(tower, Selecting("hired", 0.3, {}), Exit(), views),
        }
        record = profile(models, SIZE, 1, rounds=1, warmup=0, breakdown=True)
        everything, shared = record.models
        assert (everything.method, shared.method) == (None, "hired")
        assert everything.handed is not None
        assert everything.handed.tokens == 7 * 36
        assert everything.macs == 7 * count_flops(effvit.TokenSelector(tower, "uniform", keep=1.0), SIZE).total
        assert record.conditions.options["crops"] == [2, 3]
        assert "selection" in {part.block for part in shared.breakdown or ()}

    @pytest.mark.parametrize(
        ("batch_size", "other", "message"),
        [
            (
                8,
                None,
                "models that take 7 images as one, crops or frames, take one such group at a time, got batch_size=8",
            ),
            (1, 2, "take different numbers of them as one: all 7, other 2; measure them apart"),
        ],
    )
    def test_what_cannot_be_measured_together_is_refused(
        self, batch_size: int, other: int | None, message: str
    ) -> None:
        models: dict[str, nn.Module] = {"all": cropped("uniform", keep=1.0)}
        if other is not None:
            models["other"] = video("uniform", keep=1.0, frames=other)
        with pytest.raises(ValueError, match=message):
            profile(models, SIZE, batch_size, rounds=1, warmup=0)

    def test_command_measures_crops(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        command = ["profile", NANO, "--select", "hired", "globalcom2", "visionzip", "--crops", "2x2", "--keep", "0.2"]
        command += ["--images", BAG, "--rounds", "1", "--reader", "layers=2,width=24,heads=4", "--set", "exact=true"]
        assert main([*command, "--set", "contextual=2", "--json", str(path)]) == 0
        (record,) = read_profiles(path)
        handed = {model.method: model.handed for model in record.models}
        assert handed[None] is not None
        assert handed["hired"] is not None
        assert handed[None].tokens == 5 * 49
        assert handed["hired"].tokens == effvit.count_tokens("hired", (7, 7), keep=0.2, frames=5, exact=True)
        assert handed["hired"].prefill_macs == Reader(2, 24, 4).prefill_macs(49)
        printed = capsys.readouterr()
        assert "batch 1 (an image in 2 x 2 crops and a thumbnail), float32" in printed.out
        assert "globalcom2 keep=0.2: how many tokens are handed over depends on the images" in printed.err
        assert "hired" not in printed.err
        write_report([path], tmp_path / "report.html")

    def test_command_measures_videos(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        command = ["profile", NANO, "--select", "holitom", "divprune", "--frames", "3", "--keep", "0.3"]
        assert main([*command, "--images", "fashion_mnist:bag-*", "--rounds", "1", "--json", str(path)]) == 0
        (record,) = read_profiles(path)
        assert record.models[1].method == "holitom"
        assert record.conditions.options["frames"] == 3
        assert record.models[2].handed is not None
        assert record.models[2].handed.tokens == effvit.count_tokens("divprune", (7, 7), keep=0.3, frames=3)
        printed = capsys.readouterr()
        assert "batch 1 (a video of 3 frames)" in printed.out
        assert "videos/s" in printed.out
        assert "depends on the videos; the mean of those named is shown" in printed.err

    def test_learnt_queries_are_measured_with_new_weights(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "costs.json"
        command = ["profile", NANO, "--select", "llava_mini", "divprune", "--keep", "9", "--set", "grid_size=3"]
        command += ["--set", "num_heads=4", "--rounds", "1", "--batch-size", "1", "--json", str(path)]
        assert main(command) == 0
        (record,) = read_profiles(path)
        names = [NANO, "llava_mini grid_size=3 num_heads=4", "divprune keep=9"]
        assert [model.name for model in record.models] == names
        assert [model.handed.tokens for model in record.models if model.handed] == [49, 9, 9]
        assert "llava_mini: weights are made anew, which costs the same" in capsys.readouterr().err
        alone = list_selections(["llava_mini"], [9], [], untrained=True)
        assert [own.keep for own in alone] == [9], "alone it is told, and refused unless it is the queries' number"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--crops", "2x2"], "--crops belongs to a selection behind a tower; leave it out, or name a selector"),
            (["--frames", "0"], "--frames belongs to a selection behind a tower"),
            (
                ["--select", "hired", "--keep", "0.2", "--frames", "2"],
                "'hired' is for the crops of an image (--crops);",
            ),
            (
                ["--select", "holitom", "--keep", "0.2"],
                "'holitom' is for the frames of a video (--frames, --video); the",
            ),
            (
                ["--select", "holitom", "--keep", "0.2", "--crops", "2x2"],
                "'holitom' is for the frames of a video (--frames, --video); the selectors for the crops of an image",
            ),
            (["--select", "holitom", "--keep", "0.2", "--frames", "0"], "--frames must be at least 1, got 0"),
            (
                ["--select", "holitom", "--keep", "9", "--frames", "2"],
                "holitom shares out a ratio, got keep=9; give a share in (0, 1]",
            ),
            (
                ["--select", "hired", "--keep", "0.2", "--frames", "2", "--crops", "2x2"],
                "--crops cuts single images and --frames takes the frames of one video, got both; give one of them",
            ),
            (
                ["--select", "hired", "--keep", "0.2", "--crops", "8x1"],
                "the thumbnail, 7 x 7 here, which show no part of some of 8 x 1 crops; cut at most 7 x 7",
            ),
            (
                ["--select", "hired", "--keep", "0.2", "--crops", "2x2", "--batch-size", "8"],
                "take one such group at a time, got batch_size=8; give 1",
            ),
            (
                ["--select", "holitom", "--keep", "0.2", "--frames", "4", "--images", "fashion_mnist:bag-*"],
                "--images must name whole videos of --frames 4, got 6 images; name 4 of them",
            ),
        ],
    )
    def test_what_cannot_be_is_a_sentence(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert main(["profile", NANO, "--rounds", "1", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("text", ["2", "2x", "0x2", "2x2x2", "-1x2", "2x1.5"])
    def test_crops_are_rows_and_columns(self, capsys: pytest.CaptureFixture[str], text: str) -> None:
        with pytest.raises(SystemExit):
            main(["profile", NANO, "--select", "hired", "--keep", "0.2", f"--crops={text}"])
        assert (
            f"'{text}' is not ROWSxCOLUMNS, two whole numbers of at least 1; give e.g. 2x2" in capsys.readouterr().err
        )


class TestFigures:
    @pytest.mark.parametrize("method", ["hired", "visionzip"])
    def test_command_draws_crops_as_parts_figure_does(self, tmp_path: Path, method: str) -> None:
        keep: float = 0.3 if method == "hired" else 12
        command = ["visualize", BAG, "--model", NANO, "--pretrained", "--select", method, "--crops", "2x2"]
        assert main([*command, "--keep", str(keep), "--out", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("*.png")
        tower = timm.create_model(NANO, pretrained=True).eval()
        (bag,) = find_images([BAG])
        title = f"{method} keep={keep} in {NANO}"
        expected = parts_figure(tower, bag, method, crops=(2, 2), keep=keep, title=title)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))

    def test_a_figure_cuts_images_with_the_thumbnail_first(self) -> None:
        with pytest.raises(ValueError, match="cuts an image with its thumbnail first, got thumbnail='last'; make a"):
            crops_figure(cropped("hired", keep=0.3, thumbnail="last"), Image.new("RGB", (9, 9)))

    def test_stages_of_a_video_are_its_groups(self) -> None:
        """Of the still half all patches are merged over time; of the other a share is kept and the rest dropped."""
        tower = make_tower(depth=1, pos_embed="none")
        nn.init.zeros_(tower.blocks[0].attn.proj.weight)
        selection = video("holitom", tower, keep=0.3, block=0)(clip())
        stage = video_stage(selection)
        assert stage.labels.shape == (4 * 6, 6)
        assert stage.tokens == selection.tokens.shape[1]
        states = stage.states.reshape(4, 6, 6)
        assert (states[:, :, :3] == MERGED).all()
        assert set(np.unique(states[:, :, 3:])) == {ALONE, DROPPED}
        assert (states == ALONE).sum() == int((selection.ids >= 36).sum()) // 3 * 4

    def test_groups_over_time_have_one_colour_and_a_border(self) -> None:
        """Frames that are alike but for their grey, all of whose patches are merged over time: the mean grey."""
        module = video("holitom", keep=1.0, frames=2, tau=-1.0)
        frames = [Image.new("RGB", (48, 48), (grey,) * 3) for grey in (100, 140)]
        figure = np.asarray(video_figure(module, frames))
        painted = figure[figure.shape[0] // 2 :]
        colours = {tuple(c) for c in painted.reshape(-1, 3).tolist()}
        assert (120, 120, 120) in colours
        assert (255, 255, 255) in colours

    def test_many_frames_stand_in_rows(self) -> None:
        frames = [Image.new("RGB", (48, 48), "red")] * 7
        one = video_figure(video("divprune", keep=9, frames=6), frames[:6])
        two = video_figure(video("divprune", keep=9, frames=7), frames)
        assert two.width == one.width
        assert two.height > 1.8 * one.height

    def test_command_draws_one_video_of_a_folder_in_natural_order(self, tmp_path: Path) -> None:
        folder = tmp_path / "walk"
        folder.mkdir()
        for number in (1, 2, 10):
            Image.new("RGB", (28, 28), (20 * number, 0, 0)).save(folder / f"frame-{number}.png")
        names = find_images([str(folder)]).in_natural_order().names
        assert names == ["frame-1", "frame-2", "frame-10"]
        command = ["visualize", str(folder), "--video", "--model", NANO, "--pretrained", "--select", "holitom"]
        assert main([*command, "--keep", "0.25", "--out", str(tmp_path / "out")]) == 0
        assert [path.name for path in (tmp_path / "out").glob("*")] == ["walk-holitom-keep-0.25.png"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--video"], "--video belongs to a selection behind a tower"),
            (["--select", "hired", "--keep", "0.2", "--video"], "'hired' is for the crops of an image (--crops); the"),
            (["--select", "holitom", "--keep", "0.2"], "'holitom' is for the frames of a video (--frames, --video);"),
            (
                ["--select", "visionzip", "--keep", "9", "--crops", "2x2", "--video"],
                "--crops cuts single images and --video takes the frames of one video, got both",
            ),
            (
                ["--select", "hired", "--keep", "0.2", "--crops", "2x2", "--json", "tokens.json"],
                "--json holds the tokens of single images, got --crops too; leave one of them out",
            ),
            (["--select", "llava_mini", "--crops", "2x2"], "llava_mini chooses by weights that are trained"),
        ],
    )
    def test_what_cannot_be_drawn_is_a_sentence(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        arguments: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["visualize", BAG, "--model", NANO, "--out", "figures", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_mixtures_are_no_figure(self) -> None:
        module = video(QueryPooler(32, num_heads=2), frames=1)
        with pytest.raises(TypeError, match="mixtures of all cells belong to none of them"):
            video_figure(module, [Image.new("RGB", (48, 48))])


def test_tune_says_why_it_takes_no_crops(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", NANO, BAG, "--tokens", "9"]
    assert main([*command, "--crops", "2x2"]) == 2
    assert "none of them reads those of 5 parts together, got --crops 2x2; leave it out, or" in capsys.readouterr().err
    assert main([*command, "--select", "hired"]) == 2
    assert "'hired' is for the crops of an image (--crops); the selectors for images one" in capsys.readouterr().err
