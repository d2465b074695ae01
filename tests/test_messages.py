"""What commands say of errors: one line, safe to print, with the right status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effvit.messages import one_line, plain, run_command, run_with_traceback, shown


def raises(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),  # bidirectional override and isolate, CVE-2021-42574
        ("half \ud800", r"half \ud800"),
        ("naïve 图像 \u200d", "naïve 图像 \u200d"),  # a joiner belongs to scripts and emoji
    ],
)
def test_control_characters_become_escapes(text: str, safe: str) -> None:
    assert plain(text) == safe


def test_long_text_is_shortened_in_its_middle() -> None:
    assert plain("a" * 600 + "b" * 600, 15) == "aaaaa ... bbbbb"
    assert len(one_line("word " * 10**6)) <= 2000
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested]
    assert len(shown([nested] * 1000)) < 200


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_error_of_a_command_is_one_line(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tool", lambda: raises(error("two\nlines \x1b[2J"))) == 2
    assert capsys.readouterr().err == "tool: error: two lines \\x1b[2J\n"


def test_error_of_the_system_names_its_file_without_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", lambda: raises(OSError(28, "No space left on device"))) == 2
    assert capsys.readouterr().err == "tool: error: No space left on device\n"
    assert run_command("tool", lambda: len(tmp_path.read_text())) == 2
    assert capsys.readouterr().err == f"tool: error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize(
    "run",
    [
        lambda: raises(MemoryError()),
        lambda: raises(torch.OutOfMemoryError("CUDA")),
        lambda: torch.empty(10**15).numel(),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_lack_of_memory_is_one_line(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tool", run) == 2
    assert "tool: error: there is not enough memory; use a smaller batch" in capsys.readouterr().err


def test_other_errors_at_run_time_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_command("tool", lambda: raises(RuntimeError("shapes do not agree")))


@pytest.mark.parametrize(("error", "status"), [(ValueError("wrong"), 2), (KeyboardInterrupt(), 130)])
def test_traceback_stands_above_the_sentence_where_it_is_asked_for(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", lambda: raises(error), debug=True) == status
    message = capsys.readouterr().err
    assert message.startswith("Traceback (most recent call last):")
    assert message.splitlines()[-1] in ("tool: error: wrong", "tool: interrupted")


def test_interrupt_is_130_as_in_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tool", lambda: raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_error_after_the_start_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_traceback(lambda: raises(ValueError("deep inside"))) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback (most recent call last):")
    assert message.endswith("ValueError: deep inside\n")
    assert run_with_traceback(lambda: "done") == 0


@pytest.mark.slow
def test_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    script = "import sys; from effvit.messages import run_command; sys.exit(run_command('tool', lambda: print('x')))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
