"""What the architectures gain over what they replace, measured in pairs that run interleaved.

Super-token attention against a plain formulation by im2col, and three models against the dense ones of their size.
A figure is the median over the rounds of the ratio within a round, with its bootstrap 95 % interval.

    python tools/benchmark_architectures.py --rounds 20 --json docs/benchmarks/architectures_cpu.json
    python tools/benchmark_architectures.py --device cuda --dtype bfloat16 --scale 16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import effvit  # noqa: F401  registers the names
from effvit.layers.super_tokens import SuperTokenAttention
from effvit.measure.flops import count_flops
from effvit.measure.profiler import machine, profile_models


def unfold_super_tokens(attn: SuperTokenAttention, x: Tensor) -> Tensor:
    """Super-token attention by im2col: what ``attn`` computes, with ``F.unfold`` and ``F.fold`` on (B, C, H, W) maps.

    Args:
        attn: Holds the weights and settings; cells larger than one pixel.
        x: (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    batch, dim, height, width = x.shape
    h, w = attn.cell
    padded = F.pad(x, (0, -width % w, 0, -height % h))
    rows, columns = padded.shape[2] // h, padded.shape[3] // w
    centres = F.adaptive_avg_pool2d(padded, (rows, columns))
    pixels = padded.reshape(batch, dim, rows, h, columns, w).permute(0, 2, 4, 3, 5, 1)
    pixels = pixels.reshape(batch, rows * columns, h * w, dim)

    def unfold(grid: Tensor) -> Tensor:  # (B, C, rows, columns) -> (B, n, C, 9)
        return F.unfold(grid, 3, padding=1).transpose(1, 2).reshape(batch, rows * columns, dim, 9)

    def fold(shares: Tensor) -> Tensor:  # (B, n, C', 9) -> (B, C', rows, columns)
        columned = shares.permute(0, 2, 3, 1).flatten(1, 2)
        return F.fold(columned, (rows, columns), 3, padding=1)

    def means(weights: Tensor) -> Tensor:
        mass = fold(weights.sum(2).unsqueeze(2))
        return fold(pixels.transpose(-1, -2) @ weights) / (mass + 1e-12)

    with torch.no_grad():
        weights = (pixels @ unfold(centres) * dim**-0.5).softmax(-1)
        for _ in range(attn.n_iter - 1):
            weights = (pixels @ unfold(means(weights)) * dim**-0.5).softmax(-1)
    tokens = means(weights)
    tokens = pointwise_attention(attn, tokens)
    out = unfold(tokens) @ weights.transpose(-1, -2)  # (B, n, C, p)
    out = out.reshape(batch, rows, columns, dim, h, w).permute(0, 3, 1, 4, 2, 5).reshape(padded.shape)
    return out[:, :, :height, :width]


def pointwise_attention(attn: SuperTokenAttention, x: Tensor) -> Tensor:
    """Self-attention of all pixels of x (B, C, H, W), its projections as 1 x 1 convolutions and no fused kernel."""
    refine = attn.refine
    qkv = F.conv2d(x, refine.qkv.weight[:, :, None, None], refine.qkv.bias)
    q, k, v = qkv.flatten(2).unflatten(1, (3, refine.num_heads, -1)).unbind(1)  # (B, heads, D, N)
    attention = (k.transpose(-1, -2) @ refine.q_norm(q) * refine.scale).softmax(-2)
    y = (v @ attention).reshape(x.shape)
    return F.conv2d(y, refine.proj.weight[:, :, None, None], refine.proj.bias)


class Unfolded(nn.Module):
    """``unfold_super_tokens`` as a module on (B, C, H, W) maps."""

    def __init__(self, attn: SuperTokenAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return unfold_super_tokens(self.attn, x)


class ChannelsLast(nn.Module):
    """The attention itself on a (B, C, H, W) map; the layout it works in is that of the whole model."""

    def __init__(self, attn: SuperTokenAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pair(NamedTuple):
    """A baseline, what is compared with it, the size of one input and how many of them are a batch on a CPU."""

    baseline: Callable[[], nn.Module]
    own: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    batch_size: int


def attention_pair(dim: int, num_heads: int, cell: int, side: int, batch_size: int) -> Pair:
    """Super-token attention of one stage against its plain formulation, on the same weights."""
    attn = SuperTokenAttention(dim, num_heads, (cell, cell)).eval()
    return Pair(lambda: Unfolded(attn), lambda: ChannelsLast(attn), (dim, side, side), batch_size)


def model_pair(dense: str, own: str, size: tuple[int, int], batch_size: int, **settings: Any) -> Pair:
    """A model against the dense one of its size."""
    dense_settings = {"img_size": size} if "swin" in dense else {}
    return Pair(
        lambda: timm.create_model(dense, **dense_settings),
        lambda: timm.create_model(own, **settings),
        (3, *size),
        batch_size,
    )


PAIRS: dict[str, Pair] = {
    "super-token attention, stage 1": attention_pair(64, 1, 8, 56, 4),
    "super-token attention, stage 2": attention_pair(128, 2, 4, 28, 4),
    "STViT-DeiT-S": model_pair("deit_small_patch16_224", "stvit_deit_small_patch16_224", (224, 224), 4),
    "LookupViT-B 5x5": model_pair(
        "vit_base_patch16_224", "lookupvit_base_patch16_224", (224, 224), 2, compressed_grid=5
    ),
    "STViT-R-Swin-S dense": model_pair(
        "swin_small_patch4_window7_224", "stvit_r_swin_small_patch4_window7_dense", (800, 1280), 1
    ),
}


def measure(pair: Pair, args: argparse.Namespace, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Speed of the pair and, for models, their multiply-adds."""
    models = {"baseline": pair.baseline().eval(), "own": pair.own().eval()}
    baseline, own = profile_models(
        models,
        pair.input_size,
        pair.batch_size * args.scale,
        rounds=args.rounds,
        threads=args.threads,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        on_run=on_run,
    )
    record: dict[str, Any] = {
        "input_size": pair.input_size,
        "batch_size": pair.batch_size * args.scale,
        "images_per_second": [baseline.images_per_second, own.images_per_second],
        "speedup": own.speedup,
        "interval": own.interval,
        "seconds": [baseline.seconds, own.seconds],
    }
    if pair.input_size[0] == 3:
        record["macs"] = [count_flops(model, pair.input_size).total for model in models.values()]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--scale", type=int, default=1, help="factor on the batch sizes")
    parser.add_argument("--only", default="", help="run the pairs whose name contains this")
    parser.add_argument("--json", type=Path, help="write figures, samples, machine and versions here")
    args = parser.parse_args()

    torch.manual_seed(0)
    pairs = {name: pair for name, pair in PAIRS.items() if args.only.lower() in name.lower()}
    console, results = Console(width=120), {}
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(pairs) * 2 * (args.rounds + 2))
        for name, pair in pairs.items():
            results[name] = measure(pair, args, lambda _: progress.advance(task))

    table = Table(title=f"{args.dtype}, {args.device}, {args.threads} thread(s), {args.rounds} rounds")
    for column in (
        "pair",
        "batch",
        "images/s before",
        "images/s",
        "speed-up",
        "95 % interval",
        "GMACs before",
        "GMACs",
    ):
        table.add_column(column, justify="left" if column == "pair" else "right")
    for name, result in results.items():
        rates = [f"{rate:.2f}" for rate in result["images_per_second"]]
        low, high = result["interval"]
        gmacs = [f"{macs / 1e9:.2f}" for macs in result.get("macs", [])] or ["", ""]
        speed = [f"{result['speedup']:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(name, str(result["batch_size"]), *rates, *speed, *gmacs)
    console.print(table)
    if args.json:
        arguments = {key: str(value) for key, value in vars(args).items() if key != "json"}
        record = {"arguments": arguments, "machine": machine(args.device), "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
