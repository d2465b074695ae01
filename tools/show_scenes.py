"""Look at objects on photographs (`data.scenes`), write them as files and count how many are made per second.

python tools/get_data.py emoji fashion_mnist photographs
python tools/show_scenes.py --split test --number 60 --boxes --out scenes.png
python tools/show_scenes.py --split test --number 10000 --folder scenes  # for effvit evaluate | tune --data scenes
python tools/show_scenes.py --speed 4096 --threads 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from data.cutouts import CLASSES, SPLITS
from data.scenes import SIZE, Cutouts, Scenes
from PIL import Image, ImageDraw

from effvit.messages import run_command
from effvit.schedule import check_count

__all__ = ["draw_grid", "images_per_second", "main", "write_folder"]

COLUMNS = 10
CAPTION = 14  # pixels below an image
BATCH = 128


def draw_grid(scenes: Scenes, boxes: bool) -> Image.Image:
    """The images side by side at twice their size, each above its class, with boxes if wanted."""
    width, height = 2 * SIZE, 2 * SIZE + CAPTION
    number = len(scenes.images)
    grid = Image.new("RGB", (width * min(number, COLUMNS), height * -(-number // COLUMNS)))
    pen = ImageDraw.Draw(grid)
    for place, (pixels, label, box) in enumerate(
        zip(scenes.images, scenes.labels.tolist(), scenes.boxes.tolist(), strict=True)
    ):
        x, y = width * (place % COLUMNS), height * (place // COLUMNS)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        grid.paste(image.resize((width, width), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + width), CLASSES[label], fill=(255, 255, 255))
        if boxes:
            left, top, right, bottom = (2 * side for side in box)
            pen.rectangle((x + left, y + top, x + right - 1, y + bottom - 1), outline=(255, 0, 0))
    return grid


def write_folder(dataset: Cutouts, indices: range, folder: Path) -> None:
    """The images as PNG files, ``folder/<class>/<index>.png``."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for first in range(indices.start, indices.stop, BATCH):
        part = range(first, min(first + BATCH, indices.stop))
        scenes = dataset.scenes(part)
        for index, pixels, label in zip(part, scenes.images, scenes.labels.tolist(), strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / CLASSES[label] / f"{index:06d}.png")


def images_per_second(dataset: Cutouts, number: int) -> float:
    """How fast so many images are made in batches of BATCH, after one that does not count."""
    dataset.scenes(range(BATCH))
    begin = time.perf_counter()
    for first in range(0, number, BATCH):
        dataset.scenes(range(first, min(first + BATCH, number)))
    return number / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    """Show; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--root", type=Path, help="parent of the fetched sources (default: that of get_data.py)")
    parser.add_argument("--first", type=int, default=0, help="index of the first image")
    parser.add_argument("--number", type=int, default=60, help="of images in the grid or the folder")
    parser.add_argument("--boxes", action="store_true", help="draw the box of the labelled object")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="where to write the grid")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write PNG files, a folder for each class")
    parser.add_argument("--speed", type=int, metavar="IMAGES", help="make so many and print how many per second")
    parser.add_argument("--threads", type=int, default=1, help="for --speed")
    arguments = parser.parse_args(argv)
    if arguments.out is None and arguments.folder is None and arguments.speed is None:
        parser.error("say what to do: --out FILE.png, --folder DIR, --speed IMAGES or several of them")
    return run_command("show_scenes", lambda: show(arguments))


def show(arguments: argparse.Namespace) -> None:
    """Write the grid and the folder and print the speed, as asked for."""
    number = check_count("--number", arguments.number, 1)
    first = check_count("--first", arguments.first)
    dataset, indices = Cutouts(arguments.split, arguments.root, length=number), range(first, first + number)
    if arguments.out is not None:
        draw_grid(dataset.scenes(indices), arguments.boxes).save(arguments.out)
    if arguments.folder is not None:
        write_folder(dataset, indices, arguments.folder)
    if arguments.speed is not None:
        torch.set_num_threads(check_count("--threads", arguments.threads, 1))
        speed = images_per_second(dataset, check_count("--speed", arguments.speed, 1))
        print(f"{speed:.0f} images per second on {arguments.threads} thread{'s' if arguments.threads > 1 else ''}")


if __name__ == "__main__":
    sys.exit(main())
