"""Speed of models beside each other.

Speed on a shared machine drifts by more than the methods differ, so models are measured interleaved: each round runs
every model once, in a new random order, and a speed-up is the median of the ratios within the rounds.
"""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np
import timm
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effvit
from effvit.protocols import Json, views_of

__all__ = [
    "Measurement",
    "Options",
    "ProfileOptions",
    "fill_batch",
    "interleaved",
    "keep_freed_memory",
    "machine",
    "median_interval",
    "median_ratio",
    "noise",
    "present_device",
    "profile_models",
    "setup_of",
    "shared_views",
]

SEED = 0
RESAMPLES = 2000
MAX_WARMUP = 10
PERCENTILES = (10, 50, 90, 99)
COMPILED_FORMS = 64  # of one function that are kept
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h

Run: TypeAlias = Callable[[Tensor], object]
Times: TypeAlias = NDArray[np.float64]
"""Seconds of one batch in every round."""


class Options(TypedDict, total=False):
    """Keywords of ``profile_models`` that say how to measure, whatever the number of rounds."""

    warmup: int
    precision: float | None
    max_rounds: int
    threads: int | None
    device: str | torch.device
    dtype: torch.dtype
    compile: bool
    cuda_graphs: bool
    keep_memory: bool


class Setup(TypedDict):
    """What models run on, as files of results name it."""

    threads: int
    device: str
    dtype: str


def setup_of(options: Options) -> Setup:
    """What ``profile_models`` runs on with these options, defaults filled in."""
    return {
        "threads": options.get("threads") or torch.get_num_threads(),
        "device": str(torch.device(options.get("device", "cpu"))),
        "dtype": str(options.get("dtype", torch.float32)).removeprefix("torch."),
    }


class ProfileOptions(Options, total=False):
    """Those, and the rounds."""

    rounds: int


@dataclass(frozen=True)
class Measurement:
    """Speed of one model.

    Attributes:
        name: Name of the model.
        images_per_second: Of the round of median duration.
        speedup: Over the first model, median of the ratios within the rounds.
        interval: Bootstrap 95 % interval of ``speedup``.
        latency: Percentile ("p10", "p50", "p90", "p99") -> seconds of one batch.
        peak_memory: Peak bytes of live tensors in a forward pass, excluding weights and input; on CUDA, peak bytes
            allocated, workspaces included.
        seconds: Duration of one batch in every round.
    """

    name: str
    images_per_second: float
    speedup: float
    interval: tuple[float, float]
    latency: dict[str, float]
    peak_memory: int
    seconds: tuple[float, ...]


def noise(input_size: tuple[int, int, int], batch_size: int) -> Tensor:
    """Seeded images (batch_size, channels, H, W) of standard normal noise."""
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(SEED))


