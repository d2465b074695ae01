"""Probes on selected tokens: what they compute, the cells of the tool, and that it goes on from its file."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scripts import load_tool

from effvit.data.labelled import PixelImages
from effvit.selectors import SELECTORS
from effvit.show.pictures import fashion_pictures

TOOL = load_tool("measure_probes")


@pytest.fixture
def garments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool on the sixty garments of the package in place of those that are fetched."""
    entries = list(fashion_pictures().values())
    pixels = torch.stack([torch.from_numpy(np.array(entry.image)) for entry in entries])
    labels = [entry.label for entry in entries]
    monkeypatch.setattr("data.choice_sets.open_labelled", lambda path: PixelImages(str(path), pixels, labels))
    return TOOL


def measured(path: Path, *more: str) -> dict[str, Any]:
    options = "--pretrained --train-images 60 --test-images 20 --seeds 0 1 --epochs 2 --batch-size 20"
    assert TOOL.main(["fashion_mnist", *options.split(), "--json", str(path), *more]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    return record


class TestProbes:
    def probes(self) -> Any:
        torch.manual_seed(0)
        return TOOL.Probes(torch.randn(8), torch.rand(8) + 0.5, 5, heads=2)

    def test_padding_changes_nothing_and_neither_does_the_order_of_tokens(self) -> None:
        probes, x = self.probes(), torch.randn(3, 6, 8)
        padded = torch.cat([x, torch.full((3, 2, 8), 7.0)], dim=1)
        valid = torch.arange(8).expand(3, -1) < 6
        for own, others in zip(probes(x), probes(padded, valid), strict=True):
            torch.testing.assert_close(own, others)
        for own, others in zip(probes(x), probes(x.flip(1)), strict=True):
            torch.testing.assert_close(own, others)

    def test_of_one_token_both_probes_are_linear_in_it(self) -> None:
        """The mean of one token, and its attention, is the token."""
        probes, x = self.probes(), torch.randn(3, 1, 8)
        token = (x[:, 0] - probes.mean) / probes.std
        linear, attention = probes(x)
        torch.testing.assert_close(linear, probes.linear(token))
        torch.testing.assert_close(attention, probes.attention(token.repeat(1, 2)))

    def test_training_finds_what_is_in_the_tokens(self) -> None:
        """Two classes that differ in the mean of one channel, which both probes can read of all tokens and of a few."""
        labels = torch.arange(200) % 2
        x = torch.randn(200, 9, 4) + 2.0 * labels.view(-1, 1, 1) * torch.eye(4)[1]
        probes = TOOL.Trainer(epochs=30, batch_size=50, rate=0.01).train(TOOL.Stored(x, (3, 3), labels, {}), seed=0)
        for tokens, least in ((x, 0.99), (x[:, :3], 0.9)):
            for scores in probes(tokens):
                assert (scores.argmax(1) == labels).double().mean() > least


class TestTool:
    def test_every_method_and_number_has_a_cell_or_says_why_not(self, garments: ModuleType, tmp_path: Path) -> None:
        record = measured(tmp_path / "probes.json")
        cells = {(cell["method"], cell["divisor"]): cell for cell in record["cells"]}
        images = {name for name, kind in SELECTORS.items() if kind.takes == "select_tokens" and not kind.learns}
        assert {method for method, _ in cells} == images | {"all tokens"}
        for method in images - {"recoverable"}:
            assert {divisor for name, divisor in cells if name == method} == {*TOOL.DIVISORS}
        assert "7 x 7 cells it gives 49, 1 tokens, got keep=24" in cells["matryoshka", 2]["refused"]
        assert cells["divprune", 8]["tokens"] == 6
        assert len(cells["random", 4]["attention"]) == 2
        assert all(0 <= top1 <= 100 for cell in cells.values() for top1 in cell.get("linear", []))
        assert any(line.startswith("| divprune |") for line in TOOL.table(record, "linear"))

    def test_it_goes_on_from_the_cells_there_are(
        self, garments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "probes.json"
        monkeypatch.setattr(TOOL, "methods_of", lambda depth: ["uniform"])
        first = measured(path)
        monkeypatch.setattr(TOOL, "methods_of", lambda depth: ["uniform", "aim"])
        second = measured(path)
        assert second["cells"][: len(first["cells"])] == first["cells"]
        assert len(second["cells"]) == len(first["cells"]) + len(TOOL.DIVISORS)
        capsys.readouterr()
        arguments = [
            "fashion_mnist",
            "--pretrained",
            "--train-images",
            "30",
            "--test-images",
            "20",
            "--json",
            str(path),
        ]
        assert TOOL.main(arguments) == 2
        assert "the measurement in" in capsys.readouterr().err

    def test_random_weights_and_missing_ones_are_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["cutouts", "--root", str(tmp_path), "--json", str(tmp_path / "out.json")]
        assert TOOL.main(options) == 2
        assert "give --checkpoint, --pretrained or --mobile-sam" in capsys.readouterr().err
        assert TOOL.main([*options, "--mobile-sam"]) == 2
        assert "there are no weights at" in capsys.readouterr().err
        for more in (["--block", "-1"], ["--pretrained"]):
            assert TOOL.main([*options, "--mobile-sam", *more]) == 2
            assert "leave the weights and --block out" in capsys.readouterr().err

    def test_windowed_network_takes_methods_of_features_alone(self) -> None:
        assert {"divprune", "aim", "uniform"} < {*TOOL.methods_of(0)}
        assert all(SELECTORS[name].row is None for name in TOOL.methods_of(0))
        network = timm.create_model("tiny_vit_5m_224", num_classes=0).eval()
        with torch.no_grad():
            found = TOOL.windowed_source(network).reading([])(torch.randn(2, 3, 64, 64))
            maps = network.forward_features(torch.zeros(1, 3, 64, 64))
        assert found.grid == tuple(maps.shape[2:])
        assert found.x.shape == (2, found.grid[0] * found.grid[1], maps.shape[1])


def test_text_names_methods_that_a_control_is_above() -> None:
    def cell(method: str, linear: float) -> dict[str, Any]:
        return {"method": method, "divisor": 4, "linear": [linear, linear], "attention": [50.0, 50.0]}

    cells = [cell("random", 40.0), cell("uniform", 60.0), cell("divprune", 55.0), cell("aim", 65.0)]
    cells.append({"method": "matryoshka", "divisor": 4, "refused": "no"})
    assert TOOL.remarks({"cells": cells}) == ["linear probe, N / 4: uniform is above divprune."]
    assert TOOL.table({"cells": cells}, "linear")[-1] == "| matryoshka |  |  | n/a |  |  |  |"
