"""What a choice of tokens gains over its controls, and the command that measures it. Numbers in records are made up."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from data.choice_sets import cutouts
from drawn_scenes import drawn_split
from made_up import made_up_choices, made_up_evaluation, made_up_profile
from matplotlib.figure import Figure
from safetensors.torch import save_model
from scripts import TOOLS, load_tool

import effvit
from effvit.data.labelled import PixelImages
from effvit.data.preparation import load_images
from effvit.measure.choices import choices_of
from effvit.measure.controls import CONTROLS
from effvit.measure.object_patches import mean_object_patches
from effvit.measure.records import check_record, evaluation_of, profile_of, read_evaluations, read_records
from effvit.measure.shifts import SHIFTS, central_crop
from effvit.measure.values import Evaluation
from effvit.show.plots import plot_choices

SMALL = {"depth": 2}


@pytest.fixture
def evaluation() -> Evaluation:
    record = made_up_choices()
    check_record(record, "made up")
    return evaluation_of(record)


class TestGains:
    def test_gain_is_over_the_mean_of_the_seeds(self, evaluation: Evaluation) -> None:
        tome, evit = choices_of(evaluation)
        assert (tome.model.name, evit.model.name) == ("tome r=8", "evit keep_rate=0.5")
        assert tome.gains == {"random": 4.5, "uniform": 1.0, "resolution": 15.0}
        assert evit.gains == {"random": 0.5, "uniform": 0.0}
        assert evit.gain("resolution") is None

    def test_name_that_begins_with_another_one_has_its_own_controls(self) -> None:
        """ "tome r=1" is the beginning of "tome r=12"."""
        record = made_up_choices()
        for model in record["models"][6:]:
            model["name"] = model["name"].replace("evit keep_rate=0.5", "tome r=80")
        tome, other = choices_of(evaluation_of(record))
        assert tome.gains == {"random": 4.5, "uniform": 1.0, "resolution": 15.0}
        assert other.gains == {"random": 0.5, "uniform": 0.0}

    def test_evaluation_without_controls_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the evaluation has none; measure them with effvit evaluate --control ra"):
            choices_of(evaluation_of(made_up_evaluation()))


class TestPlot:
    def test_each_method_has_a_panel_with_its_controls(
        self, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures: list[Figure] = []
        monkeypatch.setattr("effvit.show.plots.save", lambda figure, *_: figures.append(figure))
        plot_choices(evaluation, "a set", tmp_path / "choices.svg")
        panels = {axes.get_title(): axes for axes in figures[0].axes}
        assert [*panels] == ["evit", "tome"]
        lines = {line.get_label(): line for line in panels["tome"].get_lines()}
        values = {name: lines[name].get_ydata()[0] for name in ("tome", "random", "uniform", "resolution")}
        assert values == {"tome": 75.0, "random": 70.5, "uniform": 74.0, "resolution": 60.0}
        assert "resolution" not in {line.get_label() for line in panels["evit"].get_lines()}

    def test_file_says_its_origin_and_is_the_same_again(self, evaluation: Evaluation, tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg"):
            plot_choices(evaluation, "a set", tmp_path / name, note="made up here")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert "made up here" in (tmp_path / "a.svg").read_text()


class TestPage:
    @pytest.fixture
    def tool(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.syspath_prepend(TOOLS)
        return load_tool("make_accuracy_page")

    def test_table_has_gains_objects_and_shifts_and_marks_what_loses(
        self, tool: ModuleType, evaluation: Evaluation
    ) -> None:
        """The standard error is sqrt(0.75 * 0.25 / 1600) = 1.08 points at 75 %."""
        head, _, *rows, blank, notes = tool.choices_table(tool.Choices(evaluation, {}))
        assert head == (
            "| model | top-1 (%) | MMACs | minus random | minus uniform | minus resolution | object patches kept (%) "
            "| same class, 1 px (%) | same class, 2 px (%) |"
        )
        assert rows == [
            "| host_a | 80.00 ± 1.00 | 2000.0 | - | - | - | - | 90.0 | 82.5 |",
            "| tome r=8 | 75.00 ± 1.08 | 1000.0 | +4.5 | +1.0 | +15.0 | 25 (represented 100) | 90.0 | 82.5 |",
            "| evit keep_rate=0.5 † | 65.00 ± 1.19 | 1000.0 | +0.5 | +0.0 | - | - | 90.0 | 82.5 |",
        ]
        assert blank == ""
        assert notes == "† Not better than one of its controls. Object patches: 100 images. Shifts: 100 images."

    def test_table_has_speed_where_it_was_measured(self, tool: ModuleType, evaluation: Evaluation) -> None:
        costs = {cost.name: cost for cost in profile_of(made_up_profile()).models}
        head, _, _, row, *_ = tool.choices_table(tool.Choices(evaluation, costs))
        assert head.startswith("| model | top-1 (%) | MMACs | speed-up | minus random |")
        assert row.startswith("| tome r=8 | 75.00 ± 1.08 | 1000.0 | 1.05 (0.95 to 1.15) | +4.5 |")

    def test_models_shifted_by_other_distances_are_refused(self, tool: ModuleType) -> None:
        record = made_up_choices()
        record["models"][1]["consistency"] = {**record["models"][1]["consistency"], "shifts": [1, 3]}
        with pytest.raises(ValueError, match=r"all models must be shifted by \[1, 2\], tome r=8 by \[1, 3\]"):
            tool.choices_table(tool.Choices(evaluation_of(record), {}))

    def test_measured_choices_come_onto_the_page_with_a_plot(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = tool.CHOICES["cutouts choices"]
        for path in (
            tool.PAGE,
            tool.README,
            *tool.ACCURACIES.values(),
            *tool.CHOICES.values(),
            *tool.SETTINGS.values(),
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text((tool.ROOT / path).read_text())
        monkeypatch.setattr(tool, "ROOT", tmp_path)
        (tmp_path / name).write_text(json.dumps([made_up_choices(), made_up_profile()]))
        assert tool.main([]) == 0
        assert "| tome r=8 | 75.00 ± 1.08 |" in (tmp_path / tool.PAGE).read_text()
        assert name in (tmp_path / "docs/images/cutouts_choices.svg").read_text()
        assert "| tome r=8 | 50 | 75.0 | 70.5 | 74.0 | 60.0 |" in (tmp_path / tool.README).read_text()
        assert tool.main(["--check"]) == 0
        (tmp_path / name).write_text(json.dumps([made_up_choices()] * 2))
        assert tool.main(["--check"]) == 2
        expected = "cutouts_choices_cpu.json must hold one evaluation and at most one profile, got 2 and 0"
        assert expected in capsys.readouterr().err


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command with two rows, a model of two blocks, and drawn objects in place of those that are fetched."""
    tool = load_tool("measure_choices")
    parts = dict.fromkeys(("train", "test"), drawn_split())
    monkeypatch.setattr(tool, "cutouts", lambda root, number: cutouts(root, number, parts))
    monkeypatch.setattr(tool, "create", partial(tool.create, options=SMALL))
    monkeypatch.setattr(tool, "LADDERS", {"cutouts": {"evit": ("keep_rate", [0.5]), "hot": ("keep_rate", [0.6])}})
    return tool


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """It evaluates the model with random weights on twenty images."""
    save_model(timm.create_model("vit_nano_patch8_96", **SMALL), str(tmp_path / "random.safetensors"))
    options = f"--checkpoint {tmp_path / 'random.safetensors'} --json {tmp_path / 'out.json'} --root {tmp_path}"
    return f"cutouts {options} --images 20 --detail-images 6 --batch-size 4 --seeds 0 1".split()


