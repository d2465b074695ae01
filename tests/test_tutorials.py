"""The tutorials of docs/tutorials do what they say: their code runs in order, and prints what the pages show.

Every page is run as a reader would, from the first block to the last in one namespace and in an empty folder: blocks of
Python are executed, blocks with a title are written as files, and the commands of blocks of shell are run. Pages whose
notebook is shipped are run from the notebook, cell by cell: its cells are plain Python, so that a kernel of Jupyter
would add a process and packages and no further check. Indented commands are for the reader's own images; those of
effvit are parsed.

All of it is offline. Pages start from the weights and images in the package, or name a model whose weights timm would
download: ``STAND_INS`` lists what is put in place of such a line, and each must occur exactly once in its page.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Collection
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, BinaryIO

import make_notebooks
import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from make_notebooks import Block, blocks
from PIL import Image

import effvit
from effvit.cli import main, parser
from effvit.data.preparation import load_images

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / make_notebooks.PAGES
PAGES = sorted(TUTORIALS.glob("*.md"))
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
SMALL = {"model_name": "evit_deit_tiny_patch16_224", "depth": 4, "embed_dim": 48}
SMALL_MODEL = "--model evit_deit_tiny_patch16_224 --set depth=4 --set embed_dim=48"
# Name of a page -> {a part of it: what is run instead}. The models of the first are as large as they are called, with
# random weights; LayerScale starts at 1, not at the 1e-5 that would leave every feature as it was embedded. Workers
# would outnumber the cores of a small machine.
STAND_INS = {
    "dense_features_for_a_segmenter": {
        'dinov2.lvd142m", pretrained=True, img_size=224)': 'dinov2", init_values=1.0, img_size=224)',
        '"tome_vit_small_patch16_dinov3.lvd1689m", pretrained=True,': '"tome_vit_small_patch16_dinov3",',
        'encoder_weights="imagenet"': "encoder_weights=None",
        "out_norm=True,\n    pretrained=True": "out_norm=True,\n    pretrained=False",
    },
    "fine_tune_on_a_folder": {
        "model = dict(num_classes=10,": f"model = dict(pretrained=False, **{SMALL}, num_classes=10,",
        "    batch_size=8,": "    batch_size=8, num_workers=0,",
        "val_dataloader = dict(dataset": "val_dataloader = dict(num_workers=0, dataset",
        "--work-dir work --auto-scale-lr": "--work-dir work --auto-scale-lr --cfg-options train_cfg.max_epochs=1",
        "garments.py work/epoch_30.pth": "garments.py work/epoch_1.pth",
        "work/epoch_30.pth --model evit_deit_small_patch16_224": f"work/epoch_1.pth {SMALL_MODEL}",
        '("evit_deit_small_patch16_224", num_classes=10': f"(**{SMALL}, num_classes=10",
    },
}
FIGURE = ROOT / "docs/images/explained.png"
NUMBER = re.compile(r"\d+\.\d+")


def shown_by(cell: dict[str, Any]) -> str | None:
    """What a cell of a notebook holds as printed."""
    return "".join(line for output in cell["outputs"] for line in output["text"]) or None


def own_blocks(name: str, left_out: Collection[str] = ()) -> list[Block]:
    """The parts of a tutorial as they are run: those of its notebook if it has one, with the stand-ins in place.

    Args:
        name: Name of the page without ``.md``.
        left_out: Titles of sections that are not run.
    """
    notebook = TUTORIALS / f"{name}.ipynb"
    if notebook.is_file():
        cells = json.loads(notebook.read_text())["cells"]
        return [Block("python", "".join(cell["source"]), shown=shown_by(cell)) for cell in cells if "outputs" in cell]
    page = (TUTORIALS / f"{name}.md").read_text()
    for line, stand_in in STAND_INS.get(name, {}).items():
        assert page.count(line) == 1, f"{name}.md must hold {line!r} once, for which the test has a stand-in"
        page = page.replace(line, stand_in)
    first, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    titles = {section.partition("\n")[0]: section for section in sections}
    assert titles.keys() >= set(left_out)
    return list(blocks("".join([first, *(section for title, section in titles.items() if title not in left_out)])))


def joined(text: str) -> str:
    """The text with commands over several lines, each but the last ending in a backslash, as one line."""
    return re.sub(r"\\\n *", "", text)


def torchrun(arguments: list[str]) -> str:
    """What processes print that torchrun starts."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(line: str) -> None:
    """Run a command of a page, in this process, which has imported torch already, unless it starts several."""
    program, *arguments = shlex.split(line)
    if program == "effvit":
        assert main(arguments) == 0, line
    elif program == "torchrun":
        print(torchrun(arguments), end="")
    else:
        assert program == "python", f"{line}: a block of shell runs effvit, python or torchrun"
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run_block(block: Block, values: dict[str, Any]) -> str:
    """Run a block of a page and return what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if block.title is not None:
            Path(block.title).write_text(block.content)
        elif block.kind == "python":
            exec(compile(block.content, "<tutorial>", "exec"), values)
        elif block.kind == "shell":
            for line in joined(block.content).splitlines():
                run_command(line)
    return printed.getvalue()


def assert_shown(printed: str, shown: str) -> None:
    """What is printed is what the page shows; a decimal may differ by one in its last digit, as rounding does."""
    assert NUMBER.sub("0.0", printed) == NUMBER.sub("0.0", shown)
    for own, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        unit = 10.0 ** -len(expected.partition(".")[2])
        assert float(own) == pytest.approx(float(expected), abs=1.01 * unit), f"{printed}\nis not\n{shown}"


def run_page(
    name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, left_out: Collection[str] = ()
) -> dict[str, Any]:
    """Run a tutorial in a folder and compare what it prints; returns its variables."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    values: dict[str, Any] = {"__name__": "tutorial"}
    for block in own_blocks(name, left_out):
        printed = run_block(block, values)
        if block.shown is not None:
            assert_shown(printed, block.shown)
    plt.close("all")
    return values


