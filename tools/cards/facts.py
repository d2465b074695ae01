"""What no program can compute of a family (paper, licence, published results), and the names and configs it has."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml

from effvit.architectures.variants import VARIANTS
from effvit.hosts import illama, lvvit, vit_nano
from effvit.measure.published import published
from effvit.reducers import METHODS

__all__ = ["ARCHITECTURES", "BENCHMARKS", "ROOT", "Result", "belongs", "configs", "facts_of_all", "read", "results_of"]

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "docs/benchmarks"
ARCHITECTURES = (*VARIANTS, *lvvit.default_cfgs, *illama.default_cfgs, *vit_nano.default_cfgs)
TRAININGS = ("composites_cpu.json", "composites_vit_cpu.json", "garments_cpu.json")
METRICS = {"coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP", "mIoU": "mIoU"}


class Result(NamedTuple):
    """What a model reaches on a data set.

    Attributes:
        model: Its name.
        settings: Arguments that differ from the name's own.
        task: As OpenMMLab's metafiles name it.
        dataset: The data set.
        metrics: Name -> value in percent.
        source: Where the figures are from.
        method: The detector or segmenter around the model.
        dense: The first metric of the dense model, by the same source.
        config: File of configs/ of that training.
    """

    model: str
    settings: dict[str, Any]
    task: str
    dataset: str
    metrics: dict[str, float]
    source: str
    method: str = ""
    dense: float | None = None
    config: str | None = None

    @property
    def classifies(self) -> bool:
        """Whether it is an accuracy of the model itself."""
        return self.task == "Image Classification"


@cache
def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def words(settings: dict[str, Any]) -> str:
    """Settings in words: "num_prop 8, alpha 0.1"."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def size_words(size: Sequence[int]) -> str:
    """A size in pixels in words: "224", or "800 x 1280" for (H, W)."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


def native_size(model: str) -> list[int]:
    """[H, W] that a registered name is made for."""
    return list(timm.get_pretrained_cfg(model).input_size[1:])


def method_of(model: str) -> str | None:
    """The method a name begins with; None for an architecture or a model of timm."""
    return next((method for method in METHODS if model.startswith(f"{method}_")), None)


def belongs(model: str, family: str, facts: dict[str, Any]) -> bool:
    """Whether a name is of the family: of its method, or among its architectures."""
    if family in METHODS:
        return method_of(model) == family
    return _matches(model, facts["architectures"])


def _matches(model: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(model, pattern) for pattern in patterns)


def facts_of_all() -> dict[str, dict[str, Any]]:
    """Family -> its file in model_cards/data; methods first, then architectures, in the order of their tables.

    Raises:
        ValueError: A file of neither.
    """
    facts = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "model_cards/data").glob("*.yml")}

    def place(name: str) -> int:
        if name in METHODS:
            return list(METHODS).index(name)
        for i, model in enumerate(ARCHITECTURES):
            if _matches(model, facts[name].get("architectures", [])):
                return len(METHODS) + i
        raise ValueError(f"{name}.yml is named after no method, and its 'architectures' match no name; correct either")

    return {name: facts[name] for name in sorted(facts, key=place)}


def results_of(family: str, facts: dict[str, Any]) -> list[Result]:
    """The published results of a family: its top-1 accuracies, which the package holds, then those of its facts."""
    classified = [
        Result(
            entry.model,
            entry.settings,
            "Image Classification",
            entry.top1.data,
            {"Top 1 Accuracy": entry.top1.value},
            entry.top1.source,
            dense=None if entry.dense is None else entry.dense.value,
        )
        for entry in published()
        if entry.family == family
    ]
    return classified + [
        Result(
            entry["model"],
            entry.get("settings", {}),
            group["task"],
            group["dataset"],
            dict(zip(group["metrics"], entry["values"], strict=True)),
            group["source"],
            group.get("method", ""),
            config=entry.get("config"),
        )
        for group in facts.get("results", [])
        for entry in group["of"]
    ]


def backbone(config: Path) -> str:
    """The model name of a config, its own or that of the config it changes, without tag; ValueError without either."""
    text = config.read_text()
    name = re.search(r'model_name="([^".]+)', text)
    if name is not None:
        return name.group(1)
    base = re.search(r'"([^":]+\.py)"', text)
    if base is None:
        raise ValueError(f"{config.name} has neither a model_name nor a base that could; move it to a folder _base_")
    return backbone(config.parent / base.group(1))


def configs() -> dict[str, str]:
    """File of configs/, relative to the repository -> name of its backbone."""
    paths = sorted(path for path in (ROOT / "configs").rglob("*.py") if "_base_" not in path.parts)
    return {path.relative_to(ROOT).as_posix(): backbone(path) for path in paths}


def results_here(own_configs: dict[str, str]) -> list[Result]:
    """What trainings of these configs reached here, on the generated sets; means over their seeds."""
    return [
        trained_here(own_configs[config], config, list(rows), name)
        for name in TRAININGS
        for config, rows in groupby(read(BENCHMARKS / name)["results"], key=itemgetter("config"))
        if config in own_configs
    ]


def trained_here(model: str, config: str, rows: list[dict[str, Any]], record: str) -> Result:
    """What the trainings of one config reached, as tools/compare_training.py wrote it into a record."""
    metrics = {
        METRICS[name]: round(sum(row["trained"][name] for row in rows) / len(rows), 2) for name in rows[0]["trained"]
    }
    seeds = f", mean of {len(rows)} seeds" if len(rows) > 1 else ""
    return Result(
        model,
        {},
        "Semantic Segmentation" if "mIoU" in metrics else "Instance Segmentation",
        f"{Path(config).parent.name} (generated, docs/dense.md)",
        metrics,
        f"measured here, {rows[0]['iterations']} iterations{seeds}, docs/benchmarks/{record}",
        config=config,
    )
