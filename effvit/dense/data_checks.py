"""The data sets of a config of mmdet, mmseg or mmpretrain, checked and prepared before the first iteration.

What is repaired and what is refused stands in docs/data.md. Files on other machines (``s3://`` and so on, or
``backend_args``) are left to mmengine.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, Registry

from effvit.dense.coco import (
    Category,
    Coco,
    ImageEntry,
    Key,
    Repairs,
    count_objects,
    read_detections,
    repair_coco,
)
from effvit.dense.image_files import CHECKED_FILES, check_listed, check_readable, check_sizes, sampled
from effvit.dense.label_maps import check_label_set, check_labels, find_labels, reads_zero, shown_labels
from effvit.dense.own_data import Findings, Summary, literal, shown_counts
from effvit.images import opened

ItemT = TypeVar("ItemT")

__all__ = ["CHECKED_FILES", "check_annotations", "inspect_data", "nested_dicts", "registered"]

SPLITS = {"train_dataloader": None, "val_dataloader": "val_evaluator", "test_dataloader": "test_evaluator"}
# Parts of a model whose classes are not those of the data set.
OTHER_CLASSES = ("rpn_head", "semantic_head", "teacher", "backbone", "train_cfg", "test_cfg")
NAMES_SHOWN = 8  # in a message


def check_annotations(config: Config) -> list[str]:
    """Check the data that a config names, and prepare it, so that a fault stops a run before it begins.

    Changes the config where data were repaired, and lets its pipelines check what is only seen when it is loaded.
    ``checked_files`` of the config is the number of files of each data set that are opened here, evenly spread, or
    "all".

    Returns:
        A line for each data set: what it holds, what was repaired, and what was left out.

    Raises:
        FileNotFoundError: A file or folder that is not there.
        ValueError: Annotations, label maps, classes or heads that do not fit each other (docs/data.md).
    """
    findings = inspect_data(config)
    if findings.faults:
        raise findings.faults[0]
    return [summary.line for summary in findings.sets]


def inspect_data(config: Config) -> Findings:
    """Check and prepare the data of a config as ``check_annotations`` does, and go on after a fault.

    Returns:
        A summary of each data set without a fault, and the errors of the others. Classes and heads are compared as far
        as they are known.
    """
    found = Findings()
    classes: dict[str, list[str]] = {}
    files: dict[Path, CocoFile] = {}
    shifts: dict[str, int] = {}
    faulty: list[dict[str, Any]] = []
    for split, evaluator in SPLITS.items():
        for dataset in list(nested_dicts(config.get(split) or {})):
            kind = dataset_class(dataset, config)
            if kind is None or dataset.get("backend_args") or "://" in str(dataset.get("data_root") or ""):
                continue
            if dataset in faulty:  # validation and test sets are mostly one
                continue
            given = copy.deepcopy(dataset)
            with found.noted():
                faulty.append(given)
                names, summary = prepare_set(DataPart(config, split, dataset, kind), files, shifts)
                faulty.pop()
                if names:
                    classes[split] = names
                if summary is not None and summary not in found.sets:
                    found.sets.append(summary)
        if evaluator is not None:
            with found.noted():
                check_evaluator(config, split, evaluator, files, classes.get(split, ()))
    with found.noted():
        check_classes_agree(classes)
    if classes:
        with found.noted():
            check_heads(config, *next(iter(classes.items())))
    return found


def prepare_set(
    part: DataPart, files: dict[Path, CocoFile], shifts: dict[str, int]
) -> tuple[list[str], Summary | None]:
    """Check and prepare a data set of any kind; returns its classes, and what there is to say of it."""
    if reads_coco(part.kind):
        return prepare_coco(part, files)
    if "seg_map_path" in (part.dataset.get("data_prefix") or {}):
        return prepare_label_maps(part, shifts)
    return labelled_classes(part), None


def nested_dicts(value: object) -> Iterator[dict[str, Any]]:
    """All dicts inside nested dicts and sequences."""
    parts: Iterable[object] = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, dict):
        yield value
        parts = list(value.values())
    for part in parts:
        yield from nested_dicts(part)


@dataclass
class DataPart:
    """A data set of a config.

    Attributes:
        config: The whole config.
        split: The data loader it belongs to.
        dataset: Its settings, a part of the config.
        kind: Its class.
    """

    config: Config
    split: str
    dataset: dict[str, Any]
    kind: type

    @property
    def root(self) -> Path:
        """What relative paths of the data set start from."""
        return Path(self.dataset.get("data_root") or "")

    def sample(self, items: Sequence[ItemT]) -> Sequence[ItemT]:
        """Those of the files that are opened; none but in the first of several processes."""
        number: object = self.config.get("checked_files", CHECKED_FILES)
        chosen = sampled(items, number)
        return chosen if int(os.environ.get("RANK", "0")) == 0 else []

    def pipelines(self) -> Iterator[list[dict[str, Any]]]:
        """The lists of transforms of the data set, in order."""
        for part in nested_dicts(self.dataset):
            if isinstance(part.get("pipeline"), list):
                yield part["pipeline"]

    def insert(self, after: str, transform: dict[str, Any], *copied: str) -> None:
        """Put a transform after those of a type, with the named settings of theirs; once only."""
        for pipeline in self.pipelines():
            for index in reversed(range(len(pipeline))):
                if bare_name(pipeline[index].get("type")) == after:
                    own = {key: pipeline[index][key] for key in copied if key in pipeline[index]}
                    if pipeline[index + 1 : index + 2] != [transform | own]:
                        pipeline.insert(index + 1, transform | own)


def bare_name(kind: object) -> str:
    """The name of a registered type without its scope; classes have theirs."""
    name: str = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name


def dataset_class(part: Mapping[str, object], config: Config) -> type | None:
    """The class of a data set that has files of its own, or None for any other part of a config."""
    if not ("ann_file" in part or "data_prefix" in part or "data_root" in part):
        return None
    return registered(DATASETS, part.get("type"), config)


def registered(registry: Registry, kind: object, config: Config) -> type | None:
    """The class of that name in the config's scope, or None."""
    if not isinstance(kind, str):
        return kind if isinstance(kind, type) else None
    with registry.switch_scope_and_registry(config.get("default_scope")) as scoped:
        found: type | None = scoped.get(kind)
    return found


