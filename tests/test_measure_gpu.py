"""What wants a GPU, tried on a CPU: the plan and its time, what is measured and written, kernels for packed batches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from time import monotonic, sleep
from types import ModuleType

import pytest
import torch
from gpu_steps import Bench, time_beside
from hosts import packed_map
from scripts import load_tool
from torch import Tensor, nn

import effvit
from effvit import attention
from effvit.measure.packed_kernels import KERNELS, WithKernel, packed_attention, reason_against, tiles_of_images
from effvit.measure.records import read_records
from effvit.reducers import METHODS
from effvit.tokens import TokenMap

nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("measure_gpu")


@pytest.fixture(scope="module")
def out(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dry run."""
    folder = tmp_path_factory.mktemp("gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of nested tensors and while its compiler is imported
        assert tool.main(["--dry-run", "--minutes", "30", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def steps(out: Path) -> dict[str, dict]:
    """Name -> what the step of the dry run found."""
    return {step["name"]: step for step in json.loads((out / "steps.json").read_text())["steps"]}


class TestDryRun:
    def test_a_step_of_each_kind_is_tried(self, tool: ModuleType, out: Path, steps: dict[str, dict]) -> None:
        kinds = {step.name: step.kind for step in tool.plan()}
        assert sorted(kinds[name] for name in steps) == sorted(set(kinds.values()))
        assert json.loads((out / "steps.json").read_text())["left"] == {}

    def test_only_cuda_graphs_fail_and_say_why(self, steps: dict[str, dict]) -> None:
        failed = {name: step["error"] for name, step in steps.items() if "error" in step}
        assert {name.rpartition(", ")[2] for name in failed} == {"CUDA graphs"}, failed
        assert set(failed.values()) == {"ValueError: CUDA graphs need a CUDA device, got 'cpu'"}

    def test_every_method_is_measured_beside_its_ideal(self, steps: dict[str, dict]) -> None:
        for mode in ("eager", "compiled"):
            step = steps[f"DeiT-S 224, batch 128, {mode}"]
            dense, *models = step["record"]["models"]
            assert [model["name"] for model in models] == list(effvit.list_methods())
            assert not step["left_out"]
            for model in models:
                assert model["efficiency"] == pytest.approx(model["ideal_speedup"] ** -1 * model["speedup"])
                assert model["tokens"][-1] < dense["tokens"][-1]
                assert model["peak_memory"] > 0
            assert step["record"]["conditions"]["compile"] is (mode == "compiled")
            assert step["record"]["conditions"]["dtype"] == "bfloat16"

    def test_kernels_are_counted_where_nothing_is_compiled(self, steps: dict[str, dict]) -> None:
        eager = steps["DeiT-S 224, batch 128, eager"]["kernels"]
        assert all(counts["launches"] > eager["dense"]["launches"] for name, counts in eager.items() if name in METHODS)
        assert steps["DeiT-S 224, batch 128, compiled"]["kernels"]["dense"] == {"device": None}  # no GPU here
        assert set(steps["kernels executed, DeiT-S 224, batch 128"]["kernels"]) == {"dense", *METHODS}

    def test_rotary_hosts_have_ideals_too(self, steps: dict[str, dict]) -> None:
        dense, *models = steps["DINOv3-L 1024, batch 8, eager"]["record"]["models"]
        assert dense["efficiency"] is None
        assert all(model["efficiency"] > 0 for model in models)

    def test_packed_batches_give_the_scores_of_the_padded_one(self, steps: dict[str, dict]) -> None:
        step = steps["padded against packed, DeiT-S 224, batch 128"]
        assert step["kernels"] == ["flex", "jagged"]
        assert step["left_out"].keys() == {"varlen"}
        for method in ("ats", "dymu"):
            differences = step["methods"][method]["differences"]
            assert differences.keys() == {"packed flex", "packed jagged"}
            assert max(differences.values()) < 0.05  # bfloat16

    def test_the_training_tells_of_every_method(self, steps: dict[str, dict]) -> None:
        step = steps["training of vit_nano"]
        assert step["models"].keys() == {"dense", *effvit.list_methods()}
        assert not step["left_out"]

    def test_records_are_such_as_the_report_reads(self, out: Path, steps: dict[str, dict]) -> None:
        assert len(read_records(out / "profiles.json")) == sum("record" in step for step in steps.values())


class TestTime:
    @staticmethod
    def run(tool: ModuleType, steps: list[tuple], out: Path, seconds: float = 60.0) -> dict:
        bench = Bench(torch.device("cpu"), torch.float32, True, monotonic() + seconds)
        tool.run_steps([tool.Step(*step) for step in steps], bench, out, lambda line: None)
        return json.loads((out / "steps.json").read_text())

    def test_an_error_is_recorded_and_the_next_step_runs(self, tool: ModuleType, tmp_path: Path) -> None:
        def fail(bench: Bench) -> dict:
            raise RuntimeError("no\nmemory")

        steps = [("first", "a", 1.0, fail), ("second", "b", 1.0, lambda bench: {"found": 1})]
        first, second = self.run(tool, steps, tmp_path)["steps"]
        assert first["error"] == "RuntimeError: no memory"
        assert second["found"] == 1

    def test_what_is_not_finite_is_an_error_of_its_step(self, tool: ModuleType, tmp_path: Path) -> None:
        step = ("first", "a", 1.0, lambda bench: {"found": float("nan")})
        assert "not JSON compliant" in self.run(tool, [step], tmp_path)["steps"][0]["error"]

    def test_a_step_without_half_its_time_is_left_and_a_shorter_one_runs(
        self, tool: ModuleType, tmp_path: Path
    ) -> None:
        steps = [("long", "a", 1000.0, lambda bench: {}), ("short", "b", 1.0, lambda bench: {})]
        found = self.run(tool, steps, tmp_path)
        assert [step["name"] for step in found["steps"]] == ["short"]
        assert found["left"].keys() == {"long"}
        assert found["left"]["long"].endswith("s were left, and it takes about 1000")

    def test_a_step_ends_with_the_time(self, tool: ModuleType, tmp_path: Path) -> None:
        def wait(bench: Bench) -> dict:
            while True:
                bench.check()

        found = self.run(tool, [("first", "a", 0.4, wait)], tmp_path, seconds=0.3)
        assert found["left"] == {"first": "the time ended in it"}
        assert found["steps"] == []

    def test_the_file_is_whole_after_each_step(self, tool: ModuleType, tmp_path: Path) -> None:
        seen = []

        def look(bench: Bench) -> dict:
            seen.append(json.loads((tmp_path / "steps.json").read_text()))
            return {}

        self.run(tool, [(name, name, 1.0, look) for name in ("first", "second")], tmp_path)
        assert [[step["name"] for step in state["steps"]] for state in seen] == [[], ["first"]]
        assert [list(state["left"]) for state in seen] == [["first", "second"], ["second"]]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["profiles.json", "steps.json"]


class TestOneModelOfMany:
    """What one model meets does not end the step of the others."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    @pytest.fixture
    def bench(self) -> Bench:
        return Bench(torch.device("cpu"), torch.float32, True, monotonic() + 60, (1, 1), 60.0)

    def test_one_that_fails_is_left_out(self, bench: Bench) -> None:
        models = {"dense": nn.Identity(), "failing": self.Failing(), "other": nn.Identity()}
        timed = time_beside(bench, models, torch.zeros(1, 3, 4, 4), "eager", {})
        assert list(timed.speeds) == ["dense", "other"]
        assert timed.left_out == {"failing": "RuntimeError: out of memory"}

    def test_a_baseline_that_fails_is_an_error(self, bench: Bench) -> None:
        with pytest.raises(ValueError, match="the baseline dense fails: RuntimeError: out of memory"):
            time_beside(bench, {"dense": self.Failing()}, torch.zeros(1, 3, 4, 4), "eager", {})

    def test_one_whose_turn_comes_late_is_left_out(self, bench: Bench) -> None:
        class Slow(nn.Identity):
            def forward(self, x: Tensor) -> Tensor:
                sleep(0.03)
                return x

        bench.seconds = 0.2
        models = {"dense": Slow(), "other": Slow(), "late": Slow()}
        timed = time_beside(bench, models, torch.zeros(1, 3, 4, 4), "eager", {})
        assert timed.left_out["late"].startswith("its turn came after")

    def test_one_whose_batch_takes_too_long_is_left_out(self, bench: Bench) -> None:
        class Slow(nn.Identity):
            def forward(self, x: Tensor) -> Tensor:
                sleep(0.1)
                return x

        bench.seconds = 0.4
        models = {"dense": nn.Identity(), "slow": Slow()}
        timed = time_beside(bench, models, torch.zeros(1, 3, 4, 4), "eager", {})
        assert "more than the 0.08 s that can be repeated" in timed.left_out["slow"]


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_machine_without_cuda_is_refused(
        self, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tool.main(["--out", str(tmp_path)]) == 2
        assert "torch finds no CUDA device here; --dry-run tries the steps on a CPU" in capsys.readouterr().err

    def test_an_unknown_step_is_refused(
        self, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tool.main(["--dry-run", "--only", "DeiT-H", "--out", str(tmp_path)]) == 2
        assert "no step has 'DeiT-H' in its name" in capsys.readouterr().err

    def test_the_most_wanted_come_first_and_none_comes_twice(self, tool: ModuleType) -> None:
        names = [step.name for step in tool.plan()]
        assert names[:4] == [
            f"DeiT-S 224, batch {batch}, {mode}" for batch in (128, 1) for mode in ("eager", "CUDA graphs")
        ]
        assert len(set(names)) == len(names)
        for host in ("DeiT-S", "ViT-B", "ViT-L", "DINOv3-L"):
            for mode in ("eager", "CUDA graphs", "compiled"):
                assert {f"{host} 224, batch {batch}, {mode}" for batch in (1, 32, 128)} <= set(names)
                assert f"{host} 1024, batch 8, {mode}" in names


class TestPackedKernels:
    LENGTHS = (((3, 4), (5, 3)), ((200, 1, 130), (250, 40, 130)))

    @staticmethod
    def batch(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, TokenMap, TokenMap]:
        q, k, v = (torch.randn(1, 2, sum(n), 16) for n in (queries, keys, keys))
        return q, k, v, packed_map(*queries), packed_map(*keys)

    @nested
    @pytest.mark.parametrize("kernel", ["flex", "jagged"])
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize(("queries", "keys"), LENGTHS)
    def test_a_kernel_agrees_with_one_call_an_image(
        self, kernel: str, biased: bool, queries: tuple[int, ...], keys: tuple[int, ...]
    ) -> None:
        batch = self.batch(queries, keys)
        bias = torch.randint(1, 9, (1, sum(keys))).float().log() if biased else None
        expected = attention.variable_length_attention(*batch, 0.0, bias)
        assert torch.allclose(packed_attention(*batch, 0.0, bias, kernel=kernel), expected, atol=1e-6)

    def test_tiles_are_those_that_a_mask_of_all_pairs_touches(self) -> None:
        queries, keys = (200, 1, 300, 130), (250, 40, 300, 130)
        of_query, of_key = (torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in (queries, keys))
        mask = of_query.unsqueeze(1) == of_key
        ends = torch.tensor([0, *keys]).cumsum(0)
        number, tiles = tiles_of_images(of_query, ends, len(of_key))
        for row, (count, order) in enumerate(zip(number.tolist(), tiles.tolist(), strict=True)):
            part = mask[128 * row : 128 * (row + 1)]
            touched = [tile for tile in range(len(order)) if part[:, 128 * tile : 128 * (tile + 1)].any()]
            assert order[:count] == touched
            assert sorted(order) == list(range(len(order)))

    @nested
    def test_the_first_that_can_run_is_taken(self) -> None:
        usable = [name for name in KERNELS if reason_against(name, torch.device("cpu"), torch.float32) is None]
        batch = self.batch(*self.LENGTHS[0])
        assert torch.equal(packed_attention(*batch, 0.0), packed_attention(*batch, 0.0, kernel=usable[0]))

    def test_one_that_cannot_run_is_refused(self) -> None:
        batch = self.batch(*self.LENGTHS[0])
        with pytest.raises(ValueError, match=r"the kernel 'varlen' cannot run here: .*; take 'jagged'"):
            packed_attention(*batch, 0.0, kernel="varlen")
        with pytest.raises(ValueError, match=r"compared without dropout, got 0\.1"):
            packed_attention(*batch, 0.1, kernel="jagged")

    def test_a_model_takes_its_kernel_and_leaves_the_package_as_it_was(self) -> None:
        before = attention.variable_length_attention

        class Looking(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                assert attention.variable_length_attention.keywords == {"kernel": "flex"}
                raise RuntimeError

        with pytest.raises(RuntimeError):
            WithKernel(Looking(), "flex")(torch.zeros(1))
        assert attention.variable_length_attention is before
