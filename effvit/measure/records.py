"""Files of results: read with limits, and checked field by field before anything is made of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from effvit.messages import UNSAFE, plain, shown

__all__ = ["SCHEMA", "add_record", "check_record", "parse_json", "read_json", "read_records", "write_json"]

SCHEMA = 1  # of the records; a change that breaks their readers raises it
LARGEST_FILE = 64 << 20  # bytes; a record of ten models has 10 kB, a picture of tokens 200 kB
LARGEST_NUMBER = 1e18  # multiply-adds of the largest models are below 1e15; a page draws no axis to 1e300
LONGEST_TEXT = 10_000
LONGEST_LIST = 10_000
DEEPEST = 8
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]*={0,2}")

Rule = Callable[[Any, str], None]  # raises a ValueError for a value; the text is the place of the value in the file


# -- rules -----------------------------------------------------------------------------------------------


def _refuse(place: str, rule: str, value: Any) -> NoReturn:
    owner, _, field = place.rpartition(", ")
    raise ValueError(
        f'{owner}: "{field}" must be {rule}, got {shown(value)}; measure again with this version of effvit'
    )


def number(low: float = -LARGEST_NUMBER, high: float = LARGEST_NUMBER) -> Rule:
    """A finite number between the bounds; True and False are none."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no interval
            _refuse(place, f"a number from {low:g} to {high:g}", value)

    return check


def whole(low: int = 0, high: int = int(LARGEST_NUMBER)) -> Rule:
    """An integer between the bounds."""

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(place, f"a whole number from {low} to {high:g}", value)

    return check


def text(value: Any, place: str) -> None:
    """A string of moderate length without control characters."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or UNSAFE.search(value):
        _refuse(place, f"a text of at most {LONGEST_TEXT} characters without control characters", value)


def truth(value: Any, place: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        _refuse(place, "true or false", value)


def picture(value: Any, place: str) -> None:
    """An image as a data URI."""
    if not isinstance(value, str) or not PICTURE.fullmatch(value):
        _refuse(place, "a data URI of a PNG, JPEG, GIF or WebP image in base64", value)


def plain_value(value: Any, place: str, depth: int = 0) -> None:
    """Any JSON value of moderate depth and size."""
    if depth > DEEPEST:
        _refuse(place, f"at most {DEEPEST} lists and objects inside each other", value)
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

    def check(value: Any, place: str) -> None:
        try:
            first(value, place)
        except ValueError:
            second(value, place)

    return check


def list_of(rule: Rule, least: int = 0, most: int = LONGEST_LIST) -> Rule:
    """A list of ``least`` to ``most`` entries that the rule takes."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list):
            owner, _, field = place.rpartition(", ")
            raise ValueError(f'{owner}: "{field}" must be a list, got a {type(value).__name__}')
        if not least <= len(value) <= most:
            _refuse(place, f"a list of {least} to {most} entries", value)
        for index, entry in enumerate(value):
            rule(entry, f"{place} {index}")

    return check


