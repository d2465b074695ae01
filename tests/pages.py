"""Examples of the pages in docs/, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def example(page: str, word: str) -> str:
    """The Python of a page that holds a word, of all its blocks in their order; a KeyError if none does."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    found = [block for block in blocks if word in block]
    if not found:
        raise KeyError(f"docs/{page} has no Python with {word!r}")
    return "\n".join(found)


def run_page(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The names of a page after its Python was run from the first block to the last.

    A block of text is what the Python in front of it prints, and Python without one prints nothing.
    """
    names: dict[str, Any] = {}
    for kind, block in re.findall(r"```(python|text)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        if kind == "python":
            assert capsys.readouterr().out == ""
            exec(block, names)
        else:
            assert capsys.readouterr().out == block
    return names
