"""What it costs to give a reduced model its full map back, for each fill.

The time one pass spends in recovery, over the rest of that pass: the blocks up to the last map of ``features_only``,
without classifier. Recovery is what remembers patches before they are dropped and what fills the map. A figure is the
median over the passes, with its bootstrap 95 % interval; both times are of one pass, so what else the machine does
stretches both.

    python tools/benchmark_recovery.py --rounds 20 --json docs/benchmarks/recovery_cpu.json
    python tools/benchmark_recovery.py --device cuda --dtype bfloat16 --scale 16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import Progress

from effvit.hosts import host as reduced_host
from effvit.measure.breakdown import now
from effvit.measure.profiler import keep_freed_memory, machine, median_interval, noise
from effvit.recover import FILLS
from effvit.tokens import TokenMap

__all__ = ["main", "recovery_shares", "table"]

HOSTS = {"deit_small_patch16_224": (224, 8), "vit_base_patch16_384": (384, 1)}  # name -> image size, batch size
METHODS: dict[str, dict[str, Any]] = {"evit": {"keep_rate": 0.7}, "tome": {"r": 13}, "ats": {}}
UNUSED = {("tome", "attention")}  # it drops no patch, and refuses what has nothing to do
RECOVERY = ((TokenMap, "remember"), (TokenMap, "refer"), (reduced_host, "to_grid"))  # all that recovers
WARM_UP = 2  # passes


@contextmanager
def timed_recovery() -> Iterator[list[float]]:
    """The seconds of every call that recovers, as they are made; the clock waits for the device."""
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = function(*args, **kwargs)
            seconds.append(now() - start)
            return result

        return run

    with ExitStack() as stack:
        for owner, name in RECOVERY:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield seconds


def recovery_shares(model: Any, batch: torch.Tensor, rounds: int) -> np.ndarray:
    """Time in recovery over that in the rest of a pass, (rounds,)."""
    shares = []
    with timed_recovery() as seconds, torch.inference_mode():
        for _ in range(rounds + WARM_UP):
            seconds.clear()
            start = now()
            model.forward_intermediates(batch, indices=1, intermediates_only=True)
            whole = now() - start
            shares.append(sum(seconds) / (whole - sum(seconds)))
    return np.array(shares[WARM_UP:])


def run(host: str, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Shares of the time of one host's models, a row for each method and fill."""
    size, batch_size = HOSTS[host]
    batch_size *= args.scale
    batch = noise((3, size, size), batch_size).to(args.device, getattr(torch, args.dtype))
    settings = [(method, fill) for method in METHODS for fill in FILLS if (method, fill) not in UNUSED]
    rows = []
    for method, fill in progress.track(settings, description=f"{host}, {size} px"):
        torch.manual_seed(0)
        model = (
            timm.create_model(f"{method}_{host}", recover=fill, **METHODS[method]).eval().to(batch.device, batch.dtype)
        )
        shares = recovery_shares(model, batch, args.rounds)
        row = {"host": host, "size": size, "batch_size": batch_size, "method": method, "fill": fill}
        rows.append(row | {"share": float(np.median(shares)), "interval": median_interval(shares)})
    return rows


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: a row for each host and method, a column for each fill, in percent."""
    lines = [f"| host | method | {' | '.join(FILLS)} |", "|---|---|" + "---|" * len(FILLS)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["results"]:
        low, high = (100 * bound for bound in row["interval"])
        text = f"{100 * row['share']:.2f} ({low:.2f} to {high:.2f})"
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
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with Progress(console=Console(stderr=True)) as progress:
        results = [row for host in HOSTS for row in run(host, args, progress)]
    conditions = {"rounds": args.rounds, "threads": args.threads, "dtype": args.dtype, "device": args.device}
    record = {"machine": machine(args.device), "conditions": conditions, "results": results}
    print("\n".join(table(record)))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
