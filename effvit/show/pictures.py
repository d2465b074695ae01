"""Images that are on the machine already: labelled ones in this package, photographs in packages of the demo.

The sixty grey images are of the test set of Fashion-MNIST (1708.07747; MIT licence, beside them), six of each class,
evenly spread over the class by ``tools/make_picture_sheet.py``. ``vit_nano_patch4_28`` was trained on other images. The
twenty-five objects on photographs, one of each class, are test images of ``tools/data/scenes.py``; sources and licences
of what they are made of lie beside them.
"""

from __future__ import annotations

import json
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
    "photograph_files",
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


def photograph_files() -> dict[str, Path]:
    """The files of photographs inside other packages by name; nothing is downloaded.

    Raises:
        FileNotFoundError: A package that carries some is not installed.
    """
    found: dict[str, Path] = {}
    for package, files in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the demo's photographs come with the package {package}, which is not installed; install effvit[demo]"
            )
        found |= {Path(file).stem: Path(spec.origin).parent / file for file in files}
    return found


def photographs() -> dict[str, Image.Image]:
    """The photographs of ``photograph_files`` in RGB, all decoded; errors as of these."""
    return {name: open_image(file) for name, file in photograph_files().items()}
