"""Make the notebooks of docs/tutorials from their pages, so that nothing is written twice.

    python tools/make_notebooks.py          # write them
    python tools/make_notebooks.py --check  # name those that are stale, status 1

A page that links to a notebook of its own name gets one. Text becomes Markdown cells, a block of Python a code cell,
and a block of text right behind it what the cell prints. A block with a title is a file, and a block of shell are
commands: both stay text in a notebook. What the pages show is held to what they print by tests/test_tutorials.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from marked_table import write_pages

__all__ = ["Block", "blocks", "main", "notebook"]

ROOT = Path(__file__).resolve().parents[1]
PAGES = "docs/tutorials"
FENCED = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"\n+```text\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A part of a page.

    Attributes:
        kind: "python", "shell" or another language of a fenced block; "" for what is between such blocks.
        content: The code without its fence, or the text.
        title: Path of the file that the block is, else None.
        shown: What the page says that the block prints; None if it says nothing of it.
    """

    kind: str
    content: str
    title: str | None = None
    shown: str | None = None


def blocks(page: str) -> Iterator[Block]:
    """The parts of a page in their order, each fenced block with what is shown behind it."""
    place = 0
    while (fenced := FENCED.search(page, place)) is not None:
        if text := page[place : fenced.start()].strip("\n"):
            yield Block("", text)
        shown = SHOWN.match(page, fenced.end())
        yield Block(fenced["kind"], fenced["code"], fenced["title"], shown and shown["text"])
        place = (shown or fenced).end()
    if text := page[place:].strip("\n"):
        yield Block("", text)


def notebook(page: str, name: str) -> str:
    """The notebook of a page, as the text of its file.

    Args:
        page: The page.
        name: Name of its file without ``.md``; the paragraph that links to the notebook is left out.

    Raises:
        ValueError: Code that only IPython understands: it would not be what the page shows.
    """
    cells: list[dict[str, object]] = []
    text: list[str] = []

    def add(kind: str, source: str, **fields: object) -> None:
        lines = source.strip("\n").splitlines(keepends=True)
        cells.append({"cell_type": kind, "id": f"{name}-{len(cells)}", "metadata": {}, "source": lines, **fields})

    def add_text() -> None:
        if text:
            add("markdown", "\n\n".join(text))
            text.clear()

    for block in blocks(page):
        if block.kind == "python" and block.title is None:
            if re.search(r"^\s*[%!]", block.content, re.MULTILINE):
                raise ValueError(f"{name}: a page holds plain Python, but a line starts with % or !; leave it out")
            add_text()
            printed = [] if block.shown is None else block.shown.splitlines(keepends=True)
            outputs = [{"name": "stdout", "output_type": "stream", "text": printed}] if printed else []
            add("code", block.content, execution_count=None, outputs=outputs)
        elif block.kind == "":
            paragraphs = block.content.split("\n\n")
            text += [paragraph.strip("\n") for paragraph in paragraphs if f"({name}.ipynb)" not in paragraph]
        else:
            text.append(f"```{block.kind}\n{block.content}```")
            text += [] if block.shown is None else [f"```text\n{block.shown}```"]
    add_text()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the notebooks; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the notebooks of docs/tutorials from their pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    only_check: bool = parser.parse_args(argv).check
    made: dict[str, str] = {}
    for path in sorted((ROOT / PAGES).glob("*.md")):
        page = path.read_text()
        if f"({path.stem}.ipynb)" in page:
            made[f"{PAGES}/{path.stem}.ipynb"] = notebook(page, path.stem)
    return write_pages(made, ROOT, "make_notebooks.py", only_check)


if __name__ == "__main__":
    sys.exit(main())
