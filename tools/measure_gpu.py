"""All that wants a GPU, in one command and within a given time: methods, kernels for packed batches, a training.

    python tools/measure_gpu.py --minutes 8 --out DIR
    python tools/measure_gpu.py --dry-run --out DIR  # the same steps on a CPU, with small models

The dense model and every method on it run in bfloat16, interleaved with the ideal of each (``effvit.measure.ideal``):
eager, as CUDA graphs, compiled. After each step ``steps.json`` holds what it found, or the error that ended it, and the
steps that are left; ``profiles.json`` holds the records, which ``effvit report`` draws. A step begins only if half of
its seconds are left, so a later one that needs fewer may still find time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import NamedTuple, TypeAlias

import timm
import torch
from benchmark_architectures import PAIRS, Pair, model_pair
from gpu_steps import (
    Bench,
    Host,
    compare_biases,
    compare_kernels,
    compare_methods,
    compare_pair,
    count_kernels,
    message_of,
)
from gpu_training import train_nano

from effvit.measure.json_files import write_json
from effvit.measure.profiler import machine
from effvit.measure.tune import OutOfTime
from effvit.messages import run_command
from effvit.protocols import Json

__all__ = ["Step", "main", "plan", "run_steps"]

DEIT_S = Host("DeiT-S 224", "deit_small_patch16_224", 224)
VIT_B = Host("ViT-B 224", "vit_base_patch16_224", 224)
VIT_L = Host("ViT-L 224", "vit_large_patch16_224", 224)
DINOV3_L = Host("DINOv3-L 224", "vit_large_patch16_dinov3", 224)
HOSTS = (DEIT_S, VIT_B, VIT_L, DINOV3_L)
LARGE_IMAGES = tuple(host._replace(label=host.label.replace("224", "1024"), size=1024) for host in HOSTS)
BATCHES = (128, 1, 32)
LARGE_BATCH = 8  # of images of 1024 px
SECONDS = {"eager": 25.0, "CUDA graphs": 20.0, "compiled": 90.0}  # of a step
LARGE_SECONDS = {"eager": 45.0, "CUDA graphs": 40.0, "compiled": 120.0}
SWIN = PAIRS["STViT-R-Swin-S dense"]
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 2, 4)}

Measure: TypeAlias = Callable[[Bench], "dict[str, Json]"]


class Step(NamedTuple):
    """A measurement with a result of its own.

    Attributes:
        name: What it is called.
        seconds: That measuring should take, beside making the models.
        kind: What steps have in common that differ in sizes alone, of which a dry run tries the first.
        measure: What measures.
    """

    name: str
    kind: str
    seconds: float
    measure: Measure


def methods_step(host: Host, batch_size: int, mode: str) -> Step:
    """All methods on one host."""
    seconds = (LARGE_SECONDS if host in LARGE_IMAGES else SECONDS)[mode]

    def measure(bench: Bench) -> dict[str, Json]:
        return compare_methods(bench, host, min(batch_size, 4) if bench.dry else batch_size, mode)

    kind = f"methods on {host.label.split('-')[0]}, {mode}".replace("DeiT", "ViT")
    return Step(f"{host.label}, batch {batch_size}, {mode}", kind, seconds, measure)


def swin_step(batch_size: int, mode: str) -> Step:
    """STViT-R on Swin-S against timm's Swin-S, at 800 x 1280."""

    def measure(bench: Bench) -> dict[str, Json]:
        pair = small_swin() if bench.dry else SWIN
        makers = {"Swin-S": pair.baseline, "STViT-R-Swin-S": pair.own}
        return compare_pair(bench, makers, pair.input_size, 1 if bench.dry else batch_size, mode)

    return Step(f"STViT-R-Swin-S dense, batch {batch_size}, {mode}", f"Swin, {mode}", SECONDS[mode], measure)


def small_swin() -> Pair:
    """The same pair, small."""
    dense, own, size = "swin_small_patch4_window7_224", "stvit_r_swin_small_patch4_window7_dense", (64, 96)
    pair = model_pair(dense, own, size, 1, **SMALL_SWIN)
    return pair._replace(baseline=lambda: timm.create_model(dense, img_size=size, **SMALL_SWIN))


def kernels_step(host: Host, batch_size: int) -> Step:
    """Padded against packed batches."""

    def measure(bench: Bench) -> dict[str, Json]:
        return compare_kernels(bench, host, 4 if bench.dry else batch_size)

    return Step(f"padded against packed, {host.label}, batch {batch_size}", "kernels", 20.0, measure)


def biases_step(host: Host, batch_size: int) -> Step:
    """Key biases as a mask or as features."""

    def measure(bench: Bench) -> dict[str, Json]:
        return compare_biases(bench, host, 2 if bench.dry else batch_size)

    return Step(f"key biases, {host.label}, batch {batch_size}", "biases", 20.0, measure)


def counting_step(host: Host, batch_size: int) -> Step:
    """Kernels of all methods."""

    def measure(bench: Bench) -> dict[str, Json]:
        return count_kernels(bench, host, 2 if bench.dry else batch_size)

    return Step(f"kernels executed, {host.label}, batch {batch_size}", "counts", 20.0, measure)