@pytest.mark.slow  # 15 s on one core, most of it the controls
def test_speed_up_a_classifier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = run_page("speed_up_a_classifier", monkeypatch, tmp_path)["record"]
    assert [cost.name for cost in record.models] == ["dense", "ToMe, r 3"]
    assert record.models[1].mac_ratio == pytest.approx(1 / 0.62, rel=0.01)


def test_explain_predictions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's figure is the one that its code draws, up to what fonts and rounding change. That a map of
    ``forward_intermediates`` has no part in the score, as the page says, is what torch says."""
    values = run_page("explain_predictions", monkeypatch, tmp_path)
    own, shown = (np.asarray(Image.open(path).convert("RGB"), float) for path in ("explained.png", FIGURE))
    assert own.shape == shown.shape
    assert np.abs(own - shown).mean() < 2, f"copy {tmp_path / 'explained.png'} to {FIGURE}"
    final, (grid,) = values["cheap"].forward_intermediates(values["images"][:1], indices=[8])
    score = values["cheap"].forward_head(final)[0, 0]
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(score, grid)


FINE_TUNING = "fine_tune_on_a_folder"


@pytest.mark.slow  # three trainings
def test_fine_tune_on_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = run_page(FINE_TUNING, monkeypatch, tmp_path, {"With mmpretrain"})["results"]
    assert results.keys() == {"distilled", "all tokens", "dense", *(f"random, seed {seed}" for seed in range(3))}
    assert results["distilled"].top1 > 40  # of ten classes


@pytest.mark.slow  # a training of mmpretrain
@pytest.mark.filterwarnings("ignore:.*(instance named of|The draw is False).*:UserWarning")
def test_fine_tuning_with_mmpretrain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain", reason="the mm extra is not installed")
    left_out = {"The loop", "With a dense teacher", "What did the training buy?"}
    model = run_page(FINE_TUNING, monkeypatch, tmp_path, left_out)["model"]
    trained = torch.load(tmp_path / "work/epoch_1.pth", weights_only=False)["state_dict"]
    assert torch.equal(model.head.weight, trained["head.weight"])


@pytest.mark.slow  # 22 M parameters at 224 px
def test_dense_features_for_a_segmenter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With random weights the similarities and the scores say nothing of DINO, so that the page shows none. What holds
    for any weights: the first maps lie before EViT's first reduction, and later ones come apart."""
    pytest.importorskip("segmentation_models_pytorch")
    values = run_page("dense_features_for_a_segmenter", monkeypatch, tmp_path)
    for name in ("EViT", "EViT, control"):
        first, *others = values["similarities"][name]
        assert first == pytest.approx(1)
        assert all(-1 <= similarity < 0.9999 for similarity in others)
    assert values["ious"].keys() == {"dense", "EViT", "EViT, control"}
    assert all(0.2 < iou <= 1 for iou in values["ious"].values())


