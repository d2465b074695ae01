"""Write the labelled images that come with the package, effvit/show/sheets/NAME.png, and NAME.json: which they are.

    python tools/get_data.py fashion_mnist emoji photographs
    python tools/make_picture_sheet.py fashion_mnist
    python tools/make_picture_sheet.py cutouts

Fashion-MNIST: a column for each class, in it images of the test set, evenly spread over those of the class in the order
of the set. Objects on photographs (`data.scenes`): one image of each class in rows, the first of the test split on a
photograph that may be passed on under CC BY. No model has a say in which they are. Their numbers in the test set are in
the .json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.cutouts import CLASSES, Split, open_split
from data.datasets import load_pictures
from data.scenes import SIZE, draw_scenes
from PIL import Image

from effvit.messages import one_line
from effvit.show.pictures import CUTOUTS, SHEET

__all__ = ["Sheet", "main", "make_cutouts_sheet", "make_sheet"]

ROWS = 6
COLUMNS = 5  # of the sheet of objects on photographs
CC_BY = ("Picture_1A", "aitzgorri", "life")  # photographs; those of the others are GPL
SEARCHED = 2000  # images among which one of each class is looked for


class Sheet(NamedTuple):
    """Pictures side by side.

    Attributes:
        image: All of them.
        classes: Names of the classes.
        indices: Rows of the numbers that the images have in their set, as they lie in the image.
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


def make_cutouts_sheet(split: Split) -> Sheet:
    """The first test image of each class that lies on one of the photographs of CC_BY, in the order of the classes.

    Raises:
        ValueError: None of a class among the first SEARCHED.
    """
    drawn = draw_scenes(split, "test", range(SEARCHED))
    allowed = [split.scenery.names[number] in CC_BY for number in drawn.photographs.tolist()]
    first: dict[int, int] = {}
    for index, label in enumerate(drawn.labels.tolist()):
        if allowed[index]:
            first.setdefault(label, index)
    if missing := [name for label, name in enumerate(CLASSES) if label not in first]:
        raise ValueError(f"a sheet needs an image of each class, but {SEARCHED} have none of {', '.join(missing)}")
    image = Image.new("RGB", (SIZE * COLUMNS, SIZE * -(-len(CLASSES) // COLUMNS)))
    for label, index in sorted(first.items()):
        pixels = Image.fromarray(drawn.images[index].permute(1, 2, 0).numpy())
        image.paste(pixels, (SIZE * (label % COLUMNS), SIZE * (label // COLUMNS)))
    indices = [first[label] for label in range(len(CLASSES))]
    return Sheet(image, [*CLASSES], [indices[i : i + COLUMNS] for i in range(0, len(indices), COLUMNS)])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sheet; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("name", choices=("fashion_mnist", "cutouts"), help="which images")
    parser.add_argument("--root", type=Path, help="parent of the fetched sets (default: that of get_data.py)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: that of the package")
    arguments = parser.parse_args(argv)
    try:
        if arguments.name == "cutouts":
            sheet, out = make_cutouts_sheet(open_split("test", arguments.root)), arguments.out or CUTOUTS
        else:
            pictures = load_pictures("fashion_mnist", "test", arguments.root)
            sheet, out = make_sheet(pictures, ROWS), arguments.out or SHEET
    except (ValueError, OSError) as error:
        print(f"make_picture_sheet: error: {one_line(error)}", file=sys.stderr)
        return 2
    sheet.image.save(out, optimize=True)
    facts = {"classes": sheet.classes, "indices": sheet.indices}
    out.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