def training_step() -> Step:
    """A short training of vit_nano."""

    def measure(bench: Bench) -> dict[str, Json]:
        return train_nano(bench, 8 if bench.dry else 256, 2 if bench.dry else 150)

    return Step("training of vit_nano", "training", 45.0, measure)


def plan() -> list[Step]:
    """The steps, the most wanted first."""
    wanted = [
        *(methods_step(DEIT_S, batch, mode) for batch in (128, 1) for mode in ("eager", "CUDA graphs")),
        *(methods_step(VIT_L, 128, mode) for mode in ("eager", "CUDA graphs")),
        *(methods_step(LARGE_IMAGES[HOSTS.index(host)], LARGE_BATCH, "eager") for host in (VIT_L, DINOV3_L)),
        swin_step(8, "eager"),
        kernels_step(DEIT_S, 128),
        biases_step(LARGE_IMAGES[HOSTS.index(VIT_L)], LARGE_BATCH),
        methods_step(DEIT_S, 128, "compiled"),
        training_step(),
        counting_step(DEIT_S, 128),
    ]
    rest = [
        kernels_step(VIT_L, 128),
        biases_step(VIT_L, 128),
        *(methods_step(host, batch, mode) for mode in SECONDS for batch in BATCHES for host in HOSTS),
        *(methods_step(host, LARGE_BATCH, mode) for mode in SECONDS for host in LARGE_IMAGES),
        *(swin_step(batch, mode) for batch in (8, 1) for mode in SECONDS),
    ]
    return first_of_each(wanted + rest, lambda step: step.name)


def first_of_each(steps: Sequence[Step], label: Callable[[Step], str]) -> list[Step]:
    """The steps without those whose label another has before."""
    found: dict[str, Step] = {}
    for step in steps:
        found.setdefault(label(step), step)
    return list(found.values())


def run_steps(steps: Sequence[Step], bench: Bench, out: Path, tell: Callable[[str], None] = print) -> None:
    """Run the steps as far as the time goes, and write the files after each.

    Args:
        steps: In the order in which they are wanted.
        bench: Where and how long.
        out: Folder for the files.
        tell: Called with a line about each step.
    """
    about: dict[str, Json] = {
        "machine": machine(bench.device.type),
        "cuda": cuda_facts() if bench.device.type == "cuda" else None,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "dry_run": bench.dry,
    }
    done: list[Json] = []
    left: dict[str, Json] = {step.name: "not reached" for step in steps}

    def write() -> None:
        records: list[Json] = [step["record"] for step in done if isinstance(step, dict) and "record" in step]
        write_json(out / "steps.json", {**about, "steps": done, "left": left})
        write_json(out / "profiles.json", records)

    write()
    for step in steps:
        begin = monotonic()
        if bench.end - begin < step.seconds / 2:
            left[step.name] = f"{max(0.0, bench.end - begin):.0f} s were left, and it takes about {step.seconds:.0f}"
            continue
        bench.seconds = step.seconds
        try:
            found = measured(step, bench)
        except OutOfTime:
            left[step.name] = "the time ended in it"
            continue
        del left[step.name]
        done.append({"name": step.name, "seconds": monotonic() - begin, **found})
        write()
        tell(f"{step.name}: {found.get('error', 'done')} ({monotonic() - begin:.0f} s)")
    write()
    tell(f"{len(left)} steps were left: {', '.join(left) or 'none'}")


def measured(step: Step, bench: Bench) -> dict[str, Json]:
    """What the step found, or its error; ``OutOfTime`` goes through."""
    try:
        found = step.measure(bench)
        json.dumps(found, allow_nan=False)  # an output that is not finite is an error of this step alone
        return found
    except OutOfTime:
        raise
    except Exception as error:  # whatever one step meets, the next ones go on
        return {"error": message_of(error)}
    finally:
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def cuda_facts() -> dict[str, Json]:
    """What tells one CUDA device from others."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "version": torch.version.cuda,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 2 after an error the caller can mend."""
    begin = monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="to stop in (default: 8)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for steps.json, profiles.json")
    parser.add_argument("--only", default="", help="run the steps whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="small models on a CPU, nothing compiled")
    args = parser.parse_args(argv)
    return run_command("measure_gpu", partial(measure_all, args, begin))


def measure_all(args: argparse.Namespace, begin: float) -> None:
    """Run the plan from a time of ``time.monotonic`` on."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes}")
    if not (args.dry_run or torch.cuda.is_available()):
        raise ValueError("torch finds no CUDA device here; --dry-run tries the steps on a CPU")
    steps = [step for step in plan() if args.only.lower() in step.name.lower()]
    if not steps:
        raise ValueError(f"no step has {args.only!r} in its name; they are {'; '.join(step.name for step in plan())}")
    device = torch.device("cpu" if args.dry_run else "cuda")
    bench = Bench(device, torch.bfloat16, args.dry_run, begin + 60 * args.minutes)
    if args.dry_run:
        steps = first_of_each(steps, lambda step: step.kind)
        bench.rounds = (1, 1)
    torch.compiler.set_stance("force_eager" if args.dry_run else "default")
    try:
        run_steps(steps, bench, args.out)
    finally:
        torch.compiler.set_stance("default")


if __name__ == "__main__":
    sys.exit(main())