@pytest.mark.slow  # 86 M parameters, of which four blocks run
def test_sam_with_half_its_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What holds for any weights: merging more tokens moves the map of the neck further, and no weight is changed."""
    values = run_page("sam_with_half_its_tokens", monkeypatch, tmp_path)
    errors = list(values["errors"].values())
    assert errors == sorted(errors)
    assert 0 == errors[0] < errors[1]
    assert torch.equal(values["encoder"].forward_features(values["images"]), values["plain"])


@pytest.mark.slow  # five processes
def test_many_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The losses shown are the same three times; test_many_processes.py compares weights too, in double precision."""
    run_page("many_gpus", monkeypatch, tmp_path)
    assert len({block.shown for block in own_blocks("many_gpus") if block.kind == "shell"}) == 1


FEATURES = "features_in_shards"


def stored(folder: str, name: str) -> np.ndarray:
    """The arrays of all shards of a folder, joined."""
    return np.concatenate([np.load(path)[name] for path in sorted(Path(folder).glob("*.npz"))])


def test_features_in_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The map made of stored tokens is the model's own where patches have tokens; neither the size of a batch nor that
    of a shard matters; and what is there is never taken for something else."""
    values = run_page(FEATURES, monkeypatch, tmp_path, {"With Ray Data"})
    model = effvit.sparsify(timm.create_model("vit_nano_patch4_28", pretrained=True), "ats", keep_rate=0.8).eval()
    images = load_images(model, [Image.open(path) for path in values["shard"]["paths"][:3]])
    with torch.inference_mode():
        (maps,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    carried = values["source"].reshape(7, 7) >= 0
    np.testing.assert_allclose(values["grid"], np.where(carried, maps[2], 0), atol=0.01)
    assert 0 < carried.sum() < 49
    assert stored("maps", "maps").shape == (60, 96, 7, 7)
    assert stored("pooled", "pooled").shape == (60, 96)

    ats = """--kind tokens --method ats --settings '{"keep_rate": 0.8}'"""
    run_command(f"python extract.py garments others {ats} --shard-size 25 --batch-size 7")
    for name in ("paths", "lengths", "source"):
        np.testing.assert_array_equal(stored("others", name), stored("tokens", name))
    np.testing.assert_allclose(stored("others", "tokens"), stored("tokens", "tokens"), atol=0.01)

    with pytest.raises(ValueError, match=r"pooled/000000.npz holds other images than the list has there"):
        run_command("python extract.py garments pooled --shard-size 8")


def test_shards_of_a_run_that_stopped_are_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_page(FEATURES, monkeypatch, tmp_path, {"What is stored", "A run that stopped", "With Ray Data"})
    save, calls = np.savez, itertools.count()

    def full_disk(file: BinaryIO, **arrays: np.ndarray) -> None:
        save(file, **arrays)
        if next(calls) == 2:
            file.truncate(100)
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="no space"):
            run_command("python extract.py garments pooled")
    assert sorted(path.name for path in Path("pooled").glob("*.npz")) == ["000000.npz", "000001.npz"]
    run_command("python extract.py garments pooled")
    assert len(stored("pooled", "pooled")) == 60


@pytest.mark.slow  # two workers of Ray
@pytest.mark.filterwarnings("default")  # Ray's own
def test_features_in_shards_by_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed, see make test-ray")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray leaves a token
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    try:
        run_page(FEATURES, monkeypatch, tmp_path)
    finally:
        ray.shutdown()
    assert len(stored("by_two", "lengths")) == len(stored("pooled", "pooled")) == 60


def test_tokens_for_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the plug-in of the page promises an engine, with every method that needs features alone."""
    values = run_page("tokens_for_an_engine", monkeypatch, tmp_path)
    media, features = values["media"], values["features"]
    for method in ("divprune", "cdpruner", "aim", "uniform", "random"):
        pruner = values["TokenPruner"](method, keep=0.25)
        left = pruner(features, media)
        for medium, kept in zip(media, left, strict=True):
            assert kept.per_frame == pruner.counts(medium)
            assert len(kept.tokens) == len(kept.ids) == len(kept.positions) == sum(kept.per_frame)
            frames, height, width = kept.positions.T
            assert torch.equal((frames * medium[1] + height) * medium[2] + width, kept.ids)
            assert (kept.ids.diff() > 0).all()
    whole = values["TokenPruner"]("divprune", keep=1.0)(features, media)
    assert torch.equal(torch.cat([kept.tokens for kept in whole]), features)


