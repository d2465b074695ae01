"""COCO's annotations without pycocotools: run lengths of masks, and the check and repair of a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeGuard, cast

import numpy as np

__all__ = [
    "Annotation",
    "Category",
    "Coco",
    "ImageEntry",
    "Key",
    "Repairs",
    "RunLengths",
    "check_coco",
    "count_objects",
    "decode_rle",
    "load_coco",
    "read_coco",
    "read_detections",
    "repair_coco",
    "run_lengths",
]

PARTS = ("images", "categories", "annotations")
MIN_POINTS = 3  # of a polygon that has an area
Key: TypeAlias = "int | float | str"
"""An id: a whole number or text."""
Entry: TypeAlias = Mapping[str, object]  # of a file that is not checked yet


class RunLengths(TypedDict):
    """A mask by the lengths of its runs, column by column, zeros first.

    Attributes:
        size: Height and width.
        counts: The lengths, or COCO's text of them.
    """

    size: list[int]
    counts: list[int] | str


class Category(TypedDict):
    """A class of objects."""

    id: Key
    name: str


class ImageEntry(TypedDict, total=False):
    """An image. ``id`` is always there; sizes are in pixels."""

    id: Key
    file_name: str
    width: int
    height: int


class Annotation(TypedDict, total=False):
    """An object. ``id``, ``image_id``, ``category_id`` and ``bbox`` [x, y, width, height] are always there."""

    id: Key
    image_id: Key
    category_id: Key
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: RunLengths | list[list[float]]


class Coco(TypedDict):
    """What an annotation file holds."""

    images: list[ImageEntry]
    categories: list[Category]
    annotations: list[Annotation]


COUNT_BITS, COUNT_SIGN, COUNT_MORE, COUNT_ZERO = 5, 0x10, 0x20, 48  # of COCO's text of run lengths


def decode_rle(rle: RunLengths) -> np.ndarray:
    """The mask (H, W), bool, of run lengths, as numbers or as COCO's text.

    Raises:
        ValueError: The runs do not add up to the size.
    """
    height, width = rle["size"]
    counts = np.asarray(run_lengths(rle), np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"run lengths of a {height} x {width} mask must sum to {height * width}, got {counts.sum()}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def run_lengths(rle: RunLengths) -> list[int]:
    """The runs of a mask as numbers, also where they are COCO's text (cocodataset/cocoapi, maskApi.c, rleFrString).

    In the text, a number is a series of characters of five bits each, the lowest first; a sixth bit says that more
    follow, the fifth of the last is the sign. From the fourth number on, each is the difference to the last but one.

    Raises:
        ValueError: A character that is not of the text, or a number that is cut off.
    """
    text = rle["counts"]
    if not isinstance(text, str):
        return list(text)
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - COUNT_ZERO
        if not 0 <= bits < 2 * COUNT_MORE:
            raise ValueError(f"run lengths have no character {character!r}")
        value |= (bits & (COUNT_MORE - 1)) << shift
        shift += COUNT_BITS
        if not bits & COUNT_MORE:
            if bits & COUNT_SIGN:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("run lengths end in the middle of a number")
    return counts


def load_coco(path: str | os.PathLike[str]) -> object:
    """What a JSON file holds; a mark of the byte order at its start is no part of it.

    Raises:
        OSError: The file cannot be opened.
        ValueError: An empty file, one that is not UTF-8, or no JSON; the message names the file and a remedy.
    """
    path = Path(path)
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is no intact COCO annotation file: it is empty; write or fetch it again")
    try:
        loaded: object = json.loads(content.decode("utf-8-sig"))
        return loaded
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no intact COCO annotation file: byte {error.start} is not UTF-8; convert it, e.g. by iconv"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is no intact COCO annotation file: it is nested too deep") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is no intact COCO annotation file: {error}; if it is cut off, write or fetch it again"
        ) from error


def read_coco(path: str | os.PathLike[str]) -> Coco:
    """The checked contents of a COCO annotation file, without repairs; pycocotools is not needed.

    Raises:
        ValueError: What `load_coco` and `check_coco` refuse; the message names the file.
    """
    content = load_coco(path)
    try:
        check_coco(content)
    except ValueError as error:
        raise ValueError(f"{path} is no intact COCO annotation file: {error}") from error
    return cast(Coco, content)


def read_detections(path: str | os.PathLike[str], *, masks: bool, unlabelled: bool = False) -> Coco:
    """The checked contents of an annotation file that a detector is trained or measured with, without repairs.

    Args:
        path: The file.
        masks: As `check_coco`.
        unlabelled: Annotations may be missing, as of test images whose predictions are only written.

    Raises:
        OSError: The file cannot be opened.
        ValueError: What `load_coco` and `check_coco` refuse, images without file or size, categories without name.
    """
    content = load_coco(path)
    if unlabelled and isinstance(content, dict):
        content.setdefault("annotations", [])
    try:
        check_coco(content, masks=masks)
        checked = cast(Coco, content)
        check_fields(checked)
    except ValueError as error:
        raise ValueError(f"{path} is no intact COCO annotation file: {error}") from error
    return checked


def check_fields(content: Coco) -> None:
    """Raise a ValueError unless images have files and sizes and categories have names, which mmdet needs."""
    for image in content["images"]:
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise ValueError(f"image {image['id']} must have a file_name, got {image.get('file_name')!r}")
        for side, pixels in (("height", image.get("height")), ("width", image.get("width"))):
            if type(pixels) not in (int, float) or pixels is None or not pixels >= 1 or pixels % 1:
                raise ValueError(
                    f"image {image['id']} ({image['file_name']}) must have a {side} in pixels, got {pixels!r}"
                )
    for category in content["categories"]:
        if not isinstance(category.get("name"), str):
            raise ValueError(f"category {category['id']} must have a name, got {category.get('name')!r}")


def check_coco(content: object, *, masks: bool = False) -> None:
    """Check what has only one reading: ids are unique, annotations refer to images and categories, boxes are numbers.

    Boxes without area, missing `iscrowd` and missing `area` are no errors: `repair_coco` knows what they mean.

    Args:
        content: What the file holds.
        masks: Every annotation must have a mask, too: polygons, or run lengths of the image's size.

    Raises:
        ValueError: What is wrong; the message names the first entry, how many are alike, and a remedy.
    """
    if not is_entry(content):
        raise ValueError(f"it must hold an object, got a {type(content).__name__}")
    ids = {part: check_ids(content, part) for part in PARTS}
    entries = entries_of(content, "annotations")
    for field, part in (("image_id", "images"), ("category_id", "categories")):
        known = ids[part]
        wrong = [entry for entry in entries if not is_among(entry.get(field), known)]
        if wrong:
            value = wrong[0].get(field)
            what = f"{field} {value!r}, which is not among the {part}{of_type(value, known)}"
            raise ValueError(
                f"{named(wrong)} has {what if field in wrong[0] else f'no {field}'}; correct it, or leave it out"
            )
    check_boxes(entries)
    if masks:
        images = entries_of(content, "images")
        sizes = {entry["id"]: (entry.get("height"), entry.get("width")) for entry in images}
        check_masks(entries, sizes)


def is_entry(value: object) -> TypeGuard[Entry]:
    """Whether a value of a JSON file is an object."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[object]]:
    """Whether a value of a JSON file is a list."""
    return isinstance(value, list)


