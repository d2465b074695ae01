"""The command line: what it prints and writes, and one line with status 2 for what the caller can mend."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import effvit
from effvit import cli
from effvit.cli import demo, main
from effvit.cli.models import RANDOM_WEIGHTS
from effvit.cli.output import output
from effvit.deployment.formats import read_pt2
from effvit.images import open_image
from effvit.measure.records import read_profiles
from effvit.measure.variants import list_variants, parse_setting
from effvit.reducers import METHODS
from effvit.show import pictures
from effvit.show.visualize import token_figure

TINY = "deit_tiny_patch16_224"
SMALL = ["--img-size", "64"]  # 16 patches


def failure(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("effvit: error: ")
    return captured.err


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "gradient.png"
    Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint32).reshape(64, 96, 3).astype(np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"effvit {effvit.__version__}\n"


@pytest.mark.parametrize("command", [["--debug", "list", "nothing"], ["list", "nothing", "--debug"]])
def test_debug_prints_the_traceback_above_the_sentence(command, capsys):
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.startswith("Traceback (most recent call last):")
    assert message.endswith("effvit: error: no method, no selector and no model matches 'nothing'\n")


class TestList:
    def test_all_methods_and_models_are_listed_with_their_settings(self, capsys):
        assert main(["list"]) == 0
        printed = capsys.readouterr().out
        for method in effvit.list_methods():
            assert method in printed
            assert all(f"{setting}=" in printed for setting in effvit.method_settings(method))
        assert all(name in printed for name in effvit.list_models())

    def test_pattern_selects(self, capsys):
        assert main(["list", "evit*tiny*"]) == 0
        printed = capsys.readouterr().out
        assert "evit_deit_tiny_patch16_224" in printed
        assert "small" not in printed
        assert "keep_rate" not in printed

    def test_a_pipe_gets_one_name_a_line(self, capsys):
        """The names alone of models; settings behind tabs for methods."""
        assert main(["list", "evit*"]) == 0
        method, *names = capsys.readouterr().out.splitlines()
        assert method.split("\t")[:2] == ["evit", "keep_rate=0.7"]
        assert names == effvit.list_models("evit*")

    def test_a_terminal_gets_tables(self, capsys, monkeypatch):
        monkeypatch.setattr(
            "effvit.cli.listing.output", lambda: Console(force_terminal=True, highlight=False, width=80)
        )
        assert main(["list", "evit_deit*"]) == 0
        assert capsys.readouterr().out.startswith("Models for timm.create_model (")

    def test_pattern_without_match_is_an_error(self, capsys):
        assert "no method, no selector and no model matches 'nothing'" in failure(capsys, "list", "nothing")


class TestExport:
    NANO = ("export", "vit_nano_patch4_28", "--pretrained", "--to", "pt2")

    def test_file_is_named_after_model_and_setting_and_holds_the_reduced_one(self, capsys, tmp_path, monkeypatch):
        """The expectation is the model that effvit.sparsify makes with that setting."""
        monkeypatch.chdir(tmp_path)
        assert main([*self.NANO, "--method", "evit", "--set", "keep_rate=0.5", "--dynamic-batch"]) == 0
        path, takes, agrees = capsys.readouterr().out.splitlines()
        assert path == "vit_nano_patch4_28-evit-keep_rate-0.5.pt2"
        assert takes.startswith("takes images (batch, 1, 28, 28) float32, mean (0.286,), std (0.353,)")
        assert re.search(r"batches of 1, 3, 5: .* and 9 of 9 images get the same class", agrees)
        host = timm.create_model("vit_nano_patch4_28", pretrained=True).eval()
        model = effvit.sparsify(host, "evit", keep_rate=0.5).eval()
        x = torch.randn(4, 1, 28, 28)
        with torch.no_grad():
            assert torch.allclose(read_pt2(Path(path))(x), model(x), atol=1e-5)

    def test_random_weights_and_one_batch_size_are_told(self, capsys, tmp_path):
        """Colour images of the package, for a model of three channels."""
        out = tmp_path / "folder" / "tiny.pt2"
        arguments = ["export", TINY, *SMALL, "--to", "pt2", "--batch-size", "2", "--out", str(out)]
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert f"{TINY} has {RANDOM_WEIGHTS}" in captured.err
        assert captured.out.startswith(f"{out}\ntakes images (2, 3, 64, 64) float32")
        assert "batches of 2, 2, 2" in captured.out
        assert out.is_file()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--set", "r=3"), "settings belong to a method"),
            (("--method", "tome", "--set", "r=3", "--set", "r=4"), "one file holds one model, but --set gives 2"),
            (("--method", "ats", "--set", 'ragged="packed"'), "ragged='padded'"),
            (("--out", "model.onnx"), "a file of pt2 must end in .pt2, got model.onnx"),
            (("--images", "nowhere.png"), "nowhere.png"),
        ],
    )
    def test_what_cannot_be_written_is_one_sentence(self, capsys, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert message in failure(capsys, *self.NANO, *arguments)
        assert not [*tmp_path.iterdir()]


class TestProfile:
    def test_variants_stand_beside_their_dense_host(self, capsys, tmp_path):
        path = tmp_path / "folder" / "costs.json"
        command = ["profile", TINY, "--method", "evit", "tome", "--keep-rate", "0.5", "--set", "r=2", *SMALL]
        command += ["--rounds", "2", "--batch-size", "2", "--threads", "1", "--json", str(path)]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "batch 2, float32, cpu, 1 thread, noise at 64 x 64; 2 interleaved rounds" in printed
        (group,) = json.loads(path.read_text())
        dense, evit, tome = group["models"]
        assert [dense["name"], evit["name"], tome["name"]] == [TINY, "evit keep_rate=0.5", "tome r=2"]
        assert all(model["name"] in printed for model in group["models"])
        assert f"{dense['macs'] / 1e9:.3f}" in printed
        assert (dense["tokens"][-1], evit["tokens"][-1]) == (16, 4)  # 16 -> 8 + 1 -> 5 + 1 -> 3 + 1
        assert max(evit["macs"], tome["macs"]) < dense["macs"]
        assert len(dense["seconds"]) == 2
        assert group["conditions"]["input_size"] == [3, 64, 64]
        assert group["machine"]["torch"] == torch.__version__

    def test_dtype_is_that_of_the_runs_and_named(self, capsys):
        assert main(["profile", TINY, *SMALL, "--rounds", "1", "--batch-size", "1", "--dtype", "bfloat16"]) == 0
        assert "batch 1, bfloat16, cpu" in capsys.readouterr().out

    def test_models_without_method_are_compared_with_the_first(self, capsys, tmp_path):
        path = tmp_path / "costs.json"
        names = [TINY, f"evit_{TINY}"]
        assert main(["profile", *names, *SMALL, "--rounds", "1", "--batch-size", "1", "--json", str(path)]) == 0
        (group,) = json.loads(path.read_text())
        assert [model["name"] for model in group["models"]] == names
        assert group["models"][0]["speedup"] == 1

    def test_every_image_size_and_batch_size_is_measured_on_the_images(self, capsys, image, tmp_path):
        command = ["profile", TINY, "--method", "tome", "--img-size", "64", "64x96", "--batch-size", "1", "2"]
        command += ["--rounds", "1", "--threads", "1", "--images", str(image), "--breakdown"]
        paths = tmp_path / "costs.json", tmp_path / "costs.csv"
        assert main([*command, "--json", str(paths[0]), "--csv", str(paths[1])]) == 0
        printed = capsys.readouterr().out
        assert "tome: milliseconds by block" in printed
        assert "divergence" in printed
        records = json.loads(paths[0].read_text())
        found = [(r["conditions"]["input_size"], r["conditions"]["batch_size"]) for r in records]
        assert found == [([3, 64, 64], 1), ([3, 64, 64], 2), ([3, 64, 96], 1), ([3, 64, 96], 2)]
        assert records[0]["conditions"]["images"] == ["gradient"]
        assert records[0]["models"][1]["breakdown"][0]["block"] == "blocks.0"
        assert len(paths[1].read_text().splitlines()) == 1 + 8

    def test_ctrl_c_ends_the_measurement_with_the_rounds_it_has(self, capsys, tmp_path, monkeypatch):
        """In the third of 50 rounds, of the first of two sizes; both files hold what the table showed."""
        timed = effvit.measure.profiler.timed_run
        runs = itertools.count(1)

        def interrupted(*given):
            if next(runs) == 4:  # one run warms up
                signal.raise_signal(signal.SIGINT)
            return timed(*given)

        monkeypatch.setattr("effvit.measure.profiler.timed_run", interrupted)
        monkeypatch.setattr("effvit.measure.profiler.still_faster", lambda _: False)
        paths = tmp_path / "costs.json", tmp_path / "costs.csv"
        command = ["profile", TINY, "--img-size", "64", "96", "--rounds", "50", "--batch-size", "1"]
        assert main([*command, "--json", str(paths[0]), "--csv", str(paths[1])]) == 130
        printed = capsys.readouterr()
        assert "2 interleaved rounds" in printed.out
        assert "Ctrl-C: the measurement ends with the rounds it has; press it again to end at once" in printed.err
        assert f"1 complete measurement is in {paths[0]} and {paths[1]}\neffvit: interrupted\n" in printed.err
        (record,) = read_profiles(paths[0])
        assert len(record.models[0].seconds) == 2
        assert len(paths[1].read_text().splitlines()) == 1 + 1

    def test_a_second_ctrl_c_ends_it_at_once(self, capsys, monkeypatch):
        def impatient(*_):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr("effvit.measure.profiler.timed_run", impatient)
        handler = signal.getsignal(signal.SIGINT)
        assert main(["profile", TINY, *SMALL, "--batch-size", "1"]) == 130
        assert "no measurement was complete, so that nothing is kept" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is handler

    def test_places_that_take_nothing_are_told_before_anything_is_measured(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("effvit.cli.profile.create", None)
        (tmp_path / "file").touch()
        for option in ("--json", "--csv"):
            message = failure(capsys, "profile", TINY, option, tmp_path / "file" / "costs")
            assert "file/costs cannot be written: Not a directory; name another place" in message

    def test_a_model_reduced_already_has_no_variants(self, capsys):
        message = failure(capsys, "profile", f"evit_{TINY}", *SMALL, "--method", "tome")
        assert "reduced by evit already, so that there is no dense model to compare with" in message
        assert f"give its host, {TINY}\n" in message

    def test_images_of_one_name_in_two_folders_are_measured(self, capsys, tmp_path, monkeypatch):
        for folder in ("f", "g"):
            (tmp_path / folder).mkdir()
            Image.new("RGB", (40, 40), (90, 90, 90)).save(tmp_path / folder / "a.png")
        listed = f"{tmp_path}/f/a.png\n{tmp_path}/g/a.png\n".encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
        path = tmp_path / "costs.json"
        command = ["profile", TINY, *SMALL, "--rounds", "1", "--batch-size", "2", "--images", "-", "--json", str(path)]
        assert main(command) == 0
        assert json.loads(path.read_text())[0]["conditions"]["images"] == ["f/a.png", "g/a.png"]

    def test_image_size_of_another_form_is_refused(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["profile", TINY, "--img-size", "64,96"])
        assert "'64,96' is neither a side such as 224 nor HxW such as 224x320" in capsys.readouterr().err

    def test_unknown_model_names_the_nearest(self, capsys):
        message = failure(capsys, "profile", "deit_tiny_patch16_225")
        assert "unknown model 'deit_tiny_patch16_225'; did you mean deit_tiny_patch16_224" in message

    def test_unknown_method_names_the_nearest(self, capsys):
        assert "unknown method 'tom'; did you mean tome" in failure(capsys, "profile", TINY, "--method", "tom")

    def test_settings_without_method_are_refused(self, capsys):
        assert "name one with --method" in failure(capsys, "profile", TINY, "--keep-rate", "0.5")

    def test_value_out_of_range_is_named(self, capsys):
        message = failure(capsys, "profile", TINY, *SMALL, "--method", "evit", "--keep-rate", "1.5")
        assert "keep_rate must be in (0, 1], got 1.5" in message

    def test_unknown_device_is_named(self, capsys):
        assert "unknown device 'abacus'" in failure(capsys, "profile", TINY, "--device", "abacus")

    def test_models_of_several_sizes_need_one_size(self, capsys):
        message = failure(capsys, "profile", TINY, "vit_tiny_patch16_384")
        assert "give --img-size" in message
        assert "3 x 384 x 384" in message

    def test_checkpoint_of_another_model_is_refused(self, capsys, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save({"head.weight": torch.zeros(1)}, path)
        assert "checkpoint of another model" in failure(capsys, "profile", TINY, "--checkpoint", path)

    def test_missing_checkpoint_is_named(self, capsys):
        assert "no checkpoint at absent.pth" in failure(capsys, "profile", TINY, "--checkpoint", "absent.pth")


@pytest.mark.parametrize("command", ["train", "test"])
def test_missing_openmmlab_is_named_with_the_way_to_install_it(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmengine", None)
    monkeypatch.delitem(sys.modules, "effvit.dense.runner", raising=False)
    message = failure(capsys, command, "config.py")
    assert "needs mmengine, which comes with the extra mm: run the commands that `effvit doctor` prints" in message


class TestConvert:
    def test_official_layout_becomes_ours_and_the_rest_is_named(self, capsys, tmp_path):
        model = timm.create_model(TINY)
        official = {f"module.{name}": value for name, value in model.state_dict().items()}
        official["module.blocks.3.attn.out_zero_mask"] = torch.zeros(1)
        torch.save({"model": official, "epoch": 300}, tmp_path / "official.pth")
        out = tmp_path / "folder" / "ours.safetensors"
        assert main(["convert", str(tmp_path / "official.pth"), "--model", f"ats_{TINY}", "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        counts = "152 under the file's names, 0 renamed, 0 joined, split or new; 1 dropped"
        assert f"152 entries for ats_deit_tiny_patch16_224: {counts}" in printed
        assert "dropped: blocks.3.attn.out_zero_mask" in printed
        own = timm.create_model(f"ats_{TINY}")
        assert effvit.load_checkpoint(own, out) == []
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))

    def test_file_is_only_checked_without_output(self, capsys, tmp_path):
        """A CAS-ViT, whose official stem is called patch_embed."""
        model = timm.create_model("casvit_xs_224", dims=[8, 8, 16, 16], depths=[1, 1, 1, 1])
        official = {name.replace("stem.0.conv.", "patch_embed.0."): value for name, value in model.state_dict().items()}
        torch.save({"model": official}, tmp_path / "official.pth")
        sizes = ["--set", "dims=[8,8,16,16]", "--set", "depths=[1,1,1,1]"]
        assert main(["convert", str(tmp_path / "official.pth"), "--model", "casvit_xs_224", "--keys", *sizes]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert "renamed: patch_embed.0.weight -> stem.0.conv.weight" in printed
        assert "used: norm.weight" in printed
        assert len(printed) == 1 + len(official)
        assert [path.name for path in tmp_path.iterdir()] == ["official.pth"]

    def test_checkpoint_of_mmengine_holds_more_than_weights(self, capsys, tmp_path):
        """The logs of its Runner, which are objects of mmengine."""
        buffers = pytest.importorskip("mmengine.logging", reason="the mm extra is not installed")
        logs = {"log_scalars": {"train/loss": buffers.HistoryBuffer([1.0], [1])}}
        torch.save({"state_dict": timm.create_model(TINY).state_dict(), "message_hub": logs}, tmp_path / "epoch_1.pth")
        assert main(["convert", str(tmp_path / "epoch_1.pth"), "--model", TINY]) == 0
        assert f"152 entries for {TINY}: 152 under the file's names" in capsys.readouterr().out

    def test_names_made_of_others_are_told_apart(self, capsys, tmp_path):
        """DyMU's thresholds are not in a plain file; the model fills them in."""
        torch.save(timm.create_model(TINY).state_dict(), tmp_path / "plain.pth")
        assert main(["convert", str(tmp_path / "plain.pth"), "--model", f"dymu_{TINY}", "--keys"]) == 0
        printed = capsys.readouterr().out
        assert "152 under the file's names, 0 renamed, 24 joined, split or new; 0 dropped" in printed
        assert "joined, split or new: blocks.0.reducer.threshold" in printed

    def test_output_that_cannot_be_written_is_named(self, capsys, tmp_path):
        torch.save(timm.create_model(TINY).state_dict(), tmp_path / "plain.pth")
        (tmp_path / "ours.safetensors").mkdir()
        command = ["convert", tmp_path / "plain.pth", "--model", TINY, "--out", tmp_path / "ours.safetensors"]
        assert "ours.safetensors" in failure(capsys, *command)

    def test_output_of_another_format_is_refused(self, capsys, tmp_path):
        message = failure(capsys, "convert", "any.pth", "--model", TINY, "--out", tmp_path / "ours.pth")
        assert "--out must end in .safetensors" in message

    def test_checkpoint_of_another_model_is_refused(self, capsys, tmp_path):
        torch.save(timm.create_model(TINY).state_dict(), tmp_path / "tiny.pth")
        command = ["convert", tmp_path / "tiny.pth", "--model", "deit_small_patch16_224", "--out"]
        assert "checkpoint of another model" in failure(capsys, *command, tmp_path / "ours.safetensors")


