"""Evaluations that are interrupted, shared by processes, or held against published figures."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from labelled_sets import write_fashion, write_folders

import effvit
from effvit.cli import main, paper
from effvit.cli.output import file_stem
from effvit.measure.counting import Counts, KeptCounts
from effvit.measure.json_files import read_json
from effvit.measure.published import PublishedModel, published
from effvit.measure.records import read_results
from effvit.measure.values import Published

NANO = "vit_nano_patch4_28"
VARIANTS = ["--method", "evit", "tome", "--set", "keep_rate=0.5", "--set", "r=3"]


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fashion(tmp_path_factory.mktemp("fashion") / "ten")


def command_of(fashion: Path) -> list[str]:
    """The command that is interrupted: twelve batches of five images."""
    return ["evaluate", NANO, "--pretrained", "--data", str(fashion), *VARIANTS, "--batch-size", "5", "--every", "1"]


@pytest.fixture
def command(fashion: Path) -> list[str]:
    return command_of(fashion)


def accuracies(path: Path) -> dict[str, float]:
    """Name -> top-1 of all models in a file."""
    return {model["name"]: model["accuracy"]["value"] for record in read_results(path) for model in record["models"]}


@pytest.fixture(scope="module")
def uninterrupted(fashion: Path) -> dict[str, float]:
    path = fashion.parent / "uninterrupted.json"
    assert main([*command_of(fashion), "--json", str(path)]) == 0
    return accuracies(path)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Press Ctrl-C once the counts have been kept so many times; back to work when called with None."""
    keep = KeptCounts.keep

    def install(times: int | None) -> None:
        left = [times]

        def interrupting(self: KeptCounts, name: str, conditions: Any, counts: Counts) -> None:
            keep(self, name, conditions, counts)
            left[0] = None if left[0] is None else left[0] - 1
            if left[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(KeptCounts, "keep", interrupting)

    return install


class TestResume:
    def test_killed_evaluation_goes_on_to_the_same_numbers(
        self, command: list[str], uninterrupted: dict[str, float], tmp_path: Path
    ) -> None:
        """Killed for real by a signal that no handler sees, with counts of some batches in the file."""
        state, out = tmp_path / "state.json", tmp_path / "a.json"
        command = [*command, "--state", str(state), "--json", str(out)]
        slow = "import time; from effvit.measure import counting as c; f = c.right_answers; "
        slow += "c.right_answers = lambda *a: (time.sleep(0.3), f(*a))[1]; "
        slow += f"from effvit.cli import main; main({command!r})"
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", slow], cwd=Path(effvit.__file__).parents[1])
        deadline = time.monotonic() + 300
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert 0 < seen(state) < 60
        assert not out.exists()
        assert main(command) == 0
        assert accuracies(out) == uninterrupted
        assert not state.exists(), "the file is there for interrupted evaluations alone"

    def test_interrupted_evaluation_says_how_to_go_on(
        self, command: list[str], uninterrupted: dict[str, float], stop_after: Any, tmp_path: Path, capsys: Any
    ) -> None:
        state, out = tmp_path / "state.json", tmp_path / "a.json"
        stop_after(7)
        assert main([*command, "--state", str(state)]) == 130
        assert f"the same command goes on from {state}" in capsys.readouterr().err
        assert seen(state) == 35
        stop_after(None)
        assert main([*command, "--state", str(state), "--json", str(out)]) == 0
        assert accuracies(out) == uninterrupted

    def test_a_long_silence_is_broken(self, command: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        now = itertools.count(step=11.0)
        monkeypatch.setattr("effvit.cli.output.monotonic", lambda: next(now))
        assert main([*command, "--every", "6"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "looking at images: 1 of 60"
        assert [line.partition(",")[0] for line in lines[-2:]] == [f"{NANO}: {n} of 60 images" for n in (30, 60)]

    def test_evaluations_that_were_complete_are_kept(
        self, fashion: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of two groups, as --paper has them, the second is interrupted."""

        def interrupted() -> Any:
            raise KeyboardInterrupt

        def dense() -> Any:
            return {NANO: timm.create_model(NANO, pretrained=True).eval()}

        groups = [paper.PaperGroup(NANO, dense, {}), paper.PaperGroup("other", interrupted, {})]
        monkeypatch.setattr("effvit.cli.evaluate.groups_of", lambda _: groups)
        out = tmp_path / "a.json"
        command = ["evaluate", NANO, "--pretrained", "--data", str(fashion), "--limit", "10"]
        assert main([*command, "--json", str(out)]) == 130
        assert f"1 of 2 evaluations were complete, which is in {out}; with --state FILE" in capsys.readouterr().err
        assert list(accuracies(out)) == [NANO]

    def test_bad_images_are_left_out_on_request(self, tmp_path: Path, capsys: Any) -> None:
        """One has its header and end, so that only decoding finds the fault."""
        folder = write_fashion(tmp_path / "ten")
        broken = folder / "3" / "dress-2.png"
        content = bytearray(broken.read_bytes())
        content[content.index(b"IDAT") + 6] ^= 255
        broken.write_bytes(content)
        out = tmp_path / "a.json"
        command = ["evaluate", NANO, "--pretrained", "--data", str(folder), "--skip-bad", "--json", str(out)]
        assert main(command) == 0
        said = capsys.readouterr().err
        assert f"left out: {broken} cannot be read as an image" in said
        assert "1 of 60 images left out\n" in said
        (record,) = read_results(out)
        assert record["models"][0]["accuracy"]["data"] == f"{folder}, 59 images of 60"

    def test_without_a_file_nothing_is_kept(self, command: list[str], stop_after: Any, capsys: Any) -> None:
        stop_after(1)
        assert main(command) == 130
        assert "nothing of the evaluation is kept; with --state FILE it would go on" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"--batch-size": "6"}, "was begun with batch_size 5, now it is 6; give what it was begun with, or name"),
            ({"--limit": "50"}, "was begun with images 60, now it is 50"),
            (
                {"--set": "keep_rate=0.7"},
                "was begun with models ['evit keep_rate=0.5'], now it is ['evit keep_rate=0.7",
            ),
            ({"--dtype": "bfloat16"}, "was begun with dtype 'float32', now it is 'bfloat16'"),
            ({"--calibrate": None, "--calibration-images": "9"}, "was begun with calibration None, now it is"),
        ],
    )
    def test_other_settings_are_named_and_nothing_is_lost(
        self,
        command: list[str],
        fashion: Path,
        stop_after: Any,
        tmp_path: Path,
        capsys: Any,
        changes: dict[str, str | None],
        message: str,
    ) -> None:
        command = [*command[: command.index("--method")], "--method", "evit", "--set", "keep_rate=0.5", *command[-4:]]
        command = [*command, "--state", str(tmp_path / "state.json")]
        stop_after(2)
        assert main(command) == 130
        before = (tmp_path / "state.json").read_bytes()
        stop_after(None)
        for option, value in changes.items():
            if option in command:
                command[command.index(option) + 1] = str(value)
            else:
                command += [option, str(value or fashion)]  # None stands for the folder
        capsys.readouterr()
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / "state.json").read_bytes() == before

    def test_other_weights_images_and_models_are_named(
        self, command: list[str], stop_after: Any, tmp_path: Path, capsys: Any
    ) -> None:
        folder = write_fashion(tmp_path / "ten")
        command[command.index("--data") + 1] = str(folder)
        command += ["--state", str(tmp_path / "state.json")]
        stop_after(1)
        assert main(command) == 130
        stop_after(None)
        random = [text for text in command if text != "--pretrained"]
        capsys.readouterr()
        assert main(random) == 2
        assert "was begun with weights '" in capsys.readouterr().err
        assert main([*random[:1], "deit_tiny_patch16_224", *random[2:]]) == 2
        assert f"was begun with model '{NANO}', now it is 'deit_tiny_patch16_224'" in capsys.readouterr().err
        (folder / "0" / "t-shirt-0.png").rename(folder / "1" / "t-shirt-0.png")
        assert main(command) == 2
        assert "was begun with names, sizes and labels of the images '" in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["[]", "{}", '{"state": "counts of effvit evaluate, 1"}', '{"state": 3}', "{"])
    def test_file_of_something_else_is_left_as_it_is(
        self, command: list[str], tmp_path: Path, capsys: Any, content: str
    ) -> None:
        state = tmp_path / "state.json"
        state.write_text(content)
        assert main([*command, "--state", str(state)]) == 2
        assert "state.json" in capsys.readouterr().err
        assert state.read_text() == content


def seen(state: Path) -> int:
    """Images counted in a file of counts."""
    content: Any = read_json(state)
    return int(content["groups"][NANO]["counts"]["seen"])


def torchrun(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in two processes on the CPU."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, "-m", "effvit.cli", *command],
        cwd=Path(effvit.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


class TestProcesses:
    def test_two_processes_count_what_one_does(
        self, command: list[str], uninterrupted: dict[str, float], tmp_path: Path
    ) -> None:
        out = tmp_path / "two.json"
        done = torchrun([*command, "--json", str(out)])
        assert done.returncode == 0, done.stderr
        assert accuracies(out) == uninterrupted
        assert len(read_results(out)) == 1, "one process writes"
        assert done.stdout.count("top-1 (%)") == 1

    def test_what_one_process_began_two_complete(
        self, command: list[str], uninterrupted: dict[str, float], stop_after: Any, tmp_path: Path
    ) -> None:
        state, out = tmp_path / "state.json", tmp_path / "two.json"
        stop_after(3)
        assert main([*command, "--state", str(state)]) == 130
        done = torchrun([*command, "--workers", "1", "--state", str(state), "--json", str(out)])
        assert done.returncode == 0, done.stderr
        assert accuracies(out) == uninterrupted
        assert not state.exists()


class TestPaper:
    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*_: object, **__: object) -> None:
            raise OSError("the hub cannot be reached")

        for name in ("load_state_dict_from_hf", "download_cached_file", "load_state_dict_from_url"):
            monkeypatch.setattr(f"timm.models._builder.{name}", unreachable)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_folders(tmp_path / "val", each=1)

    def test_weights_of_local_files_are_measured_beside_the_figures(
        self, folder: Path, tmp_path: Path, capsys: Any
    ) -> None:
        """Figures and settings are those of the table; the weights are random, so that the accuracy is not theirs."""
        name = "sit_lvvit_tiny_224"
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir()
        torch.save(timm.create_model(name).state_dict(), checkpoints / f"{name}.pth")
        command = [
            "evaluate",
            "*lvvit_tiny*",
            "--paper",
            "sit",
            "--data",
            str(folder),
            "--json",
            str(tmp_path / "a.json"),
        ]
        assert main([*command, "--checkpoints", str(checkpoints)]) == 1
        printed = capsys.readouterr().out
        (record,) = read_results(tmp_path / "a.json")
        (model,) = record["models"]
        (entry,) = (entry for entry in published() if entry.model == name)
        assert model["name"] == name
        assert model["published"] == {
            "value": entry.top1.value,
            "data": "ImageNet-1k",
            "source": "README of Sense-X/SiT@f577808",
        }
        assert f"{entry.top1.value:.2f}" in printed
        assert "two standard errors" in printed
        reason = r"its weights were trained for the figure \(README of Sense-X/SiT@f577808\) and are not timm's"
        assert f"not measured: lvvit_tiny_4c_224: {reason}".replace("\\", "") in printed
        assert "as lvvit_tiny_4c_224.pth or .safetensors" in printed

    def test_rows_without_weights_are_named_and_the_others_go_on(
        self, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figure = Published(70.0, "a set", "made up")
        entries = [
            PublishedModel("tome", "tome_deit_tiny_patch16_224", {"r": 8}, figure, figure, True),
            PublishedModel("evit", "evit_deit_tiny_distilled_patch16_224", {"keep_rate": 0.5}, figure, None, True),
            PublishedModel("evit", "evit_deit_tiny_distilled_patch16_224", {"keep_rate": 0.7}, figure, None, True),
        ]
        monkeypatch.setattr(paper, "published", lambda: entries)
        monkeypatch.setattr(paper, "families", lambda: ["tome", "evit"])
        host = "deit_tiny_distilled_patch16_224"
        torch.save(timm.create_model(host).state_dict(), tmp_path / f"{host}.pth")
        command = ["evaluate", "--paper", "all", "--data", str(folder), "--checkpoints", str(tmp_path)]
        assert main([*command, "--json", str(tmp_path / "a.json")]) == 1
        printed = capsys.readouterr().out
        assert (
            "not measured: deit_tiny_patch16_224: cannot create deit_tiny_patch16_224: the hub cannot be reached"
            in printed
        )
        (record,) = read_results(tmp_path / "a.json")
        method = "evit_deit_tiny_distilled_patch16_224"
        assert [model["name"] for model in record["models"]] == [
            host,
            f"{method} keep_rate=0.5",
            f"{method} keep_rate=0.7",
        ]
        assert [model.get("published", {}).get("value") for model in record["models"]] == [None, 70.0, 70.0]

    def test_evaluation_of_several_groups_goes_on_in_the_middle(
        self, folder: Path, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ("sit_lvvit_tiny_224", "lvvit_tiny_4c_224")
        for name in names:
            torch.save(timm.create_model(name).state_dict(), tmp_path / f"{name}.pth")
        command = ["evaluate", "*lvvit_tiny*", "--paper", "sit", "--data", str(folder), "--checkpoints", str(tmp_path)]
        command += ["--batch-size", "2", "--every", "1"]
        assert main([*command, "--json", str(tmp_path / "whole.json")]) == 0
        command += ["--state", str(tmp_path / "state.json")]
        stop_after(3)  # a batch into the second
        assert main(command) == 130
        stop_after(None)
        assert main([*command, "--json", str(tmp_path / "parts.json")]) == 0
        assert accuracies(tmp_path / "parts.json") == accuracies(tmp_path / "whole.json")
        assert tuple(accuracies(tmp_path / "whole.json")) == names

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--paper", "dymu"], "no published top-1 of 'dymu' is known"),
            (
                ["--paper", "expedite"],
                "the settings for SAM and Swin are the names expedite_samvit_huge_patch16_at18_121, ",
            ),
            (
                ["vit_nano*", "--paper", "tome"],
                "no model with published figures matches 'vit_nano*'; there are tome_",
            ),
        ],
    )
    def test_figures_that_are_not_known_are_refused(
        self, folder: Path, capsys: Any, arguments: list[str], message: str
    ) -> None:
        assert main(["evaluate", *arguments, "--data", str(folder)]) == 2
        assert message in capsys.readouterr().err

    def test_missing_folder_of_checkpoints_is_named_for_each(self, folder: Path, capsys: Any) -> None:
        command = ["evaluate", "sit*tiny*", "--paper", "sit", "--data", str(folder), "--checkpoints", "none"]
        assert main(command) == 1
        assert "there is no folder none; name the one with the checkpoints" in capsys.readouterr().out

    def test_every_published_model_has_a_file_name_of_its_own(self) -> None:
        """So that a folder of checkpoints can hold them all."""
        rows = [paper.row_name(entry) for entry in published() if not entry.is_off_the_shelf]
        assert len({file_stem(row) for row in rows}) == len(rows)

    def test_every_published_model_can_be_made(self) -> None:
        """On the meta device, where weights take neither time nor memory."""
        with torch.device("meta"):
            for entry in published():
                timm.create_model(entry.model, **entry.settings)


def test_state_is_json_of_moderate_size(command: list[str], stop_after: Any, tmp_path: Path) -> None:
    """Counts, not images: the file does not grow with the set."""
    state = tmp_path / "state.json"
    stop_after(5)
    assert main([*command, "--state", str(state)]) == 130
    assert len(state.read_bytes()) < 2000
    assert json.loads(state.read_text())["groups"][NANO]["counts"]["right"].keys() == {
        NANO,
        "evit keep_rate=0.5",
        "tome r=3",
    }
