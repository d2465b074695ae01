"""The models behind published figures, and where their weights come from."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

import effvit
from effvit.cli.models import runner_types
from effvit.cli.output import file_stem
from effvit.hosts.published_settings import PUBLISHED
from effvit.measure.published import PublishedModel, families, published
from effvit.measure.values import Published
from effvit.measure.variants import build, reduce_by
from effvit.messages import plain
from effvit.protocols import Settings

__all__ = ["ALL", "PaperGroup", "paper_groups"]

ALL = "all"
NO_TOP1 = {
    "expedite": "what was published of expedite are speeds and masks of SAM and of segmenters, not of classifiers: the "
    f"settings for SAM and Swin are the names {', '.join(PUBLISHED)}, and model_cards/expedite.md has the figures"
}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class PaperGroup:
    """Models with published figures that run on the same images, because they share their weights.

    Attributes:
        name: That of the first.
        make: Makes them, name -> model; a ValueError or an OSError where there are no weights.
        published: Name -> figure, of those that have one.
    """

    name: str
    make: Callable[[], dict[str, nn.Module]]
    published: Mapping[str, Published]


def paper_groups(names: Sequence[str], pattern: str, checkpoints: Path | None) -> list[PaperGroup]:
    """The models with published figures of methods and architectures.

    Args:
        names: Of methods and architectures, or ``ALL``.
        pattern: Shell-style, of the models' names.
        checkpoints: Folder of local weights: of a host for figures off the shelf, of the model itself for others, each
            named as ``checkpoint_name`` says.

    Raises:
        ValueError: A name without figures, or no model that matches.
    """
    known = families()
    unknown = [name for name in names if name not in (*known, ALL)]
    if unknown:
        reason = f"; {NO_TOP1[unknown[0]]}" if unknown[0] in NO_TOP1 else ""
        raise ValueError(
            f"no published top-1 of {unknown[0]!r} is known; there are figures of {', '.join(known)}, {ALL}{reason}"
        )
    entries = [entry for entry in published() if ALL in names or entry.family in names]
    chosen = [entry for entry in entries if fnmatch.fnmatch(entry.model, pattern)]
    if not chosen:
        models = ", ".join(dict.fromkeys(entry.model for entry in entries))
        raise ValueError(f"no model with published figures matches {pattern!r}; there are {models}")
    by_host: dict[str, list[PublishedModel]] = {}
    for entry in chosen:
        by_host.setdefault(host_of(entry) if entry.is_off_the_shelf else row_name(entry), []).append(entry)
    return [
        off_the_shelf(name, members, checkpoints) if members[0].is_off_the_shelf else trained(members[0], checkpoints)
        for name, members in by_host.items()
    ]


def host_of(entry: PublishedModel) -> str:
    """Name of the host that a method's model is made of."""
    return entry.model.removeprefix(f"{entry.family}_")


def row_name(entry: PublishedModel) -> str:
    """The model with its settings."""
    return " ".join([entry.model, *(f"{key}={value}" for key, value in entry.settings.items())])


def off_the_shelf(host: str, entries: Sequence[PublishedModel], checkpoints: Path | None) -> PaperGroup:
    """The host and its reduced forms, with the host's weights."""
    figures = {row_name(entry): entry.top1 for entry in entries}
    dense = next((entry.dense for entry in entries if entry.dense is not None), None)

    def make() -> dict[str, nn.Module]:
        model = with_weights(host, {}, find_checkpoint(checkpoints, host), pretrained=True)
        reduced = {row_name(entry): reduce_by(model, entry.family, entry.settings) for entry in entries}
        return {host: model, **reduced}

    return PaperGroup(host, make, figures if dense is None else {host: dense, **figures})


def trained(entry: PublishedModel, checkpoints: Path | None) -> PaperGroup:
    """A model with weights that were trained for its figure."""
    name = row_name(entry)
    return PaperGroup(name, partial(trained_model, entry, name, checkpoints), {name: entry.top1})


def trained_model(entry: PublishedModel, name: str, checkpoints: Path | None) -> dict[str, nn.Module]:
    """That model; a FileNotFoundError that names the file to get where there is none."""
    file = find_checkpoint(checkpoints, name)
    if file is None:
        raise FileNotFoundError(
            f"its weights were trained for the figure ({entry.top1.source}) and are not timm's; get them and put them "
            f"into the folder given with --checkpoints, as {file_stem(name)}.pth or .safetensors"
        )
    return {name: with_weights(entry.model, entry.settings, file, pretrained=False)}


def find_checkpoint(folder: Path | None, name: str) -> Path | None:
    """The file of the folder that is named after a model; None if there is none.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if folder is None:
        return None
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {plain(folder)}; name the one with the checkpoints")
    return next((path for suffix in SUFFIXES if (path := folder / f"{file_stem(name)}{suffix}").is_file()), None)


def with_weights(name: str, options: Settings, file: Path | None, pretrained: bool) -> nn.Module:
    """The named model with the weights of the file, or without one with timm's."""
    model = build(name, options, pretrained and file is None)
    if file is not None:
        effvit.load_checkpoint(model, file, runner_types())
    return model.eval()
