"""Images as a command line names them: files, folders, patterns, lists, and those that are installed already.

Nothing is decoded until an image is asked for, and then no other is held.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from PIL import Image

from effvit.data.labelled import StoredImages, check_file
from effvit.data.opening import image_files
from effvit.images import open_image
from effvit.messages import plain
from effvit.show.pictures import cutout_pictures, fashion_pictures, photograph_files

__all__ = ["NamedImages", "find_images"]

STDIN = "-"


class Source(NamedTuple):
    """Where an image is.

    Attributes:
        path: Of the file, absolute; of an installed image its kind and name.
        read: Decodes it, in RGB.
        check: Raises the error of ``read`` where header and end of the file are enough to know it.
    """

    path: PurePath
    read: Callable[[], Image.Image]
    check: Callable[[], None]


class NamedImages(StoredImages):
    """Images in the order in which they were named, each with a name of its own; read one at a time.

    Args:
        sources: Where they are, each once.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__("", told_apart([source.path for source in sources]))
        self.sources = sources

    def read(self, index: int) -> Image.Image:
        return self.sources[index].read()

    def check(self, index: int) -> None:
        self.sources[index].check()

    def in_natural_order(self) -> NamedImages:
        """The images by their paths with numbers as numbers, frame-2 in front of frame-10: the frames of a video."""
        return self.only(sorted(range(len(self)), key=lambda index: natural(self.sources[index].path)))

    def only(self, indices: Sequence[int]) -> NamedImages:
        """Those of the images."""
        return NamedImages([self.sources[index] for index in indices])


def natural(path: PurePath) -> tuple[list[int | str], str]:
    """What paths are sorted by where numbers in them are numbers."""
    text = path.as_posix()
    pieces = re.split(r"([0-9]+)", text)  # a number at every odd place
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], text


def find_images(texts: Sequence[str], stdin: BinaryIO | None = None) -> NamedImages:
    """The images that texts of the command line name; none is opened yet.

    Args:
        texts: A file; a folder, for the images in it and in its sub-folders; a shell-style pattern of files, with
            ``**`` for folders of any depth; "-" for a list of files and folders on stdin, one a line or each ended by a
            null character; "fashion_mnist:PATTERN", "cutouts:PATTERN" or "photographs:PATTERN" for installed ones.
        stdin: Where the list is read from; None means the process's.

    Raises:
        FileNotFoundError: A pattern that no file matches; for "photographs:" as
            ``effvit.show.pictures.photograph_files``. A file that is not there is found by ``NamedImages.check``.
        ValueError: A folder or a list without images, a pattern of installed images that names none, an image that is
            named twice.
    """
    found = [source for text in texts for source in _sources(text, sys.stdin.buffer if stdin is None else stdin)]
    twice = [path for path, number in Counter(source.path for source in found).items() if number > 1]
    if twice:
        raise ValueError(f"{plain(twice[0])} is named more than once; name every image once")
    return NamedImages(found)


def told_apart(paths: Sequence[PurePath]) -> list[str]:
    """A name for each of different paths: its stem, or as many of its last parts as no other path ends in."""
    names: dict[PurePath, str] = {}
    left, length = list(paths), 0
    while left:
        ends = {path: path.stem if length == 0 else PurePath(*path.parts[-length:]).as_posix() for path in left}
        shared = Counter(ends.values())
        taken = set(names.values())
        names |= {path: end for path, end in ends.items() if shared[end] == 1 and end not in taken}
        left, length = [path for path in left if path not in names], length + 1
    return [names[path] for path in paths]


def _sources(text: str, stdin: BinaryIO) -> list[Source]:
    kind, colon, pattern = text.partition(":")
    if colon and kind in INSTALLED:
        return _installed(kind, pattern)
    if text == STDIN:
        return [source for name in _listed(stdin) for source in _files(name)]
    if os.path.exists(text) or not glob.has_magic(text):
        return _files(text)
    matches = sorted(glob.glob(text, recursive=True))
    if not matches:
        raise FileNotFoundError(f"no file matches {plain(text)}")
    # A folder and a file in it may both match.
    return list({source.path: source for name in matches for source in _files(name)}.values())


def _files(name: str) -> list[Source]:
    """The file, or the images in the folder."""
    files = image_files(Path(name)) if os.path.isdir(name) else [Path(name)]
    return [_file(file, PurePath(os.path.abspath(file))) for file in files]


def _file(file: Path, path: PurePath) -> Source:
    return Source(path, lambda: open_image(file), lambda: check_file(file))


def _listed(stdin: BinaryIO) -> list[str]:
    """The names on stdin."""
    content = stdin.read()
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    names = [os.fsdecode(line) for line in lines if line]
    if not names:
        raise ValueError("- reads a list of images from stdin, one a line, but none came; pipe one in, e.g. from find")
    return names


def _installed(kind: str, pattern: str) -> list[Source]:
    """The installed images of a kind whose names match the pattern."""
    known = INSTALLED[kind]()
    found = [source for source in known if fnmatch.fnmatch(source.path.name, pattern)]
    if not found:
        names = ", ".join(source.path.name for source in known)
        raise ValueError(f"{kind}:{plain(pattern)} names no image; {kind}: has {names}")
    return found


def _in_memory(kind: str, images: Mapping[str, Image.Image]) -> list[Source]:
    """Small images of the package, which are decoded already."""

    def source(name: str, image: Image.Image) -> Source:
        return Source(PurePath(kind, name), lambda: image.convert("RGB"), lambda: None)

    return [source(name, image) for name, image in images.items()]


INSTALLED: dict[str, Callable[[], list[Source]]] = {
    "fashion_mnist": lambda: _in_memory("fashion_mnist", {n: p.image for n, p in fashion_pictures().items()}),
    "cutouts": lambda: _in_memory("cutouts", {n: p.image for n, p in cutout_pictures().items()}),
    "photographs": lambda: [_file(file, PurePath("photographs", name)) for name, file in photograph_files().items()],
}
