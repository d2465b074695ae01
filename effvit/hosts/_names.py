"""Names of parameters in official files -> ours, by rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = ["Rules", "renamed"]

Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]


def renamed(name: str, rules: Rules) -> str:
    """The name after every rule (pattern, replacement of ``re.sub``), one after another."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
