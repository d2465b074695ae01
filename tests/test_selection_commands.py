"""Selection behind towers on the command line: profile, visualize, tune, list, and what they refuse; and its search."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_towers import build
from test_towers import images as tower_images
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import effvit
from effvit.cli import main
from effvit.data.preparation import data_config
from effvit.hosts.stages import ALONE, DROPPED, MERGED
from effvit.measure.costs import profile
from effvit.measure.read_on import ReadOn
from effvit.measure.reader import Reader
from effvit.measure.records import read_profiles, read_results
from effvit.measure.selections import Exit, Selecting, all_tokens, list_image_selectors, select
from effvit.measure.tune_tokens import most_tokens, tune_tokens
from effvit.measure.variants import list_all
from effvit.selectors import SELECTORS, QueryPooler
from effvit.show.crops import cut, part_stages, parts_figure
from effvit.show.report import write_report
from effvit.show.token_stages import trace_stages
from effvit.show.visualize import model_text, token_figure

NANO = "vit_nano_patch4_28"  # 7 x 7 patches; weights and images come with the package
READER = "layers=2,width=24,heads=4"
BAG = "fashion_mnist:bag-0"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny models gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def make_tower(**kwargs: Any) -> VisionTransformer:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**(sizes | kwargs)).eval()


def images(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 48, 48, generator=torch.Generator().manual_seed(0))


class TestProfile:
    def test_selections_stand_beside_the_tower_that_hands_over_everything(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        command = ["profile", NANO, "--select", "visionzip", "divprune", "--keep", "9", "0.5", "--set", "contextual=2"]
        command += ["--rounds", "1", "--batch-size", "1", "--reader", READER, "--text", "5"]
        paths = tmp_path / "costs.json", tmp_path / "costs.csv"
        assert main([*command, "--json", str(paths[0]), "--csv", str(paths[1])]) == 0
        (record,) = read_profiles(paths[0])
        names = [NANO, "visionzip keep=9 contextual=2", "visionzip keep=0.5 contextual=2", "divprune keep=9"]
        assert [model.name for model in record.models] == [*names, "divprune keep=0.5"]
        assert [model.handed.tokens for model in record.models if model.handed] == [49, 9, 24, 9, 24]
        everything, zipped = record.models[:2]
        assert (everything.method, everything.host) == (None, None)
        assert (zipped.method, zipped.host, zipped.settings["contextual"]) == ("visionzip", NANO, 2)
        assert zipped.handed is not None
        assert zipped.handed.prefill_macs == Reader(2, 24, 4).prefill_macs(9, 5)
        assert len(zipped.tokens or ()) == 11, "blocks up to the last but one"
        with paths[1].open() as file:
            rows = list(csv.DictReader(file))
        assert rows[1]["handed_over"] == "9.0"
        assert rows[1]["cache_bytes"] == str(zipped.handed.cache_bytes)
        printed = capsys.readouterr().out
        assert "read by layers=2,width=24,heads=4,gated=True,number_bytes=2, with 5 tokens of text" in printed
        write_report([paths[0]], tmp_path / "report.html")
        assert "handed over" in (tmp_path / "report.html").read_text()

    def test_a_method_may_reduce_inside_the_tower(self, tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        command = ["profile", NANO, "--method", "evit", "--keep-rate", "0.7", "--select", "divprune", "--keep", "9"]
        assert main([*command, "--rounds", "1", "--batch-size", "1", "--json", str(path)]) == 0
        (record,) = read_profiles(path)
        assert [model.name for model in record.models] == [NANO, "evit keep_rate=0.7, divprune keep=9"]
        assert record.models[1].method == "evit + divprune"
        assert record.models[1].macs < record.models[0].macs

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--select", "visionzip", "--keep", "50"], "keep must be in 1 to 49, the cells of the grid, got 50"),
            (["--select", "visionzip", "--keep", "0"], "keep must be in 1 to 49, the cells of the grid, got 0"),
            (
                ["--select", "visionzip", "--keep", "1.5"],
                "keep must be a whole number of tokens or a share in (0, 1], got 1.5",
            ),
            (["--select", "visionzip"], "visionzip needs keep: a number of tokens, 1 to 49 here"),
            (
                ["--select", "visionzap", "--keep", "9"],
                "'visionzap' is no selector; the selectors for images one by one",
            ),
            (
                ["--select", "hired", "--keep", "9"],
                "'hired' is for the crops of an image (--crops); the selectors for images one by one are",
            ),
            (["--keep", "9"], "--keep belongs to a selection behind a tower; leave it out, or name a selector"),
            (
                ["--select", "divprune", "--keep", "9", "--scores", "received"],
                "none of divprune ranks by attention, so",
            ),
            (["--max-norm", "9"], "--max-norm belongs to a selection behind a tower"),
            (
                ["--select", "visionzip", "--keep", "9", "--merge", "2"],
                "multiples of 2, but the height of the grid 7 x 7",
            ),
            (["--select", "visionzip", "--keep", "9", "--block", "40"], "block must be in -12 to 11 for a model of 12"),
            (["--reader", READER], "--reader reads the tokens that a tower hands over: name a selector with --select"),
            (["--text", "9"], "--text counts tokens for a reader: give its sizes with --reader"),
            (
                ["--select", "divprune", "--keep", "9", "--reader", "layers=2,width=24,heads=5"],
                "heads must divide the width of a reader, got width=24 and heads=5",
            ),
            (
                ["--select", "divprune", "--keep", "9", "--reader", "layers=0,width=24,heads=4"],
                "layers must be at least 1, got 0",
            ),
            (
                ["--select", "divprune", "--keep", "9", "--reader", READER, "--text", "-3"],
                "--text must be at least 0, got -3",
            ),
        ],
    )
    def test_what_cannot_be_is_a_sentence(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert message in failure(capsys, "profile", NANO, "--rounds", "1", *arguments)

    def test_settings_go_to_the_methods_and_selectors_that_have_them(self) -> None:
        assignments: list[Any] = [("contextual", 2), ("seed", 1), ("r", 8), ("contextual", 3)]
        variants, selections = list_all(["tome", "random"], ["visionzip", "random", "uniform"], [9], assignments)
        expected = ["visionzip keep=9 contextual=2", "visionzip keep=9 contextual=3", "random keep=9 seed=1"]
        assert [str(own) for own in selections] == [*expected, "uniform keep=9"]
        assert variants == [("tome", {"r": 8}), ("random", {"seed": 1})]
        with pytest.raises(ValueError, match="no selector named here has a setting 'seed': visionzip takes contextual"):
            list_all([], ["visionzip"], [9], assignments)


class TestProjectors:
    """Towers with a projector, whose tokens leave behind it unless somebody says otherwise."""

    @pytest.mark.parametrize("case", ["qwen3 encoder", "deepseek encoder", "gemma4 soft"])
    def test_commands_take_them_without_a_word_on_where_tokens_leave(self, case: str) -> None:
        tower, x = build(case), tower_images(case)
        everything, few = all_tokens(tower, Exit()), select(tower, Selecting("divprune", 3, {}), Exit())
        cells = everything(x).counts
        side = {"qwen3": 2, "deepseek": 3, "gemma4": 3}[case.split()[0]]
        assert (few.settings["block"], few.settings["merge"]) == (-1, side), "as records have it"
        size = (x.shape[1], x.shape[2], x.shape[3])
        models = profile({"all": everything, "divprune": few}, size, 1, rounds=1, warmup=0).models
        assert [model.handed.tokens for model in models if model.handed] == [cells[0].item(), 3]
        assert [model.method for model in models] == [None, "divprune"]
        (stage,) = trace_stages(few, x[:1])
        assert (stage.block, stage.tokens) == (3, 3)

    def test_what_is_asked_is_kept(self) -> None:
        module = select(make_tower(), Selecting("divprune", 3, {}), Exit(block=1, merge=2))
        assert (module.settings["block"], module.settings["merge"]) == (1, 2)
        assert Exit(merge=1).settings() == {"merge": 1}
        with pytest.raises(ValueError, match="makes one token of 2 x 2 patches, got merge=1"):
            select(build("qwen3 encoder"), Selecting("divprune", 3, {}), Exit(merge=1))


class TestVisualize:
    def test_figures_and_records_show_what_is_handed_over(self, tmp_path: Path) -> None:
        command = [
            "visualize",
            BAG,
            "--model",
            NANO,
            "--pretrained",
            "--select",
            "visionzip",
            "prumerge",
            "--keep",
            "9",
        ]
        command += ["--set", "contextual=3", "--set", "neighbours=4", "--out", str(tmp_path)]
        assert main([*command, "--json", str(tmp_path / "tokens.json")]) == 0
        names = {path.name for path in tmp_path.glob("*.png")}
        assert names == {"bag-0-visionzip-keep-9-contextual-3.png", "bag-0-prumerge-keep-9-neighbours-4.png"}
        records: Any = read_results(tmp_path / "tokens.json")
        assert [record["method"] for record in records] == ["visionzip", "prumerge"]
        (stage,) = records[0]["stages"]
        assert (stage["block"], stage["tokens"], stage["handed_over"]) == (10, 9, True)
        assert np.unique(stage["labels"]).tolist() == list(range(9)), "all others are summed up"
        write_report([tmp_path / "tokens.json"], tmp_path / "report.html")

    def test_stages_are_the_groups_of_the_selection(self) -> None:
        """Against the selection itself: kept tokens alone, contextual ones merged, all else dropped."""
        x = images(1)
        module = effvit.TokenSelector(make_tower(), "visionzip", keep=9, contextual=3).eval()
        (stage,) = trace_stages(module, x)
        selection = module(x)
        assert np.array_equal(stage.labels.flatten(), selection.group[0].numpy())
        members = np.bincount(stage.labels.flatten(), minlength=9)
        assert (stage.states == MERGED).sum() == members[members > 1].sum()
        (pruned,) = trace_stages(effvit.TokenSelector(make_tower(), "divprune", keep=9), x)
        assert [(pruned.states == state).sum() for state in (ALONE, DROPPED, MERGED)] == [9, 27, 0]

    def test_reduced_towers_show_their_stages_first(self) -> None:
        tower = effvit.sparsify(make_tower(), "tome", r=[9, 9, 0, 0])
        module = effvit.TokenSelector(tower, "class_attention", keep=5)
        stages = trace_stages(module, images(1))
        assert [(stage.block, stage.tokens, stage.handed_over) for stage in stages] == [
            (0, 27, False),
            (1, 18, False),
            (2, 5, True),
        ]
        assert model_text(module) == "tome, class_attention keep=5"
        assert "Tower(VisionTransformer, tome, block=2)" in repr(module)

    def test_cells_of_a_merger_are_drawn_as_cells(self) -> None:
        module = effvit.TokenSelector(make_tower(), "divprune", keep=4, merge=2)
        (stage,) = trace_stages(module, images(1))
        assert stage.labels.shape == (3, 3)
        assert token_figure(module, Image.new("RGB", (48, 48), "red")).width > 300

    def test_mixtures_of_all_cells_are_refused_with_what_shows_them(self) -> None:
        module = effvit.TokenSelector(make_tower(), QueryPooler(32, num_heads=2))
        with pytest.raises(
            TypeError, match=r"the tokens of llava_mini are mixtures of all cells, .* of QueryPooler\.attend"
        ):
            trace_stages(module, images(1))


class TestReadOn:
    @pytest.mark.parametrize("block", [-2, 0])
    @pytest.mark.parametrize("pool", ["token", "avg"])
    def test_with_all_tokens_it_is_the_model(self, block: int, pool: str) -> None:
        tower = make_tower(global_pool=pool)
        module = ReadOn(tower, effvit.TokenSelector(tower, "uniform", keep=1.0, block=block))
        torch.testing.assert_close(module(images()), tower(images()))

    def test_rotary_towers_read_tokens_at_their_places(self) -> None:
        """Against the dense blocks with all other patches masked out as keys."""
        tower = timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=3, embed_dim=48, num_heads=2).eval()
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        selector = effvit.TokenSelector(tower, "divprune", keep=6, block=1)
        kept = selector(x)
        y, rope = tower._pos_embed(tower.patch_embed(x))
        for block in tower.blocks[:2]:
            y = block(y, rope=rope)
        prefix = tower.num_prefix_tokens
        seen = torch.cat([torch.ones(1, prefix, dtype=torch.bool), kept.mask()], dim=1)
        y = tower.blocks[2](y, rope=rope, attn_mask=seen[:, None, None, :])
        expected = tower.norm(y)[:, seen[0]]
        torch.testing.assert_close(ReadOn(tower, selector).forward_features(x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek classifier", "gemma4 classifier"])
    @pytest.mark.parametrize(("method", "keep"), [("divprune", 5), ("aim", 9), ("visionzip", 9)])
    def test_merged_tokens_count_once_in_the_mean_of_a_tower(self, case: str, method: str, keep: int) -> None:
        """By hand: the mean of what leaves the last block, through timm's own norm and head."""
        dense, x = build(case), tower_images(case)
        scores = {"scores": "received"} if method == "visionzip" else {}
        module = ReadOn(dense, effvit.TokenSelector(dense, method, keep=keep, **scores))
        left: list[Tensor] = []
        module.host.blocks[-1].register_forward_hook(lambda block, given, out: left.append(out))
        found = module(x)
        patches = dense.encoder.norm(left[0]) if case.startswith("deepseek") else left[0]
        assert patches.shape[1] == keep
        torch.testing.assert_close(found, dense.head(dense.norm(patches.mean(1))))

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek classifier", "gemma4 classifier"])
    def test_with_all_tokens_it_is_the_tower(self, case: str) -> None:
        dense, x = build(case), tower_images(case)
        torch.testing.assert_close(ReadOn(dense, effvit.TokenSelector(dense, "uniform", keep=1.0))(x), dense(x))

    @pytest.mark.parametrize(
        ("case", "options"),
        [
            ("qwen3 mean", {}),
            ("deepseek mean", {}),
            ("gemma4 patches", {}),
            ("gemma4 classifier", {"global_pool": ""}),
            ("qwen3 classifier", {"global_pool": ""}),
        ],
    )
    def test_towers_without_a_head_of_the_mean_are_refused_by_name(self, case: str, options: dict[str, Any]) -> None:
        dense = build(case, **options)
        with pytest.raises(
            ValueError, match=f"this {type(dense).__name__} has no head that reads a mean of the patches"
        ):
            ReadOn(dense, effvit.TokenSelector(dense, "divprune", keep=9))

    def test_what_reads_nothing_is_refused(self) -> None:
        tower = make_tower()
        with pytest.raises(ValueError, match=r"the head reads the class token alone, .* such as -2"):
            ReadOn(tower, effvit.TokenSelector(tower, "divprune", keep=9, block=-1))
        with pytest.raises(ValueError, match="blocks of a tower read patches, got a merger of 2 x 2"):
            ReadOn(tower, effvit.TokenSelector(tower, "divprune", keep=4, merge=2))


