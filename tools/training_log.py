"""Sum up a training in stages: what each epoch took, lost and reached, from what mmengine logged.

    python tools/training_log.py work_dirs/vit-nano_cutouts work_dirs/vit-nano_cutouts_cooldown --json FILE

Each work directory is a stage. Iterations that a resumed run repeated count once, and an epoch that was not complete
counts not at all. Minutes are the median time of the logged iterations times their number, so that what a machine stood
still does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from compare_training import read_lines, read_logs
from mmengine.config import Config

from effvit.measure.profiler import machine
from effvit.messages import plain, run_command

__all__ = ["main", "stage", "table"]

TOP1 = "accuracy/top1"
COLUMNS = ("stage", "epochs", "images so far", "hours so far", "loss", "top-1 (%)")


def stage(work_dir: Path) -> dict[str, Any]:
    """What a work directory says of its training: the config's name, and an entry for each epoch.

    Raises:
        ValueError: No log, other than one config, no checkpoint of an epoch, or a data set that has no ``length``.
    """
    logs, configs = read_logs(work_dir), sorted(work_dir.glob("*.py"))
    complete = [int(path.stem.partition("_")[2]) for path in work_dir.glob("epoch_*.pth")]
    if not logs or len(configs) != 1 or not complete:
        raise ValueError(
            f"{plain(work_dir)} must be the work directory of one training, with its config, checkpoints epoch_*.pth "
            f"and vis_data/scalars.json in a folder of each run; it has {len(configs)} configs, {len(complete)} "
            f"checkpoints and {len(logs)} logged losses"
        )
    config = Config.fromfile(configs[0], import_custom_modules=False)
    images = config.train_dataloader.dataset.get("length")
    if images is None:
        raise ValueError(f"{configs[0].name} must say the length of its training set, as CutoutScenes takes it")
    reached = {line["step"]: line[TOP1] for line in read_lines(work_dir) if TOP1 in line}
    epochs: list[dict[str, Any]] = []
    for number, own in groupby(logs, itemgetter("epoch")):
        if number <= max(complete):
            before = sum(entry["iterations"] for entry in epochs)
            epochs.append(epoch(int(number), list(own), before, reached.get(number)))
    return {"config": configs[0].stem, "images_per_epoch": images, "by_epoch": epochs}


def epoch(number: int, logs: Sequence[Mapping[str, float]], before: int, top1: float | None) -> dict[str, Any]:
    """An epoch of the log, whose last iteration was logged, with so many iterations before it."""
    iterations = int(logs[-1]["iter"]) - before
    losses = {name: round(float(np.mean([log[name] for log in logs])), 3) for name in logs[0] if name.endswith("loss")}
    return {
        "epoch": number,
        "iterations": iterations,
        "minutes": round(float(np.median([log["time"] for log in logs])) * iterations / 60, 2),
        "lr": logs[-1]["lr"],
        **losses,
        "top1": None if top1 is None else round(top1, 2),
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what ``main`` wrote: a row for each epoch after which accuracy was measured."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    rows = [(own, entry) for own in record["stages"] for entry in own["by_epoch"]]
    images = accumulate(own["images_per_epoch"] for own, _ in rows)
    minutes = accumulate(entry["minutes"] for _, entry in rows)
    for (own, entry), seen, spent in zip(rows, images, minutes, strict=True):
        if entry["top1"] is not None:
            cells = [own["config"], entry["epoch"], f"{seen:,}", f"{spent / 60:.1f}", f"{entry['loss']:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {entry['top1']:.1f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Sum up; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR", help="of each stage, in their order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, machine and versions there")
    arguments = parser.parse_args(argv)
    return run_command("training_log", lambda: summarise(arguments.work_dirs, arguments.json))


def summarise(work_dirs: Sequence[Path], path: Path | None) -> None:
    """Print the table and write the record."""
    record = {"machine": machine("cpu"), "stages": [stage(work_dir) for work_dir in work_dirs]}
    print("\n".join(table(record)))
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
