"""Towers whose tokens are selected, as users name them: a selector, how many tokens it leaves, KEY=VALUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from typing import Any, NamedTuple

from torch import nn

from effvit.protocols import Setting, Settings, Size
from effvit.selectors import SELECTORS, CropSelector, SelectingTower, TokenSelector, VideoSelector, list_selectors
from effvit.selectors.base import Keep, Selector
from effvit.selectors.select import CLASS_ROW

__all__ = [
    "Exit",
    "Selecting",
    "Views",
    "all_tokens",
    "check_selectors",
    "list_image_selectors",
    "list_selections",
    "list_selectors_of",
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


@dataclass(frozen=True)
class Views:
    """What tokens are selected of: an image, or several that a tower takes as one.

    Attributes:
        crops: (rows, columns) of the crops of an image, behind its thumbnail.
        frames: T of a video.
    """

    crops: Size | None = None
    frames: int | None = None

    @property
    def takes(self) -> str:
        """The function of this package that selects of them."""
        return "select_parts" if self.crops else "select_tokens" if self.frames is None else "select_video"


NAMES = {
    "select_tokens": "images one by one",
    "select_parts": "the crops of an image (--crops)",
    "select_video": "the frames of a video (--frames, --video)",
}
"""What functions select of, in words, with the options of commands that ask for it."""


def list_selectors_of(views: Views, untrained: bool = False) -> list[str]:
    """Names of the selectors for these views: those for them alone, and those that choose in each by itself.

    Args:
        views: What they select of.
        untrained: Also those that need weights.
    """
    every = {name: SELECTORS[name] for name in list_selectors()}
    taken = ("select_tokens", views.takes)
    return [name for name, kind in every.items() if kind.takes in taken and (untrained or not kind.learns)]


def list_image_selectors() -> list[str]:
    """Names of the selectors that take images one by one and need no weights."""
    return list_selectors_of(Views())


def check_selectors(names: Sequence[str], views: Views | None = None, untrained: bool = False) -> None:
    """Raise a ValueError for a name that is none of ``list_selectors_of``; None: images one by one."""
    views = views or Views()
    known = list_selectors_of(views, untrained)
    for name in names:
        if name in known:
            continue
        if name in SELECTORS and SELECTORS[name].learns:
            raise ValueError(
                f"{name} chooses by weights that are trained, which a name does not bring; draw it or choose by it "
                "with a TokenSelector around it in Python, or measure its cost by effvit profile"
            )
        why = f"is for {NAMES[SELECTORS[name].takes]}" if name in SELECTORS else "is no selector"
        raise ValueError(f"{name!r} {why}; the selectors for {NAMES[views.takes]} are {', '.join(known)}")


def list_selections(
    selectors: Sequence[str],
    keeps: Sequence[Keep],
    assignments: Sequence[tuple[str, Setting]],
    views: Views | None = None,
    untrained: bool = False,
) -> list[Selecting]:
    """Each selector with each number of tokens and each combination of values of the settings it has.

    The numbers are not for selectors with weights, which say by themselves how many tokens leave, if others share them.

    Raises:
        ValueError: As ``check_selectors``, whose arguments ``views`` and ``untrained`` are.
    """
    check_selectors(selectors, views, untrained)
    values: dict[str, list[Setting]] = {}
    for key, value in assignments:
        values.setdefault(key, []).append(value)
    found: list[Selecting] = []
    shared = not all(SELECTORS[method].learns for method in selectors)
    for method in selectors:
        keys = [key for key in values if key in SELECTORS[method].defaults()]
        settings = [dict(zip(keys, chosen, strict=True)) for chosen in product(*(values[key] for key in keys))]
        numbers = [None] if SELECTORS[method].learns and shared else keeps or [None]
        found += [Selecting(method, keep, own) for keep in numbers for own in settings]
    return found


def all_tokens(tower: nn.Module, leaving: Exit, views: Views | None = None) -> SelectingTower:
    """The tower that hands over all its tokens: what selections of them are compared with."""
    return select(tower, Selecting("uniform", 1.0, {}), leaving, views)


def selected(
    towers: Mapping[str, nn.Module], selections: Sequence[Selecting], leaving: Exit, views: Views | None = None
) -> dict[str, SelectingTower]:
    """Name -> each tower with each selection; "" is the name of the dense tower.

    Raises:
        TypeError, ValueError: What ``TokenSelector``, ``CropSelector`` and ``VideoSelector`` refuse.
    """
    return {
        ", ".join(filter(None, [name, str(own)])): select(tower, own, leaving, views)
        for name, tower in towers.items()
        for own in selections
    }


def select(tower: nn.Module, own: Selecting, leaving: Exit, views: Views | None = None) -> SelectingTower:
    """One tower with one selection, of one image where no views are named; its weights, if it has any, are new."""
    views = views or Views()
    block, merge, scores, max_norm = astuple(leaving.of(own.method))
    asked: dict[str, Any] = {"keep": own.keep, "block": block, "merge": merge, "scores": scores, "max_norm": max_norm}
    method: str | Selector = own.method
    if SELECTORS[own.method].learns:
        method = SELECTORS[own.method].untrained(all_tokens(tower, leaving).token_dim, **own.settings)
    else:
        asked |= own.settings
    if views.crops is not None:
        return CropSelector(tower, method, crops=views.crops, **asked)
    if views.frames is not None:
        return VideoSelector(tower, method, frames=views.frames, **asked)
    return TokenSelector(tower, method, **asked)
