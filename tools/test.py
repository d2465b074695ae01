"""Evaluate a checkpoint on the test set of its config, or a classifier with the weights that its config names.

python tools/test.py configs/mmdet/garments/mask-rcnn_evit-nano.py work_dirs/mask-rcnn_evit-nano/epoch_2.pth
python tools/test.py configs/mmpretrain/gtp-deit-b_in1k.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction
from mmengine.dist import is_main_process

from effvit.dense.runner import LAUNCHERS, build_runner, prepare_config, without_pretrained
from effvit.messages import one_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="checkpoint that the Runner saved; loaded strictly. Without one a classifier has its pretrained weights",
    )
    parser.add_argument("--work-dir", metavar="DIR", help="for logs (default: work_dirs/CONFIG)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the metrics there as JSON")
    parser.add_argument("--show-dir", metavar="DIR", help="draw the predictions there")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="values in place of the config's"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, help="default: pytorch under torchrun, else none")
    arguments = parser.parse_args(argv)
    options = dict(arguments.cfg_options or {})
    if arguments.checkpoint is not None:
        options.setdefault("load_from", arguments.checkpoint)
    if arguments.show_dir:
        options |= {"default_hooks.visualization.draw": True, "default_hooks.visualization.interval": 1}
        options |= {"visualizer.save_dir": arguments.show_dir}
    try:
        config = prepare_config(
            arguments.config, work_dir=arguments.work_dir, options=options, launcher=arguments.launcher
        )
        if config.get("load_from") is not None:
            config = without_pretrained(config)
        elif not config.model.get("pretrained"):
            raise ValueError(
                f"{arguments.config} names no weights for its whole model; give a checkpoint, or for a classifier "
                "--cfg-options model.pretrained=True"
            )
        if "teacher" in config.model:
            config.model.teacher = None  # it only trains
        runner = build_runner(config)
    except (ValueError, TypeError, OSError) as error:
        print(f"test: error: {one_line(error)}", file=sys.stderr)
        return 2
    metrics = runner.test()
    if arguments.out is not None and is_main_process():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        numbers = {name: float(value) for name, value in metrics.items()}  # mmseg's are numpy's
        arguments.out.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
