"""What reduction is worth beside compilation, int8 and other runtimes: every product of the two, in one process.

Each model, dense and reduced, runs in each way that is asked for: eager, compiled, int8, int8 and compiled, by ONNX
Runtime, there in int8, by OpenVINO. All run interleaved, each once a round in random order; a figure is the median over
the rounds of the ratio within a round, with its bootstrap 95 % interval. ``over eager`` is the speed over that of the
dense model run eagerly, ``over dense`` over that of the dense model run in the same way: where the two effects
multiply, ``over dense`` is the same in all ways.

    python tools/benchmark_deployment.py --rounds 40 --json deployment.json
    python tools/benchmark_deployment.py --ways eager compiled "int8, compiled" --only evit --batch-size 1
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

import effvit
from effvit.data.preparation import data_config
from effvit.deployment.exporting import record
from effvit.deployment.formats import Run, read_onnx, read_openvino, write_onnx
from effvit.deployment.int8 import quantize_model, quantize_onnx
from effvit.measure.profiler import interleaved, keep_freed_memory, machine, median_ratio, noise

REDUCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "EViT 0.7": ("evit", {"keep_rate": 0.7}),
    "EViT 0.5": ("evit", {"keep_rate": 0.5}),
    "ToMe r 13": ("tome", {"r": 13}),
    "HoT": ("hot", {}),
}
IN_TORCH = ("eager", "compiled", "int8", "int8, compiled")
BY_OTHERS = ("ONNX Runtime", "ONNX Runtime, int8", "OpenVINO")


def runs_of(model: nn.Module, batch: Tensor, ways: list[str], threads: int) -> dict[str, Run]:
    """Way -> what runs the model on such a batch in that way."""
    runs: dict[str, Run] = {}
    for way in (way for way in IN_TORCH if way in ways):
        twin = quantize_model(model) if "int8" in way else copy.deepcopy(model)
        runs[way] = effvit.compile(twin, dynamic=False) if "compiled" in way else twin
    if set(ways) & set(BY_OTHERS):
        with torch.no_grad(), TemporaryDirectory() as folder:
            graph, small = Path(folder) / "graph.onnx", Path(folder) / "int8.onnx"
            write_onnx(record(model, batch, any_batch=False), graph)
            if "ONNX Runtime" in ways:
                runs["ONNX Runtime"] = read_onnx(graph, threads)
            if "ONNX Runtime, int8" in ways:
                quantize_onnx(graph, small)
                runs["ONNX Runtime, int8"] = read_onnx(small, threads)
            if "OpenVINO" in ways:
                runs["OpenVINO"] = read_openvino(graph, threads)
    return runs


def results(seconds: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Ratios of each model run in each way.

    Args:
        seconds: Model -> way -> seconds in each round; the first model is the dense one, which is also run eagerly.
    """
    dense = next(iter(seconds.values()))
    rows = []
    for name, ways in seconds.items():
        for way, own in ways.items():
            eager, eager_interval = median_ratio(dense["eager"], own)
            same, same_interval = median_ratio(dense[way], own)
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "over_eager": eager,
                    "over_eager_interval": eager_interval,
                    "over_dense": same,
                    "over_dense_interval": same_interval,
                }
            )
    return rows


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what ``--json`` wrote."""
    lines = ["| model | way | over eager | 95 % interval | over dense | 95 % interval |", "|---|---|---|---|---|---|"]
    for row in record["results"]:
        cells = [row["model"], row["way"]]
        for ratio in ("over_eager", "over_dense"):
            low, high = row[f"{ratio}_interval"]
            cells += [f"{row[ratio]:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(
    models: Mapping[str, nn.Module], batch: Tensor, ways: list[str], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """``results`` of all models in all ways on one batch; the first model is the dense one, the first way eager."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = {
            (name, way): run
            for name, model in models.items()
            for way, run in runs_of(model, batch, ways, threads).items()
        }
        labels = {f"{name}, {way}": (name, way) for name, way in runs}
        measured = interleaved(
            {label: runs[pair] for label, pair in labels.items()},
            batch,
            rounds,
            warmup=2,
            precision=None,
            max_rounds=rounds,
            on_run=None,
        )
    finally:
        torch.set_num_threads(before)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for label, (name, way) in labels.items():
        seconds[name][way] = measured[label]
    return results(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name of a plain ViT")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--ways", nargs="+", default=[*IN_TORCH, *BY_OTHERS], choices=[*IN_TORCH, *BY_OTHERS], help="besides eager"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="reductions with one of these in its name"
    )
    parser.add_argument("--json", type=Path, help="write ratios, machine and versions here")
    args = parser.parse_args()

    torch.manual_seed(0)
    dense = timm.create_model(args.model).eval()
    models = {"dense": dense} | {
        name: effvit.sparsify(dense, method, **settings).eval()
        for name, (method, settings) in REDUCTIONS.items()
        if any(text.lower() in name.lower() for text in args.only)
    }
    batch = noise(data_config(dense)["input_size"], args.batch_size)
    found = {
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "json"},
        "machine": machine("cpu"),
        "results": measure(models, batch, ["eager", *args.ways], args.rounds, args.threads),
    }
    Console().print(Markdown("\n".join(table(found))))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
