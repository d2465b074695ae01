"""Train several configs and compare what they have learned with what their backbones cost.

Each is evaluated as initialised and as trained, with every seed. What has its last checkpoint in the work directories
already is not trained again, what was interrupted goes on from its latest checkpoint.

    python tools/compare_training.py configs/mmdet/garments/*.py --seeds 0 1 2 --json FILE

Detectors, segmenters and classifiers; of a classifier, "backbone" is all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from effvit.dense.runner import build_runner, check_checkpoint, prepare_config
from effvit.measure.costs import macs_of
from effvit.measure.evaluation import COST_IMAGES
from effvit.measure.profiler import machine
from effvit.measure.resume import fingerprint
from effvit.messages import one_line
from effvit.show.tables import mean_and_range

__all__ = ["main", "table"]

STAGES = ("untrained", "trained")
METRICS = {
    "coco/bbox_mAP": 100.0,
    "coco/segm_mAP": 100.0,
    "mIoU": 1.0,
    "accuracy/top1": 1.0,
}  # name -> factor that makes it percent
COLUMNS = ("config", "backbone MMACs", "backbone parameters", "seeds", "minutes", "loss, first to last", *STAGES)
SHARE = 0.1  # of the logged losses, whose mean stands for the beginning and for the end


def run(path: Path, work_dirs: Path, seed: int, tested: dict[tuple[Path, str], dict[str, float]]) -> dict[str, Any]:
    """Train a config unless it is trained already, and say what it costs and what it has learned.

    Args:
        path: The config.
        work_dirs: Work directories are in there.
        seed: Of the training.
        tested: (config, fingerprint of its weights) -> metrics of it untrained, added to. Seeds that begin with the
            same weights, as with a pretrained model, share them.
    """
    work_dir, options = work_dirs / path.stem / f"seed-{seed}", {"randomness.seed": seed}
    config = prepare_config(path, work_dir=work_dir, options=options, resume="auto")
    if not is_trained(config):
        build_runner(config).train()
    runner = build_runner(prepare_config(path, work_dir=work_dir / "test", options=options))
    runner.model.init_weights()  # as training does, which then loads the checkpoint that the config starts from
    runner.load_or_resume()
    begun = path, fingerprint(runner.model.state_dict().values())
    if begun not in tested:
        tested[begun] = runner.test()
    checkpoint = find_latest_checkpoint(str(work_dir))
    check_checkpoint(runner, checkpoint)
    runner.load_checkpoint(checkpoint)
    after = runner.test()
    model = runner.model.eval()
    backbone = model.backbone if hasattr(model, "backbone") else model.model  # of a classifier, with its head
    batch = next(iter(runner.test_dataloader))
    size = tuple(batch["inputs"][0].shape)
    sample = model.data_preprocessor(batch)["inputs"][:COST_IMAGES]
    return {
        "config": path.as_posix(),
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "backbone_parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "backbone_macs": macs_of(backbone, size, sample).total,
        "input_size": size,
        "untrained": percentages(tested[begun]),
        "trained": percentages(after),
        **summary(read_logs(work_dir)),
    }


def is_trained(config: Config) -> bool:
    """True if the latest checkpoint in the work directory is that of the last epoch or iteration."""
    latest = find_latest_checkpoint(config.work_dir)
    last = config.train_cfg.get("max_epochs") or config.train_cfg.max_iters
    return latest is not None and Path(latest).stem.split("_")[-1] == str(last)


def percentages(metrics: Mapping[str, float]) -> dict[str, float]:
    """The main metrics in percent; without any, mmdet has found no object at all."""
    found = {name: round(float(metrics[name]) * factor, 2) for name, factor in METRICS.items() if name in metrics}
    return found or {"coco/bbox_mAP": 0.0, "coco/segm_mAP": 0.0}


def read_logs(work_dir: Path) -> list[dict[str, float]]:
    """What mmengine logged of the training, in order of iterations; a later run replaces what it repeated."""
    logs = {line["step"]: line for line in read_lines(work_dir) if "loss" in line}
    return [logs[step] for step in sorted(logs)]


def read_lines(work_dir: Path) -> list[dict[str, float]]:
    """All that mmengine logged in a work directory, of training and evaluation, an earlier run before a later one."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def summary(logs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Iterations, their time, and the mean loss of the first and last tenth of the log."""
    part = max(1, round(SHARE * len(logs)))
    iterations = int(logs[-1]["step"])
    return {
        "iterations": iterations,
        "minutes": round(float(np.mean([log["time"] for log in logs])) * iterations / 60, 1),
        "losses": [round(float(np.mean([log["loss"] for log in half])), 3) for half in (logs[:part], logs[-part:])],
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what ``main`` wrote: a row for each config, means over its seeds."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for config, group in groupby(record["results"], key=itemgetter("config")):
        rows = list(group)
        first, last = np.mean([row["losses"] for row in rows], axis=0)
        cells = [
            f"[{Path(config).stem}](../{config})",
            f"{rows[0]['backbone_macs'] / 1e6:.0f}",
            f"{rows[0]['backbone_parameters'] / 1e6:.2f} M",
            ", ".join(str(row["seed"]) for row in rows),
            f"{np.mean([row['minutes'] for row in rows]):.0f}",
            f"{first:.2f} to {last:.2f}",
            *(
                " / ".join(mean_and_range([row[when][metric] for row in rows]) for metric in rows[0][when])
                for when in STAGES
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Train and compare; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument(
        "--work-dirs", type=Path, default=Path("work_dirs"), metavar="DIR", help="one a config and seed inside"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, machine and versions there")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        tested: dict[tuple[Path, str], dict[str, float]] = {}
        runs = product(arguments.configs, arguments.seeds)
        results = [run(path, arguments.work_dirs, seed, tested) for path, seed in runs]
    except (ValueError, TypeError, OSError) as error:
        print(f"compare_training: error: {one_line(error)}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {"machine": machine(device), "threads": arguments.threads, "results": results}
    print("\n".join(table(record)))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
