"""Write the table of docs/accuracy.md and its plot, docs/images/fashion_accuracy.svg, from the measured records.

python tools/make_accuracy_page.py           # after effvit evaluate --rounds 10 --json of the records
python tools/make_accuracy_page.py --check   # name what is stale, exit with 1 if anything is
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from marked_table import put_table

from effvit.measure.accuracy import shown_models
from effvit.measure.records import read_profiles
from effvit.measure.values import Record
from effvit.messages import run_command
from effvit.show.plots import plot_accuracy
from effvit.show.tables import mean_and_range

__all__ = ["main", "origin", "page", "table"]

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "docs/benchmarks/fashion_accuracy_cpu.json"
PAGE = "docs/accuracy.md"
PLOT = "docs/images/fashion_accuracy.svg"


def table(records: Sequence[Record]) -> list[str]:
    """Lines of a Markdown table of records; speed-ups refer to the first model of the same record."""
    lines = ["| model | top-1 (%) | MMACs | MAC ratio | speed-up | tokens left |", "|---|---|---|---|---|---|"]
    for cost, _, accuracies in shown_models(records):
        low, high = cost.interval
        cells = [
            cost.name,
            mean_and_range(accuracies),
            f"{cost.macs / 1e6:.1f}",
            f"{cost.mac_ratio:.2f}",
            f"{cost.speedup:.2f} ({low:.2f} to {high:.2f})",
            f"{cost.tokens[-1]:.1f}" if cost.tokens else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(text: str, records: Sequence[Record]) -> str:
    """The page with its table made anew; raises ValueError if a mark is missing."""
    return put_table(text, PAGE, "accuracy", "make_accuracy_page.py", ["", *table(records), ""])


def origin(records: Path) -> str:
    """What the plot says of where it is from; changes with the records."""
    return f"tools/make_accuracy_page.py, {RECORDS}, sha256 {hashlib.sha256(records.read_bytes()).hexdigest()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the two files; returns 1 if one is stale, 2 after records that cannot be read."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that are stale")
    arguments = parser.parse_args(argv)
    return run_command("make_accuracy_page", lambda: write_page(arguments.check))


def write_page(only_check: bool) -> int:
    """Write the two files, or name those that are stale; returns 1 if one is."""
    path, plot = ROOT / PAGE, ROOT / PLOT
    records = read_profiles(ROOT / RECORDS)
    text, source = page(path.read_text(), records), origin(ROOT / RECORDS)
    # Another matplotlib draws other bytes, so that a plot is stale when its records have changed.
    stale = [PAGE] if path.read_text() != text else []
    stale += [PLOT] if not plot.is_file() or source not in plot.read_text() else []
    if only_check:
        for name in stale:
            print(f"{name} is stale: run python tools/make_accuracy_page.py", file=sys.stderr)
        return int(bool(stale))
    path.write_text(text)
    dense = records[0].models[0]
    data = "" if dense.accuracy is None else dense.accuracy.data
    plot_accuracy(records, f"{dense.name}: {data}", plot, note=source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