def table_of(rule: Rule) -> Rule:
    """An object of any names whose values the rule takes."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict) or len(value) > LONGEST_LIST:
            _refuse(place, f"an object of at most {LONGEST_LIST} entries", value)
        for name, entry in value.items():
            text(name, f"{place}, a name")
            rule(entry, f"{place}, {plain(name, 60)}")

    return check


def fields(rules: Mapping[str, Rule], others: Mapping[str, Rule] | None = None) -> Rule:
    """An object with all fields of ``rules`` and perhaps those of ``others``; what else it has is a plain value."""
    known = {**rules, **(others or {})}

    def check(value: Any, place: str) -> None:
        missing = sorted(rules.keys() - value.keys()) if isinstance(value, dict) else sorted(rules)
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}; measure again with this version of effvit")
        table_of(lambda entry, where: None)(value, place)
        for name, entry in value.items():
            known.get(name, plain_value)(entry, f"{place}, {plain(name, 60)}")

    return check


def labels(value: Any, place: str) -> None:
    """Rows of one length with the token of each patch, -1 where it was dropped."""
    list_of(list_of(whole(-1, 1 << 24), least=1, most=4096), least=1, most=4096)(value, place)
    lengths = {len(row) for row in value}
    if len(lengths) > 1:
        _refuse(place, "rows of one length", sorted(lengths))


# -- what records hold -----------------------------------------------------------------------------------

POSITIVE = number(low=0)
BOUNDS = list_of(POSITIVE, 2, 2)
ACCURACY = fields({"value": number(0, 100), "metric": text, "data": text, "origin": text})
FIDELITY = fields(
    {"divergence": number(), "feature_distance": number()}, {"agreement": number(0, 1), "images": whole(1)}
)
MACHINE = fields(
    dict.fromkeys(("system", "processor", "device", "python", "torch", "timm", "effvit"), text)
    | {"cores": optional(whole(1))}
)
CONDITIONS = fields(
    {
        "batch_size": whole(1),
        "input_size": list_of(whole(1), 3, 3),
        "dtype": text,
        "device": text,
        "threads": whole(1),
        "compile": truth,
        "cuda_graphs": truth,
        "clock": text,
        "images": either(list_of(text), text),
    },
    {"weights": optional(text)},
)
COST = fields(
    {
        "name": text,
        "host": optional(text),
        "method": optional(text),
        "settings": table_of(plain_value),
        "parameters": whole(),
        "macs": whole(),
        "uncounted": table_of(whole()),
        "tokens": optional(list_of(POSITIVE)),
        "images_per_second": POSITIVE,
        "latency": fields({"p50": POSITIVE, "p99": POSITIVE}, {"p10": POSITIVE, "p90": POSITIVE}),
        "peak_memory": whole(),
        "speedup": POSITIVE,
        "interval": BOUNDS,
        "resolved": truth,
        "mac_ratio": optional(POSITIVE),
        "ideal_speedup": optional(POSITIVE),
        "efficiency": optional(POSITIVE),
        "efficiency_interval": optional(BOUNDS),
        "breakdown": optional(list_of(fields({"block": either(whole(), text), "seconds": table_of(POSITIVE)}))),
        "seconds": list_of(POSITIVE, least=1),
        "accuracy": optional(ACCURACY),
        "fidelity": optional(FIDELITY),
    }
)
STAGE = fields(
    {"block": whole(), "tokens": whole(), "labels": labels, "fused": list_of(whole(), most=1 << 24), "soft": truth}
)
CANDIDATE = fields(
    {
        "method": text,
        "settings": table_of(plain_value),
        "macs": whole(),
        "speedup": POSITIVE,
        "interval": BOUNDS,
        "fidelity": FIDELITY,
    }
)
KINDS: dict[str, Rule] = {
    "profile": fields({"machine": MACHINE, "conditions": CONDITIONS, "models": list_of(COST, least=1)}),
    "tokens": fields(
        {
            "model": text,
            "host": optional(text),
            "method": optional(text),
            "settings": table_of(plain_value),
            "name": text,
            "picture": picture,
            "stages": list_of(STAGE),
        },
        {"note": optional(text)},
    ),
    "tune": fields(
        {
            "host": text,
            "machine": MACHINE,
            "conditions": fields(
                {
                    "batch_size": whole(1),
                    "input_size": list_of(whole(1), 3, 3),
                    "dtype": text,
                    "device": text,
                    "threads": whole(1),
                }
            ),
            "target": table_of(POSITIVE),
            "best": CANDIDATE,
            "front": list_of(CANDIDATE, least=1),
            "tried": list_of(CANDIDATE, least=1),
        }
    ),
}


def check_record(record: Any, place: str, kinds: tuple[str, ...] = ("profile", "tokens")) -> None:
    """Raise a ValueError unless the record has all fields of its kind, and in each what belongs there.

    Args:
        record: What was read from a file.
        place: What the message calls it.
        kinds: Kinds it may be of: "profile", "tokens" or "tune".
    """
    found = shown(record)
    if isinstance(record, dict):
        found = f"{{'schema': {shown(record.get('schema'))}, 'kind': {shown(record.get('kind'))}}}"
    has_schema = isinstance(record, dict) and type(record.get("schema")) is int and record["schema"] == SCHEMA
    if not has_schema or record.get("kind") not in list(kinds):
        raise ValueError(
            f'{place} must have "schema": {SCHEMA} and "kind": {" or ".join(map(repr, kinds))}, got {found}; '
            "measure again with this version of effvit"
        )
    own = {name: entry for name, entry in record.items() if name not in ("schema", "kind")}
    KINDS[record["kind"]](own, place)


# -- files -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8 of moderate size, with finite numbers and each name once in an object.

    Raises:
        OSError: No such file, or one that cannot be read.
        ValueError: Anything else; the message names the file.
    """
    if path.is_dir():
        raise ValueError(f"{plain(path)} is a folder, not a JSON file of results")
    if path.exists() and not path.is_file():
        raise ValueError(f"{plain(path)} is a pipe, socket or device, not a JSON file of results")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{plain(path)} has {path.stat().st_size} bytes, a file of results at most {LARGEST_FILE}; "
            "split it by its records"
        )
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{plain(path)} is not a JSON file of results ({plain(error)})") from error


def parse_json(content: str) -> Any:
    """The value of a JSON text with finite numbers and each name once in an object; a ValueError for any other."""
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("its lists are nested too deep") from None


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{plain(digits, 60)} is not a number a page can read")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {shown(again)} twice")
    return found


def read_records(path: Path, kinds: tuple[str, ...] = ("profile", "tokens")) -> list[dict[str, Any]]:
    """The records of a file of results, each checked by ``check_record``.

    Raises:
        OSError: As ``read_json``.
        ValueError: As ``read_json`` and ``check_record``; the message names the file and what is wrong in it.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(
            f"{plain(path)} must hold a list of records, at least one, got {type(records).__name__}; "
            "effvit profile --json and effvit visualize --json write such files"
        )
    for index, record in enumerate(records):
        check_record(record, f"{plain(path)}, record {index}", kinds)
    return records


def write_json(path: Path, value: Any) -> None:
    """Write the value, making the folder if there is none.

    Raises:
        ValueError: A number that is not finite, for which JSON has no words.
    """
    try:
        content = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{plain(path)} is not written: {error}; the outputs of a model are not finite") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n", encoding="utf-8")


def add_record(path: Path, record: Any) -> None:
    """Write the record at the end of the list in the file, or as the first of a new one.

    Raises:
        ValueError: A file that holds no list.
    """
    records = read_json(path) if path.exists() else []
    if not isinstance(records, list):
        raise ValueError(f"{plain(path)} must hold a list of records to add one, got {type(records).__name__}")
    write_json(path, [*records, record])