def reads_coco(kind: object) -> bool:
    """Whether the class reads annotations as mmdet's CocoDataset does; its heirs with a reader of their own do not."""
    return getattr(getattr(kind, "load_data_list", None), "__qualname__", "") == "CocoDataset.load_data_list"


# -- COCO ------------------------------------------------------------------------------------------------


@dataclass
class CocoFile:
    """An annotation file that was read.

    Attributes:
        content: Repaired.
        repairs: What was done.
        notes: And what besides, in words.
        used: The file that is to be used in its place, which may be itself.
    """

    content: Coco
    repairs: Repairs
    notes: list[str]
    used: Path


def prepare_coco(part: DataPart, files: dict[Path, CocoFile]) -> tuple[list[str], Summary]:
    """Check a detection set, repair it where need be; returns its classes, and what there is to say of it."""
    dataset, split = part.dataset, part.split
    path = part.root / dataset["ann_file"]
    if not path.is_file():
        raise FileNotFoundError(
            f"{split} asks for {path}, which is not there; set data_root in the config or by --cfg-options"
        )
    metrics = list(coco_metrics(part.config, SPLITS[split]))
    masks = loads_masks(part) or any("segm" in metric.get("metric", "bbox") for metric in metrics)
    unlabelled = bool(metrics) and all(metric.get("format_only") for metric in metrics)
    content = read_detections(path, masks=masks, unlabelled=unlabelled)
    names = class_names(dataset, part.kind, content["categories"], path)
    check_present(part, path, content["images"])
    file = repaired(path, content, names, part)
    files[path.resolve()] = file
    if file.used != path:
        dataset["ann_file"] = str(file.used)
    if not unlabelled:
        check_any_left(file, names, path, split)
    part.insert("LoadImageFromFile", {"type": "MatchAnnotations"}, "color_type", "imdecode_backend")
    numbers = count_objects(file.content)
    objects = shown_counts("objects by class", {name: numbers[name] for name in names})
    return names, Summary(describe_coco(part, file, path), objects)


def loads_masks(part: DataPart) -> bool:
    """Whether the split loads masks.

    Raises:
        ValueError: It does not, but the model has a mask head to train.
    """
    loads = any(transform.get("with_mask") for transform in nested_dicts(part.config[part.split]))
    has_head = bool((part.config.get("model") or {}).get("roi_head", {}).get("mask_head"))
    if part.split == "train_dataloader" and has_head and not loads:
        raise ValueError(
            f"the model has a mask head, but {part.split} loads no masks; set with_mask=True in LoadAnnotations, or "
            "model.roi_head.mask_head=None"
        )
    return loads


