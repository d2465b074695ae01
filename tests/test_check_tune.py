"""The second measurement of what `effvit tune` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_sets import write_fashion
from scripts import load_tool

from effvit.cli import main
from effvit.data.preparation import load_images
from effvit.measure.free_choices import FreeModel
from effvit.measure.records import SCHEMA, read_tuning
from effvit.measure.resume import fingerprint
from effvit.measure.variants import build
from effvit.show.named_images import find_images

TOOL = load_tool("check_tune")


def candidate(method: str, speedup: float, divergence: float, **settings: Any) -> dict[str, Any]:
    return {
        "method": method,
        "settings": settings,
        "macs": 30_000_000,
        "speedup": speedup,
        "interval": [speedup, speedup],
        "fidelity": {"divergence": divergence, "feature_distance": 0.1},
    }


BEST = candidate("tome", 1.5, 0.1, r=2)
TUNED = {
    "schema": SCHEMA,
    "kind": "tune",
    "machine": {
        **dict.fromkeys(("system", "processor", "device", "python", "torch", "timm", "effvit"), ""),
        "cores": 2,
    },
    "host": "vit_nano_patch4_28",
    "target": {"speedup": 1.5},
    "best": BEST,
    "front": [BEST],
    "tried": [
        BEST,
        candidate("tome", 1.6, 0.2, r=3),
        candidate("evit", 1.4, 0.05, keep_rate=0.9),
        candidate("evit", 1.5, 0.4, keep_rate=0.7),
        candidate("evit", 1.9, 0.6, keep_rate=0.5),
        candidate("evit", 1.5, 0.3, keep_rate=0.8, reduce_at=[2]),
    ],
    "conditions": {"batch_size": 4, "input_size": [1, 28, 28], "threads": 1, "device": "cpu", "dtype": "float32"},
}


def test_contenders_are_the_best_and_the_nearest_of_every_other_method_and_place(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps(TUNED))
    assert [c.settings for c in TOOL.contenders(read_tuning(tuned))] == [
        {"r": 2},
        {"keep_rate": 0.8, "reduce_at": [2]},
        {"keep_rate": 0.7},
    ]


def test_all_are_measured_again_and_records_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, out = tmp_path / "tuned.json", tmp_path / "out.json"
    tuned.write_text(json.dumps(TUNED))
    for _ in range(2):
        TOOL.main([str(tuned), "fashion_mnist:*", "--pretrained", "--rounds", "2", "--json", str(out)])
    records = json.loads(out.read_text())
    assert len(records) == 2
    assert [row["method"] for row in records[0]["results"]] == ["tome", "evit", "evit"]
    assert all(row["again"]["speedup"] > 0 for row in records[0]["results"])
    assert "| vit_nano_patch4_28 | 1.50 | **tome** | r=2 | 0.1 |" in capsys.readouterr().out


def test_a_result_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"kind": "profile"}))
    assert TOOL.main([str(tuned), "fashion_mnist:*"]) == 2
    assert (
        "must have \"schema\": 1 and \"kind\": 'tune', got {'schema': None, 'kind': 'profile'}"
        in capsys.readouterr().err
    )
    tuned.write_text(json.dumps({**TUNED, "best": None}))
    assert TOOL.main([str(tuned), "fashion_mnist:*"]) == 2
    assert "names no best setting to measure again; give the file of another search" in capsys.readouterr().err
    tuned.write_text(json.dumps({**TUNED, "target": {"macs": 1e6}}))
    assert TOOL.main([str(tuned), "fashion_mnist:*"]) == 2
    assert "is not the result of `effvit tune --speedup`" in capsys.readouterr().err


class TestFree:
    """The choice beside what needs no search, on images that the search did not see."""

    @pytest.fixture
    def tuned(self, tmp_path: Path) -> Path:
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps(TUNED))
        return path

    def test_a_labelled_set_gives_top1_of_choice_defaults_and_random(
        self, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Top-1 as effvit evaluate counts it on the same sixty images."""
        folder, out, counted = write_fashion(tmp_path / "ten"), tmp_path / "out.json", tmp_path / "counted.json"
        command = [str(tuned), "--data", str(folder), "--pretrained", "--rounds", "2", "--json", str(out)]
        assert TOOL.main(command) == 0
        record = json.loads(out.read_text())[0]
        rows = record["results"]
        assert record["kind"] == "tune_free"
        assert record["images"] == f"{folder}, 60 images"
        assert [(row["what"], row["method"]) for row in rows] == [
            ("choice", "tome"),
            ("default", "tome"),
            ("default", "evit"),
            ("random", "random"),
        ]
        assert [len(row["draws"]) for row in rows] == [1, 1, 1, 3]
        evaluate = ["evaluate", "vit_nano_patch4_28", "--pretrained", "--data", str(folder), "--method", "tome"]
        assert main([*evaluate, "--set", "r=2", "--json", str(counted)]) == 0
        top1 = json.loads(counted.read_text())[0]["models"][1]["accuracy"]["value"]
        assert rows[0]["draws"][0]["classified"]["top1"] == pytest.approx(top1)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vit_nano")]
        assert lines[0].startswith("| vit_nano_patch4_28 | 1.50 | **tome** | r=2 | ")
        assert f" | {top1:.2f} | " in lines[0]
        assert lines[1].startswith("| vit_nano_patch4_28 | 1.50 | tome | defaults | ")
        assert " % of the drops of the choice, 3 draws | " in lines[3]

    def test_images_without_labels_give_divergences_alone(
        self, tuned: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = [str(tuned), "fashion_mnist:sneaker-*", "--free", "--pretrained", "--rounds", "2"]
        assert TOOL.main(command) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vit_nano")]
        assert len(lines) == 4
        assert all(" | – | – | " in line for line in lines)

    def test_random_choices_drop_a_share_of_what_the_choice_drops(self) -> None:
        control = FreeModel("random", {"num_tokens": [40, 9], "seed": 0}, torch.nn.Identity())
        assert TOOL.weaker(control, 0.5, 49) == {"num_tokens": [45, 29], "seed": 0}
        assert TOOL.weaker(control, 1.0, 49) == control.settings

    @pytest.mark.parametrize(
        ("speedups", "number"), [([1.6, 1.55, 1.4, 1.6], 1), ([1.4, 1.6], 0), ([1.7, 1.6, 1.5], 2)]
    )
    def test_random_gets_the_most_tokens_that_leave_it_no_slower(self, speedups: list[float], number: int) -> None:
        """Up to the first that is slower than 1.5: behind it a faster one is noise."""
        assert TOOL.as_fast(speedups, 1.5) == number

    def test_images_that_the_search_chose_on_are_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = build("vit_nano_patch4_28", {}, pretrained=True).eval()
        pixels = fingerprint([load_images(model, find_images(["fashion_mnist:bag-*"]))])
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps({**TUNED, "conditions": {**TUNED["conditions"], "pixels": pixels}}))
        assert TOOL.main([str(path), "fashion_mnist:bag-*", "--free", "--pretrained"]) == 2
        assert "on images that the search did not see, but it chose on these" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([], "give one of IMAGEs and --data PATH to measure on"),
            (["fashion_mnist:*", "--data", "ten"], "give one of IMAGEs and --data PATH to measure on"),
            (["fashion_mnist:*", "--limit", "3"], "--limit takes some images of a labelled set"),
        ],
    )
    def test_what_does_not_go_together_is_refused(
        self, tuned: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert TOOL.main([str(tuned), *given]) == 2
        assert message in capsys.readouterr().err
