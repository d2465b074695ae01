"""What a step of ``measure_gpu.py`` measures: models beside each other, packed batches, kernels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, NamedTuple, cast

import numpy as np
import timm
import torch
from benchmark_overhead import sharpen
from torch import Tensor, nn

import effvit
from effvit import attention
from effvit.hosts.calibration import needs_calibration
from effvit.hosts.surface import Reduced
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.costs import IDEAL, conditions_of, cost_of, ideals, is_reduced, tokens_by_block
from effvit.measure.ideal import PlainViT
from effvit.measure.launches import device_kernels, launches
from effvit.measure.packed_kernels import KERNELS, WithKernel, reason_against
from effvit.measure.profiler import (
    Measurement,
    ProfileOptions,
    Run,
    interleaved,
    machine,
    measurement,
    noise,
    peak_memory,
    prepared,
    timed_run,
)
from effvit.measure.records import as_json
from effvit.measure.tune import OutOfTime
from effvit.measure.values import Cost, Record
from effvit.measure.variants import reduce_by
from effvit.messages import one_line
from effvit.protocols import Json, Settings
from effvit.reducers import METHODS

__all__ = [
    "MODES",
    "Bench",
    "Host",
    "compare_biases",
    "compare_kernels",
    "compare_methods",
    "compare_pair",
    "count_kernels",
    "message_of",
    "noting",
    "reduced_by",
    "time_beside",
]

MODES = ("eager", "CUDA graphs", "compiled")
WARM_UP = 4  # rounds that a step reckons with before those that count
PUBLISHED_PATCHES = 196  # the grid that defaults of methods are meant for
SHARPEN = 12.0  # on query weights: random attention would be too even for ATS to adapt to the image
# Windows of noise are never as alike under random weights as those of pictures, of which ALGM's thresholds speak. At
# this one it merges about half of them, and not as many of each image.
OF_NOISE: dict[str, Settings] = {"algm": {"threshold": 0.0}}
CONTRASTS = (3.0, 0.2)  # of the first and the last image of a batch, so that images need different numbers of tokens


@dataclass
class Bench:
    """Where and how long steps measure.

    Attributes:
        device: Where to run.
        dtype: Of weights and images.
        dry: Models are small.
        end: When all must be over, in seconds of ``time.monotonic``.
        rounds: That are measured, at least and at most.
        seconds: That measuring models beside each other, or training them, should take.
    """

    device: torch.device
    dtype: torch.dtype
    dry: bool
    end: float
    rounds: tuple[int, int] = (3, 20)
    seconds: float = 30.0

    def check(self, _: str = "") -> None:
        """Raise ``OutOfTime`` once all must be over."""
        if monotonic() > self.end:
            raise OutOfTime

    def check_mode(self, mode: str) -> None:
        """Raise a ValueError if the device cannot run in that one of ``MODES``."""
        if mode == "CUDA graphs" and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, got {self.device.type!r}")

    def end_of(self, share: float) -> float:
        """When a share of the seconds is over that begin now, in seconds of ``time.monotonic``."""
        now = monotonic()
        return now + share * min(self.seconds, self.end - now)


class Host(NamedTuple):
    """A dense model of timm at one image size.

    Attributes:
        label: What results call it.
        name: timm's name.
        size: Pixels of a side.
    """

    label: str
    name: str
    size: int

    def build(self, bench: Bench) -> nn.Module:
        """The model with seeded weights, sharpened; a small one of the same class on a dry run."""
        small = {"depth": 2, "embed_dim": 48, "num_heads": 3} if bench.dry else {}
        torch.manual_seed(0)
        model = timm.create_model(self.name, img_size=self.pixels(bench), **small).eval()
        sharpen(model, SHARPEN)
        return model.to(bench.device, bench.dtype)

    def images(self, bench: Bench, batch_size: int) -> Tensor:
        """``varied_images`` of its size."""
        pixels = self.pixels(bench)
        return varied_images(bench, (3, pixels, pixels), batch_size)

    def pixels(self, bench: Bench) -> int:
        """Pixels of a side, fewer on a dry run."""
        return 64 if bench.dry else self.size


# -- models and images ----------------------------------------------------------------------------------------------


def varied_images(bench: Bench, size: tuple[int, int, int], batch_size: int) -> Tensor:
    """Noise (B, channels, H, W) of a contrast that falls from image to image."""
    contrast = torch.linspace(*CONTRASTS, batch_size)[:, None, None, None]
    return (noise(size, batch_size) * contrast).to(bench.device, bench.dtype)


def own_settings(method: str, dense: nn.Module) -> Settings:
    """The method's defaults on the grid they are meant for, elsewhere the middle of its first ladder if it has one.

    Those of a method in ``OF_NOISE`` are there instead.
    """
    if method in OF_NOISE:
        return OF_NOISE[method]
    host = cast("PlainViT", dense)
    patches = host.patch_embed.num_patches
    rungs = next(iter(METHODS[method].ladders(len(host.blocks), patches)), [])
    if patches == PUBLISHED_PATCHES or not rungs:
        return {}
    return rungs[len(rungs) // 2]


def reduced_by(dense: nn.Module, method: str, images: Tensor, **settings: Any) -> Reduced:
    """The dense model with the method, DyMU calibrated on the images; settings are its own but for those given.

    Args:
        dense: The model.
        method: Name of the method.
        images: (B, channels, H, W).
        settings: In place of its own.
    """
    model = reduce_by(dense, method, {**own_settings(method, dense), **settings}).eval()
    if needs_calibration(model):
        effvit.calibrate(model, [images])
    return model


@contextmanager
def noting(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Note an error under the name, and go on; only the end of the time goes through."""
    try:
        yield
    except OutOfTime:
        raise
    except Exception as error:  # one model of many fails in ways of its libraries
        left_out[name] = message_of(error)


