"""Drawn images of bolts and nuts as somebody might have them: COCO files without area and iscrowd, and label maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 72, 96
CLASSES = ("bolt", "nut")
SPLITS = {"train": 8, "val": 4}


def write_parts(folder: Path) -> None:
    """train.json and val.json, images/<split>/*.png and *.jpg, masks/<split>/*.png: a bolt and a nut on each image."""
    generator = np.random.default_rng(0)
    for split, number in SPLITS.items():
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
        for part in ("images", "masks"):
            (folder / part / split).mkdir(parents=True)
        for index in range(1, number + 1):
            pixels = generator.integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8)
            labels = np.zeros((HEIGHT, WIDTH), np.uint8)
            name = f"{index}.png"
            content["images"].append({"id": index, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for label, left in ((1, 6), (2, 52)):
                top, width, height = int(generator.integers(4, 36)), 34, 30
                pixels[top : top + height, left : left + width] = (220, 60 * label, 40)
                labels[top : top + height, left : left + width] = label
                right, bottom = left + width, top + height
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": index,
                        "category_id": label,
                        "bbox": [left, top, width, height],
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
            Image.fromarray(pixels).save(folder / "images" / split / name)
            Image.fromarray(labels).save(folder / "masks" / split / name)
        (folder / f"{split}.json").write_text(json.dumps(content))


def save_as_jpeg(folder: Path) -> None:
    """The images of ``write_parts`` as JPEG files in place of PNG."""
    for path in sorted((folder / "images").rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
