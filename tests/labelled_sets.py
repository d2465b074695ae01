"""Small sets of labelled images in the layouts that ``effvit evaluate`` reads, drawn or from the package."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from effvit.data import imagenet
from effvit.show.pictures import fashion_pictures

SYNSETS = ("n01440764", "n01443537", "n02102040")  # classes 0, 1 and 217 of ImageNet-1k


def write_fashion(folder: Path) -> Path:
    """The sixty Fashion-MNIST images of the package in folders "0" to "9", the numbers of their classes."""
    for name, (image, label) in fashion_pictures().items():
        path = folder / str(label) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def drawn(number: int) -> Image.Image:
    """An image of noise, another for each number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 40, 3), dtype=np.uint8))


def write_folders(folder: Path, names: Sequence[str] = SYNSETS, each: int = 2) -> Path:
    """Drawn images in folders of those names, as ImageNet's validation set is usually sorted."""
    for number, name in enumerate(names):
        for index in range(each):
            path = folder / name / f"ILSVRC2012_val_{number * each + index + 1:08}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn(number * each + index).save(path, "JPEG", quality=95)
    return folder


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    """An archive of those files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    drawn(number).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_devkit(folder: Path, numbers: Sequence[int], synsets: Mapping[int, str]) -> Path:
    """The devkit of ILSVRC 2012 with the ground truth ``numbers`` and the fields of meta.mat that its readme names."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    records = np.zeros(len(synsets), dtype=[(name, object) for name in fields])
    for row, (number, wnid) in zip(records, synsets.items(), strict=True):
        row[fields[0]], row[fields[1]], row[fields[2]], row[fields[3]] = float(number), wnid, "a thing", "what it is"
        row[fields[4]], row[fields[5]], row[fields[6]] = 0.0, np.zeros(0), 0.0
    meta = io.BytesIO()
    savemat(meta, {"synsets": records.reshape(-1, 1)})
    truth = "".join(f"{number}\n" for number in numbers).encode()
    return write_tar(folder / imagenet.DEVKIT, {imagenet.META: meta.getvalue(), imagenet.TRUTH: truth}, "w:gz")


def write_handed_out(folder: Path) -> Path:
    """Six images and the devkit as ILSVRC 2012 hands them out; their classes are SYNSETS[i] with i 2, 0, 1, 1, 0, 2."""
    members = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(number) for number in range(1, 7)}
    write_tar(folder / imagenet.IMAGES, members)
    # The ids of the devkit are in another order than the WordNet ids, as those of ILSVRC are.
    write_devkit(folder, [1, 3, 2, 2, 3, 1], {1: SYNSETS[2], 2: SYNSETS[1], 3: SYNSETS[0], 1001: "n00001740"})
    return folder
