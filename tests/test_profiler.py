"""The interleaved measurement: structure and statistics only; no test depends on how fast the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit.measure import profiler
from effvit.measure.profiler import (
    Measurement,
    graphed,
    measurement,
    median_interval,
    peak_memory,
    prepared,
    profile_models,
    resolved,
    still_faster,
)

SIZE = (3, 64, 64)
PAGE = Path(__file__).resolve().parents[1] / "docs/profile.md"


class Recorder(nn.Module):
    """Notes what it is called with; deepcopy keeps the list, which all copies share."""

    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls
        self.weight = nn.Parameter(torch.zeros(1))

    def __deepcopy__(self, memo):
        return Recorder(self.calls)

    def forward(self, x):
        self.calls.append((x.clone(), torch.get_num_threads(), self.training, torch.is_grad_enabled()))
        return x.sum()


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=10)


@pytest.fixture(autouse=True)
def _fixed_warm_up(request, monkeypatch):
    """Models that take microseconds would be warmed up for a number of rounds that no test can know."""
    if "warm_up" not in request.node.name:
        monkeypatch.setattr("effvit.measure.profiler.still_faster", lambda _: False)


def test_every_model_runs_once_in_every_round():
    runs: list[str] = []
    models = {name: Recorder([]) for name in "abc"}
    results = profile_models(models, SIZE, 2, rounds=5, warmup=2, on_run=runs.append)
    assert [result.name for result in results] == ["a", "b", "c"]
    assert all(len(result.seconds) == 5 for result in results)
    assert all(len(model.calls) == 1 + 7 for model in models.values())
    turns = [runs[i : i + 3] for i in range(0, 21, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1  # shuffled


def test_order_is_the_same_for_the_same_seed():
    orders = []
    for _ in range(2):
        orders.append([])
        profile_models({name: Recorder([]) for name in "abcd"}, SIZE, 1, rounds=3, on_run=orders[-1].append)
    assert orders[0] == orders[1]


def test_models_run_in_eval_mode_without_gradients_on_the_asked_threads():
    calls: list = []
    before = torch.get_num_threads()
    profile_models({"a": Recorder(calls).train()}, SIZE, 2, rounds=1, threads=1)
    assert all(call[1:] == (1, False, False) for call in calls)
    assert torch.get_num_threads() == before


def test_given_images_fill_the_batch_in_turn():
    calls: list = []
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, *SIZE)
    profile_models({"a": Recorder(calls)}, SIZE, 5, rounds=1, warmup=0, images=images)
    assert calls[0][0][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1]


def test_models_keep_mode_and_dtype():
    model = tiny_vit().train()
    profile_models({"a": model, "b": effvit.sparsify(model, "tome", r=2)}, SIZE, 1, rounds=1, dtype=torch.float64)
    assert model.training
    assert next(model.parameters()).dtype == torch.float32


def test_baseline_has_speedup_one():
    first, _ = profile_models({"a": Recorder([]), "b": Recorder([])}, SIZE, 1, rounds=4)
    assert first.speedup == 1
    assert first.interval == (1, 1)


def test_speedup_is_the_median_of_the_ratios_within_rounds():
    # A drift that both models share cancels; the medians of the durations alone would give 1.5.
    seconds, baseline = np.array([1.0, 4.0, 2.0]), np.array([2.0, 8.0, 3.0])
    result = measurement("x", seconds, baseline, batch_size=8)
    assert result == Measurement("x", 8 / 2.0, 2.0, result.interval, result.latency, 0, (1.0, 4.0, 2.0))
    assert 1.5 <= result.interval[0] <= 2 <= result.interval[1] <= 2


def test_latency_is_given_in_percentiles_of_a_batch():
    seconds = np.random.default_rng(0).permutation(np.arange(1.0, 102.0))
    assert measurement("x", seconds, seconds, 1).latency == pytest.approx({"p10": 11, "p50": 51, "p90": 91, "p99": 100})


def test_interval_narrows_like_the_error_of_a_median():
    # Closed form: the standard error of the median of n normal values is sqrt(pi / 2n).
    values = np.random.default_rng(1).normal(10, 1, 400)
    low, high = median_interval(values)
    assert low < np.median(values) < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(np.pi / 800), rel=0.35)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_counts_below_one_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        profile_models({"a": Recorder([])}, SIZE, **{"batch_size": 1, **settings})


def test_no_model_is_refused():
    with pytest.raises(ValueError, match="there is no model to profile"):
        profile_models({}, SIZE, 1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "xpu", "hpu", "hip"])
def test_device_that_is_not_there_is_named(device):
    """Each backend of torch fails in its own way: RuntimeError, NotImplementedError, AssertionError, ImportError."""
    backend = device.partition(":")[0].upper()
    message = f"device '{device}' asks for {backend}, but torch finds none here; use 'cpu'"
    with pytest.raises(ValueError, match=message):
        profile_models({"a": Recorder([])}, SIZE, 1, device=device)


def test_device_without_values_is_refused():
    with pytest.raises(ValueError, match="device 'meta' asks for META, which computes nothing that could be measured"):
        profile_models({"a": Recorder([])}, SIZE, 1, device="meta")


def test_rounds_go_on_until_intervals_are_narrow_enough():
    steady = {"a": [1.0] * 9, "b": [2.0] * 9}
    assert resolved(steady, 0.02)
    assert not resolved({"a": [1.0, 2.0] * 5, "b": [2.0, 1.0] * 5}, 0.02)
    results = profile_models({n: Recorder([]) for n in "ab"}, SIZE, 1, rounds=2, precision=1e-9, max_rounds=6)
    assert [len(result.seconds) for result in results] == [6, 6]
    results = profile_models({n: Recorder([]) for n in "ab"}, SIZE, 1, rounds=2, precision=1e9)
    assert [len(result.seconds) for result in results] == [2, 2]


def test_warm_up_goes_on_while_a_model_gets_faster():
    assert still_faster([1.0])
    assert still_faster([2.0, 1.0])
    assert not still_faster([1.0, 2.0])
    assert not still_faster([1.0, 0.99])


class TwoAlive(nn.Module):
    """At most x + 1 and its double are alive at once, then only the sum."""

    def forward(self, x):
        y = x + 1
        z = y * 2
        del y
        return z.sum()


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    x = torch.zeros(2, 3, 8, 8)
    assert peak_memory(TwoAlive(), x) == 2 * x.nbytes
    assert peak_memory(nn.Identity(), x) == 0
    assert peak_memory(nn.Flatten(), x) == 0  # a view


def test_peak_memory_falls_with_the_tokens():
    model = tiny_vit()
    dense, half = profile_models({"a": model, "b": effvit.sparsify(model, "tome", r=4)}, SIZE, 2, rounds=1)
    assert dense.peak_memory > half.peak_memory > 0


def test_a_model_that_no_graph_can_hold_gives_the_stream_back(monkeypatch):
    """As on a device: what fails is the end of the capture, and torch then leaves its stream in place."""
    now = ["default"]

    class Capture(AbstractContextManager):
        def __init__(self, graph):
            now.append("capture")

        def __exit__(self, *error):
            raise RuntimeError("operation not permitted\nwhen capturing")

    before = MagicMock()
    for name, fake in {
        "Stream": MagicMock(),
        "CUDAGraph": MagicMock(),
        "current_stream": lambda device: before,
        "stream": lambda stream: nullcontext(),
        "graph": Capture,
        "set_stream": now.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(ValueError, match=r"ats cannot be captured as a CUDA graph \(operation not permitted\)"):
        graphed("ats", nn.Identity(), torch.zeros(1))
    assert now == ["default", "capture", before]


def test_many_models_of_one_class_are_all_compiled(monkeypatch):
    """Dynamo keeps eight compiled forms of a function by default, and runs what comes then as it is."""
    graphs = []
    compiler = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiler(model, dynamic=dynamic, backend=backend))
    batch = torch.zeros(1, 4)
    with torch._dynamo.config.patch(recompile_limit=8):
        for width in range(1, 11):
            prepared("model", nn.Linear(4, width), batch, compile=True, cuda_graphs=False)(batch)
    assert len(graphs) == 10


def test_compiled_models_are_measured(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(model) or model)
    profile_models({"a": Recorder([])}, SIZE, 1, rounds=1, compile=True)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": 0.0}, "precision must be above 0, a share of the speed-up such as 0.02, got 0.0"),
        ({"cuda_graphs": True}, "cuda_graphs needs a CUDA device, got 'cpu'"),
    ],
)
def test_options_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        profile_models({"a": Recorder([])}, SIZE, 1, **settings)


KEEPING = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}  # docs/profile.md


@pytest.mark.parametrize("environment", [{}, KEEPING])
def test_memory_freed_in_one_run_serves_the_next(environment):
    """By the call or by the variables that docs/profile.md names, and not by glibc's defaults."""
    count = f"""
import resource, torch
from effvit.measure.profiler import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(32 << 20)  # 128 MiB, above any threshold glibc has by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory() if {not environment} else True
print(kept, *[faults() for _ in range(5)])
"""
    variables = os.environ | environment
    run = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True, env=variables)
    kept, *counts = run.stdout.split()
    glibc = platform.libc_ver()[0] == "glibc"
    assert environment or kept == str(glibc)
    assert int(counts[0]) > 1000
    if glibc:
        assert int(counts[-1]) < 50
        assert " ".join(f"{name}={value}" for name, value in KEEPING.items()) in PAGE.read_text()


def test_profiles_keep_freed_memory_unless_told_not_to(monkeypatch):
    calls = []
    monkeypatch.setattr(profiler, "keep_freed_memory", lambda: calls.append(None))
    for keep in (True, False):
        profile_models({"a": Recorder([])}, SIZE, 1, rounds=1, keep_memory=keep)
    assert len(calls) == 1
