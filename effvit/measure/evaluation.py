"""Top-1 accuracy of models on labelled images beside what they cost, counted so that it can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effvit.data.classes import model_labels
from effvit.data.labelled import LabelledImages, digest, readable, spread
from effvit.data.preparation import data_config, image_transform
from effvit.hosts.calibration import calibrate, needs_calibration
from effvit.hosts.surface import Reduced
from effvit.measure.controls import control_names, with_controls
from effvit.measure.costs import is_reduced, macs_of, tokens_by_block
from effvit.measure.counting import Counts, KeptCounts, Prepared, count_right
from effvit.measure.processes import Processes
from effvit.measure.profiler import machine
from effvit.measure.resume import fingerprint
from effvit.measure.values import Accuracy, Evaluated, Evaluation, EvaluationConditions, Published
from effvit.messages import plain
from effvit.protocols import Json

__all__ = ["COST_IMAGES", "EvaluationOptions", "Selection", "cost_places", "evaluate", "load_labelled"]

COST_IMAGES = 16  # multiply-adds of methods that adapt to the image are a mean over these
CALIBRATION_BATCH = 128  # the authors take 2 x 64 (``effvit.calibrate``)


@dataclass(frozen=True)
class Selection:
    """Some images of a set, evenly spread over it.

    Attributes:
        images: The set.
        indices: Those taken, ascending.
    """

    images: LabelledImages
    indices: Sequence[int]

    @classmethod
    def of(cls, images: LabelledImages, number: int | None = None) -> Selection:
        """``number`` of the images, or all; a ValueError if there are not so many."""
        total = len(images)
        return cls(images, range(total) if number is None else spread(total, number, images.place))

    @property
    def text(self) -> str:
        """The set and how much of it, for records."""
        total, number = len(self.images), len(self.indices)
        return f"{plain(self.images.place)}, {number} images" + (f" of {total}" if number < total else "")


@dataclass(frozen=True)
class EvaluationOptions:
    """How models are evaluated, with no effect on what is counted but for rounding.

    Attributes:
        batch_size: Images in a batch.
        dtype: Of weights and images.
        workers: Processes that read images.
        every: Batches of each process after which counts are kept.
        processes: Those that share the images.
        kept: Where counts are kept.
    """

    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    workers: int = 0
    every: int = 20
    processes: Processes = field(default_factory=Processes)
    kept: KeptCounts = field(default_factory=lambda: KeptCounts(None))


def evaluate(
    models: Mapping[str, nn.Module],
    selection: Selection,
    options: EvaluationOptions,
    *,
    calibration: Selection | None = None,
    weights: str | None = None,
    published: Mapping[str, Published] | None = None,
    controls: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    also: Mapping[str, Json] | None = None,
    on_counts: Callable[[Counts], None] = lambda counts: None,
) -> Evaluation:
    """Evaluate classifiers on the same images, prepared for the first of them, which is the baseline.

    Args:
        models: Name -> model on the CPU; afterwards they are there again, in eval mode and the dtype of the options.
        selection: The images.
        options: How.
        calibration: Images without labels for methods that learn from them.
        weights: What the record says of the weights.
        published: Name -> what was published of the model.
        controls: What is evaluated beside every reduced form of the first model, some of
            ``effvit.measure.controls.CONTROLS``.
        seeds: Of random controls.
        also: What must be the same too if counts go on from a file.
        on_counts: Called with the counts as they grow.

    Returns:
        The record, with the models in their order.

    Raises:
        ValueError: Classes that are not the models', a method that needs images to calibrate on or has no such control,
            counts in the file that hold for something else, or as ``count_right``.
    """
    baseline, dense = next(iter(models.items()))
    input_size = data_config(dense)["input_size"]
    numbers = model_labels(selection.images, dense, baseline)
    check_classes(models)
    images = Prepared(selection.images, selection.indices, numbers, image_transform(dense))
    conditions = conditions_of(models, selection, options, calibration) | {
        "input_size": list(input_size),
        **(also or {}),
    }
    before = options.kept.begin(baseline, conditions, control_names(list(models), controls, seeds))
    device = options.processes.device
    for model in models.values():
        model.eval()
    calibrate_all(models, dense, calibration, device)
    sample = sample_of(images)
    models = with_controls(models, controls, sample, seeds)
    macs = {name: macs_of(model, input_size, sample).total for name, model in models.items()}
    tokens = {name: tokens_by_block(model, sample) for name, model in models.items()}
    for model in models.values():
        model.to(device, options.dtype)

    def keep(counts: Counts) -> None:
        options.kept.keep(baseline, conditions, counts)
        on_counts(counts)

    counts = count_right(
        models,
        images,
        before=before,
        batch_size=options.batch_size,
        dtype=options.dtype,
        workers=options.workers,
        every=options.every,
        processes=options.processes,
        on_counts=keep,
    )
    for model in models.values():
        model.cpu()
    evaluated = [
        Evaluated(
            name=name,
            host=baseline if is_reduced(model, dense) else None,
            method=model.method if isinstance(model, Reduced) else None,
            settings=dict(model.settings) if isinstance(model, Reduced) else {},
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=macs[name],
            mac_ratio=macs[baseline] / macs[name] if macs[name] else None,
            tokens=tokens[name],
            accuracy=accuracy_of(counts, name, selection),
            published=(published or {}).get(name),
        )
        for name, model in models.items()
    ]
    dtype = str(options.dtype).removeprefix("torch.")
    said = EvaluationConditions(options.batch_size, input_size, device, dtype, weights)
    return Evaluation(machine(device), said, evaluated)


def conditions_of(
    models: Mapping[str, nn.Module], selection: Selection, options: EvaluationOptions, calibration: Selection | None
) -> dict[str, Json]:
    """What counts depend on and must be the same if they go on from a file."""
    return {
        "images": len(selection.indices),
        "names, sizes and labels of the images": digest(selection.images, selection.indices),
        "weights": fingerprint(own_tensors(models)),
        "batch_size": options.batch_size,
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": options.processes.device.partition(":")[0],
        "torch": torch.__version__,
        "calibration": None if calibration is None else digest(calibration.images, calibration.indices),
    }


def accuracy_of(counts: Counts, name: str, selection: Selection) -> Accuracy:
    """Top-1 accuracy of a model, in percent."""
    return Accuracy(100 * counts.right[name] / counts.seen, "top-1", selection.text, "measured here", counts.seen)


def check_classes(models: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError unless all models have as many classes as the first."""
    counts = {name: getattr(model, "num_classes", None) for name, model in models.items()}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"models that share labels must have the same classes, got {text}; evaluate them one by one")


