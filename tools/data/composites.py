"""Labelled pictures for detection and segmentation, made by pasting cut-outs on photographs.

Boxes and masks are exact, because they are known before the picture is: the mask of an object is what is visible of it,
the pixels where its opacity is at least one half and nothing lies above it.
Cut-outs ("sprites") and backgrounds are divided between training and validation first, so that no validation
picture shows a cut-out or a photograph that training has seen; cut-outs whose file names begin with the same word
("gnu-sitting", "gnu-stand") stay on one side, for they may show the same thing.

The folder that `make_composites` writes holds the same annotations twice:

- COCO: annotations/instances_{training,validation}.json with the pictures in images/{training,validation}. Category k
  is line k of classes.txt. Masks are run lengths ({"size", "counts"}, column by column), exact also where an object
  is in several parts; iscrowd is 0.
- ADE20K: images/{training,validation}/*.jpg and annotations/{training,validation}/*.png of the same stems. A pixel is 0
  for background and k for category k. mmseg's reduce_zero_label=True ignores the background, as for ADE20K; with
  False and classes=("background", ...) it is a class.

The pictures are made of others' work; whoever passes them on needs the licences of the sources (composites.json lists
the files). They show unnatural scenes: figures on them compare models, they are no figures of COCO or ADE20K.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image, ImageOps

from data.annotations import describe_objects, write_annotations
from effvit.dense.coco import Annotation
from effvit.images import as_rgb, opened
from effvit.schedule import check_count, check_fraction

__all__ = [
    "CLASSES",
    "Composite",
    "DividedSprites",
    "Settings",
    "Sprite",
    "check_new",
    "compose",
    "make_composites",
    "read_backgrounds",
    "read_sprites",
    "split_families",
]

ValueT = TypeVar("ValueT")

# Class -> shell-style patterns in the folder of Tux Paint's stamps (`data.sources`).
CLASSES: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds/*.png",),
    "insect": ("animals/insects/*.png", "animals/insects/cartoon/*.png"),
    "ungulate": tuple(f"animals/mammals/{kind}/*.png" for kind in ("bovines", "camel", "deer", "equines")),
    "fruit": ("food/fruit/*.png", "food/fruit/cartoon/*.png"),
    "flower": ("plants/flowers/*.png",),
    "building": ("town/houses/cartoon/*.png",),
    "vehicle": ("vehicles/**/*.png",),
    "coin": ("symbols/money/*/coins/*.png", "symbols/money/japanese/*.png"),
    "sign": ("town/roadsigns/*.png",),
    "planet": ("space/planets/*.png", "space/moon/*.png"),
}
# Stamps in these folders, without their suffix, that show something else (slugs, wheels, glow), have no alpha (stop
# lights) or are another one mirrored.
EXCLUDED = re.compile(
    r"animals/insects/(Brown_slug|Woodlouse|cartoon/(snail2?|spider_.*|wings))"
    r"|town/(houses/cartoon/cave_entrance|roadsigns/stoplight_.*)"
    r"|vehicles/.*(7spoke256|wheel_tractor|trainSign|sedan_police)"
    r"|space/planets/0_sun"
    r"|(animals|food|plants|space|symbols|town|vehicles)/.*_(mirror|flip)"
)
SPLITS = ("training", "validation")
MIN_SIDE = 40  # pixels of a cut-out's shorter side; below, nothing can be recognised
OPAQUE = 128  # alpha from which a pixel belongs to the object
MAX_ENLARGEMENT = 2.0  # more makes a cut-out blurred, which would give it away
ATTEMPTS = 20  # places tried for an object before it is left out
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Settings:
    """What the pictures are like.

    Attributes:
        size: Side of the square pictures, pixels.
        objects: Fewest and most objects that are placed in a picture; one that finds no place is left out.
        scale: Smallest and largest longer side of an object as a share of ``size``; logarithmically uniform between.
        rotation: Largest rotation to either side, degrees.
        brightness: Largest relative change of an object's brightness.
        min_visible: Share of every object's own pixels that stays visible, in spite of other objects and the border.
        val_share: Largest share of the cut-outs of a class, and of the backgrounds, that is kept for validation.
        seed: Of everything that is drawn.
    """

    size: int = 512
    objects: tuple[int, int] = (1, 6)
    scale: tuple[float, float] = (0.12, 0.5)
    rotation: float = 15.0
    brightness: float = 0.25
    min_visible: float = 0.5
    val_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("size", self.size, 32)
        check_count("seed", self.seed)
        for name, pair in (("objects", self.objects), ("scale", self.scale)):
            if len(pair) != 2 or pair[0] > pair[1]:
                raise ValueError(f"{name} must be a smallest and a largest value, got {pair}")
        check_count("objects", self.objects[0], 1)
        if self.objects[1] > 255:
            raise ValueError(f"objects must be at most 255, got {self.objects[1]}")
        for name, share in (("scale", self.scale[0]), ("scale", self.scale[1]), ("min_visible", self.min_visible)):
            check_fraction(name, share)
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must be in (0, 1), got {self.val_share}")
        if not 0 <= self.brightness < 1:
            raise ValueError(f"brightness must be in [0, 1), got {self.brightness}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must be in [0, 180] degrees, got {self.rotation}")


class Sprite(NamedTuple):
    """A cut-out.

    Attributes:
        name: Its file, relative to the folder of cut-outs.
        image: RGBA, cropped to what is opaque.
    """

    name: str
    image: Image.Image


# Class -> cut-outs for training, and the same for validation.
DividedSprites = tuple[Mapping[str, Sequence[Sprite]], Mapping[str, Sequence[Sprite]]]


class Composite(NamedTuple):
    """One picture and its objects, in the order they were placed.

    Attributes:
        image: RGB.
        owner: (H, W) uint8, number of the object a pixel shows, counted from 1; 0 is background.
        labels: Category of each object, counted from 1.
    """

    image: Image.Image
    owner: np.ndarray
    labels: list[int]


# -- sources ---------------------------------------------------------------------------------------------


def read_sprites(
    folder: str | os.PathLike[str], classes: Mapping[str, Sequence[str]] = CLASSES
) -> dict[str, list[Sprite]]:
    """Class -> its cut-outs, ordered by file name; each picture once, and none smaller than MIN_SIDE.

    Args:
        folder: Folder of PNG files with alpha.
        classes: Class -> shell-style patterns relative to the folder.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: A cut-out without transparency, which has no outline, or a class with fewer than two cut-outs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of cut-outs; fetch them: python tools/get_data.py stamps")
    found: dict[str, list[Sprite]] = {}
    for label, patterns in classes.items():
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        sprites: dict[bytes, Sprite] = {}
        for path in paths:
            name = path.relative_to(folder)
            if EXCLUDED.fullmatch(name.with_suffix("").as_posix()):
                continue
            image = cut_out(path)
            if min(image.size) >= MIN_SIDE:
                sprites.setdefault(image.tobytes(), Sprite(name.as_posix(), image))
        if len(sprites) < 2:
            raise ValueError(
                f"class {label!r} must have two cut-outs of at least {MIN_SIDE} pixels, one to train and one to "
                f"validate, got {len(sprites)} in {folder} for {', '.join(patterns)}"
            )
        found[label] = list(sprites.values())
    return found


