"""Measure what each method's choice of tokens is worth beside controls that do not look at the image.

    python tools/get_data.py emoji fashion_mnist photographs
    python tools/measure_choices.py cutouts --checkpoint vit_nano_patch8_96.safetensors --weights "48 epochs" \
      --json docs/benchmarks/cutouts_choices_cpu.json
    python tools/measure_choices.py fashion_mnist --pretrained --json docs/benchmarks/fashion_choices_cpu.json

Nothing is trained: all methods at five settings each work on the weights of the dense model, DyMU with thresholds
calibrated on training images. Beside each stand the controls of effvit.measure.controls: patches chosen at random (one
model for each seed) or evenly spaced at equal counts, and the dense model on smaller images at equal multiply-adds. On
some of the images it is also measured what is kept of the object and whether predictions stay under shifts. With
--rounds the speeds of all are measured too, side by side, when everything else is done.

The same command goes on after a kill from the last method that was complete (--state, by default beside --json).
tools/make_accuracy_page.py makes table and plot of the file, effvit report shows it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from data.choice_sets import CALIBRATION_IMAGES, ChoiceSet, cutouts, fashion_mnist
from data.scenes import patch_coverage
from data.sources import default_root
from torch import Tensor, nn

from effvit.cli.models import create, has_random_weights
from effvit.cli.options import WeightArguments, entry, weights
from effvit.data.labelled import spread
from effvit.data.preparation import data_config, load_images
from effvit.hosts.surface import Reduced
from effvit.measure.accuracy import with_accuracies
from effvit.measure.choices import choices_of
from effvit.measure.controls import CONTROLS, Resized, with_controls
from effvit.measure.costs import profile
from effvit.measure.evaluation import COST_IMAGES, EvaluationOptions, Selection, calibrate_all, evaluate
from effvit.measure.json_files import read_json, write_json
from effvit.measure.object_patches import mean_object_patches
from effvit.measure.records import as_json, as_object, check_record, evaluation_of, write_records
from effvit.measure.resume import fingerprint, refuse_differences
from effvit.measure.shifts import SHIFTS, central_crop, shift_consistency
from effvit.measure.values import Evaluated, Evaluation, Record
from effvit.measure.variants import list_variants, reduced
from effvit.messages import plain, run_command
from effvit.protocols import Json, Setting, Settings
from effvit.schedule import check_count

__all__ = ["LADDERS", "main", "measure"]

RATES: list[Setting] = [0.9, 0.8, 0.7, 0.6, 0.5]
PRUNING: list[Setting] = [0.98, 0.95, 0.92, 0.9, 0.85]  # in nearly every block
CLUSTERS: list[Setting] = [0.8, 0.6, 0.4, 0.2, 0.1]
SHARED: dict[str, tuple[str, list[Setting]]] = {
    "evit": ("keep_rate", RATES),
    "ats": ("keep_rate", RATES),
    "zero_tprune": ("keep_rate", PRUNING),
    "expedite": ("keep_rate", CLUSTERS),
    "hot": ("keep_rate", RATES),
    "pitome": ("keep_rate", [0.97, 0.95, 0.93, 0.9, 0.85]),
    "cubistmerge": ("reduce_at", [[9], [7], [5], [3], [1]]),
    "vid_tldr": ("r", [[0.15, 0.05], [0.25, 0.1], [0.35, 0.15], [0.45, 0.2], [0.5, 0.4]]),
    # Beside these blocks, thresholds change little: 0.8 to 0.98 are 80 to 82 % of the multiply-adds on Fashion-MNIST.
    "algm": ("reduce_at", [[0, 8], [0, 4], [0, 2, 4], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
    "dpcknn": ("keep_rate", RATES),
    "kmedoids": ("keep_rate", RATES),
    "atc": ("keep_rate", RATES),
    "radial": ("keep_rate", RATES),
    "diffrate": ("preset", [f"deit_tiny_{gmacs}" for gmacs in ("1.0", "0.9", "0.8", "0.7", "0.6")]),
}
# Set -> method -> a setting and its values. Those counted in tokens are about the same shares of 144 and of 49 patches.
LADDERS: dict[str, dict[str, tuple[str, list[Setting]]]] = {
    "cutouts": {
        **SHARED,
        "tome": ("r", [4, 8, 10, 12, 16]),
        "mctf": ("r", [4, 8, 10, 12, 16]),
        "gtp": ("num_prop", [2, 4, 6, 8, 10]),
        "dymu": ("r_total", [36, 60, 84, 108, 132]),
    },
    "fashion_mnist": {
        **SHARED,
        "tome": ("r", [1, 2, 3, 4, 6]),
        "mctf": ("r", [1, 2, 3, 4, 6]),
        "gtp": ("num_prop", [[1, 2] * 6, 1, 2, 3, 4]),
        "dymu": ("r_total", [12, 20, 28, 36, 44]),
    },
}
STATE = "rows of measure_choices, 1"


class Arguments(WeightArguments):
    """Parsed arguments."""

    set: str
    weights: str | None
    methods: list[str] | None
    images: int
    detail_images: int
    rounds: int
    seeds: list[int]
    batch_size: int
    threads: int
    root: Path
    json: Path
    state: Path | None


class Details(NamedTuple):
    """Images for what is measured beside accuracy.

    Attributes:
        wide: (B, channels, H + 2 margin, W + 2 margin), prepared for the model; the margin is the largest shift.
        coverage: (B, patches) share of each patch of the middle that the object covers; None where it is not known.
    """

    wide: Tensor
    coverage: Tensor | None


class Measurement(NamedTuple):
    """What is the same for all rows.

    Attributes:
        name: Of the dense model.
        dense: The model.
        selection: Test images.
        calibration: Training images.
        details: A part of the test images.
        seeds: Of random controls.
        batch_size: Images in a batch.
        weights: What the record says of the weights.
    """

    name: str
    dense: nn.Module
    selection: Selection
    calibration: Selection
    details: Details
    seeds: Sequence[int]
    batch_size: int
    weights: str

    def dense_row(self) -> Evaluation:
        """The dense model alone."""
        found = self._evaluated({self.name: self.dense})
        return replace(found, models=[self._with_consistency(found.models[0], self.dense)])

    def rows(self, reduced_models: Mapping[str, Reduced]) -> list[Evaluated]:
        """Reduced models, each with its controls behind it."""
        calibrate_all(reduced_models, self.dense, self.calibration, "cpu")
        models = with_controls({self.name: self.dense, **reduced_models}, CONTROLS, self._sample(), self.seeds)
        rows = self._evaluated(models).models[1:]
        # On smaller images, patches are others: nothing more is measured of that control.
        rows = [
            row if isinstance(models[row.name], Resized) else self._with_object(row, models[row.name]) for row in rows
        ]
        return [self._with_consistency(row, models[row.name]) if row.name in reduced_models else row for row in rows]

    def speeds(self, reduced_models: Mapping[str, Reduced], rounds: int, evaluation: Evaluation) -> Record:
        """Costs of the dense and the reduced models, speeds side by side in so many rounds, and accuracies found."""
        calibrate_all(reduced_models, self.dense, self.calibration, "cpu")
        sample = self._sample()
        record = profile(
            {self.name: self.dense, **reduced_models},
            data_config(self.dense)["input_size"],
            self.batch_size,
            images=sample,
            image_names=[f"{len(sample)} of {self.selection.text}"],
            ideal=False,
            rounds=rounds,
            threads=torch.get_num_threads(),
        ).with_weights(self.weights)
        accuracies = {model.name: model.accuracy.value for model in evaluation.models}
        return with_accuracies(record, accuracies, self.selection.text, len(self.selection.indices))

    def _sample(self) -> Tensor:
        """(B, channels, H, W) the images over which costs are means."""
        first = self.selection.indices[:COST_IMAGES]
        return load_images(self.dense, [self.selection.images.read(index) for index in first])

    def _evaluated(self, models: Mapping[str, nn.Module]) -> Evaluation:
        options = EvaluationOptions(batch_size=self.batch_size)
        return evaluate(models, self.selection, options, weights=self.weights)

    def _with_object(self, own: Evaluated, model: nn.Module) -> Evaluated:
        """The reduced model with what it keeps of the object, where that is known."""
        wide, coverage = self.details
        if coverage is None:
            return own
        middle = central_crop(wide, max(SHIFTS)).split(self.batch_size)
        batches = zip(middle, coverage.split(self.batch_size), strict=True)
        return replace(own, object_patches=mean_object_patches(model, batches))

    def _with_consistency(self, own: Evaluated, model: nn.Module) -> Evaluated:
        """The model with how its predictions stay when the images are shifted."""
        return replace(own, consistency=shift_consistency(model, self.details.wide.split(self.batch_size)))


def details_of(dense: nn.Module, images: ChoiceSet, indices: Sequence[int]) -> Details:
    """Those images with a margin, under the model's own mean and standard deviation, and no change of size."""
    margin = max(SHIFTS)
    pixels, masks = images.wide(indices, margin)
    config = data_config(dense)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    patch: tuple[int, int] = dense.patch_embed.patch_size  # type: ignore[union-attr, assignment]
    coverage = None if masks is None else patch_coverage(central_crop(masks, margin), patch[0])
    return Details((pixels / 255 - mean) / std, coverage)


