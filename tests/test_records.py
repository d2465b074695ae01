"""Files of results from strangers: what is refused, field by field, and how. All numbers here are made up."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_evaluation, made_up_model, made_up_profile, made_up_tokens

from effvit.cli import main
from effvit.measure.json_files import LARGEST_FILE, read_json, write_json
from effvit.measure.records import (
    add_record,
    as_json,
    as_object,
    check_record,
    evaluation_of,
    profile_of,
    read_evaluations,
    read_profiles,
    read_results,
    read_tuning,
    write_records,
)
from effvit.show.report import write_report

ROOT = Path(__file__).resolve().parents[1]


def made_up_tuning() -> dict[str, Any]:
    candidate = {key: made_up_model("x", "evit", 1.5)[key] for key in ("method", "settings", "macs", "speedup")}
    candidate |= {"interval": [1.4, 1.6], "fidelity": {"divergence": 0.1, "feature_distance": 0.1, "agreement": 1.0}}
    record = {"schema": 1, "kind": "tune", "host": "host_a", "target": {"speedup": 1.4}, "best": candidate}
    profile = made_up_profile()
    return record | {"front": [candidate], "tried": [candidate]} | {k: profile[k] for k in ("machine", "conditions")}


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[1e999]", "1e999 is not a number a page can read"),
            ("[-Infinity]", "-Infinity is not a number a page can read"),
            ("[" * 100_000, "its lists are nested too deep"),
            ('{"a": ' * 100_000, "its lists are nested too deep"),
            ('[{"macs": 1, "macs": 2}]', "an object has the name 'macs' twice"),
            (f"[{'9' * 5000}]", "Exceeds the limit"),  # Python's own, CVE-2020-10735
        ],
    )
    def test_json_that_no_reader_agrees_on_is_refused(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "odd.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"odd.json is not a JSON file of results \({message}"):
            read_json(path)

    def test_other_encoding_folder_and_size_are_refused(self, tmp_path: Path) -> None:
        latin, large = tmp_path / "latin.json", tmp_path / "large.json"
        latin.write_bytes('["é"]'.encode("latin-1"))
        with large.open("wb") as file:
            file.truncate(LARGEST_FILE + 1)  # sparse: no byte is written
        for path, message in (
            (latin, "'utf-8' codec"),
            (large, "a file of results at most"),
            (tmp_path, "is a folder"),
        ):
            with pytest.raises(ValueError, match=message):
                read_json(path)

    def test_number_that_is_not_finite_is_not_written(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is not written: .*not JSON compliant"):
            write_json(tmp_path / "out.json", {"divergence": float("nan")})
        assert not (tmp_path / "out.json").exists()

    def test_record_is_added_to_a_list_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        add_record(path, {"a": 1})
        add_record(path, {"a": 2})
        assert json.loads(path.read_text()) == [{"a": 1}, {"a": 2}]
        path.write_text("{}")
        with pytest.raises(ValueError, match="must hold a list of records to add one, got dict"):
            add_record(path, {"a": 3})

    def test_records_measured_here_are_valid(self) -> None:
        assert read_profiles(ROOT / "docs/benchmarks/fashion_accuracy_cpu.json")

    def test_what_was_read_is_written_as_it_was(self, tmp_path: Path) -> None:
        """Key by key in the same order, with what some files hold and others lack."""
        measured, path = ROOT / "docs/benchmarks/fashion_accuracy_cpu.json", tmp_path / "out.json"
        write_records(path, read_profiles(measured))
        assert path.read_bytes() == measured.read_bytes()
        write_records(path, [profile_of(made_up_profile())])
        assert json.loads(path.read_text()) == [made_up_profile()]

    def test_tuning_that_was_read_is_written_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "tuned.json"
        conditions = {"batch_size": 4, "input_size": [3, 64, 64], "images": 2, "rounds": 8}
        conditions |= {"threads": 1, "device": "cpu", "dtype": "float32"}
        write_json(path, made_up_tuning() | {"conditions": conditions})
        assert as_object(read_tuning(path)) == made_up_tuning() | {"conditions": conditions}

    def test_search_with_its_progress_is_written_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "tuned.json"
        found = made_up_tuning() | {"best": None, "front": []}
        found["tried"] = [candidate | {"rounds": 8} for candidate in found["tried"]]
        judged = {key: found["tried"][0][key] for key in ("method", "settings", "fidelity")}
        found |= {"judged": [judged], "staircase": {"tokens": [4, 8], "seconds": [0.1, 0.2], "rest": 0.0}}
        found |= {"untried": ["the rest"]}
        labelled = found["tried"][0] | {"classified": {"loss": 0.3, "top1": 90.0, "images": 10}}
        found |= {"dense": labelled["classified"]}
        found |= {"free": {"choice": labelled, "random": [], "defaults": [labelled], "no_random": "it restores tokens"}}
        write_json(path, found)
        again = as_object(read_tuning(path))
        assert {key: again[key] for key in found if key != "conditions"} == {
            key: value for key, value in found.items() if key != "conditions"
        }

    def test_top1_above_a_hundred_is_refused(self) -> None:
        dense = {"loss": 0.3, "top1": 101.0, "images": 10}
        with pytest.raises(ValueError, match=r'dense: "top1" must be a number from 0 to 100, got 101.0'):
            check_record(made_up_tuning() | {"dense": dense}, "a.json", ("tune",))

    def test_staircase_with_sides_of_two_lengths_is_refused(self) -> None:
        steps = {"tokens": [4, 8], "seconds": [0.1], "rest": 0.0}
        with pytest.raises(ValueError, match=r'staircase: "seconds" must be as long as tokens, 2 entries, got \[0.1\]'):
            check_record(made_up_tuning() | {"staircase": steps}, "a.json", ("tune",))

    def test_report_takes_a_search_and_refuses_a_broken_one(self, tmp_path: Path) -> None:
        path = tmp_path / "tuned.json"
        write_json(path, made_up_tuning())
        assert read_results(path) == [made_up_tuning()]
        write_json(path, made_up_tuning() | {"tried": 3})
        with pytest.raises(ValueError, match=r'tuned.json: "tried" must be a list, got a int'):
            read_results(path)

    def test_file_is_replaced_in_one_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A writing that is interrupted leaves what was there, and nothing beside it."""
        path = tmp_path / "tuned.json"
        write_json(path, [1])

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_json(path, [2])
        assert json.loads(path.read_text()) == [1]
        assert list(tmp_path.iterdir()) == [path]
        write_json(path, [2])
        assert json.loads(path.read_text()) == [2]

    def test_value_without_words_in_json_is_refused(self) -> None:
        with pytest.raises(TypeError, match="holds numbers, texts, lists and objects, got a set"):
            as_json({"a": {1}})


