"""Speed of every method in this checkout beside an earlier version of it, in one interleaved run.

The earlier version is taken from git under another package name, so both live in one process and each round times
both. A ratio above 1 says that this checkout is faster; its interval is the bootstrap 95 % one.

    python tools/compare_versions.py v0.1.0 --rounds 40 --json compare.json
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark_overhead import CONFIGURATIONS, measure, sharpen
from rich.console import Console
from rich.table import Table
from timm.models._registry import _model_entrypoints
from torch import nn

import effvit
from effvit.measure.ideal import ideal_of, mean_counts
from effvit.measure.profiler import machine, median_ratio, noise

METHODS: dict[str, tuple[str, dict[str, Any]]] = CONFIGURATIONS | {
    "DyMU": ("dymu", {}),
    "Expedite": ("expedite", {}),
    "HoT": ("hot", {}),
}
THRESHOLD = 0.9  # of DyMU, which would have to be calibrated otherwise


def package_of(revision: str, folder: Path, name: str = "effvit_before") -> Any:
    """The package as it was at a git revision, imported under another name."""
    archive = subprocess.run(["git", "archive", revision, "effvit"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "effvit").rename(folder / name)
    for path in (folder / name).rglob("*.py"):
        path.write_text(re.sub(r"\beffvit\b", name, path.read_text()))
    sys.path.insert(0, str(folder))
    # Both versions register the same names: timm forgets those of this one for as long as the other needs.
    own = {model: _model_entrypoints.pop(model) for model in effvit.list_models()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overwriting .* in registry")
        before = importlib.import_module(name)
    _model_entrypoints.update(own)
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="git revision to compare with")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name of a plain ViT")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="run the methods whose name contains this")
    parser.add_argument("--json", type=Path, help="write figures, machine and versions here")
    args = parser.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        before = package_of(args.revision, Path(folder))
    dense = timm.create_model(args.model).eval()
    sharpen(dense, 12.0)
    images = noise((3, *dense.patch_embed.img_size), args.batch_size)
    models: dict[str, nn.Module] = {"dense": dense}
    names = [name for name in METHODS if args.only.lower() in name.lower()]
    for name in names:
        method, settings = METHODS[name]
        if method == "dymu":
            settings = {"thresholds": [THRESHOLD] * len(dense.blocks)}
        models[name] = now = effvit.sparsify(dense, method, **settings).eval()
        models[f"before {name}"] = former = before.sparsify(dense, method, **settings).eval()
        with torch.no_grad():
            difference = (now(images) - former(images)).abs().max().item()
        if difference > 1e-4:
            print(f"{name}: outputs differ by up to {difference:.2g} from those of {args.revision}")
        ideal = ideal_of(dense, [round(count) for count in mean_counts(now, images)], now)
        if ideal is not None:
            models[f"ideal {name}"] = ideal

    console = Console()
    measured = measure(console, models, images, args.rounds, threads=args.threads)
    seconds = {m.name: m.seconds for m in measured}
    table = Table("method", "before / now", "95 % interval", "share of the ideal before", "now")
    rows = []
    for name in names:
        ratio, (low, high) = median_ratio(seconds[f"before {name}"], seconds[name])
        row = {"name": name, "ratio": ratio, "interval": [low, high]}
        shares = ["", ""]
        if f"ideal {name}" in seconds:
            for i, (key, version) in enumerate((("efficiency_before", f"before {name}"), ("efficiency", name))):
                share, bounds = median_ratio(seconds[f"ideal {name}"], seconds[version])
                row[key] = [share, *bounds]
                shares[i] = f"{share:.3f} ({bounds[0]:.3f} to {bounds[1]:.3f})"
        rows.append(row)
        table.add_row(name, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", *shares)
    console.print(table)
    if args.json:
        record = {"revision": args.revision, "batch_size": args.batch_size, "rounds": args.rounds, "results": rows}
        args.json.write_text(json.dumps(record | {"machine": machine("cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
