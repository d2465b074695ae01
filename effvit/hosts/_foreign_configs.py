"""What transformers writes beside weights, and weights do not tell: the number of heads and the activation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from timm.layers import QuickGELU
from torch import nn

from effvit.messages import plain, shown

__all__ = ["check_config"]

LARGEST = 1_000_000  # bytes; that of a model with a thousand classes has some fifty thousand


def check_config(path: str | Path, model: nn.Module) -> None:
    """Raise a ValueError if the ``config.json`` beside a file of transformers is of a model that computes otherwise.

    GELU by tanh is not told apart from GELU, which timm's hosts of SigLIP compute. Without a file nothing is checked.

    Args:
        path: The file with the weights.
        model: The model that is to have them.
    """
    config = _read(Path(path).with_name("config.json"))
    heads = getattr(_part(model, "blocks.0.attn"), "num_heads", None)
    given = config.get("num_attention_heads")
    if isinstance(given, int) and heads is not None and given != heads:
        raise ValueError(
            f"{plain(path)} is of a model with {given} heads of attention (config.json), but this "
            f"{type(model).__name__} has {heads}; create the host with num_heads={given}"
        )
    activation, act = config.get("hidden_act"), _part(model, "blocks.0.mlp.act")
    if isinstance(activation, str) and act is not None and (activation == "quick_gelu") != isinstance(act, QuickGELU):
        remedy = "create the host with act_layer='quick_gelu' (in timm, of a name with clip_quickgelu)"
        if activation != "quick_gelu":
            remedy = "take the host without quickgelu in its name"
        raise ValueError(
            f"{plain(path)} is of a model that computes {shown(activation)} (config.json), but this "
            f"{type(model).__name__} computes {type(act).__name__}; {remedy}"
        )


def _part(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _read(path: Path) -> Mapping[str, object]:
    """The config of the tower for images; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(
            f"{plain(path)} cannot be read ({plain(error)}); get it anew, or move the weights to a folder without it"
        ) from error
    if not isinstance(config, dict):
        return {}
    vision = config.get("vision_config")
    return vision if isinstance(vision, dict) else config
