"""Former paths of modules, which go on working with a DeprecationWarning until version 0.3.

Configs and scripts that import them so load as before, and so do pickles of whole models, which hold the paths of their
classes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "FormerPaths", "install"]

# Former path -> path, both inside of effvit; what lies below a folder has moved with it.
MOVED = {
    "accuracy": "measure.accuracy",
    "bidirectional_attention": "layers.bidirectional_attention",
    "breakdown": "measure.breakdown",
    "classifiers": "dense.classifiers",
    "closed_form": "measure.closed_form",
    "closed_form.hosts": "hosts.closed_form",
    "closed_form.terms": "layers.macs",
    "coco": "dense.coco",
    "costs": "measure.costs",
    "cross_attention": "layers.cross_attention",
    "data_checks": "dense.data_checks",
    "demo": "cli.demo",
    "dense_flops": "dense.dense_flops",
    "fidelity": "measure.fidelity",
    "flops": "measure.flops",
    "ideal": "measure.ideal",
    "label_maps": "dense.label_maps",
    "loading": "dense.loading",
    "matching": "reducers.matching",
    "models._builder": "hosts._builder",
    "models._checkpoint": "hosts.checkpoints",
    "models._names": "hosts._names",
    "models._pickles": "hosts._pickles",
    "models._stvit_r_names": "architectures._stvit_r_names",
    "models._surface": "architectures.base",
    "models._tiny_vit_names": "hosts._tiny_vit_names",
    "models.architectures": "architectures.variants",
    "models.calibration": "hosts.calibration",
    "models.casvit": "architectures.casvit",
    "models.dumbbell": "architectures.dumbbell",
    "models.feature_pyramid": "hosts.feature_pyramid",
    "models.host": "hosts.host",
    "models.lookupvit": "architectures.lookupvit",
    "models.lvvit": "hosts.lvvit",
    "models.refusals": "hosts.refusals",
    "models.semantic_tokens": "architectures.semantic_tokens",
    "models.sit": "architectures.sit",
    "models.sit_distillation": "architectures.sit_distillation",
    "models.stvit": "architectures.stvit",
    "models.stvit_swin": "architectures.stvit_swin",
    "models.supertoken": "architectures.supertoken",
    "models.swin_parts": "architectures.swin_parts",
    "models.tiny_vit": "hosts.tiny_vit",
    "models.token_slimming": "architectures.token_slimming",
    "models.vit_nano": "hosts.vit_nano",
    "models.zoo": "zoo",
    "openmmlab": "dense.openmmlab",
    "pictures": "show.pictures",
    "plots": "show.plots",
    "profiler": "measure.profiler",
    "records": "measure.records",
    "report": "show.report",
    "resize": "layers.resize",
    "runner": "dense.runner",
    "super_tokens": "layers.super_tokens",
    "tables": "show.tables",
    "token_stages": "show.token_stages",
    "tune": "measure.tune",
    "unmerge": "reducers.unmerge",
    "visualize": "show.visualize",
    "windows": "layers.windows",
}
FOLDERS = {"models"}  # that are gone


class FormerPaths(MetaPathFinder, Loader):
    """Finds modules under their former paths: the very module, so that its classes are the same."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a former path, None for any other."""
        if new_path(fullname) is None and fullname.removeprefix("effvit.") not in FOLDERS:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Put the moved module in the place of the one that was made for the former path."""
        path = new_path(module.__name__)
        if path is None:
            return
        moved = import_module(path)
        sys.modules[module.__name__] = moved
        warnings.warn(
            f"{module.__name__} has moved to {path}; the former path goes with version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )


def new_path(former: str) -> str | None:
    """The path of a module that had another one, None for others."""
    package, _, name = former.partition(".")
    if package != "effvit":
        return None
    start, rest = name, ""
    while start:
        if start in MOVED:
            return f"effvit.{MOVED[start]}{rest}"
        start, _, last = start.rpartition(".")
        rest = f".{last}{rest}"
    return None


def install() -> None:
    """Let Python's import find the former paths."""
    if not any(isinstance(finder, FormerPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, FormerPaths())
