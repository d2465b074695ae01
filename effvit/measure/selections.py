"""Towers whose tokens are selected, as users name them: a selector, how many tokens it leaves, KEY=VALUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from typing import NamedTuple

from torch import nn

from effvit.protocols import Setting, Settings
from effvit.selectors import SELECTORS, TokenSelector, list_selectors
from effvit.selectors.base import Keep
from effvit.selectors.select import CLASS_ROW

__all__ = [
    "Exit",
    "Selecting",
    "all_tokens",
    "check_selectors",
    "list_image_selectors",
    "list_selections",
    "select",
    "selected",
]


class Selecting(NamedTuple):
    """A selector with what it is asked for.

    Attributes:
        method: Its name.
        keep: How many tokens it leaves, as of ``effvit.select_tokens``.
        settings: Its settings.
    """

    method: str
    keep: Keep
    settings: Settings

    def __str__(self) -> str:
        keep: Settings = {} if self.keep is None else {"keep": self.keep}
        return " ".join([self.method, *(f"{name}={value}" for name, value in (keep | self.settings).items())])


@dataclass(frozen=True)
class Exit:
    """Where tokens leave a tower, and what is read of its attention; arguments and defaults of ``select_tokens``."""

    block: int | None = None
    merge: int | None = None
    scores: str = CLASS_ROW
    max_norm: float | None = None

    def of(self, method: str) -> Exit:
        """For a selector of that name, without what it does not read: several share one command."""
        return self if SELECTORS[method].row else replace(self, scores=CLASS_ROW, max_norm=None)

    def check(self, names: Sequence[str]) -> None:
        """Raise a ValueError for something that none of these selectors reads, and that would change nothing."""
        for name in ("scores", "max_norm"):
            given = getattr(self, name) != getattr(Exit(), name)
            if given and not any(SELECTORS[known].row for known in names if known in SELECTORS):
                raise ValueError(
                    f"none of {', '.join(names)} ranks by attention, so that {name} would change nothing; leave it out"
                )

    def settings(self) -> Settings:
        """What differs from the defaults, as keywords."""
        values: Settings = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(Exit(), name)}


def list_image_selectors() -> list[str]:
    """Names of the selectors that take images one by one and need no weights."""
    every = {name: SELECTORS[name] for name in list_selectors()}
    return [name for name, kind in every.items() if kind.takes == "select_tokens" and not kind.learns]


def check_selectors(names: Sequence[str]) -> None:
    """Raise a ValueError for a name that is none of ``list_image_selectors``."""
    known = list_image_selectors()
    for name in names:
        if name in SELECTORS and SELECTORS[name].learns:
            raise ValueError(
                f"{name} chooses by weights that are trained, which a name does not bring; measure a TokenSelector "
                "around it in Python"
            )
        if name not in known:
            why = f"is for effvit.{SELECTORS[name].takes}" if name in SELECTORS else "is no selector"
            raise ValueError(f"{name!r} {why}; the selectors for images one by one are {', '.join(known)}")


def list_selections(
    selectors: Sequence[str], keeps: Sequence[Keep], assignments: Sequence[tuple[str, Setting]]
) -> list[Selecting]:
    """Each selector with each number of tokens and each combination of values of the settings it has.

    Raises:
        ValueError: A name that is no selector of single images.
    """
    check_selectors(selectors)
    values: dict[str, list[Setting]] = {}
    for key, value in assignments:
        values.setdefault(key, []).append(value)
    found: list[Selecting] = []
    for method in selectors:
        keys = [key for key in values if key in SELECTORS[method].defaults()]
        settings = [dict(zip(keys, chosen, strict=True)) for chosen in product(*(values[key] for key in keys))]
        found += [Selecting(method, keep, own) for keep in keeps or [None] for own in settings]
    return found


def all_tokens(tower: nn.Module, leaving: Exit) -> TokenSelector:
    """The tower that hands over all its tokens: what selections of them are compared with."""
    return TokenSelector(tower, "uniform", keep=1.0, block=leaving.block, merge=leaving.merge)


def selected(
    towers: Mapping[str, nn.Module], selections: Sequence[Selecting], leaving: Exit
) -> dict[str, TokenSelector]:
    """Name -> each tower with each selection; "" is the name of the dense tower.

    Raises:
        TypeError, ValueError: What ``TokenSelector`` refuses.
    """
    return {
        ", ".join(filter(None, [name, str(own)])): select(tower, own, leaving)
        for name, tower in towers.items()
        for own in selections
    }


def select(tower: nn.Module, own: Selecting, leaving: Exit) -> TokenSelector:
    """One tower with one selection."""
    block, merge, scores, max_norm = astuple(leaving.of(own.method))
    return TokenSelector(
        tower, own.method, keep=own.keep, block=block, merge=merge, scores=scores, max_norm=max_norm, **own.settings
    )
