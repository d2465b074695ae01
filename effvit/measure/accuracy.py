"""Top-1 accuracy of models beside each other, and its place in a record of ``effvit.measure.costs.profile``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effvit.measure.values import Accuracy, Cost, Record

__all__ = ["Shown", "predicted_classes", "right_answers", "shown_models", "top1", "with_accuracies"]


@torch.inference_mode()
def top1(
    models: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]], device: str = "cpu"
) -> dict[str, float]:
    """Top-1 accuracy in percent of each model in eval mode, all on the same images (B, C, H, W) and labels (B,).

    Raises:
        ValueError: No images, or as ``right_answers``.
    """
    right, seen = dict.fromkeys(models, 0), 0
    for images, labels in batches:
        seen += len(labels)
        for name, number in right_answers(models, images.to(device), labels).items():
            right[name] += number
    if not seen:
        raise ValueError("there are no images to tell an accuracy from; give at least one batch")
    return {name: 100 * number / seen for name, number in right.items()}


def right_answers(models: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> dict[str, int]:
    """How many of the images (B, C, H, W) each model in eval mode puts into their class, labels (B,) on the CPU.

    Raises:
        ValueError: As ``predicted_classes``.
    """
    return {name: int((predicted_classes(model, images, name) == labels).sum()) for name, model in models.items()}


@torch.inference_mode()
def predicted_classes(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """(B,) int64 on the CPU, the class into which a model in eval mode puts each of the images (B, C, H, W).

    Raises:
        ValueError: Scores that are not finite, among which no largest means anything; the message has the ``name``.
    """
    scores: Tensor = model(images)
    if not scores.isfinite().all():
        raise ValueError(f"the scores of {name} must be finite, but hold NaN or infinity; use --dtype float32")
    return scores.argmax(-1).cpu()


def with_accuracies(record: Record, accuracies: Mapping[str, float], data: str, images: int | None = None) -> Record:
    """The record with accuracies measured here, by the names of its models.

    Args:
        record: Of the same models.
        accuracies: Name -> top-1 in percent.
        data: On what images.
        images: How many.
    """
    found = {name: Accuracy(value, "top-1", data, "measured here", images) for name, value in accuracies.items()}
    return replace(record, models=[replace(cost, accuracy=found[cost.name]) for cost in record.models])


class Shown(NamedTuple):
    """A model of one or several records.

    Attributes:
        model: Its cost; its accuracy is the mean over the trainings.
        weights: How its weights were trained where they are not those of the first record's models.
        accuracies: Accuracy after each training, in percent; empty if none was measured.
    """

    model: Cost
    weights: str | None
    accuracies: list[float]


def shown_models(records: Iterable[Record]) -> list[Shown]:
    """The models of records in their order, without baselines that add nothing.

    A baseline that several records share is given once, and one with the weights of a fine-tuned variant beside it, for
    whose speed-up alone it was measured, is left out. Entries of one name whose records name the same training differ
    in its seed: they are shown as one, with the costs of the first.
    """
    shown: dict[tuple[str, str | None], Shown] = {}
    baselines: set[str] = set()
    for record in records:
        weights, models = record.conditions.weights, record.models
        baseline = models[0].name
        has_same_weights = weights is not None and baseline.endswith(f", {weights}")
        is_left_out = baseline in baselines or (has_same_weights and bool(shown) and len(models) > 1)
        baselines.add(baseline)
        for model in models[is_left_out:]:
            accuracies = [] if model.accuracy is None else [model.accuracy.value]
            key = model.name, weights
            if key in shown and weights is not None and model.accuracy is not None:
                shown[key] = with_mean(shown[key], model.accuracy)
            else:
                shown.setdefault(key, Shown(model, weights, accuracies))
    return list(shown.values())


def with_mean(entry: Shown, further: Accuracy) -> Shown:
    """The entry with the accuracy of one more training and the mean of all."""
    accuracies = [*entry.accuracies, further.value]
    accuracy = replace(entry.model.accuracy or further, value=sum(accuracies) / len(accuracies))
    return Shown(replace(entry.model, accuracy=accuracy), entry.weights, accuracies)