def message_of(error: Exception) -> str:
    """An error in one line of moderate length."""
    return one_line(f"{type(error).__name__}: {error}", 500)


# -- speed ----------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """Models that were measured in the same rounds.

    Attributes:
        speeds: Name -> speed; the first is the baseline.
        runs: Name -> the model as it ran.
        left_out: Name -> why it was not measured.
    """

    speeds: dict[str, Measurement]
    runs: dict[str, Run]
    left_out: dict[str, str]


def time_beside(
    bench: Bench, models: Mapping[str, nn.Module], batch: Tensor, mode: str, left_out: dict[str, str]
) -> Timed:
    """Interleaved speed of the models, in as many rounds as the step has time for.

    A model that fails, takes longer for one batch than the step can repeat, or whose turn comes too late is left out.

    Args:
        bench: Where.
        models: Name -> model, on its device; the first is the baseline.
        batch: (B, channels, H, W).
        mode: One of ``MODES``.
        left_out: Name -> why, of what is left out already.

    Raises:
        ValueError: A baseline that fails.
        OutOfTime: The time of all steps is over.
    """
    runs: dict[str, Run] = {}
    memory: dict[str, int] = {}
    once: dict[str, float] = {}
    end_of_first, end = bench.end_of(0.75), bench.end_of(1)  # the rest of the time is for the rounds
    longest = bench.seconds / (WARM_UP + bench.rounds[0])
    for name, model in models.items():
        bench.check()
        if monotonic() > end_of_first and runs:
            left_out[name] = "its turn came after the time of the step for compiling and first passes"
            continue
        with noting(name, left_out):
            memory[name] = peak_memory(model, batch)
            run = prepared(name, model, batch, mode == "compiled", mode == "CUDA graphs")
            timed_run(run, batch)
            once[name] = timed_run(run, batch)
            if once[name] > longest:
                raise ValueError(
                    f"one batch takes {once[name]:.3g} s, more than the {longest:.3g} s that can be repeated"
                )
            runs[name] = run
        if not runs:
            raise ValueError(f"the baseline {name} fails: {left_out[name]}")
    whole = sum(once[name] for name in runs)
    least, most = bench.rounds
    rounds = max(least, min(most, int((end - monotonic()) / whole) - WARM_UP))
    seconds = interleaved(runs, batch, rounds, 0 if bench.dry else 2, None, rounds, bench.check)
    baseline = np.array(next(iter(seconds.values())))
    speeds = {
        name: measurement(name, np.array(own), baseline, len(batch), memory[name]) for name, own in seconds.items()
    }
    return Timed(speeds, runs, left_out)


def record_of(
    bench: Bench,
    models: Mapping[str, nn.Module],
    tokens: Mapping[str, Sequence[float] | None],
    timed: Timed,
    batch: Tensor,
    mode: str,
) -> dict[str, Json]:
    """What a step found: a record as of ``effvit profile``, kernels by model, and what was left out.

    Args:
        bench: Where.
        models: Name -> model, the baseline first.
        tokens: Name -> patch tokens that leave each block, where there are such.
        timed: Their speed.
        batch: (B, channels, H, W) they ran on.
        mode: One of ``MODES``.
    """
    size = (batch.shape[1], batch.shape[2], batch.shape[3])
    first, baseline = next(iter(models.items()))
    costs: list[Cost] = []
    for name in (name for name in timed.speeds if not name.startswith(IDEAL)):
        model, counts = models[name], tokens.get(name)
        adapts = isinstance(model, Reduced) and model.variable_length
        rounded = [round(count) for count in counts or []] if adapts else None
        with noting(f"costs of {name}", timed.left_out):  # a method from outside may have no closed form
            macs = sum(closed_form_macs(model, size, token_counts=rounded).values())
            of_ideal = timed.speeds.get(IDEAL + name)
            cost = cost_of(model, size[1:], timed.speeds[name], of_ideal, counts, macs)
            host = first if is_reduced(model, baseline) else None
            costs.append(replace(cost, host=host, mac_ratio=(costs[0].macs if costs else macs) / macs))
    options: ProfileOptions = {
        "device": bench.device,
        "dtype": bench.dtype,
        "compile": mode == "compiled",
        "cuda_graphs": mode == "CUDA graphs",
    }
    images = f"noise of contrast {CONTRASTS[0]} to {CONTRASTS[1]}"
    record = Record(machine(bench.device.type), conditions_of(len(batch), size, images, options), costs)
    return {
        "record": as_json(record.with_weights("random")),
        "kernels": kernels_of(models, timed, batch, launched=mode == "eager", on_device=mode == "compiled"),
        "left_out": dict(timed.left_out),
    }


def kernels_of(
    models: Mapping[str, nn.Module], timed: Timed, batch: Tensor, launched: bool, on_device: bool
) -> dict[str, Json]:
    """Name -> counts of kernels of a pass of what was measured but the ideals; what cannot be counted is left out.

    Args:
        models: Name -> model.
        timed: What was measured of them.
        batch: (B, channels, H, W).
        launched: Count ATen calls that launch a kernel, of the model as it is.
        on_device: Count what the device executes, of the model as it ran. Tracing may slow down what runs afterwards.
    """
    found: dict[str, Json] = {}
    for name, run in timed.runs.items():
        if name.startswith(IDEAL):
            continue
        with noting(f"kernels of {name}", timed.left_out):
            counts: dict[str, Json] = {"launches": launches(models[name], batch)} if launched else {}
            found[name] = counts | ({"device": device_kernels(run, batch)} if on_device else {})
    return found


# -- steps ----------------------------------------------------------------------------------------------------------


def compare_methods(bench: Bench, host: Host, batch_size: int, mode: str) -> dict[str, Json]:
    """The dense model, every method on it, and the ideal of each at the tokens it left of this batch."""
    bench.check_mode(mode)
    dense, batch = host.build(bench), host.images(bench, batch_size)
    models: dict[str, nn.Module] = {"dense": dense}
    tokens = {"dense": tokens_by_block(dense, batch)}
    left_out: dict[str, str] = {}
    for method in effvit.list_methods():
        bench.check()
        if mode == "CUDA graphs" and METHODS[method].variable_length:
            left_out[method] = (
                "its token counts depend on the image and are read from the device, which no graph can do"
            )
            continue
        with noting(method, left_out):
            model = reduced_by(dense, method, batch)
            tokens[method] = tokens_by_block(model, batch)
            models |= {method: model, **ideals({"dense": dense, method: model}, tokens)}
    timed = time_beside(bench, models, batch, mode, left_out)
    return record_of(bench, models, tokens, timed, batch, mode)


def compare_pair(
    bench: Bench,
    makers: Mapping[str, Callable[[], nn.Module]],
    size: tuple[int, int, int],
    batch_size: int,
    mode: str,
) -> dict[str, Json]:
    """Any models beside each other, the first as the baseline.

    Args:
        bench: Where.
        makers: Name -> what makes the model.
        size: (channels, H, W) of an image.
        batch_size: Images in the batch.
        mode: One of ``MODES``.
    """
    bench.check_mode(mode)
    torch.manual_seed(0)
    models = {name: make().eval().to(bench.device, bench.dtype) for name, make in makers.items()}
    batch = varied_images(bench, size, batch_size)
    timed = time_beside(bench, models, batch, mode, {})
    return record_of(bench, models, {}, timed, batch, mode)


def compare_kernels(bench: Bench, host: Host, batch_size: int) -> dict[str, Json]:
    """Methods whose images differ in tokens: the padded batch, and the packed one with each kernel that can run.

    The first of these kernels is the one that ``packed_attention`` takes by itself. The difference is that of the class
    scores from the padded batch's, as a share of their norm.
    """
    dense, batch = host.build(bench), host.images(bench, batch_size)
    reasons = {kernel: reason_against(kernel, bench.device, bench.dtype) for kernel in KERNELS}
    kernels = [kernel for kernel, reason in reasons.items() if reason is None]
    left_out = {kernel: reason for kernel, reason in reasons.items() if reason is not None}
    methods: dict[str, Json] = {}
    for method in (name for name in effvit.list_methods() if "ragged" in METHODS[name].defaults()):
        with noting(method, left_out):
            methods[method] = padded_against_packed(bench, dense, method, kernels, batch)
    return {"kernels": [*kernels], "methods": methods, "left_out": dict(left_out)}


def padded_against_packed(
    bench: Bench, dense: nn.Module, method: str, kernels: Sequence[str], batch: Tensor
) -> dict[str, Json]:
    """Of one method on a batch (B, channels, H, W): its padded form, the packed one with each kernel, and its ideal.

    What FlexAttention launches cannot be counted, which then stands in what was left out.
    """
    padded = reduced_by(dense, method, batch, ragged="padded")
    packed = reduce_by(dense, method, {**padded.settings, "ragged": "packed"}).eval()
    models: dict[str, nn.Module] = {"dense": dense, "padded": padded}
    models |= {f"packed {kernel}": WithKernel(packed, kernel) for kernel in kernels}
    tokens = {"dense": None, "padded": tokens_by_block(padded, batch)}
    timed = time_beside(bench, {**models, **ideals({"dense": dense, "padded": padded}, tokens)}, batch, "eager", {})
    differences: dict[str, Json] = {}
    for name in (name for name in timed.runs if isinstance(models.get(name), WithKernel)):
        with noting(f"difference of {name}", timed.left_out):
            differences[name] = difference(models[name], padded, batch)
    return {
        "speeds": as_json(list(timed.speeds.values())),
        "tokens": as_json(tokens["padded"]),
        "differences": differences,
        "kernels": kernels_of(models, timed, batch, launched=True, on_device=False),
        "left_out": dict(timed.left_out),
    }


class BiasAsFeaturesFrom(nn.Module):
    """A model that carries key biases as features from so many keys on, where flash attention can run at all."""

    def __init__(self, model: nn.Module, keys: int) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        before = attention.FLASH_KEYS
        attention.FLASH_KEYS = self.keys
        try:
            out: Tensor = self.model(x)
        finally:
            attention.FLASH_KEYS = before
        return out


def compare_biases(bench: Bench, host: Host, batch_size: int) -> dict[str, Json]:
    """Padded methods whose keys have a bias, as a mask and as features of q and k (``attention.FLASH_KEYS``)."""
    dense, batch = host.build(bench), host.images(bench, batch_size)
    models: dict[str, nn.Module] = {"dense": dense}
    left_out: dict[str, str] = {}
    for method in ("tome", "ats", "dymu"):
        settings: Settings = {"ragged": "padded"} if "ragged" in METHODS[method].defaults() else {}
        with noting(method, left_out):
            model = reduced_by(dense, method, batch, **settings)
            models |= {f"{method}, mask": BiasAsFeaturesFrom(model, sys.maxsize)}
            models |= {f"{method}, features": BiasAsFeaturesFrom(model, 0)}
    timed = time_beside(bench, models, batch, "eager", left_out)
    return {"speeds": as_json(list(timed.speeds.values())), "left_out": dict(timed.left_out)}


def count_kernels(bench: Bench, host: Host, batch_size: int) -> dict[str, Json]:
    """What the dense model and every method launch and the device executes, eager and untimed."""
    dense, batch = host.build(bench), host.images(bench, batch_size)
    models: dict[str, nn.Module] = {"dense": dense}
    timed = Timed({}, {}, {})
    for method in effvit.list_methods():
        with noting(method, timed.left_out):
            models[method] = reduced_by(dense, method, batch)
    timed.runs.update(models)
    kernels = kernels_of(models, timed, batch, launched=True, on_device=True)
    return {"kernels": kernels, "left_out": dict(timed.left_out)}


@torch.inference_mode()
def difference(model: nn.Module, reference: nn.Module, batch: Tensor) -> float:
    """Norm of the difference of two models' class scores over that of the reference's.

    Raises:
        ValueError: Scores that are not finite.
    """
    expected = reference(batch).float()
    found = float((model(batch).float() - expected).norm() / expected.norm())
    if not math.isfinite(found):
        raise ValueError("the class scores are not finite")
    return found
