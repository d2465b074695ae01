"""Files of results: where the values of ``effvit.measure.values`` are read from and written to.

A file of results is a list of records. Each is checked field by field before anything is made of it, since files come
from strangers too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from effvit.measure.json_files import read_json, write_json
from effvit.measure.rules import (
    Rule,
    either,
    fields,
    labels,
    list_of,
    number,
    optional,
    picture,
    plain_value,
    same_length,
    table_of,
    text,
    truth,
    whole,
)
from effvit.measure.values import (
    Accuracy,
    BlockTime,
    Candidate,
    Classified,
    Conditions,
    Consistency,
    Cost,
    Evaluated,
    Evaluation,
    EvaluationConditions,
    Fidelity,
    FreeChoices,
    HandedOver,
    Judged,
    Metrics,
    ObjectPatches,
    Published,
    Record,
    Staircase,
    TokenRecord,
    Tuning,
    TuningConditions,
)
from effvit.messages import plain, shown
from effvit.protocols import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "SCHEMA",
    "add_record",
    "as_json",
    "as_object",
    "check_record",
    "evaluation_of",
    "profile_of",
    "read_evaluations",
    "read_profiles",
    "read_records",
    "read_results",
    "read_tuning",
    "write_records",
]

Made = TypeVar("Made")

SCHEMA = 1  # of the records; a change that breaks their readers raises it

# -- what records hold -----------------------------------------------------------------------------------------------

POSITIVE = number(low=0)
BOUNDS = list_of(POSITIVE, 2, 2)
ACCURACY = fields({"value": number(0, 100), "metric": text, "data": text, "origin": text}, {"images": whole(1)})
PUBLISHED = fields({"value": number(0, 100), "data": text, "source": text})
FIDELITY = fields(
    {"divergence": number(), "feature_distance": number()}, {"agreement": number(0, 1), "images": whole(1)}
)
CLASSIFIED = fields({"loss": POSITIVE, "top1": number(0, 100), "images": whole(1)})
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
MODEL = {  # what costs and evaluations say of a model alike
    "name": text,
    "host": optional(text),
    "method": optional(text),
    "settings": table_of(plain_value),
    "parameters": whole(),
    "macs": whole(),
    "mac_ratio": optional(POSITIVE),
    "tokens": optional(list_of(POSITIVE)),
}
HANDED = fields(
    {"tokens": POSITIVE, "text": whole()}, {"reader": text, "prefill_macs": whole(), "cache_bytes": whole()}
)
COST = fields(
    {
        **MODEL,
        "uncounted": table_of(whole()),
        "images_per_second": POSITIVE,
        "latency": fields({"p50": POSITIVE, "p99": POSITIVE}, {"p10": POSITIVE, "p90": POSITIVE}),
        "peak_memory": whole(),
        "speedup": POSITIVE,
        "interval": BOUNDS,
        "resolved": truth,
        "ideal_speedup": optional(POSITIVE),
        "efficiency": optional(POSITIVE),
        "efficiency_interval": optional(BOUNDS),
        "breakdown": optional(list_of(fields({"block": either(whole(), text), "seconds": table_of(POSITIVE)}))),
        "seconds": list_of(POSITIVE, least=1),
        "accuracy": optional(ACCURACY),
        "fidelity": optional(FIDELITY),
    },
    {"handed": HANDED},
)
SHARES = list_of(number(0, 1), least=1)
OBJECT_PATCHES = same_length(
    fields({"tokens": SHARES, "represented": SHARES, "images": whole(1)}), "tokens", "represented"
)
CONSISTENCY = same_length(
    fields({"shifts": list_of(whole(1), least=1), "same": SHARES, "images": whole(1)}), "shifts", "same"
)
EVALUATED = fields(
    {
        **MODEL,
        "accuracy": ACCURACY,
    },
    {"published": PUBLISHED, "object_patches": OBJECT_PATCHES, "consistency": CONSISTENCY},
)
STAGE = fields(
    {"block": whole(), "tokens": whole(), "labels": labels, "fused": list_of(whole(), most=1 << 24), "soft": truth},
    {"handed_over": truth},
)
CANDIDATE = fields(
    {
        "method": text,
        "settings": table_of(plain_value),
        "macs": whole(),
        "speedup": POSITIVE,
        "interval": BOUNDS,
        "fidelity": FIDELITY,
    },
    {"rounds": whole(1), "classified": CLASSIFIED},
)
JUDGED = fields({"method": text, "settings": table_of(plain_value), "fidelity": FIDELITY}, {"classified": CLASSIFIED})
FREE = fields({"choice": CANDIDATE, "random": list_of(CANDIDATE), "defaults": list_of(CANDIDATE)}, {"no_random": text})
STAIRCASE = same_length(
    fields({"tokens": list_of(whole(1), least=1), "seconds": list_of(POSITIVE, least=1), "rest": POSITIVE}),
    "tokens",
    "seconds",
)
PACKAGES = list_of(fields({"name": text, "needed": text, "found": optional(text), "fits": truth}))
KINDS: dict[str, Rule] = {
    "profile": fields({"machine": MACHINE, "conditions": CONDITIONS, "models": list_of(COST, least=1)}),
    "accuracy": fields(
        {
            "machine": MACHINE,
            "conditions": fields(
                {"batch_size": whole(1), "input_size": list_of(whole(1), 3, 3), "device": text, "dtype": text},
                {"weights": text},
            ),
            "models": list_of(EVALUATED, least=1),
        }
    ),
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
    "metrics": fields(
        {"config": text, "checkpoint": optional(text), "metrics": table_of(optional(number()))},
    ),
    "doctor": fields(
        {
            "effvit": text,
            "python": text,
            "system": text,
            "devices": table_of(text),
            "core": fields({"problem": optional(text), "packages": PACKAGES}),
            "extras": table_of(
                fields(
                    {
                        "name": text,
                        "purpose": text,
                        "packages": PACKAGES,
                        "problems": list_of(text),
                        "install": optional(text),
                    }
                )
            ),
        }
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
                },
                {"measure": text, "data": text},
            ),
            "target": table_of(POSITIVE),
            "best": optional(CANDIDATE),
            "front": list_of(CANDIDATE),
            "tried": list_of(CANDIDATE),
        },
        {
            "judged": list_of(JUDGED),
            "staircase": STAIRCASE,
            "untried": list_of(text),
            "dense": CLASSIFIED,
            "free": FREE,
            "said": list_of(text),  # of the comparison in "free"
        },
    ),
}


LISTED = ("profile", "accuracy", "tokens", "metrics")  # kinds that a list of records holds
SINGLE = ("tune", "doctor")  # kinds that are a file of their own


def check_record(record: Json, place: str, kinds: tuple[str, ...] = LISTED) -> None:
    """Raise a ValueError unless the record has all fields of its kind, and in each what belongs there.

    Args:
        record: What was read from a file.
        place: What the message calls it.
        kinds: Kinds it may be of: those of ``KINDS``.
    """
    entries = record if isinstance(record, dict) else {}
    schema, kind = entries.get("schema"), entries.get("kind")
    if type(schema) is not int or schema != SCHEMA or not isinstance(kind, str) or kind not in kinds:
        said = f"{{'schema': {shown(schema)}, 'kind': {shown(kind)}}}" if isinstance(record, dict) else shown(record)
        raise ValueError(
            f'{place} must have "schema": {SCHEMA} and "kind": {" or ".join(map(repr, kinds))}, got {said}; '
            "measure again with this version of effvit"
        )
    KINDS[kind]({name: entry for name, entry in entries.items() if name not in ("schema", "kind")}, place)


# -- from files ------------------------------------------------------------------------------------------


def read_records(path: Path, kinds: tuple[str, ...] = LISTED) -> list[Json]:
    """The records of a file of results, each checked by ``check_record``.

    Raises:
        OSError: As ``read_json``.
        ValueError: As ``read_json`` and ``check_record``; the message names the file and what is wrong in it.
    """
    return _checked(read_json(path), path, kinds)


def read_results(path: Path) -> list[Json]:
    """What a report shows of a file: its records, or what is a file of its own; errors as of ``read_records``."""
    value = read_json(path)
    if isinstance(value, dict) and value.get("kind") in SINGLE:
        check_record(value, plain(path), SINGLE)
        return [value]
    if isinstance(value, dict) and "state" in value:
        raise ValueError(
            f"{plain(path)} keeps the counts of an evaluation that is not complete; let its command go on, and give "
            "the file of its --json"
        )
    return _checked(value, path, LISTED)


def _checked(records: Json, path: Path, kinds: tuple[str, ...]) -> list[Json]:
    if not isinstance(records, list) or not records:
        raise ValueError(
            f"{plain(path)} must hold a list of records, at least one, got {type(records).__name__}; "
            "effvit profile, evaluate and visualize write such files with --json, effvit test with --out; tune and "
            "doctor have files of their own"
        )
    for index, record in enumerate(records):
        check_record(record, f"{plain(path)}, record {index}", kinds)
    return records


def read_profiles(path: Path) -> list[Record]:
    """The records of a file that holds profiles alone; errors as of ``read_records``."""
    return [profile_of(record) for record in read_records(path, (Record.kind,))]


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluations in a file of results; errors as of ``read_records``."""
    return [evaluation_of(record) for record in read_records(path, (Evaluation.kind,))]