class KeptRows:
    """Complete rows in a file, from which an interrupted measurement goes on.

    Args:
        path: The file, read now if there is one.
        conditions: What must be the same for rows to hold.

    Raises:
        ValueError: A file that something else wrote, or rows measured under other conditions.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Json]) -> None:
        self.path = path
        self.conditions = conditions
        self.evaluation: Evaluation | None = None
        if path.exists():
            self.evaluation = self._read()

    def _read(self) -> Evaluation:
        content = read_json(self.path)
        conditions = content.get("conditions") if isinstance(content, dict) else None
        if not isinstance(content, dict) or content.get("state") != STATE or not isinstance(conditions, dict):
            raise ValueError(
                f"{plain(self.path)} must hold what tools/measure_choices.py --state wrote, and does not; name another "
                "file, this one is left as it is"
            )
        refuse_differences(
            {name: (conditions.get(name), now) for name, now in self.conditions.items()},
            f"the measurement in {plain(self.path)} was begun",
            "give what it was begun with, or name another --state; this one is left as it is",
        )
        check_record(content.get("record"), plain(self.path), (Evaluation.kind,))
        return evaluation_of(content["record"])

    def keep(self, evaluation: Evaluation) -> None:
        """Put all rows so far into the file, or leave it as it was."""
        self.evaluation = evaluation
        record = as_object(evaluation)
        write_json(self.path, {"state": STATE, "conditions": dict(self.conditions), "record": record})


def measure(
    measurement: Measurement,
    models: Mapping[str, Reduced],
    rows: KeptRows,
    on_rows: Callable[[Evaluation, Collection[str]], None] = lambda evaluation, names: None,
) -> Evaluation:
    """All rows: the dense model, then each reduced one with its controls; those in the file are not measured again.

    Args:
        measurement: What is the same for all.
        models: Name -> reduced form of the dense model.
        rows: Where rows are kept.
        on_rows: Called with all rows so far and the names of those measured last, but for controls.
    """
    evaluation = rows.evaluation
    if evaluation is None:
        evaluation = measurement.dense_row()
        rows.keep(evaluation)
        on_rows(evaluation, [measurement.name])
    for _, group in groupby(models.items(), key=lambda named: named[1].method):
        missing = {name: model for name, model in group if name not in [own.name for own in evaluation.models]}
        if missing:  # all of a method: the dense model is evaluated beside them once
            evaluation = replace(evaluation, models=[*evaluation.models, *measurement.rows(missing)])
            rows.keep(evaluation)
            on_rows(evaluation, missing)
    return evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[weights(), entry()]
    )
    parser.add_argument("set", choices=LADDERS)
    parser.add_argument("--weights", metavar="TEXT", help="how the checkpoint was trained (default: its name)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--images", type=int, default=2000, help="test images of a row (default: 2000)")
    parser.add_argument(
        "--detail-images", type=int, default=250, metavar="N", help="of these, for objects and shifts (default: 250)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="measure speeds too, in so many rounds (default: none)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of random controls")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--root", type=Path, default=default_root(), help="what get_data.py fetched into")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write the record")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep rows there, and go on from them")
    arguments = parser.parse_args(argv, Arguments())
    return run_command("measure_choices", lambda: run(arguments))


def run(arguments: Arguments) -> None:
    """Measure and write the record, with a line for each row on the way."""
    if has_random_weights(arguments):
        raise ValueError("a choice of tokens means something with trained weights: give --checkpoint or --pretrained")
    torch.set_num_threads(check_count("--threads", arguments.threads, 1))
    rounds = check_count("--rounds", arguments.rounds)
    variants = variants_of(arguments.set, arguments.methods)
    images = opened(arguments)
    dense = create(images.model, arguments)
    selection = Selection.of(images.test, check_count("--images", arguments.images, 1))
    chosen = spread(len(selection.indices), check_count("--detail-images", arguments.detail_images, 1), selection.text)
    name = "pretrained" if arguments.checkpoint is None else arguments.checkpoint.name
    measurement = Measurement(
        images.model,
        dense,
        selection,
        Selection.of(images.training, CALIBRATION_IMAGES),
        details_of(dense, images, [selection.indices[place] for place in chosen]),
        arguments.seeds,
        check_count("--batch-size", arguments.batch_size, 1),
        arguments.weights or plain(name),
    )
    state = arguments.state or arguments.json.with_suffix(".state.json")
    models = reduced(dense, variants)
    rows = KeptRows(state, conditions_of(measurement, list(models)))
    evaluation = measure(measurement, models, rows, report_rows)
    write_records(arguments.json, [evaluation, *([measurement.speeds(models, rounds, evaluation)] if rounds else [])])
    state.unlink()


def variants_of(name: str, methods: Sequence[str] | None) -> list[tuple[str, Settings]]:
    """Method and settings of every row on a set.

    Raises:
        ValueError: A method that has no ladder.
    """
    ladders = LADDERS[name]
    if unknown := [method for method in methods or () if method not in ladders]:
        raise ValueError(f"--methods must be of {', '.join(ladders)}, got {unknown[0]!r}")
    return [
        variant
        for method in methods or ladders
        for variant in list_variants([method], [(ladders[method][0], value) for value in ladders[method][1]])
    ]


def opened(arguments: Arguments) -> ChoiceSet:
    """The set that was asked for."""
    if arguments.set == "cutouts":
        return cutouts(arguments.root, check_count("--images", arguments.images, 1))
    return fashion_mnist(arguments.root)


def conditions_of(measurement: Measurement, models: Sequence[str]) -> dict[str, Json]:
    """What must be the same for rows of an earlier run to hold, with the names of the reduced models."""
    return {
        "models": [measurement.name, *models],
        "images": measurement.selection.text,
        "pixels": fingerprint([measurement.details.wide]),
        "weights": fingerprint(measurement.dense.state_dict().values()),
        "text on the weights": measurement.weights,
        "seeds": as_json(measurement.seeds),
        "batch_size": measurement.batch_size,
        "torch": torch.__version__,
    }


def report_rows(evaluation: Evaluation, names: Collection[str]) -> None:
    """Print what the rows of these names say."""
    reduced_models = evaluation.models[1:]
    gains = {choice.model.name: choice.gains for choice in choices_of(evaluation)} if reduced_models else {}
    for model in evaluation.models:
        if model.name in names:
            beside = "".join(f", {gain:+.2f} to {control}" for control, gain in gains.get(model.name, {}).items())
            print(f"{model.name}: {model.accuracy.value:.2f} %{beside}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
