"""Show the profiler a truth that is known: a twin, a known delay, and a model that does nothing.

The twin has the same weights in memory of its own, so the interval of its speed-up must contain 1; the delay waits a
given share of the model's time after each forward pass; the time reported for nothing is what the profiler itself adds.

    python tools/check_profiler.py --json docs/benchmarks/profiler_check_cpu.json
    python tools/check_profiler.py --device cuda --model vit_base_patch16_224 --batch-size 128
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from effvit.measure.profiler import Measurement, machine, median_interval, profile_models

__all__ = ["findings", "main", "table"]


class Delayed(nn.Module):
    """The model, ``seconds`` later."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.model = model
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        return y


def findings(model: Measurement, twin: Measurement, delayed: Measurement, nothing: Measurement) -> dict[str, Any]:
    """What the profiler says of each truth, from runs in the same rounds; times in seconds."""
    delays = np.array(delayed.seconds) - np.array(model.seconds)
    return {
        "twin_speedup": twin.speedup,
        "twin_interval": twin.interval,
        "delay": float(np.median(delays)),
        "delay_interval": median_interval(delays),
        "overhead": nothing.latency["p50"] / model.latency["p50"],
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what was put in and what was found."""
    found, seconds = record["findings"], record["conditions"]["inserted_delay"]
    (low, high), (shortest, longest) = found["twin_interval"], found["delay_interval"]
    found_delay = f"{1e3 * found['delay']:.1f} ms ({1e3 * shortest:.1f} to {1e3 * longest:.1f})"
    return [
        "| truth | measured, 95 % interval |",
        "|---|---|",
        f"| a second model with the same weights: speed-up 1 | {found['twin_speedup']:.3f} ({low:.3f} to {high:.3f}) |",
        f"| a delay of {1e3 * seconds:.1f} ms | {found_delay} |",
        f"| a model that does nothing: the profiler's own time | {found['overhead']:.3%} of the model's |",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--delay", type=float, default=0.1, help="of the delayed model, as a share of the model's time")
    parser.add_argument("--json", type=Path, help="write the findings, machine and versions here")
    args = parser.parse_args(argv)

    twins = []
    for _ in range(2):
        torch.manual_seed(0)
        twins.append(timm.create_model(args.model).eval())
    size = (3, *twins[0].patch_embed.img_size)
    conditions = {"batch_size": args.batch_size, "threads": args.threads, "device": args.device}
    (alone,) = profile_models({"model": twins[0]}, size, rounds=5, **conditions)
    seconds = args.delay * alone.latency["p50"]
    models = {"model": twins[0], "twin": twins[1], "delayed": Delayed(twins[0], seconds), "nothing": nn.Identity()}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(models) * (args.rounds + 2))
        measured = profile_models(
            models, size, rounds=args.rounds, on_run=lambda _: progress.advance(task), **conditions
        )
    found = findings(*measured)
    record = {
        "machine": machine(args.device),
        "conditions": {"model": args.model, "rounds": args.rounds, **conditions, "inserted_delay": seconds},
        "findings": found,
        "seconds": {m.name: m.seconds for m in measured},
    }
    print("\n".join(table(record)))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
