"""What models cost beside each other, as one record: size, multiply-adds, tokens, speed, efficiency and fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effvit.hosts.host import HOST_CLASSES, ReducedHost
from effvit.hosts.surface import Reduced, patch_grid
from effvit.measure.breakdown import time_by_block
from effvit.measure.fidelity import compare_outputs, outputs
from effvit.measure.flops import FlopReport, count_flops, eval_twin
from effvit.measure.ideal import ideal_of, mean_counts, plain_parts
from effvit.measure.profiler import (
    Measurement,
    ProfileOptions,
    fill_batch,
    machine,
    median_ratio,
    noise,
    profile_models,
    setup_of,
    shared_views,
)
from effvit.measure.reader import Reader
from effvit.measure.records import as_json
from effvit.measure.values import Conditions, Cost, HandedOver, Record
from effvit.protocols import Json, Settings, Size, check_views
from effvit.selectors import SelectedParts, SelectingTower

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "IDEAL",
    "conditions_of",
    "cost_of",
    "handed_over",
    "ideals",
    "is_reduced",
    "macs_of",
    "method_of",
    "profile",
    "tokens_by_block",
]

IDEAL = "ideal of "  # before the name of a model, that of its ideal


def profile(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_size: int,
    *,
    images: Tensor | None = None,
    image_names: list[str] | None = None,
    ideal: bool = True,
    breakdown: bool = False,
    reader: Reader | None = None,
    text: int = 0,
    on_run: Callable[[str], None] | None = None,
    on_count: Callable[[str], None] | None = None,
    is_enough: Callable[[], bool] = lambda: False,
    **options: Unpack[ProfileOptions],
) -> Record:
    """Measure and count models beside each other; the first is the baseline.

    Args:
        models: Name -> model: any classifiers, of timm, of this package or your own, for the same images; or towers
            whose tokens are selected, each a ``TokenSelector``, a ``CropSelector`` or a ``VideoSelector``.
        input_size: (channels, H, W) of an image.
        batch_size: Images in the batch.
        images: (B, channels, H, W) to measure on, repeated to fill the batch, and to compare outputs on; None means
            noise, on which no outputs are compared.
        image_names: What the record names them.
        ideal: Measure the ideal of each reduced model in the same rounds.
        breakdown: Time the parts of every block too.
        reader: A language model that reads the tokens which towers hand over; its costs are counted, not measured.
        text: Tokens of a text that it reads behind them.
        on_run: Called with a model's name after each run.
        on_count: Called with a model's name when all about it is known.
        is_enough: As of ``profile_models``.
        options: Further keywords of ``profile_models``: rounds, warmup, precision, max_rounds, threads, device, dtype,
            compile, cuda_graphs.

    Returns:
        The record, with a ``Cost`` for each model in the order of ``models``.

    Raises:
        ValueError: As ``profile_models``.
    """
    views = shared_views(models)
    sample = noise(input_size, views) if images is None else images
    check_views(len(sample), views)
    dense = next(iter(models.values()))
    tokens = {name: tokens_by_block(model, sample) for name, model in models.items()}
    runs = {**models, **(ideals(models, tokens) if ideal else {})}
    speeds = profile_models(runs, input_size, batch_size, images=images, on_run=on_run, is_enough=is_enough, **options)
    measured = {speed.name: speed for speed in speeds}
    compared = images is not None and any(is_reduced(model, dense) for model in models.values())
    reference = outputs(dense, sample) if compared else None
    placement = torch.device(options.get("device", "cpu")), options.get("dtype", torch.float32)
    batch = fill_batch(sample, views * batch_size).to(*placement) if breakdown else None
    costs: list[Cost] = []
    for name, model in models.items():
        counted = macs_of(model, input_size, sample)
        speed, of_ideal = measured[name], measured.get(IDEAL + name)
        cost = cost_of(model, input_size[1:], speed, of_ideal, tokens[name], counted.total)
        baseline = costs[0] if costs else cost
        of_dense = is_reduced(model, dense)
        costs.append(
            replace(
                cost,
                uncounted=counted.uncounted,
                host=baseline.name if of_dense or (isinstance(model, SelectingTower) and model is not dense) else None,
                mac_ratio=baseline.macs / cost.macs if cost.macs else None,
                breakdown=None if batch is None else time_by_block(model, batch),
                fidelity=compare_outputs(reference, outputs(model, sample)) if of_dense and reference else None,
                handed=handed_over(model, sample, reader, text) if isinstance(model, SelectingTower) else None,
            )
        )
        if on_count is not None:
            on_count(name)
    named = image_names or [f"{len(images)} images"] if images is not None else "noise"
    conditions = conditions_of(batch_size, input_size, named, options)
    if isinstance(dense, SelectingTower):
        known = sorted(dense.settings.keys() & {"crops", "frames"})
        cut: dict[str, Json] = {name: as_json(dense.settings[name]) for name in known}
        conditions = replace(conditions, options={**conditions.options, **cut})
    return Record(machine(conditions.device), conditions, costs)


def macs_of(model: nn.Module, input_size: tuple[int, int, int], sample: Tensor) -> FlopReport:
    """Multiply-adds of one image (channels, H, W); a mean over the sample (B, channels, H, W) if they depend on it."""
    adapts = model.adapts if isinstance(model, SelectingTower) else isinstance(model, Reduced) and model.variable_length
    return count_flops(model, input_size, images=sample if adapts else None)


def ideals(models: Mapping[str, nn.Module], tokens: Mapping[str, Sequence[float] | None]) -> dict[str, nn.Module]:
    """The ideal of each reduced form of the first model, where its host has one, by the names they are measured under.

    Args:
        models: Name -> model, the dense one first.
        tokens: Name -> patch tokens that leave each block.
    """
    dense = next(iter(models.values()))
    found = {
        IDEAL + name: ideal_of(dense, [round(count) for count in tokens[name] or []], model)
        for name, model in models.items()
        if isinstance(model, ReducedHost) and is_reduced(model, dense)
    }
    return {name: ideal for name, ideal in found.items() if ideal is not None}


def cost_of(
    model: nn.Module,
    size: Size,
    speed: Measurement,
    ideal: Measurement | None,
    tokens: Sequence[float] | None,
    macs: int,
) -> Cost:
    """What a model costs, as far as it can be said without the others.

    Args:
        model: The model.
        size: (H, W) of the images.
        speed: What was measured of it.
        ideal: What was measured of its ideal, if it has one.
        tokens: Patch tokens that leave each block.
        macs: Multiply-adds of one image.
    """
    method, settings = method_of(model, size)
    efficiency, bounds = (None, None) if ideal is None else median_ratio(ideal.seconds, speed.seconds)
    return Cost(
        name=speed.name,
        host=None,
        method=method,
        settings=settings,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        uncounted={},
        tokens=tokens,
        images_per_second=speed.images_per_second,
        latency=speed.latency,
        peak_memory=speed.peak_memory,
        speedup=speed.speedup,
        interval=speed.interval,
        resolved=not speed.interval[0] <= 1 <= speed.interval[1],
        mac_ratio=None,
        ideal_speedup=None if ideal is None else ideal.speedup,
        efficiency=efficiency,
        efficiency_interval=bounds,
        breakdown=None,
        seconds=speed.seconds,
        accuracy=None,
        fidelity=None,
    )


def method_of(model: nn.Module, size: Size) -> tuple[str | None, Settings]:
    """The method of a model and its settings; (None, {}) of a dense model, and of a tower that hands over all cells.

    Args:
        model: The model.
        size: (H, W) of its images, on which depends how many cells a tower hands over.
    """
    if isinstance(model, Reduced):
        return model.method, dict(model.settings)
    if not isinstance(model, SelectingTower) or model.keeps_all(size):
        return None, {}
    tower = [model.tower.host.method] if model.tower.reducing else []
    return " + ".join([*tower, model.selector.name]), dict(model.settings)


@torch.no_grad()
def handed_over(model: SelectingTower, images: Tensor, reader: Reader | None = None, text: int = 0) -> HandedOver:
    """What a tower hands over of images (B, channels, H, W), and what a reader of it, and of ``text``, costs.

    Where it takes several images as one, the mean is over such groups.
    """
    like, twin = next(model.parameters()), eval_twin(model)
    groups = images.to(like.device, like.dtype).split(model.views if model.views > 1 else len(images))
    found = [twin(group) for group in groups]
    total = sum(int((own.selection if isinstance(own, SelectedParts) else own).counts.sum()) for own in found)
    tokens = total * model.views / len(images)
    if reader is None:
        return HandedOver(tokens, text)
    read = round(tokens), text
    return HandedOver(tokens, text, str(reader), reader.prefill_macs(*read), reader.cache_bytes(*read))


def conditions_of(
    batch_size: int, input_size: tuple[int, int, int], images: Sequence[str] | str, options: ProfileOptions
) -> Conditions:
    """What a measurement with these options of ``profile_models`` holds for."""
    setup = setup_of(options)
    known = {field.name for field in fields(Conditions)}
    return Conditions(
        batch_size=batch_size,
        input_size=input_size,
        compile=options.get("compile", False),
        cuda_graphs=options.get("cuda_graphs", False),
        options={name: as_json(value) for name, value in options.items() if name not in known},
        clock="cuda events" if setup["device"].startswith("cuda") else "wall",
        images=images,
        **setup,
    )


def is_reduced(model: nn.Module, dense: nn.Module) -> bool:
    """True if the model is the dense one with a reduction method, on the same parameters."""
    return isinstance(model, Reduced) and next(model.parameters()) is next(dense.parameters(), None)


@torch.no_grad()
def tokens_by_block(model: nn.Module, images: Tensor) -> list[float] | None:
    """Mean number of patch tokens that leave each block; None for a model without them."""
    if isinstance(model, SelectingTower):
        tower = model.tower
        return [float(count) for count in tower.host.token_counts(patch_grid(images, tower.host))[: tower.block + 1]]
    if isinstance(model, ReducedHost):
        return mean_counts(model, images)
    if type(model) not in HOST_CLASSES:
        return None
    parts = plain_parts(model)
    return [float(parts.patch_embed.num_patches)] * len(parts.blocks)
