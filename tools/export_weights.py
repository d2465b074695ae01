"""Weights of a checkpoint that mmengine's Runner saved, as float16 .safetensors for ``timm.create_model``.

    python tools/export_weights.py work_dirs/vit-nano_second-stage/epoch_8.pth --model vit_nano_patch4_28 \
      --out effvit/weights/vit_nano_patch4_28.fashion_mnist.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.runner.checkpoint import get_torch_safe_globals
from safetensors.torch import save_file
from torch import Tensor

from effvit.hosts.checkpoints import check_state, read_checkpoint
from effvit.measure.variants import build
from effvit.messages import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", required=True, help="name the checkpoint is of")
    parser.add_argument("--key", metavar="NAME", help="entry of the checkpoint with the weights, where it has several")
    parser.add_argument("--without", metavar="MODULE", help="leave its weights out: a head that only training needs")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    return run_command("export_weights", lambda: export(arguments))


def export(arguments: argparse.Namespace) -> None:
    """Write the weights of the checkpoint."""
    state, _ = read_checkpoint(arguments.checkpoint, get_torch_safe_globals(), arguments.key)
    if arguments.without is not None:
        state = without(state, arguments.without)
    check_state(state, build(arguments.model, {}), arguments.checkpoint)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.half().contiguous() for name, value in state.items()}
    save_file(halves, arguments.out, {"format": "pt", "architecture": arguments.model})
    print(f"{arguments.out}: {sum(value.numel() for value in halves.values()) / 1e6:.2f} M parameters")


def without(state: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """The weights less those of a module; a ValueError if it has none."""
    left = {name: value for name, value in state.items() if not name.startswith(f"{module}.")}
    if len(left) == len(state):
        raise ValueError(f"--without must name a module of the checkpoint, got {module!r}; without it there is no need")
    return left


if __name__ == "__main__":
    sys.exit(main())