def entries_of(content: Entry, part: str) -> list[Entry]:
    """The entries of a part of the file; the error of `check_coco` unless it is a list of objects."""
    entries = content.get(part)
    if not is_list(entries):
        raise ValueError(f"it has no list of {part}")
    for number, entry in enumerate(entries):
        if not is_entry(entry):
            raise ValueError(f"{part} must be objects, but number {number} is a {type(entry).__name__}")
    return [entry for entry in entries if is_entry(entry)]


def named(entries: Sequence[Entry]) -> str:
    """The subject of a sentence about annotations: "annotation 7 (the first of 3)"."""
    return f"annotation {entries[0]['id']}" + (f" (the first of {len(entries)})" if len(entries) > 1 else "")


def is_among(value: object, known: AbstractSet[Key]) -> bool:
    """Whether the value is one of the known ones; lists and objects never are."""
    return isinstance(value, (int, str, float)) and value in known


def of_type(value: object, known: AbstractSet[Key]) -> str:
    """A hint for ids that differ from the known ones in nothing but their type."""
    kinds = sorted({type(entry).__name__ for entry in known})
    return f" (a {type(value).__name__}, where theirs are {', '.join(kinds)})" if str(value) in map(str, known) else ""


def check_ids(content: Entry, part: str) -> set[Key]:
    """The ids of a part of the file; the error of `check_coco` if one is missing, odd, or stands twice."""
    ids: set[Key] = set()
    doubles: list[Key] = []
    for number, entry in enumerate(entries_of(content, part)):
        key = entry.get("id")
        if isinstance(key, bool) or (not isinstance(key, (int, str)) and not (isinstance(key, float) and key % 1 == 0)):
            raise ValueError(f"{part} must have ids, whole numbers or text, but number {number} has {key!r}")
        if key in ids:
            doubles.append(key)
        ids.add(key)
    if doubles:
        raise ValueError(
            f"ids of {part} must be unique, but {len(doubles)} stand twice, the first is {doubles[0]!r}; "
            "number them anew, or leave the doubles out"
        )
    return ids


