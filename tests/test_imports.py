"""Imports point downward only, and what a module offers is written down and there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import effvit

PACKAGE = Path(effvit.__file__).parent
# Lower layers know nothing of higher ones; modules of one layer of the core may know each other.
LAYERS = (
    ("messages", "recording", "requirements", "schedule"),
    ("tokens",),
    ("windows",),
    ("attention", "bidirectional_attention", "cross_attention", "super_tokens"),
    ("block",),
    ("recover", "matching", "resize", "unmerge"),
    ("reducers",),
    ("models",),
    ("",),  # effvit itself, the public surface
)
CORE = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# They look at models, nothing in the core knows them. Those of one row do not know each other: the row of a module is
# the length of its longest way down to the core, so that a new import that climbs or closes a circle fails.
ABOVE = (
    (
        "accuracy",
        "breakdown",
        "closed_form",
        "demo",
        "flops",
        "images",
        "profiler",
        "records",
        "sources",
        "tables",
        "testing",
    ),
    ("coco", "dense_flops", "fidelity", "ideal", "label_maps", "pictures", "plots", "report", "token_stages"),
    ("composites", "costs", "data", "data_checks", "loading", "tune", "visualize"),
    ("cli", "garments", "openmmlab"),
    ("classifiers", "runner"),
)
TOOLS = len(LAYERS)  # rank of the lowest of them
RANKS = CORE | {name: TOOLS + row for row, names in enumerate(ABOVE) for name in names}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def rank(module: str) -> int:
    """Layer of a module given as "effvit.models.host"."""
    part = part_of(module)
    assert part in RANKS, f"{module} has no rank: add {part} to LAYERS, or to the lowest row of ABOVE its imports allow"
    return RANKS[part]


def part_of(module: str) -> str:
    """The file or folder of the package that a module belongs to, "" for the package itself."""
    return [*module.split("."), ""][1]


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports when it runs, not those imported for annotations alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively in line {node.lineno}"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name)}
            found.update(submodules or {node.module})
    return {name for name in found if name.split(".")[0] == "effvit"}


def is_module(package: str, name: str) -> bool:
    folder = PACKAGE.parent / package.replace(".", "/")
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def module_name(module: str) -> str:
    return ".".join(["effvit", *(part for part in module.split("/") if part != "__init__")])


def is_public(module: str) -> bool:
    return not any(part.startswith("_") for part in module.split("/") if part != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    own = module_name(module)
    upward = sorted(name for name in imported(PACKAGE / f"{module}.py") if not may_know(own, name))
    assert not upward, f"{module} imports {', '.join(upward)}, which do not stand below it"


def may_know(own: str, other: str) -> bool:
    """Whether a module may import another: one below it, of its own part, or of its own layer in the core."""
    if part_of(own) == part_of(other) or rank(own) > rank(other):
        return True
    return rank(own) == rank(other) < TOOLS


@pytest.mark.parametrize(
    ("own", "other"),
    [("effvit.flops", "effvit.cli"), ("effvit.flops", "effvit.tables"), ("effvit.tokens", "effvit.flops")],
)
def test_climb_or_circle_is_told(own: str, other: str) -> None:
    assert not may_know(own, other)


def test_order_of_layers_is_that_of_the_files() -> None:
    parts = {module.split("/")[0] for module in MODULES} - {"__init__"}
    assert set(RANKS) - {""} == parts


def test_reducers_do_not_know_each_other() -> None:
    methods = {module for module in MODULES if module.startswith("reducers/")} - {
        "reducers/__init__",
        "reducers/base",
        "reducers/cost",
        "reducers/keep_rate",
        "reducers/registry",
    }
    names = {module_name(module) for module in methods}
    for module in methods:
        assert not imported(PACKAGE / f"{module}.py") & (names - {module_name(module)}), module


@pytest.mark.parametrize("module", [module for module in MODULES if is_public(module)])
def test_public_names_are_listed_and_exist(module: str) -> None:
    loaded = importlib.import_module(module_name(module))
    documented = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text()))
    assert documented, f"{module} has no docstring"
    if module in ("models/__init__", "__main__"):
        return
    assert len(set(loaded.__all__)) == len(loaded.__all__) > 0
    for name in loaded.__all__:
        assert getattr(loaded, name, None) is not None, f"{module} lists {name}, which it does not have"


def test_importing_the_package_loads_none_of_the_tools() -> None:
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import effvit, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    ).stdout.split()
    own = [name for name in loaded if name.split(".")[0] == "effvit"]
    assert "effvit.models.host" in own
    assert not [name for name in own if rank(name) >= TOOLS]
    assert not {"matplotlib", "fvcore", "mmengine", "rich"} & set(loaded)
