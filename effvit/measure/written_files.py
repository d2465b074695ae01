"""Files written whole or not at all, and places to write to that are checked before there is anything to write."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from effvit.messages import plain

__all__ = ["check_file", "check_folder", "write_whole"]

FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK = b"\0" * 4096  # what a disk hands out at once: one that is full has no room for it


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, making its folder, so that it holds the content or what it held before, even after Ctrl-C.

    Raises:
        OSError: It cannot be written; the message names the file, the reason and a remedy.
    """
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_stream(path):
            path.write_bytes(content)
            return
        target = path.resolve()  # a link goes on leading where it did
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_bytes(content)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise the error of ``write_whole`` while there is nothing to lose yet; leaves nothing behind."""
    with _named(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_stream(path):
            _write_block(path.resolve().parent)


def check_folder(path: Path) -> None:
    """Raise an OSError as ``write_whole`` would for a file in the folder; leaves nothing behind."""
    with _named(path):
        _write_block(path.resolve())


def _is_stream(path: Path) -> bool:
    """Whether the path is that of a pipe or device, such as /dev/stdout, which nothing is put in the place of."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _write_block(folder: Path) -> None:
    """Write a temporary file into the folder, or into the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    with TemporaryFile(dir=folder) as file:
        file.write(BLOCK)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing say which file, why, and what to do."""
    try:
        yield
    except OSError as error:
        remedy = "make room there, or name a place on another disk" if error.errno in FULL else "name another place"
        raise OSError(f"{plain(path)} cannot be written: {error.strerror or error}; {remedy}") from error
