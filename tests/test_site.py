"""The documentation site: mkdocs.yml names every page, links lead where they lead on GitHub, and all of it is built.

Only the build itself needs mkdocs (`make docs`).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scripts import load_tool

import effvit
from effvit.reducers import METHODS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
site_pages = load_tool("site_pages")


def entries(nav: list[Any] | dict[str, Any] | str) -> Iterator[str]:
    """The pages of a nav in the form of mkdocs: lists of pages, and of titles with a page or a list."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav if isinstance(nav, list) else nav.values():
            yield from entries(part)


def test_nav_names_every_page_once_and_no_other() -> None:
    """The pages are those of docs/ and those that the hook adds."""
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")] + site_pages.outside_pages()
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert Counter(entries(nav)) == Counter(map(site_pages.site_path, pages))


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("model_cards/evit.md", "../docs/flops.md", "../flops.md"),
        ("model_cards/evit.md", "../configs/mmpretrain/_base_/deit.py", "../configs/mmpretrain/_base_/deit.py"),
        ("model_cards/README.md", "../README.md", "../overview.md"),
        ("docs/speed.md", "export.md#effvitcompile", "export.md#effvitcompile"),
        ("docs/speed.md", "../tests/test_kernels.py", "tests/test_kernels.py"),
        ("docs/reference/dense.md", "../../configs/README.md", "../configs/README.md"),
        ("README.md", "docs/images/fashion_accuracy.svg", "images/fashion_accuracy.svg"),
        ("README.md", "model_cards", "model_cards/README.md"),
    ],
)
def test_link_leads_to_the_same_file_on_the_site(page: str, link: str, expected: str) -> None:
    """Worked out by hand: docs/ is the root of the site, everything else is beside it, README.md is overview.md."""
    assert site_pages.site_links(f"See [it]({link}), please.", page) == f"See [it]({expected}), please."


@pytest.mark.parametrize("link", ["https://arxiv.org/abs/2202.07800", "#measured", "no_such_page.md"])
def test_link_that_leads_to_no_file_stays_as_it_is(link: str) -> None:
    """mkdocs judges it then: a missing page is an error there."""
    assert site_pages.site_links(f"[it]({link})", "docs/speed.md") == f"[it]({link})"


def test_reference_holds_every_public_name_and_every_method() -> None:
    named = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        named |= set(re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE))
    assert {f"effvit.{name}" for name in effvit.__all__} <= named
    assert {f"effvit.reducers.{method.__name__}" for method in METHODS.values()} <= named


def test_quick_start_runs_and_its_comments_hold() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    assert example is not None
    values: dict[str, Any] = {}
    exec(example[1], values)
    assert values["scores"].shape == (2, 10)
    assert [value.shape for value in values["maps"]] == [torch.Size((2, 96, 7, 7))] * 4
    assert values["cheap"].head.weight is values["vit"].head.weight
    assert type(values["vit"]).__module__.startswith("timm.")


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == effvit.__version__
    assert citation["authors"] == [{"name": "effvit developers"}]


class Text(HTMLParser):
    """What a page shows outside of code, and what it loads from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside_code = 0
        self.text = ""
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside_code += tag in ("pre", "code", "script", "style")
        wanted = {"script": "src", "img": "src", "link": "href"}.get(tag)
        self.loads += [value for name, value in attrs if name == wanted and value and value.startswith(("http", "//"))]

    def handle_endtag(self, tag: str) -> None:
        self.inside_code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.inside_code else data


@pytest.mark.slow  # 20 s
@pytest.mark.skipif(bool(MISSING), reason=f"the site needs {', '.join(MISSING)}; `make docs` installs it")
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """A build that is strict fails on a link, an anchor or a name of the reference that leads nowhere. Lists and tables
    that GitHub knows and Python's Markdown does not would be left as their characters."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {tmp_path / "index.html", tmp_path / "overview.html", tmp_path / "model_cards/evit.html"} <= set(pages)
    for page in pages:
        shown = Text(page.read_text())
        assert not shown.loads, f"{page.name} loads {shown.loads}"
        assert not re.findall(r"^\s*(?:\||- |::: ).*|\]\(.*|\*\*.*", shown.text, re.MULTILINE), page.name
