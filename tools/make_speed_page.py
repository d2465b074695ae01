"""Write the tables of docs/speed.md and the first of them in README.md from what tools/benchmark_overhead.py measured.

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
from marked_table import put_table

from effvit.messages import run_command

__all__ = ["TABLES", "main", "pages"]

ROOT = Path(__file__).resolve().parents[1]
TABLES = {  # page: name of the table, record in docs/benchmarks
    "README.md": {"overhead": "overhead_cpu.json"},
    "docs/speed.md": {
        "overhead": "overhead_cpu.json",
        "single image": "overhead_single_cpu.json",
        "1024 px": "overhead_1024px_cpu.json",
        "photographs": "overhead_photographs_cpu.json",
        "small images": "overhead_fashion_mnist_cpu.json",
    },
}


def pages() -> dict[Path, str]:
    """The pages with their tables made anew; raises ValueError if a mark is missing."""
    made = {}
    for page, records in TABLES.items():
        text = (ROOT / page).read_text()
        for name, record in records.items():
            lines = table(json.loads((ROOT / "docs/benchmarks" / record).read_text()))
            text = put_table(text, page, name, "make_speed_page.py", lines)
        made[ROOT / page] = text
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages; returns 1 if one is stale, 2 after records that cannot be read."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that are stale")
    arguments = parser.parse_args(argv)
    return run_command("make_speed_page", lambda: write(arguments.check))


def write(only_check: bool) -> int:
    """Write the pages, or name those that are stale; returns 1 if one is."""
    stale = {path: text for path, text in pages().items() if path.read_text() != text}
    for path, text in stale.items():
        if only_check:
            name = path.relative_to(ROOT)
            print(f"{name} is stale: run python tools/make_speed_page.py", file=sys.stderr)
        else:
            path.write_text(text)
    return int(only_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
