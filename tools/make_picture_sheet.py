"""Write the images of Fashion-MNIST that come with the package: effvit/show/sheets/fashion_mnist.png and .json.

    python tools/get_data.py fashion_mnist
    python tools/make_picture_sheet.py

A column for each class, in it images of the test set, evenly spread over those of the class in the order of the set:
no model has a say in which they are. Their numbers in the test set are in the .json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.datasets import load_pictures
from PIL import Image

from effvit.messages import one_line
from effvit.show.pictures import SHEET

__all__ = ["Sheet", "main", "make_sheet"]

ROWS = 6


class Sheet(NamedTuple):
    """Pictures side by side.

    Attributes:
        image: A column for each class, a row for each image of it.
        classes: Names of the classes.
        indices: Rows of the numbers that the images have in their set.
    """

    image: Image.Image
    classes: list[str]
    indices: list[list[int]]


def make_sheet(pictures: Any, rows: int) -> Sheet:
    """``rows`` images of each class of a torchvision set of (image, label), evenly spread over the class.

    Raises:
        ValueError: A class with fewer images.
    """
    members: list[list[int]] = [[] for _ in pictures.classes]
    for index, label in enumerate(pictures.targets):
        members[int(label)].append(index)
    for name, own in zip(pictures.classes, members, strict=True):
        if len(own) < rows:
            raise ValueError(f"a sheet needs {rows} pictures of each class, but the set has {len(own)} of {name!r}")
    indices = [[own[row * len(own) // rows] for own in members] for row in range(rows)]
    width, height = pictures[0][0].size
    image = Image.new("L", (width * len(members), height * rows))
    for row, numbers in enumerate(indices):
        for column, index in enumerate(numbers):
            image.paste(pictures[index][0], (column * width, row * height))
    return Sheet(image, list(pictures.classes), indices)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sheet; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--root", type=Path, help="parent of the fetched sets (default: that of get_data.py)")
    parser.add_argument("--out", type=Path, default=SHEET, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    try:
        sheet = make_sheet(load_pictures("fashion_mnist", "test", arguments.root), ROWS)
    except (ValueError, OSError) as error:
        print(f"make_picture_sheet: error: {one_line(error)}", file=sys.stderr)
        return 2
    sheet.image.save(arguments.out, optimize=True)
    facts = {"classes": sheet.classes, "indices": sheet.indices}
    arguments.out.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
