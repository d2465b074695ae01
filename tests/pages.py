"""Examples of the pages in docs/, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def example(page: str, word: str) -> str:
    """The Python of a page that holds a word, of all its blocks in their order; a KeyError if none does."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    found = [block for block in blocks if word in block]
    if not found:
        raise KeyError(f"docs/{page} has no Python with {word!r}")
    return "\n".join(found)
