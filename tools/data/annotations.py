"""COCO's annotations of made pictures: masks as run lengths, the annotation file, and objects drawn for the eye."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw

from effvit.dense.coco import Annotation, Coco, RunLengths, decode_rle
from effvit.images import as_rgb

__all__ = ["colour", "describe_objects", "draw_objects", "encode_rle", "write_annotations"]


def encode_rle(mask: np.ndarray) -> RunLengths:
    """COCO's uncompressed run lengths of a mask (H, W): column by column, zeros first."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=np.int8(0))) if flat.size else np.empty(0, np.int64)
    counts = np.diff(np.concatenate([[0], changes, [flat.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def describe_objects(owner: np.ndarray, labels: Sequence[int], image_id: int) -> list[Annotation]:
    """COCO's annotations of a picture, without their own ids.

    Args:
        owner: (H, W), number of the object a pixel shows, counted from 1; 0 is background.
        labels: Category of each object.
        image_id: The picture's.
    """
    objects: list[Annotation] = []
    for number, label in enumerate(labels, 1):
        mask = owner == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        objects.append(
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": encode_rle(mask),
            }
        )
    return objects


def write_annotations(
    path: Path, number: int, size: int, classes: Sequence[str], objects: Sequence[Annotation]
) -> None:
    """Write COCO's file for so many square pictures, numbered in order, and number their objects and classes."""
    content: Coco = {
        "images": [{"id": i + 1, "file_name": f"{i:06d}.jpg", "width": size, "height": size} for i in range(number)],
        "categories": [{"id": i, "name": label} for i, label in enumerate(classes, 1)],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(objects, 1)],
    }
    path.write_text(json.dumps(content, separators=(",", ":")))


def draw_objects(image: Image.Image, objects: Sequence[Annotation], classes: Sequence[str]) -> Image.Image:
    """The picture with the masks tinted and the boxes and classes of COCO annotations drawn."""
    pixels = np.array(as_rgb(image))
    shown = [(entry, int(entry["category_id"])) for entry in objects]
    for entry, category in shown:
        mask = decode_rle(cast(RunLengths, entry["segmentation"]))  # made pictures have no polygons
        pixels[mask] = (0.8 * pixels[mask] + 0.2 * np.array(colour(category))).astype(np.uint8)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    for entry, category in shown:
        x, y, width, height = entry["bbox"]
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=colour(category))
        pen.text((x + 2, y), classes[category - 1], fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return drawn


def colour(category: int) -> tuple[int, int, int]:
    """A colour for each category, far from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(category * 0.381966 % 1, 1, 1)  # steps of the golden angle
    return round(255 * red), round(255 * green), round(255 * blue)
