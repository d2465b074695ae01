"""Imports point downward only, in no circle; the table of docs/ARCHITECTURE.md and what a module offers are true.

``python tests/test_imports.py`` writes the table anew.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import effvit
from effvit.reducers import METHODS

PACKAGE = Path(effvit.__file__).parent
PAGE = PACKAGE.parent / "docs" / "ARCHITECTURE.md"
BEGIN, END = "<!-- modules: written by tests/test_imports.py -->\n", "<!-- end of modules -->"
# Files and folders of the package: each knows only those of rows above its own. The core ends with effvit itself, the
# public surface, and knows nothing of what comes behind.
ROWS = (
    ("messages", "protocols"),
    ("compat", "recording", "requirements", "schedule"),
    ("tokens",),
    ("attention", "layers"),
    ("block", "packed_operator", "recover"),
    ("reducers",),
    ("hosts",),
    ("architectures", "selectors"),
    ("zoo",),
    ("",),
    ("images",),
    ("data",),
    ("measure",),
    ("dense", "deployment", "show", "testing"),
    ("cli",),
)
RANKS = {part: row for row, parts in enumerate(ROWS) for part in parts}
SURFACE = RANKS[""]
FREE_OF_OPENMMLAB = {
    f"dense/{name}"
    for name in ("backbone", "coco", "detectron2", "image_files", "label_maps", "own_data", "shipped_configs")
}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def rank(module: str) -> int:
    """Layer of a module given as "effvit.hosts.host"."""
    part = part_of(module)
    assert part in RANKS, f"{module} has no rank: add {part} to the first of ROWS that its imports allow"
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
    """Whether a module may import another: one of a lower row, or of its own folder."""
    return part_of(own) == part_of(other) or rank(own) > rank(other)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("effvit.measure.flops", "effvit.cli"),
        ("effvit.measure.flops", "effvit.show.tables"),
        ("effvit.tokens", "effvit.measure.flops"),
    ],
)
def test_climb_or_circle_is_told(own: str, other: str) -> None:
    assert not may_know(own, other)


def test_every_file_and_folder_has_a_rank() -> None:
    parts = {module.split("/")[0] for module in MODULES} - {"__init__"}
    assert set(RANKS) - {""} == parts


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module_name(module): imported(PACKAGE / f"{module}.py") for module in MODULES}
    tuple(TopologicalSorter(graph).static_order())  # raises a CycleError that names the circle


def test_few_modules_lie_outside_of_the_folders() -> None:
    flat = [module for module in MODULES if "/" not in module and module != "__init__"]
    assert len(flat) <= 12


def table() -> str:
    """The modules in the order of their ranks, each with the first paragraph of its docstring."""
    lines = ["| module | what it holds |", "|---|---|"]
    for part in [part for row in ROWS for part in row]:
        inside = [module for module in MODULES if (part_of(module_name(module)) or "__init__") == (part or "__init__")]
        for module in sorted(inside, key=lambda name: (not name.endswith("__init__"), name)):
            text = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text())) or ""
            name = module.removesuffix("__init__") if module.endswith("/__init__") else f"{module}.py"
            lines.append(f"| `effvit/{name}` | {' '.join(text.partition(chr(10) * 2)[0].split())} |".replace("``", "`"))
    return "\n".join(lines) + "\n"


def page_with(lines: str) -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + lines + END + rest.partition(END)[2]


def test_table_of_modules_is_that_of_the_files() -> None:
    assert PAGE.read_text() == page_with(table()), "run python tests/test_imports.py"


def test_reducers_do_not_know_each_other() -> None:
    names = {method.__module__ for method in METHODS.values()}
    for name in names:
        assert not imported(PACKAGE / f"{name.removeprefix('effvit.').replace('.', '/')}.py") & (names - {name}), name


@pytest.mark.parametrize("module", [module for module in MODULES if is_public(module)])
@pytest.mark.usefixtures("detectron2")
def test_public_names_are_listed_and_exist(module: str) -> None:
    if module == "dense/transformers":  # in an environment of its own: make test-transformers
        pytest.importorskip("transformers", reason="the transformers extra is not installed")
    elif module.startswith("dense/") and module not in FREE_OF_OPENMMLAB:
        pytest.importorskip("mmengine")
    loaded = importlib.import_module(module_name(module))
    documented = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text()))
    assert documented, f"{module} has no docstring"
    if not hasattr(loaded, "__all__") and module.endswith(
        "__init__"
    ):  # a folder of modules, which offers nothing itself
        assert len(ast.parse((PACKAGE / f"{module}.py").read_text()).body) == 1
        return
    assert len(set(loaded.__all__)) == len(loaded.__all__) > 0
    for name in loaded.__all__:
        assert getattr(loaded, name, None) is not None, f"{module} lists {name}, which it does not have"


def loaded_by(module: str) -> list[str]:
    """What a fresh interpreter has loaded after it imported a module."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {module}, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    ).stdout.split()


FRAMEWORKS = {"detectron2", "mmcv", "mmdet", "mmengine", "mmpretrain", "mmseg", "transformers"}


def test_importing_the_package_loads_none_of_the_tools() -> None:
    loaded = loaded_by("effvit")
    own = [name for name in loaded if name.split(".")[0] == "effvit"]
    assert "effvit.hosts.host" in own
    assert not [name for name in own if rank(name) > SURFACE]
    assert not ({"matplotlib", "fvcore", "rich"} | FRAMEWORKS) & set(loaded)


def test_the_command_line_loads_no_framework() -> None:
    assert not FRAMEWORKS & set(loaded_by("effvit.cli"))


def test_the_dense_backbone_loads_no_framework() -> None:
    assert not FRAMEWORKS & set(loaded_by("effvit.dense.backbone"))


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
