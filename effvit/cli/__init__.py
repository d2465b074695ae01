"""The ``effvit`` command: list, profile, visualize, report, convert and demo."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

import effvit
from effvit.cli.demo import SEEING, SHOWN, demo_variants
from effvit.hosts._checkpoint import convert_checkpoint
from effvit.hosts.host import ReducedHost, check_model_name
from effvit.measure.accuracy import add_accuracies, top1
from effvit.measure.costs import profile
from effvit.measure.records import parse_json, read_json, write_json
from effvit.measure.tune import TUNED, tune
from effvit.messages import plain, run_command, shown
from effvit.reducers import METHODS, DyMU
from effvit.show.pictures import Labelled, fashion_classes, fashion_pictures, find_pictures, photographs
from effvit.show.plots import plot_accuracy, plot_costs
from effvit.show.report import write_report
from effvit.show.tables import describe, print_accuracies, print_record, print_tuning, write_csv
from effvit.show.visualize import data_config, load_images, stack, token_figure, token_record

__all__ = ["main"]

RANDOM_WEIGHTS = "random weights: token choices are not meaningful"
IMAGES = "a file, or installed pictures by name: 'fashion_mnist:sneaker-*', photographs:coffee"
DTYPES = ("float32", "bfloat16", "float16")
PIPE_WIDTH = 200  # columns where the output is not a terminal
MOST_DROPPED = 200  # entries of a checkpoint that are named without --keys; an official one drops less than 50
LONGEST_LINE = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after an error the caller can mend."""
    arguments = parser().parse_args(argv)
    return run_command("effvit", lambda: arguments.run(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands; ``run`` of the parsed ones is the function to call."""
    root = argparse.ArgumentParser("effvit", description="Token-sparsifying vision transformers on timm.")
    root.add_argument("--version", action="version", version=f"effvit {effvit.__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    weights = argparse.ArgumentParser(add_help=False)
    source = weights.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of the dense host")
    source.add_argument(
        "--pretrained", action="store_true", help="timm's weights (asks the network unless the package has them)"
    )
    entry = argparse.ArgumentParser(add_help=False)
    entry.add_argument(
        "--key", metavar="NAME", help="entry of the checkpoint with the weights, where it has several, e.g. teacher"
    )
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="a setting for every method that has it, in JSON; given again: a variant for each value",
    )
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    machine.add_argument("--device", default="cpu")
    machine.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and images")

    command = commands.add_parser("list", help="methods with their settings, and the zoo's model names")
    command.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, e.g. 'evit*'")
    command.set_defaults(run=run_list)

    command = commands.add_parser(
        "profile",
        parents=[weights, entry, settings, machine],
        help="parameters, multiply-adds and speed",
        description="Compare each MODEL with its variants by --method; without one, all with the first.",
    )
    command.add_argument("models", nargs="+", metavar="MODEL", help="any name of timm or of the zoo")
    command.add_argument("--method", nargs="+", default=[], metavar="NAME", help="methods to reduce each MODEL with")
    command.add_argument("--keep-rate", nargs="+", type=float, default=[], metavar="RATE", help="one variant for each")
    command.add_argument("--img-size", nargs="+", type=parse_size, metavar="SIZE", help="side or HxW; each is measured")
    command.add_argument("--batch-size", nargs="+", type=int, default=[8], metavar="N", help="each is measured")
    command.add_argument("--images", nargs="+", metavar="IMAGE", help=f"pictures in place of noise: {IMAGES}")
    command.add_argument("--rounds", type=int, default=10)
    command.add_argument(
        "--precision", type=float, metavar="SHARE", help="more rounds until every interval is narrower, e.g. 0.02"
    )
    command.add_argument("--max-rounds", type=int, default=200, help="limit for --precision")
    command.add_argument("--compile", action="store_true", help="run through torch.compile")
    command.add_argument("--cuda-graphs", action="store_true", help="replay CUDA graphs")
    command.add_argument("--breakdown", action="store_true", help="time attention, MLP and reduction of every block")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too")
    command.set_defaults(run=run_profile)

    command = commands.add_parser(
        "visualize", parents=[weights, entry, settings], help="pictures of the tokens that photographs leave"
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help=IMAGES)
    command.add_argument("--model", required=True, metavar="NAME", help="the dense host, or a model to show as it is")
    command.add_argument("--method", nargs="+", default=[], metavar="NAME", help="methods to reduce the host with")
    command.add_argument("--out", required=True, type=Path, metavar="DIR")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the tokens there too, for effvit report")
    command.set_defaults(run=run_visualize)

    command = commands.add_parser("report", help="one HTML file of the results of profile and visualize")
    command.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="files written with --json")
    command.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    command.set_defaults(run=run_report)

    command = commands.add_parser(
        "tune",
        parents=[weights, entry, machine],
        help="the setting that reaches a speed-up here with the least change of the outputs",
        description="Measure settings of several methods on this machine, and compare their outputs on the IMAGEs.",
    )
    command.add_argument("model", metavar="MODEL", help="a plain ViT of timm")
    command.add_argument("images", nargs="+", metavar="IMAGE", help=IMAGES)
    aim = command.add_mutually_exclusive_group(required=True)
    aim.add_argument("--speedup", type=float, metavar="FACTOR", help="wished speed-up over MODEL, e.g. 1.5")
    aim.add_argument("--gmacs", type=float, help="billions of multiply-adds of one image not to exceed")
    command.add_argument("--method", nargs="+", default=TUNED, metavar="NAME", help="methods to choose from")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--rounds", type=int, default=8, help="of each step of the search")
    command.add_argument("--final-rounds", type=int, default=40, help="of the measurement that decides")
    command.add_argument("--json", type=Path, metavar="FILE", help="write model_name and settings for timm there")
    command.set_defaults(run=run_tune)

    command = commands.add_parser(
        "convert",
        parents=[entry, settings],
        help="an official checkpoint under our names, and what was left out of it",
        description="Read FILE (.pth without code, or .safetensors) into MODEL strictly, say what became of its "
        "entries, and write it as .safetensors.",
    )
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--model", required=True, metavar="NAME", help="the model it was saved from")
    command.add_argument("--out", type=Path, metavar="FILE", help="without it the file is only checked")
    command.add_argument("--keys", action="store_true", help="name every entry, not only the dropped ones")
    command.set_defaults(run=run_convert)

    command = commands.add_parser(
        "demo", parents=[weights, entry], help="all methods on pictures that are installed already, offline"
    )
    command.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    command.add_argument("--model", default="deit_small_patch16_224", metavar="NAME")
    command.set_defaults(run=run_demo)
    return root


# -- commands --------------------------------------------------------------------------------------------


def run_list(arguments: argparse.Namespace) -> None:
    """Print the methods and zoo names that match the pattern."""
    methods = effvit.list_methods(arguments.pattern)
    names = effvit.list_models(arguments.pattern)
    if not methods and not names:
        raise ValueError(f"no method and no model matches {arguments.pattern!r}")
    console = output()
    if methods:
        table = Table("method", "what it does", "settings and defaults", title="Methods", title_justify="left")
        for method in methods:
            defaults = effvit.method_settings(method)
            settings = "\n".join(f"{name}={value!r}" for name, value in defaults.items())
            table.add_row(method, METHODS[method].summary, settings, end_section=True)
        console.print(table)
    if names:
        console.print(f"Models for timm.create_model ({len(names)})")
        console.print(Columns(names))


def run_profile(arguments: argparse.Namespace) -> None:
    """Print what models and their reduced variants cost."""
    assignments = [parse_setting(text) for text in arguments.settings]
    assignments += [("keep_rate", rate) for rate in arguments.keep_rate]
    if assignments and not arguments.method:
        raise ValueError("settings belong to a method: name one with --method")
    variants = list_variants(arguments.method, assignments)
    check_device(arguments.device)
    photos = open_images(arguments.images or [])
    records = []
    for size in arguments.img_size or [None]:
        hosts = {name: create(name, arguments, size) for name in arguments.models}
        groups = [hosts]
        if variants:
            groups = [{name: host, **reduced(host, variants)} for name, host in hosts.items()]
        for models in groups:
            dense = next(iter(models.values()))
            images = load_images(dense, list(photos.values())) if photos else None
            for batch_size in arguments.batch_size:
                records.append(measure(models, batch_size, images, list(photos), **profile_options(arguments)))
                print_record(output(), records[-1])
    if arguments.json is not None:
        write_json(arguments.json, records)
    if arguments.csv is not None:
        write_csv(arguments.csv, records)


def profile_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords of ``effvit.measure.costs.profile`` from the command line."""
    names = ("rounds", "precision", "max_rounds", "threads", "device", "compile", "cuda_graphs", "breakdown")
    return {name: getattr(arguments, name) for name in names} | {"dtype": getattr(torch, arguments.dtype)}


def run_tune(arguments: argparse.Namespace) -> None:
    """Print the front of settings and the best one for the aim."""
    check_device(arguments.device)
    photos = open_images(arguments.images)
    dense = create(arguments.model, arguments)
    images = load_images(dense, list(photos.values()))
    console = output()
    if has_random_weights(arguments):
        console.print(f"{arguments.model} has {RANDOM_WEIGHTS}", style="yellow")
    with progress() as bars:
        task = bars.add_task("measuring", total=None)
        result = tune(
            dense,
            images,
            speedup=arguments.speedup,
            macs=None if arguments.gmacs is None else round(1e9 * arguments.gmacs),
            methods=arguments.method,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            final_rounds=arguments.final_rounds,
            on_run=lambda _: bars.advance(task),
            threads=arguments.threads,
            device=arguments.device,
            dtype=getattr(torch, arguments.dtype),
        )
    print_tuning(console, result)
    if arguments.json is not None:
        name = f"{result['best']['method']}_{arguments.model}"
        known = name.partition(".")[0] in effvit.list_models()
        ready = {"model_name": name if known else None, "settings": result["best"]["settings"]}
        write_json(arguments.json, ready | {"method": result["best"]["method"], "host": arguments.model} | result)


def run_visualize(arguments: argparse.Namespace) -> None:
    """Write a picture for every image, method and setting."""
    assignments = [parse_setting(text) for text in arguments.settings]
    if assignments and not arguments.method:
        raise ValueError("settings belong to a method: name one with --method")
    variants = list_variants(arguments.method, assignments)
    images = open_images(arguments.images)
    model = create(arguments.model, arguments)
    models = reduced(model, variants) if variants else {arguments.model: model}
    console = output()
    if has_random_weights(arguments):
        console.print(RANDOM_WEIGHTS, style="yellow")
    for path in draw_figures(models, images, arguments):
        console.print(plain(path))
    if arguments.json is not None:
        host = arguments.model if variants else None
        note = RANDOM_WEIGHTS if has_random_weights(arguments) else None
        records = [
            token_record(model, image, name=stem, model_name=name, host=host, note=note)
            for name, model in models.items()
            for stem, image in images.items()
        ]
        write_json(arguments.json, records)


def run_report(arguments: argparse.Namespace) -> None:
    """Write the report and print where it is."""
    write_report(arguments.results, arguments.out)
    output().print(plain(arguments.out))


def run_convert(arguments: argparse.Namespace) -> None:
    """Write a checkpoint under our names and print which of its entries were used, renamed and dropped."""
    if arguments.out is not None and arguments.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {arguments.out}")
    options = dict(parse_setting(text) for text in arguments.settings)
    model = build(arguments.model, options)
    conversion = convert_checkpoint(model, arguments.file, key=arguments.key)
    lines = [
        f"{len(conversion.state)} entries for {arguments.model}: {len(conversion.same)} under the file's names, "
        f"{len(conversion.renamed)} renamed, {len(conversion.made)} joined, split or new; "
        f"{len(conversion.dropped)} dropped"
    ]
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "architecture": arguments.model}
        state = {name: value.contiguous() for name, value in conversion.state.items()}
        arguments.out.write_bytes(save(state, metadata))
        lines.insert(0, str(arguments.out))
    if arguments.keys:
        lines += [f"used: {name}" for name in conversion.same]
        lines += [f"renamed: {theirs} -> {ours}" for ours, theirs in conversion.renamed.items()]
        lines += [f"joined, split or new: {name}" for name in conversion.made]
    dropped = conversion.dropped if arguments.keys else conversion.dropped[:MOST_DROPPED]
    lines += [f"dropped: {name}" for name in dropped]
    if len(dropped) < len(conversion.dropped):
        lines.append(f"and {len(conversion.dropped) - len(dropped)} more dropped, which --keys names")
    console = output()
    for line in lines:
        console.print(plain(line, LONGEST_LINE))


def run_demo(arguments: argparse.Namespace) -> None:
    """Show what a model with weights sees under each method, and what the methods cost at the usual size."""
    start = time.perf_counter()
    console, out = output(), arguments.out
    photos = photographs()
    out.mkdir(parents=True, exist_ok=True)
    seen, tokens, sheets = demo_accuracy(console, out)
    costs, figures = demo_costs(console, arguments, photos)
    written = [out / name for name in ("report.html", "accuracy.png", "costs.png")]
    numbers = {"costs.json": [seen, costs], "tokens.json": tokens}
    for name, records in numbers.items():
        write_json(out / name, records)
    write_report([out / name for name in numbers], out / "report.html")
    console.print(f"\nWritten in {time.perf_counter() - start:.0f} s:")
    for path in (*written, *sheets, *figures, *(out / name for name in numbers)):
        console.print(f"  {plain(path, LONGEST_LINE)}")


def demo_accuracy(console: Console, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[Path]]:
    """Classify the pictures of the package by all methods; returns the record, the tokens and their sheets."""
    pictures = fashion_pictures()
    torch.manual_seed(0)
    dense = build(SEEING, {}, pretrained=True).eval()
    images = load_images(dense, [picture.image for picture in pictures.values()])
    labels = torch.tensor([picture.label for picture in pictures.values()])
    variants = reduced(dense, demo_variants(dense))
    calibrate_all(console, variants, images)
    models = {SEEING: dense, **variants}
    data = f"{len(pictures)} test pictures of Fashion-MNIST"
    record = measure(models, len(images), images, [data], rounds=4, warmup=1, ideal=False)
    add_accuracies(record, top1(models, [(images, labels)]), data)
    print_accuracies(console, record)
    plot_accuracy([record], f"{SEEING} with its trained weights, on {data} only", out / "accuracy.png")
    shown = {name: pictures[name] for name in SHOWN}
    sheets, tokens = [], []
    for name, model in strongest(variants).items():
        sheets.append(out / f"{file_stem(name)}.png")
        stack([answer_figure(dense, model, name, picture) for picture in shown.values()]).save(sheets[-1])
        tokens += [token_record(model, p.image, name=n, model_name=name, host=SEEING) for n, p in shown.items()]
    return record, tokens, sheets


def answer_figure(dense: nn.Module, model: ReducedHost, name: str, picture: Labelled) -> Image.Image:
    """The picture's tokens under the answers of the dense model and of the reduced one."""
    classes, x = fashion_classes(), load_images(dense, [picture.image])
    with torch.inference_mode():
        said, dense_said = (classes[int(m(x).argmax())] for m in (model, dense))
    title = f"{name}: {said}; the dense model: {dense_said}; it is: {classes[picture.label]}"
    return token_figure(model, picture.image, title=title)


def strongest(variants: Mapping[str, ReducedHost]) -> dict[str, ReducedHost]:
    """The last variant of each method."""
    last = {model.method: name for name, model in variants.items()}
    return {name: variants[name] for name in last.values()}


def demo_costs(
    console: Console, arguments: argparse.Namespace, photos: Mapping[str, Image.Image]
) -> tuple[dict[str, Any], list[Path]]:
    """What all methods cost on the photographs; returns the record, and figures of the tokens if weights were given."""
    host = create(arguments.model, arguments)
    variants = reduced(host, demo_variants(host))
    images = load_images(host, list(photos.values()))
    calibrate_all(console, variants, images)
    is_random = has_random_weights(arguments)
    weights = f"{arguments.model} with random weights: for its costs alone" if is_random else ""
    if is_random:
        console.print(f"\n{weights}; --checkpoint or --pretrained loads some", style="yellow")
    models = {arguments.model: host, **variants}
    record = measure(models, len(photos), images, list(photos), rounds=3, warmup=1, ideal=False)
    record["conditions"]["weights"] = "random weights" if is_random else None
    print_record(console, record)
    title = "\n".join([weights or arguments.model, describe(record["conditions"])])
    plot_costs(record["models"], title, arguments.out / "costs.png")
    return record, [] if is_random else draw_figures(strongest(variants), photos, arguments)


def calibrate_all(console: Console, models: Mapping[str, ReducedHost], images: Tensor) -> None:
    """Let those of the models that learn from pictures without labels do so on these, and say so."""
    learning = [name for name, model in models.items() if issubclass(METHODS[model.method], DyMU)]
    for name in learning:
        effvit.calibrate(models[name], [images])
    if learning:
        console.print(f"{', '.join(learning)}: calibrated on these very pictures, without their labels")


# -- models and settings ---------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "SIDE" or "HEIGHTxWIDTH"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side such as 224 nor HxW such as 224x320")
    return int(match[1]), int(match[2] or match[1])


def parse_setting(text: str, option: str = "--set") -> tuple[str, Any]:
    """("key", value) of "key=value" with the value in JSON; errors name the option it was given to."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{option} takes KEY=VALUE, e.g. r=8, got {text!r}")
    try:
        return key, parse_json(value)
    except ValueError as error:
        raise ValueError(
            f"{option} {plain(text)}: {shown(value)} is not JSON ({plain(error)}); write numbers as r=8, lists as "
            f"reduce_at=[3,6,9], true, false, null, and text in double quotes: '{key}=\"...\"'"
        ) from error


def list_variants(methods: Sequence[str], assignments: Sequence[tuple[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(method, settings) for every method and combination of values of the settings it has.

    Raises:
        ValueError: An unknown method, or a setting that none of them has.
    """
    values: dict[str, list[Any]] = {}
    for key, value in assignments:
        values.setdefault(key, []).append(value)
    taken = {method: [key for key in values if key in effvit.method_settings(method)] for method in methods}
    for key in values:
        if not any(key in keys for keys in taken.values()):
            known = "; ".join(f"{method} takes {', '.join(effvit.method_settings(method))}" for method in methods)
            raise ValueError(f"no method named here has a setting {key!r}: {known}")
    return [
        (method, dict(zip(keys, combination, strict=True)))
        for method, keys in taken.items()
        for combination in product(*(values[key] for key in keys))
    ]


def reduced(host: nn.Module, variants: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, ReducedHost]:
    """Name -> the host with that method and those settings."""
    models = {}
    for method, settings in variants:
        name = " ".join([method, *(f"{key}={value}" for key, value in settings.items())])
        models[name] = effvit.sparsify(host, method, **settings)
    return models


def build(name: str, options: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """The named model; a ValueError for an unknown name, which names the nearest."""
    check_model_name(name)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # downloads fail with the exceptions of several libraries
        if not pretrained and not isinstance(error, RuntimeError):
            raise
        raise ValueError(f"cannot create {name}: {error}") from error


def create(name: str, arguments: argparse.Namespace, img_size: tuple[int, int] | None = None) -> nn.Module:
    """The named model in eval mode, with the weights and image size asked for, else seeded random weights."""
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    torch.manual_seed(0)
    model = build(name, options, arguments.pretrained)
    if arguments.checkpoint is not None:
        effvit.load_checkpoint(model, arguments.checkpoint, key=arguments.key)
    return model.eval()


def has_random_weights(arguments: argparse.Namespace) -> bool:
    """True if the command was given no weights to load."""
    return arguments.checkpoint is None and not arguments.pretrained


def check_device(name: str) -> None:
    """Raise a ValueError unless torch knows a device of that name."""
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use e.g. cpu, cuda or cuda:1") from error


def shared_input_size(models: Mapping[str, nn.Module]) -> tuple[int, int, int]:
    """The input size of all the models.

    Raises:
        ValueError: They differ.
    """
    sizes = {name: tuple(data_config(model)["input_size"]) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{name} {' x '.join(map(str, size))}" for name, size in sizes.items())
        raise ValueError(f"one batch cannot serve several input sizes ({text}); give --img-size")
    channels, height, width = next(iter(sizes.values()))
    return channels, height, width


# -- measuring and showing -------------------------------------------------------------------------------


def output() -> Console:
    """The console for results: as wide as the terminal, or PIPE_WIDTH."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def progress() -> Progress:
    """Progress bars on stderr, so that stdout holds only results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),  # in a file even a cleared bar leaves an empty line
    )


def measure(
    models: Mapping[str, nn.Module],
    batch_size: int,
    images: Tensor | None,
    image_names: list[str],
    **options: Any,
) -> dict[str, Any]:
    """The record of ``effvit.measure.costs.profile``, with progress bars."""
    input_size = shared_input_size(models)
    with progress() as bars:
        speed = bars.add_task("measuring speed", total=None)
        count = bars.add_task("counting multiply-adds", total=len(models))
        return profile(
            models,
            input_size,
            batch_size,
            images=images,
            image_names=image_names or None,
            on_run=lambda _: bars.advance(speed),
            on_count=lambda _: bars.advance(count),
            **options,
        )


def add_record(path: Path, record: Any) -> None:
    """Write the record at the end of the list in the file, or as the first of a new one.

    Raises:
        ValueError: A file that holds no list.
    """
    records = read_json(path) if path.exists() else []
    if not isinstance(records, list):
        raise ValueError(f"{plain(path)} must hold a list of records to add one, got {type(records).__name__}")
    write_json(path, [*records, record])


def open_images(texts: Sequence[str]) -> dict[str, Image.Image]:
    """The images that the texts name, in RGB, by name.

    Raises:
        ValueError, OSError: As ``find_pictures``; of several that cannot be read, all are named. Or two have one name.
    """
    images: dict[str, Image.Image] = {}
    errors: list[ValueError | OSError] = []
    for text in texts:
        try:
            found = find_pictures(text)
        except (ValueError, OSError) as error:
            errors.append(error)
            continue
        again = [name for name in found if name in images]
        if again:
            raise ValueError(f"images must differ in name, which {text} does not: {', '.join(again)}")
        images |= found
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ValueError(f"{len(errors)} of {len(texts)} images cannot be used: {'; '.join(map(str, errors))}")
    return images


def file_stem(name: str) -> str:
    """A model's name as part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)


def draw_figures(
    models: Mapping[str, nn.Module], images: Mapping[str, Image.Image], arguments: argparse.Namespace
) -> list[Path]:
    """Write a token figure for every image and model, named after both; returns the paths."""
    note = f" ({RANDOM_WEIGHTS})" if has_random_weights(arguments) else ""
    paths = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    with progress() as bars:
        task = bars.add_task("drawing tokens", total=len(images) * len(models))
        for name, model in models.items():
            for stem, image in images.items():
                path = arguments.out / f"{stem}-{file_stem(name)}.png"
                place = "" if name == arguments.model else f" in {arguments.model}"
                token_figure(model, image, title=f"{name}{place}{note}").save(path)
                paths.append(path)
                bars.advance(task)
    return paths


if __name__ == "__main__":
    sys.exit(main())