@pytest.mark.parametrize(
    ("printed", "is_shown"),
    [("3 of 0.62", True), ("3 of 0.61", True), ("3 of 0.60", False), ("2 of 0.62", False), ("3 of 0.62 MACs", False)],
)
def test_only_the_last_digit_of_a_decimal_may_differ(printed: str, is_shown: bool) -> None:
    with nullcontext() if is_shown else pytest.raises(AssertionError):
        assert_shown(printed, "3 of 0.62")


def test_every_tutorial_is_run_by_a_test() -> None:
    """Here, or where OpenMMLab (test_tutorials_own_data.py) or transformers is needed from the first line on."""
    files = ("test_tutorials*.py", "test_transformers*.py")
    tests = "".join(path.read_text() for name in files for path in Path(__file__).parent.glob(name))
    assert [page.stem for page in PAGES if page.stem not in tests] == []


def test_commands_of_the_pages_are_understood() -> None:
    """An indented command, and one in a block of shell, is one that the command line takes."""
    for page in PAGES:
        for line in re.findall(r"^(?: {4})?(effvit .*)$", joined(page.read_text()), re.MULTILINE):
            assert parser().parse_args(shlex.split(line, comments=True)[1:]).run is not None


class TestNotebooks:
    def test_they_are_those_of_their_pages(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert make_notebooks.main(["--check"]) == 0, capsys.readouterr().err
        assert {path.stem for path in NOTEBOOKS} <= {page.stem for page in PAGES}

    def test_page_becomes_cells_with_what_they_print(self) -> None:
        page = (
            "# Title\n\nAlso as a [notebook](a.ipynb).\n\nText.\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
            '```python title="b.py"\nx = 1\n```\n\nEnd.\n'
        )
        cells = json.loads(make_notebooks.notebook(page, "a"))["cells"]
        assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown"]
        assert "".join(cells[0]["source"]) == "# Title\n\nText."
        assert cells[1]["source"] == ["print(1)"]
        assert cells[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]
        assert "".join(cells[2]["source"]) == "```python\nx = 1\n```\n\nEnd."

    def test_code_for_ipython_alone_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"a: a page holds plain Python, but a line starts with % or !; leave it"):
            make_notebooks.notebook("```python\n%matplotlib inline\n```\n", "a")

    def test_check_names_what_is_stale_and_the_command_mends_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / make_notebooks.PAGES).mkdir(parents=True)
        (tmp_path / make_notebooks.PAGES / "a.md").write_text("A [notebook](a.ipynb).\n\n```python\nx = 1\n```\n")
        (tmp_path / make_notebooks.PAGES / "b.md").write_text("No notebook.\n")
        monkeypatch.setattr(make_notebooks, "ROOT", tmp_path)
        assert make_notebooks.main(["--check"]) == 1
        assert "docs/tutorials/a.ipynb is stale: run python tools/make_notebooks.py" in capsys.readouterr().err
        assert make_notebooks.main([]) == 0
        assert make_notebooks.main(["--check"]) == 0
        assert not (tmp_path / make_notebooks.PAGES / "b.ipynb").exists()
