"""Published top-1 accuracies with their sources: what the model cards show, and what an evaluation is held against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from effvit.measure.values import Published
from effvit.protocols import Settings

__all__ = ["PublishedModel", "families", "published"]


@dataclass(frozen=True)
class PublishedModel:
    """A model with settings whose top-1 accuracy was published.

    Attributes:
        family: The method or architecture; names its model card.
        model: Its name in the zoo.
        settings: Arguments that differ from the name's own.
        top1: The figure.
        dense: That of the host without the method, by the same source; None if it gives none.
        is_off_the_shelf: The weights are the host's; else they were trained for the figure, and come from the authors.
    """

    family: str
    model: str
    settings: Settings
    top1: Published
    dense: Published | None
    is_off_the_shelf: bool


@cache
def published() -> Sequence[PublishedModel]:
    """All published figures, in the order of the model cards."""
    groups = json.loads(files("effvit.measure").joinpath("published_top1.json").read_text(encoding="utf-8"))
    return tuple(
        PublishedModel(
            group["family"],
            entry["model"],
            entry.get("settings", {}),
            Published(entry["top1"], group["data"], group["source"]),
            Published(entry["dense"], group["data"], group["source"]) if "dense" in entry else None,
            group["weights"] == "host",
        )
        for group in groups
        for entry in group["models"]
    )


def families() -> list[str]:
    """Names of the methods and architectures that have published figures."""
    return list(dict.fromkeys(model.family for model in published()))
