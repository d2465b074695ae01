"""Models as commands are asked for them: with weights or without, at one size."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import nn

import effvit
from effvit.cli.options import WeightArguments
from effvit.data.preparation import data_config
from effvit.measure.profiler import present_device
from effvit.measure.variants import build
from effvit.protocols import Settings, Size

__all__ = ["RANDOM_WEIGHTS", "check_device", "create", "has_random_weights", "runner_types", "shared_input_size"]

RANDOM_WEIGHTS = "random weights: token choices are not meaningful"


def create(
    name: str, arguments: WeightArguments, img_size: Size | None = None, options: Settings | None = None
) -> nn.Module:
    """The named model in eval mode, with the weights asked for, else seeded random weights.

    Args:
        name: Any name of timm.
        arguments: Where the weights are from.
        img_size: (H, W); None means the model's own.
        options: Further keywords of ``timm.create_model``.
    """
    torch.manual_seed(0)
    size: Settings = {} if img_size is None else {"img_size": img_size}
    model = build(name, size | (options or {}), arguments.pretrained)
    if arguments.checkpoint is not None:
        effvit.load_checkpoint(model, arguments.checkpoint, runner_types(), arguments.key)
    return model.eval()


def runner_types() -> list[type]:
    """What the checkpoints of mmengine's Runner hold besides weights; nothing without mmengine."""
    if find_spec("mmengine") is None:
        return []
    from mmengine.runner.checkpoint import get_torch_safe_globals

    return list(get_torch_safe_globals())


def has_random_weights(arguments: WeightArguments) -> bool:
    """True if the command was given no weights to load."""
    return arguments.checkpoint is None and not arguments.pretrained


def check_device(name: str) -> None:
    """Raise a ValueError unless torch knows a device of that name and finds it here."""
    try:
        present_device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use e.g. cpu, cuda or cuda:1") from error


def shared_input_size(models: Mapping[str, nn.Module]) -> tuple[int, int, int]:
    """The input size of all the models.

    Raises:
        ValueError: They differ.
    """
    sizes = {name: tuple(data_config(model)["input_size"]) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{name} {' x '.join(map(str, size))}" for name, size in sizes.items())
        raise ValueError(f"one batch cannot serve several input sizes ({text}); give --img-size")
    channels, height, width = next(iter(sizes.values()))
    return channels, height, width