class TestFields:
    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("models", 1, "macs"), "many", r'models 1: "macs" must be a whole number from 0 to 1e\+18, got \'many\''),
            (("models", 1, "macs"), True, r'"macs" must be a whole number'),
            (("models", 0, "speedup"), 1e300, r'models 0: "speedup" must be a number from 0 to 1e\+18, got 1e\+300'),
            (("models", 0, "interval"), [1.0], r'"interval" must be a list of 2 to 2 entries, got \[1.0\]'),
            (("models", 0, "seconds"), [], r'"seconds" must be a list of 1 to 10000 entries'),
            (("models", 0, "latency", "p50"), None, r'models 0, latency: "p50" must be a number'),
            (("models", 0, "accuracy"), {"value": 1}, r"models 0, accuracy lacks data, metric, origin"),
            (("models", 0, "name"), "\x1b[31mred", r"without control characters, got '\\\\?x1b\[31mred'"),
            (("models", 0, "name"), "a\u202eb", r"without control characters"),
            (("models", 0, "name"), "x" * 100_000, r"of at most 10000 characters .*got 'x+\.\.\.x+'"),
            (("models", 0, "settings"), {"\x1b": 1}, r'settings: "a name" must be a text'),
            (("conditions", "input_size"), [3, 0, 64], r'"input_size 1" must be a whole number from 1'),
            (("machine", "cores"), [2], r'machine: "cores" must be a whole number'),
            (("machine", "more"), [[[[[[[[[[1]]]]]]]]]], r"at most 8 lists and objects inside each other"),
        ],
    )
    def test_value_is_named_with_its_place_and_rule(self, place: tuple[Any, ...], value: Any, message: str) -> None:
        record: Any = made_up_profile()
        owner = record
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = value
        with pytest.raises(ValueError, match=message) as caught:
            check_record(record, "a.json, record 0")
        assert len(str(caught.value)) < 400
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("grid", [[], [[]], [[0, 1], [0]], [[0.5]], [[-2]], [0], {"0": [0]}])
    def test_labels_are_rows_of_one_length(self, grid: Any) -> None:
        record = made_up_tokens()
        record["stages"][0]["labels"] = grid
        with pytest.raises(ValueError, match=r"stages 0.*labels"):
            check_record(record, "a.json, record 0")

    @pytest.mark.parametrize("kind", [[], {}, None, 1, "tune", "\x1b"])
    def test_other_kind_is_named(self, kind: Any) -> None:
        with pytest.raises(ValueError, match="\"kind\": 'profile' or 'accuracy' or 'tokens' or 'metrics', got"):
            check_record({"schema": 1, "kind": kind}, "a.json, record 0")

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("models", 0, "accuracy", "images"), 0, r'models 0, accuracy: "images" must be a whole number from 1'),
            (("models", 1, "published", "value"), 101, r'models 1, published: "value" must be a number from 0 to 100'),
            (("models", 1, "macs"), None, r'models 1: "macs" must be a whole number'),
            (("conditions", "weights"), 3, r'conditions: "weights" must be a text'),
            (("models", 1, "object_patches", "tokens"), [1.2, 0], r'tokens 0" must be a number from 0 to 1, got 1.2'),
            (("models", 1, "object_patches", "represented"), [1.0], r'"represented" must be as long as tokens, 2 ent'),
            (("models", 1, "consistency", "shifts"), [0, 1], r'shifts 0" must be a whole number from 1'),
            (("models", 1, "consistency", "same"), [], r'"same" must be a list of 1 to'),
        ],
    )
    def test_evaluation_is_checked_too(self, place: tuple[Any, ...], value: Any, message: str) -> None:
        record: Any = made_up_evaluation()
        check_record(record, "a.json, record 0")
        owner = record
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = value
        with pytest.raises(ValueError, match=message):
            check_record(record, "a.json, record 0")

    def test_evaluation_of_a_file_is_what_was_written(self, tmp_path: Path) -> None:
        """With what was published, what is kept of the object and how predictions stay, or without any of them."""
        record = made_up_evaluation()
        evaluation = evaluation_of(record)
        assert as_object(evaluation) == record
        assert evaluation.models[1].object_patches.tokens == [1.0, 0.5]  # type: ignore[union-attr]
        assert evaluation.models[1].consistency.shifts == [1, 2]  # type: ignore[union-attr]
        assert (evaluation.models[0].object_patches, evaluation.models[0].consistency) == (None, None)
        write_records(tmp_path / "a.json", [evaluation])
        assert read_evaluations(tmp_path / "a.json") == [evaluation]

    def test_tuning_is_checked_too(self) -> None:
        check_record(made_up_tuning(), "a.json", ("tune",))
        with pytest.raises(ValueError, match=r'best: "macs" must be'):
            check_record(made_up_tuning() | {"best": {**made_up_tuning()["best"], "macs": None}}, "a.json", ("tune",))