class TestVisualize:
    def test_every_image_and_variant_has_a_picture(self, capsys, tmp_path, image):
        command = ["visualize", str(image), "--model", TINY, "--method", "evit", "gtp"]
        assert main([*command, "--set", "keep_rate=0.5", "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr()
        assert RANDOM_WEIGHTS in printed.err
        names = {"gradient-evit-keep_rate-0.5.png", "gradient-gtp.png"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == names
        assert {Path(line).name for line in printed.out.splitlines()} == names

    def test_bad_images_are_left_out_and_counted(self, capsys, tmp_path, image):
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.png").write_text("no image")
        command = ["visualize", str(tmp_path), "--model", TINY, "--method", "tome", "--out", str(tmp_path / "out")]
        assert main([*command, "--skip-bad"]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{tmp_path}/out/gradient-tome.png\n"
        assert f"left out: {tmp_path}/empty.png is empty" in printed.err
        assert f"left out: {tmp_path}/text.png is no image" in printed.err
        assert "2 of 3 images left out\n" in printed.err
        message = failure(capsys, *command)
        assert "2 of 4 images cannot be read; mend them, take them out, or leave them out with --skip-bad" in message

    def test_ctrl_c_keeps_what_was_drawn(self, capsys, tmp_path, monkeypatch):
        drawn = itertools.count(1)

        def interrupted(*given, **named):
            if next(drawn) == 3:
                raise KeyboardInterrupt
            return token_figure(*given, **named)

        monkeypatch.setattr("effvit.cli.output.token_figure", interrupted)
        command = ["visualize", "fashion_mnist:bag-*", "--model", "vit_nano_patch4_28", "--pretrained"]
        tokens = tmp_path / "tokens.json"
        command += ["--method", "tome", "--out", str(tmp_path / "out"), "--json", str(tokens)]
        assert main(command) == 130
        printed = capsys.readouterr()
        assert printed.out.splitlines() == [f"{tmp_path}/out/bag-{number}-tome.png" for number in (0, 1)]
        assert f"2 of 6 figures are in {tmp_path}/out, their tokens in {tokens}\n" in printed.err
        assert [record["name"] for record in json.loads(tokens.read_text())] == ["bag-0", "bag-1"]

    def test_figures_of_one_file_are_refused(self, capsys, tmp_path):
        for name in ("a b.png", "a-b.png"):
            Image.new("RGB", (40, 40)).save(tmp_path / name)
        command = ["visualize", tmp_path, "--model", TINY, "--method", "tome", "--out", tmp_path / "out"]
        assert "out/a-b-tome.png would hold two figures; give images names that differ" in failure(capsys, *command)

    def test_a_long_silence_is_broken(self, capsys, tmp_path, monkeypatch):
        now = itertools.count(step=11.0)
        monkeypatch.setattr("effvit.cli.output.monotonic", lambda: next(now))
        command = ["visualize", "fashion_mnist:bag-[01]", "--model", "vit_nano_patch4_28", "--method", "tome"]
        assert main([*command, "--out", str(tmp_path)]) == 0
        assert "drawing tokens: 1 of 2\ndrawing tokens: 2 of 2\n" in capsys.readouterr().err

    def test_loaded_weights_are_not_called_random(self, capsys, tmp_path, image):
        path = tmp_path / "weights.pth"
        torch.save(timm.create_model(TINY).state_dict(), path)
        command = ["visualize", str(image), "--model", TINY, "--method", "tome", "--out", str(tmp_path)]
        assert main([*command, "--checkpoint", str(path)]) == 0
        assert RANDOM_WEIGHTS not in capsys.readouterr().err

    def test_architecture_is_shown_as_it_is(self, capsys, tmp_path, image):
        name, tokens = "lookupvit_small_patch16_224", tmp_path / "tokens.json"
        assert main(["visualize", str(image), "--model", name, "--out", str(tmp_path), "--json", str(tokens)]) == 0
        assert (tmp_path / f"gradient-{name}.png").is_file()
        (record,) = json.loads(tokens.read_text())
        assert (record["model"], record["host"], record["method"]) == (name, None, None)
        assert record["note"] == RANDOM_WEIGHTS

    def test_model_without_tokens_to_show_is_refused(self, capsys, tmp_path, image):
        assert main(["visualize", str(image), "--model", TINY, "--out", str(tmp_path)]) == 2
        note, message = capsys.readouterr().err.splitlines()
        assert note == RANDOM_WEIGHTS
        assert "reduce it by a method first" in message

    def test_settings_without_method_are_refused(self, capsys, tmp_path, image):
        message = failure(capsys, "visualize", image, "--model", TINY, "--set", "r=8", "--out", tmp_path)
        assert "name one with --method" in message

    def test_missing_image_is_named(self, capsys, tmp_path):
        command = ["visualize", "absent.png", "--model", TINY, "--method", "tome", "--out", tmp_path]
        assert "absent.png" in failure(capsys, *command)

    def test_file_that_is_no_image_is_named(self, capsys, tmp_path):
        path = tmp_path / "text.png"
        path.write_text("no picture")
        command = ["visualize", path, "--model", TINY, "--method", "tome", "--out", tmp_path]
        assert "text.png is no image of a format that Pillow reads" in failure(capsys, *command)

    def test_pictures_of_the_package_are_named_and_seen(self, capsys, tmp_path):
        command = ["visualize", "fashion_mnist:bag-[01]", "--model", "vit_nano_patch4_28", "--pretrained"]
        assert main([*command, "--method", "tome", "--set", "r=4", "--out", str(tmp_path)]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"bag-0-tome-r-4.png", "bag-1-tome-r-4.png"}
        assert RANDOM_WEIGHTS not in capsys.readouterr().err

    def test_an_image_named_twice_is_refused(self, capsys, tmp_path, image):
        command = ["visualize", image, image, "--model", TINY, "--method", "tome", "--out", tmp_path]
        assert "gradient.png is named more than once; name every image once" in failure(capsys, *command)


class TestDemo:
    def test_every_method_is_among_the_variants(self):
        """But for controls, and methods that show nothing without training."""
        trained = {"dynamicvit", "sinkhorn", "patchmerger"}
        for host in (*(seen.model for seen in demo.SEEN), TINY):
            variants = demo.demo_variants(timm.create_model(host))
            controls = {"random", "uniform", "radial"}
            assert {method for method, _ in variants} == set(effvit.list_methods()) - controls - trained
            assert not any(METHODS[method].demo(196) for method in trained)

    def test_demo_writes_accuracies_costs_pictures_and_the_report(self, capsys, monkeypatch, tmp_path):
        photos = pictures.photographs()
        monkeypatch.setattr(demo, "photographs", lambda: {"coffee": photos["coffee"]})

        def only_shown(seen):
            return seen._replace(images=lambda: {name: seen.images()[name] for name in seen.shown})

        monkeypatch.setattr(demo, "SEEN", [only_shown(seen) for seen in demo.SEEN])
        variants = {
            49: (("tome", {"r": 2}), ("tome", {"r": 4}), ("dymu", {})),
            144: (("evit", {"keep_rate": 0.7}),),
            196: (("evit", {"keep_rate": 0.5}), ("dymu", {})),
        }
        monkeypatch.setattr(demo, "demo_variants", lambda host: variants[host.patch_embed.num_patches])
        out = tmp_path / "demo"
        assert main(["demo", "--model", TINY, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        pages = {"report.html", "costs.png", "costs.json", "tokens.json"}
        sheets = {"accuracy-fashion_mnist.png", "fashion_mnist-tome-r-4.png", "fashion_mnist-dymu.png"}
        sheets |= {"accuracy-cutouts.png", "cutouts-evit-keep_rate-0.7.png"}
        written = {path.name for path in out.iterdir()}
        assert written == pages | sheets
        assert all(str(out / name) in printed.replace("\n", "") for name in written)
        assert printed.splitlines()[-len(demo.NEXT) :] == [f"  {line}" for line in demo.NEXT]
        assert "top-1 on 4 test images of Fashion-MNIST, measured here" in printed
        assert printed.count("dymu: calibrated on these very pictures, without their labels") == 2
        assert f"{TINY} with random weights: for its costs alone; --checkpoint or --pretrained loads some" in printed
        fashion, cutouts, costs = json.loads((out / "costs.json").read_text())
        names = [[model["name"] for model in record["models"]] for record in (fashion, cutouts, costs)]
        methods_seen = (["tome r=2", "tome r=4", "dymu"], ["evit keep_rate=0.7"])
        for own, seen, methods in zip(names[:2], demo.SEEN, methods_seen, strict=True):
            assert own[1::2] == methods
            assert own[::2] == [seen.model, *(f"{name}, control random, seed 0" for name in methods)]
        assert names[2] == [TINY, "evit keep_rate=0.5", "dymu"]
        assert all(model["accuracy"]["data"] == "4 test images of Fashion-MNIST" for model in fashion["models"])
        assert costs["conditions"]["images"] == ["coffee"]
        assert costs["conditions"]["weights"] == "random weights"
        shown = [(record["model"], record["name"]) for record in json.loads((out / "tokens.json").read_text())]
        methods = [("tome r=4", demo.SEEN[0]), ("dymu", demo.SEEN[0]), ("evit keep_rate=0.7", demo.SEEN[1])]
        assert shown == [(model, name) for model, seen in methods for name in seen.shown]

    @pytest.mark.parametrize("line", demo.NEXT)
    def test_what_to_try_next_is_understood(self, line, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        program, *order = shlex.split(line)
        assert program == "effvit"
        assert cli.parser().parse_args(order).run
        if order[0] == "visualize":  # the others take minutes
            assert main(order) == 0
            assert len([*(tmp_path / "runs/bags").glob("*.png")]) == 6

    def test_on_even_attention_every_method_reduces(self):
        """Random weights attend evenly; ATS, DyMU and ALGM are shown at settings that take a fifth even then."""
        dense = timm.create_model("deit_tiny_patch16_224").eval()
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        whole = effvit.count_flops(dense, (3, 224, 224)).total
        for method, settings in demo.demo_variants(dense):
            model = effvit.sparsify(dense, method, **settings)
            if method == "dymu":
                effvit.calibrate(model, [images])
            assert effvit.count_flops(model, (3, 224, 224), images=images).total < 0.8 * whole, method

    def test_a_method_without_a_control_stands_alone_and_it_is_said(self, capsys):
        dense = timm.create_model("vit_nano_patch8_96").eval()
        model = effvit.sparsify(dense, "expedite", restore_at=8)
        images = torch.zeros(1, 3, 96, 96)
        models = demo.beside_controls(output(), {"dense": dense}, {"restoring": model}, images)
        assert list(models) == ["dense", "restoring"]
        assert "restoring without control: expedite restores 144 tokens" in capsys.readouterr().out

    def test_weights_that_were_given_have_token_figures(self, capsys, monkeypatch, tmp_path, image):
        torch.save(timm.create_model(TINY).state_dict(), tmp_path / "weights.pth")
        monkeypatch.setattr(demo, "demo_variants", lambda host: (("tome", {"r": 8}), ("tome", {"r": 13})))
        command = ["demo", "--model", TINY, "--checkpoint", str(tmp_path / "weights.pth"), "--out", str(tmp_path)]
        photos = {"gradient": open_image(image)}
        record, figures = demo.demo_costs(output(), cli.parser().parse_args(command), photos)
        assert figures == [tmp_path / "gradient-tome-r-13.png"]
        assert figures[0].is_file()
        assert record.conditions.weights is None
        assert "random weights" not in capsys.readouterr().out


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "parsed"),
        [
            ("r=8", ("r", 8)),
            ("reduce_at=[3,6]", ("reduce_at", [3, 6])),
            ("fuse_token=false", ("fuse_token", False)),
            ('graph_type="Spatial"', ("graph_type", "Spatial")),
            ("num_tokens=null", ("num_tokens", None)),
        ],
    )
    def test_values_are_json(self, text, parsed):
        assert parse_setting(text) == parsed

    def test_text_without_quotes_is_refused_with_the_way_to_write_it(self):
        with pytest.raises(ValueError, match=r"'Spatial' is not JSON .* double quotes: 'graph_type=\"...\"'"):
            parse_setting("graph_type=Spatial")

    @pytest.mark.parametrize("text", ["r", "=8", ""])
    def test_key_and_value_are_both_needed(self, text):
        with pytest.raises(ValueError, match="takes KEY=VALUE"):
            parse_setting(text)

    def test_repeated_settings_make_one_variant_for_each_combination(self):
        assignments = [("keep_rate", 0.7), ("keep_rate", 0.5), ("fuse_token", True), ("fuse_token", False)]
        variants = list_variants(["evit", "tome"], assignments)
        assert len(variants) == 5
        assert variants[0] == ("evit", {"keep_rate": 0.7, "fuse_token": True})
        assert variants[-1] == ("tome", {})

    def test_setting_of_no_method_named_is_refused(self):
        with pytest.raises(ValueError, match="no method named here has a setting 'num_prop': tome takes r, prop_attn"):
            list_variants(["tome"], [("num_prop", 8)])
