"""Label maps of segmentation sets: read, and checked for labels that no class has."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np

from effvit.images import SIXTEEN_BIT, opened

__all__ = [
    "IGNORED",
    "check_label_set",
    "check_labels",
    "find_labels",
    "read_labels",
    "reads_zero",
    "shown_labels",
]

IGNORED = 255  # the label that mmseg's losses and metrics leave out
IGNORED_SIXTEEN = 65535  # and what becomes of it where all bits of 16 are set
LABELS_SHOWN = 10  # in a message


def read_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """The labels (H, W) in a file: grey, 1 bit, or the numbers of a palette's entries.

    Raises:
        FileNotFoundError, ValueError: As `effvit.images.opened`, or colours, floats, or a JPEG file.
    """
    with opened(path) as image:
        if image.format == "JPEG":
            raise ValueError(f"{path} is a JPEG file, whose compression changes labels; save label maps as PNG")
        if image.mode not in ("1", "L", "P", "I", *SIXTEEN_BIT):
            raise ValueError(
                f"{path} has pixels of mode {image.mode}, not one label each; save a label map of one channel, with "
                "the number of its class at every pixel"
            )
        return np.asarray(image).astype(np.int64)


def find_labels(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> set[int]:
    """The labels of a map that are not ignored.

    Args:
        path: File of the label map.
        size: (height, width) of its image as stored, if that is to be compared.

    Raises:
        FileNotFoundError, ValueError: As `read_labels`, or a map of another size.
    """
    values = read_labels(path)
    if size is not None and values.shape not in (size, size[::-1]):
        raise ValueError(
            f"{path} is {values.shape[0]} x {values.shape[1]} pixels, but its image {size[0]} x {size[1]}; "
            "make label maps of the size of their images, without interpolation"
        )
    found: set[int] = set(np.unique(values).tolist()) - {IGNORED, IGNORED_SIXTEEN}
    return found


def check_labels(path: str | os.PathLike[str], size: tuple[int, int], labels: Collection[int]) -> set[int]:
    """The labels of a map that are not ignored.

    Args:
        path, size: As `find_labels`.
        labels: Those that classes have, and 0 where it is no class.

    Raises:
        FileNotFoundError, ValueError: As `find_labels`, or a label that no class has.
    """
    found = find_labels(path, size)
    unknown = sorted(found.difference(labels))
    if unknown:
        hint = ", or reduce_zero_label=True if 0 is no class" if unknown == [max(labels) + 1] else ""
        raise ValueError(
            f"{path} has the label{'s' if len(unknown) > 1 else ''} {', '.join(map(str, unknown[:5]))}"
            f"{', ...' if len(unknown) > 5 else ''}, but classes have {min(labels)} to {max(labels)}, and {IGNORED} is "
            f"ignored; correct the label map, or name all classes in metainfo and num_classes{hint}"
        )
    return found


def reads_zero(labels: AbstractSet[int], number: int) -> bool | None:
    """The `reduce_zero_label` under which labels belong to so many classes: True if 0 is none; None if neither does."""
    if not labels or max(labels) > number:
        return None
    return number in labels


def shown_labels(labels: AbstractSet[int]) -> str:
    """Labels for a message: "0, 1, 2"."""
    first = ", ".join(map(str, sorted(labels)[:LABELS_SHOWN])) or "none"
    return first + (f", ..., {max(labels)}" if len(labels) > LABELS_SHOWN else "")


def check_label_set(found: AbstractSet[int], folder: str | os.PathLike[str], classes: Sequence[object]) -> None:
    """Raise a ValueError unless label maps tell classes apart.

    Args:
        found: Labels of all the maps that were read, without the ignored.
        folder: That of the maps.
        classes: Names of the classes, or their numbers.
    """
    if not found:
        raise ValueError(
            f"all pixels of the label maps in {Path(folder)} are ignored ({IGNORED}, or 0 with reduce_zero_label), so "
            "there is nothing to learn or to measure; write the numbers of the classes"
        )
    if len(found) == 1 and len(classes) > 1:
        (label,) = found
        raise ValueError(
            f"the label maps in {Path(folder)} have no labels but {label} and {IGNORED}, which is ignored, so that one "
            f"of {len(classes)} classes is left; if {IGNORED} marks an object, write the number of its class there"
        )
