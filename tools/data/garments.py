"""Cut-outs of Fashion-MNIST (1708.07747) for `data.composites`: many thousands of real objects of ten classes.

The pictures show one garment on black, so what is not black is the garment. They come divided: what the set names its
test pictures is shown in validation only.
"""

from __future__ import annotations

import os

from PIL import Image, ImageFilter

from data.composites import DividedSprites, Sprite
from data.datasets import load_pictures

__all__ = ["GARMENTS", "outline", "read_garments"]

GARMENTS = (  # in the order of the set's labels
    "t-shirt-top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)

BLACK = 16  # grey values from 0 to this one are background
CLOTH = [255 * (value > BLACK) for value in range(256)]  # grey value -> opacity


def read_garments(root: str | os.PathLike[str] | None = None) -> DividedSprites:
    """The cut-outs for training, and those for validation: class -> cut-outs, in the order of the set.

    Args:
        root: Where ``tools/get_data.py`` put the pictures; None is its default.

    Raises:
        FileNotFoundError: The pictures were not fetched.
    """
    return cut_outs("train", root), cut_outs("test", root)


def cut_outs(split: str, root: str | os.PathLike[str] | None) -> dict[str, list[Sprite]]:
    """Class -> cut-outs of one split, "train" or "test"."""
    found: dict[str, list[Sprite]] = {name: [] for name in GARMENTS}
    for number, (picture, label) in enumerate(load_pictures("fashion_mnist", split, root)):
        found[GARMENTS[label]].append(Sprite(f"{split}/{number:05d}", outline(picture)))
    return found


def outline(picture: Image.Image) -> Image.Image:
    """The garment of a grey picture in RGBA, opaque where it is and cropped to it; dark gaps of a pixel are closed."""
    alpha = picture.point(CLOTH).filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.MinFilter(3))
    garment = Image.merge("RGBA", (picture, picture, picture, alpha))
    return garment.crop(alpha.getbbox())
