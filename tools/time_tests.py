"""Seconds that the tests of each file take, as a table of docs/testing.md.

    make test PYTEST_ARGS="--junitxml=tests.xml"
    python tools/time_tests.py tests.xml

Seconds are those of the processes: run side by side, the whole takes as much less.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from marked_table import put_table

from effvit.messages import run_command

__all__ = ["main", "table"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "testing.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table; returns 2 after an error the caller can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="default: docs/testing.md")
    arguments = parser.parse_args(argv)
    return run_command("time_tests", lambda: write(arguments.record, arguments.page))


def write(record: Path, page: Path) -> None:
    """Put the table of the record between the marks of the page."""
    text = put_table(page.read_text(), page.name, "seconds", "time_tests.py", table(record.read_text()))
    page.write_text(text)


def table(record: str) -> list[str]:
    """Lines of the table: tests and seconds of each file, the slowest first.

    Args:
        record: Content of a file of ``pytest --junitxml``.

    Raises:
        ValueError: No such content, or without a test of a file.
    """
    number: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    try:
        cases = list(ElementTree.fromstring(record).iter("testcase"))
    except ElementTree.ParseError as error:
        raise ValueError(f"expected what pytest --junitxml wrote, got no XML: {error}") from None
    for case in cases:
        for part in case.get("classname", "").split("."):
            if part.startswith("test_"):  # of tests.test_tokens.TestKeep, the file
                number[part] += 1
                seconds[part] += float(case.get("time", "0"))
    if not number:
        raise ValueError("expected what pytest --junitxml wrote, but it tells of no test; run pytest on some")
    rows = [
        f"| `{name}.py` | {number[name]} | {seconds[name]:.1f} |"
        for name in sorted(seconds, key=lambda name: -seconds[name])
    ]
    whole = f"| all | {number.total()} | {sum(seconds.values()):.1f} |"
    return ["| file | tests | seconds |", "|---|---:|---:|", *rows, whole]


if __name__ == "__main__":
    sys.exit(main())
