"""``effvit profile``: what models and their reduced variants cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from effvit.cli import options
from effvit.cli.images import named_images
from effvit.cli.models import check_device, create
from effvit.cli.output import finish_on_interrupt, measure, output, say, told_on_interrupt
from effvit.data.preparation import data_config, load_images
from effvit.measure.profiler import ProfileOptions
from effvit.measure.reader import Reader, parse_reader
from effvit.measure.records import write_records
from effvit.measure.selections import Exit, Selecting, Views, all_tokens, selected
from effvit.measure.values import Record
from effvit.measure.variants import list_all, parse_setting, reduced
from effvit.messages import plain
from effvit.protocols import Settings, Size
from effvit.schedule import check_count
from effvit.selectors import SELECTORS, SelectingTower, VideoSelector
from effvit.show.crops import cut
from effvit.show.named_images import NamedImages
from effvit.show.tables import print_record, write_csv

__all__ = ["add_command"]


class Arguments(
    options.WeightArguments,
    options.VariantArguments,
    options.SelectionArguments,
    options.MachineArguments,
    options.ImageArguments,
):
    """Parsed arguments of ``effvit profile``."""

    models: list[str]
    keep_rate: list[float]
    img_size: list[Size] | None
    batch_size: list[int] | None
    frames: int | None
    images: list[str] | None
    rounds: int
    precision: float | None
    max_rounds: int
    compile: bool
    cuda_graphs: bool
    breakdown: bool
    reader: str | None
    text: int | None
    json: Path | None
    csv: Path | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "profile",
        parents=[
            options.weights(),
            options.entry(),
            options.variants(),
            options.selection(),
            options.machine(),
            options.images(),
        ],
        help="parameters, multiply-adds and speed",
        description="Compare each MODEL with its variants by --method; without one, all with the first. With --select "
        "each MODEL is a vision tower, and what it hands over is compared with all its tokens.",
    )
    command.add_argument(
        "models", nargs="+", type=options.model_name, metavar="MODEL", help="any name of timm or of the zoo"
    )
    command.add_argument("--keep-rate", nargs="+", type=float, default=[], metavar="RATE", help="one variant for each")
    command.add_argument(
        "--img-size", nargs="+", type=options.parse_size, metavar="SIZE", help="side or HxW; each is measured"
    )
    command.add_argument(
        "--batch-size",
        nargs="+",
        type=int,
        metavar="N",
        help="each is measured (default: 8; one image in --crops, one video of --frames, which are measured alone)",
    )
    command.add_argument(
        "--frames", type=int, metavar="T", help="select from videos of so many frames; IMAGEs are theirs, in order"
    )
    command.add_argument(
        "--images",
        nargs="+",
        type=options.image_name,
        metavar="IMAGE",
        help=f"images in place of noise: {options.IMAGES}",
    )
    command.add_argument("--rounds", type=int, default=10)
    command.add_argument(
        "--precision", type=float, metavar="SHARE", help="more rounds until every interval is narrower, e.g. 0.02"
    )
    command.add_argument("--max-rounds", type=int, default=200, help="limit for --precision")
    command.add_argument("--compile", action="store_true", help="run through torch.compile")
    command.add_argument("--cuda-graphs", action="store_true", help="replay CUDA graphs")
    command.add_argument("--breakdown", action="store_true", help="time attention, MLP and reduction of every block")
    command.add_argument(
        "--reader",
        metavar="SIZES",
        help="a language model that reads the tokens handed over, whose prefill and cache are counted: "
        "layers=32,width=4096,heads=32,mlp=11008, also kv_heads=, gated=, number_bytes=",
    )
    command.add_argument("--text", type=int, metavar="N", help="tokens of text that the reader reads behind them")
    command.add_argument("--json", type=options.output_file, metavar="FILE", help="write all numbers there too")
    command.add_argument("--csv", type=options.output_file, metavar="FILE", help="write the table there too")
    command.set_defaults(run=run_profile)


def run_profile(arguments: Arguments) -> None:
    """Print what models and their reduced variants cost."""
    assignments = [parse_setting(text) for text in arguments.settings]
    assignments += [("keep_rate", rate) for rate in arguments.keep_rate]
    leaving = options.leaving(arguments, bool(arguments.select))
    views = options.views_from(arguments.crops, arguments.frames, "--frames")
    variants, selections = list_all(
        arguments.method, arguments.select, arguments.keep, assignments, views, untrained=True
    )
    reader = reader_of(arguments)
    check_device(arguments.device)
    photos = named_images(arguments.images or [], arguments.skip_bad)
    photos = photos if views.frames is None else photos.in_natural_order()
    say_untrained(arguments.select)
    records: list[Record] = []
    sizes: Sequence[Size | None] = arguments.img_size or [None]
    with told_on_interrupt(lambda: interrupted(arguments, len(records))):
        for size in sizes:
            hosts = {name: create(name, arguments, size) for name in arguments.models}
            groups: list[dict[str, nn.Module]] = [hosts]
            if selections:
                groups = [selecting(name, host, variants, selections, leaving, views) for name, host in hosts.items()]
            elif variants:
                groups = [{name: host, **reduced(host, variants)} for name, host in hosts.items()]
            for models in groups:
                images = load_views(next(iter(models.values())), photos, views) if photos else None
                for batch_size in arguments.batch_size or [8 if views == Views() else 1]:
                    with finish_on_interrupt("the measurement ends with the rounds it has") as stop:
                        record = measure(
                            models,
                            batch_size,
                            images,
                            list(photos.names),
                            breakdown=arguments.breakdown,
                            reader=reader,
                            text=arguments.text or 0,
                            is_enough=lambda: stop.is_asked,
                            **profile_options(arguments),
                        )
                        records.append(record)
                        print_record(output(), record)
                        write(arguments, records)
                say_adapting(models, photos)


def selecting(
    name: str,
    host: nn.Module,
    variants: Sequence[tuple[str, Settings]],
    selections: Sequence[Selecting],
    leaving: Exit,
    views: Views,
) -> dict[str, nn.Module]:
    """The host as a tower that hands over all its tokens, and the selections behind it or behind its variants."""
    towers = reduced(host, variants) if variants else {"": host}
    return {name: all_tokens(host, leaving, views), **selected(towers, selections, leaving, views)}


def load_views(model: nn.Module, photos: NamedImages, views: Views) -> Tensor:
    """Images (B, channels, H, W) as the model takes them: each cut into its parts where there are crops.

    Raises:
        ValueError: A number of frames that makes no whole videos.
    """
    if views.frames is not None and len(photos) % views.frames:
        raise ValueError(
            f"--images must name whole videos of --frames {views.frames}, got {len(photos)} images; name "
            f"{len(photos) // views.frames * views.frames or views.frames} of them"
        )
    if views.crops is None:
        return load_images(model, photos)
    return torch.cat([cut(model, photo, views.crops) for photo in photos])


def say_adapting(models: Mapping[str, nn.Module], photos: NamedImages) -> None:
    """A line on towers that hand over a number of tokens which depends on the image or the video."""
    found = {name: model for name, model in models.items() if isinstance(model, SelectingTower)}
    found = {name: model for name, model in found.items() if model.count(data_config(model)["input_size"][1:]) is None}
    if found:
        shown = "the mean of those named is shown" if photos else "that of noise is shown; name some with --images"
        what = "videos" if any(isinstance(model, VideoSelector) for model in found.values()) else "images"
        say(f"{', '.join(found)}: how many tokens are handed over depends on the {what}; {shown}")


def say_untrained(selectors: Sequence[str]) -> None:
    """A line on selectors whose weights are made for the measurement."""
    made = [name for name in selectors if SELECTORS[name].learns]
    if made:
        say(f"{', '.join(made)}: weights are made anew, which costs the same; what such tokens hold is not measured")


def reader_of(arguments: Arguments) -> Reader | None:
    """The language model that reads what is handed over; a ValueError where nothing is."""
    if not arguments.select and arguments.reader is not None:
        raise ValueError("--reader reads the tokens that a tower hands over: name a selector with --select")
    if arguments.reader is None and arguments.text is not None:
        raise ValueError("--text counts tokens for a reader: give its sizes with --reader")
    check_count("--text", arguments.text or 0)
    return None if arguments.reader is None else parse_reader(arguments.reader)


def write(arguments: Arguments, records: Sequence[Record]) -> None:
    """Write what is measured so far, so that whatever ends the command later takes none of it."""
    if arguments.json is not None:
        write_records(arguments.json, records)
    if arguments.csv is not None:
        write_csv(arguments.csv, records)


def interrupted(arguments: Arguments, known: int) -> str:
    """What becomes of a measurement that was stopped."""
    places = [plain(path) for path in (arguments.json, arguments.csv) if path is not None]
    if known and places:
        return f"{known} complete {'measurement is' if known == 1 else 'measurements are'} in {' and '.join(places)}"
    if known:
        return "what is complete was printed; with --json FILE it would be kept, too"
    return "no measurement was complete, so that nothing is kept"


def profile_options(arguments: Arguments) -> ProfileOptions:
    """Keywords of ``effvit.measure.profiler.profile_models`` from the command line."""
    return {
        "rounds": arguments.rounds,
        "precision": arguments.precision,
        "max_rounds": arguments.max_rounds,
        "threads": arguments.threads,
        "device": arguments.device,
        "compile": arguments.compile,
        "cuda_graphs": arguments.cuda_graphs,
        "dtype": getattr(torch, arguments.dtype),
    }
