"""The tool that puts small faults into the code: its list fits the code, and it tells which are noticed."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutate
import pytest
from mutate import Mutation, faults_of_list, read_mutations, run_mutations


def test_every_entry_of_the_list_fits_the_code() -> None:
    mutations = read_mutations()
    assert faults_of_list(mutations) == []
    assert len(mutations) >= 150


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one function and one test, which does not look at odd numbers."""
    for folder in ("effvit", "tests", "tools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "effvit" / "halves.py").write_text("def half(n):\n    return n // 2\n")
    (tmp_path / "tests" / "test_halves.py").write_text(
        "from pathlib import Path\n\n"
        "def test_half():\n"
        "    scope = {}\n"
        "    exec(Path('effvit/halves.py').read_text(), scope)\n"
        "    assert scope['half'](6) == 3\n\n"
        "def test_broken():\n"
        "    assert False\n"
    )
    return tmp_path


def mutation(**changes: Any) -> Any:
    entry = {"id": "third", "file": "effvit/halves.py", "old": "n // 2", "new": "n // 3", "why": "it is a half"}
    return Mutation(**(entry | {"tests": "test_halves.py -k test_half"} | changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"file": "effvit/thirds.py"}, "there is no file effvit/thirds.py"),
        ({"old": "n // 4"}, "its snippet stands 0 times in effvit/halves.py: 'n // 4'"),
        ({"old": "n"}, "its snippet stands 3 times in effvit/halves.py: 'n'"),
        ({"new": "n // 2"}, "it changes nothing"),
        ({"new": "n // ("}, "what it makes of effvit/halves.py is no Python: "),
        ({"tests": "test_thirds.py"}, "there is no file tests/test_thirds.py"),
        ({"tests": "test_halves.py -k third"}, "no test has third in its name or parameters"),
        ({"tests": "test_halves.py -x"}, "tests may be a file and -k with an expression, got 'test_halves.py -x'"),
        ({"tests": ""}, "it needs tests, or the reason why it is equivalent, and not both"),
        ({"equivalent": "3 is 2"}, "it needs tests, or the reason why it is equivalent, and not both"),
        ({"why": ""}, "it does not say why it matters"),
    ],
)
def test_entry_that_does_not_fit_is_told(project: Path, changes: dict[str, Any], fault: str) -> None:
    (found,) = faults_of_list([mutation(**changes)], project)
    assert found.startswith(f"third: {fault}")
    assert faults_of_list([mutation()], project) == []


def test_two_entries_of_one_id_are_told(project: Path) -> None:
    assert faults_of_list([mutation()] * 2, project) == ["third: 2 entries have this id"]


def test_list_with_an_odd_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yml").write_text("- {id: a, file: b.py, old: c, new: 1, when: now}\n")
    with pytest.raises(ValueError, match=r"list.yml: a lacks \[\] or has odd fields \['new', 'when'\]"):
        read_mutations(tmp_path / "list.yml")


def test_fault_that_no_test_notices_survives(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding up is none for the even number tested; the project stays as it is."""
    monkeypatch.setattr(mutate, "PRELOADED", ("pytest",))
    before = {path: path.read_text() for path in project.glob("*/*.py")}
    third = mutation()
    faults = [
        third,
        replace(third, id="rounded-up", new="(n + 1) // 2"),
        replace(third, id="of-a-broken-test", tests="test_halves.py -k test_broken"),
    ]
    assert run_mutations(faults, root=project) == ["test_halves.py -k test_broken", "rounded-up"]
    said = capsys.readouterr().out
    for word, name in (("killed", "third"), ("SURVIVED", "rounded-up"), ("FAILED", "-k test_broken as it is")):
        assert any(line.startswith(word) and line.endswith(name) for line in said.splitlines())
    assert said.endswith("killed 1 / 3\nsurvived: rounded-up\n")
    assert {path: path.read_text() for path in project.glob("*/*.py")} == before


def test_loop_without_an_end_is_noticed_by_its_time(project: Path, tmp_path: Path) -> None:
    fault = mutation(old="return n // 2", new="while True: pass")
    copy = tmp_path / "copy"
    mutate.copy_project(project, copy)
    (outcome,) = mutate.outcomes(deque([mutate.Run(fault.tests, fault)]), [copy], {fault.tests: 3.0})
    assert outcome.code is None
    assert mutate.describe(outcome).startswith("timed out")
    assert (copy / fault.file).read_text() == (project / fault.file).read_text()


def test_sample_and_shards_are_parts_of_the_list() -> None:
    mutations = read_mutations()
    runnable = [entry for entry in mutations if not entry.equivalent]

    def chosen(*options: str) -> list[Any]:
        return mutate._chosen(mutate._parser().parse_args(options), mutations)

    assert chosen("--all") == runnable
    assert sorted(entry.id for part in ("1/3", "2/3", "3/3") for entry in chosen("--all", "--shard", part)) == sorted(
        entry.id for entry in runnable
    )
    assert chosen("--sample", "5", "--seed", "1") == chosen("--sample", "5", "--seed", "1")
    assert len({entry.id for entry in chosen("--sample", "5")}) == 5
    assert [entry.id for entry in chosen("--only", "evit-default-rate")] == ["evit-default-rate"]
    with pytest.raises(SystemExit, match="no such mutation: nothing"):
        chosen("--only", "nothing")
