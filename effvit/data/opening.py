"""Sets of labelled images on this machine: folders named after classes, archives, a table, an IDX file.

Files are listed by torchvision (folders) and timm (archives); nothing is unpacked or downloaded.
"""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

from timm.data.readers.reader_image_in_tar import extract_tarinfos
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_image_file, read_label_file

from effvit.data import imagenet
from effvit.data.labelled import ArchivedImages, ImageFiles, Label, LabelledImages, PixelImages
from effvit.images import open_image
from effvit.messages import plain, shown

__all__ = ["FORMS", "image_files", "open_class_folders", "open_labelled", "open_unlabelled"]

COLUMNS = ("path", "label")
IDX_IMAGES, IDX_LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
FORMS = (
    f"a folder with one folder for each class, {imagenet.IMAGES} beside its devkit, a .tar of class folders, a .csv "
    f"with the columns path and label, or an IDX file such as t10k-{IDX_IMAGES}"
)


def open_labelled(path: Path) -> LabelledImages:
    """The labelled images of a folder or file, in one of ``FORMS``.

    Raises:
        FileNotFoundError: There is no such path, or a file that belongs to it is missing.
        ValueError: It has none of the forms, or holds no image, or its labels cannot be read.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no folder or file {plain(path)}; labelled images are {FORMS}")
    if path.suffix == ".tar":
        return _of_archive(path)
    if path.suffix == ".csv":
        return _of_table(path)
    if path.name.endswith(IDX_IMAGES):
        return _of_idx(path)
    raise ValueError(f"{plain(path)} is no set of labelled images; those are {FORMS}")


def open_unlabelled(path: Path) -> LabelledImages:
    """All images in a folder and its sub-folders whatever their names, or in a file as of ``open_labelled``.

    Their labels, where there are any, are not to be read.

    Raises:
        FileNotFoundError, ValueError: As ``open_labelled``.
    """
    if not path.is_dir():
        return open_labelled(path)
    names = [file.relative_to(path).as_posix() for file in image_files(path)]
    return ImageFiles(str(path), path, names, [0] * len(names))


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders by the ends of their names, sorted; a ValueError if there are none."""
    files = sorted(file for file in folder.rglob("*") if _is_image(file))
    if not files:
        raise ValueError(f"{plain(folder)} holds no images ({', '.join(IMG_EXTENSIONS)}); name a folder that does")
    return files


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMG_EXTENSIONS)


def open_class_folders(folder: Path) -> ImageFolder:
    """torchvision's data set of a folder with one folder for each class, numbered in the order of their names.

    Raises:
        FileNotFoundError: No such folder, no folder in it, or one without images.
        ValueError: Images beside the folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {plain(folder)}")
    loose = [entry.name for entry in folder.iterdir() if _is_image(entry)]
    if loose:
        raise ValueError(
            f"{plain(folder)} must hold one folder a class, but {len(loose)} pictures lie in it ({min(loose)} ...); "
            "sort them into folders named after their classes"
        )
    return ImageFolder(folder, loader=open_image)


def _of_folder(folder: Path) -> LabelledImages:
    archive = folder / imagenet.IMAGES
    if archive.is_file():
        return _of_archive(archive)
    loose = sorted(entry.name for entry in folder.iterdir() if _is_image(entry))
    if loose and imagenet.are_flat(loose):
        return ImageFiles(str(folder), folder, loose, imagenet.labels_of(loose, folder))
    if not any(folder.iterdir()):
        raise ValueError(f"{plain(folder)} is empty; labelled images are {FORMS}")
    found = open_class_folders(folder)
    names = [Path(file).relative_to(folder).as_posix() for file, _ in found.samples]
    return ImageFiles(str(folder), folder, names, [found.classes[number] for _, number in found.samples])


def _of_archive(path: Path) -> LabelledImages:
    try:
        samples, numbers, known, _ = extract_tarinfos(str(path), cache_tarinfo=False)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{plain(path)} cannot be read as an uncompressed .tar ({error}); fetch it again") from error
    except ValueError as error:  # zip() of no images
        raise ValueError(f"{plain(path)} holds no images; labelled images are {FORMS}") from error
    classes = {number: name for name, number in known.items()}
    members = [(member, parent) for member, _, parent in samples]
    names = [member.name for member, _ in members]
    if imagenet.are_flat(names):
        return ArchivedImages(path, members, imagenet.labels_of(names, path.parent))
    if "" in known:
        flat = next(name for name, number in zip(names, numbers, strict=True) if not classes[number])
        raise ValueError(
            f"{plain(path)} holds {plain(flat)} outside any folder; an archive has a folder for each class"
        )
    return ArchivedImages(path, members, [classes[number] for number in numbers])


def _of_table(path: Path) -> LabelledImages:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{plain(path)} must begin with a line that names the columns path and label, got "
                f"{shown(','.join(reader.fieldnames or ()))}"
            )
        rows = [(row["path"], row["label"]) for row in reader]
    if not rows:
        raise ValueError(f"{plain(path)} lists no images; write a line of path and label for each")
    short = next((number for number, row in enumerate(rows, 2) if not all(row)), None)
    if short is not None:
        raise ValueError(f"line {short} of {plain(path)} lacks a path or a label; every line has both")
    names, texts = zip(*rows, strict=True)
    labels: list[Label] = [int(text) for text in texts] if all(text.isdecimal() for text in texts) else list(texts)
    return ImageFiles(str(path), path.parent, names, labels)


def _of_idx(path: Path) -> LabelledImages:
    beside = path.with_name(path.name.replace(IDX_IMAGES, IDX_LABELS))
    if not beside.is_file():
        raise FileNotFoundError(f"the labels of {plain(path)} are missing: there is no file {plain(beside)}")
    try:
        pixels, labels = read_image_file(str(path)), read_label_file(str(beside))
    except (AssertionError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{plain(path)} or its labels are no IDX files; unpack them, or fetch them again") from error
    if len(pixels) != len(labels) or not len(pixels):
        raise ValueError(f"{plain(path)} has {len(pixels)} images, but {len(labels)} labels; fetch both again")
    return PixelImages(str(path), pixels, labels.tolist())
