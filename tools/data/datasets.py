"""Data sets as torchvision opens them: the fetched ones (`data.sources`), and folders that people have.

Nothing is downloaded here. Whatever is wrong with a folder is said when it is opened, not in the middle of an epoch.
Other libraries read the same folders without this module: timm.data.create_dataset("", root / "cifar10"), mmdet's
CocoDataset, mmseg's BaseSegDataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import CocoDetection, FashionMNIST, VisionDataset

from data.sources import default_root
from effvit.data.opening import open_class_folders
from effvit.dense.coco import Coco, read_coco, repair_coco
from effvit.images import open_image, opened

__all__ = ["SegmentationFolder", "load_pictures", "open_dataset"]

# Name -> the names of its splits. The first three are labelled pictures.
SPLITS = {
    "cifar10": ("train", "test"),
    "fashion_mnist": ("train", "test"),
    "imagenet": ("train", "val"),
    "coco": ("train", "val"),
    "composites": ("train", "val"),
    "ade20k": ("train", "val"),
}
PICTURES = ("cifar10", "fashion_mnist", "imagenet")
LONG = {"train": "training", "val": "validation"}  # ADE20K's folders, and those of data.composites


class SegmentationFolder(VisionDataset):
    """Images and their label maps from two folders with the same file stems: (RGB image, label map of mode L or P).

    Images are read by the rule of `effvit.images`, turned as EXIF says if the label map is. A file that cannot be read,
    and a label map of another size than its image, raise a ValueError when they are asked for.

    Args:
        images: Folder of .jpg pictures.
        annotations: Folder of .png label maps, one for each picture.
        transforms: Takes and returns (picture, label map).
        transform: For the picture alone.
        target_transform: For the label map alone.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: A picture without a label map.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(str(images), transforms, transform, target_transform)
        self.images = sorted(existing(Path(images)).glob("*.jpg"))
        if not self.images:
            raise FileNotFoundError(f"{images} holds no .jpg pictures")
        self.annotations = [existing(Path(annotations)) / f"{path.stem}.png" for path in self.images]
        missing = [path for path in self.annotations if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} pictures of {images} have no label map, the first would be {missing[0]}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        with opened(self.annotations[index]) as labels:
            target = labels.copy()
        picture = open_image(self.images[index], (target.height, target.width))
        return self.transforms(picture, target) if self.transforms is not None else (picture, target)


def load_pictures(name: str, split: str = "train", root: str | os.PathLike[str] | None = None) -> VisionDataset:
    """A torchvision data set of (PIL picture, class number).

    Args:
        name: "cifar10" or "fashion_mnist" (fetched), or "imagenet": a folder root/{train,val}/<class>/*.
        split: "train" and "test"; for imagenet "train" and "val".
        root: For fetched pictures the root given to `data.sources.fetch`, None being its default; for imagenet the
            folder itself.

    Raises:
        ValueError: An unknown name or split, or a folder with another layout.
        FileNotFoundError: The pictures are not there.
    """
    check_name(name, split, PICTURES)
    if name == "imagenet":
        return open_class_folders(given(name, root) / split)
    folder = (default_root() if root is None else Path(root)) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is not in {folder.parent}; fetch it: python tools/get_data.py {name}")
    if name == "fashion_mnist":
        return FashionMNIST(folder, train=split == "train")
    return open_class_folders(folder / split)


def open_dataset(name: str, root: str | os.PathLike[str] | None = None, split: str = "train") -> VisionDataset:
    """The data set of that name in torchvision's form.

    Args:
        name: One of those of `load_pictures`, or
            "coco": root/{train,val}2017 and root/annotations/instances_{train,val}2017.json;
            "composites": what `data.composites` makes, its boxes and masks; both give a CocoDetection;
            "ade20k": root/{images,annotations}/{training,validation}, a `SegmentationFolder`; composites too have
            this form.
        root: As in `load_pictures`; the folder itself for all that is not fetched.
        split: "train" or "val" ("test" for fetched pictures).

    Raises:
        ValueError: An unknown name or split, a folder with another layout, or a broken annotation file.
        FileNotFoundError: A folder or file is missing.
        ImportError: pycocotools, for "coco" and "composites", is not installed.
    """
    check_name(name, split, tuple(SPLITS))
    if name in PICTURES:
        return load_pictures(name, split, root)
    folder = given(name, root)
    if name == "coco":
        return open_coco(folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json")
    if name == "composites":
        return open_coco(folder / "images" / LONG[split], folder / "annotations" / f"instances_{LONG[split]}.json")
    return SegmentationFolder(folder / "images" / LONG[split], folder / "annotations" / LONG[split])


def check_name(name: str, split: str, names: tuple[str, ...]) -> None:
    """A ValueError for an unknown data set or split."""
    if name not in names:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(names)}")
    if split not in SPLITS[name]:
        raise ValueError(f"{name} has the splits {' and '.join(SPLITS[name])}, got {split!r}")


def given(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The root as a path; a ValueError if there is none, a FileNotFoundError if it does not exist."""
    if root is None:
        raise ValueError(f"{name} is not fetched: give the folder that holds it as root")
    return existing(Path(root))


def existing(folder: Path) -> Path:
    """The folder, if it is one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return folder


class AnnotatedImages(CocoDetection):
    """torchvision's CocoDetection of read annotations, its images turned as those are and read as `effvit.images` says.

    Args:
        root: Folder of the images.
        content: COCO's annotations.
    """

    def __init__(self, root: Path, content: Coco) -> None:
        from pycocotools.coco import COCO

        VisionDataset.__init__(self, root)
        self.coco = COCO()
        self.coco.dataset = content
        self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)

    def _load_image(self, id: int) -> Image.Image:
        entry = self.coco.loadImgs(id)[0]
        return open_image(Path(self.root, entry["file_name"]), (entry["height"], entry["width"]))


def open_coco(images: Path, annotations: Path) -> CocoDetection:
    """torchvision's CocoDetection of annotations that were checked, and repaired where they have one reading only."""
    if find_spec("pycocotools") is None:
        raise ImportError("COCO annotations are read by pycocotools, which comes with the extra effvit[mm]")
    existing(images)
    if not annotations.is_file():
        raise FileNotFoundError(f"there is no annotation file {annotations}")
    content, _ = repair_coco(read_coco(annotations))
    missing = [file for image in content["images"] if not (images / (file := image["file_name"])).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} annotated images are not in {images}, the first is {missing[0]}")
    return AnnotatedImages(images, content)