def cut_out(path: Path) -> Image.Image:
    """The picture in RGBA, cropped to what is opaque; (0, 0) in size if nothing is."""
    with opened(path) as image:
        if not image.has_transparency_data:
            raise ValueError(f"{path} has no alpha channel, so nothing says where its object ends; leave it out")
        image = ImageOps.exif_transpose(image).convert("RGBA")
    opaque = image.getchannel("A").point(lambda alpha: 255 * (alpha >= OPAQUE))
    return image.crop(opaque.getbbox() or (0, 0, 0, 0))


def read_backgrounds(folder: str | os.PathLike[str], size: int) -> dict[str, Image.Image]:
    """Name -> photograph in RGB, ordered by name, reduced to a shorter side of at most two pictures.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: Fewer than two photographs, or one smaller than a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder} of backgrounds; fetch some: python tools/get_data.py photographs"
        )
    backgrounds = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
        with opened(path) as image:
            if min(image.size) < size:
                raise ValueError(
                    f"backgrounds must be at least {size} x {size}, {path} is {image.width} x {image.height}"
                )
            image.draft("RGB", (2 * size, 2 * size))
            photograph = as_rgb(image)
        factor = min(1.0, 2 * size / min(photograph.size))
        backgrounds[path.name] = photograph.resize(
            (round(factor * photograph.width), round(factor * photograph.height)), Image.Resampling.LANCZOS
        )
    if len(backgrounds) < 2:
        raise ValueError(
            f"there must be two backgrounds, one to train and one to validate, got {len(backgrounds)} in {folder}"
        )
    return backgrounds


def family(name: str) -> str:
    """The first word of a file name: "animals/gnu-baby.png" and "x/gnu_2.png" are of the family "gnu"."""
    return re.split(r"[\d_.-]+", Path(name).stem.lower().lstrip("0123456789_-"))[0]


def split_families(names: Sequence[str], val_share: float, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Divide file names into training and validation, never a family; both keep the given order.

    Families go to validation in random order while they fit into ``val_share`` of the names; if none does, the
    smallest goes.

    Raises:
        ValueError: All names are of one family.
    """
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    if len(families) < 2:
        raise ValueError(f"{', '.join(names)} cannot be divided: their names begin with the same word")
    order = [list(families)[i] for i in rng.permutation(len(families))]
    room = math.floor(val_share * len(names))
    held: set[str] = set()
    for key in order:
        if len(families[key]) <= room:
            held.update(families[key])
            room -= len(families[key])
    held = held or set(families[min(order, key=lambda key: len(families[key]))])
    return [name for name in names if name not in held], [name for name in names if name in held]


