"""Files are written whole or not at all, and places that take nothing are told before there is anything to write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from effvit.measure.written_files import check_file, check_folder, write_whole


def test_folder_is_made_and_the_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_link_goes_on_leading_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "far" / "file.txt")
    write_whole(link, b"one")
    assert link.is_symlink()
    assert (tmp_path / "far" / "file.txt").read_bytes() == b"one"


def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    """As ``--json /dev/stdout`` asks for: nothing is put in their place."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"one")
    assert os.read(reader, 9) == b"one"
    os.close(reader)
    check_file(Path(os.devnull))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_full_disk_is_named_with_a_remedy() -> None:
    message = "/dev/full cannot be written: No space left on device; make room there, or name a place on another disk"
    with pytest.raises(OSError, match=message):
        write_whole(Path("/dev/full"), b"one")


def test_full_disk_is_found_before_there_is_anything_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be made on a full disk; its first block is what does not fit."""

    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(**_: Any) -> Full:
        return Full()

    monkeypatch.setattr("effvit.measure.written_files.TemporaryFile", full)
    for check, path in ((check_file, tmp_path / "a.json"), (check_folder, tmp_path / "new")):
        with pytest.raises(OSError, match=r"(a\.json|new) cannot be written: No space left on device; make room there"):
            check(path)


def test_places_that_take_nothing_are_told_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written: Is a directory; name another place"):
        check_file(tmp_path)
    with pytest.raises(OSError, match=r"file/costs\.json cannot be written: Not a directory; name another place"):
        check_file(tmp_path / "file" / "costs.json")
    with pytest.raises(OSError, match="file cannot be written: Not a directory"):
        check_folder(tmp_path / "file")
    check_file(tmp_path / "new" / "deep" / "costs.json")
    check_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
