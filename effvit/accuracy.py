"""Top-1 accuracy of models beside each other, and its place in a record of ``effvit.costs.profile``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Shown", "add_accuracies", "shown_models", "top1"]


@torch.inference_mode()
def top1(
    models: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]], device: str = "cpu"
) -> dict[str, float]:
    """Top-1 accuracy in percent of each model, all on the same batches of (images, labels)."""
    right, seen = dict.fromkeys(models, 0), 0
    for images, labels in batches:
        seen += len(labels)
        for name, model in models.items():
            right[name] += int((model(images.to(device)).argmax(-1).cpu() == labels).sum())
    return {name: 100 * number / seen for name, number in right.items()}


def add_accuracies(record: dict[str, Any], accuracies: Mapping[str, float], data: str) -> None:
    """Write accuracies measured here into the record, by the names of its models; ``data`` says on what pictures."""
    for model in record["models"]:
        value = accuracies[model["name"]]
        model["accuracy"] = {"value": value, "metric": "top-1", "data": data, "origin": "measured here"}


class Shown(NamedTuple):
    """A model of records, and how its weights were trained where they are not those of the first record's models."""

    model: Mapping[str, Any]
    weights: str | None


def shown_models(records: Iterable[Mapping[str, Any]]) -> list[Shown]:
    """The models of records in their order, without baselines that add nothing.

    A baseline that several records share is given once, and one with the weights of a fine-tuned variant beside it, for
    whose speed-up alone it was measured, is left out.
    """
    shown, baselines = [], set()
    for record in records:
        weights, models = record["conditions"].get("weights"), record["models"]
        baseline = models[0]["name"]
        is_known = baseline in baselines or (weights is not None and len(models) > 1)
        baselines.add(baseline)
        shown += [Shown(model, weights) for model in models[is_known:]]
    return shown
