"""Measure again, in a process of its own, what `effvit tune` found, beside the other schedules that reach its aim.

    effvit tune vit_nano_patch4_28 'fashion_mnist:*' --pretrained --speedup 1.5 --batch-size 60 --threads 1 \
      --json tuned.json
    python tools/check_tune.py tuned.json 'fashion_mnist:*' --pretrained --json docs/benchmarks/tune_cpu.json

Of each method and place of its reduction the setting with the least divergence is taken, on a ladder or block by block;
EViT without "reduce_at" reduces at the blocks of its paper. With --json the record is added to the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from effvit.data.preparation import load_images
from effvit.measure.profiler import machine, profile_models
from effvit.measure.records import add_record, as_object, read_tuning
from effvit.measure.values import Candidate, Tuning
from effvit.measure.variants import build, reduced
from effvit.messages import plain, run_command
from effvit.show.pictures import open_images
from effvit.show.tables import settings_text

__all__ = ["contenders", "main", "table"]


def contenders(tuned: Tuning) -> list[Candidate]:
    """The best setting and, of every other method and place, the nearest to the dense model that reached the aim."""
    aim = tuned.target["speedup"] or 0
    nearest = {} if tuned.best is None else {_place(tuned.best): tuned.best}
    for candidate in sorted(tuned.tried, key=lambda c: c.fidelity.divergence):
        if candidate.speedup >= aim:
            nearest.setdefault(_place(candidate), candidate)
    return list(nearest.values())


def _place(candidate: Candidate) -> tuple[str, bool]:
    """Its method, and whether that reduces elsewhere than by its default."""
    return candidate.method, "reduce_at" in candidate.settings


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: what was found, then, measured again, all that reach the aim; the best in bold."""
    lines = [
        "| model | asked for | method | settings | divergence | speed-up measured again |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        for rank, row in enumerate(record["results"]):
            method = row["method"] if rank else f"**{row['method']}**"
            low, high = row["again"]["interval"]
            lines.append(
                f"| {record['host']} | {record['target']['speedup']:.2f} | {method} | "
                f"{settings_text(row['settings'])} | {row['fidelity']['divergence']:.3g} | "
                f"{row['again']['speedup']:.2f} ({low:.2f} to {high:.2f}) |"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", type=Path, help="file that `effvit tune --speedup --json` wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="as given to `effvit tune`")
    parser.add_argument("--pretrained", action="store_true", help="as given to `effvit tune`")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="add the record, with machine and versions, to this file")
    args = parser.parse_args(argv)
    return run_command("check_tune", lambda: check(args))


def check(args: argparse.Namespace) -> None:
    """Measure the contenders of a tuning again, print their table and write their record."""
    tuned = read_tuning(args.tuned)
    if tuned.host is None or tuned.target.get("speedup") is None:
        raise ValueError(f"{plain(args.tuned)} is not the result of `effvit tune --speedup`")
    if tuned.best is None:
        raise ValueError(f"{plain(args.tuned)} names no best setting to measure again; give the file of another search")
    torch.manual_seed(0)  # as the command line does
    conditions = tuned.conditions
    dense = build(tuned.host, {"img_size": list(conditions.input_size[1:])}, args.pretrained).eval()
    rows = contenders(tuned)
    models = {"dense": dense, **reduced(dense, [(row.method, row.settings) for row in rows])}
    device = conditions.device
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(models) * (args.rounds + 2))
        measured = profile_models(
            models,
            conditions.input_size,
            conditions.batch_size,
            images=load_images(dense, list(open_images(args.images).values())),
            rounds=args.rounds,
            threads=conditions.threads,
            device=device,
            dtype=getattr(torch, conditions.dtype),
            on_run=lambda _: progress.advance(task),
        )
    results = [
        {**as_object(row), "again": {"speedup": speed.speedup, "interval": speed.interval, "rounds": args.rounds}}
        for row, speed in zip(rows, measured[1:], strict=True)
    ]
    found = as_object(tuned)
    record = {"kind": "tune_check"} | {key: found[key] for key in ("host", "target", "conditions")}
    record |= {"pretrained": args.pretrained, "images": args.images, "machine": machine(device), "results": results}
    print("\n".join(table([record])))
    if args.json:
        add_record(args.json, record)


if __name__ == "__main__":
    sys.exit(main())
