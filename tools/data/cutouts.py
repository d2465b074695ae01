"""What `data.scenes` composes: cut-outs of 25 classes, cut-outs of no class, and photographs, divided into two splits.

Ten classes are the garments of Fashion-MNIST, divided as that set divides them. Fifteen are kinds of emoji. What one
emoji means is on one side only, in every vendor's drawing, in every skin tone and as a woman, a man or neither
(`family`); a drawing that several emoji share counts once. Emoji of other kinds are the distractors, divided in the
same way. No photograph is on both sides, and none that shows something of a class is used.

Cut-outs are stored as 8-bit RGBA with the colours multiplied by the opacity, so that resampling a border mixes it with
nothing. A bank of a whole split takes about 200 MB; `open_split` reads it from a file that it writes once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.datasets import load_pictures
from data.garments import GARMENTS, outline
from data.sources import RECORD, default_root, emoji_code
from effvit.images import as_rgb, opened
from effvit.schedule import check_choice

__all__ = ["CLASSES", "SPLITS", "Bank", "Scenery", "Split", "family", "make_bank", "make_scenery", "open_split"]

SPLITS = ("train", "test")
# Class -> the subcategories of emoji.json that show it.
EMOJI_CLASSES: dict[str, tuple[str, ...]] = {
    "face": (
        *("face-affection", "face-concerned", "face-glasses", "face-hand", "face-hat", "face-negative"),
        *("face-neutral-skeptical", "face-sleepy", "face-smiling", "face-tongue", "face-unwell"),
    ),
    "person": ("person", "person-gesture", "person-role"),
    "athlete": ("person-sport",),
    "hand": ("hand-fingers-closed", "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hands"),
    "heart": ("heart",),
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "insect": ("animal-bug",),
    "sea-animal": ("animal-marine",),
    "flower": ("plant-flower",),
    "fruit": ("food-fruit",),
    "building": ("place-building", "place-religious"),
    "vehicle": ("transport-ground",),
    "clock": ("time",),
    "flag": ("country-flag", "subdivision-flag"),
}
# Subcategories of which nothing looks like a class.
OTHERS = (
    *("alphanum", "arrow", "av-symbol", "award-medal", "computer", "dishware", "drink", "game", "geometric"),
    *("household", "keycap", "light & video", "lock", "mail", "math", "medical", "money", "music"),
    *("musical-instrument", "office", "other-symbol", "phone", "punctuation", "science", "sound", "tool", "writing"),
    "zodiac",
)
EXCLUDED = {  # short names in these subcategories that show something else, or, of OTHERS, something of a class
    *("skull", "skull_and_crossbones", "horse_racing", "love_letter", "pig_nose", "feet", "feather", "wing"),
    *("juggling", "man-juggling", "woman-juggling"),
    *("snail", "spider_web", "microbe", "shell", "coral", "white_flower", "rosette", "tokyo_tower"),
    *("statue_of_liberty", "bricks", "rock", "wood", "building_construction", "kaaba", "shinto_shrine", "station"),
    *("busstop", "traffic_light", "vertical_traffic_light", "construction", "rotating_light", "octagonal_sign"),
    *("fuelpump", "railway_track", "motorway", "oil_drum", "wheel", "roller_skate", "skateboard", "hourglass"),
    *("hourglass_flowing_sand", "hearts", "flower_playing_cards", "black_joker", "teddy_bear", "nesting_dolls"),
    *("pinata", "mouse_trap", "x-ray", "crutch"),
}
CLASSES = (*GARMENTS, *EMOJI_CLASSES)
TEST_SHARE = 0.3  # of the families of each kind of emoji
TEST_PHOTOGRAPHS = ("BytheWater", "FallenLeaf", "Grey", "Picture_1A", "aitzgorri", "life")
UNUSED_PHOTOGRAPHS = ("Autumn", "friends", "greentock")  # they show a child, dogs and a clock
GARMENTS_PER_CLASS = {"train": 2000, "test": 500}  # the first of each

SIDE = 48  # pixels of a cut-out in the bank
CONTENT = 44  # and of its longer side; the margin is what filters reach beyond a border
LEVELS = (120, 176, 256, 376, 552)  # pixels of a photograph's shorter side, in the sizes it is stored in
SOURCE_NAMES = ("emoji", "fashion_mnist", "photographs")
GENDERS = ("2640", "2642", "27a1")  # woman, man, and to the right
PEOPLE = {"1f468": "1f9d1", "1f469": "1f9d1", "1f474": "1f9d3", "1f475": "1f9d3"}  # man and woman -> person
# Regions -> the one whose flag they fly. Monaco's and Romania's differ from the other in shape or shade only.
SAME_FLAGS = {
    **{"BV": "NO", "SJ": "NO", "CP": "FR", "MF": "FR", "UM": "US", "HM": "AU", "EA": "ES", "DG": "IO"},
    **{"MC": "ID", "RO": "TD"},
}


class Bank(NamedTuple):
    """Cut-outs of equal size, those of a class in a row.

    Attributes:
        pixels: (K, SIDE, 4, SIDE) uint8: rows, channels RGBA, columns; colours are multiplied by opacity. The longer
            side of what is opaque takes CONTENT pixels, in the middle.
        extents: (K, 2), height and width of what is opaque, pixels.
        areas: (K,), sum of the opacities, pixels.
        counts: (classes,), number of cut-outs of each class.
        names: Source, vendor and number or code points of each.
    """

    pixels: Tensor
    extents: Tensor
    areas: Tensor
    counts: Tensor
    names: list[str]


class Scenery(NamedTuple):
    """Photographs, each in the sizes of LEVELS.

    Attributes:
        pixels: (all pixels, 4) uint8, RGB and a fourth byte that is 0, row by row.
        shapes: (photographs, levels, 3), where each begins in ``pixels``, its height and its width.
        names: Of each photograph.
    """

    pixels: Tensor
    shapes: Tensor
    names: list[str]


class Split(NamedTuple):
    """Everything that images of one split are made of."""

    objects: Bank
    distractors: Bank
    scenery: Scenery


# -- making banks ----------------------------------------------------------------------------------------


def make_bank(kinds: Iterable[Iterable[tuple[str, Image.Image]]]) -> Bank:
    """The bank of cut-outs (name, RGBA), one iterable a class; what equals an earlier cut-out is left out.

    Raises:
        ValueError: A class without a cut-out.
    """
    pixels: list[np.ndarray] = []
    names: list[str] = []
    counts: list[int] = []
    known: set[bytes] = set()
    for kind in kinds:
        before = len(names)
        for name, image in kind:
            entry = fit(image)
            digest = hashlib.sha256(entry.tobytes()).digest()
            if digest not in known:
                known.add(digest)
                pixels.append(entry)
                names.append(name)
        if len(names) == before:
            raise ValueError(f"every class must have a cut-out, class {len(counts)} has none")
        counts.append(len(names) - before)
    stacked = torch.from_numpy(np.stack(pixels))
    opaque = stacked[:, :, 3] > 0
    extents = torch.stack([opaque.any(axis).sum(1) for axis in (2, 1)], 1)
    areas = stacked[:, :, 3].sum((1, 2)) / 255
    return Bank(stacked, extents, areas, torch.tensor(counts), names)


def fit(image: Image.Image) -> np.ndarray:
    """A cut-out cropped to what is opaque and resized as `Bank` says, (SIDE, 4, SIDE) uint8."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= 8)).getbbox()
    if box is None:
        raise ValueError("a cut-out must have an opaque pixel")
    factor = CONTENT / max(box[2] - box[0], box[3] - box[1])
    width, height = (max(1, round(factor * length)) for length in (box[2] - box[0], box[3] - box[1]))
    canvas = Image.new("RGBa", (SIDE, SIDE))  # RGBa: multiplied by opacity
    resized = image.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC, box)
    canvas.paste(resized, ((SIDE - width) // 2, (SIDE - height) // 2))
    pixels = np.asarray(canvas)
    return np.minimum(pixels, pixels[..., 3:]).transpose(0, 2, 1)  # overshoot of the filter


def make_scenery(photographs: Mapping[str, Image.Image]) -> Scenery:
    """The photographs (RGB) by name, in all sizes.

    Raises:
        ValueError: There are none.
    """
    if not photographs:
        raise ValueError("there must be a photograph, got none")
    pixels: list[np.ndarray] = []
    shapes: list[list[list[int]]] = []
    begin = 0
    for photograph in photographs.values():
        shapes.append([])
        for level in LEVELS:
            factor = level / min(photograph.size)
            width, height = (round(factor * length) for length in photograph.size)
            resized = photograph.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
            pixels.append(np.pad(np.asarray(resized).reshape(-1, 3), ((0, 0), (0, 1))))
            shapes[-1].append([begin, height, width])
            begin += height * width
    return Scenery(torch.from_numpy(np.concatenate(pixels)), torch.tensor(shapes), list(photographs))


# -- division --------------------------------------------------------------------------------------------


def family(code: str) -> str:
    """The code points of an emoji without what does not make it another: skin tone, gender and direction.

    Flags of several regions are of one family.
    """
    for region, other in SAME_FLAGS.items():
        if code == flag_code(region):
            return flag_code(other)
    points = [point for point in code.split("-") if point not in GENDERS and not "1f3fb" <= point <= "1f3ff"]
    return "-".join(PEOPLE.get(point, point) for point in points)


def flag_code(region: str) -> str:
    """The code points of the flag of a region, which has two letters."""
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('A'):x}" for letter in region)


def divide_families(families: Iterable[str]) -> dict[str, str]:
    """Family -> its split: TEST_SHARE of them, at least one, to test, in an order that only their names decide.

    Raises:
        ValueError: Fewer than two families.
    """
    order = sorted(set(families), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(order) < 2:
        raise ValueError(f"there must be two families, one to train and one to test, got {order}")
    held = max(1, round(TEST_SHARE * len(order)))
    return {name: "test" if number < held else "train" for number, name in enumerate(order)}


def emoji_codes(table: Sequence[Mapping[str, Any]], subcategories: Sequence[str], split: str) -> list[str]:
    """The code points of all emoji of these subcategories that belong to a split, in every skin tone."""
    codes = [
        emoji_code(entry["unified"])
        for emoji in table
        if emoji["subcategory"] in subcategories and emoji["short_name"] not in EXCLUDED
        for entry in (emoji, *(emoji.get("skin_variations") or {}).values())
    ]
    splits = divide_families(family(code) for code in codes)
    return [code for code in codes if splits[family(code)] == split]


# -- reading what was fetched ----------------------------------------------------------------------------


def read_emoji(folder: Path, codes: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    """(name, RGBA) of every vendor's image of each code, as far as the vendor has one."""
    for vendor in sorted(path for path in folder.iterdir() if path.is_dir()):
        for code in codes:
            for path in vendor.glob(f"{code}.*"):
                with opened(path) as image:
                    yield f"emoji/{vendor.name}/{code}", image.convert("RGBA")


def read_garments(split: str, root: Path) -> list[list[tuple[str, Image.Image]]]:
    """For each class (name, RGBA) of the first garments of a split."""
    found: list[list[tuple[str, Image.Image]]] = [[] for _ in GARMENTS]
    for number, (picture, label) in enumerate(load_pictures("fashion_mnist", split, root)):
        if len(found[label]) < GARMENTS_PER_CLASS[split]:
            found[label].append((f"fashion_mnist/{split}/{number:05d}", outline(picture)))
    return found


def read_photographs(folder: Path, split: str) -> dict[str, Image.Image]:
    """Name -> photograph (RGB) of a split."""
    found = {}
    for path in sorted(folder.glob("*.jpg")):
        if path.stem not in UNUSED_PHOTOGRAPHS and (path.stem in TEST_PHOTOGRAPHS) == (split == "test"):
            with opened(path) as image:
                image.draft("RGB", (2 * LEVELS[-1], 2 * LEVELS[-1]))
                found[path.stem] = as_rgb(image)
    return found


def read_split(split: str, root: Path) -> Split:
    """The split made of what lies under ``root``."""
    table = json.loads((root / "emoji" / "emoji.json").read_text())
    codes = [emoji_codes(table, kinds, split) for kinds in EMOJI_CLASSES.values()]
    emoji = [read_emoji(root / "emoji", own) for own in codes]
    others = read_emoji(root / "emoji", emoji_codes(table, OTHERS, split))
    return Split(
        make_bank([*read_garments(split, root), *emoji]),
        make_bank([others]),
        make_scenery(read_photographs(root / "photographs", split)),
    )


def open_split(split: str, root: str | os.PathLike[str] | None = None) -> Split:
    """The split "train" or "test", from ``root/cutouts``; made and written there by the first call, in a minute.

    The file's name is a digest of the sources and of this module, so that a file of others is never read. Tensors are
    mapped into memory, which several processes then share.

    Args:
        split: One of SPLITS.
        root: What ``tools/get_data.py`` fetched into; None is its default.

    Raises:
        ValueError: An unknown split.
        FileNotFoundError: A source was not fetched.
    """
    check_choice("split", split, SPLITS)
    root = default_root() if root is None else Path(root)
    if missing := [name for name in SOURCE_NAMES if not (root / name / RECORD).is_file()]:
        raise FileNotFoundError(
            f"cutouts are made of {', '.join(SOURCE_NAMES)}, but {root} has no {' and no '.join(missing)}; fetch: "
            f"python tools/get_data.py {' '.join(missing)}"
        )
    parts = [*(root / name / RECORD for name in SOURCE_NAMES), Path(__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    path = root / "cutouts" / f"{split}-{digest[:16]}.pt"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save([part._asdict() for part in read_split(split, root)], partial)
        partial.rename(path)
    objects, distractors, scenery = torch.load(path, mmap=True, weights_only=True)
    return Split(Bank(**objects), Bank(**distractors), Scenery(**scenery))