def read_tuning(path: Path) -> Tuning:
    """What a search for a setting found, of a file of its own.

    Raises:
        OSError, ValueError: As ``read_json`` and ``check_record``.
    """
    value = read_json(path)
    check_record(value, plain(path), (Tuning.kind,))
    entries = _object(value)
    return _made(
        Tuning,
        entries,
        conditions=_with_options(TuningConditions, _object(entries["conditions"])),
        best=entries["best"] and _candidate(_object(entries["best"])),
        front=[_candidate(entry) for entry in _objects(entries["front"])],
        tried=[_candidate(entry) for entry in _objects(entries["tried"])],
        **_progress(entries),
    )


def _progress(entries: Mapping[str, Json]) -> dict[str, object]:
    """What a file of a search may hold beside its result."""
    found: dict[str, object] = {}
    if "judged" in entries:
        found["judged"] = [_compared(Judged, entry) for entry in _objects(entries["judged"])]
    if "staircase" in entries:
        steps = _object(entries["staircase"])
        sides = {name: tuple(_list(steps[name])) for name in ("tokens", "seconds")}
        found["staircase"] = _made(Staircase, steps, **sides)
    if "dense" in entries:
        found["dense"] = _made(Classified, _object(entries["dense"]))
    if "free" in entries:
        free = _object(entries["free"])
        groups = {name: [_candidate(entry) for entry in _objects(free[name])] for name in ("random", "defaults")}
        found["free"] = _made(FreeChoices, free, choice=_candidate(_object(free["choice"])), **groups)
    return found


