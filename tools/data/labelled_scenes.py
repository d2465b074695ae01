"""The scenes of `data.scenes` as ``effvit.measure.evaluation.evaluate`` takes a set of labelled images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data.scenes import CHUNK, SIZE, Cutouts
from effvit.data.labelled import LabelledImages

__all__ = ["LabelledScenes"]


class LabelledScenes(LabelledImages):
    """The first images of a split, each made when it is read; no file is written.

    Neighbours are drawn together, which is what a reader that goes through the set in order asks for.

    Args:
        scenes: The data set, which says how many there are.
    """

    def __init__(self, scenes: Cutouts) -> None:
        name = f"{scenes.split} {scenes.seed}"
        super().__init__(
            f"cutouts, split {scenes.split}, seed {scenes.seed}",
            [f"{name} {index}" for index in range(len(scenes))],
            scenes.labels(),
        )
        self.scenes = scenes
        self._first = -1
        self._drawn = np.empty(0, dtype=np.uint8)  # (CHUNK, SIZE, SIZE, 3), those from _first on

    def read(self, index: int) -> Image.Image:
        first = index - index % CHUNK
        if first != self._first:
            images = self.scenes.scenes(range(first, first + CHUNK)).images
            self._first, self._drawn = first, images.permute(0, 2, 3, 1).numpy()
        return Image.fromarray(self._drawn[index - first])

    def check(self, index: int) -> None:
        pass  # they can always be made

    def size(self, index: int) -> int:
        return 3 * SIZE * SIZE
