"""The image files of a data set: whether they are there, whole, and of the sizes that annotations are made for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from effvit.dense.coco import ImageEntry
from effvit.images import check_whole, opened, turned_size

ItemT = TypeVar("ItemT")

__all__ = ["CHECKED_FILES", "check_listed", "check_readable", "check_sizes", "sampled"]

CHECKED_FILES = 1000  # of a data set that are opened unless the caller says otherwise


def sampled(items: Sequence[ItemT], number: object) -> Sequence[ItemT]:
    """So many of the items, evenly spread, or all of them for "all".

    Raises:
        ValueError: Neither a number from 0 on nor "all".
    """
    if number == "all":
        number = len(items)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"checked_files must be a number of files from 0 on, or 'all', got {number!r}")
    if number >= len(items):
        return items
    return [items[index * len(items) // number] for index in range(number)]


def check_listed(images: Sequence[ImageEntry], folder: Path, path: Path) -> None:
    """Raise a FileNotFoundError unless all images of the annotation file ``path`` are in the folder."""
    listed: dict[Path, set[str]] = {}
    missing = []
    for image in images:
        file = folder / image["file_name"]
        if file.parent not in listed:
            listed[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        if file.name not in listed[file.parent]:
            missing.append(image)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} images of {path} are not in {folder}, the first is "
            f"{missing[0]['file_name']} (image {missing[0]['id']}); fetch them, set data_prefix, or leave them out"
        )


def check_sizes(images: Sequence[ImageEntry], folder: Path, path: Path) -> None:
    """Raise a ValueError unless the images can be read and have the sizes that the annotation file ``path`` names."""
    for image in images:
        size = (image["height"], image["width"])
        with opened(folder / image["file_name"]) as file_image:
            check_readable(file_image, folder / image["file_name"])
            stored = file_image.size[::-1]
            fits = size in (stored, turned_size(file_image))
        if not fits:
            raise ValueError(
                f"image {image['id']} of {path} is {size[0]} x {size[1]} pixels (height x width), but "
                f"{folder / image['file_name']} {stored[0]} x {stored[1]}; correct the size in the annotations, or "
                "bring back the image that was annotated"
            )


def check_readable(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Raise a ValueError for a file that is cut off, or of pixels that mmcv does not read."""
    check_whole(image, path)
    if image.mode in ("F", "I"):
        raise ValueError(f"{path} has pixels of 32 bits, which mmcv does not read; save it with 8 or 16 bits")
