"""The sets on which choices of tokens are measured, with the model that was trained on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.cutouts import SPLITS, Split
from data.labelled_scenes import LabelledScenes
from data.scenes import Cutouts
from effvit.data.labelled import LabelledImages, PixelImages
from effvit.data.opening import open_labelled

__all__ = ["CALIBRATION_IMAGES", "ChoiceSet", "Wide", "cutouts", "fashion_mnist"]

CALIBRATION_IMAGES = 512  # of the training split, for methods that learn from images
RAW = Path("fashion_mnist", "FashionMNIST", "raw")
FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


class Wide(NamedTuple):
    """Images with a margin around them, from which shifted crops are taken.

    Attributes:
        pixels: (B, channels, H + 2 margin, W + 2 margin) uint8.
        masks: (B, H + 2 margin, W + 2 margin) bool, the pixels of the labelled object; None where nothing says which
            they are.
    """

    pixels: Tensor
    masks: Tensor | None


class ChoiceSet(NamedTuple):
    """A set of labelled images.

    Attributes:
        model: Name of the model that was trained on it.
        test: Images to evaluate on.
        training: Images to calibrate on, at least CALIBRATION_IMAGES.
        wide: (indices of ``test``, margin in pixels) -> these images with the margin.
    """

    model: str
    test: LabelledImages
    training: LabelledImages
    wide: Callable[[Sequence[int], int], Wide]


def cutouts(root: Path, number: int, parts: Mapping[str, Split] | None = None) -> ChoiceSet:
    """Objects on photographs (`data.scenes`), made on the spot.

    Args:
        root: What ``tools/get_data.py`` fetched into.
        number: Test images.
        parts: Split -> what its images are made of in place of what was fetched.

    Raises:
        ValueError, FileNotFoundError: As `data.scenes.Cutouts`.
    """
    lengths = {"train": CALIBRATION_IMAGES, "test": number}
    own = {
        split: Cutouts(split, root, length=lengths[split], parts=None if parts is None else parts[split])
        for split in SPLITS
    }

    def wide(indices: Sequence[int], margin: int) -> Wide:
        scenes = own["test"].scenes(indices, margin)
        return Wide(scenes.images, scenes.masks)

    return ChoiceSet("vit_nano_patch8_96", LabelledScenes(own["test"]), LabelledScenes(own["train"]), wide)


def fashion_mnist(root: Path) -> ChoiceSet:
    """Fashion-MNIST. Its garments stand on black, and so the margin is black.

    Args:
        root: What ``tools/get_data.py`` fetched into.

    Raises:
        ValueError, FileNotFoundError: As ``open_labelled``.
    """
    found = {split: grey_images(root / RAW / name, f"Fashion-MNIST, split {split}") for split, name in FILES.items()}
    test = found["test"]

    def wide(indices: Sequence[int], margin: int) -> Wide:
        return Wide(F.pad(test.pixels[torch.as_tensor(indices)][:, None], [margin] * 4), None)

    return ChoiceSet("vit_nano_patch4_28", test, found["train"], wide)


def grey_images(path: Path, place: str) -> PixelImages:
    """The images of an IDX file, under a name that says no path."""
    images = open_labelled(path)
    assert isinstance(images, PixelImages)  # of every IDX file
    images.place = place
    return images
