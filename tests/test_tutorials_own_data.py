"""The tutorials on data of one's own: their configs and commands run as they are written, away from the checkout."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import foreign_files
import pytest
import timm
import torch
from drawn_parts import save_as_jpeg, write_parts
from safetensors.torch import save_file

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")

from effvit.cli import main
from effvit.dense.own_data import inspect_coco, inspect_label_maps

DETECTOR, SEGMENTER = "mask_rcnn_on_my_coco_json.md", "upernet_on_my_masks.md"
# What brings about each sentence of docs/own_data.md, in its order: a page, its config, and what is changed there.
FAULTS = [
    (DETECTOR, "parts.py", '("bolt", "nut")', '("screw", "washer")'),
    (DETECTOR, "parts.py", '("bolt", "nut")', '("bolt", "nit")'),
    (DETECTOR, "parts.py", "num_classes=len(classes)", "num_classes=80"),
    (SEGMENTER, "parts.py", "reduce_zero_label=False, ", ""),
    (SEGMENTER, "parts.py", '("ground", "bolt", "nut")', '("ground", "bolt")'),
    (SEGMENTER, "parts.py", 'type="BaseSegDataset", ', ""),
    (DETECTOR, "parts_tiny.py", "neck=dict(in_channels=192),", ""),
]

# Every Runner of a process after the first, and one that draws nothing, make mmengine say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*(instance named of|The draw is False).*:UserWarning")

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"


class Command(NamedTuple):
    """A command of a page.

    Attributes:
        arguments: Behind ``effvit``.
        expected: Lines that it prints, as far as the page shows them.
    """

    arguments: list[str]
    expected: list[str]


def configs(page: str) -> dict[str, str]:
    """The configs of a page by the name in their first line."""
    blocks = re.findall(r"```python\n(# (\w+\.py)\b.*?)```", page, re.DOTALL)
    return {name: text for text, name in blocks}


def commands(page: str) -> Iterator[Command]:
    """The commands of a page in order, each with its output."""
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *expected = text.splitlines()
            program, *arguments = shlex.split(first)
            assert program == "effvit"
            yield Command(arguments, expected)


def pattern(lines: list[str]) -> str:
    """Matches lines of which "..." alone stands for any number of lines, and at the end of one for the rest of it."""
    ends = {True: r".*\n", False: r"\n"}
    return "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(line.removesuffix("...")) + ends[line.endswith("...")]
        for line in lines
    )


def run_page(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], others: Collection[str] = ("configs",)
) -> dict[str, float]:
    """Run a page in a folder and hold it to the output that it shows; returns the metrics of its last test.

    Args:
        name: Of the page.
        folder: The working directory.
        capsys: What captures the output.
        others: Commands that it shows besides check-data, train and test.
    """
    page = (TUTORIALS / name).read_text()
    for config, text in configs(page).items():
        (folder / config).write_text(text)
    ran = set()
    for arguments, expected in commands(page):
        capsys.readouterr()
        status = main(arguments)
        said = capsys.readouterr()
        is_refused = any(line.startswith("effvit: error: ") for line in expected)
        printed = said.err if is_refused else said.out
        wrong = any(line.startswith("wrong:") for line in expected)
        assert status == (2 if is_refused else 1 if wrong else 0), printed
        if expected:
            assert re.fullmatch(pattern(expected), printed), f"effvit {' '.join(arguments)} prints\n{printed}"
        ran.add(arguments[0])
    assert ran == {"check-data", "train", "test", *others}
    (record,) = json.loads((folder / "metrics.json").read_text())
    metrics: dict[str, float] = record["metrics"]
    return metrics


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, with the data that the pages describe."""
    monkeypatch.chdir(tmp_path)
    write_parts(tmp_path / "parts")
    return tmp_path


def test_mask_rcnn_trains_on_a_coco_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that learnt nothing may detect nothing: mmdet then gives no metrics, and -1 for sizes there are not."""
    metrics = run_page(DETECTOR, folder, capsys)
    assert all(-1 <= value <= 1 for value in metrics.values())
    assert (folder / "work_dirs/parts_tiny/epoch_1.pth").is_file()


def test_upernet_trains_on_a_folder_of_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three classes are measured: 0 is one of them, though the inherited pipelines are for a set that ignores it."""
    save_as_jpeg(folder / "parts")
    page = (TUTORIALS / SEGMENTER).read_text()
    undecided = configs(page)["parts.py"].replace("reduce_zero_label=False, ", "")
    (folder / "undecided.py").write_text(undecided)
    metrics = run_page(SEGMENTER, folder, capsys)
    assert 0 <= metrics["mIoU"] <= 100
    state = torch.load(folder / "work_dirs/parts_tiny/iter_3.pth", weights_only=False)["state_dict"]
    assert state["decode_head.conv_seg.weight"].shape[0] == 3


def test_dinov3_of_transformers_trains_under_mask_rcnn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The backbone in the checkpoint, which is frozen, has the weights of the file, under timm's names."""
    source = timm.create_model("vit_small_patch16_dinov3")
    (folder / "dinov3").mkdir()
    save_file(foreign_files.dinov3_of_transformers(source), folder / "dinov3/model.safetensors")
    metrics = run_page("dinov3_of_transformers_under_my_detector.md", folder, capsys, {"convert"})
    assert all(-1 <= value <= 1 for value in metrics.values())
    state = torch.load(folder / "work_dirs/parts_tiny/epoch_1.pth", weights_only=False)["state_dict"]
    trained = {name.rpartition("model.")[2]: value for name, value in state.items() if name.startswith("backbone.")}
    assert len(trained) > 150
    for name, value in trained.items():
        if name in source.state_dict():
            torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["masks", "boxes", "labels"])
def test_lines_of_check_data_are_a_config(kind: str, folder: Path) -> None:
    """With the same set for validation, which only its owner can name."""
    annotations = Path("parts/train.json")
    if kind == "boxes":
        annotations.write_text(re.sub(r'"segmentation": \[\[.*?\]\]', '"segmentation": []', annotations.read_text()))
    images = Path("parts/images/train")
    labels = kind == "labels"
    found = inspect_label_maps(Path("parts/masks/train"), images) if labels else inspect_coco(annotations, images)
    lines = [*found.config, "val_dataloader = test_dataloader = train_dataloader"]
    if not labels:
        lines.append(f'val_evaluator = test_evaluator = dict(ann_file="{annotations}")')
    Path("printed.py").write_text("\n".join(lines))
    assert main(["check-data", "printed.py"]) == 0


def sentences() -> list[str]:
    """The second column of the last table of docs/own_data.md."""
    table = (TUTORIALS.parent / "own_data.md").read_text().rpartition("| what is the matter |")[2]
    return [line.split(" | ")[1].removesuffix(" |") for line in table.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(("fault", "sentence"), list(zip(FAULTS, sentences(), strict=True)))
def test_page_shows_what_is_said(
    fault: tuple[str, str, str, str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentences that ``effvit check-data`` prints, "(...)" for what a page has no room for."""
    page, changed, old, new = fault
    if page == SEGMENTER:
        save_as_jpeg(folder / "parts")
    for name, text in configs((TUTORIALS / page).read_text()).items():
        assert name != changed or old in text
        (folder / name).write_text(text.replace(old, new) if name == changed else text)
    assert main(["check-data", changed]) == 1
    start, cut, end = sentence.partition("(...)")
    wanted = re.escape(start) + (r"\([^)]*\)" if cut else "") + re.escape(end)
    assert re.search(f"^wrong: {wanted}$", capsys.readouterr().out, re.MULTILINE)
