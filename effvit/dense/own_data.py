"""A COCO file or a folder of label maps: what it holds, what is wrong with it, and the lines of a config that it needs.

Nothing of OpenMMLab is imported, so that data can be looked at before any of it is installed. What a config says of its
data is checked by ``effvit.dense.data_checks``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from effvit.dense.coco import check_coco, count_objects, read_detections, repair_coco
from effvit.dense.image_files import CHECKED_FILES, check_listed, check_readable, check_sizes, sampled
from effvit.dense.label_maps import check_label_set, find_labels, shown_labels
from effvit.dense.shipped_configs import PREFIX
from effvit.images import opened

__all__ = ["Findings", "Summary", "inspect_coco", "inspect_label_maps", "literal", "shown_counts"]

# Configs that the lines inherit from; any other of their kind takes the same.
MASK_CONFIG = "mmdet/mask-rcnn_evit-deit-s_fpn_1x_coco.py"
BOX_CONFIG = "mmdet/retinanet_evit-deit-s_fpn_1x_coco.py"
LABEL_CONFIG = "mmseg/upernet_evit-deit-s_8xb2-160k_ade20k-512x512.py"
FAULTS_SHOWN = 5  # of single files
NAMES_SHOWN = 8  # of classes without any
NAMED_CLASSES = 20  # more get their names by counting


class Summary(NamedTuple):
    """What there is to say of a data set without a fault.

    Attributes:
        line: What it holds, what is repaired, what is left out.
        counts: Objects of each class, or label maps with each label.
    """

    line: str
    counts: str


@dataclass
class Findings:
    """What a check of data found.

    Attributes:
        sets: A summary of each data set.
        faults: Errors, each a sentence with its remedy.
        config: Lines of a config for these data.
    """

    sets: list[Summary] = field(default_factory=list)
    faults: list[ValueError | OSError] = field(default_factory=list)
    config: list[str] = field(default_factory=list)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Where a fault ends no more than the body: it is noted, once."""
        try:
            yield
        except (ValueError, OSError) as error:
            if str(error) not in map(str, self.faults):
                self.faults.append(error)


def shown_counts(title: str, numbers: Mapping[str, int]) -> str:
    """Numbers by name for a line: "objects by class: cat 3, dog 1; none of bird"."""
    some = [f"{name} {number}" for name, number in numbers.items() if number]
    none = [name for name, number in numbers.items() if not number]
    rest = f"; none of {', '.join(none[:NAMES_SHOWN])}{', ...' if len(none) > NAMES_SHOWN else ''}" if none else ""
    return f"{title}: {', '.join(some)}{rest}"


def literal(names: Sequence[str]) -> str:
    """A tuple of names as Python has it."""
    texts = [json.dumps(name, ensure_ascii=False) for name in names]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def inspect_coco(path: Path, images: Path | None = None, number: object = CHECKED_FILES) -> Findings:
    """Check an annotation file for a detector, with its images if their folder is given.

    Args:
        path: JSON file of COCO's form.
        images: Folder that the file names of the annotations start from; None leaves the images out.
        number: Images that are opened, evenly spread, or "all".

    Raises:
        ValueError: ``number`` is neither.
    """
    found = Findings()
    with found.noted():
        content = read_detections(path, masks=False)
        mended, repairs = repair_coco(content)
        names = Counter(category["name"] for category in content["categories"])
        twice = [name for name, number in names.items() if number > 1]
        if twice:
            raise ValueError(f"the category {twice[0]!r} stands twice in {path}; make one of both, or name them apart")
        objects = count_objects(mended)
        found.sets.append(Summary(f"{path}: {repairs}", shown_counts("objects by class", objects)))
        if not any(objects.values()):
            raise ValueError(f"{path} has no annotation of an object, so that there is nothing to learn or to measure")
        masks = any(entry.get("segmentation") for entry in content["annotations"])
        if masks:
            try:
                check_coco(content, masks=True)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        found.config += detection_lines(path, images, list(objects), masks)
    if images is not None and found.config:
        with found.noted():
            check_listed(content["images"], images, path)
            check_sizes(sampled(content["images"], number), images, path)
    return found


def detection_lines(path: Path, images: Path | None, names: Sequence[str], masks: bool) -> list[str]:
    """Lines of a config for a training set in COCO's form."""
    folder = json.dumps(str(images)) if images is not None else '"FOLDER OF THE IMAGES"'
    number = f"dict(num_classes={len(names)})"
    heads = f"roi_head=dict(bbox_head={number}, mask_head={number})" if masks else f"bbox_head={number}"
    return [
        f"_base_ = {json.dumps(PREFIX + (MASK_CONFIG if masks else BOX_CONFIG))}",
        f"classes = {literal(names)}",
        "train_dataloader = dict(",
        "    dataset=dict(",
        '        data_root="",',
        f"        ann_file={json.dumps(str(path))},",
        f"        data_prefix=dict(img={folder}),",
        "        metainfo=dict(classes=classes),",
        "    )",
        ")",
        "# alike: val_dataloader, test_dataloader; and val_evaluator, test_evaluator = dict(ann_file=...)",
        f"model = dict({heads})",
    ]


