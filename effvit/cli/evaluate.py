"""``effvit evaluate``: top-1 of models and their reduced variants on labelled images, beside published figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from effvit.cli import options
from effvit.cli.images import look_at
from effvit.cli.models import RANDOM_WEIGHTS, check_device, create, has_random_weights
from effvit.cli.output import output, progress, say
from effvit.cli.paper import ALL, PaperGroup, paper_groups
from effvit.data.opening import FORMS, open_labelled, open_unlabelled
from effvit.data.preparation import data_config, load_images
from effvit.measure.accuracy import with_accuracies
from effvit.measure.controls import CONTROLS, with_controls
from effvit.measure.costs import profile
from effvit.measure.counting import Counts, KeptCounts
from effvit.measure.evaluation import EvaluationOptions, Selection, cost_places, evaluate
from effvit.measure.processes import Processes, joined
from effvit.measure.records import add_record, as_json, as_object, read_records
from effvit.measure.values import Evaluation, Record
from effvit.measure.variants import build, list_variants, parse_setting, reduced
from effvit.messages import one_line, plain
from effvit.show.tables import print_accuracies, print_evaluations

__all__ = ["add_command"]

CALIBRATION_IMAGES = 512


class Arguments(options.WeightArguments, options.VariantArguments, options.MachineArguments, options.ImageArguments):
    """Parsed arguments of ``effvit evaluate``."""

    model: str | None
    data: Path
    paper: list[str]
    checkpoints: Path | None
    model_kwargs: list[str]
    baseline: str | None
    weights: str | None
    limit: int | None
    control: list[str]
    seeds: list[int]
    calibrate: Path | None
    calibration_images: int
    batch_size: int
    workers: int
    rounds: int
    state: Path | None
    every: int
    json: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "evaluate",
        parents=[options.weights(), options.entry(), options.variants(), options.machine(), options.images()],
        help="top-1 accuracy on labelled images",
        description="Measure the top-1 accuracy of MODEL and its variants by --method, or repeat published figures.",
    )
    command.add_argument(
        "model",
        nargs="?",
        type=options.model_name,
        metavar="MODEL",
        help="any name of timm; with --paper a pattern of names",
    )
    command.add_argument("--data", type=Path, required=True, metavar="PATH", help=FORMS)
    command.add_argument(
        "--control",
        nargs="+",
        default=[],
        choices=CONTROLS,
        help="beside each method: its token counts chosen without a look at the image, or MODEL on smaller images",
    )
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of the random controls")
    command.add_argument(
        "--paper",
        nargs="+",
        default=[],
        type=options.method_name,
        metavar="NAME",
        help=f"methods, architectures or {ALL}: what was published",
    )
    command.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="local weights for --paper, named after models"
    )
    command.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="of timm.create_model")
    command.add_argument(
        "--baseline",
        type=options.model_name,
        metavar="NAME",
        help="pretrained model to compare with in place of MODEL",
    )
    command.add_argument("--weights", metavar="TEXT", help="how the checkpoint was trained, put behind the names")
    command.add_argument("--limit", type=int, metavar="N", help="only so many images, evenly spread over the set")
    command.add_argument("--calibrate", type=Path, metavar="PATH", help="images for methods that learn thresholds")
    command.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES, metavar="N", help="of these")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--workers", type=int, default=0, help="processes that read images (default: none)")
    command.add_argument("--rounds", type=int, default=0, help="measure the speed too, in so many rounds")
    command.add_argument("--state", type=options.output_file, metavar="FILE", help="keep counts there, go on from them")
    command.add_argument("--every", type=int, default=20, metavar="N", help="batches after which counts are kept")
    command.add_argument("--json", type=options.output_file, metavar="FILE", help="add the record to the list there")
    command.set_defaults(run=run_evaluate)


def run_evaluate(arguments: Arguments) -> int:
    """Print accuracies and write their record; returns 1 if a model with a published figure could not be had."""
    check_arguments(arguments)
    if arguments.json is not None and arguments.json.exists():
        read_records(arguments.json)  # refused before the measurement, not after it
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with joined(arguments.device) as processes:
        groups = groups_of(arguments)
        kept = KeptCounts(arguments.state, is_writer=processes.rank == 0)
        kept.check_groups([group.name for group in groups])
        selection = looked_at(Selection.of(open_labelled(arguments.data), arguments.limit), arguments.skip_bad)
        calibration = None
        if arguments.calibrate is not None:
            chosen = Selection.of(open_unlabelled(arguments.calibrate), arguments.calibration_images)
            calibration = looked_at(chosen, arguments.skip_bad)
        evaluations: list[Evaluation] = []
        failures: dict[str, str] = {}
        records: list[Evaluation | Record] = []
        try:
            for group in groups:
                models = made(group, processes, failures, is_paper=bool(arguments.paper))
                if models is None:
                    continue
                found = evaluated(models, group, selection, calibration, arguments, processes, kept)
                evaluations.append(found)
                if processes.rank == 0:
                    records.append(with_speed(found, models, selection, arguments) if arguments.rounds else found)
        except KeyboardInterrupt:
            if processes.rank == 0:
                if arguments.state is None and records:  # which the state would add once more
                    report(arguments, evaluations, records, failures)
                say(interrupted(arguments, len(records), len(groups)))
            raise
        if processes.rank == 0:
            report(arguments, evaluations, records, failures)
        kept.close()
    return int(bool(failures))


def check_arguments(arguments: Arguments) -> None:
    """Raise a ValueError for arguments that do not go together, or are out of range."""
    check_device(arguments.device)
    for name in ("batch_size", "every", "calibration_images"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    for name in ("workers", "rounds"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(arguments, name)}")
    if not arguments.paper and arguments.model is None:
        raise ValueError("name a MODEL, or with --paper what to repeat published figures of")
    if arguments.settings and not arguments.method:
        raise ValueError("settings belong to a method: name one with --method")
    if arguments.control and not (arguments.method or arguments.paper):
        raise ValueError("a control belongs to a method: name one with --method")
    if arguments.control and arguments.baseline is not None:
        raise ValueError("a control is of the first model, which --baseline puts another in place of; leave out one")
    if arguments.checkpoints is not None and not arguments.paper:
        raise ValueError("--checkpoints holds weights for --paper; of one MODEL they are given with --checkpoint FILE")
    if arguments.paper:
        own = ("method", "control", "pretrained", "checkpoint", "key", "model_kwargs", "baseline", "weights", "rounds")
        given = [name for name in own if getattr(arguments, name)]
        if given:
            raise ValueError(
                f"--paper brings models, settings and weights along, so --{given[0].replace('_', '-')} has no place "
                "beside it; leave out one of the two"
            )


def groups_of(arguments: Arguments) -> list[PaperGroup]:
    """What is evaluated on the same images: MODEL with its variants, or the models behind published figures."""
    if arguments.paper:
        return paper_groups(arguments.paper, arguments.model or "*", arguments.checkpoints)
    name = arguments.baseline or named(str(arguments.model), arguments)
    return [PaperGroup(name, partial(models_of, arguments), {})]


def named(name: str, arguments: Arguments) -> str:
    """The name of a model followed by how its weights were trained, where that is said."""
    return name if arguments.weights is None else f"{name}, {arguments.weights}"


def models_of(arguments: Arguments) -> dict[str, nn.Module]:
    """MODEL and its variants by name, after the baseline where one is named; further variants belong here."""
    kwargs = dict(parse_setting(text, "--model-kwargs") for text in arguments.model_kwargs)
    dense = create(str(arguments.model), arguments, options=kwargs)
    variants = list_variants(arguments.method, [parse_setting(text) for text in arguments.settings])
    found: dict[str, nn.Module] = {str(arguments.model): dense, **reduced(dense, variants)}
    models = {named(name, arguments): model for name, model in found.items()}
    if arguments.baseline is None:
        return models
    if arguments.baseline in models:
        raise ValueError(
            f"--baseline {arguments.baseline} has the name of a model beside it; say with --weights TEXT how the other "
            "was trained"
        )
    return {arguments.baseline: build(arguments.baseline, {}, pretrained=True).eval(), **models}


def looked_at(selection: Selection, skip_bad: bool) -> Selection:
    """Those of the images that can be read; errors as of ``look_at``."""
    return replace(selection, indices=look_at(selection.images, selection.indices, skip_bad))


def made(
    group: PaperGroup, processes: Processes, failures: dict[str, str], is_paper: bool
) -> dict[str, nn.Module] | None:
    """The models of a group; None and an entry among the failures if a published one has no weights."""
    models, reason = None, None
    try:
        models = group.make()
    except (ValueError, OSError) as error:
        if not is_paper:
            raise
        reason = one_line(error)
    if processes.summed([int(models is None)])[0]:  # all leave it out, or none
        failures[group.name] = reason or "another process could not make it"
        return None
    return models


def evaluated(
    models: dict[str, nn.Module],
    group: PaperGroup,
    selection: Selection,
    calibration: Selection | None,
    arguments: Arguments,
    processes: Processes,
    kept: KeptCounts,
) -> Evaluation:
    """The record of a group, with progress on the way."""
    how = EvaluationOptions(
        batch_size=arguments.batch_size,
        dtype=getattr(torch, arguments.dtype),
        workers=arguments.workers,
        every=arguments.every,
        processes=processes,
        kept=kept,
    )
    total = len(selection.indices)
    with progress() as bars:
        bar = bars.add(group.name, total)

        def on_counts(counts: Counts) -> None:
            so_far = f"top-1 {100 * next(iter(counts.right.values())) / counts.seen:.2f} % so far"
            if processes.rank == 0:
                bar.reach(counts.seen, f"{group.name}: {counts.seen} of {total} images, {so_far}")

        return evaluate(
            models,
            selection,
            how,
            calibration=calibration,
            weights=weights_text(arguments),
            published=group.published,
            controls=arguments.control,
            seeds=arguments.seeds,
            also={"model-kwargs": as_json(sorted(arguments.model_kwargs))},
            on_counts=on_counts,
        )


def weights_text(arguments: Arguments) -> str | None:
    """What a record says of the weights."""
    if arguments.weights is not None or arguments.paper:
        return arguments.weights
    if arguments.checkpoint is not None:
        return plain(arguments.checkpoint.name)
    return "pretrained" if arguments.pretrained else "random weights"


def interrupted(arguments: Arguments, known: int, total: int) -> str:
    """What becomes of an evaluation that was stopped."""
    if arguments.state is not None:
        return f"the same command goes on from {plain(arguments.state)}"
    if not known:
        return "nothing of the evaluation is kept; with --state FILE it would go on from there"
    place = "was printed" if arguments.json is None else f"is in {plain(arguments.json)}"
    return f"{known} of {total} evaluations were complete, which {place}; with --state FILE the rest would go on"


def with_speed(found: Evaluation, models: dict[str, nn.Module], selection: Selection, arguments: Arguments) -> Record:
    """A record of costs with measured speed, and the accuracies found."""
    first = next(iter(models.values()))
    places = cost_places(len(selection.indices))
    sample = load_images(first, [selection.images.read(selection.indices[place]) for place in places])
    record = profile(
        with_controls(models, arguments.control, sample, arguments.seeds),
        data_config(first)["input_size"],
        arguments.batch_size,
        images=sample,
        image_names=[f"{len(sample)} images of {plain(selection.images.place)}"],
        rounds=arguments.rounds,
        threads=arguments.threads,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
    )
    accuracies = {model.name: model.accuracy.value for model in found.models}
    return with_accuracies(record.with_weights(arguments.weights), accuracies, selection.text, len(selection.indices))


def report(
    arguments: Arguments,
    evaluations: Sequence[Evaluation],
    records: Sequence[Evaluation | Record],
    failures: dict[str, str],
) -> None:
    """Print the tables and write the records."""
    console = output()
    if not arguments.paper and has_random_weights(arguments):
        console.print(f"{arguments.model} has {RANDOM_WEIGHTS}", style="yellow")
    if evaluations:
        print_evaluations(console, evaluations)
    for record in records:
        if isinstance(record, Record):
            print_accuracies(console, record)
    for name, reason in failures.items():
        console.print(f"not measured: {name}: {reason}", style="yellow", soft_wrap=True)
    if arguments.json is not None:
        for record in records:
            add_record(arguments.json, as_object(record))
