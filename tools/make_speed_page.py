"""Write the tables of docs/speed.md and a short one in README.md from what tools/benchmark_overhead.py measured.

python tools/make_speed_page.py           # after benchmark_overhead.py --json of the records
python tools/make_speed_page.py --check   # name what is stale, exit with 1 if anything is
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmark_overhead import table
from marked_table import put_table, write_pages

from effvit.messages import run_command

__all__ = ["TABLES", "main", "pages"]

ROOT = Path(__file__).resolve().parents[1]
TOOL = "make_speed_page.py"
TABLES = {  # page: name of the table, record in docs/benchmarks
    "README.md": {"short overhead": "overhead_cpu.json"},
    "docs/speed.md": {
        "overhead": "overhead_cpu.json",
        "single image": "overhead_single_cpu.json",
        "batch 32": "overhead_batch32_cpu.json",
        "512 px": "overhead_512px_cpu.json",
        "1024 px": "overhead_1024px_cpu.json",
        "training": "overhead_training_cpu.json",
        "compiled": "overhead_compiled_cpu.json",
        "default allocator": "overhead_default_allocator_cpu.json",
        "photographs": "overhead_photographs_cpu.json",
        "small images": "overhead_fashion_mnist_cpu.json",
    },
}
# What README.md shows of its table.
SHORT_ROWS = (
    *("EViT 0.7", "EViT 0.5", "ToMe r 8", "ToMe r 13", "GTP 8", "Zero-TPrune", "Expedite", "HoT"),
    *("ATS auto", "DyMU auto"),
)
SHORT_COLUMNS = ("method", "tokens left", "speed-up", "efficiency")


def short_table(lines: Sequence[str]) -> list[str]:
    """Those rows and columns of a Markdown table.

    Raises:
        ValueError: A row that it does not have.
    """
    heads, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    named = {row[0]: row for row in rows}
    if missing := [name for name in SHORT_ROWS if name not in named]:
        raise ValueError(f"README.md shows {missing[0]!r}, but the record has no such row: {', '.join(named)}")
    places = [heads.index(column) for column in SHORT_COLUMNS]
    kept = [heads, rule, *(named[name] for name in SHORT_ROWS)]
    return [f"| {' | '.join(row[place] for place in places)} |" for row in kept]


def pages() -> dict[str, str]:
    """The pages with their tables made anew; raises ValueError if a mark is missing."""
    made = {}
    for page, records in TABLES.items():
        text = (ROOT / page).read_text()
        for name, record in records.items():
            lines = table(json.loads((ROOT / "docs/benchmarks" / record).read_text()))
            if name.startswith("short "):
                lines = short_table(lines)
            text = put_table(text, page, name, TOOL, lines)
        made[page] = text
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages; returns 1 if one is stale, 2 after records that cannot be read."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that are stale")
    arguments = parser.parse_args(argv)
    return run_command(TOOL.removesuffix(".py"), lambda: write_pages(pages(), ROOT, TOOL, arguments.check))


if __name__ == "__main__":
    sys.exit(main())
