"""Train a detector, segmenter or classifier from a config of mmdet, mmseg or mmpretrain.

    python tools/train.py configs/mmdet/garments/mask-rcnn_evit-nano.py
    torchrun --nproc-per-node 2 tools/train.py CONFIG --cfg-options train_dataloader.batch_size=4

Started by torchrun, processes train together; without an accelerator over gloo.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import DictAction

from effvit.dense.runner import LAUNCHERS, build_runner, prepare_config
from effvit.messages import one_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", metavar="DIR", help="for logs and checkpoints (default: work_dirs/CONFIG)")
    parser.add_argument("--amp", action="store_true", help="mixed precision (needs an accelerator)")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch size")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from a checkpoint; without FILE from the latest in the work directory, if there is one",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="values in place of the config's"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, help="default: pytorch under torchrun, else none")
    arguments = parser.parse_args(argv)
    try:
        config = prepare_config(
            arguments.config,
            work_dir=arguments.work_dir,
            options=arguments.cfg_options,
            launcher=arguments.launcher,
            amp=arguments.amp,
            auto_scale_lr=arguments.auto_scale_lr,
            resume=arguments.resume,
        )
        if config.get("train_dataloader") is None:
            raise ValueError(f"{arguments.config} has no training data; it only evaluates, by tools/test.py")
        runner = build_runner(config)
    except (ValueError, TypeError, OSError) as error:
        print(f"train: error: {one_line(error)}", file=sys.stderr)
        return 2
    runner.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
