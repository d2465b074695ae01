"""Right answers counted over a set of images, by one process or several, in steps after which it can be left.

Batches are the same however many processes there are and wherever a count goes on, so that its result is too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from effvit.data.labelled import LabelledImages
from effvit.measure.accuracy import right_answers
from effvit.measure.json_files import read_json, write_json
from effvit.measure.processes import Processes
from effvit.measure.records import as_json
from effvit.measure.resume import refuse_differences
from effvit.measure.rules import fields, plain_value, table_of, whole
from effvit.messages import plain
from effvit.protocols import Json

__all__ = ["Counts", "KeptCounts", "Prepared", "count_right"]

STATE = "counts of effvit evaluate, 1"
GROUP = fields({"conditions": table_of(plain_value), "counts": fields({"seen": whole(), "right": table_of(whole())})})


class Prepared(Dataset[tuple[Tensor, int]]):
    """Images as a model takes them, and their classes.

    Args:
        images: The set.
        indices: Those to take of it.
        labels: Class of every image of the set.
        transform: What makes of an image what the model takes.
    """

    def __init__(
        self,
        images: LabelledImages,
        indices: Sequence[int],
        labels: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.images = images
        self.indices = indices
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        return self.transform(self.images.read(index)), self.labels[index]


@dataclass(frozen=True)
class Counts:
    """Right answers so far.

    Attributes:
        seen: Images, from the first on.
        right: Name of a model -> right answers on them.
    """

    seen: int
    right: Mapping[str, int]


def count_right(
    models: Mapping[str, nn.Module],
    images: Prepared,
    *,
    before: Counts | None = None,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    every: int = 20,
    processes: Processes | None = None,
    on_counts: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Count the right answers of models in eval mode, all on the same images.

    Args:
        models: Name -> model, on the device of ``processes`` and in ``dtype``.
        images: The images.
        before: Where to go on from.
        batch_size: Images in a batch.
        dtype: Of the images.
        workers: Processes that read images.
        every: Batches of each process between two calls of ``on_counts``.
        processes: Those that count together, each every so many-th batch; None for this one on the CPU.
        on_counts: Called in all processes with the counts of all.

    Raises:
        ValueError: As ``right_answers``, or an image that cannot be read.
    """
    processes = processes or Processes()
    counts = before or Counts(0, dict.fromkeys(models, 0))
    starts = range(counts.seen, len(images), batch_size)
    own = [
        list(range(start, min(start + batch_size, len(images)))) for start in starts[processes.rank :: processes.count]
    ]
    batches = iter(DataLoader(images, batch_sampler=own, num_workers=workers))
    step = every * processes.count  # batches
    for start in starts[::step]:
        found = dict.fromkeys(models, 0)
        for x, labels in islice(batches, every):
            for name, number in right_answers(models, x.to(processes.device, dtype), labels).items():
                found[name] += number
        sums = processes.summed(list(found.values()))
        right = {name: counts.right[name] + more for name, more in zip(models, sums, strict=True)}
        counts = Counts(min(start + step * batch_size, len(images)), right)
        on_counts(counts)
    return counts


class Group(NamedTuple):
    """Counts of models that run on the same images, and what they hold for."""

    conditions: Mapping[str, Json]
    counts: Counts


def _groups(content: Json, path: Path) -> dict[str, Group]:
    """What a file of counts holds; a ValueError for any other file."""
    if not isinstance(content, dict) or content.get("state") != STATE:
        raise ValueError(
            f"{plain(path)} must hold what effvit evaluate --state wrote, and does not; name another file, this one is "
            "left as it is"
        )
    table_of(GROUP)(content.get("groups"), plain(path))
    groups: Any = content["groups"]
    return {
        name: Group(group["conditions"], Counts(group["counts"]["seen"], group["counts"]["right"]))
        for name, group in groups.items()
    }


class KeptCounts:
    """Counts in a file, from which an interrupted evaluation goes on.

    Args:
        path: The file, read now if there is one and written by ``keep``; None keeps nothing.
        is_writer: Of several processes one alone writes.

    Raises:
        OSError, ValueError: A file that cannot be read, or that something else wrote.
    """

    def __init__(self, path: Path | None, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self.groups: dict[str, Group] = {}
        if path is not None and path.exists():
            self.groups = _groups(read_json(path), path)

    def check_groups(self, names: Sequence[str]) -> None:
        """Raise a ValueError if the file has counts of models that are none of these."""
        others = [name for name in self.groups if name not in names]
        if others:
            self._refuse({"model": (others[0], ", ".join(names))})

    def begin(self, name: str, conditions: Mapping[str, Json], models: Iterable[str]) -> Counts | None:
        """What the file has counted under a name; a ValueError if under other conditions, or of other models."""
        group = self.groups.get(name)
        if group is None:
            return None
        values: dict[str, tuple[object, object]] = {"models": (list(group.counts.right), list(models))}
        self._refuse(values | {key: (group.conditions.get(key), now) for key, now in conditions.items()})
        return group.counts

    def _refuse(self, values: Mapping[str, tuple[object, object]]) -> None:
        refuse_differences(
            values,
            f"the evaluation in {plain(self.path)} was begun",
            "give what it was begun with, or name another file; this one is left as it is",
        )

    def keep(self, name: str, conditions: Mapping[str, Json], counts: Counts) -> None:
        """Put the counts into the file, all of them or none."""
        if self.path is None or not self.is_writer:
            return
        self.groups[name] = Group(conditions, counts)
        write_json(self.path, {"state": STATE, "groups": as_json({n: g._asdict() for n, g in self.groups.items()})})

    def close(self) -> None:
        """Remove the file: the evaluation is complete."""
        if self.path is not None and self.is_writer:
            self.path.unlink(missing_ok=True)
