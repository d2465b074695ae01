"""Multiply-adds and parameters of a whole detector or segmenter, from its config; no data set is needed.

python tools/get_flops.py configs/mmdet/mask-rcnn_evit-deit-s_fpn_1x_coco.py --shape 800 1280
python tools/get_flops.py CONFIG --cfg-options model.backbone.keep_rate=0.5 --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table

from effvit.dense.dense_flops import count_dense_flops, count_parts
from effvit.dense.openmmlab import load_config
from effvit.dense.runner import without_pretrained
from effvit.messages import one_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("config", help="config file")
    parser.add_argument("--shape", type=int, nargs="+", metavar="SIDE", help="side, or height and width in pixels")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="values in place of the config's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config)
        config.merge_from_dict(arguments.cfg_options or {})
        without_pretrained(config)  # weights do not change the count
        size = image_size(arguments.shape, config.default_scope)
        init_default_scope(config.default_scope)
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        report = count_dense_flops(model, size)
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"get_flops: error: {one_line(error)}", file=sys.stderr)
        return 2
    parts = count_parts(model, report)
    table = Table(title=f"{Path(arguments.config).stem}, {size[0]} x {size[1]} pixels", title_justify="left")
    for column in ("part", "parameters (M)", "GMACs", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = sum(parameters for parameters, _ in parts.values())
    for name, (parameters, macs) in [*parts.items(), ("total", (total, report.total))]:
        table.add_row(name, f"{parameters / 1e6:.2f}", f"{macs / 1e9:.2f}", f"{macs / report.total:.1%}")
    console = Console()
    console.print(table)
    console.print("1 MAC is a multiplication and an addition, which others count as 2 FLOPs.")
    if report.uncounted:
        console.print(f"Not counted: {', '.join(f'{name} ({calls})' for name, calls in report.uncounted.items())}")
    if arguments.json is not None:
        content = {
            "config": arguments.config,
            "size": size,
            "total_macs": report.total,
            "parts": {name: {"parameters": p, "macs": m} for name, (p, m) in parts.items()},
            "uncounted": report.uncounted,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def image_size(shape: list[int] | None, scope: str) -> tuple[int, int]:
    """(H, W) asked for; by default what papers count detectors (800 x 1280) and segmenters (512 x 512) at."""
    if shape is None:
        return (800, 1280) if scope == "mmdet" else (512, 512)
    if len(shape) > 2 or min(shape) < 1:
        raise ValueError(f"--shape takes one side, or height and width, at least 1 each, got {shape}")
    return shape[0], shape[-1]


if __name__ == "__main__":
    sys.exit(main())
