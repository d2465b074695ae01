"""A checkpoint to start training a model from: its own random weights, and those of another that fit.

    python tools/start_weights.py vit_nano_patch8_96 --like vit_nano_patch4_28 --out work_dirs/vit-nano_start.pth
    python tools/train.py CONFIG --cfg-options load_from=work_dirs/vit-nano_start.pth

A weight is taken over if the other model has one of the same name and shape: between ViTs of the same width and depth
all blocks, but neither positions nor what depends on the size of the patches and the number of classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from effvit.measure.variants import build
from effvit.messages import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="any name of timm or of the zoo: what is to be trained")
    parser.add_argument("--like", required=True, metavar="MODEL", help="whose pretrained weights are taken over")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    return run_command("start_weights", lambda: start(arguments))


def start(arguments: argparse.Namespace) -> None:
    """Write the weights."""
    former = build(arguments.like, {}, pretrained=True).state_dict()
    torch.manual_seed(arguments.seed)
    state = build(arguments.model, {}).state_dict()
    fitting = [name for name, value in state.items() if name in former and former[name].shape == value.shape]
    if not fitting:
        raise ValueError(
            f"{arguments.like} has no weight of the same name and shape as one of {arguments.model}; "
            "take one of its width and depth"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state | {name: former[name] for name in fitting}}, arguments.out)
    left = ", ".join(name for name in state if name not in fitting)
    print(f"{arguments.out}: {len(fitting)} of {len(state)} tensors from {arguments.like}; random: {left or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