def check_boxes(entries: Sequence[Entry]) -> None:
    """The error of `check_coco` unless every box is of four finite numbers, without a negative width or height."""
    for entry in entries:
        box = entry.get("bbox")
        if not are_numbers(box) or len(box) != 4 or box[2] < 0 or box[3] < 0:
            raise ValueError(
                f"annotation {entry['id']} must have a box [x, y, width, height] of finite numbers, width and height "
                f"not negative, got {str(box)[:100]}; correct it, or leave the annotation out"
            )


def are_numbers(values: object) -> TypeGuard[list[float]]:
    """Whether a value is a list of numbers that are finite as floats; JSON has whole numbers of any length."""
    return isinstance(values, list) and all(type(value) in (int, float) and -1e12 < value < 1e12 for value in values)


def check_masks(entries: Sequence[Entry], sizes: Mapping[object, tuple[object, object]]) -> None:
    """The error of `check_coco` unless every annotation with an area has a mask of its image."""
    wrong = [entry for entry in entries if mask_fault(entry, sizes[entry["image_id"]]) is not None]
    if wrong:
        raise ValueError(
            f"{named(wrong)} {mask_fault(wrong[0], sizes[wrong[0]['image_id']])}; correct its segmentation, leave the "
            "annotation out, or train a model without masks"
        )


def mask_fault(entry: Entry, size: tuple[object, object]) -> str | None:
    """What is wrong with the mask of an annotation whose box has an area, or None."""
    mask, box = entry.get("segmentation"), entry["bbox"]
    if are_numbers(box) and 0 in box[2:]:
        return None  # it is left out
    if not mask:
        return "has no mask" if mask is None else "has an empty mask"
    if is_entry(mask):
        return run_fault(mask, size)
    polygons = [part for part in mask if is_list(part)] if is_list(mask) else []
    if not is_list(mask) or len(polygons) < len(mask):
        return "has a mask that is neither a list of polygons [x, y, x, y, ...] nor run lengths"
    for polygon in polygons:
        if len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers, which are no pairs of x and y"
        if not are_numbers(polygon):
            return "has a polygon with coordinates that are no finite numbers"
    if all(len(polygon) < 2 * MIN_POINTS for polygon in polygons):
        return f"has no polygon of at least {MIN_POINTS} points"
    return None


def run_fault(rle: Entry, size: tuple[object, object]) -> str | None:
    """What is wrong with run lengths of a mask on an image of size (height, width), or None."""
    own = rle.get("size")
    if not is_list(own) or not isinstance(rle.get("counts"), (list, str)):
        return "has run lengths without size and counts"
    if tuple(own) != size:
        return f"has run lengths of size {own} on an image of {list(size)} (height, width)"
    try:
        counts = run_lengths(cast(RunLengths, rle))
    except ValueError as error:
        return f"has broken {error}"
    pixels = math.prod(cast(RunLengths, rle)["size"])
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != pixels:
        return f"has run lengths that do not add up to the {pixels} pixels of its image"
    return None