HOSTILE = (
    *(None, True, -1, 0, 1e300, 10**30, "", "\x1b[2J", "\ud800", "a" * 20_000, "__proto__", [], {}, [[]]),
    *([None], {"": {}}, [1, 2], {"a": "b"}, "data:image/svg+xml,<svg/>", 0.5, "</script>"),
)


def places_of(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values inside the value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, entry in inside for found in [(*place, key), *places_of(entry, (*place, key))]]


def mutated(record: Any, draw: random.Random) -> Any:
    """The record with one value dropped, replaced, nested or repeated."""
    record = copy.deepcopy(record)
    *path, last = draw.choice(places_of(record))
    owner = record
    for key in path:
        owner = owner[key]
    change = draw.randrange(4)
    if change == 0:
        del owner[last]
    elif change == 1:
        owner[last] = draw.choice(HOSTILE)
    elif change == 2:
        owner[last] = draw.choice([[owner[last]], {"x": owner[last]}])
    else:
        owner[last] = owner[last] * 3 if isinstance(owner[last], list) else draw.choice(HOSTILE)
    return record


class TestMutations:
    def test_mutated_record_makes_a_page_or_a_value_error(self, tmp_path: Path) -> None:
        draw, path, page = random.Random(0), tmp_path / "results.json", tmp_path / "report.html"
        made, refused = 0, []
        for _ in range(400):
            record = mutated(draw.choice([made_up_profile(), made_up_evaluation(), made_up_tokens()]), draw)
            path.write_text(json.dumps([record]))
            try:
                write_report([path], page)
            except ValueError as error:
                refused.append(str(error))
            else:
                made += 1
                data = page.read_text(encoding="utf-8").rpartition('type="application/json">')[2].partition("<")[0]
                assert json.loads(data, parse_constant=pytest.fail) == [record]
        assert made > 20
        assert len(refused) > 200
        assert not [text for text in refused if not text.isprintable() or len(text) > 1000]

    def test_mutated_file_ends_the_command_in_one_sentence(self, tmp_path: Path, capsys: Any) -> None:
        draw, path = random.Random(1), tmp_path / "results.json"
        whole = json.dumps([made_up_profile()]).encode()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[draw.randrange(len(whole))] = draw.randrange(256)
            path.write_bytes(damaged)
            status = main(["report", str(path), "--out", str(tmp_path / "report.html")])
            said = capsys.readouterr()
            assert (status, said.err) == (0, "") or (status == 2 and said.err.count("\n") == 1)
            assert said.err.removesuffix("\n").isprintable()


def test_device_is_refused_before_it_is_read() -> None:
    """/dev/zero has no end and a size of 0."""
    with pytest.raises(ValueError, match="/dev/zero is a pipe, socket or device, not a JSON file of results"):
        read_json(Path("/dev/zero"))
