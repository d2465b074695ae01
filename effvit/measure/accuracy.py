"""Top-1 accuracy of models beside each other, and its place in a record of ``effvit.measure.costs.profile``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Shown", "add_accuracies", "shown_models", "top1"]


@torch.inference_mode()
def top1(
    models: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]], device: str = "cpu"
) -> dict[str, float]:
    """Top-1 accuracy in percent of each model in eval mode, all on the same images (B, C, H, W) and labels (B,).

    Raises:
        ValueError: No images.
    """
    right, seen = dict.fromkeys(models, 0), 0
    for images, labels in batches:
        seen += len(labels)
        for name, model in models.items():
            right[name] += int((model(images.to(device)).argmax(-1).cpu() == labels).sum())
    if not seen:
        raise ValueError("there are no images to tell an accuracy from; give at least one batch")
    return {name: 100 * number / seen for name, number in right.items()}


def add_accuracies(record: dict[str, Any], accuracies: Mapping[str, float], data: str) -> None:
    """Write accuracies measured here into the record, by the names of its models; ``data`` says on what pictures."""
    for model in record["models"]:
        value = accuracies[model["name"]]
        model["accuracy"] = {"value": value, "metric": "top-1", "data": data, "origin": "measured here"}


class Shown(NamedTuple):
    """A model of records.

    Attributes:
        model: Its entry; its accuracy is the mean over the trainings.
        weights: How its weights were trained where they are not those of the first record's models.
        accuracies: Accuracy after each training, in percent; empty if none was measured.
    """

    model: Mapping[str, Any]
    weights: str | None
    accuracies: list[float]


def shown_models(records: Iterable[Mapping[str, Any]]) -> list[Shown]:
    """The models of records in their order, without baselines that add nothing.

    A baseline that several records share is given once, and one with the weights of a fine-tuned variant beside it, for
    whose speed-up alone it was measured, is left out. Entries of one name whose records name the same training differ
    in its seed: they are shown as one, with the costs of the first.
    """
    shown: dict[tuple[str, str | None], Shown] = {}
    baselines: set[str] = set()
    for record in records:
        weights, models = record["conditions"].get("weights"), record["models"]
        baseline = models[0]["name"]
        has_same_weights = weights is not None and baseline.endswith(f", {weights}")
        is_left_out = baseline in baselines or (has_same_weights and bool(shown) and len(models) > 1)
        baselines.add(baseline)
        for model in models[is_left_out:]:
            accuracies = [] if model["accuracy"] is None else [model["accuracy"]["value"]]
            key = model["name"], weights
            if key in shown and weights is not None and accuracies:
                shown[key] = with_mean(shown[key], accuracies)
            else:
                shown.setdefault(key, Shown(model, weights, accuracies))
    return list(shown.values())


def with_mean(entry: Shown, further: Sequence[float]) -> Shown:
    """The entry with further accuracies and the mean of all of them."""
    accuracies = [*entry.accuracies, *further]
    accuracy = entry.model["accuracy"] | {"value": sum(accuracies) / len(accuracies)}
    return Shown({**entry.model, "accuracy": accuracy}, entry.weights, accuracies)