class TestCommand:
    def test_every_row_has_controls_objects_and_shifts(
        self, tool: ModuleType, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tool.main(command) == 0
        [found] = read_evaluations(tmp_path / "out.json")
        controls = [
            "",
            *(f", control {label}" for label in ("random, seed 0", "random, seed 1", "uniform", "resolution")),
        ]
        rows = [f"{method}{control}" for method in ("evit keep_rate=0.5", "hot keep_rate=0.6") for control in controls]
        assert [model.name for model in found.models] == ["vit_nano_patch8_96", *rows]
        for model in found.models:
            is_row = ", control" not in model.name
            assert (model.consistency is not None) == is_row
            assert (model.object_patches is not None) == (model.method is not None)
        assert found.conditions.weights == "random.safetensors"
        assert found.models[0].accuracy.data == "cutouts, split test, seed 0, 20 images"
        assert found.models[1].consistency.shifts == list(SHIFTS)  # type: ignore[union-attr]
        assert not (tmp_path / "out.state.json").exists()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert lines[1].startswith("evit keep_rate=0.5: ")
        assert " to random" in lines[1]

    def test_speeds_of_all_rows_stand_in_a_record_of_their_own(
        self, tool: ModuleType, command: list[str], tmp_path: Path
    ) -> None:
        assert tool.main([*command, "--rounds", "2"]) == 0
        evaluated, profiled = read_records(tmp_path / "out.json")
        assert evaluation_of(evaluated).models[0].name == "vit_nano_patch8_96"
        record = profile_of(profiled)
        assert [cost.name for cost in record.models] == [
            "vit_nano_patch8_96",
            "evit keep_rate=0.5",
            "hot keep_rate=0.6",
        ]
        assert all(len(cost.seconds) == 2 for cost in record.models)
        found = {model.name: model.accuracy for model in evaluation_of(evaluated).models}
        assert all(cost.accuracy == found[cost.name] for cost in record.models)
        assert (record.conditions.batch_size, record.conditions.notes["weights"]) == (4, "random.safetensors")

    def test_objects_are_followed_in_the_middle_of_the_wide_images(
        self, tool: ModuleType, command: list[str], tmp_path: Path
    ) -> None:
        """What the figure says is what the function gives for images and masks that are cut out here."""
        assert tool.main(command) == 0
        dense = timm.create_model("vit_nano_patch8_96", checkpoint_path=str(tmp_path / "random.safetensors"), **SMALL)
        scenes = tool.cutouts(None, 20).wide([0, 3, 6, 10, 13, 16], 4)
        middle = scenes.pixels[..., 4:100, 4:100] / 255
        patches = scenes.masks[:, 4:100, 4:100].unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).float().mean(-1).flatten(1)
        model = effvit.sparsify(dense, "evit", keep_rate=0.5)
        kept = mean_object_patches(model, [((middle - 0.5) / 0.25, patches)])
        [found] = read_evaluations(tmp_path / "out.json")
        assert found.models[1].object_patches.tokens == pytest.approx(kept.tokens)  # type: ignore[union-attr]

    def test_killed_measurement_goes_on_with_the_next_method(
        self, tool: ModuleType, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert tool.main(command) == 0
        whole = (tmp_path / "out.json").read_bytes()
        (tmp_path / "out.json").unlink()
        rows = tool.Measurement.rows

        def interrupted(self: Any, models: Any) -> Any:
            if "hot keep_rate=0.6" in models:
                raise KeyboardInterrupt
            return rows(self, models)

        monkeypatch.setattr(tool.Measurement, "rows", interrupted)
        assert tool.main(command) == 130
        assert not (tmp_path / "out.json").exists()
        measured: list[str] = []
        monkeypatch.setattr(tool.Measurement, "rows", lambda *given: (measured.extend(given[1]), rows(*given))[1])
        assert tool.main(command) == 0
        assert measured == ["hot keep_rate=0.6"]
        assert (tmp_path / "out.json").read_bytes() == whole

    def test_rows_of_other_conditions_and_other_files_are_refused(
        self, tool: ModuleType, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        state = tmp_path / "out.state.json"
        kept = tool.KeptRows(state, {"seeds": [0], "batch_size": 4})
        kept.keep(evaluation_of(made_up_choices()))
        again = tool.KeptRows(state, {"seeds": [0], "batch_size": 4})
        assert again.evaluation == evaluation_of(made_up_choices())
        with pytest.raises(
            ValueError, match=r"was begun with seeds \[\], now it is \[1\]; give what it was begun with"
        ):
            tool.KeptRows(state, {"seeds": [0, 1], "batch_size": 4})
        assert tool.main(command) == 2
        assert "was begun with models None, now it is" in capsys.readouterr().err
        state.write_text("[]")
        assert tool.main(command) == 2
        assert "must hold what tools/measure_choices.py --state wrote, and does not" in capsys.readouterr().err
        assert state.read_text() == "[]"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--methods", "evit", "sit"], "--methods must be of evit, hot, got 'sit'"),
            (["--detail-images", "21"], "has 20 images, cannot take 21 of them"),
            (["--images", "0"], "--images must be at least 1, got 0"),
            (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ],
    )
    def test_wrong_argument_ends_with_a_sentence(
        self, tool: ModuleType, command: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tool.main([*command, *change]) == 2
        assert message in capsys.readouterr().err

    def test_random_weights_are_refused(self, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        assert tool.main(["cutouts", "--json", "out.json"]) == 2
        assert "means something with trained weights: give --checkpoint or --pretrained" in capsys.readouterr().err


TRAINED = {"dynamicvit", "sinkhorn", "patchmerger"}  # on the weights of the dense model their tokens say nothing


class TestLadders:
    def test_every_method_but_the_controls_and_the_trained_has_five_settings_that_its_host_takes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each leaves another number of tokens, where they do not depend on the image.

        The command trains nothing, so methods that must be trained stay out.
        """
        monkeypatch.syspath_prepend(TOOLS)
        tool = load_tool("measure_choices")
        for name, host in (("cutouts", "vit_nano_patch8_96"), ("fashion_mnist", "vit_nano_patch4_28")):
            dense = timm.create_model(host)
            methods = {*effvit.list_methods()} - {*CONTROLS} - TRAINED
            assert {*tool.LADDERS[name]} == methods
            for method in methods:
                models = [
                    effvit.sparsify(dense, method, **settings) for _, settings in tool.variants_of(name, [method])
                ]
                assert len(models) == 5
                if not models[0].variable_length:
                    sums = [sum(model.token_counts()) for model in models]
                    assert len({*sums}) == 5, (name, method, sums)

    def test_garments_get_a_black_margin(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The middle is the image itself, under the mean and standard deviation that ``evaluate`` gives it."""
        tool = load_tool("measure_choices")
        pixels = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
        monkeypatch.setattr(
            "data.choice_sets.open_labelled", lambda path: PixelImages(str(path), pixels, [0, 1, 2, 3, 4])
        )
        images = tool.fashion_mnist(tmp_path)
        assert images.test.place == "Fashion-MNIST, split test"
        dense = timm.create_model(images.model)
        details = tool.details_of(dense, images, [0, 3])
        assert details.coverage is None
        assert torch.equal(
            central_crop(details.wide, 4), load_images(dense, [images.test.read(index) for index in (0, 3)])
        )
        border = details.wide.clone()
        border[..., 4:-4, 4:-4] = border[0, 0, 0, 0]
        assert torch.allclose(border, torch.tensor(-0.286 / 0.353))
