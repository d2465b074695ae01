"""Checkpoint files of official repositories and of timm -> our parameter names."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from torch import Tensor, nn

__all__ = ["Conversion", "convert_checkpoint", "load_checkpoint", "official_state_dict"]

# Where training scripts put the weights: DeiT, EViT and GTP under "model"; timm under "state_dict"; DINO under
# "teacher" (the network it publishes) beside "student".
CONTAINERS = ("state_dict", "model", "teacher", "student")
WRAPPERS = re.compile(r"^(module\.|backbone\.|encoder\.)+")
# Parameters of training only: the projection head of DINO, and the all-zero row of ATS (no parameter at all).
DROPPED = re.compile(r"(^head\.(mlp|last_layer)\.|\.attn\.out_zero_mask$)")


def official_state_dict(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a loaded checkpoint under plain names, and the names of what was dropped from it."""
    for container in CONTAINERS:
        if isinstance(checkpoint.get(container), Mapping):
            checkpoint = checkpoint[container]
            break
    state: dict[str, Tensor] = {}
    dropped = []
    for name, value in checkpoint.items():
        name = WRAPPERS.sub("", name)
        if not isinstance(value, Tensor) or DROPPED.search(name):
            dropped.append(name)
        else:
            state[name] = value
    return state, dropped


class Conversion(NamedTuple):
    """What a checkpoint became.

    Attributes:
        state: The weights under the model's names, complete and of its shapes.
        same: Names that the file has too.
        renamed: Names that the file does not have: renamed, joined or split weights.
        dropped: Names of the file that were left out because they only serve training, or are constants.
    """

    state: dict[str, Tensor]
    same: list[str]
    renamed: list[str]
    dropped: list[str]


def _read(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file; nothing but weights and plain values is ever loaded from it."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # EViT's and DeiT's files hold their command line as a Namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); it is truncated, of another format, or holds code "
            "besides weights, which is never run: get the file anew, or save its state_dict alone"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def convert_checkpoint(model: nn.Module, path: str | Path) -> Conversion:
    """The weights of a checkpoint of timm or of an official repository, under the names of a model.

    Position embeddings and patch embeddings of another size are resampled as timm does it.

    Args:
        model: A timm or effvit model; it is left as it is.
        path: .safetensors, or a .pth that loads with ``weights_only=True``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file cannot be read, or belongs to another architecture: missing, unexpected or
            differently shaped parameters, of which the first are named.
    """
    plain, dropped = official_state_dict(_read(Path(path)))
    state = plain
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is not None:
        state, unused = adapt(plain)
        dropped += unused
    elif isinstance(model, eva.Eva):
        state = eva.checkpoint_filter_fn(plain, model)
    elif isinstance(model, vision_transformer.VisionTransformer) and plain:
        state = vision_transformer.checkpoint_filter_fn(plain, model, adapt_layer_scale=True)
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is not a parameter of the model" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(value.shape)}, the model's {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(
            f"{path} is a checkpoint of another model than this {type(model).__name__}: {'; '.join(faults[:4])}{more}; "
            "create the model it was saved from (its name, num_classes and patch_size must agree)"
        )
    same = [name for name in state if name in plain]
    return Conversion(state, same, [name for name in state if name not in plain], dropped)


def load_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load a checkpoint of timm or of an official repository into a model, strictly.

    Arguments and errors are those of ``convert_checkpoint``.

    Returns:
        Names of entries that were dropped because they only serve training, or are constants.
    """
    conversion = convert_checkpoint(model, path)
    model.load_state_dict(conversion.state)
    return conversion.dropped
