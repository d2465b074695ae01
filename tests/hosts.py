"""Which methods are run on which of the small hosts of ``effvit.testing``, by default and for a release."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest

from effvit.reducers import METHODS
from effvit.testing import HOSTS, make_host, make_images, make_model, pairs

__all__ = [
    "HOSTS",
    "MERGE",
    "OFF",
    "PAIRS",
    "SETTINGS",
    "covered",
    "covering",
    "make_host",
    "make_images",
    "make_model",
    "released",
]

MERGE = {name for name, method in METHODS.items() if method.keeps_every_patch}  # no patch is without a token
SETTINGS = {name: method.example() for name, method in METHODS.items()}
OFF = {name: method.off() for name, method in METHODS.items()}
PAIRS = pairs()

Pair = tuple[str, str]


def covering(pairs: Sequence[Pair]) -> set[Pair]:
    """A third of the pairs in which every first and every second member is, for tests of which some are enough."""
    firsts, seconds = (list(dict.fromkeys(members)) for members in zip(*pairs, strict=True))
    kept = {(a, b) for a, b in pairs if (firsts.index(a) + seconds.index(b)) % 3 == 1}
    for a, b in pairs:
        if a not in {first for first, _ in kept} or b not in {second for _, second in kept}:
            kept.add((a, b))
    return kept


def released(items: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The items as parameters of a test, of which those that are not kept run for a release alone."""
    rows = [(item, item if isinstance(item, tuple) else (item,)) for item in items]
    return [pytest.param(*row, marks=[] if item in kept else pytest.mark.release) for item, row in rows]


def covered(pairs: Sequence[Pair]) -> list[Any]:
    """The pairs as parameters of a test, of which those that are not ``covering`` run for a release alone."""
    return released(pairs, covering(pairs))
