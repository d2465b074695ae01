"""The processes that torchrun starts, as one measurement uses them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Processes", "joined"]


@dataclass(frozen=True)
class Processes:
    """This process among those of a measurement.

    Attributes:
        device: What it runs on.
        rank: Its number, from 0.
        count: How many there are.
    """

    device: str = "cpu"
    rank: int = 0
    count: int = 1

    def summed(self, numbers: Sequence[int]) -> list[int]:
        """The sums of the numbers over all processes, which all have to call this."""
        if self.count == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(sums)
        found: list[int] = sums.tolist()
        return found


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that torchrun started, or alone without it.

    Args:
        device: "cpu" or "cuda"; of several processes each takes the GPU of its local rank.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
