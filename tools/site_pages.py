"""What mkdocs is not told by mkdocs.yml: pages that lie outside docs/, and links as they are written for GitHub.

In the repository a link is a path from the folder of its page. On the site docs/ is the root; the model cards, the
README of configs/ and pages at the root of the repository join it under their own paths, and every link is written anew
from where a page is to where its target is. A target that is no page (a config, a record, a test) is copied to the
site. A link whose target does not exist is left as it is, and mkdocs refuses it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

__all__ = ["outside_pages", "site_links", "site_path", "targets"]

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "configs/README.md", "model_cards/*.md")
LINK = re.compile(r"\]\((?![a-z]+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def outside_pages() -> list[str]:
    """Paths from the root of the repository of the pages that lie outside docs/."""
    return [path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]


def site_path(path: str) -> str:
    """Where the site has a file of the repository, both as paths from their roots."""
    # mkdocs would make index.html of a README.md, and docs/index.md is that page.
    return "overview.md" if path == "README.md" else path.removeprefix("docs/")


def _target(link: re.Match[str], page: str) -> str:
    """The path in the repository that a link of a page leads to; of a folder its README."""
    path = os.path.normpath(Path(page).parent / link["path"])
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def targets(markdown: str, page: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    for link in LINK.finditer(markdown):
        if (ROOT / (target := _target(link, page))).is_file():
            yield target


def site_links(markdown: str, page: str) -> str:
    """The text of a page, given as its path in the repository, with links between the places that the site has.

    The sources have no links in code; the text of one there would be written anew as well.
    """

    def written(link: re.Match[str]) -> str:
        target = _target(link, page)
        if not (ROOT / target).is_file():
            return link[0]
        path = os.path.relpath(site_path(target), Path(site_path(page)).parent)
        return f"]({path}{link['anchor'] or ''})"

    return LINK.sub(written, markdown)


def _in_repository(path: str | None) -> str:
    assert path is not None  # no page is made without a file
    return Path(path).relative_to(ROOT).as_posix()


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and what any page links to (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    def add(path: str) -> None:
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))

    for path in outside_pages():
        add(path)
    for page in files.documentation_pages():
        source = _in_repository(page.abs_src_path)
        for path in targets(page.content_string, source):
            add(path)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the links of a page anew (a hook of mkdocs)."""
    return site_links(markdown, _in_repository(page.file.abs_src_path))
