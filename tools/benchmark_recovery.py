"""What it costs to give a reduced model its full map back, for each fill.

The time of one map of the last block (``features_only``) over that of the same blocks alone, both without
classifier, run interleaved; a figure is the median over the rounds of the ratio within a round less one, with its
bootstrap 95 % interval.

    python tools/benchmark_recovery.py --rounds 40 --json docs/benchmarks/recovery_cpu.json
    python tools/benchmark_recovery.py --device cuda --dtype bfloat16 --scale 16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from effvit.profiler import machine, median_interval, profile_models
from effvit.recover import FILLS

__all__ = ["main", "table"]

HOSTS = {"deit_small_patch16_224": (224, 8), "vit_base_patch16_384": (384, 1)}  # name -> image size, batch size
METHODS: dict[str, dict[str, Any]] = {"evit": {"keep_rate": 0.7}, "tome": {"r": 13}, "ats": {}}
UNUSED = {("tome", "attention")}  # it drops no patch, and refuses what has nothing to do


class Blocks(nn.Module):
    """The tokens a model leaves, without its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model._forward_blocks(x)[0].x


class Map(nn.Module):
    """The full map of the last block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_intermediates(x, indices=1, intermediates_only=True)[0]


def run(host: str, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Shares of the time of one host's models, a row for each method and fill."""
    size, batch_size = HOSTS[host]
    rows = []
    for method, settings in METHODS.items():
        fills = [fill for fill in FILLS if (method, fill) not in UNUSED]
        name = f"{method}_{host}"
        torch.manual_seed(0)
        reduced = {fill: timm.create_model(name, recover=fill, **settings).eval() for fill in fills}
        models: dict[str, nn.Module] = {"blocks": Blocks(reduced["zero"])}
        models |= {fill: Map(model) for fill, model in reduced.items()}
        task = progress.add_task(f"{name}, {size} px", total=len(models) * (args.rounds + 2))
        measured = profile_models(
            models,
            (3, size, size),
            batch_size * args.scale,
            rounds=args.rounds,
            threads=args.threads,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            on_run=lambda _, task=task: progress.advance(task),
        )
        blocks, *maps = (np.array(m.seconds) for m in measured)
        for fill, seconds in zip(fills, maps, strict=True):
            shares = seconds / blocks - 1
            row = {"host": host, "size": size, "batch_size": batch_size * args.scale, "method": method, "fill": fill}
            rows.append(row | {"share": float(np.median(shares)), "interval": median_interval(shares)})
    return rows


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: a row for each host and method, a column for each fill, in percent."""
    lines = [f"| host | method | {' | '.join(FILLS)} |", "|---|---|" + "---|" * len(FILLS)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["results"]:
        low, high = (100 * bound for bound in row["interval"])
        text = f"{100 * row['share']:.1f} ({low:.1f} to {high:.1f})"
        cells.setdefault((row["host"], row["method"]), {})[row["fill"]] = text
    for (host, method), texts in cells.items():
        lines.append(f"| {host} | {method} | {' | '.join(texts.get(fill, '') for fill in FILLS)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="factor on the batch sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, help="write the figures, machine and versions here")
    args = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        results = [row for host in HOSTS for row in run(host, args, progress)]
    conditions = {"rounds": args.rounds, "threads": args.threads, "dtype": args.dtype, "device": args.device}
    record = {"machine": machine(args.device), "conditions": conditions, "results": results}
    print("\n".join(table(record)))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
