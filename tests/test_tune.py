"""The search for a setting: its ladders, its bisection, and the choice, on made-up and on real measurements."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from labelled_sets import write_folders
from PIL import Image
from rich.console import Console
from torch.nn.functional import cross_entropy

import effvit
import effvit.measure.tune
from effvit.cli import main
from effvit.data.opening import open_labelled
from effvit.data.preparation import image_transform
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.evaluation import Selection, load_labelled
from effvit.measure.fidelity import classified
from effvit.measure.free_choices import FreeModel, default_models
from effvit.measure.json_files import write_json
from effvit.measure.ladders import weakest
from effvit.measure.profiler import machine, measurement
from effvit.measure.records import as_object, check_record, read_tuning
from effvit.measure.resume import fingerprint
from effvit.measure.staircase import FewTokens
from effvit.measure.tune import SEARCHES, families, front, tune
from effvit.measure.values import Candidate, Fidelity, FreeChoices, Tuning, TuningConditions
from effvit.reducers import METHODS
from effvit.schedule import spread_evenly
from effvit.show.tables import choice_text, free_lines, measure_text, print_tuning
from effvit.testing import make_window_host
from effvit.testing.models import noise
from effvit.testing.windows import WINDOW_SIZE

SIZE = (3, 64, 64)


@pytest.fixture(autouse=True)
def _few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effvit.schedule.LADDER_RATES", (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4))


@pytest.fixture(scope="module")
def dense() -> Any:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def time_of(model: Any, size: Any) -> float:
    """Its multiply-adds."""
    if isinstance(model, FewTokens):
        length, dim = model.dense.num_prefix_tokens + model.count, model.dense.embed_dim
        return 1000.0 + model.depth * (12 * length * dim**2 + 2 * length**2 * dim)
    counts = model.token_counts() if getattr(model, "method", None) == "ats" else None
    return sum(closed_form_macs(model, size, token_counts=counts).values())


@pytest.fixture
def speed_of_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take the time their multiply-adds say."""

    def profile_models(models: Any, size: Any, batch_size: int, *, rounds: int, on_run: Any = None, **_: Any) -> Any:
        seconds = {name: time_of(model, size) * np.ones(rounds) for name, model in models.items()}
        for name in models:
            on_run(name)
        return [measurement(name, own, seconds["dense"], batch_size) for name, own in seconds.items()]

    monkeypatch.setattr("effvit.measure.tune.profile_models", profile_models)


def test_totals_are_spread_over_the_blocks() -> None:
    assert spread_evenly(7, 3) == [3, 2, 2]
    assert spread_evenly(2, 4) == [1, 1, 0, 0]


def test_ladders_hold_only_what_the_model_can_take(dense: Any) -> None:
    """Methods that are calibrated or trained first have none, nor has DiffRate, whose schedules come from a search."""
    found = families(dense)
    assert {family.method for family in found} == {
        "evit",
        "tome",
        "gtp",
        "ats",
        "zero_tprune",
        "expedite",
        "pitome",
        "mctf",
        "cubistmerge",
        "vid_tldr",
        "algm",
        "dpcknn",
        "kmedoids",
        "atc",
    }
    for family in found:
        for settings in (family.ladder[0], family.ladder[-1]):
            effvit.sparsify(dense, family.method, **settings)
    tome = next(family for family in found if family.method == "tome")
    assert sum(tome.ladder[-1]["r"]) == 15  # of 16 patches
    with pytest.raises(
        ValueError, match=r"'dymu' is not tuned, since its .* calibrated or trained .*; tuned are evit, tome"
    ):
        families(dense, ["dymu"])


def test_bisection_finds_the_first_rung_of_every_ladder() -> None:
    first, asked = [3, 0, 9, 5], []

    def reaches(rungs: dict[int, int]) -> dict[int, bool]:
        asked.append(rungs)
        return {ladder: rung >= first[ladder] for ladder, rung in rungs.items()}

    assert weakest(reaches, [8, 4, 9, 6]) == {0: 3, 1: 0, 2: None, 3: 5}
    assert len(asked) <= 4


def test_front_leaves_out_what_is_beaten() -> None:
    def candidate(speedup: float, divergence: float) -> Candidate:
        return Candidate("tome", {}, 1, speedup, (speedup, speedup), Fidelity(divergence, 0.0, 1.0, 1))

    slow, beaten, fast = candidate(1.2, 0.1), candidate(1.3, 0.5), candidate(1.5, 0.4)
    assert front([beaten, fast, slow]) == [slow, fast]


