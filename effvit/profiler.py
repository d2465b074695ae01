"""What models cost beside each other: parameters, multiply-adds, tokens left and measured throughput.

Throughput on a shared machine drifts by more than the methods differ, so models are measured interleaved:
each round runs every model once, in a new random order, and a speed-up is the median of the ratios within the
rounds.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import effvit
from effvit.flops import count_flops, eval_twin
from effvit.models.host import HOST_CLASSES, ReducedHost

__all__ = ["Cost", "Measurement", "cost_of", "machine", "profile_models"]

SEED = 0
RESAMPLES = 2000
PERCENTILES = (10, 50, 90, 99)


@dataclass(frozen=True)
class Measurement:
    """Speed of one model.

    Attributes:
        name: Name of the model.
        images_per_second: Of the round of median duration.
        speedup: Over the first model, median of the ratios within the rounds.
        interval: Bootstrap 95 % interval of ``speedup``.
        latency: Percentile ("p10", "p50", "p90", "p99") -> seconds of one batch.
        seconds: Duration of one batch in every round.
    """

    name: str
    images_per_second: float
    speedup: float
    interval: tuple[float, float]
    latency: dict[str, float]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates of one image (a mean for a method whose tokens depend on the image).
        uncounted: Operators that ``macs`` leaves out without a reason, see ``effvit.flops``.
        tokens: Mean number of patch tokens that leave the last block; None for a model without a TokenMap.
        measurement: Its speed.
    """

    parameters: int
    macs: int
    uncounted: dict[str, int]
    tokens: float | None
    measurement: Measurement


def noise(input_size: tuple[int, int, int], batch_size: int) -> Tensor:
    """Seeded images (batch_size, channels, H, W) of standard normal noise."""
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(SEED))


def median_interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median of ``values`` (percentile method, seeded)."""
    rng = np.random.default_rng(SEED)
    medians = np.median(rng.choice(values, (resamples, len(values))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def profile_models(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_size: int,
    *,
    rounds: int = 10,
    warmup: int = 2,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    images: Tensor | None = None,
    on_run: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Interleaved inference throughput of several models on one batch; the first is the baseline.

    The models are copied, once and with what they share, so the given ones keep their device, dtype and mode.

    Args:
        models: Name -> model.
        input_size: (channels, H, W) of an image.
        batch_size: Images in the batch.
        rounds: Measured rounds; each runs every model once, in shuffled order.
        warmup: Rounds before them that are not measured.
        threads: CPU threads during the measurement; None leaves the setting of torch.
        device: Where to run.
        dtype: Of parameters and images.
        images: (B, channels, H, W) to measure on, repeated to fill the batch; None means seeded noise.
        on_run: Called with the model's name after each of the (warmup + rounds) * len(models) runs.

    Returns:
        A Measurement of each model, in the order of ``models``.

    Raises:
        ValueError: No model, or a count below 1; a CUDA device on a machine without.
    """
    if not models:
        raise ValueError("there is no model to profile")
    for name, value in (("batch_size", batch_size), ("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} asks for CUDA, but torch finds none here; use 'cpu'")
    if images is None:
        images = noise(input_size, batch_size)
    batch = images[torch.arange(batch_size) % len(images)].to(device, dtype)
    twins = {name: twin.to(device, dtype).eval() for name, twin in copy.deepcopy(dict(models)).items()}

    rng = np.random.default_rng(SEED)
    seconds: dict[str, list[float]] = {name: [] for name in twins}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        for turn in range(warmup + rounds):
            for name in rng.permutation(list(twins)):
                duration = timed_run(twins[name], batch)
                if turn >= warmup:
                    seconds[name].append(duration)
                if on_run is not None:
                    on_run(str(name))
    finally:
        torch.set_num_threads(threads_before)
    baseline = np.array(next(iter(seconds.values())))
    return [measurement(name, np.array(own), baseline, batch_size) for name, own in seconds.items()]


def timed_run(model: nn.Module, batch: Tensor) -> float:
    """Seconds of one forward pass, from an idle device to the result."""
    synchronise(batch.device)
    start = time.perf_counter()
    with torch.inference_mode():
        model(batch)
    synchronise(batch.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for all work on a CUDA device; other devices run synchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measurement(name: str, seconds: np.ndarray, baseline: np.ndarray, batch_size: int) -> Measurement:
    """The Measurement of a model from its and the baseline's durations in the same rounds."""
    ratios = baseline / seconds
    return Measurement(
        name=name,
        images_per_second=batch_size / float(np.median(seconds)),
        speedup=float(np.median(ratios)),
        interval=median_interval(ratios),
        latency={f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES},
        seconds=tuple(seconds.tolist()),
    )


def cost_of(
    model: nn.Module,
    input_size: tuple[int, int, int],
    measurement: Measurement,
    images: Tensor | None = None,
) -> Cost:
    """Count what a model costs beside its measured speed.

    Args:
        model: The model.
        input_size: (channels, H, W) of an image.
        measurement: Its speed.
        images: (B, channels, H, W) for a method whose tokens depend on the image; None means one of noise.
    """
    images = noise(input_size, 1) if images is None else images
    varies = isinstance(model, ReducedHost) and any(r.variable_length for r in model.reducers.values())
    report = count_flops(model, input_size, images=images if varies else None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, report.total, report.uncounted, tokens_left(model, images), measurement)


@torch.no_grad()
def tokens_left(model: nn.Module, images: Tensor) -> float | None:
    """Mean number of patch tokens that leave the last block; None for a model without them."""
    if isinstance(model, ReducedHost):
        return float(eval_twin(model).forward_tokens(images).tokens.counts().double().mean())
    if type(model) not in HOST_CLASSES:
        return None
    patch_embed: Any = model.patch_embed
    return float(patch_embed.num_patches)


def machine(device: str) -> dict[str, str]:
    """What a measurement on the device was made with: system, processor, device and versions."""
    return {
        "system": platform.platform(),
        "processor": _processor_name(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
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
