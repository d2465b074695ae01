"""What models cost beside each other, as one record: size, multiply-adds, tokens, speed, efficiency and fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effvit.hosts.host import HOST_CLASSES, ReducedHost
from effvit.hosts.surface import Reduced
from effvit.measure.breakdown import time_by_block
from effvit.measure.fidelity import Fidelity, compare_outputs, outputs
from effvit.measure.flops import count_flops
from effvit.measure.ideal import IDEAL_HOSTS, IdealViT, mean_counts
from effvit.measure.profiler import fill_batch, machine, median_ratio, noise, profile_models
from effvit.measure.records import SCHEMA

__all__ = ["Cost", "profile"]

IDEAL = "ideal of "


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        name: Name of the model.
        host: Name of the baseline if it is the dense model behind this one, else None.
        method: Reduction method, None for a model without.
        settings: Settings of the method.
        parameters: Number of parameters.
        macs: Multiply-accumulates of one image (a mean for a method whose tokens depend on the image).
        uncounted: Operators that ``macs`` leaves out without a reason, see ``effvit.measure.flops``.
        tokens: Mean number of patch tokens that leave each block; None for a model without them.
        images_per_second, latency, peak_memory, speedup, interval, seconds: As in
            ``effvit.measure.profiler.Measurement``.
        resolved: The interval of the speed-up excludes 1.
        mac_ratio: Multiply-adds of the baseline over those of the model; None for a model without any.
        ideal_speedup: Speed-up of the dense blocks on the same numbers of tokens with nothing else to do; None where
            there is no such model (see ``effvit.measure.ideal``).
        efficiency: Speed over that ideal's.
        efficiency_interval: Its bootstrap 95 % interval.
        breakdown: Where the time goes, see ``effvit.measure.breakdown``; None if it was not asked for.
        accuracy: {"value", "metric", "data", "origin"}, or None if it was not measured.
        fidelity: How near the outputs are to the baseline's, see ``effvit.measure.fidelity``, or None.
    """

    name: str
    host: str | None
    method: str | None
    settings: dict[str, Any]
    parameters: int
    macs: int
    uncounted: dict[str, int]
    tokens: list[float] | None
    images_per_second: float
    latency: dict[str, float]
    peak_memory: int
    speedup: float
    interval: tuple[float, float]
    resolved: bool
    mac_ratio: float | None
    ideal_speedup: float | None
    efficiency: float | None
    efficiency_interval: tuple[float, float] | None
    breakdown: list[dict[str, Any]] | None
    seconds: tuple[float, ...]
    accuracy: dict[str, Any] | None = None
    fidelity: Fidelity | None = None


def profile(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_size: int,
    *,
    images: Tensor | None = None,
    image_names: list[str] | None = None,
    ideal: bool = True,
    breakdown: bool = False,
    on_run: Callable[[str], None] | None = None,
    on_count: Callable[[str], None] | None = None,
    **conditions: Any,
) -> dict[str, Any]:
    """Measure and count models beside each other; the first is the baseline.

    Args:
        models: Name -> model: any classifiers, of timm, of this package or your own, for the same images.
        input_size: (channels, H, W) of an image.
        batch_size: Images in the batch.
        images: (B, channels, H, W) to measure on, repeated to fill the batch, and to compare outputs on; None means
            noise, on which no outputs are compared.
        image_names: What the record names them.
        ideal: Measure the ideal of each reduced model in the same rounds.
        breakdown: Time the parts of every block too.
        on_run: Called with a model's name after each run.
        on_count: Called with a model's name when all about it is known.
        conditions: Further keywords of ``profile_models``: rounds, warmup, precision, max_rounds, threads, device,
            dtype, compile, cuda_graphs.

    Returns:
        The record: {"schema", "kind": "profile", "machine", "conditions", "models": [a ``Cost`` as a dict each]}.

    Raises:
        ValueError: As ``profile_models``.
    """
    sample = noise(input_size, 1) if images is None else images
    dense_name, dense = next(iter(models.items()))
    tokens = {name: tokens_by_block(model, sample) for name, model in models.items()}
    runs = dict(models)
    if ideal and type(dense) in IDEAL_HOSTS:
        for name, model in models.items():
            if is_reduced(model, dense):
                runs[IDEAL + name] = IdealViT(dense, [round(count) for count in tokens[name] or []])
    measured = {
        m.name: m for m in profile_models(runs, input_size, batch_size, images=images, on_run=on_run, **conditions)
    }
    device, dtype = torch.device(conditions.get("device", "cpu")), conditions.get("dtype", torch.float32)
    compared = images is not None and any(is_reduced(model, dense) for model in models.values())
    reference = outputs(dense, sample) if compared else None
    costs: list[Cost] = []
    for name, model in models.items():
        speed, host = measured[name], model if isinstance(model, Reduced) else None
        of_dense = is_reduced(model, dense)
        report = count_flops(model, input_size, images=sample if host is not None and host.variable_length else None)
        most = costs[0].macs if costs else report.total
        ideal_speed = measured.get(IDEAL + name)
        efficiency, bounds = (None, None) if ideal_speed is None else median_ratio(ideal_speed.seconds, speed.seconds)
        batch = fill_batch(sample, batch_size).to(device, dtype) if breakdown else None
        costs.append(
            Cost(
                name=name,
                host=dense_name if of_dense else None,
                method=None if host is None else host.method,
                settings={} if host is None else dict(host.settings),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                macs=report.total,
                uncounted=report.uncounted,
                tokens=tokens[name],
                images_per_second=speed.images_per_second,
                latency=speed.latency,
                peak_memory=speed.peak_memory,
                speedup=speed.speedup,
                interval=speed.interval,
                resolved=not speed.interval[0] <= 1 <= speed.interval[1],
                mac_ratio=most / report.total if report.total else None,
                ideal_speedup=None if ideal_speed is None else ideal_speed.speedup,
                efficiency=efficiency,
                efficiency_interval=bounds,
                breakdown=None if batch is None else time_by_block(model, batch),
                seconds=speed.seconds,
                fidelity=compare_outputs(reference, outputs(model, sample)) if of_dense and reference else None,
            )
        )
        if on_count is not None:
            on_count(name)
    named = image_names or [f"{len(images)} images"] if images is not None else "noise"
    return {
        "schema": SCHEMA,
        "kind": "profile",
        "machine": machine(str(device)),
        "conditions": {
            "batch_size": batch_size,
            "input_size": list(input_size),
            "compile": False,
            "cuda_graphs": False,
            **conditions,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "threads": conditions.get("threads") or torch.get_num_threads(),
            "clock": "cuda events" if device.type == "cuda" else "wall",
            "images": named,
        },
        "models": [asdict(cost) for cost in costs],
    }


def is_reduced(model: nn.Module, dense: nn.Module) -> bool:
    """True if the model is the dense one with a reduction method, on the same parameters."""
    return isinstance(model, Reduced) and next(model.parameters()) is next(dense.parameters(), None)


@torch.no_grad()
def tokens_by_block(model: nn.Module, images: Tensor) -> list[float] | None:
    """Mean number of patch tokens that leave each block; None for a model without them."""
    if isinstance(model, ReducedHost):
        return mean_counts(model, images)
    if type(model) not in HOST_CLASSES:
        return None
    dense: Any = model
    return [float(dense.patch_embed.num_patches)] * len(dense.blocks)