def profile_of(value: Json) -> Record:
    """The value of a checked record of kind "profile"."""
    entries = _object(value)
    conditions = _object(entries["conditions"])
    notes = {name: entry for name, entry in conditions.items() if name == "weights"}
    others = {name: entry for name, entry in conditions.items() if name not in notes}
    return _made(
        Record,
        entries,
        conditions=_with_options(Conditions, others, notes=notes),
        models=[_cost(entry) for entry in _objects(entries["models"])],
    )


def evaluation_of(value: Json) -> Evaluation:
    """The value of a checked record of kind "accuracy"."""
    entries = _object(value)
    return _made(
        Evaluation,
        entries,
        conditions=_made(EvaluationConditions, _object(entries["conditions"])),
        models=[_evaluated(entry) for entry in _objects(entries["models"])],
    )


# What is below takes entries that check_record has let pass, whose types are known to it and not to a type checker.


def _object(value: Json) -> dict[str, Json]:
    assert isinstance(value, dict)
    return value


def _list(value: Json) -> list[Json]:
    assert isinstance(value, list)
    return value


def _objects(value: Json) -> list[dict[str, Json]]:
    return [_object(entry) for entry in _list(value)]


def _made(kind: Callable[..., Made], value: Mapping[str, Json], **others: object) -> Made:
    """The class's instance with the fields that an object of a file has and others; bounds and sizes become tuples."""
    names = signature(kind).parameters
    pairs = ("interval", "efficiency_interval", "input_size")
    own: dict[str, object] = {
        name: tuple(entry) if name in pairs and isinstance(entry, list) else entry
        for name, entry in value.items()
        if name in names
    }
    return kind(**own | others)


