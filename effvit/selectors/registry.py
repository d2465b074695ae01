"""The selectors there are, those of this package and those that others register."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping

from effvit.hosts.tower_exit import KEYS, ROWS
from effvit.protocols import Setting
from effvit.reducers.registry import METHODS, origin_of, register_kind
from effvit.selectors.base import Selector

__all__ = ["RESERVED", "SELECTORS", "list_selectors", "make_selector", "register_selector"]

SELECTORS: dict[str, type[Selector]] = {}
TAKES = ("select_tokens", "select_parts", "select_video")
# Keywords beside a method's settings: of select_tokens, TokenSelector, select_parts, select_video, count_tokens.
RESERVED = frozenset(
    {"tower", "images", "method", "keep", "block", "merge", "tokens", "grid", "scores", "keys", "relevance", "max_norm"}
    | {"parts", "crops", "thumbnail", "image_size", "early", "frames", "settings"}
)


def register_selector(selector: type[Selector]) -> None:
    """What ``effvit.register_method`` does with a subclass of ``Selector``.

    Raises:
        TypeError: A class without ``name``, ``summary`` or ``choose`` and ``adapt``.
        ValueError: A name that is no word in lower case, or that another selector has; a setting whose name means
            something else to ``select_tokens`` and its like.
    """
    for attribute in ("name", "summary"):
        if not isinstance(getattr(selector, attribute, None), str):
            raise TypeError(f"{origin_of(selector)} has no {attribute}; set {attribute} = '...' in the class")
    known_values: dict[str, tuple[str, ...]] = {"row": tuple(ROWS), "keys": tuple(KEYS), "takes": TAKES}
    for attribute, values in known_values.items():
        value = getattr(selector, attribute)
        if value not in values and not (value is None and attribute != "takes"):
            raise ValueError(f"{attribute} of {origin_of(selector)} must be one of {', '.join(values)}, got {value!r}")
    if selector.reads_first and selector.row is None:
        raise ValueError(f"{origin_of(selector)} has reads_first, the scores of the first block, but no row; set one")
    alone = selector.takes == "select_tokens"
    if alone and selector.choose is Selector.choose and selector.adapt is Selector.adapt:
        raise TypeError(f"{origin_of(selector)} does not define choose or adapt, see effvit.Selector")
    if not re.fullmatch("[a-z][a-z0-9_]*", selector.name):
        raise ValueError(
            f"the name of a selector is a word in lower case, got {selector.name!r} for {origin_of(selector)}"
        )
    clash = sorted(selector.defaults().keys() & RESERVED)
    if clash:
        raise ValueError(
            f"{origin_of(selector)} has a setting {clash[0]!r}, which effvit.select_tokens or its like takes for "
            "something else; give it another name"
        )
    known = SELECTORS.setdefault(selector.name, selector)
    if known is not selector:
        raise ValueError(
            f"the selector {selector.name!r} is registered already, as {origin_of(known)}; "
            f"give {origin_of(selector)} another name"
        )


def list_selectors(pattern: str = "*") -> list[str]:
    """Names of the methods of ``effvit.select_tokens`` that match a shell-style pattern."""
    return [name for name in SELECTORS if fnmatch.fnmatch(name, pattern)]


def make_selector(method: str | Selector, settings: Mapping[str, Setting]) -> Selector:
    """The selector itself, or one of that name with the settings.

    Raises:
        TypeError: Neither a name nor a selector; settings beside a selector, which has its own.
        ValueError: An unknown name or setting; the name of a method whose weights nobody gave.
    """
    if isinstance(method, Selector):
        if settings:
            raise TypeError(
                f"a selector has its settings already, got {', '.join(settings)} too; give them to its class"
            )
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name of effvit.list_selectors() or a Selector, got {method!r}")
    if method not in SELECTORS:
        if method in METHODS:
            raise ValueError(f"{method!r} is a method that acts inside a model; use effvit.sparsify")
        close = difflib.get_close_matches(method, SELECTORS, n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(SELECTORS)}"
        raise ValueError(f"unknown selector {method!r}; {advice}")
    selector = SELECTORS[method]
    known = selector.defaults()
    for name in settings:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{method} has no setting {name!r}; {takes}")
    if selector.learns:
        raise ValueError(
            f"{method} chooses by weights that are trained, and a name brings none; make one, {origin_of(selector)}, "
            "load or train its weights, and give it as the method"
        )
    return selector(**settings)


register_kind(Selector, register_selector)
