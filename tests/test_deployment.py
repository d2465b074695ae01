"""Files for other runtimes: right on other images and batches, or nothing is written and an error says why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from torch import Tensor, nn

import effvit
from effvit.deployment import formats
from effvit.deployment.exporting import export
from effvit.deployment.formats import FORMATS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deployment.md"


def small(method: str = "evit", **settings: object) -> nn.Module:
    return hosts.make_model(method, "class_token", **settings)


def images(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, to: str, batch_size: int | None = None, model: nn.Module | None = None) -> Path:
    path = folder / f"model{FORMATS[to].suffix}"
    export(model or small(), path, images(4), to=to, batch_size=batch_size)
    return path


@pytest.mark.parametrize("to", FORMATS)
def test_file_gives_the_scores_of_the_model_on_new_images(to: str, tmp_path: Path) -> None:
    """The plain run of the model is the expectation, on images and a batch that export has not seen."""
    model, x = small(), images(7, seed=1)
    run = FORMATS[to].read(written(tmp_path / "folder", to, model=model))
    with torch.no_grad():
        assert torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_file_of_one_batch_size_takes_no_other(tmp_path: Path) -> None:
    run = FORMATS["pt2"].read(written(tmp_path, "pt2", batch_size=3))
    assert run(images(3)).shape == (3, 7)
    with pytest.raises(Exception, match="3"):
        run(images(2))


def test_pt2_file_runs_where_only_torch_is_imported(tmp_path: Path) -> None:
    """As a server would run it: the program holds no class of this package."""
    path = written(tmp_path, "pt2")
    script = (
        f"import sys, torch; y = torch.export.load({str(path)!r}).module()(torch.zeros(6, 3, 48, 64)); "
        "assert 'effvit' not in sys.modules; print(*y.shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "7"]


class Recorded(nn.Module):
    """A model that computes something else while it is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x.mean(3).flatten(1)[:, :7]
        return scores.roll(1, 1) if torch.compiler.is_compiling() else scores


class FixedBatch(nn.Module):
    """A model whose graph is of one batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :7] if torch.compiler.is_compiling() else x.reshape(len(x), -1)[:, :7]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    return model


class TestNothingIsWritten:
    def test_where_the_file_computes_something_else(self, tmp_path: Path) -> None:
        """The former file stays as it was, and no draft is left."""
        path = tmp_path / "model.pt2"
        path.write_text("the former one")
        with pytest.raises(ValueError, match=r"nothing was written: scores of the pt2 file differ .* same class"):
            export(Recorded().eval(), path, images(4), to="pt2")
        assert path.read_text() == "the former one"
        assert [*tmp_path.iterdir()] == [path]

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            (Pair(), TypeError, r"return scores \(B, classes\); this Pair gives a tuple"),
            (nn.Identity(), TypeError, r"this Identity gives a tensor \(1, 3, 48, 64\)"),
            (broken(small()), ValueError, "own scores are not finite"),
            (small("ats", ragged="packed"), ValueError, "ragged='padded'"),
            (FixedBatch(), ValueError, "cannot record a FixedBatch"),
        ],
        ids=["pair", "map", "nan", "packed", "fixed batch"],
    )
    def test_of_a_model_that_has_no_right_file(
        self, model: nn.Module, error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=message):
            export(model.eval(), tmp_path / "model.pt2", images(4), to="pt2")
        assert not [*tmp_path.iterdir()]

    def test_where_runtime_refuses_or_changes_the_shape(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(x: Tensor) -> Tensor:
            raise RuntimeError("no such\noperator")

        for run, message in (
            (refuse, "not run on a batch of 1: no such operator"),
            (torch.flatten, r"scores \(9216,\) of a batch of 1, the model \(1, 7\)"),
            (lambda x: torch.full((len(x), 7), torch.nan), "differ from the model's by nan"),
        ):
            monkeypatch.setitem(FORMATS, "pt2", FORMATS["pt2"]._replace(read=lambda _, run=run: run))
            with pytest.raises(ValueError, match=message):
                export(small(), tmp_path / "model.pt2", images(4), to="pt2")
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"to": "tflite"}, "to must be one of onnx, pt2, openvino, got 'tflite'"),
            ({"to": "onnx"}, r"a file of onnx must end in .onnx, got .*model.pt2"),
            ({"images": images(1)}, "images must be at least 2, .* got 1"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"model": small().train()}, r"training mode.*call model.eval\(\)"),
        ],
    )
    def test_of_arguments_that_do_not_fit(self, changed: dict[str, object], message: str, tmp_path: Path) -> None:
        given = {"model": small(), "path": tmp_path / "model.pt2", "images": images(4), "to": "pt2"} | changed
        model, path, x = (given.pop(name) for name in ("model", "path", "images"))
        with pytest.raises(ValueError, match=message):
            export(model, path, x, **given)
        assert not [*tmp_path.iterdir()]

    def test_without_the_packages_of_the_format(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"need onnx, onnxscript, openvino; run pip install 'effvit\[export\]'"):
            export(small(), tmp_path / "model.xml", images(4), to="openvino")


def test_uncalibrated_dymu_names_what_it_needs(tmp_path: Path) -> None:
    model = effvit.sparsify(hosts.make_host("class_token"), "dymu").eval()
    with pytest.raises(ValueError, match="thresholds"):
        export(model, tmp_path / "model.pt2", images(4), to="pt2")


def test_example_of_the_page_runs_and_its_comment_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example is not None
    values: dict[str, Any] = {}
    exec(example[1], values)
    assert capsys.readouterr().out.startswith("Agreement(batch_sizes=(1, 3, 5), ")
    assert values["scores"].shape == (6, 10)
