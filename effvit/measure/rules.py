"""What may stand in a file of results: rules for single values, and how they combine to those for lists and objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias

from effvit.messages import UNSAFE, plain, shown
from effvit.protocols import Json

__all__ = [
    "Rule",
    "either",
    "fields",
    "labels",
    "list_of",
    "number",
    "optional",
    "picture",
    "plain_value",
    "same_length",
    "table_of",
    "text",
    "truth",
    "whole",
]

LARGEST_NUMBER = 1e18  # multiply-adds of the largest models are below 1e15; a page draws no axis to 1e300
LONGEST_TEXT = 10_000
LONGEST_LIST = 10_000
DEEPEST = 8
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]*={0,2}")

Rule: TypeAlias = Callable[[Json, str], None]
"""Raises a ValueError for a value that is not allowed; the text is its place in the file."""


def refuse(place: str, rule: str, value: Json) -> NoReturn:
    owner, _, field = place.rpartition(", ")
    raise ValueError(
        f'{owner}: "{field}" must be {rule}, got {shown(value)}; measure again with this version of effvit'
    )


def number(low: float = -LARGEST_NUMBER, high: float = LARGEST_NUMBER) -> Rule:
    """A finite number between the bounds; True and False are none."""

    def check(value: Json, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN too
            refuse(place, f"a number from {low:g} to {high:g}", value)

    return check


def whole(low: int = 0, high: int = int(LARGEST_NUMBER)) -> Rule:
    """An integer between the bounds."""

    def check(value: Json, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            refuse(place, f"a whole number from {low} to {high:g}", value)

    return check


def text(value: Json, place: str) -> None:
    """A string of moderate length without control characters."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or UNSAFE.search(value):
        refuse(place, f"a text of at most {LONGEST_TEXT} characters without control characters", value)


def truth(value: Json, place: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        refuse(place, "true or false", value)


def picture(value: Json, place: str) -> None:
    """An image as a data URI."""
    if not isinstance(value, str) or not PICTURE.fullmatch(value):
        refuse(place, "a data URI of a PNG, JPEG, GIF or WebP image in base64", value)


def plain_value(value: Json, place: str, depth: int = 0) -> None:
    """A JSON value of moderate depth and size."""
    if depth > DEEPEST:
        refuse(place, f"at most {DEEPEST} lists and objects inside each other", value)
    if isinstance(value, str):
        text(value, place)
    elif isinstance(value, list):
        list_of(lambda entry, where: plain_value(entry, where, depth + 1))(value, place)
    elif isinstance(value, dict):
        table_of(lambda entry, where: plain_value(entry, where, depth + 1))(value, place)
    elif value is not None and not isinstance(value, bool):
        number()(value, place)


def optional(rule: Rule) -> Rule:
    """None, or what the rule takes."""
    return lambda value, place: None if value is None else rule(value, place)


def either(first: Rule, second: Rule) -> Rule:
    """What one of the rules takes; the error is that of the second."""

    def check(value: Json, place: str) -> None:
        try:
            first(value, place)
        except ValueError:
            second(value, place)

    return check


def list_of(rule: Rule, least: int = 0, most: int = LONGEST_LIST) -> Rule:
    """A list of ``least`` to ``most`` entries that the rule takes."""

    def check(value: Json, place: str) -> None:
        if not isinstance(value, list):
            owner, _, field = place.rpartition(", ")
            raise ValueError(f'{owner}: "{field}" must be a list, got a {type(value).__name__}')
        if not least <= len(value) <= most:
            refuse(place, f"a list of {least} to {most} entries", value)
        for index, entry in enumerate(value):
            rule(entry, f"{place} {index}")

    return check


def table_of(rule: Rule) -> Rule:
    """An object of any names whose values the rule takes."""

    def check(value: Json, place: str) -> None:
        if not isinstance(value, dict) or len(value) > LONGEST_LIST:
            refuse(place, f"an object of at most {LONGEST_LIST} entries", value)
        for name, entry in value.items():
            text(name, f"{place}, a name")
            rule(entry, f"{place}, {plain(name, 60)}")

    return check


def fields(rules: Mapping[str, Rule], others: Mapping[str, Rule] | None = None) -> Rule:
    """An object with all fields of ``rules`` and perhaps those of ``others``; what else it has is a plain value."""
    known = {**rules, **(others or {})}

    def check(value: Json, place: str) -> None:
        entries = value if isinstance(value, dict) else {}
        missing = sorted(rules.keys() - entries.keys())
        if missing or not isinstance(value, dict):
            raise ValueError(f"{place} lacks {', '.join(missing)}; measure again with this version of effvit")
        table_of(lambda entry, where: None)(value, place)
        for name, entry in entries.items():
            known.get(name, plain_value)(entry, f"{place}, {plain(name, 60)}")

    return check


def same_length(rule: Rule, first: str, second: str) -> Rule:
    """An object that the rule takes, whose two fields are lists of one length."""

    def check(value: Json, place: str) -> None:
        rule(value, place)
        own, other = (value.get(name) for name in (first, second)) if isinstance(value, dict) else (None, None)
        if isinstance(own, list) and isinstance(other, list) and len(own) != len(other):
            refuse(f"{place}, {second}", f"as long as {first}, {len(own)} entries", other)

    return check


def labels(value: Json, place: str) -> None:
    """Rows of one length with the token of each patch, -1 where it was dropped."""
    list_of(list_of(whole(-1, 1 << 24), least=1, most=4096), least=1, most=4096)(value, place)
    rows = value if isinstance(value, list) else []
    lengths = sorted({len(row) for row in rows if isinstance(row, list)})
    if len(lengths) > 1:
        refuse(place, "rows of one length", [*lengths])
