"""Where the time of a forward pass goes, block by block."""

from __future__ import annotations

import copy
import time
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from effvit.measure.values import BlockTime
from effvit.selectors import SelectingTower

__all__ = ["now", "time_by_block"]

BRANCHES = {"attn": "attention", "mlp": "mlp"}
TOWER = "tower"  # of a SelectingTower


class _Clock:
    """Seconds inside modules, by forward hooks."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self._start(name))
        module.register_forward_hook(lambda *_: self._stop(name))

    def _start(self, name: str) -> None:
        self.started[name] = now()

    def _stop(self, name: str) -> None:
        self.seconds[name] += now() - self.started[name]


def now() -> float:
    """Seconds on a clock that has waited for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_by_block(model: nn.Module, batch: Tensor, rounds: int = 10) -> list[BlockTime]:
    """Median seconds of the parts of every block.

    A block is a module with children named ``attn`` and ``mlp``. Scores that a method takes from attention are part of
    "attention"; "reduction" is what the block does outside its children: choosing, matching and moving tokens, and the
    residual sums, which a dense block has too. The clock waits for the device at each part, so parts add up to more
    than an undisturbed pass takes.

    Args:
        model: Any model; it is copied to the batch's device and dtype.
        batch: (B, channels, H, W).
        rounds: Passes the median is taken over, after one that does not count.

    Returns:
        For each block its "attention", "mlp", "norm" and "reduction", of a ``SelectingTower`` a block "selection" with
        what happens behind its tower, and last a block "rest" with that part alone: embedding, head, dense recovery.

    Raises:
        ValueError: The model has no such block.
    """
    model = copy.deepcopy(model).to(batch.device, batch.dtype).eval()
    blocks: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, branch, None), nn.Module) for branch in BRANCHES)
    }
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks with children named attn and mlp to time apart")
    clock = _Clock()
    clock.watch("", model)
    if isinstance(model, SelectingTower):
        clock.watch(TOWER, model.tower)
    for name, block in blocks.items():
        clock.watch(name, block)
        for child_name, child in block.named_children():
            if child_name != "reducer":  # runs the block's other children
                clock.watch(f"{name}.{child_name}", child)
    samples: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with torch.inference_mode():
        for _ in range(rounds + 1):
            clock.seconds.clear()
            model(batch)
            for key, seconds in _parts(clock.seconds, list(blocks)).items():
                samples[key].append(seconds)
    rows: dict[str, dict[str, float]] = {}
    for (block_name, part), values in samples.items():
        rows.setdefault(block_name, {})[part] = float(np.median(values[1:]))
    return [BlockTime(name, seconds) for name, seconds in rows.items()]


def _parts(seconds: dict[str, float], blocks: list[str]) -> dict[tuple[str, str], float]:
    """(block, part) -> seconds of one pass, from those of the modules."""
    parts: dict[tuple[str, str], float] = {}
    rest = seconds[""]
    for name in blocks:
        inside = {key.rpartition(".")[2]: value for key, value in seconds.items() if key.rpartition(".")[0] == name}
        children = sum(inside.values())
        for branch, part in BRANCHES.items():
            parts[name, part] = inside.pop(branch, 0.0)
        parts[name, "norm"] = sum(inside.values())
        parts[name, "reduction"] = max(0.0, seconds[name] - children)
        rest -= seconds[name]
    if TOWER in seconds:
        parts["selection", "selection"] = max(0.0, seconds[""] - seconds[TOWER])
        rest -= parts["selection", "selection"]
    parts["rest", "rest"] = max(0.0, rest)
    return parts
