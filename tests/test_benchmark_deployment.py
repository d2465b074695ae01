"""The benchmark of reduction beside compilation, int8 and other runtimes."""

from __future__ import annotations

import torch
from hosts import make_host, make_model
from scripts import load_tool

TOOL = load_tool("benchmark_deployment")


def test_ratios_are_over_the_dense_model_run_eagerly_and_run_in_the_same_way() -> None:
    """Worked by hand: reduction halves the time in both ways, compilation takes a fifth off both."""
    seconds = {
        "dense": {"eager": [10.0, 20.0], "compiled": [8.0, 16.0]},
        "EViT": {"eager": [5.0, 10.0], "compiled": [4.0, 8.0]},
    }
    rows = {(row["model"], row["way"]): row for row in TOOL.results(seconds)}
    assert rows["dense", "eager"]["over_eager"] == 1
    assert rows["dense", "compiled"]["over_eager"] == 1.25
    assert rows["EViT", "eager"]["over_dense"] == rows["EViT", "compiled"]["over_dense"] == 2
    assert rows["EViT", "compiled"]["over_eager"] == 2.5
    assert TOOL.table({"results": [rows["EViT", "compiled"]]})[-1] == (
        "| EViT | compiled | 2.50 | 2.50 to 2.50 | 2.00 | 2.00 to 2.00 |"
    )


def test_every_way_gives_the_scores_of_the_model() -> None:
    """The plain run is the expectation; in int8 the scores of an image stay nearest to its own."""
    model, x = make_model("evit", "class_token"), torch.randn(3, 3, 48, 64)
    ways = ["eager", "int8", *TOOL.BY_OTHERS]
    runs = TOOL.runs_of(model, x, ways, threads=1)
    assert [*runs] == ways
    with torch.no_grad():
        plain = model(x)
        for way, run in runs.items():
            if "int8" in way:
                assert torch.cdist(run(x), plain).argmin(1).tolist() == [0, 1, 2]
            else:
                assert torch.allclose(run(x), plain, rtol=1e-4, atol=1e-5)


def test_measurement_has_a_row_for_each_model_and_way() -> None:
    models = {"dense": make_host("class_token"), "EViT": make_model("evit", "class_token")}
    rows = TOOL.measure(models, torch.randn(2, 3, 48, 64), ["eager", "int8"], rounds=2, threads=1)
    assert [(row["model"], row["way"]) for row in rows] == [(name, way) for name in models for way in ("eager", "int8")]
    assert all(row["over_eager"] > 0 for row in rows)
