"""What objects on photographs are made of, drawn in place of what is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from data.cutouts import Split, make_bank, make_scenery
from drawn_set import draw_sprite
from PIL import Image, ImageDraw

SHAPES = ("disc", "cross", "bar")


def drawn_split(distractors: Sequence[Image.Image] | None = None, objects: Any = None) -> Split:
    """Three classes of three drawn shapes, distractors without a class, and a light and a dark photograph."""
    shapes = objects or [[(f"{label}-{n}", draw_sprite(label, n)) for n in range(3)] for label in SHAPES]
    triangle = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(triangle).polygon([(0, 39), (39, 39), (20, 0)], (255, 0, 255, 255))
    others = [triangle] if distractors is None else distractors
    ramp = np.linspace(0, 255, 900)[None, :, None] * np.ones((620, 1, 3))
    photographs = {"light": 255 - ramp / 4, "dark": ramp / 4}
    return Split(
        make_bank(shapes),
        make_bank([[(f"other-{n}", image) for n, image in enumerate(others)]]),
        make_scenery({name: Image.fromarray(values.astype(np.uint8)) for name, values in photographs.items()}),
    )