# -- one picture -----------------------------------------------------------------------------------------


def compose(
    rng: np.random.Generator,
    sprites: Sequence[Sequence[Sprite]],
    backgrounds: Sequence[Image.Image],
    settings: Settings,
) -> Composite:
    """Draw one picture: a crop of a background, and on it objects of random class, size, rotation and place.

    Args:
        rng: Everything random comes from it.
        sprites: Cut-outs of each class.
        backgrounds: Photographs of at least settings.size a side.
        settings: See `Settings`.
    """
    canvas = crop_background(rng, backgrounds[int(rng.integers(len(backgrounds)))], settings.size)
    owner = np.zeros((settings.size, settings.size), np.uint8)
    least = [0.0]  # pixels of each object that must stay visible; background may vanish
    seen = np.array([float(owner.size)])  # and those that are
    labels: list[int] = []
    for _ in range(rng.integers(settings.objects[0], settings.objects[1] + 1)):
        label = int(rng.integers(len(sprites)))
        sprite = sprites[label][int(rng.integers(len(sprites[label])))]
        pixels = vary(rng, sprite.image, settings)  # (h, w, 4)
        mask = pixels[..., 3] >= OPAQUE
        for _ in range(ATTEMPTS):
            place, part = random_place(rng, mask.shape, settings.size)
            inside = int(mask[part].sum())
            left = seen - np.bincount(owner[place][mask[part]], minlength=len(seen))
            if inside >= max(1, settings.min_visible * mask.sum()) and (left >= least).all():
                labels.append(label + 1)
                least.append(settings.min_visible * float(mask.sum()))
                seen = np.append(left, inside)
                owner[place][mask[part]] = len(labels)
                opacity = pixels[part][..., 3:] / 255
                canvas[place] = np.rint(opacity * pixels[part][..., :3] + (1 - opacity) * canvas[place])
                break
    return Composite(Image.fromarray(canvas), owner, labels)


def crop_background(rng: np.random.Generator, photograph: Image.Image, size: int) -> np.ndarray:
    """A random square of a photograph, mirrored or not, (size, size, 3) uint8 and writable."""
    side = int(rng.integers(size, min(photograph.size) + 1))
    x, y = (int(rng.integers(length - side + 1)) for length in photograph.size)
    square = photograph.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side), reducing_gap=2.0)
    pixels = np.array(square)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


def vary(rng: np.random.Generator, image: Image.Image, settings: Settings) -> np.ndarray:
    """A cut-out mirrored or not, resized, rotated and changed in brightness, (h, w, 4) uint8."""
    low, high = (math.log(share * settings.size) for share in settings.scale)
    side = math.exp(rng.uniform(low, high))
    factor = min(side / max(image.size), MAX_ENLARGEMENT)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shape = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
    image = image.resize(shape, Image.Resampling.LANCZOS)
    image = image.rotate(rng.uniform(-settings.rotation, settings.rotation), Image.Resampling.BICUBIC, expand=True)
    pixels = np.array(image)
    gain = rng.uniform(1 - settings.brightness, 1 + settings.brightness)
    pixels[..., :3] = np.clip(np.rint(gain * pixels[..., :3]), 0, 255)
    return pixels


