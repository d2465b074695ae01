"""Which methods are run on which of the small hosts of ``effvit.testing``, by default and for a release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest
import torch

from effvit.reducers import METHODS
from effvit.testing import HOSTS, make_host, make_images, make_model, pairs
from effvit.tokens import TokenMap

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
    "packed_map",
    "released",
]

MERGE = {name for name, method in METHODS.items() if method.keeps_every_patch}  # no patch is without a token
SETTINGS = {name: method.example() for name, method in METHODS.items()}
OFF = {name: method.off() for name, method in METHODS.items()}
PAIRS = pairs()

Pair = tuple[str, str]


def packed_map(*lengths: int) -> TokenMap:
    """The map of a packed batch of images with so many tokens and no prefix, nobody having read how many."""
    most = max(lengths)
    tokens = TokenMap.full(torch.zeros(len(lengths), most, 1), (1, most), num_prefix=0, num_class=0)
    valid = torch.arange(most) < torch.tensor(lengths).unsqueeze(1)
    return tokens.keep(tokens.source, most, valid=valid, packed=True)


def covering(pairs: Sequence[Pair], taken: Counter[Pair] | None = None) -> set[Pair]:
    """Few of the pairs in which every first and every second member is, for tests of which some are enough.

    Greedy and without chance: next is the pair with most members that none has yet, of these the one ``taken`` least,
    of these the one whose members came least.
    """
    taken = taken or Counter()
    came: Counter[tuple[int, str]] = Counter()
    kept: set[Pair] = set()
    while missing := {member for pair in pairs for member in enumerate(pair) if not came[member]}:
        best = max(
            pairs,
            key=lambda pair: (
                len(missing & {*enumerate(pair)}),
                -taken[pair],
                -sum(came[member] for member in enumerate(pair)),
            ),
        )
        came.update(enumerate(best))
        kept.add(best)
    return kept


def cover(laws: Iterable[str], pairs: Sequence[Pair]) -> dict[str, set[Pair]]:
    """A ``covering`` for each law, which differ so that every pair meets some law.

    So there are about as many cases as laws times members of the longer side, not laws times pairs.
    """
    taken: Counter[Pair] = Counter()
    chosen: dict[str, set[Pair]] = {}
    for law in laws:
        chosen[law] = covering(pairs, taken)
        taken.update(chosen[law])
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
