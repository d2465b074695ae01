"""How long official code takes beside ours on a CPU: selections behind vision towers, and reduced DeiT-S models.

Official code is no part of this project and is not fetched by it: ``--code`` is a folder with a checkout of each
repository under its own name, at the commit that a row names (and timm 0.4.12 in ``timm-0.4.12``, see
``official_reducers``). Where one is missing, cannot be imported, or cannot do what is asked, the row says why.

In a cell both sides do the same with the same numbers, compared before: they run interleaved, each once a round in
random order, in one process and in float32. A ratio is official time over our time, the median over the rounds of the
ratio within a round, with its bootstrap 95 % interval; above 1 ours is faster.

    python tools/benchmark_official.py --code ../official --json official.json
    python tools/benchmark_official.py --code ../official --json official.json --only divprune atc --rounds 5

The same command goes on after a kill, and tries again the rows that say why they were not measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kept_cells import KeptCells
from official_code import Official, Setting, check_commit
from official_reducers import REDUCTIONS
from official_selectors import SELECTIONS

from effvit.measure.profiler import interleaved, keep_freed_memory, machine, median_ratio
from effvit.messages import one_line, plain, run_command
from effvit.protocols import Json
from effvit.schedule import check_count

__all__ = ["main", "measure", "table"]

KIND = "times of official code beside ours, 1"
CODES: dict[str, dict[str, Official]] = {"selectors": SELECTIONS, "reducers": REDUCTIONS}
METHODS = [method for codes in CODES.values() for method in codes]
LONGEST_REASON = 200


class Case(NamedTuple):
    """A row.

    Attributes:
        code: What is measured.
        key: What no other row has.
        setting: What both sides are asked for.
    """

    code: Official
    key: dict[str, Json]
    setting: Setting


def cases(tokens: Sequence[int], batch_sizes: Sequence[int]) -> Iterator[Case]:
    """All rows: selections from one image of each number of tokens, models on batches of each size."""
    for part, codes in CODES.items():
        sizes = [(n, 1) for n in tokens] if part == "selectors" else [(196, b) for b in batch_sizes]
        for method, code in codes.items():
            for asked, divisor in code.asked.items():
                for number, batch in sizes:
                    side = math.isqrt(number)
                    key: dict[str, Json] = {"part": part, "method": method, "asked": asked}
                    yield Case(
                        code, key | {"tokens": number, "batch_size": batch}, Setting(batch, (side, side), divisor)
                    )


def measure(case: Case, code: Path, rounds: int) -> dict[str, Json]:
    """The row of a case, or why there is no figure in it.

    Args:
        case: What is measured.
        code: The folder of the checkouts.
        rounds: That count.
    """
    row: dict[str, Json] = {**case.key, "folder": case.code.folder, "commit": case.code.commit, "note": case.code.note}
    try:
        check_commit(code / case.code.folder, case.code.commit)
        pair = case.code.make(code, case.setting)
        runs = {"official": pair.official, "ours": pair.ours}
        seconds = interleaved(runs, pair.batch, rounds, warmup=1, precision=None, max_rounds=rounds, on_run=None)
    except Exception as error:  # code of others raises what it likes
        return row | {"refused": one_line(f"{type(error).__name__}: {error}", LONGEST_REASON)}
    ratio, interval = median_ratio(seconds["official"], seconds["ours"])
    samples: dict[str, Json] = {side: list(own) for side, own in seconds.items()}
    return row | samples | {"equal": pair.equal, "ratio": ratio, "interval": list(interval)}


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table."""
    columns = ("method", "asked", "tokens x batch", "official, ms", "ours, ms", "official / ours", "95 % interval")
    lines = [f"| {' | '.join((*columns, 'found', 'note'))} |", "|---" * (len(columns) + 2) + "|"]
    for row in sorted(record["cells"], key=_place):
        cells = [row["method"], row["asked"], f"{row['tokens']} x {row['batch_size']}"]
        if "refused" in row:
            cells += ["n/a"] * 4 + [row["refused"].replace("|", "/")]
        else:
            low, high = row["interval"]
            cells += [f"{1e3 * float(np.median(row[side])):.1f}" for side in ("official", "ours")]
            cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", row["equal"]]
        lines.append(f"| {' | '.join([*cells, row['note']])} |")
    return lines


def _place(row: Mapping[str, Any]) -> tuple[int, int, int, int]:
    codes = CODES[row["part"]]
    method = row["method"]
    return METHODS.index(method), [*codes[method].asked].index(row["asked"]), row["tokens"], row["batch_size"]


class Arguments(argparse.Namespace):
    """Parsed arguments."""

    code: Path
    tokens: list[int]
    batch_sizes: list[int]
    only: list[str]
    rounds: int
    threads: int
    json: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, metavar="FOLDER", help="of the checkouts")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[576, 2304], metavar="N", help="for selectors, squares"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="B", help="for reducers")
    parser.add_argument("--only", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD", help="some methods")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rows are kept there")
    arguments = parser.parse_args(argv, Arguments())
    return run_command("benchmark_official", lambda: run(arguments))


def run(arguments: Arguments) -> None:
    """Measure the rows that are missing and print the table of all."""
    rounds = check_count("--rounds", arguments.rounds, 1)
    tokens = [check_count("--tokens", number, 1) for number in arguments.tokens]
    for number in tokens:
        if math.isqrt(number) ** 2 != number or number % 4:
            raise ValueError(f"--tokens must be squares of even numbers, so that videos divide them, got {number}")
    if not arguments.code.is_dir():
        raise ValueError(f"--code must be the folder of the checkouts, got {plain(arguments.code)}, which is none")
    torch.set_num_threads(check_count("--threads", arguments.threads, 1))
    keep_freed_memory()
    conditions: dict[str, Json] = {"rounds": rounds, "threads": arguments.threads, "torch": torch.__version__}
    kept = KeptCells(arguments.json, KIND, conditions, machine("cpu"))
    wanted = [case for case in cases(tokens, arguments.batch_sizes) if case.key["method"] in arguments.only]
    again = [case.key for case in wanted]
    kept.cells = [row for row in kept.cells if "refused" not in row or not any(row.items() >= k.items() for k in again)]
    for case in wanted:
        if not kept.has(**case.key):
            row = measure(case, arguments.code, rounds)
            kept.keep(row)
            found = row.get("refused") or f"{row['ratio']:.2f}, {row['equal']}"
            print(*case.key.values(), found, sep=", ", flush=True)
    print("\n".join(table(kept.record())))


if __name__ == "__main__":
    sys.exit(main())
