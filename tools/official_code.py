"""Official code of methods from checkouts of its own: loaded beside stand-ins for what it imports, run on a CPU."""

from __future__ import annotations

import collections.abc
import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from effvit.protocols import Size

__all__ = [
    "SHARES",
    "Official",
    "Pair",
    "Setting",
    "check_commit",
    "check_there",
    "found_equal",
    "importing",
    "load_file",
    "on_cpu",
]

Run = Callable[[Tensor], object]
OWN_PACKAGE = "official_checkout"  # that of a file loaded alone, whose relative imports are stand-ins
SHARES: Mapping[str, int | None] = {"N / 3": 3, "N / 9": 9}
CLOSE = 1e-3  # largest difference over the largest number, of features that are called equal


class Setting(NamedTuple):
    """What both sides are asked for.

    Attributes:
        batch_size: Images.
        grid: (H, W) tokens of an image.
        divisor: N / ``divisor`` tokens are kept; None where the method or the code's settings say how many.
    """

    batch_size: int
    grid: Size
    divisor: int | None = None


class Pair(NamedTuple):
    """Official code and ours, ready to be timed.

    Attributes:
        official: The run of the official code; its argument is the batch.
        ours: Ours.
        batch: What both get.
        equal: What was found equal before.
    """

    official: Run
    ours: Run
    batch: Tensor
    equal: str


class Official(NamedTuple):
    """Official code of a method.

    Attributes:
        folder: The name of its checkout.
        commit: What the adapter was written for, and should be checked out.
        make: From the folder of all checkouts and a setting to a Pair; raises where the code cannot run with it.
        note: What a reader of a row should know.
        asked: By how a row says it, the divisor of the Setting.
    """

    folder: str
    commit: str
    make: Callable[[Path, Setting], Pair]
    note: str = ""
    asked: Mapping[str, int | None] = SHARES


class _Empty(ModuleType):
    """A package in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    """Finds an empty package for every module of some roots, and those of others on the path alone.

    Other finders may know the names too: ``effvit.compat`` has one for names of modules in old checkpoints.
    """

    def __init__(self, own: Sequence[str], empty: Sequence[str]) -> None:
        self.own, self.empty = own, empty

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _of(fullname, self.empty):
            return ModuleSpec(fullname, self, is_package=True)
        return PathFinder.find_spec(fullname, path) if _of(fullname, self.own) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _of(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _old_torch() -> ModuleType:
    """``torch._six``, which timm 0.4.12 imports and torch no longer has."""
    module = ModuleType("torch._six")
    vars(module).update(container_abcs=collections.abc, int_classes=int, string_classes=str)
    return module


def check_commit(folder: Path, commit: str) -> None:
    """Raise a ValueError for a Git checkout at another commit; a folder without Git's own is taken at its word."""
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        head = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if not head.startswith(commit):
            raise ValueError(f"{folder.name} is checked out at {head[: len(commit)]}; check out {commit}")


def check_there(path: Path) -> None:
    """Raise a FileNotFoundError that names a missing path from its first missing folder on."""
    if not path.exists():
        first = next(part for part in reversed([path, *path.parents]) if not part.exists())
        missing = path.relative_to(first.parent).as_posix()
        raise FileNotFoundError(f"there is no {missing} among the checkouts; check out what the row names")


@contextmanager
def importing(folders: Sequence[Path], own: Sequence[str] = (), empty: Sequence[str] = ()) -> Iterator[None]:
    """Import from ``folders`` before all others; what the process had imported under the same names comes back later.

    Args:
        folders: Of the official code, and of versions of packages that it needs.
        own: Packages that are taken from there, and forgotten afterwards but by what has imported them.
        empty: Packages for which empty ones stand in.

    Raises:
        FileNotFoundError: One of the folders is missing.
    """
    for folder in folders:
        check_there(folder)
    roots = (*own, *empty, "torch._six")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of(name, roots)}
    finder = _Finder(own, empty)
    places = [str(folder) for folder in folders]
    sys.modules["torch._six"] = _old_torch()
    sys.meta_path.insert(0, finder)
    sys.path[:0] = places
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for place in places:
            sys.path.remove(place)
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _of(name, roots)]:
            del sys.modules[name]
        sys.modules.update(before)


def load_file(path: Path, empty: Sequence[str] = ("llava", "transformers")) -> ModuleType:
    """The module of one file, with stand-ins for its package and for the ``empty`` ones.

    Raises:
        FileNotFoundError: There is no such file.
    """
    check_there(path)
    with importing([], empty=(OWN_PACKAGE, *empty)):
        spec = spec_from_file_location(f"{OWN_PACKAGE}.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def on_cpu(run: Run) -> Run:
    """The run with ``Tensor.cuda`` as the identity."""

    def patched(batch: Tensor) -> object:
        with patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
            return run(batch)

    return patched


def found_equal(official: Tensor, ours: Tensor, what: str, ordered: bool = False) -> str:
    """What two results (B, K, ...) have in common, in words.

    Args:
        official: Of the official code.
        ours: Ours.
        what: They are, in the plural.
        ordered: Compare them in their order; else as sets, which are sorted by their first number.
    """
    if official.shape != ours.shape:
        return f"{official.shape[1]} {what} against {ours.shape[1]} of ours"
    if not ordered:
        official, ours = (rows.gather(1, _by_first(rows)) for rows in (official, ours))
    limit = CLOSE * ours.abs().max() if ours.is_floating_point() else 0
    return f"{what} equal" if (official - ours).abs().max() <= limit else f"number of {what} equal"


def _by_first(rows: Tensor) -> Tensor:
    first = rows if rows.ndim == 2 else rows[..., 0]
    order = first.argsort(dim=1)
    return order if rows.ndim == 2 else order.unsqueeze(-1).expand_as(rows)
