"""Make a labelled detection and segmentation set by pasting cut-outs on photographs (`data.composites`).

Without --sprites and --backgrounds it takes what tools/get_data.py fetches:

    python tools/get_data.py stamps photographs
    python tools/make_composites.py --out runs/composites --train 2000 --val 500 --sheet runs/sheet.png

With --garments the cut-outs are the 70 000 of Fashion-MNIST (`data.garments`), which keep their own division:

    python tools/get_data.py fashion_mnist photographs
    python tools/make_composites.py --garments --out runs/garments --size 96 --scale 0.2 0.6
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.annotations import draw_objects
from data.composites import CLASSES, Settings, check_new, make_composites
from data.garments import GARMENTS, read_garments
from data.sources import default_root
from PIL import Image
from rich.progress import Progress

from effvit.dense.coco import read_coco
from effvit.images import open_image
from effvit.messages import one_line

__all__ = ["contact_sheet", "main"]


def contact_sheet(root: Path, split: str = "validation", rows: int = 3, columns: int = 4) -> Image.Image:
    """The first images of a split with their annotations drawn."""
    content = read_coco(root / "annotations" / f"instances_{split}.json")
    classes = [category["name"] for category in content["categories"]]
    images = content["images"][: rows * columns]
    width, height = images[0]["width"], images[0]["height"]
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, image in enumerate(images):
        objects = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        drawn = draw_objects(open_image(root / "images" / split / image["file_name"]), objects, classes)
        sheet.paste(drawn, (place % columns * width, place // columns * height))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Make the set and say what is in it; returns 2 after an error the caller can fix."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--size", type=int, default=defaults.size, help="side of the images, pixels")
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=defaults.scale,
        metavar=("SMALLEST", "LARGEST"),
        help="longer side of an object as a share of the image's",
    )
    parser.add_argument("--objects", type=int, nargs=2, default=defaults.objects, metavar=("FEWEST", "MOST"))
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help=f"a choice of {', '.join(CLASSES)}, or of the sub-folders of --sprites, or of garments (default: all)",
    )
    cut_outs = parser.add_mutually_exclusive_group()
    cut_outs.add_argument("--garments", action="store_true", help="the garments of Fashion-MNIST for cut-outs")
    cut_outs.add_argument("--sprites", type=Path, metavar="DIR", help="your own cut-outs, one sub-folder a class")
    parser.add_argument("--backgrounds", type=Path, metavar="DIR", help="your own photographs")
    parser.add_argument("--root", type=Path, help=f"where tools/get_data.py put its images (default: {default_root()})")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write validation images with their annotations")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"make_composites: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Make the set the parsed arguments describe."""
    root = arguments.root or default_root()
    known = CLASSES
    if arguments.garments:
        known = dict.fromkeys(GARMENTS, ())
    elif arguments.sprites is not None:
        folders = sorted(path.name for path in arguments.sprites.iterdir() if path.is_dir())
        known = {name: (f"{name}/*.png",) for name in folders}
    chosen = arguments.classes or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"unknown classes {', '.join(unknown)}; there are {', '.join(known)}")
    settings = Settings(
        size=arguments.size, objects=tuple(arguments.objects), scale=tuple(arguments.scale), seed=arguments.seed
    )
    check_new(arguments.out)  # before the garments are read, which takes a while
    started = time.perf_counter()
    sprites = read_garments(root) if arguments.garments else arguments.sprites or root / "stamps"
    with Progress(disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("pictures", total=arguments.train + arguments.val)
        record = make_composites(
            sprites,
            arguments.backgrounds or root / "photographs",
            arguments.out,
            train=arguments.train,
            val=arguments.val,
            settings=settings,
            classes={name: known[name] for name in chosen},
            workers=arguments.workers,
            progress=lambda number: bars.advance(task, number),
        )
    seconds = time.perf_counter() - started
    print(
        f"{arguments.out}: {arguments.train + arguments.val} pictures in {seconds:.1f} s, reading the sources included"
    )
    for split, part in record["splits"].items():
        print(f"{split}: {part['pictures']} pictures on {len(part['backgrounds'])} backgrounds")
        for name in chosen:
            print(f"  {name}: {part['objects'][name]} objects from {len(part['sprites'][name])} cut-outs")
    if arguments.sheet is not None:
        contact_sheet(arguments.out).save(arguments.sheet)
        print(arguments.sheet)


if __name__ == "__main__":
    sys.exit(main())