def class_names(dataset: dict[str, Any], kind: type, categories: Sequence[Category], path: Path) -> list[str]:
    """The classes of a data set; a single name in place of a tuple of one is made that tuple in the config.

    Raises:
        ValueError: Classes that the file does not have, or has twice.
    """
    known = [category["name"] for category in categories]
    classes = (dataset.get("metainfo") or {}).get("classes") or getattr(kind, "METAINFO", {}).get("classes") or ()
    if isinstance(classes, str):
        if Path(classes).is_file():  # mmengine reads the names from it
            classes = Path(classes).read_text().splitlines()
        else:
            classes = (classes,)
            dataset["metainfo"]["classes"] = classes
    names = list(classes)
    twice = [name for name, number in Counter(names).items() if number > 1]
    twice += [name for name, number in Counter(known).items() if number > 1 and name in names]
    if twice:
        raise ValueError(f"the class {twice[0]!r} stands twice in metainfo or among the categories of {path}")
    strange = [name for name in names if name not in known]
    if len(strange) == len(names):
        raise ValueError(
            f"no class of the config ({shown(names)}) is among the categories of {path} ({shown(known)}); set "
            f"metainfo=dict(classes={literal(known)}) of the data sets, the names of the file, and "
            f"num_classes={len(known)} of the heads"
        )
    if strange:
        near = difflib.get_close_matches(strange[0], [name for name in known if name not in names] or known, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else "leave them out of metainfo and num_classes, or correct the file"
        )
        raise ValueError(
            f"{len(strange)} of {len(names)} classes of the config are not among the categories of {path} "
            f"({shown(known)}): {shown(strange)}; {hint}"
        )
    return names


def shown(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(map(str, names[:NAMES_SHOWN])) + (", ..." if len(names) > NAMES_SHOWN else "")


def check_present(part: DataPart, path: Path, images: Sequence[ImageEntry]) -> None:
    """Raise an error unless all images are on disk, and those that are opened have the sizes of their annotations."""
    prefix = part.dataset.get("data_prefix") or {}
    folder = part.root / (prefix.get("img") or prefix.get("img_path") or "")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{part.split} looks for its images in {folder}, which is no folder; set data_root and data_prefix"
        )
    check_listed(images, folder, path)
    check_sizes(part.sample(images), folder, path)


