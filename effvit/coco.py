"""COCO's annotations without pycocotools: run lengths of masks, the check of a file, and pictures with them drawn."""

from __future__ import annotations

import colorsys
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from effvit.images import as_rgb

__all__ = ["check_coco", "decode_rle", "describe_error", "draw_objects", "encode_rle", "read_coco"]


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a mask (H, W): column by column, zeros first."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=np.int8(0))) if flat.size else np.empty(0, np.int64)
    counts = np.diff(np.concatenate([[0], changes, [flat.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def decode_rle(rle: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The mask (H, W), bool, of run lengths: the inverse of `encode_rle`.

    Raises:
        ValueError: The runs do not add up to the size.
    """
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"run lengths of a {height} x {width} mask must sum to {height * width}, got {counts.sum()}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def read_coco(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked contents of a COCO annotation file; pycocotools is not needed.

    Raises:
        ValueError: What `check_coco` refuses, or no JSON; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text())
        check_coco(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no intact COCO annotation file: {describe_error(error)}") from error
    return content


def describe_error(error: Exception) -> str:
    """What a reader of annotations stumbled over, in words."""
    return f"an entry lacks {error}" if isinstance(error, KeyError) else str(error)


def check_coco(content: Mapping[str, Any]) -> None:
    """Check that ids are unique, that annotations refer to pictures and categories, and that boxes have an area.

    Raises:
        ValueError: The first thing that is wrong.
        KeyError: A field that an entry lacks.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it must hold an object, got a {type(content).__name__}")
    ids: dict[str, set[int]] = {}
    for part in ("images", "categories", "annotations"):
        if not isinstance(content.get(part), list):
            raise ValueError(f"it has no list of {part}")
        ids[part] = {entry["id"] for entry in content[part]}
        if len(ids[part]) < len(content[part]):
            raise ValueError(f"ids of {part} must be unique, but {len(content[part]) - len(ids[part])} stand twice")
    for entry in content["annotations"]:
        for field, part in (("image_id", "images"), ("category_id", "categories")):
            if entry[field] not in ids[part]:
                raise ValueError(f"annotation {entry['id']} has {field} {entry[field]}, which is not among the {part}")
        box = entry["bbox"]
        if len(box) != 4 or box[2] <= 0 or box[3] <= 0:
            raise ValueError(f"annotation {entry['id']} must have a box [x, y, width > 0, height > 0], got {box}")


def draw_objects(image: Image.Image, objects: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Image.Image:
    """The picture with the masks tinted and the boxes and classes of COCO annotations drawn."""
    pixels = np.array(as_rgb(image))
    for entry in objects:
        mask = decode_rle(entry["segmentation"])
        pixels[mask] = (0.8 * pixels[mask] + 0.2 * np.array(colour(entry["category_id"]))).astype(np.uint8)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    for entry in objects:
        x, y, width, height = entry["bbox"]
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=colour(entry["category_id"]))
        pen.text(
            (x + 2, y), classes[entry["category_id"] - 1], fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0)
        )
    return drawn


def colour(category: int) -> tuple[int, int, int]:
    """A colour for each category, far from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(category * 0.381966 % 1, 1, 1)  # steps of the golden angle
    return round(255 * red), round(255 * green), round(255 * blue)