class TestTune:
    def test_each_selector_gives_the_largest_number_that_it_can(self) -> None:
        assert most_tokens("divprune", (6, 6), 13) == 13
        assert most_tokens("matryoshka", (6, 6), 13) == 9, "windows of 2 x 2"
        with pytest.raises(ValueError, match="finds by itself how many tokens an image needs"):
            most_tokens("recoverable", (6, 6), 13)

    def test_choice_has_the_least_penalty_and_is_held_against_controls(self) -> None:
        tower, x = make_tower(), images()
        labels = torch.tensor([0, 1, 2, 3])
        names = ["class_attention", "divprune", "matryoshka", "prumerge", "recoverable"]
        found = tune_tokens(
            tower, x, 9, labels=labels, selectors=names, leaving=Exit(block=1), rounds=1, batch_size=2, host="tower"
        )
        assert found.target == {"tokens": 9}
        tried = {own.method: own for own in found.tried if own.method not in ("random", "uniform")}
        assert set(tried) == {"class_attention", "divprune", "matryoshka", "prumerge"}
        for name, own in tried.items():
            scores = ReadOn(tower, effvit.TokenSelector(tower, name, keep=9, block=1))(x)
            assert own.classified is not None
            expected = torch.nn.functional.cross_entropy(scores.detach(), labels).item()
            assert own.classified.loss == pytest.approx(expected, rel=1e-4)
        assert found.free is not None
        assert found.free.choice.penalty == min(own.penalty for own in tried.values())
        assert [own.settings["seed"] for own in found.free.random] == [0, 1, 2]
        assert [own.method for own in found.free.defaults] == ["uniform"]
        (left,) = found.untried or ()
        assert left.startswith("recoverable: recoverable finds by itself how many tokens an image needs")

    def test_methods_inside_the_tower_are_tried_beside_none(self) -> None:
        found = tune_tokens(
            make_tower(), images(2), 9, selectors=["divprune"], methods=["tome"], rounds=1, batch_size=1
        )
        assert found.conditions.options["block"] == -2
        assert {own.method for own in found.tried} == {"divprune", "tome + divprune", "random", "uniform"}

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek classifier", "gemma4 classifier"])
    def test_towers_of_language_models_are_taken_as_classifiers(self, case: str) -> None:
        names = ["divprune", "matryoshka", "class_attention"]
        found = tune_tokens(build(case), tower_images(case), 18, selectors=names, rounds=1, batch_size=1)
        assert {own.method for own in found.tried} - {"matryoshka"} == {"divprune", "random", "uniform"}
        assert any(left.startswith("class_attention: class_attention scores") for left in found.untried or ())

    def test_towers_with_a_projector_have_no_blocks_that_read_on(self) -> None:
        with pytest.raises(ValueError, match="divprune: blocks of a tower read patches, got a merger of 2 x 2"):
            tune_tokens(build("qwen3 merge"), tower_images("qwen3 merge"), 3, selectors=["divprune"], rounds=1)

    def test_command_prints_the_line_that_makes_the_choice(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "tuned.json"
        command = ["tune", NANO, "fashion_mnist:bag-*", "--pretrained", "--tokens", "9", "--block", "5"]
        command += ["--select", "visionzip", "--rounds", "1", "--batch-size", "1", "--json", str(path)]
        assert main(command) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f'effvit.TokenSelector(timm.create_model("{NANO}", pretrained=True), "')
        assert "block=5" in line
        assert "keep=9" in line
        (record,) = read_results(path)
        assert isinstance(record, dict)
        assert record["target"] == {"tokens": 9}
        write_report([path], tmp_path / "report.html")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tokens", "50"], "tokens must be in 1 to 49, the patches of this tower, got 50; ask for fewer"),
            (["--tokens", "0"], "tokens must be at least 1, got 0"),
            (
                ["--tokens", "9", "--select", "llava_mini"],
                "llava_mini chooses by weights that are trained, which a name",
            ),
            (["--tokens", "9", "--minutes", "1"], "--minutes is of a search for a speed-up; --tokens measures each"),
            (["--speedup", "1.5", "--select", "divprune"], "--select belongs to a selection behind a tower"),
            (
                ["--tokens", "9", "--select", "recoverable"],
                "no selector here hands over 9 tokens of this tower: recoverable",
            ),
        ],
    )
    def test_what_cannot_be_is_a_sentence(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert message in failure(capsys, "tune", NANO, BAG, "--pretrained", *arguments)


class TestList:
    def test_selectors_are_listed_with_their_settings(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["list", "todre"]) == 0
        assert capsys.readouterr().out == "todre\tselector\tversion='v2'\n"
        assert main(["list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split("\t")[0] for line in lines if "\tselector" in line} == set(effvit.list_selectors())

    def test_needs_are_what_the_classes_ask_for(self) -> None:
        assert SELECTORS["divprune"].needs() == []
        assert SELECTORS["visionzip"].needs() == ["attention of the class token in the block they leave", "its keys"]
        assert "the crops of an image" in SELECTORS["hired"].needs()
        assert set(list_image_selectors()) < set(effvit.list_selectors())


class TestCrops:
    def test_parts_are_the_thumbnail_and_the_pieces_of_the_canvas(self) -> None:
        """Of an image as large as the canvas of 2 x 3 crops the crops are its pieces, normalised as timm does."""
        pixels = np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8)
        tower = make_tower()
        parts = cut(tower, Image.fromarray(pixels), (2, 3))
        assert parts.shape == (7, 3, 48, 48)
        mean, std = (np.array(data_config(tower)[name]) for name in ("mean", "std"))
        expected = (pixels[48:, 48:96] / 255 - mean) / std
        assert np.allclose(parts[1 + 3 + 1].permute(1, 2, 0).numpy(), expected, atol=1e-5)

    @pytest.mark.parametrize(("method", "keep"), [("hired", 0.3), ("visionzip", 9)])
    def test_stages_name_the_cells_of_the_canvas(self, method: str, keep: float) -> None:
        """Against the cells that ``canvas_ids`` gives each token."""
        selected = effvit.select_parts(make_tower(), images(7), method, crops=(2, 3), keep=keep)
        thumbnail, canvas = part_stages(selected)
        counts = selected.selection.counts
        assert (thumbnail.tokens, canvas.tokens) == (int(counts[0]), int(counts[1:].sum()))
        cells = selected.canvas_ids()[1:]
        tokens = canvas.labels.flatten()[cells[cells >= 0].numpy()]
        assert tokens.tolist() == list(range(canvas.tokens))
        assert canvas.labels.shape == (12, 18)

    def test_figure_shows_the_image_beside_both(self) -> None:
        figure = parts_figure(make_tower(), Image.new("RGB", (90, 60), "red"), "hired", crops=(2, 3), keep=0.3)
        assert figure.width > 3 * 300

    def test_what_no_figure_shows_is_refused(self) -> None:
        tower = make_tower()
        alone = effvit.select_parts(tower, images(6), "divprune", crops=(2, 3), thumbnail=None, keep=9)
        with pytest.raises(ValueError, match="shows the thumbnail beside the crops, got crops alone"):
            part_stages(alone)
        pooled = effvit.select_parts(tower, images(7), QueryPooler(32, num_heads=2), crops=(2, 3))
        with pytest.raises(TypeError, match="mixtures of all cells belong to none of them"):
            part_stages(pooled)
        with pytest.raises(TypeError, match="multiple values for keyword argument 'thumbnail'"):
            parts_figure(tower, Image.new("RGB", (90, 60)), "hired", crops=(2, 3), keep=0.3, thumbnail="last")
