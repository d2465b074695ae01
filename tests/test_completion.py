"""The scripts that complete the command line, run by the shells that are installed; what they offer is the parsers'."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import timm

import effvit
from effvit import cli
from effvit.cli import main
from effvit.cli.completion import NOTHING, slots_of
from effvit.dense.shipped_configs import list_configs

BASH, ZSH, FISH = (shutil.which(shell) for shell in ("bash", "zsh", "fish"))


def script(shell: str, capsys: pytest.CaptureFixture[str], folder: Path) -> Path:
    """The file that the command wrote for a shell."""
    assert main(["completion", shell]) == 0
    path = folder / f"effvit.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
class TestBash:
    @pytest.fixture
    def offered(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
        """What is typed -> what bash offers for its last word."""
        lines = (
            *("", "pro", "--debug ev", "configs ", "configs copy mmdet/mask-rcnn_evit", "profile deit_tiny_patch"),
            *("profile a b vit_nano", "profile a --method ", "profile a --method evit to", "profile a --dtype "),
            *("profile a --dtype float32 vit_nano", "profile --pre", "evaluate --control random u", "tune vit_nano"),
            *("tune a docs/", "visualize docs/", "run train.py --mod", "completion "),
        )
        source = script("bash", capsys, tmp_path)
        run = 'COMP_WORDS=(effvit "$@"); COMP_CWORD=$#; _effvit; echo "${COMPREPLY[*]}"'
        typed = [line.split(" ") for line in lines]
        calls = [f"type_ {shlex.join(words)}" for words in typed]
        text = "\n".join([f"source {shlex.quote(str(source))}", f"type_() {{ {run}; }}", *calls])
        done = subprocess.run([str(BASH), "-c", text], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return dict(zip(lines, (line.split() for line in done.stdout.splitlines()), strict=True))

    def test_each_word_is_offered_what_its_parser_takes(self, offered: dict[str, list[str]]) -> None:
        commands = list(slots_of_all())
        assert offered[""] == [words for words in commands if " " not in words]
        assert (offered["pro"], offered["--debug ev"]) == (["profile"], ["evaluate"])
        assert offered["configs "] == ["list", "copy"]
        names = [config.name for config in list_configs("mmdet/mask-rcnn_evit*")]
        assert offered["configs copy mmdet/mask-rcnn_evit"] == names
        assert offered["profile deit_tiny_patch"] == timm.list_models("deit_tiny_patch*")
        nano = timm.list_models("vit_nano*")
        assert offered["profile a b vit_nano"] == offered["profile a --dtype float32 vit_nano"] == nano
        assert offered["tune vit_nano"] == nano
        assert offered["profile a --method "] == effvit.list_methods()
        assert offered["profile a --method evit to"] == ["tome"]
        assert offered["profile a --dtype "] == ["float32", "bfloat16", "float16"]
        assert offered["profile --pre"] == ["--pretrained", "--precision"]
        assert offered["evaluate --control random u"] == ["uniform"]
        assert offered["completion "] == ["bash", "zsh", "fish"]

    def test_files_are_left_to_the_shell(self, offered: dict[str, list[str]]) -> None:
        assert offered["tune a docs/"] == offered["visualize docs/"] == offered["run train.py --mod"] == []


@pytest.mark.skipif(ZSH is None, reason="zsh is not installed")
def test_zsh_reads_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"autoload -Uz compinit; compinit -u -D; source {script('zsh', capsys, tmp_path)}; print $_comps[effvit]"
    done = subprocess.run([str(ZSH), "-f", "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("_bash_complete -o default -F _effvit", "")


@pytest.mark.skipif(FISH is None, reason="fish is not installed")
def test_fish_offers_what_the_parsers_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = script("fish", capsys, tmp_path)

    def offered(line: str) -> list[str]:
        text = f"source {source}; complete -C {shlex.quote('effvit ' + line)}"
        done = subprocess.run([str(FISH), "--no-config", "-c", text], capture_output=True, text=True, check=True)
        return sorted(entry.split("\t")[0] for entry in done.stdout.splitlines())

    assert offered("pro") == ["profile"]
    assert offered("configs ") == ["copy", "list"]
    assert offered("profile a --method t") == ["tome"]
    assert offered("tune vit_nano") == timm.list_models("vit_nano*")


def slots_of_all() -> dict[str, list[object]]:
    """The words of all commands and what they take."""
    (commands,) = cli.parser()._subparsers._group_actions
    return slots_of(commands)


def test_every_option_is_completed_by_what_it_is() -> None:
    """An argument whose name says that it takes a model, a method or a file has the type that offers these."""
    untyped = [
        f"{words} {slot.names}"
        for words, slots in slots_of_all().items()
        for slot in slots
        if slot.kind == NOTHING
        and {"--model", "--method", "--json", "--out", "--checkpoint", "--images"} & set(slot.names)
        and slot.values
    ]
    assert untyped == []


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "tcsh"])
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
