"""Configs that come with the package: where they are, what they are for, and copies of them to work on.

They lie in ``configs/`` of a checkout and in ``effvit/configs/`` of an installed wheel. Nothing of OpenMMLab is
imported, so that they can be listed and copied without it; ``effvit.dense.openmmlab`` teaches mmengine their names.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import re
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import effvit
from effvit.messages import plain

__all__ = ["PREFIX", "ShippedConfig", "config_folder", "copy_config", "find_config", "list_configs"]

PREFIX = "effvit::"  # before a name, as mmengine has mmdet:: and mmseg::
BASES = "_base_"  # both the variable that names the bases and the folder that holds what is only a base
INSTALLED = {effvit.__name__, "mmdet", "mmpretrain", "mmseg"}  # packages whose modules a config finds wherever it runs
SENTENCE = re.compile(r"\.\s+(?=[A-Z])")


class ShippedConfig(NamedTuple):
    """A config of the package.

    Attributes:
        name: Its path below the folder of configs, as ``effvit::`` takes it.
        summary: The first sentence of the comment that it begins with.
        outside: Modules that it imports and that only ``tools/`` of a checkout holds.
    """

    name: str
    summary: str
    outside: tuple[str, ...]


def config_folder() -> Path:
    """The folder of configs: that of the wheel, else that of the checkout.

    Raises:
        FileNotFoundError: An installation without configs.
    """
    package = Path(effvit.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "mmdet" / BASES).is_dir():
            return folder
    raise FileNotFoundError(f"{package} was installed without its configs; install effvit from a wheel or a checkout")


def list_configs(pattern: str = "*") -> list[ShippedConfig]:
    """Configs whose name matches a shell-style pattern, in the order of their names; not those that are only bases."""
    names = [name for name in _names() if BASES not in name.split("/") and fnmatch.fnmatchcase(name, pattern)]
    return [ShippedConfig(name, _summary(find_config(name)), _outside(name)) for name in names]


def _names() -> list[str]:
    """Names of all files that are configs or bases of them."""
    root = config_folder()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))


def find_config(name: str) -> Path:
    """The file of a config, or of a base of configs, by its path below the folder of configs.

    Raises:
        FileNotFoundError: No config is called so; the message names near ones.
    """
    root = config_folder().resolve()
    path = (root / name).resolve()
    if not (path.is_relative_to(root) and path.suffix == ".py" and path.is_file()):
        names = _names()
        near = [known for known in names if name in known][:3] or difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else "`effvit configs list` prints all names"
        raise FileNotFoundError(f"effvit has no config {plain(name)!r}; {hint}")
    return path


def copy_config(name: str, folder: Path) -> list[Path]:
    """Copy a config and its bases into a folder, where they have the same places to each other.

    Bases of mmdet, mmseg and mmpretrain stay where they are. A file that is there already with the same content is no
    other, so that configs with bases in common can be copied into one folder.

    Args:
        name: As ``find_config`` takes it.
        folder: Made if need be.

    Returns:
        The files in the folder, the config first.

    Raises:
        FileNotFoundError: As ``find_config``.
        FileExistsError: Another file stands where one of them would go; none is written then.
    """
    root = config_folder()
    copies = {folder / each: root / each for each in _with_bases(name)}
    for copy, original in copies.items():
        if copy.exists() and (not copy.is_file() or copy.read_bytes() != original.read_bytes()):
            raise FileExistsError(
                f"{plain(copy)} differs from the one of the package and is not overwritten; give another folder, or "
                "remove it"
            )
    for copy, original in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    return list(copies)


def _with_bases(name: str) -> list[str]:
    """Names of a config and of its bases in the package, each before its own bases."""
    path = find_config(name)
    root = config_folder().resolve()
    found = [name]
    for base in _bases(path):
        found += _with_bases((path.parent / base).resolve().relative_to(root).as_posix())
    return list(dict.fromkeys(found))


def _bases(path: Path) -> list[str]:
    """What a file inherits from in the package, relative to it; not what other packages have (``mmdet::...``)."""
    for value in _assigned(path, BASES):
        bases = ast.literal_eval(value)
        return [base for base in ([bases] if isinstance(bases, str) else bases) if "::" not in base]
    return []


def _assigned(path: Path, variable: str) -> Iterator[ast.expr]:
    """What a config assigns to a variable: it is read, not run, since what it imports may be missing."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets):
            yield node.value


def _outside(name: str) -> tuple[str, ...]:
    """Modules that a config imports and no package brings along; its own list replaces that of its bases."""
    for each in _with_bases(name):
        for value in _assigned(config_folder() / each, "custom_imports"):
            assert isinstance(value, ast.Call)  # dict(imports=[...])
            lists = [ast.literal_eval(keyword.value) for keyword in value.keywords if keyword.arg == "imports"]
            return tuple(module for module in lists[0] if module.split(".")[0] not in INSTALLED)
    return ()


def _summary(path: Path) -> str:
    """The first sentence of the comment that a file begins with, without the command lines that may follow it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("# ") and not line.startswith("#  "), lines)
    text = " ".join(line.removeprefix("# ") for line in comment)
    return SENTENCE.split(text, maxsplit=1)[0].rstrip(".:")
