"""Plots of records: which lines they have, and that nothing in them changes from run to run. Numbers are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_model, made_up_profile
from matplotlib.figure import Figure
from PIL import Image

from effvit.measure.records import profile_of
from effvit.measure.values import Record
from effvit.reducers import METHODS
from effvit.show.plots import accuracy_lines, look, plot_accuracy, plot_costs, scale_by_errors


def model(name: str, method: str | None, speedup: float, accuracy: float | None) -> dict[str, Any]:
    said = {"metric": "top-1", "data": "a set", "origin": "made up"}
    return made_up_model(name, method, speedup, accuracy=None if accuracy is None else {"value": accuracy} | said)


@pytest.fixture
def records() -> list[Record]:
    dense = model("host_a", None, 1.0, 90.0)
    first = made_up_profile(
        models=[dense, model("tome r=2", "tome", 1.5, 89.0), model("evit keep_rate=0.7", "evit", 1.8, 80.0)]
    )
    second = made_up_profile(models=[dense, model("tome r=4", "tome", 2.0, 85.0), model("gtp", "gtp", 1.1, None)])
    tuned = made_up_profile(models=[model("host_a, tuned", None, 1.0, 70.0), model("evit, tuned", "evit", 1.9, 88.0)])
    return [profile_of(first), profile_of(second), profile_of(tuned).with_weights("tuned")]


def test_each_method_and_training_has_a_line_by_multiply_adds(records: list[Record]) -> None:
    lines = {line.name: [entry.name for entry in line.models] for line in accuracy_lines(records)}
    assert lines == {
        "host_a": ["host_a"],
        "evit": ["evit keep_rate=0.7"],
        "evit, tuned": ["evit, tuned"],
        "tome": ["tome r=4", "tome r=2"],
    }
    assert next(iter(lines)) == "host_a"


def test_records_without_accuracies_are_refused(records: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"needs the accuracy of the first model and of one more; effvit evaluate"):
        accuracy_lines([profile_of(made_up_profile())])
    with pytest.raises(ValueError, match="of the first model and of one more"):
        accuracy_lines([replace(records[0], models=records[0].models[:1])])
    with pytest.raises(ValueError, match="of the first model and of one more"):
        accuracy_lines([])


def test_costs_of_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the models of a record, got none"):
        plot_costs([], "nothing", tmp_path / "costs.svg")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_same_records_draw_the_same_bytes(records: list[Record], tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / "new" / f"{number}.{suffix}" for number in range(2)]
    for path in paths:
        plot_accuracy(records, "a title", path, note="from made-up records")
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert b"from made-up records" in first


def test_vector_plot_holds_its_text(records: list[Record], tmp_path: Path) -> None:
    plot_accuracy(records, "a title", tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for shown in ("a title", "evit, tuned", "GMACs of one picture", "speed-up over the dense model", ">90<"):
        assert shown in text
    assert "dc:date" not in text


@pytest.mark.parametrize("reduced", [0.0, 99.0, 100.0])
def test_accuracies_of_all_or_nothing_are_drawn_too(tmp_path: Path, reduced: float) -> None:
    models = [model("host_a", None, 1.0, 100.0), model("tome", "tome", 1.2, reduced)]
    plot_accuracy([profile_of(made_up_profile(models=models))], "a title", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > image.height > 400


@pytest.mark.parametrize("accuracy", [0.0, 12.5, 35.0, 73.5, 87.5, 91.0, 95.1, 98.7, 99.7, 100.0])
def test_axis_of_any_accuracy_has_a_tick(accuracy: float) -> None:
    axes = Figure().add_subplot()
    scale_by_errors(axes, [accuracy])
    low, high = axes.get_ylim()
    assert low < high
    assert any(low <= tick <= high for tick in axes.get_yticks())


def test_every_method_looks_different() -> None:
    looks = [look(method, 0) for method in METHODS]
    assert len({(style["color"], style["marker"]) for style in looks}) == len(METHODS)


def test_costs_are_drawn(records: list[Record], tmp_path: Path) -> None:
    plot_costs(records[0].models, "a title", tmp_path / "costs.png")
    with Image.open(tmp_path / "costs.png") as image:
        assert image.width > image.height > 400