def median_interval(values: Times, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median of ``values`` (percentile method, seeded)."""
    rng = np.random.default_rng(SEED)
    medians: Times = np.median(rng.choice(values, (resamples, len(values))), axis=1)
    low, high = (float(np.percentile(medians, share)) for share in (2.5, 97.5))
    return low, high


def median_ratio(durations: ArrayLike, others: ArrayLike) -> tuple[float, tuple[float, float]]:
    """Median of the ratios of two models' durations within the rounds, and its bootstrap 95 % interval."""
    ratios: Times = np.asarray(durations, np.float64) / np.asarray(others, np.float64)
    return float(np.median(ratios)), median_interval(ratios)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for its next use, for the rest of the process.

    By its defaults it returns large blocks to the system, and the next run pays for fresh pages; how many depends on
    what else ran in the process.

    Returns:
        False where the C library is another one, or an allocator put before it takes no such options.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    return bool(set_option(TRIM_THRESHOLD, -1) and set_option(MMAP_MAX, 0))


def fill_batch(images: Tensor, batch_size: int) -> Tensor:
    """``batch_size`` images (batch_size, channels, H, W): those given in turn."""
    return images[torch.arange(batch_size) % len(images)]


def present_device(device: str | torch.device) -> torch.device:
    """The device, once a tensor was made there.

    Raises:
        ValueError: A device that this machine or this build of torch has not, or one that holds no values.
        RuntimeError: A name that torch does not know.
    """
    device = torch.device(device)
    asked = f"device {str(device)!r} asks for {device.type.upper()}"
    if device.type == "meta":
        raise ValueError(f"{asked}, which computes nothing that could be measured; use 'cpu'")
    try:
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # each backend says it in its own way
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        found = (
            "none here" if there is None or there.type != device.type else f"{torch.accelerator.device_count()} here"
        )
        known = "'cpu'" if there is None else f"'cpu' or '{there.type}'"
        raise ValueError(f"{asked}, but torch finds {found}; use {known}") from error
    return device


def profile_models(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_size: int,
    *,
    rounds: int = 10,
    warmup: int = 2,
    precision: float | None = None,
    max_rounds: int = 200,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    cuda_graphs: bool = False,
    keep_memory: bool = True,
    images: Tensor | None = None,
    on_run: Callable[[str], None] | None = None,
    is_enough: Callable[[], bool] = lambda: False,
) -> list[Measurement]:
    """Interleaved inference speed of several models on one batch; the first is the baseline.

    The models are copied, once and with what they share, so the given ones keep their device, dtype and mode. Time is
    wall-clock time from an idle device to the result; on CUDA, it is measured with events. Where models take several
    images as one (``CropSelector``, ``VideoSelector``), a batch is one such group, and "image" means all of it.

    Args:
        models: Name -> model.
        input_size: (channels, H, W) of an image.
        batch_size: Images in the batch.
        rounds: Measured rounds; each runs every model once, in shuffled order.
        warmup: Rounds before them that are not measured, at least; there are more, up to ``MAX_WARMUP``, as long as a
            model still gets faster.
        precision: Go on after ``rounds`` until the 95 % interval of every speed-up is narrower than this, as a share
            of the speed-up.
        max_rounds: Limit for that.
        threads: CPU threads during the measurement; None leaves the setting of torch.
        device: Where to run.
        dtype: Of parameters and images.
        compile: Run every model through ``effvit.compile``; with ``cuda_graphs`` through ``torch.compile``.
        cuda_graphs: Replay every model as a CUDA graph, which leaves out the time the CPU takes to launch kernels.
        keep_memory: On a CPU, let the process keep freed memory from then on (``keep_freed_memory``).
        images: (B, channels, H, W) to measure on, repeated to fill the batch; None means seeded noise.
        on_run: Called with the model's name after each run.
        is_enough: Asked after each round; True ends the measurement with the rounds there are, one at least.

    Returns:
        A Measurement of each model, in the order of ``models``.

    Raises:
        ValueError: No model, or a count below 1; a device as of ``present_device``; CUDA graphs on another device, or
            of a model that waits for the device to know its token counts; models that take different numbers of images
            as one, or a batch of several such groups.
    """
    views = shared_views(models)
    if views > 1 and batch_size != 1:
        raise ValueError(
            f"models that take {views} images as one, crops or frames, take one such group at a time, got "
            f"batch_size={batch_size}; give 1"
        )
    for name, value in (("batch_size", batch_size), ("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if precision is not None and not precision > 0:
        raise ValueError(f"precision must be above 0, a share of the speed-up such as 0.02, got {precision}")
    device = present_device(device)
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, got {str(device)!r}")
    if images is None:
        images = noise(input_size, views * batch_size)
    batch = fill_batch(images, views * batch_size).to(device, dtype)
    twins = {name: twin.to(device, dtype).eval() for name, twin in copy.deepcopy(dict(models)).items()}

    if device.type == "cpu" and keep_memory:
        keep_freed_memory()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        memory = {name: peak_memory(twin, batch) for name, twin in twins.items()}
        runs = {name: prepared(name, twin, batch, compile, cuda_graphs) for name, twin in twins.items()}
        seconds = interleaved(runs, batch, rounds, warmup, precision, max_rounds, on_run, is_enough)
    finally:
        torch.set_num_threads(threads_before)
    baseline: Times = np.array(next(iter(seconds.values())))
    return [measurement(name, np.array(own), baseline, batch_size, memory[name]) for name, own in seconds.items()]


def shared_views(models: Mapping[str, nn.Module]) -> int:
    """How many images all of the models take as one; a ValueError if there is none, or if they differ."""
    if not models:
        raise ValueError("there is no model to profile")
    found = {name: views_of(model) for name, model in models.items()}
    if len(set(found.values())) > 1:
        text = ", ".join(f"{name} {views}" for name, views in found.items())
        raise ValueError(
            f"models are measured on the same images, but take different numbers of them as one: {text}; measure them "
            "apart"
        )
    return next(iter(found.values()))


def interleaved(
    runs: Mapping[str, Run],
    batch: Tensor,
    rounds: int,
    warmup: int,
    precision: float | None,
    max_rounds: int,
    on_run: Callable[[str], None] | None,
    is_enough: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Name -> seconds in every measured round; arguments as in ``profile_models``."""
    rng = np.random.default_rng(SEED)

    def run_round(durations: dict[str, list[float]]) -> None:
        order: list[str] = rng.permutation(list(runs)).tolist()
        for name in order:
            durations[name].append(timed_run(runs[name], batch))
            if on_run is not None:
                on_run(name)

    warm: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(warmup, MAX_WARMUP)):
        if is_enough() or (turn >= warmup and not any(still_faster(durations) for durations in warm.values())):
            break
        run_round(warm)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(rounds, max_rounds)):
        if turn >= rounds and (precision is None or resolved(seconds, precision)):
            break
        if turn and is_enough():
            break
        run_round(seconds)
    return seconds


def still_faster(durations: Sequence[float]) -> bool:
    """True if the last run was clearly the fastest so far, or the only one."""
    return len(durations) == 1 or (len(durations) > 1 and durations[-1] < 0.95 * min(durations[:-1]))


def resolved(seconds: Mapping[str, Sequence[float]], precision: float) -> bool:
    """True if the interval of every speed-up over the first model is narrower than ``precision`` times it."""
    baseline, *others = seconds.values()
    for own in others:
        speedup, (low, high) = median_ratio(baseline, own)
        if high - low > precision * speedup:
            return False
    return True


def timed_run(run: Run, batch: Tensor) -> float:
    """Seconds of one forward pass, from an idle device to the result."""
    with torch.inference_mode():
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(batch)
            end.record()
            torch.cuda.synchronize(batch.device)
            return float(start.elapsed_time(end)) / 1e3
        begin = time.perf_counter()
        run(batch)
        return time.perf_counter() - begin


def prepared(name: str, model: nn.Module, batch: Tensor, compile: bool, cuda_graphs: bool) -> Run:
    """The model as it is to run on this batch: as it is, compiled, as a CUDA graph, or both; errors as ``graphed``."""
    if not cuda_graphs:
        return effvit.compile(model, dynamic=False) if compile else model
    run: Run = model
    if compile:
        # Models of one class share a forward, and beyond the limit dynamo would run the next of them uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
        # What a CUDA graph holds cannot wait for a count, so it has all slots, as plain torch.compile compiles them.
        run = torch.compile(model, dynamic=False)
    return graphed(name, run, batch)


def graphed(name: str, run: Run, batch: Tensor) -> Run:
    """The model on this batch as a CUDA graph.

    Raises:
        ValueError: It cannot be captured, because it waits for the device.
    """
    before = torch.cuda.current_stream(batch.device)
    stream = torch.cuda.Stream(batch.device)
    stream.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(batch)
            before.wait_stream(stream)
            with torch.cuda.graph(graph):
                run(batch)
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # torch leaves that of the capture in place where a capture fails
        raise ValueError(
            f"{name} cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): its token counts depend on the "
            "image; measure it without cuda_graphs, or with settings of fixed counts (ragged='padded')"
        ) from error
    return lambda _: graph.replay()


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live."""

    supports_higher_order_operators = True  # such as FlexAttention, of which the outputs alone count

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        leaves: list[object] = tree_leaves(out)
        for tensor in leaves:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def peak_memory(model: nn.Module, batch: Tensor) -> int:
    """Bytes of one forward pass, as ``Measurement.peak_memory`` tells."""
    with torch.no_grad():
        if not batch.is_cuda:
            live = _LiveBytes()
            known = [*model.parameters(), *model.buffers(), batch]
            live.alive |= {tensor.untyped_storage()._cdata for tensor in known}
            with live:
                model(batch)
            return live.peak
        model(batch)  # libraries allocate their workspaces at the first call
        torch.cuda.synchronize(batch.device)
        before = torch.cuda.memory_allocated(batch.device)
        torch.cuda.reset_peak_memory_stats(batch.device)
        model(batch)
        return torch.cuda.max_memory_allocated(batch.device) - before


def measurement(name: str, seconds: Times, baseline: Times, batch_size: int, memory: int = 0) -> Measurement:
    """The Measurement of a model from its and the baseline's durations in the same rounds."""
    speedup, interval = median_ratio(baseline, seconds)
    return Measurement(
        name=name,
        images_per_second=batch_size / float(np.median(seconds)),
        speedup=speedup,
        interval=interval,
        latency={f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES},
        peak_memory=memory,
        seconds=tuple(seconds.tolist()),
    )


def machine(device: str) -> dict[str, Json]:
    """What a measurement on the device was made with: system, processor, device and versions."""
    return {
        "system": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "effvit": effvit.__version__,
    }


def _processor_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
