"""How close each method comes to its own ideal: the dense blocks on exactly the reduced token counts.

The efficiency of a method is its speed over that of the ideal (``effvit.measure.ideal``); what it lacks of 1 is the
overhead. All models run interleaved, each once a round in random order; a figure is the median over the rounds of the
ratio within a round, with its bootstrap 95 % interval.

    python tools/benchmark_overhead.py --rounds 40 --json overhead.json
    python tools/benchmark_overhead.py --img-size 1024 --batch-size 1 --rounds 5
    python tools/benchmark_overhead.py --images pictures --only dymu
    python tools/benchmark_overhead.py --training --rounds 10
    python tools/benchmark_overhead.py --device cuda --dtype bfloat16 --batch-size 128
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import effvit
from effvit.data.preparation import data_config, load_images
from effvit.hosts.calibration import needs_calibration
from effvit.measure.ideal import IdealViT, entering_counts, mean_counts
from effvit.measure.profiler import Measurement, machine, median_ratio, noise, profile_models
from effvit.reducers.ragged import RAGGED
from effvit.show.pictures import fashion_pictures, photographs

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "EViT 0.7": ("evit", {"keep_rate": 0.7}),
    "EViT 0.5": ("evit", {"keep_rate": 0.5}),
    "ToMe r 8": ("tome", {"r": 8}),
    "ToMe r 13": ("tome", {"r": 13}),
    "Zero-TPrune": ("zero_tprune", {}),
    "GTP 8": ("gtp", {"num_prop": 8}),
    "Expedite": ("expedite", {}),
    "HoT": ("hot", {}),
    "PiToMe 0.9": ("pitome", {"keep_rate": 0.9}),
    "MCTF 16": ("mctf", {"r": 16}),
    "vid-TLDR 8": ("vid_tldr", {"r": 8}),
    "DiffRate 2.9": ("diffrate", {}),
    "CubistMerge": ("cubistmerge", {}),
    "DynamicViT 0.7": ("dynamicvit", {"keep_rate": 0.7}),
    "DPC-KNN 0.7": ("dpcknn", {"keep_rate": 0.7}),
    "K-Medoids 0.7": ("kmedoids", {"keep_rate": 0.7}),
    "ATC 0.7": ("atc", {"keep_rate": 0.7}),
    "Sinkhorn": ("sinkhorn", {}),
    "PatchMerger": ("patchmerger", {}),
    "random 0.7": ("random", {"keep_rate": 0.7}),
    "uniform 0.7": ("uniform", {"keep_rate": 0.7}),
    "radial 0.7": ("radial", {"keep_rate": 0.7}),
    "ALGM 0.9": ("algm", {"threshold": 0.9}),
    **{f"ATS {ragged}": ("ats", {"ragged": ragged}) for ragged in RAGGED},
    **{f"DyMU {ragged}": ("dymu", {"ragged": ragged}) for ragged in RAGGED},
}


def pictures(model: nn.Module, batch_size: int) -> Tensor:
    """Pictures of different content, for a model of grey ones those of Fashion-MNIST: as often as the batch needs."""
    grey = data_config(model)["input_size"][0] == 1
    found = [p.image for p in fashion_pictures().values()] if grey else list(photographs().values())
    images = load_images(model, found)
    return images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size]


class TrainingStep(nn.Module):
    """Runs a model forwards and backwards, and keeps no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            scores: Tensor = self.model(images)
            scores.square().mean().backward()
        self.model.zero_grad(set_to_none=True)
        return scores.detach()


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what ``--json`` wrote; memory is that of the dense model."""
    columns = ("method", "tokens left", "speed-up", "ideal speed-up", "memory", "efficiency", "95 % interval")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in record["results"]:
        low, high = row["interval"]
        figures = (row["speedup"], row["ideal_speedup"], row["memory"])
        cells = [row["name"], str(row["counts"][-1]), *(f"{figure:.2f}" for figure in figures)]
        cells += [f"{row['efficiency']:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sharpen(dense: nn.Module, factor: float) -> None:
    """Multiply the query weights, so that random attention is uneven enough for ATS to adapt to the image."""
    with torch.no_grad():
        for block in dense.blocks:
            width = block.attn.qkv.weight.shape[1]
            block.attn.qkv.weight[:width] *= factor


def measure(
    console: Console, models: Mapping[str, nn.Module], images: Tensor, rounds: int, **options: Any
) -> list[Measurement]:
    """``profile_models`` on images (B, 3, H, W), with a progress bar."""
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(models) * (rounds + 2))
        return profile_models(
            models,
            tuple(images.shape[1:]),
            len(images),
            rounds=rounds,
            images=images,
            on_run=lambda _: progress.advance(task),
            **options,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name of a plain ViT")
    parser.add_argument("--img-size", type=int, metavar="SIDE", help="of square images; default: the model's")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40, help="10 give about +-7 %%, 20 +-5 %%")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sharpen", type=float, default=12.0, help="factor on the query weights")
    parser.add_argument(
        "--images", default="noise", choices=("noise", "pictures"), help="pictures differ in how many tokens they need"
    )
    parser.add_argument("--compile", action="store_true", help="run every model through effvit.compile")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="let glibc return freed memory to the system, as it does by itself",
    )
    parser.add_argument("--training", action="store_true", help="run forwards and backwards")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="run what has one of these in its name",
    )
    parser.add_argument("--json", type=Path, help="write figures, samples, machine and versions here")
    args = parser.parse_args()

    console = Console()
    torch.manual_seed(0)
    size_options = {} if args.img_size is None else {"img_size": args.img_size}
    dense = timm.create_model(args.model, **size_options).eval()
    sharpen(dense, args.sharpen)
    channels, *own_size = data_config(dense)["input_size"]
    size = (channels, *([args.img_size] * 2 if args.img_size else own_size))
    images = pictures(dense, args.batch_size) if args.images == "pictures" else noise(size, args.batch_size)
    models: dict[str, nn.Module] = {"dense": dense}
    counts: dict[str, list[int]] = {}
    for name, (method, settings) in CONFIGURATIONS.items():
        if any(text.lower() in name.lower() for text in args.only):
            model = effvit.sparsify(dense, method, **settings).eval()
            if needs_calibration(model):
                effvit.calibrate(model, [images])
            counts[name] = [round(count) for count in mean_counts(model, images)]
            models[name] = model
            models[f"ideal {name}"] = IdealViT(dense, counts[name], entering_counts(model, counts[name]))

    if args.training:
        models = {name: TrainingStep(model) for name, model in models.items()}
    options = {"threads": args.threads, "device": args.device, "compile": args.compile}
    options |= {"keep_memory": not args.default_allocator}
    measured = measure(console, models, images, args.rounds, dtype=getattr(torch, args.dtype), **options)
    by_name = {m.name: m for m in measured}

    step = ("compiled " if args.compile else "") + ("forward and backward" if args.training else "forward")
    sides = "x".join(map(str, size[1:]))
    conditions = (
        f"{step}, {sides}, {args.images}, batch {args.batch_size}, {args.dtype}, {args.device}, "
        f"{args.threads} thread(s)" + (", default allocator" if args.default_allocator else "")
    )
    table = Table(title=f"{args.model}, {conditions}")
    for column in (
        "method",
        "tokens left",
        "images/s",
        "speed-up",
        "ideal speed-up",
        "peak memory",
        "ideal memory",
        "efficiency",
        "95 % interval",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = []
    for name in counts:
        own, ideal = by_name[name], by_name[f"ideal {name}"]
        share, interval = median_ratio(ideal.seconds, own.seconds)
        memory = {key: m.peak_memory / measured[0].peak_memory for key, m in (("memory", own), ("ideal_memory", ideal))}
        speeds = {"speedup": own.speedup, "ideal_speedup": ideal.speedup}
        rows.append(
            {"name": name, "counts": counts[name], "efficiency": share, "interval": interval, **speeds, **memory}
        )
        table.add_row(
            name,
            str(counts[name][-1]),
            f"{own.images_per_second:.2f}",
            f"{own.speedup:.2f}",
            f"{ideal.speedup:.2f}",
            f"{memory['memory']:.2f}",
            f"{memory['ideal_memory']:.2f}",
            f"{share:.3f}",
            f"{interval[0]:.3f} to {interval[1]:.3f}",
        )
    console.print(table)
    if args.json:
        record = {
            "arguments": {key: str(value) for key, value in vars(args).items() if key != "json"},
            "machine": machine(args.device),
            "results": rows,
            "seconds": {m.name: m.seconds for m in measured},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
