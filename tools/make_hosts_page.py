"""Write the table of docs/hosts.md: for every transformer of timm the names that take methods, and why others do not.

    python tools/check_hosts.py --json hosts.json   # minutes to an hour
    python tools/make_hosts_page.py hosts.json      # counts them into docs/benchmarks/hosts.json and writes the page
    python tools/make_hosts_page.py --check         # says whether the page is that of docs/benchmarks/hosts.json

A name counts as exact if no method differs from timm when it reduces nothing and all methods but the refused ones run,
and as refused if every method is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from marked_table import put_table, write_pages
from timm.models import list_modules

from effvit.hosts._unserved import UNSERVED

__all__ = ["counted", "main", "read_record", "result_of", "table"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/hosts.md"
RECORD = "docs/benchmarks/hosts.json"
TOOL = "make_hosts_page.py"


def result_of(methods: Mapping[str, Mapping[str, str]]) -> str:
    """ "exact", "wrong" or "refused: REASON" of one name, given the outcome of every check of every method."""
    outcomes = [outcome for checks in methods.values() for outcome in checks.values()]
    if any(outcome.startswith("wrong") for outcome in outcomes):
        return "wrong"
    if all(outcome.startswith("refused") for outcome in outcomes):
        return outcomes[0]
    return "exact"


def counted(checked: Mapping[str, Any]) -> dict[str, Any]:
    """What ``tools/check_hosts.py --json`` wrote, as numbers of names by module of timm.

    Returns:
        ``versions`` as they were, ``methods``, and in ``modules`` {module: {result: number of names}}.
    """
    hosts: Mapping[str, Mapping[str, Mapping[str, str]]] = checked["hosts"]
    modules: dict[str, dict[str, int]] = {}
    for module in sorted(list_modules()):
        results = Counter(result_of(hosts[name]) for name in timm.list_models(module=module) if name in hosts)
        if results:
            modules[module] = dict(results.most_common())
    return {"versions": checked["versions"], "methods": list(next(iter(hosts.values()))), "modules": modules}


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of the table: hosts first, then the families that are refused."""
    modules: Mapping[str, Mapping[str, int]] = record["modules"]
    lines = ["| `timm.models.` | names | exact | refused |", "|---|---:|---:|---|"]
    for module, results in modules.items():
        refused = [f"{number}: {why.removeprefix('refused: ')}" for why, number in results.items() if why != "exact"]
        lines.append(f"| `{module}` | {sum(results.values())} | {results.get('exact', 0)} | {'; '.join(refused)} |")
    total = sum(sum(results.values()) for results in modules.values())
    exact = sum(results.get("exact", 0) for results in modules.values())
    lines.append(f"| all of these | {total} | {exact} | {total - exact} |")
    for module in sorted(UNSERVED):
        lines.append(f"| `{module}` | {len(timm.list_models(module=module))} | 0 | {UNSERVED[module]} |")
    return lines


def read_record() -> dict[str, Any]:
    """What ``counted`` gave when the page was made."""
    record: dict[str, Any] = json.loads((ROOT / RECORD).read_text())
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the table of docs/hosts.md.")
    parser.add_argument("checked", nargs="?", type=Path, help="what tools/check_hosts.py --json wrote")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    arguments = parser.parse_args(argv)
    if arguments.checked is not None and not arguments.check:
        record = counted(json.loads(arguments.checked.read_text()))
        (ROOT / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    record = read_record()
    text = put_table((ROOT / PAGE).read_text(), PAGE, "hosts", TOOL, table(record))
    return write_pages({PAGE: text}, ROOT, TOOL, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