def inspect_label_maps(folder: Path, images: Path | None = None, number: object = CHECKED_FILES) -> Findings:
    """Check a folder of label maps for a segmenter, with their images if the folder of those is given.

    Args:
        folder: Of label maps; those in folders inside it belong to it.
        images: Folder of the images, called alike but for the ends of their names; None leaves them out.
        number: Label maps that are opened, evenly spread, or "all".

    Raises:
        ValueError: ``number`` is neither.
    """
    found = Findings()
    paths = image_paths(folder)
    checked = sampled(paths, number)
    pairs: dict[Path, Path] = {}
    suffixes = None
    with found.noted():
        if not paths:
            raise FileNotFoundError(f"{folder} holds no label maps; name the folder that has them")
        if images is not None:
            pairs, suffixes = paired(paths, folder, images)
    maps: Counter[int] = Counter()
    broken: list[ValueError | OSError] = []
    for path in checked:
        try:
            maps.update(find_labels(path, size_of(pairs[path]) if path in pairs else None))
        except (ValueError, OSError) as error:
            broken.append(error)
    found.faults += broken[:FAULTS_SHOWN]
    if len(broken) > FAULTS_SHOWN:
        found.faults.append(ValueError(f"{len(broken) - FAULTS_SHOWN} more label maps in {folder} have such faults"))
    if len(broken) == len(checked):
        return found
    with found.noted():
        check_label_set(set(maps), folder, range(max(2, max(maps, default=0) + 1)))
        found.sets.append(label_summary(folder, f"{len(checked)} of {len(paths)}", maps))
        found.config += label_lines(folder, images, suffixes or ("SUFFIX OF THE IMAGES", paths[0].suffix), set(maps))
    return found


def label_summary(folder: Path, read: str, maps: Mapping[int, int]) -> Summary:
    """What label maps hold, and which labels they leave out."""
    line = f"{folder}: {read} label maps read"
    missing = set(range(1, max(maps))) - set(maps)
    if missing:
        line += (
            f"; no map holds the labels {shown_labels(missing)}: as classes they could not be learnt, so number the "
            "classes without gaps"
        )
    return Summary(line, shown_counts("maps by label", {str(label): maps[label] for label in sorted(maps)}))


def label_lines(folder: Path, images: Path | None, suffixes: tuple[str, str], labels: set[int]) -> list[str]:
    """Lines of a config for a training set of label maps."""
    reduced = 0 not in labels
    number = max(labels) + (not reduced)
    names = literal([f"class_{label}" for label in range(int(reduced), max(labels) + 1)])
    if number > NAMED_CLASSES:
        names = f'tuple(f"class_{{label}}" for label in range({int(reduced)}, {max(labels) + 1}))'
    heads = f"dict(num_classes={number})"
    prefix = json.dumps(str(images)) if images is not None else '"FOLDER OF THE IMAGES"'
    zero = "0 is in no map, so that classes count from 1" if reduced else "True if 0 is no class: then name one less"
    return [
        f"_base_ = {json.dumps(PREFIX + LABEL_CONFIG)}",
        f"classes = {names}  # their names, from label {int(reduced)} on",
        "train_dataloader = dict(",
        "    dataset=dict(",
        '        type="BaseSegDataset",',
        '        data_root="",',
        f"        data_prefix=dict(img_path={prefix}, seg_map_path={json.dumps(str(folder))}),",
        f"        img_suffix={json.dumps(suffixes[0])},",
        f"        seg_map_suffix={json.dumps(suffixes[1])},",
        f"        reduce_zero_label={reduced},  # {zero}",
        "        metainfo=dict(classes=classes),",
        "    )",
        ")",
        "# alike: val_dataloader, test_dataloader",
        f"model = dict(decode_head={heads}, auxiliary_head={heads})",
    ]


def image_paths(folder: Path) -> list[Path]:
    """Image files in a folder and in those inside it, in order; none that are hidden."""
    known = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and not path.name.startswith("."))


def paired(maps: Sequence[Path], folder: Path, images: Path) -> tuple[dict[Path, Path], tuple[str, str]]:
    """The image of each label map, and the ends of the names of images and label maps, as mmseg pairs them.

    Raises:
        FileNotFoundError: No images.
        ValueError: Images of several formats; images without a label map, or the reverse.
    """
    files = image_paths(images)
    if not files:
        raise FileNotFoundError(f"{images} holds no images; name the folder that has them")
    endings = Counter(file.suffix for file in files)
    if len(endings) > 1:
        raise ValueError(
            f"{images} holds images of several formats ({', '.join(f'{key} {n}' for key, n in endings.items())}), but "
            "a data set has one img_suffix; save them alike, or make a data set of each"
        )
    (img_suffix,) = endings
    stems = {file.relative_to(images).with_suffix("").as_posix(): file for file in files}
    first = maps[0].relative_to(folder).as_posix()
    starts = [first[:length] for length in range(len(first) - 1, 0, -1)]
    seg_map_suffix = next((first.removeprefix(start) for start in starts if start in stems), maps[0].suffix)
    of_map = {path: stems.get(path.relative_to(folder).as_posix().removesuffix(seg_map_suffix)) for path in maps}
    alone = [path for path, image in of_map.items() if image is None]
    with_map = set(of_map.values())
    bare = [file for file in files if file not in with_map]
    for odd, what, other in ((bare, "images", "label map"), (alone, "label maps", "image")):
        if odd:
            raise ValueError(
                f"{len(odd)} {what} have no {other}, the first is {odd[0]}; a label map is called as its image, with "
                f"{seg_map_suffix} in place of {img_suffix}"
            )
    return {path: image for path, image in of_map.items() if image is not None}, (img_suffix, seg_map_suffix)


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image as stored; an error for one that mmcv cannot read."""
    with opened(path) as image:
        check_readable(image, path)
        return image.height, image.width