def own_tensors(models: Mapping[str, nn.Module]) -> list[Tensor]:
    """Weights and buffers of all models, those that several share once."""
    tensors = [tensor for model in models.values() for tensor in model.state_dict().values()]
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors}.values())


def calibrate_all(models: Mapping[str, nn.Module], dense: nn.Module, images: Selection | None, device: str) -> None:
    """Calibrate those of the models that have to be, on the device, from where they come back.

    Every process runs all batches, so that thresholds do not depend on how many processes there are.

    Raises:
        ValueError: There are such models, but no images.
    """
    learning = {name: model for name, model in models.items() if needs_calibration(model)}
    if learning and images is None:
        raise ValueError(
            f"{', '.join(learning)} must be calibrated on images before it can run; name a folder of them, best of the "
            "training set, with --calibrate, or give thresholds"
        )
    for model in learning.values():
        assert images is not None
        unlabelled = [0] * len(images.images)
        prepared = Prepared(images.images, images.indices, unlabelled, image_transform(dense))
        model.to(device)
        calibrate(model, (batch.to(device) for batch, _ in DataLoader(prepared, CALIBRATION_BATCH)))
        model.cpu()


def cost_places(total: int) -> list[int]:
    """Places of the images that costs which depend on the image are means over: a folder is sorted by class."""
    return spread(total, min(COST_IMAGES, total), "the selection")


def sample_of(images: Prepared) -> Tensor:
    """The images at ``cost_places`` as a batch."""
    return torch.stack([images[place][0] for place in cost_places(len(images))])


def load_labelled(model: nn.Module, selection: Selection, name: str) -> tuple[Tensor, Tensor]:
    """Images (B, channels, H, W) as ``evaluate`` prepares them for the model, and their classes (B,) int64.

    Args:
        model: A classifier of timm.
        selection: The images, all of which are held in memory.
        name: The model's name, for errors.

    Raises:
        ValueError: Classes that are not the model's, or images that cannot be read, as of ``evaluate``.
    """
    numbers = model_labels(selection.images, model, name)
    readable(selection.images, selection.indices)  # counts the bad ones before the first is decoded
    prepared = Prepared(selection.images, selection.indices, numbers, image_transform(model))
    images, labels = zip(*(prepared[position] for position in range(len(prepared))), strict=True)
    return torch.stack(images), torch.tensor(labels)
