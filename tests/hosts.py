"""Which methods are run on which of the small hosts of ``effvit.testing``, by default and for a release."""

from __future__ import annotations

from collections import Counter
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
    "cover",
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


def cover(laws: Iterable[str], pairs: Sequence[Pair]) -> dict[str, set[Pair]]:
    """Pairs for each law, in which every law meets every first and every second member, and every pair some law.

    Greedy and without chance: a law takes the pair that has most members new to it, of these the one that fewest laws
    before it took. So there are about as many cases as laws times members of the longer side, not laws times pairs.
    """
    taken: Counter[Pair] = Counter()
    chosen: dict[str, set[Pair]] = {law: set() for law in laws}
    for kept in chosen.values():
        new = {(side, member) for pair in pairs for side, member in enumerate(pair)}
        while new:
            best = max(pairs, key=lambda pair: (len(new & {*enumerate(pair)}), -taken[pair]))
            new -= {*enumerate(best)}
            taken[best] += 1
            kept.add(best)
    for pair in pairs:
        if not taken[pair]:
            min(chosen.values(), key=len).add(pair)
    return chosen


def released(items: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The items as parameters of a test, of which those that are not kept run for a release alone."""
    rows = [(item, item if isinstance(item, tuple) else (item,)) for item in items]
    return [pytest.param(*row, marks=[] if item in kept else pytest.mark.release) for item, row in rows]


def covered(pairs: Sequence[Pair]) -> list[Any]:
    """The pairs as parameters of a test, of which those that are not ``covering`` run for a release alone."""
    return released(pairs, covering(pairs))
