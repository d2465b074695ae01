"""Time and memory of a reduced SAM and a reduced tower, beside what their multiply-adds promise.

Each host runs beside its reduced forms, in interleaved rounds on one batch: timm's own, the same with a method that
reduces nothing, which must not cost time, and methods that leave about a third of the tokens (ToMe in windows, which
merges pairs, half). ``ratio`` is the time over timm's, the median of the rounds with its bootstrap 95 % interval;
``share`` is the time saved over the multiply-adds saved, both as shares of timm's.

    python tools/benchmark_hosts.py --json docs/benchmarks/hosts_cpu.json
    python tools/benchmark_hosts.py --size 256 --depth 2 --rounds 3      # a trial in seconds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from torch import nn

import effvit
from effvit.measure.ideal import plain_parts
from effvit.measure.profiler import Measurement, machine, median_ratio, profile_models
from effvit.protocols import Settings
from effvit.reducers import METHODS

__all__ = ["main", "models_of", "row", "table"]

NOTHING = "nothing reduced"


class Reduction(NamedTuple):
    """A method and its settings; ``of_all`` counts ``r`` over all blocks, as a share of the patches."""

    method: str
    settings: Settings
    of_all: float | None = None


HOSTS: dict[str, tuple[Reduction, ...]] = {
    "samvit_base_patch16": (
        Reduction("expedite", {"cluster_at": 0, "num_clusters": 64}),  # of the 196 tokens of a window
        Reduction("tome", {"r": 98}),
    ),
    "qwen3_vit_88m": (
        Reduction("expedite", {"cluster_at": 0, "keep_rate": 1 / 3}),
        Reduction("tome", {}, of_all=2 / 3),
    ),
}
SIZE = 1024  # pixels a side: 64 x 64 patches


def models_of(name: str, size: int, depth: int | None) -> dict[str, nn.Module]:
    """timm's host, the same with nothing reduced, and its reduced forms, sharing random weights."""
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    dense = timm.create_model(name, img_size=size, **options).eval()
    first = HOSTS[name][0].method
    models = {"timm": dense, NOTHING: effvit.sparsify(dense, first, **METHODS[first].off())}
    for reduction in HOSTS[name]:
        settings = dict(reduction.settings)
        if reduction.of_all is not None:
            parts = plain_parts(dense)
            settings["r"] = round(reduction.of_all * parts.patch_embed.num_patches / len(parts.blocks))
        models[reduction.method] = effvit.sparsify(dense, reduction.method, **settings)
    return models


def row(name: str, own: Measurement, dense: Measurement, macs: int, dense_macs: int) -> dict[str, Any]:
    """What a model of a host came to beside timm's."""
    ratio, interval = median_ratio(own.seconds, dense.seconds)
    promised = 1 - macs / dense_macs
    return {
        "host": name,
        "model": own.name,
        "ratio": ratio,
        "interval": interval,
        "macs": macs,
        "dense_macs": dense_macs,
        "share": (1 - ratio) / promised if promised > 0 else None,
        "peak_memory": own.peak_memory,
        "dense_peak_memory": dense.peak_memory,
        "seconds": own.seconds,
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what ``--json`` wrote; all ratios are to timm's model."""
    columns = ("host", "model", "MACs", "time", "95 % interval", "saved, of what MACs promise", "peak memory (MiB)")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for found in record["results"]:
        low, high = found["interval"]
        share = "-" if found["share"] is None else f"{found['share']:.2f}"
        memory = f"{found['peak_memory'] / 2**20:.0f} of {found['dense_peak_memory'] / 2**20:.0f}"
        cells = [found["host"], found["model"], f"{found['macs'] / found['dense_macs']:.2f}", f"{found['ratio']:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{low:.3f} to {high:.3f}', share, memory])} |")
    return lines


def run(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one host, timm's own left out."""
    models = models_of(name, args.size, args.depth)
    size = (3, args.size, args.size)
    dense, *others = profile_models(models, size, args.batch_size, rounds=args.rounds, threads=args.threads)
    macs = {key: effvit.count_flops(model, size).total for key, model in models.items()}
    return [row(name, own, dense, macs[own.name], macs["timm"]) for own in others]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each model, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS), metavar="NAME")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    parser.add_argument("--depth", type=int, help="cut the hosts to so many blocks, for a trial")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures, machine and versions here")
    args = parser.parse_args(argv)
    rows = []
    for name in args.hosts:
        for found in run(name, args):
            rows.append(found)
            low, high = found["interval"]
            share = "" if found["share"] is None else f", {found['share']:.2f} of what the multiply-adds promise"
            Console().print(
                f"{name}, {found['model']}: {found['ratio']:.3f} of timm's time ({low:.3f} to {high:.3f}){share}; "
                f"{found['peak_memory'] / 2**20:.0f} MiB beside {found['dense_peak_memory'] / 2**20:.0f}",
                soft_wrap=True,
            )
    if args.json:
        conditions = {name: getattr(args, name) for name in ("size", "depth", "rounds", "batch_size", "threads")}
        record = {"machine": machine("cpu"), "conditions": conditions, "results": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
