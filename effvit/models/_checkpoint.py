"""Checkpoint files of official repositories and of timm -> our parameter names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from torch import Tensor, nn

__all__ = ["load_checkpoint", "official_state_dict"]

# Where training scripts put the weights: DeiT, EViT and GTP under "model"; timm under "state_dict"; DINO under
# "teacher" (the network it publishes) beside "student".
CONTAINERS = ("state_dict", "model", "teacher", "student")
WRAPPERS = re.compile(r"^(module\.|backbone\.|encoder\.)+")
# Parameters of training only: the projection head of DINO, and the all-zero row of ATS (no parameter at all). And what
# stands around a backbone in the files of mmdet and mmseg.
DROPPED = re.compile(
    r"(^head\.(mlp|last_layer)\.|\.attn\.out_zero_mask$|^(neck|rpn_head|roi_head|bbox_head|decode_head|auxiliary_head)\.)"
)


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


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    # EViT's and DeiT's files hold their command line as a Namespace beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load a checkpoint of timm or of an official repository into a model, strictly.

    Position embeddings and patch embeddings of another size are resampled as timm does it.

    Args:
        model: A timm or effvit vision transformer.
        path: .safetensors, or a .pth that loads with ``weights_only=True``.

    Returns:
        Names of entries that were dropped because they only serve training.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The checkpoint belongs to another architecture: missing, unexpected or differently shaped
            parameters, of which the first are named.
    """
    content = _read(Path(path))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    state, dropped = official_state_dict(content)
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is not None:
        state, unused = adapt(state)
        dropped += unused
    elif isinstance(model, eva.Eva):
        state = eva.checkpoint_filter_fn(state, model)
    elif isinstance(model, vision_transformer.VisionTransformer) and state:
        state = vision_transformer.checkpoint_filter_fn(state, model, adapt_layer_scale=True)
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
    model.load_state_dict(state)
    return dropped
