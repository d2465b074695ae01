"""A small detection and segmentation set of drawn cut-outs on gradients, made as that of real pictures is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from data.composites import Settings, make_composites
from PIL import Image, ImageDraw

SIZE = 64
PATTERNS = {"disc": ("disc/*.png",), "cross": ("cross/*.png",), "bar": ("bar/*.png",)}
NAMES = ("ash", "birch", "cedar", "elm", "fir")
SETTINGS = Settings(size=SIZE, objects=(1, 4), scale=(0.2, 0.6), seed=3)


def draw_sprite(label: str, number: int) -> Image.Image:
    """A shape of its own colour and size on transparent ground."""
    side = 48 + 4 * number
    image = Image.new("RGBA", (side + 10, side + 6))
    pen = ImageDraw.Draw(image)
    ink = (40 * number, 200 - 30 * number, 90 + 25 * number, 255)
    if label == "disc":
        pen.ellipse((4, 3, 4 + side, 3 + side), ink)
    elif label == "bar":
        pen.rectangle((4, 3, 4 + side, 44), ink)
    else:
        pen.rectangle((4, side // 2 - 5, 4 + side, side // 2 + 5), ink)
        pen.rectangle((side // 2, 3, side // 2 + 10, 3 + side), ink)
    return image


def write_sources(root: Path) -> None:
    """sprites/<class>/*.png and backgrounds/*.png."""
    for label in PATTERNS:
        (root / "sprites" / label).mkdir(parents=True)
        for number, name in enumerate(NAMES):
            draw_sprite(label, number).save(root / "sprites" / label / f"{name}-{number}.png")
    (root / "backgrounds").mkdir()
    for number, name in enumerate(("sea", "sky", "wall", "wood")):
        ramp = np.linspace(0, 60 * (number + 1), 150)[None, :, None] + np.linspace(0, 15, 100)[:, None, None]
        Image.fromarray((ramp * (1, 0.5, 0.2)).astype(np.uint8)).save(root / "backgrounds" / f"{name}.png")


def make(sources: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Compose 12 training and 5 validation pictures of the sources in the folder ``out``."""
    arguments = {"train": 12, "val": 5, "settings": SETTINGS, "classes": PATTERNS, "workers": 2} | changes
    return make_composites(sources / "sprites", sources / "backgrounds", out, **arguments)