def random_place(
    rng: np.random.Generator, shape: tuple[int, ...], size: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where an object goes in the picture, and which part of the object that is; up to a quarter sticks out."""
    place, part = [], []
    for length in shape[:2]:
        start = int(rng.integers(-(length // 4), max(1, size - length + length // 4 + 1)))
        place.append(slice(max(0, start), min(size, start + length)))
        part.append(slice(max(0, -start), min(size, start + length) - start))
    return (place[0], place[1]), (part[0], part[1])


# -- the set ---------------------------------------------------------------------------------------------


def check_new(out: Path) -> None:
    """Raise a ValueError if the folder to make is there."""
    if out.exists():
        raise ValueError(f"{out} exists; name another folder or remove it")


def make_composites(
    sprites: str | os.PathLike[str] | DividedSprites,
    backgrounds: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    train: int,
    val: int,
    settings: Settings = Settings(),
    classes: Mapping[str, Sequence[str]] = CLASSES,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> dict[str, Any]:
    """Write a set in the two forms described above, and its composites.json; returns what that holds.

    Each picture is drawn from (seed, split, number) alone, so the same sources, settings and Pillow version give the
    same bytes, whatever the number of workers, and a larger set begins with the pictures of a smaller one. The set is
    built in ``out``.partial and moved when complete.

    Args:
        sprites: A folder as `read_sprites` takes it, whose cut-outs are divided as told above, or cut-outs that are
            divided already (`data.garments`).
        backgrounds: See `read_backgrounds`.
        out: Folder to make.
        train: Number of training pictures.
        val: Number of validation pictures.
        settings: See `Settings`.
        classes: See `read_sprites`; of divided cut-outs the names alone are used.
        workers: Threads; None is one a core.
        progress: Called with 1 after each picture.

    Raises:
        ValueError: Bad numbers or sources, or ``out`` exists.
        FileNotFoundError: No sources.
    """
    out = Path(out)
    for name, number in (("train", train), ("val", val)):
        check_count(name, number, 1)
    if not 1 <= len(classes) <= 255:
        raise ValueError(f"there must be 1 to 255 classes, since label maps have 8 bits, got {len(classes)}")
    check_new(out)
    rng = np.random.default_rng([settings.seed, len(SPLITS)])
    divided = sprites if isinstance(sprites, tuple) else divide_sprites(read_sprites(sprites, classes), settings, rng)
    for split, part in zip(SPLITS, divided, strict=True):
        if missing := [label for label in classes if not part.get(label)]:
            raise ValueError(f"there are no cut-outs for {split} of the classes {', '.join(missing)}")
    scenes = divide(read_backgrounds(backgrounds, settings.size), settings.val_share, rng)

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    record: dict[str, Any] = {"settings": asdict(settings), "pillow": PIL.__version__, "splits": {}}
    for index, (split, number) in enumerate(zip(SPLITS, (train, val), strict=True)):
        own = {label: divided[index][label] for label in classes}
        objects = write_split(partial, split, number, own, scenes[index], settings, workers, progress)
        record["splits"][split] = {
            "pictures": number,
            "objects": objects,
            "sprites": {label: [sprite.name for sprite in part] for label, part in own.items()},
            "backgrounds": list(scenes[index]),
        }
    (partial / "classes.txt").write_text("".join(f"{label}\n" for label in classes))
    (partial / "composites.json").write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(out)
    return record


def divide_sprites(
    found: Mapping[str, Sequence[Sprite]], settings: Settings, rng: np.random.Generator
) -> DividedSprites:
    """The cut-outs of every class for training and for validation (`split_families`)."""
    parts = {
        label: divide({sprite.name: sprite for sprite in own}, settings.val_share, rng) for label, own in found.items()
    }
    training, validation = ({label: list(part[i].values()) for label, part in parts.items()} for i in range(2))
    return training, validation


def divide(
    named: Mapping[str, ValueT], val_share: float, rng: np.random.Generator
) -> tuple[dict[str, ValueT], dict[str, ValueT]]:
    """The entries for training and for validation (`split_families`)."""
    train, val = split_families(list(named), val_share, rng)
    return {name: named[name] for name in train}, {name: named[name] for name in val}


def write_split(
    root: Path,
    split: str,
    number: int,
    sprites: Mapping[str, Sequence[Sprite]],
    backgrounds: Mapping[str, Image.Image],
    settings: Settings,
    workers: int | None,
    progress: Callable[[int], object],
) -> dict[str, int]:
    """Write the pictures, label maps and annotation file of a split; returns the number of objects of each class."""
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        folder.mkdir(parents=True)
    own, scenery = list(sprites.values()), list(backgrounds.values())

    def make(i: int) -> list[Annotation]:
        rng = np.random.default_rng([settings.seed, SPLITS.index(split), i])
        composite = compose(rng, own, scenery, settings)
        composite.image.save(images / f"{i:06d}.jpg", quality=JPEG_QUALITY)
        categories = np.array([0, *composite.labels], np.uint8)
        Image.fromarray(categories[composite.owner]).save(maps / f"{i:06d}.png")
        progress(1)
        return describe_objects(composite.owner, composite.labels, i + 1)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # Pillow computes without the interpreter's lock
        objects = [entry for found in pool.map(make, range(number)) for entry in found]
    write_annotations(root / "annotations" / f"instances_{split}.json", number, settings.size, list(sprites), objects)
    counts = Counter(entry["category_id"] for entry in objects)
    return {label: counts[i] for i, label in enumerate(sprites, 1)}