@dataclass
class Repairs:
    """How many annotations and images a repair met, by what was done with them.

    Attributes:
        annotations: Of the file.
        images: Of the file.
        crowds: Regions of many objects (`iscrowd`), which no loss and no metric counts as an object.
        no_area: Boxes without width or height, left out.
        outside: Boxes that share no pixel with their image, left out.
        thin: Boxes that are less than a pixel wide or high, which mmdet leaves out when it trains.
        iscrowd: Annotations without `iscrowd`, which then is 0.
        area: Annotations without a positive `area`, which then is that of the mask, or of the box where there is none.
        polygons: Parts of masks with fewer than three points, left out.
        ids: Ids that pycocotools' evaluation mistakes for "no match" (0) or cannot hold (text), numbered anew.
        bare: Images without annotations, after what was left out.
    """

    annotations: int = 0
    images: int = 0
    crowds: int = 0
    no_area: int = 0
    outside: int = 0
    thin: int = 0
    iscrowd: int = 0
    area: int = 0
    polygons: int = 0
    ids: int = 0
    bare: int = 0

    @property
    def changes(self) -> bool:
        """Whether the repaired content differs from the file."""
        return any((self.no_area, self.outside, self.iscrowd, self.area, self.polygons, self.ids))

    def __str__(self) -> str:
        texts = {
            "no_area": "boxes without area, left out",
            "outside": "boxes outside their images, left out",
            "thin": "boxes under a pixel, which mmdet does not train on",
            "iscrowd": "iscrowd set to 0",
            "area": "area computed",
            "polygons": "polygons of fewer than three points, left out",
            "ids": "annotation ids numbered anew",
            "crowds": "crowd regions",
            "bare": "images without annotations",
        }
        numbers: dict[str, int] = asdict(self)
        found = [f"{text}: {numbers[name]}" for name, text in texts.items() if numbers[name]]
        return "; ".join([f"annotations: {self.annotations}; images: {self.images}", *found])


def repair_coco(content: Coco) -> tuple[Coco, Repairs]:
    """Checked content with everything mended that can only mean one thing, and what was done; changes nothing in place.

    Args:
        content: As `check_coco` lets it pass.
    """
    images, entries = content["images"], content["annotations"]
    done = Repairs(annotations=len(entries), images=len(images))
    sizes = {image["id"]: (image.get("width", math.inf), image.get("height", math.inf)) for image in images}
    kept: list[Annotation] = []
    for entry in entries:
        x, y, width, height = entry["bbox"]
        across, down = sizes[entry["image_id"]]
        if width == 0 or height == 0:
            done.no_area += 1
        elif x >= across or y >= down or x + width <= 0 or y + height <= 0:
            done.outside += 1
        else:
            done.thin += width < 1 or height < 1
            kept.append(repair_entry(entry, done))
    if any(isinstance(entry["id"], str) or entry["id"] == 0 for entry in kept):
        done.ids = len(kept)
        kept = [{**entry, "id": number} for number, entry in enumerate(kept, 1)]
    done.bare = len(sizes) - len({entry["image_id"] for entry in kept})
    return {**content, "annotations": kept}, done


def repair_entry(entry: Annotation, done: Repairs) -> Annotation:
    """An annotation with `iscrowd`, `area` and proper polygons; what was changed is counted in ``done``."""
    changes: Annotation = {}
    if entry.get("iscrowd") is None:
        changes["iscrowd"] = 0
        done.iscrowd += 1
    elif entry["iscrowd"]:
        done.crowds += 1
    mask = entry.get("segmentation")
    if isinstance(mask, list) and any(len(polygon) < 2 * MIN_POINTS for polygon in polygons_of(mask)):
        proper = [polygon for polygon in polygons_of(mask) if len(polygon) >= 2 * MIN_POINTS]
        changes["segmentation"] = proper
        done.polygons += len(mask) - len(proper)
    area = entry.get("area")
    if not isinstance(area, (int, float)) or not 0 < area < math.inf:
        changes["area"] = mask_area(changes.get("segmentation", mask)) or entry["bbox"][2] * entry["bbox"][3]
        done.area += 1
    return {**entry, **changes} if changes else entry


def count_objects(content: Coco) -> dict[str, int]:
    """The number of objects of every category by its name, those without any included; crowd regions are none."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    numbers = dict.fromkeys(names.values(), 0)
    for entry in content["annotations"]:
        numbers[names[entry["category_id"]]] += not entry.get("iscrowd")
    return numbers


def polygons_of(mask: Iterable[object]) -> list[list[float]]:
    """The polygons among the parts of a mask."""
    return [cast("list[float]", part) for part in mask if isinstance(part, list)]


def mask_area(mask: RunLengths | list[list[float]] | None) -> float:
    """Pixels of run lengths, or the area of polygons by the shoelace formula; 0 without a mask that can be read."""
    if isinstance(mask, dict):
        try:
            return float(sum(run_lengths(mask)[1::2]))
        except (ValueError, KeyError, TypeError):
            return 0.0
    area = 0.0
    for polygon in polygons_of(mask or ()):
        if len(polygon) % 2 == 0:
            x, y = np.asarray(polygon, np.float64).reshape(-1, 2).T
            area += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return area