def _with_options(kind: Callable[..., Made], value: Mapping[str, Json], **others: object) -> Made:
    """As ``_made``, with what is no field of the class among its options."""
    names = signature(kind).parameters
    return _made(kind, value, options={name: entry for name, entry in value.items() if name not in names}, **others)


def _cost(value: Mapping[str, Json]) -> Cost:
    accuracy, distances, parts = value["accuracy"], value["fidelity"], value["breakdown"]
    return _made(
        Cost,
        value,
        accuracy=accuracy and _made(Accuracy, _object(accuracy)),
        fidelity=distances and _made(Fidelity, _object(distances)),
        breakdown=parts and [_made(BlockTime, part) for part in _objects(parts)],
        handed=_made(HandedOver, _object(value["handed"])) if "handed" in value else None,
    )


def _evaluated(value: Mapping[str, Json]) -> Evaluated:
    kinds = {
        "accuracy": Accuracy,
        "published": Published,
        "object_patches": ObjectPatches,
        "consistency": Consistency,
    }
    return _made(Evaluated, value, **{n: _made(kind, _object(value[n])) for n, kind in kinds.items() if n in value})


def _candidate(value: Mapping[str, Json]) -> Candidate:
    return _compared(Candidate, value)


def _compared(kind: Callable[..., Made], value: Mapping[str, Json]) -> Made:
    """A setting whose outputs were compared with the dense ones, and with labels where the images have them."""
    found: dict[str, object] = {"fidelity": _made(Fidelity, _object(value["fidelity"]))}
    if "classified" in value:
        found["classified"] = _made(Classified, _object(value["classified"]))
    return _made(kind, value, **found)


# -- into files ------------------------------------------------------------------------------------------


def as_json(value: object) -> Json:
    """A value as a file holds it; what has no value and may be missing in a file is left out.

    Raises:
        TypeError: A value that JSON has no words for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_object(value)
    if isinstance(value, Mapping):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a file of results holds numbers, texts, lists and objects, got a {type(value).__name__}")


def as_object(value: DataclassInstance) -> dict[str, Json]:
    """The fields of a dataclass as ``as_json`` writes them, those of a record after its schema and kind."""
    found: dict[str, Json] = {}
    if isinstance(value, (Record, Evaluation, Metrics, TokenRecord, Tuning)):
        found |= {"schema": SCHEMA, "kind": value.kind}
    for entry in dataclasses.fields(value):
        own: object = getattr(value, entry.name)
        if isinstance(own, Mapping) and "inline" in entry.metadata:
            found |= {name: as_json(inner) for name, inner in own.items()}
        elif own is not None or entry.default is dataclasses.MISSING:
            found[entry.name] = as_json(own)
    return found


def write_records(path: Path, records: Sequence[Record | Evaluation | Metrics | TokenRecord]) -> None:
    """Write a file of results; errors as of ``write_json``."""
    write_json(path, as_json(list(records)))


def add_record(path: Path, record: Json) -> None:
    """Write the record at the end of the list in the file, or as the first of a new one.

    Raises:
        ValueError: A file that holds no list.
    """
    records = read_json(path) if path.exists() else []
    if not isinstance(records, list):
        raise ValueError(f"{plain(path)} must hold a list of records to add one, got {type(records).__name__}")
    write_json(path, [*records, record])
