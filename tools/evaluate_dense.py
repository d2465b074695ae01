"""What methods off the shelf make of a trained detector or segmenter, beside controls at the same token counts.

The checkpoint is that of a config whose backbone is a plain ViT without a method. Each method is put into its backbone
as ``sparsify`` of the config would, without training; maps come back at full size by the method's own recovery.
Controls keep as many patches in the same blocks without a look at the image. Multiply-adds are those of the backbone.

    python tools/evaluate_dense.py configs/mmseg/composites/upernet_vit.py work_dirs/upernet_vit/iter_2000.pth \
      --method evit tome --set keep_rate=0.7 --set reduce_at='[2, 4, 6]' --set r=8 --control random uniform --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare_training import percentages
from rich.console import Console
from rich.markdown import Markdown

from effvit.dense.runner import build_runner, check_checkpoint, prepare_config
from effvit.measure.costs import macs_of
from effvit.measure.evaluation import COST_IMAGES
from effvit.measure.profiler import machine
from effvit.measure.variants import list_variants, parse_setting
from effvit.messages import one_line
from effvit.protocols import Settings
from effvit.show.tables import settings_text

__all__ = ["main", "table"]

DENSE = "dense"
CONTROLS = ("random", "uniform")


class Tested(NamedTuple):
    """What a detector or segmenter came to.

    Attributes:
        metrics: In percent.
        macs: Of the backbone.
        counts: Patch tokens that leave each block; None for the dense one, and where they depend on the image.
    """

    metrics: dict[str, float]
    macs: int
    counts: list[int] | None


def test(config: Path, checkpoint: Path, work_dir: Path, sparsify: Mapping[str, Any] | None) -> Tested:
    """The trained model, its backbone reduced by ``sparsify`` if that is given."""
    options = {} if sparsify is None else {"model.backbone.sparsify": dict(sparsify)}
    runner = build_runner(prepare_config(config, work_dir=work_dir, options=options))
    check_checkpoint(runner, str(checkpoint))
    runner.load_checkpoint(str(checkpoint))
    metrics = percentages(runner.test())
    model = runner.model.eval()
    batch = next(iter(runner.test_dataloader))
    sample = model.data_preprocessor(batch)["inputs"][:COST_IMAGES]
    macs = macs_of(model.backbone, tuple(sample.shape[1:]), sample).total
    reduced = model.backbone.model
    fixed = sparsify is not None and not reduced.variable_length
    return Tested(metrics, macs, reduced.token_counts() if fixed else None)


def controls_of(counts: Sequence[int], patches: int, controls: Sequence[str]) -> Iterator[tuple[str, Settings]]:
    """Each control at the token counts of a method, between attention and MLP of the blocks that reduce."""
    entering = [patches, *counts[:-1]]
    blocks = [block for block, (left, right) in enumerate(zip(entering, counts, strict=True)) if right < left]
    settings: Settings = {"num_tokens": [counts[block] for block in blocks], "reduce_at": blocks, "place": "mlp"}
    for control in controls:
        yield control, settings


def measure(
    config: Path, checkpoint: Path, work_dir: Path, variants: Sequence[tuple[str, Settings]], controls: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for the dense model, for each variant, and for the controls of those that drop or merge for good."""
    patches = num_patches(config)
    dense = test(config, checkpoint, work_dir, None)
    yield {"method": DENSE, "settings": {}, "control_of": None, **dense._asdict()}
    for method, settings in variants:
        own = test(config, checkpoint, work_dir, {"method": method, **settings})
        yield {"method": method, "settings": settings, "control_of": None, **own._asdict()}
        if own.counts is None:
            continue
        for control, chosen in controls_of(own.counts, patches, controls):
            row = test(config, checkpoint, work_dir, {"method": control, **chosen})
            yield {"method": control, "settings": chosen, "control_of": [method, settings], **row._asdict()}


def num_patches(config: Path) -> int:
    """Patches of the images that the backbone of a config is made for."""
    backbone = prepare_config(config).model.backbone
    side = backbone.img_size // backbone.get("patch_size", 16)
    return int(side * side)


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of what ``--json`` wrote: a row for each method, and its controls' metrics beside."""
    rows = record["results"]
    controls = [name for name in CONTROLS if any(row["method"] == name and row["control_of"] for row in rows)]
    names = list(rows[0]["metrics"])
    lines = [f"| method | settings | backbone MMACs | {' / '.join(names)} | {' | '.join(controls)} |"]
    lines.append("|---|---|---:|---:|" + "---:|" * len(controls))
    for row in rows:
        if row["control_of"]:
            continue
        key = [row["method"], row["settings"]]
        beside = {other["method"]: other for other in rows if other["control_of"] == key}
        cells = [row["method"], settings_text(row["settings"]) or "-", f"{row['macs'] / 1e6:.0f}", shown(row)]
        cells += [shown(beside[name]) if name in beside else "-" for name in controls]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(row: Mapping[str, Any]) -> str:
    """Its metrics."""
    return " / ".join(f"{value:.1f}" for value in row["metrics"].values())


def read_known(path: Path | None, config: Path) -> dict[str, Any] | None:
    """The record to add rows to; None if there is none.

    Raises:
        ValueError: It is of another config.
    """
    if path is None or not path.is_file():
        return None
    known: dict[str, Any] = json.loads(path.read_text())
    if known["config"] != config.as_posix():
        raise ValueError(f"{path} holds rows of {known['config']}; name another file for those of {config}")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--method", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--control", nargs="+", default=[], choices=CONTROLS, dest="controls")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/evaluate_dense"), metavar="DIR")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to the list there")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        known = read_known(arguments.json, arguments.config)
        variants = list_variants(arguments.method, [parse_setting(text) for text in arguments.settings])
        rows = measure(arguments.config, arguments.checkpoint, arguments.work_dir, variants, arguments.controls)
        results = list(rows)
    except (ValueError, TypeError, OSError) as error:
        print(f"evaluate_dense: error: {one_line(error)}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "config": arguments.config.as_posix(),
        "results": results,
    }
    if known is not None:
        record = known | {"results": known["results"] + results[1:]}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    Console().print(Markdown("\n".join(table(record))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
