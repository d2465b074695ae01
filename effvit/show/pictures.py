"""Images that are on the machine already: labelled ones in this package, photographs in packages of the demo.

The sixty grey images are of the test set of Fashion-MNIST (1708.07747; MIT licence, beside them), six of each class,
evenly spread over the class by ``tools/make_picture_sheet.py``. ``vit_nano_patch4_28`` was trained on other images. The
twenty-five objects on photographs, one of each class, are test images of ``tools/data/scenes.py``; sources and licences
of what they are made of lie beside them.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from effvit.images import open_image, opened

__all__ = [
    "CUTOUTS",
    "SHEET",
    "Labelled",
    "cutout_classes",
    "cutout_pictures",
    "fashion_classes",
    "fashion_pictures",
    "find_pictures",
    "open_images",
    "photographs",
]

SHEET = Path(__file__).with_name("sheets") / "fashion_mnist.png"
CUTOUTS = SHEET.with_name("cutouts.png")
# Package -> files of its wheel; all are public domain, CC0 or CC BY photographs. Read from the folder: the
# packages' own loaders may ask the network.
PHOTOGRAPHS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


class Labelled(NamedTuple):
    """An image and the number of its class."""

    image: Image.Image
    label: int


def fashion_classes() -> list[str]:
    """The ten classes of Fashion-MNIST in the order of their numbers: "T-shirt/top" to "Ankle boot"."""
    classes: list[str] = json.loads(SHEET.with_suffix(".json").read_text())["classes"]
    return classes


def fashion_pictures() -> dict[str, Labelled]:
    """Fashion-MNIST's images in the package, grey, 28 x 28, by name: "t-shirt-0", "trouser-0" to "ankle-boot-5"."""
    classes = fashion_classes()
    with opened(SHEET) as sheet:
        side = sheet.width // len(classes)
        return {
            f"{name.partition('/')[0].lower().replace(' ', '-')}-{row}": Labelled(
                sheet.crop((label * side, row * side, (label + 1) * side, (row + 1) * side)), label
            )
            for row in range(sheet.height // side)
            for label, name in enumerate(classes)
        }


def cutout_classes() -> list[str]:
    """The 25 classes of objects on photographs in the order of their numbers."""
    classes: list[str] = json.loads(CUTOUTS.with_suffix(".json").read_text())["classes"]
    return classes


def cutout_pictures() -> dict[str, Labelled]:
    """The objects on photographs in the package, RGB, 96 x 96, by the names of their classes: "trouser", "clock"."""
    facts = json.loads(CUTOUTS.with_suffix(".json").read_text())
    columns = len(facts["indices"][0])
    with opened(CUTOUTS) as sheet:
        side = sheet.width // columns
        corners = [(side * (label % columns), side * (label // columns)) for label in range(len(facts["classes"]))]
        return {
            name: Labelled(sheet.crop((x, y, x + side, y + side)), label)
            for label, (name, (x, y)) in enumerate(zip(facts["classes"], corners, strict=True))
        }


def photographs() -> dict[str, Image.Image]:
    """Photographs inside other packages by name, in RGB; nothing is downloaded.

    Raises:
        FileNotFoundError: A package that carries some is not installed.
    """
    found = {}
    for package, files in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the demo's photographs come with the package {package}, which is not installed; install effvit[demo]"
            )
        for file in files:
            found[Path(file).stem] = open_image(Path(spec.origin).parent / file)
    return found


def find_pictures(text: str) -> dict[str, Image.Image]:
    """The images that a text of the command line names, in RGB.

    Args:
        text: "fashion_mnist:PATTERN", "cutouts:PATTERN" or "photographs:PATTERN" with a shell-style pattern of their
            names, else a file.

    Raises:
        ValueError: A pattern that matches none, or a file that is no image (``effvit.images.open_image``).
        FileNotFoundError: No such file; for "photographs:" as ``photographs``.
    """
    kind, _, pattern = text.partition(":")
    if kind not in ("fashion_mnist", "cutouts", "photographs"):
        return {Path(text).stem: open_image(text)}
    if kind == "photographs":
        known = photographs()
    else:
        labelled = fashion_pictures() if kind == "fashion_mnist" else cutout_pictures()
        known = {name: entry.image for name, entry in labelled.items()}
    found = {name: image.convert("RGB") for name, image in known.items() if fnmatch.fnmatch(name, pattern)}
    if not found:
        raise ValueError(f"{text} names no picture; {kind}: has {', '.join(known)}")
    return found


def open_images(texts: Sequence[str]) -> dict[str, Image.Image]:
    """The images that the texts name, in RGB, by name.

    Raises:
        ValueError, OSError: As ``find_pictures``; of several that cannot be read, all are named. Or two have one name.
    """
    images: dict[str, Image.Image] = {}
    errors: list[ValueError | OSError] = []
    for text in texts:
        try:
            found = find_pictures(text)
        except (ValueError, OSError) as error:
            errors.append(error)
            continue
        again = [name for name in found if name in images]
        if again:
            raise ValueError(f"images must differ in name, which {text} does not: {', '.join(again)}")
        images |= found
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ValueError(f"{len(errors)} of {len(texts)} images cannot be used: {'; '.join(map(str, errors))}")
    return images