@pytest.mark.usefixtures("speed_of_macs")
class TestTune:
    def test_best_reaches_the_speedup_with_the_least_divergence(self, dense: Any, images: torch.Tensor) -> None:
        result = as_object(tune(dense, images, speedup=1.4, methods=["evit", "tome", "ats"]))
        check_record(result | {"host": "a host"}, "result", ("tune",))
        best = result["best"]
        assert best["speedup"] >= 1.4
        rivals = [tried for tried in result["tried"] if tried["speedup"] >= 1.4]
        assert best["fidelity"]["divergence"] == min(rival["fidelity"]["divergence"] for rival in rivals)
        assert {tried["method"] for tried in result["tried"]} == {"evit", "tome", "ats"}
        speeds = [candidate["speedup"] for candidate in result["front"]]
        assert speeds == sorted(speeds)

    def test_a_search_misled_by_noise_goes_on_to_stronger_settings(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exact = effvit.measure.tune.profile_models

        def flattering(*args: Any, rounds: int, **kwargs: Any) -> list[Any]:
            factor = 1.2 if rounds == 3 else 1.0
            return [replace(m, speedup=factor * m.speedup) for m in exact(*args, rounds=rounds, **kwargs)]

        monkeypatch.setattr("effvit.measure.tune.profile_models", flattering)
        result = tune(dense, images, speedup=1.5, methods=["tome"], rounds=3, final_rounds=4)
        assert 1.5 <= result.best.speedup < 1.65

    def test_a_winner_that_was_only_lucky_is_passed_over(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one of many that noise favoured does not reach the aim when it is measured alone."""
        exact = effvit.measure.tune.profile_models
        alone: list[float] = []

        def lucky(models: Any, *args: Any, **kwargs: Any) -> list[Any]:
            dense_speed, *others = exact(models, *args, **kwargs)
            if len(others) == 1:
                alone.append(others[0].speedup)
                return [dense_speed, *others]
            interval = [(1.2 * m.interval[0], 1.2 * m.interval[1]) for m in others]
            changed = zip(others, interval, strict=True)
            return [dense_speed, *(replace(m, speedup=1.2 * m.speedup, interval=i) for m, i in changed)]

        monkeypatch.setattr("effvit.measure.tune.profile_models", lucky)
        result = tune(dense, images, speedup=1.5, methods=["evit", "tome"], rounds=3, final_rounds=4)
        assert len(alone) > 1
        assert alone[0] < 1.5
        assert result.best.speedup == alone[-1] >= 1.5

    def test_multiply_adds_are_not_exceeded(self, dense: Any, images: torch.Tensor) -> None:
        limit = round(0.7 * sum(closed_form_macs(dense, SIZE).values()))
        best = tune(dense, images, macs=limit, methods=["evit", "tome"]).best
        assert 0.9 * limit < best.macs <= limit

    def test_aim_out_of_reach_is_named(self, dense: Any, images: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"no setting of expedite reaches a speed-up of 50 here \(fastest"):
            tune(dense, images, speedup=50, methods=["expedite"])

    @pytest.mark.parametrize(
        ("aim", "message"),
        [
            ({}, "give one aim"),
            ({"speedup": 1.5, "macs": 5}, "give one aim"),
            ({"speedup": 1.0}, "speedup must be above 1, got 1.0"),
        ],
    )
    def test_unclear_aims_are_refused(self, dense: Any, images: torch.Tensor, aim: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tune(dense, images, **aim)


@pytest.mark.usefixtures("speed_of_macs")
def test_command_writes_what_timm_takes(tmp_path: Path, capsys: Any) -> None:
    picture, path = tmp_path / "grey.png", tmp_path / "tuned.json"
    Image.new("RGB", (40, 40), (90, 90, 90)).save(picture)
    command = ["tune", "deit_tiny_patch16_224", str(picture), "--gmacs", "1.0", "--method", "evit", "--rounds", "1"]
    command += ["--threads", "1"]
    assert main([*command, "--final-rounds", "1", "--batch-size", "1", "--json", str(path)]) == 0
    assert "best: evit keep_rate=" in capsys.readouterr().out
    ready = json.loads(path.read_text())
    model = timm.create_model(ready["model_name"], **ready["settings"])
    assert model.settings["keep_rate"] == ready["best"]["settings"]["keep_rate"]


def test_only_the_best_row_is_bold() -> None:
    """Another method with the same settings is another candidate."""

    def row(method: str) -> Candidate:
        return Candidate(method, {"keep_rate": 0.7}, 10**9, 1.5, (1.4, 1.6), Fidelity(0.1, 0.0, agreement=1.0))

    front = [row("evit"), row("ats")]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    conditions = TuningConditions(1, SIZE, {}, 1, "cpu", "float32")
    print_tuning(console, Tuning({}, conditions, {"speedup": 1.5}, row("evit"), front, front))
    lines = [line for line in console.file.getvalue().splitlines() if "1.000" in line and "best" not in line]
    assert ["\x1b[1m" in line for line in lines] == [True, False]


@pytest.mark.usefixtures("speed_of_macs")
class TestSchedules:
    @pytest.mark.parametrize("search", SEARCHES)
    @pytest.mark.parametrize(("method", "speedup"), [("tome", 1.2), ("ats", 1.3)])
    def test_other_schedules_bring_the_outputs_nearer_at_the_same_speed(
        self, dense: Any, images: torch.Tensor, method: str, speedup: float, search: str
    ) -> None:
        ladder = tune(dense, images, speedup=speedup, methods=[method], moves=0)
        moved = tune(dense, images, speedup=speedup, methods=[method], moves=40, search=search)
        assert ladder.judged is None
        assert ladder.staircase is None
        assert moved.best is not None
        assert ladder.best is not None
        assert moved.best.fidelity.divergence < ladder.best.fidelity.divergence
        assert moved.best.speedup >= speedup
        assert moved.staircase is not None
        assert 1 < len(moved.judged or ()) <= 41

    def test_the_best_over_several_families_is_chosen(self, dense: Any, images: torch.Tensor) -> None:
        """Each alone is no nearer than both together."""
        alone = [tune(dense, images, speedup=1.3, methods=[name], moves=10).best for name in ("tome", "evit")]
        both = tune(dense, images, speedup=1.3, methods=["tome", "evit", "tome"], moves=10)
        assert both.best is not None
        assert both.best.fidelity.divergence <= min(best.fidelity.divergence for best in alone if best) + 1e-9

    def test_moves_keep_to_the_multiply_adds_asked_for(self, dense: Any, images: torch.Tensor) -> None:
        limit = round(0.75 * sum(closed_form_macs(dense, SIZE).values()))
        result = tune(dense, images, macs=limit, methods=["tome"], moves=30)
        assert result.best is not None
        assert all(candidate.macs <= limit for candidate in result.tried)
        assert result.best.fidelity.divergence == min(c.fidelity.divergence for c in result.tried)
        assert result.judged

    def test_multiply_adds_that_no_setting_comes_down_to_are_refused_with_the_fewest(
        self, dense: Any, images: torch.Tensor
    ) -> None:
        ladder = families(dense, ["tome"])[0].ladder
        fewest = effvit.count_flops(effvit.sparsify(dense, "tome", **ladder[-1]), SIZE).total
        with pytest.raises(ValueError, match=rf"no setting of tome comes down to 1000 .*: the fewest are {fewest}, "):
            tune(dense, images, macs=1000, methods=["tome"])

    def test_hosts_whose_blocks_are_not_timed_alone_are_predicted_by_multiply_adds(self) -> None:
        eva = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=4, num_classes=5).eval()
        result = tune(eva, torch.randn(1, 3, 56, 56), speedup=1.2, methods=["tome"], moves=5)
        assert result.best is not None
        assert result.judged
        assert result.staircase is None

    def test_a_method_without_schedules_keeps_to_its_ladder(self, dense: Any, images: torch.Tensor) -> None:
        result = tune(dense, images, speedup=1.3, methods=["expedite"])
        assert result.best is not None
        assert result.judged is None


@pytest.fixture
def slow_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which whatever is reduced takes longer, the more the less it computes."""

    def profile_models(models: Any, size: Any, batch_size: int, *, rounds: int, **_: Any) -> Any:
        total = time_of(models["dense"], size)
        seconds = {name: (2 * total - time_of(model, size)) * np.ones(rounds) for name, model in models.items()}
        return [measurement(name, own, seconds["dense"], batch_size) for name, own in seconds.items()]

    monkeypatch.setattr("effvit.measure.tune.profile_models", profile_models)


class TestWindows:
    @pytest.mark.usefixtures("speed_of_macs")
    @pytest.mark.parametrize(("host", "area"), [("sam", 16), ("swin", 16), ("hiera", 12 * 14), ("hieradet", 16)])
    def test_hosts_with_windows_are_tuned_by_their_ladders(self, host: str, area: int) -> None:
        """The largest window, of ``area`` tokens, can lose half of them; the choice has no control, and is told so."""
        dense, x = make_window_host(host), noise(2, WINDOW_SIZE)
        ladders = {family.method: family.ladder for family in families(dense)}
        assert ladders.keys() == {"tome", "pitome", "expedite", "cubistmerge"}
        assert max(ladders["tome"][-1]["r"]) in (area // 2 - 1, area // 2)
        result = tune(dense, x, speedup=1.1, rounds=2, final_rounds=2)
        assert result.best is not None
        assert result.best.speedup >= 1.1
        assert result.untried is None
        assert result.free is not None
        assert re.search("gives its tokens back in every window.* no patches to choose", result.free.no_random or "")

    @pytest.mark.parametrize("host", ["hiera", "hieradet"])
    def test_ladders_grow_in_every_block_but_those_that_pool(self, host: str) -> None:
        """Blocks 2 and 4 begin a stage; no two rungs are the same."""
        (family,) = families(make_window_host(host), ["tome"])
        rungs = [settings["r"] for settings in family.ladder]
        assert {(r[2], r[4]) for r in rungs} == {(0, 0)}
        assert all(r[block] > 1 for block in (0, 1, 3, 5, 6) for r in rungs[-1:])
        assert [sum(r) for r in rungs] == sorted({sum(r) for r in rungs})

    def test_another_network_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"tuned are plain ViTs, .* and hosts with windows, not Linear"):
            families(torch.nn.Linear(1, 1))


class TestSlower:
    @pytest.mark.usefixtures("slow_methods")
    @pytest.mark.parametrize("aim", [{"speedup": 1.2}, {"macs": 2_000_000}])
    def test_a_slower_model_is_never_named(self, dense: Any, images: torch.Tensor, aim: Any) -> None:
        result = tune(dense, images, methods=["tome", "evit"], moves=3, **aim)
        assert result.best is None
        assert result.tried
        assert "none is named: no setting was measured faster than the dense model" in choice_text(result)

    @pytest.mark.usefixtures("speed_of_macs")
    def test_an_interval_that_holds_one_is_not_faster(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exact = effvit.measure.tune.profile_models

        def unclear(*args: Any, **kwargs: Any) -> list[Any]:
            return [replace(m, interval=(0.99, 3.0)) for m in exact(*args, **kwargs)]

        monkeypatch.setattr("effvit.measure.tune.profile_models", unclear)
        assert tune(dense, images, speedup=1.3, methods=["tome"]).best is None


@pytest.mark.usefixtures("speed_of_macs")
class TestTime:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch, speed_of_macs: None) -> list[float]:
        """A clock that goes on by a second with each timed run and each forward pass that is compared."""
        now = [0.0]
        exact, compare = effvit.measure.tune.profile_models, effvit.measure.tune.compare_outputs

        def profile_models(models: Any, *args: Any, on_run: Any, rounds: int, **kwargs: Any) -> Any:
            def run(name: str) -> None:
                now[0] += rounds
                on_run(name)

            return exact(models, *args, on_run=run, rounds=rounds, **kwargs)

        def compare_outputs(*args: Any) -> Any:
            now[0] += 1
            return compare(*args)

        monkeypatch.setattr("effvit.measure.tune.monotonic", lambda: now[0])
        monkeypatch.setattr("effvit.measure.tune.profile_models", profile_models)
        monkeypatch.setattr("effvit.measure.tune.compare_outputs", compare_outputs)
        return now

    @pytest.mark.parametrize("minutes", [0.2, 1.0, 3.0, 5.0])
    def test_the_search_ends_in_time_and_says_what_it_left_out(
        self, dense: Any, images: torch.Tensor, clock: list[float], minutes: float
    ) -> None:
        result = tune(dense, images, speedup=1.3, methods=["tome", "evit"], moves=20, minutes=minutes)
        assert clock[0] <= 60 * minutes + 40  # the run in which it ends is run to its end
        assert result.untried
        steps = ("of tome, evit", "of evit", "last measurement", "comparison of the choice")
        assert all(any(step in left for step in steps) for left in result.untried)
        if result.best is not None:
            assert result.best.speedup >= 1.3

    def test_with_time_enough_nothing_is_left_out(self, dense: Any, images: torch.Tensor, clock: list[float]) -> None:
        short = tune(dense, images, speedup=1.3, methods=["tome"], moves=20, minutes=1e3)
        assert short.untried is None
        assert short == tune(dense, images, speedup=1.3, methods=["tome"], moves=20)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"minutes": 0.0}, "minutes must be above 0, got 0.0"),
            ({"minutes": float("nan")}, "minutes must be above 0, got nan"),
            ({"moves": -1}, "moves must be at least 0, got -1; 0 keeps to the ladders"),
            ({"search": "grid"}, "search must be one of moves, monte_carlo, got 'grid'"),
        ],
    )
    def test_times_and_moves_out_of_range_are_refused(
        self, dense: Any, images: torch.Tensor, options: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            tune(dense, images, speedup=1.3, **options)


@pytest.mark.usefixtures("speed_of_macs")
class TestResume:
    @pytest.mark.parametrize("stop_after", [1, 3, 9, 14, 20])
    def test_a_search_that_was_stopped_ends_as_one_that_was_not(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop_after: int
    ) -> None:
        """Through a file, and without timing or comparing again what the file holds."""
        options = {"speedup": 1.3, "methods": ["tome", "evit"], "moves": 8, "host": "a host"}
        whole = tune(dense, images, **options)
        kept: list[Tuning] = []

        def stop(_: Any, found: Tuning) -> None:
            kept.append(found)
            if len(kept) == stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tune(dense, images, on_candidate=stop, **options)
        write_json(tmp_path / "stopped.json", as_object(kept[-1]))
        before = read_tuning(tmp_path / "stopped.json")
        assert before.best is None
        assert "the last measurement of what is chosen, alone with the dense model" in (before.untried or ())
        again: list[Any] = []
        rest = tune(dense, images, before=before, on_candidate=lambda c, _: again.append(c), **options)
        assert rest.best == whole.best
        assert as_object(rest)["front"] == as_object(whole)["front"]
        known = {(c.method, str(c.settings)): c.rounds for c in before.tried}
        fresh = [c for c in again if isinstance(c, Candidate) and known.get((c.method, str(c.settings))) != c.rounds]
        repeated = [c for c in again if isinstance(c, Candidate) and c not in fresh]
        assert all(c.rounds == 40 for c in repeated)  # only the last one, alone

    def test_a_schedule_that_the_file_holds_is_not_compared_twice(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the choice is held against is, since it follows from the choice."""
        options = {"speedup": 1.3, "methods": ["tome"], "moves": 8}
        before = tune(dense, images, **options)
        assert before.judged
        compared: list[Any] = []
        exact = effvit.measure.tune.compare_outputs

        def compare_outputs(*given: Any) -> Any:
            compared.append(given)
            return exact(*given)

        monkeypatch.setattr("effvit.measure.tune.compare_outputs", compare_outputs)
        rest = tune(dense, images, before=before, **options)
        assert rest.best == before.best
        assert rest.free is not None
        assert len(compared) == len(rest.free.random)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 4}, r"was made with batch_size 8, now it is 4; give what it was made with, or begin anew"),
            ({"host": "b"}, "was made with host 'a', now it is 'b'"),
            ({"threads": 7}, "was made with threads 1, now it is 7"),
            ({"dtype": torch.float64}, "was made with dtype 'float32', now it is 'float64'"),
            ({"compile": True}, "was made with compile None, now it is 'True'"),
        ],
    )
    def test_other_conditions_are_refused(
        self, dense: Any, images: torch.Tensor, options: dict[str, Any], message: str
    ) -> None:
        same = {"speedup": 1.3, "methods": ["tome"], "moves": 0, "host": "a", "threads": 1}
        before = tune(dense, images, **same)
        with pytest.raises(ValueError, match=message):
            tune(dense, images, before=before, **same | options)

    def test_other_weights_and_images_are_refused(self, dense: Any, images: torch.Tensor) -> None:
        same = {"speedup": 1.3, "methods": ["tome"], "moves": 0}
        before = tune(dense, images, **same)
        other = copy.deepcopy(dense)
        with torch.no_grad():
            other.head.bias[0] += 1
        with pytest.raises(ValueError, match=r"with weights '\w{16}', now it is '\w{16}'"):
            tune(other, images, before=before, **same)
        with pytest.raises(ValueError, match=r"with pixels '\w{16}', now it is '\w{16}'"):
            tune(dense, images + 1, before=before, **same)
        with pytest.raises(ValueError, match=r"with input_size \(3, 64, 64\), now it is \(3, 64, 32\)"):
            tune(dense, images[..., :32], before=before, **same)

    def test_fingerprints_tell_values_apart_in_every_dtype(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            one = torch.tensor(1).to(dtype)
            assert fingerprint([one]) == fingerprint([one.clone()])
            assert fingerprint([one]) != fingerprint([one * 0])


@pytest.mark.usefixtures("speed_of_macs")
class TestLabels:
    @torch.no_grad()
    def test_the_best_has_the_least_loss_of_all_that_reach_the_aim(self, dense: Any, images: torch.Tensor) -> None:
        """Losses as torch computes them from the scores of the models made anew."""
        labels = torch.tensor([3, 5])
        result = tune(dense, images, speedup=1.3, methods=["tome", "evit"], moves=6, labels=labels, data="two images")
        assert result.best is not None
        assert result.measure == "loss"
        assert result.conditions.options["data"] == "two images"
        known = [*result.tried, *(result.judged or ())]
        for own in known[::5]:
            scores = effvit.sparsify(dense, own.method, **own.settings)(images)
            assert own.classified is not None
            assert own.classified.loss == pytest.approx(float(cross_entropy(scores, labels)), rel=1e-5)
            assert own.classified.top1 == 100 * float((scores.argmax(-1) == labels).float().mean())
        reached = [own for own in result.tried if own.speedup >= 1.3]
        assert result.best.classified is not None
        assert result.best.classified.loss == min(own.classified.loss for own in reached if own.classified)
        assert result.dense is not None
        assert result.dense.loss == pytest.approx(float(cross_entropy(dense(images), labels)), rel=1e-5)
        losses = [own.classified.loss for own in result.front if own.classified]
        assert losses == sorted(losses)

    def test_images_without_labels_are_judged_by_divergence(self, dense: Any, images: torch.Tensor) -> None:
        result = tune(dense, images, speedup=1.3, methods=["tome"], moves=0)
        assert result.best is not None
        assert (result.measure, result.dense, result.best.classified) == ("divergence", None, None)
        assert result.best.penalty == result.best.fidelity.divergence
        assert "chosen by divergence from the dense model's outputs, on 2 images" in measure_text(result)

    def test_other_labels_are_other_conditions(self, dense: Any, images: torch.Tensor) -> None:
        same = {"speedup": 1.3, "methods": ["tome"], "moves": 0}
        before = tune(dense, images, labels=torch.tensor([3, 5]), **same)
        with pytest.raises(ValueError, match=r"was made with labels '\w{16}', now it is None"):
            tune(dense, images, before=before, **same)
        with pytest.raises(ValueError, match=r"with labels '\w{16}', now it is '\w{16}'"):
            tune(dense, images, labels=torch.tensor([3, 6]), before=before, **same)

    def test_a_label_too_few_is_refused(self, dense: Any, images: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="every image has one label, got 2 images and 1 labels"):
            tune(dense, images, speedup=1.3, labels=torch.tensor([3]))

    def test_scores_that_are_not_finite_have_no_loss(self) -> None:
        scores = torch.tensor([[1.0, float("nan")]])
        with pytest.raises(ValueError, match="scores must be finite to have a loss"):
            classified((scores, scores), torch.tensor([0]))


@pytest.mark.usefixtures("speed_of_macs")
class TestFree:
    def test_random_controls_have_the_token_counts_of_the_choice(self, dense: Any, images: torch.Tensor) -> None:
        result = tune(dense, images, speedup=1.3, methods=["tome"], moves=4)
        assert result.free is not None
        choice = effvit.sparsify(dense, result.free.choice.method, **result.free.choice.settings)
        assert [own.settings["seed"] for own in result.free.random] == [0, 1, 2]
        for own in result.free.random:
            assert effvit.sparsify(dense, own.method, **own.settings).token_counts() == choice.token_counts()
        assert len({own.fidelity.divergence for own in result.free.random}) > 1

    def test_defaults_that_reach_the_aim_are_settings_that_were_measured(
        self, dense: Any, images: torch.Tensor
    ) -> None:
        """Which do is told from the time that the models made anew take."""
        aim, methods = 1.2, ("evit", "ats", "tome", "expedite")
        result = tune(dense, images, speedup=aim, methods=methods, moves=0)
        assert result.free is not None
        assert all(own.settings == {} and own in result.tried for own in result.free.defaults)
        models = {own.method: own.model for own in default_models(dense, methods)}
        fast = [name for name, own in models.items() if time_of(dense, SIZE) / time_of(own, SIZE) >= aim]
        assert [own.method for own in result.free.defaults] == fast
        assert 0 < len(fast) < len(models)

    def test_a_method_that_restores_its_tokens_has_no_random_control(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        restoring = {"keep_rate": 0.3, "cluster_at": 1, "restore_at": 2}
        monkeypatch.setattr(METHODS["expedite"], "ladders", classmethod(lambda *_: [[restoring]]))
        result = tune(dense, images, speedup=1.01, methods=["expedite"], moves=0)
        assert result.best is not None
        assert result.free is not None
        assert result.free.random == []
        assert free_lines(result.free)[0].startswith("no random control: expedite restores 16 tokens from ")

    def test_a_default_as_good_and_as_fast_is_named_best(
        self, dense: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A search that finds no more than what the default is: the two tie."""
        found = {"keep_rate": 0.5, "reduce_at": (1,)}
        default = FreeModel("evit", {}, effvit.sparsify(dense, "evit", **found))
        monkeypatch.setattr(METHODS["evit"], "ladders", classmethod(lambda *_: [[found]]))
        monkeypatch.setattr("effvit.measure.tune.default_models", lambda *_: [default])
        result = tune(dense, images, speedup=1.05, methods=["evit"], moves=0)
        assert result.best is not None
        assert result.free is not None
        assert result.free.choice.settings == found
        assert (result.best.method, result.best.settings) == ("evit", {})
        assert result.best.penalty == result.free.choice.penalty
        assert result.best.speedup == result.free.choice.speedup
        assert "is NOT better than the defaults of evit" in "\n".join(free_lines(result.free))
        assert "best: evit at its defaults, speed-up" in choice_text(result)

    def test_a_slower_default_is_told_and_not_named(self) -> None:
        free = FreeChoices(row("evit", 1.5, 0.3), [], [row("tome", 1.4, 0.1)], "it has none")
        assert free.better_default is None
        said = free_lines(free)
        assert "no random control: it has none" in said
        assert "the defaults of tome are slower (1.40x), but reach the aim with divergence 0.1" in said

    @pytest.mark.parametrize(("penalties", "word"), [([0.2, 0.5], "is better"), ([0.1, 0.3], "is NOT better")])
    def test_random_is_the_mean_of_its_draws(self, penalties: list[float], word: str) -> None:
        free = FreeChoices(row("evit", 1.5, 0.3), [row("random", 1.5, own) for own in penalties], [])
        assert f"{word} than patches dropped at random to its token counts" in free_lines(free)[0]
        assert "no method reaches the aim at its defaults" in free_lines(free)

    def test_a_default_that_ties_is_named(self) -> None:
        """Nobody has to search for it."""
        free = FreeChoices(row("evit", 1.5, 0.3), [], [row("evit", 1.5, 0.3), row("tome", 1.6, 0.31)])
        assert free.better_default == free.defaults[0]


def row(method: str, speedup: float, divergence: float) -> Candidate:
    return Candidate(method, {}, 10**9, speedup, (speedup, speedup), Fidelity(divergence, 0.0))


def test_a_reduced_model_is_refused(dense: Any, images: torch.Tensor) -> None:
    model = effvit.sparsify(timm.create_model("deit_tiny_patch16_224", img_size=64), "tome")
    with pytest.raises(ValueError, match="the model is reduced by tome already, so that there is no dense model"):
        tune(model, images, speedup=1.3)


@pytest.mark.parametrize("host", ["tome_deit_tiny_patch16_224", "evit_deit_tiny_patch16_224"])
def test_command_refuses_a_reduced_name(host: str, grey: Path, capsys: Any) -> None:
    assert main(["tune", host, str(grey), "--speedup", "1.5"]) == 2
    said = capsys.readouterr().err
    assert "is reduced by" in said
    assert "give its host, deit_tiny_patch16_224" in said


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    Image.new("RGB", (40, 40), (90, 90, 90)).save(path)
    return path


COMMAND = ["--speedup", "1.2", "--methods", "tome", "evit", "--threads", "1", "--moves", "4", "--rounds", "1"]
SMALL = ["--img-size", "96"]
COMMAND += ["--final-rounds", "2", "--batch-size", "1"]


@pytest.mark.usefixtures("speed_of_macs")
class TestCommand:
    @pytest.mark.parametrize(
        ("host", "size"), [("deit_tiny_patch16_224", []), ("deit_tiny_patch16_224", ["--img-size", "96"])]
    )
    def test_both_lines_make_the_model_that_was_chosen(
        self, host: str, size: list[str], grey: Path, tmp_path: Path, capsys: Any
    ) -> None:
        path = tmp_path / "tuned.json"
        assert main(["tune", host, str(grey), *COMMAND, *size, "--json", str(path)]) == 0
        out = capsys.readouterr().out
        python, named = (line for line in out.splitlines() if "create_model(" in line)
        assert python.startswith("effvit.sparsify(timm.create_model(")
        assert named.startswith("timm.create_model(")
        models = []
        for line in (python, named):
            torch.manual_seed(0)
            models.append(eval(line, {"timm": timm, "effvit": effvit}).eval())
        best = json.loads(path.read_text())["best"]
        side = int(size[1]) if size else 224
        x = torch.randn(1, 3, side, side)
        assert models[0].method == models[1].method == best["method"]
        assert models[0].settings == models[1].settings
        assert torch.equal(models[0](x), models[1](x))
        assert json.loads(path.read_text())["python"] == [python, named]

    def test_a_host_without_names_gets_the_python_line_alone(self, capsys: Any) -> None:
        command = ["tune", "vit_nano_patch4_28", "fashion_mnist:sneaker-0", "--pretrained", *COMMAND]
        assert main([*command, "--methods", "zero_tprune"]) == 0
        out = capsys.readouterr().out
        assert '(timm.create_model("vit_nano_patch4_28", pretrained=True), "zero_tprune", keep_rate=' in out
        assert "# zero_tprune on vit_nano_patch4_28 has no name of its own in timm" in out

    def test_every_setting_is_a_line_without_a_terminal(self, grey: Path, capsys: Any) -> None:
        assert main(["tune", "deit_tiny_patch16_224", str(grey), *COMMAND, *SMALL]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert "1 settings: evit keep_rate=" in "\n".join(lines) or "1 settings: tome r=" in "\n".join(lines)
        assert all(" settings: " in line for line in lines)

    def test_a_long_silence_is_broken(self, grey: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        now = itertools.count(step=11.0)
        monkeypatch.setattr("effvit.cli.output.monotonic", lambda: next(now))
        assert main(["tune", "deit_tiny_patch16_224", str(grey), *COMMAND, *SMALL]) == 0
        said = capsys.readouterr().err
        assert "settings: measuring" in said
        assert "settings: comparing schedules" in said

    def test_ctrl_c_leaves_a_file_to_go_on_from(
        self, grey: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "tuned.json"
        command = ["tune", "deit_tiny_patch16_224", str(grey), *COMMAND, *SMALL]
        exact, calls = effvit.measure.tune.profile_models, itertools.count()

        def stopped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return exact(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("effvit.measure.tune.profile_models", stopped)
            assert main([*command, "--json", str(path)]) == 130
        said = capsys.readouterr().err
        assert f"settings are in {path}; the same command with --resume {path} goes on from there" in said
        kept = read_tuning(path)
        assert kept.best is None
        assert kept.tried
        assert main([*command, "--resume", str(path)]) == 0
        assert read_tuning(path).best is not None
        assert len(read_tuning(path).tried) > len(kept.tried)
        assert [found.name for found in tmp_path.iterdir() if "tuned" in found.name] == ["tuned.json"]
        assert main([*command, "--resume", str(path), "--batch-size", "2"]) == 2
        assert "was made with batch_size 1, now it is 2" in capsys.readouterr().err

    def test_ctrl_c_without_a_file_says_that_nothing_is_kept(
        self, grey: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stopped(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr("effvit.measure.tune.profile_models", stopped)
        command = ["tune", "deit_tiny_patch16_224", str(grey), *COMMAND, *SMALL]
        assert main(command) == 130
        assert "nothing of the search is kept; with --json FILE it would go on" in capsys.readouterr().err
        assert main([*command, "--json", str(tmp_path / "t.json")]) == 130
        assert "no setting was measured yet" in capsys.readouterr().err

    def test_report_shows_the_search(self, grey: Path, tmp_path: Path) -> None:
        path, page = tmp_path / "tuned.json", tmp_path / "report.html"
        assert main(["tune", "deit_tiny_patch16_224", str(grey), *COMMAND, *SMALL, "--json", str(path)]) == 0
        assert main(["report", str(path), "--out", str(page)]) == 0
        assert '"kind":"tune"' in page.read_text(encoding="utf-8")


def test_a_file_from_before_resume_is_refused_with_both_values(dense: Any, images: torch.Tensor) -> None:
    """What fingerprints it lacks cannot be compared."""
    conditions = TuningConditions(8, SIZE, {"images": 2, "rounds": 8}, torch.get_num_threads(), "cpu", "float32")
    old = Tuning(machine("cpu"), conditions, {"speedup": 1.5}, None, [], [])
    with pytest.raises(ValueError, match=r"was made with weights None, now it is '\w{16}'"):
        tune(dense, images, speedup=1.3, methods=["tome"], before=old)


@pytest.mark.usefixtures("slow_methods")
def test_a_search_that_names_none_is_written_and_said(grey: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "tuned.json"
    assert main(["tune", "deit_tiny_patch16_224", str(grey), *COMMAND, *SMALL, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "none is named: no setting was measured faster than the dense model" in out
    assert "create_model" not in out
    assert json.loads(path.read_text())["best"] is None


@pytest.mark.usefixtures("speed_of_macs")
class TestData:
    """Sets of labelled images, as ``effvit evaluate`` reads them."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_folders(tmp_path / "val")

    def test_a_set_is_chosen_by_its_loss_and_the_file_says_so(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        """Classes 0, 1 and 217 of ImageNet, prepared as evaluate prepares them."""
        path, page = tmp_path / "tuned.json", tmp_path / "report.html"
        command = ["tune", "deit_tiny_patch16_224", "--data", str(folder), "--limit", "3", *COMMAND, *SMALL]
        assert main([*command, "--json", str(path)]) == 0
        found = read_tuning(path)
        assert found.measure == "loss"
        assert found.conditions.options["data"] == f"{folder}, 3 images of 6"
        assert found.dense is not None
        assert found.dense.images == found.conditions.options["images"] == 3
        assert found.free is not None
        out = capsys.readouterr().out
        assert "chosen by cross-entropy loss on labelled images, on " in out
        assert "; the dense model has a loss of " in out
        assert "The choice beside what needs no search" in out
        assert main(["report", str(path), "--out", str(page)]) == 0
        shown = page.read_text(encoding="utf-8")
        assert '"measure":"loss"' in shown
        assert "than patches dropped at random to its token counts" in shown

    def test_images_and_labels_are_those_of_evaluate(self, folder: Path) -> None:
        model = timm.create_model("deit_tiny_patch16_224", img_size=96).eval()
        selection = Selection.of(open_labelled(folder))
        images, labels = load_labelled(model, selection, "deit")
        assert labels.tolist() == [0, 0, 1, 1, 217, 217]
        transform = image_transform(model)
        assert torch.equal(images, torch.stack([transform(selection.images.read(index)) for index in range(6)]))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--data", "{folder}", "{folder}/a.png"], "or by the outputs on IMAGEs, got both .*leave out one of them"),
            (["--limit", "2"], "--limit takes some images of a labelled set; name one with --data"),
            ([], "name IMAGEs to compare outputs on, or a labelled set with --data"),
            (["--data", "{folder}", "--limit", "7"], "has 6 images, cannot take 7 of them; ask for 1 to 6"),
            (["--data", "{folder}/none"], "there is no folder or file .*none; labelled images are a folder with"),
        ],
    )
    def test_what_does_not_go_together_is_refused(
        self, given: list[str], message: str, folder: Path, capsys: Any
    ) -> None:
        options = [text.format(folder=folder) for text in given]
        assert main(["tune", "deit_tiny_patch16_224", *options, *COMMAND]) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_classes_of_another_model_are_refused_as_evaluate_refuses_them(self, tmp_path: Path, capsys: Any) -> None:
        folder = write_folders(tmp_path / "pets", ("cat", "dog"), each=1)
        said = []
        for command in (["tune", *COMMAND], ["evaluate"]):
            assert main([*command, "deit_tiny_patch16_224", "--data", str(folder)]) == 2
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert said[0] == said[1]
        assert "has 2 classes (cat, dog), but deit_tiny_patch16_224 has 1000" in said[0]

    def test_images_may_stand_behind_options(self, grey: Path) -> None:
        assert main(["tune", "deit_tiny_patch16_224", *COMMAND, *SMALL, str(grey)]) == 0
