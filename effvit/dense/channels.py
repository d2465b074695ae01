"""Whether necks and heads of a config take the maps that its backbone gives: the channels, and how many maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from effvit.dense.backbone import DenseBackbone
from effvit.dense.data_checks import registered
from effvit.dense.openmmlab import EffViT
from effvit.hosts.feature_pyramid import SCALES

__all__ = ["backbone_channels", "check_channels"]

# Necks that take the maps as they come, and the setting that says of how many channels each is. SimpleFeaturePyramid
# takes the last map alone, Feature2Pyramid all of one width; the others a list, one number a map.
LISTING = ("ChannelMapper", "FPN", "MultiLevelNeck", "PAFPN")
LAST_ONLY = "SimpleFeaturePyramid"
ONE_WIDTH = "Feature2Pyramid"


def backbone_channels(config: Config) -> list[int] | None:
    """Channels of the maps of a config's backbone, of which no weights are made; None for one that is not EffViT.

    Raises:
        ValueError, TypeError: As ``DenseBackbone``.
    """
    backbone = (config.get("model") or {}).get("backbone") or {}
    if registered(MODELS, backbone.get("type"), config) is not EffViT:
        return None
    with torch.device("meta"):
        built: DenseBackbone = MODELS.build(backbone)
    return built.channels


def check_channels(model: Mapping[str, Any], channels: Sequence[int]) -> None:
    """Raise a ValueError unless the neck, and the heads of a segmenter, take the maps they are given.

    Convolutions notice it only when the first image comes, and name neither the setting nor the backbone. Necks of
    other types than those of this module's tables are left alone, and so are the heads behind them.

    Args:
        model: The entry ``model`` of a config.
        channels: Of each map of its backbone.
    """
    faults = list(channel_faults(model, list(channels)))
    if faults:
        name = (model.get("backbone") or {}).get("model_name")
        raise ValueError(
            f"the maps of the backbone {name} have {', '.join(map(str, channels))} channels, but "
            + "; ".join(f"{place}={given}, set it to {wanted}" for place, given, wanted in faults)
        )


def channel_faults(model: Mapping[str, Any], channels: list[int]) -> Iterator[tuple[str, object, object]]:
    """(setting, its value, the value that fits) of whatever takes other maps."""
    neck = model.get("neck")
    if neck is not None:
        place, first = ("model.neck[0]", neck[0]) if isinstance(neck, (list, tuple)) else ("model.neck", neck)
        key, wanted = wanted_by(first, channels)
        if key is None:
            return
        yield from compared(f"{place}.{key}", first.get(key), wanted)
        width = first.get("out_channels", wanted)
        if first is not neck or not isinstance(width, int):
            return
        scales = first.get("scales") or first.get("rescales") or SCALES
        channels = [width] * first.get("num_outs", len(scales))
    for name in ("decode_head", "auxiliary_head"):
        heads = model.get(name) or []
        for index, head in enumerate([heads] if isinstance(heads, Mapping) else heads):
            place = f"model.{name}" if head is heads else f"model.{name}[{index}]"
            yield from head_faults(place, head, channels)


def wanted_by(neck: Mapping[str, Any], channels: list[int]) -> tuple[str | None, object]:
    """The setting of a neck that tells the channels of its maps, and the value that fits; None for an unknown neck."""
    if neck.get("type") == LAST_ONLY:
        return "in_channels", channels[-1]
    if neck.get("type") == ONE_WIDTH:
        return "embed_dim", channels[-1]
    return ("in_channels", channels) if neck.get("type") in LISTING else (None, None)


def head_faults(place: str, head: Mapping[str, Any], channels: list[int]) -> Iterator[tuple[str, object, object]]:
    """The faults of a head of mmseg, which takes the maps of ``in_index``, or all if it lists channels without it."""
    given = head.get("in_channels")
    if given is None:
        return
    index = head.get("in_index", -1 if isinstance(given, int) else range(len(channels)))
    chosen = [index] if isinstance(index, int) else list(index)
    if not all(-len(channels) <= each < len(channels) for each in chosen):
        yield f"{place}.in_index", index, f"places among {len(channels)} maps, or give the backbone more out_indices"
    else:
        wanted = channels[index] if isinstance(index, int) else [channels[each] for each in chosen]
        yield from compared(f"{place}.in_channels", given, wanted)


def compared(place: str, given: object, wanted: object) -> Iterator[tuple[str, object, object]]:
    """The setting, if it has another value than the wanted."""
    listed = list(given) if isinstance(given, (list, tuple)) else given
    if listed != wanted:
        yield place, listed, wanted