def repaired(path: Path, content: Coco, names: Sequence[str], part: DataPart) -> CocoFile:
    """The repaired content; written into the work directory if mmdet could not use the file as it is.

    mmdet leaves out boxes without area by itself when it trains, so that the large files of COCO need no copy.
    """
    mended, repairs = repair_coco(content)
    notes: list[str] = []
    # mmdet numbers classes in the order of the file, and names them in that of the config.
    place = {name: number for number, name in enumerate(names)}
    ordered = sorted(content["categories"], key=lambda category: place.get(category["name"], len(place)))
    if ordered[: len(names)] != [category for category in content["categories"] if category["name"] in place]:
        mended = {**mended, "categories": ordered}
        notes.append("categories put in the order of the config")
    with path.open("rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            notes.append("mark of the byte order left out")
    if notes or (repairs.area if part.split == "train_dataloader" else repairs.changes):
        return CocoFile(mended, repairs, notes, write_copy(mended, path, part.config))
    return CocoFile(mended, repairs, notes, path)


def write_copy(content: Coco, path: Path, config: Config) -> Path:
    """Write the repaired content into the work directory; several processes may do so at once."""
    text = json.dumps(content)
    folder = Path(config.get("work_dir") or "work_dirs") / "annotations"
    copy = (folder / f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json").absolute()
    if not copy.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = copy.with_suffix(f".{os.getpid()}")
        draft.write_text(text)
        draft.replace(copy)
    return copy


def check_any_left(file: CocoFile, names: Sequence[str], path: Path, split: str) -> None:
    """Raise a ValueError if no object of the classes is left."""
    ids = {category["id"] for category in file.content["categories"] if category["name"] in names}
    if not any(entry["category_id"] in ids and not entry["iscrowd"] for entry in file.content["annotations"]):
        raise ValueError(
            f"{path} has no annotation of an object of {shown(names)}, so {split} has nothing to learn or to measure; "
            f"it holds {file.repairs}"
        )


def describe_coco(part: DataPart, file: CocoFile, path: Path) -> str:
    """The line of ``check_annotations`` on a detection set."""
    parts = [f"{path}: {file.repairs}", *file.notes]
    if part.split == "train_dataloader" and file.repairs.bare:
        leaves_out = (part.dataset.get("filter_cfg") or {}).get("filter_empty_gt", False)
        parts.append(f"images without annotations are {'left out' if leaves_out else 'background'}, as filter_cfg says")
    if file.used != path:
        parts.append(f"in use is the repaired copy {file.used}")
    return "; ".join(parts)


def coco_metrics(config: Config, evaluator: str | None) -> Iterator[dict[str, Any]]:
    """The COCO metrics of an evaluator."""
    for metric in nested_dicts(config.get(evaluator) or {} if evaluator is not None else {}):
        if bare_name(metric.get("type")) == "CocoMetric":
            yield metric


def check_evaluator(
    config: Config, split: str, evaluator: str, files: dict[Path, CocoFile], names: Sequence[str]
) -> None:
    """Let metrics read the annotations of their data set, repaired; an error of ``check_annotations`` for others."""
    parts = [part for part in nested_dicts(config.get(split) or {}) if part.get("ann_file")]
    used = {Path(part.get("data_root") or "", part["ann_file"]).resolve() for part in parts}
    of_data = [file for file in files.values() if file.used.resolve() in used]
    for metric in coco_metrics(config, evaluator) if of_data else ():
        if metric.get("ann_file") is None or metric.get("backend_args") or "://" in metric["ann_file"]:
            continue
        path = Path(metric["ann_file"])
        if not path.is_file():
            raise FileNotFoundError(f"{evaluator} asks for {path}, which is not there; set its ann_file")
        file = files.get(path.resolve())
        if file not in of_data:
            content = read_detections(
                path, masks="segm" in metric.get("metric", "bbox"), unlabelled=bool(metric.get("format_only"))
            )
            check_same_set([file.content for file in of_data], content, f"{evaluator} measures with {path}", split)
            file = repaired(path, content, names, DataPart(config, split, {}, object))
        metric["ann_file"] = str(file.used)


def check_same_set(data: Sequence[Coco], other: Coco, measures: str, split: str) -> None:
    """Raise a ValueError unless the annotations of a metric are of the images and categories of its data sets."""
    images = {entry["id"] for content in data for entry in content["images"]}
    categories = {entry["name"] for content in data for entry in content["categories"]}
    differences: dict[str, set[Key] | set[str]] = {
        "images": images ^ {entry["id"] for entry in other["images"]},
        "categories": categories ^ {entry["name"] for entry in other["categories"]},
    }
    for part, difference in differences.items():
        odd = sorted(map(str, difference))
        if odd:
            raise ValueError(
                f"{measures}, whose {part} are not those of {split}: {len(odd)} are in one of the two only "
                f"({shown(odd)}); give both the same ann_file"
            )


# -- label maps ------------------------------------------------------------------------------------------


def prepare_label_maps(part: DataPart, shifts: dict[str, int]) -> tuple[list[str], Summary]:
    """Check a segmentation set; returns its classes, and what there is to say of it.

    Args:
        part: The data set.
        shifts: By split, whether label 0 is ignored and others count from 1; this data set is added.
    """
    check_own_classes(part)
    built, entries = list_images(part)
    names = list(built.metainfo.get("classes") or ())
    checked = part.sample(entries)
    if not names:
        raise ValueError(
            f"{part.split} names no classes, and {part.kind.__name__} has none of its own; set metainfo=dict(classes="
            f"(...)) of the data sets, a name for each label; the label maps hold {shown_labels(labels_in(checked))}"
        )
    shift, note = follow_zero_label(part, bool(built.reduce_zero_label), len(names), checked)
    shifts.setdefault(part.split, shift)
    for split, other in shifts.items():
        if other != shift:
            raise ValueError(
                f"reduce_zero_label is {bool(other)} in {split}, but {bool(shift)} in {part.split}, so that the same "
                "label is another class there; set it alike in all data sets"
            )
    old: list[str] = list(part.kind.METAINFO["classes"]) if built.label_map else names  # type: ignore[attr-defined]
    labels = range(len(old) + shift)
    maps: Counter[int] = Counter()  # label -> number of maps that have it
    ignored = 0
    for entry in checked:
        with opened(entry["img_path"]) as image:
            check_readable(image, entry["img_path"])
            size = image.size[::-1]
        own = check_labels(entry["seg_map_path"], size, labels) - ({0} if shift else set())
        ignored += not own
        maps.update(own)
    folder = Path(built.data_prefix["seg_map_path"])
    line = f"{folder}: {len(checked)} of {len(entries)} label maps read"
    if checked:
        check_label_set(set(maps), folder, names)
        unused = [name for number, name in enumerate(old, shift) if number not in maps]
        line += f", {ignored} of them ignored as a whole" if ignored else ""
        line += f", classes that occur in none: {shown(unused)}" if unused else ""
    part.insert("LoadImageFromFile", {"type": "MatchAnnotations"}, "color_type", "imdecode_backend")
    part.insert("LoadAnnotations", {"type": "CheckLabels", "num_classes": len(names)})
    by_label = {f"{number} ({name})": maps[number] for number, name in enumerate(old, shift)}
    text = shown_counts("maps by label", by_label) + ("; 0 is ignored, as reduce_zero_label says" if shift else "")
    return names, Summary("; ".join([line, *note]), text)


def check_own_classes(part: DataPart) -> None:
    """Raise a ValueError for classes of the config that a data set of fixed classes does not have."""
    fixed = getattr(part.kind, "METAINFO", {}).get("classes") or ()
    names = (part.dataset.get("metainfo") or {}).get("classes") or ()
    strange = [] if isinstance(names, str) else [name for name in names if name not in fixed]
    if fixed and strange:
        raise ValueError(
            f"{part.split} names the classes {shown(strange)}, which are not among the {len(fixed)} of "
            f"{part.kind.__name__} ({shown(fixed)}); for classes of your own set type='BaseSegDataset' in the data "
            "sets, with reduce_zero_label and img_suffix as your files have them"
        )


def labels_in(entries: Sequence[Mapping[str, str]]) -> set[int]:
    """The labels of the maps that are read before, all but the ignored ones."""
    return {label for entry in entries for label in find_labels(entry["seg_map_path"])}


def list_images(part: DataPart) -> tuple[Any, list[dict[str, Any]]]:
    """The data set, built without its pipeline, and its images with their label maps, all of which are there."""
    split, dataset = part.split, part.dataset
    root = dataset.get("data_root") or "the working directory"
    lazy = {**dataset, "_scope_": part.config.default_scope, "lazy_init": True, "pipeline": []}
    try:
        built: Any = DATASETS.build(lazy)
        entries: list[dict[str, Any]] = built.load_data_list()
    except (OSError, AssertionError) as error:
        raise FileNotFoundError(
            f"{split} cannot list its images in {root}: {error}; set data_root in the config or by --cfg-options"
        ) from error
    if not entries:
        raise FileNotFoundError(f"{split} finds no images in {root}; its data_prefix is {dataset['data_prefix']}")
    for key, text in (("img_path", "file"), ("seg_map_path", "label map")):
        missing = [entry[key] for entry in entries if not Path(entry[key]).is_file()]
        if missing:
            raise ValueError(
                f"{split}: {len(missing)} of {len(entries)} images in {root} have no {text}, the first is {missing[0]}"
            )
    return built, entries


def follow_zero_label(
    part: DataPart, shift: bool, number: int, entries: Sequence[Mapping[str, str]]
) -> tuple[int, list[str]]:
    """1 if label 0 is ignored and all others count from 1, else 0; LoadAnnotations is made to follow its data set.

    Args:
        part: The data set.
        shift: What it says, or the default of its class.
        number: Its classes.
        entries: Images whose label maps may be read for the error.

    Returns:
        The shift, and a note if the config was changed.

    Raises:
        ValueError: LoadAnnotations and the default of the data set's class differ; label maps read by OpenCV.
    """
    note: list[str] = []
    for pipeline in part.pipelines():
        for transform in nested_dicts(pipeline):
            if bare_name(transform.get("type")) != "LoadAnnotations":
                continue
            said = transform.get("reduce_zero_label")
            if said is not None and bool(said) != shift:
                if "reduce_zero_label" not in part.dataset:
                    labels = labels_in(entries)
                    fits = reads_zero(labels, number)
                    remedy = "True if 0 is no class" if fits is None else f"{fits} fits"
                    raise ValueError(
                        f"{part.split}: reduce_zero_label is {shift} in the data set, but {said} in its "
                        "LoadAnnotations; set it in the data sets, which LoadAnnotations then follows: "
                        f"{remedy}, since the label maps hold {shown_labels(labels)} for {number} classes"
                    )
                del transform["reduce_zero_label"]  # without it mmseg asks the data set
                note = [f"reduce_zero_label={said} of its LoadAnnotations gives way to {shift} of the data set"]
            if transform.get("imdecode_backend", "pillow") != "pillow":
                raise ValueError(
                    f"{part.split}: LoadAnnotations reads label maps by {transform['imdecode_backend']}, which makes "
                    "colours of palettes; leave imdecode_backend out"
                )
    return int(shift), note


# -- classes and heads -----------------------------------------------------------------------------------


def labelled_classes(part: DataPart) -> list[str]:
    """The classes of a set of classified images, as far as its config or its folders tell."""
    if part.config.get("default_scope") != "mmpretrain":
        return []
    classes = (part.dataset.get("metainfo") or {}).get("classes") or part.dataset.get("classes")
    classes = classes or getattr(part.kind, "METAINFO", {}).get("classes")
    if isinstance(classes, str):
        classes = Path(classes).read_text().splitlines() if Path(classes).is_file() else None
    prefix = part.dataset.get("data_prefix") or ""
    folder = part.root / (prefix if isinstance(prefix, str) else prefix.get("img_path") or "")
    if classes is None and part.kind.__name__ == "CustomDataset" and not part.dataset.get("ann_file"):
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else None
    return list(classes or ())


def check_classes_agree(classes: Mapping[str, list[str]]) -> None:
    """Raise a ValueError unless all splits have the same classes in the same order."""
    for split, names in classes.items():
        first, others = next(iter(classes.items()))
        if names != others:
            raise ValueError(
                f"{split} has the classes {shown(names)}, but {first} has {shown(others)}; give all data sets the same "
                "classes in the same order"
            )


def check_heads(config: Config, split: str, names: Sequence[str]) -> None:
    """Raise a ValueError unless every head of the model has as many classes as the data set."""
    wrong = {place: number for place, number in class_counts(config) if number != len(names)}
    if wrong:
        places = ", ".join(f"{place}={number}" for place, number in wrong.items())
        named = any((part.get("metainfo") or {}).get("classes") for part in nested_dicts(config[split]))
        own = "" if named else ", or, for classes of your own, metainfo=dict(classes=(...)) in the data sets"
        own += " and type='BaseSegDataset'" if own and config.get("default_scope") == "mmseg" else ""
        raise ValueError(
            f"{split} has {len(names)} class{'es' if len(names) != 1 else ''} ({shown(names)}), but the model has "
            f"{places}; set num_classes={len(names)} there{own}"
        )


def class_counts(config: Config) -> Iterator[tuple[str, int]]:
    """("model.decode_head.num_classes", number) of every part of a model that tells the classes of the data apart."""

    def walk(value: object, place: str, in_head: bool) -> Iterator[tuple[str, int]]:
        if isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                yield from walk(part, f"{place}[{index}]", in_head)
        elif isinstance(value, dict):
            number = value.get("num_classes", default_classes(value, config) if in_head else None)
            if type(number) is int and bare_name(value.get("type")) != "STDCHead":  # its classes are edge and none
                yield f"{place}.num_classes", number
            for key, part in value.items():
                if key not in OTHER_CLASSES and not key.startswith("loss"):
                    yield from walk(part, f"{place}.{key}", "head" in key and key != "roi_head")

    yield from walk(config.get("model") or {}, "model", False)


def default_classes(part: Mapping[str, object], config: Config) -> int | None:
    """The number of classes that a head has where its config names none."""
    kind = registered(MODELS, part.get("type"), config)
    for base in kind.__mro__ if kind is not None else ():
        parameter = signature(base).parameters.get("num_classes") if "__init__" in vars(base) else None
        if parameter is not None:
            default: object = parameter.default
            return default if isinstance(default, int) else None
    return None
