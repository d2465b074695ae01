"""Images in a fixed order, with labels and without, wherever they are stored: in files, in an archive, in a tensor."""

from __future__ import annotations

import hashlib
import os
import tarfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

from PIL import Image
from torch import Tensor

from effvit.images import as_rgb, check_whole, open_image, opened
from effvit.messages import plain

__all__ = [
    "ArchivedImages",
    "ImageFiles",
    "Label",
    "LabelledImages",
    "PixelImages",
    "StoredImages",
    "check_file",
    "digest",
    "readable",
    "spread",
]

NAMED = 3  # bad images that an error names

Label: TypeAlias = "int | str"
"""The number of a class, or its name."""


class StoredImages:
    """Images in a fixed order, read one at a time.

    Args:
        place: Where they lie, for errors and records; "" if in no one place.
        names: A name for each.
    """

    def __init__(self, place: str, names: Sequence[str]) -> None:
        self.place = place
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self.read(index) for index in range(len(self)))

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image in RGB, by the rule of ``effvit.images``; errors name its file."""

    @abstractmethod
    def check(self, index: int) -> None:
        """Raise the error of ``read`` where header and end of the file are enough to know it."""


class LabelledImages(StoredImages):
    """Images and their labels, in a fixed order.

    Args:
        place, names: As of ``StoredImages``.
        labels: A label for each: all are names of classes, or all are numbers that a model gives its classes.
    """

    def __init__(self, place: str, names: Sequence[str], labels: Sequence[Label]) -> None:
        super().__init__(place, names)
        self.labels = labels

    @abstractmethod
    def size(self, index: int) -> int:
        """Bytes of the image as it is stored."""


class ImageFiles(LabelledImages):
    """Images in files of their own.

    Args:
        place: As of ``LabelledImages``.
        folder: The names are relative to it.
        names: Paths.
        labels: As of ``LabelledImages``.
    """

    def __init__(self, place: str, folder: Path, names: Sequence[str], labels: Sequence[Label]) -> None:
        super().__init__(place, names, labels)
        self.folder = folder

    def read(self, index: int) -> Image.Image:
        return open_image(self.folder / self.names[index])

    def check(self, index: int) -> None:
        check_file(self.folder / self.names[index])

    def size(self, index: int) -> int:
        path = self.folder / self.names[index]
        return os.path.getsize(path) if path.exists() else 0


class ArchivedImages(LabelledImages):
    """Images in an uncompressed .tar, read where they stand.

    Args:
        archive: The file.
        members: What timm lists of each image: its entry, and the entry of the .tar inside the archive that holds it.
        labels: As of ``LabelledImages``.
    """

    def __init__(
        self, archive: Path, members: Sequence[tuple[tarfile.TarInfo, tarfile.TarInfo | None]], labels: Sequence[Label]
    ) -> None:
        super().__init__(str(archive), [member.name for member, _ in members], labels)
        self.archive = archive
        self.members = members

    @contextmanager
    def _stream(self, index: int) -> Iterator[tuple[str, IO[bytes]]]:
        member, parent = self.members[index]
        with tarfile.open(self.archive, "r:") as outer:
            if parent is None:
                with _extracted(outer, member) as file:
                    yield f"{self.archive}: {member.name}", file
            else:
                with (
                    _extracted(outer, parent) as held,
                    tarfile.open(fileobj=held, mode="r:") as inner,
                    _extracted(inner, member) as file,
                ):
                    yield f"{self.archive}: {parent.name}: {member.name}", file

    def read(self, index: int) -> Image.Image:
        with self._stream(index) as (name, file), opened(name, file) as image:
            return as_rgb(image)

    def check(self, index: int) -> None:
        with self._stream(index) as (name, file), opened(name, file) as image:
            check_whole(image, name, file)

    def size(self, index: int) -> int:
        return self.members[index][0].size


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None  # timm lists files alone
    return file


class PixelImages(LabelledImages):
    """Grey images in one tensor.

    Args:
        place: As of ``LabelledImages``.
        pixels: uint8 (N, H, W).
        labels: Numbers of classes.
    """

    def __init__(self, place: str, pixels: Tensor, labels: Sequence[int]) -> None:
        super().__init__(place, [f"image {index}" for index in range(len(pixels))], labels)
        self.pixels = pixels

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index].numpy())

    def check(self, index: int) -> None:
        pass  # they are in memory

    def size(self, index: int) -> int:
        return self.pixels[index].numel()


def spread(total: int, number: int, place: str) -> list[int]:
    """``number`` of the indices below ``total``, evenly spread.

    Raises:
        ValueError: There are not so many; the message names ``place``.
    """
    if not 0 < number <= total:
        raise ValueError(f"{plain(place)} has {total} images, cannot take {number} of them; ask for 1 to {total}")
    return [index * total // number for index in range(number)]


def check_file(path: Path) -> None:
    """Raise the error of ``open_image`` where header and end of the file are enough to know it."""
    with opened(path) as image:
        check_whole(image, path)


def readable(
    images: StoredImages,
    indices: Sequence[int],
    *,
    skip_bad: bool = False,
    on_image: Callable[[], None] = lambda: None,
    on_bad: Callable[[Exception], None] = lambda _: None,
) -> list[int]:
    """Those of the images that can be read: all, unless bad ones are to be left out.

    Args:
        images: The set.
        indices: Those of it to look at.
        skip_bad: Decode each, one at a time, and leave out those that fail; without, header and end are looked at.
        on_image: Called after each.
        on_bad: Called with the error of each that is left out.

    Raises:
        ValueError, OSError: An image that cannot be read, or with ``skip_bad`` no image that can; of several the
            message has their number and names the first few.
    """
    found: list[int] = []
    errors: list[ValueError | OSError] = []
    for index in indices:
        try:
            if skip_bad:
                images.read(index)
            else:
                images.check(index)
            found.append(index)
        except (ValueError, OSError) as error:
            errors.append(error)
            if skip_bad:
                on_bad(error)
        on_image()
    if errors and not (skip_bad and found):
        raise errors[0] if len(indices) == 1 else ValueError(_told(errors, len(indices), images.place, skip_bad))
    return found


def _told(errors: Sequence[Exception], total: int, place: str, skip_bad: bool) -> str:
    of = f" of {plain(place)}" if place else ""
    remedy = "" if skip_bad else "; mend them, take them out, or leave them out with --skip-bad"
    named = "; ".join(str(error) for error in errors[:NAMED])
    more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    return f"{len(errors)} of {total} images{of} cannot be read{remedy}: {named}{more}"


def digest(images: LabelledImages, indices: Iterable[int]) -> str:
    """What tells these images in this order from others: the beginning of the SHA-256 of names, sizes and labels."""
    found = hashlib.sha256()
    for index in indices:
        found.update(f"{images.names[index]}\0{images.size(index)}\0{images.labels[index]}\n".encode())
    return found.hexdigest()[:16]
