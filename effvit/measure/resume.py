"""When a search for a setting may go on from a file: on the same model, images and machine alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from effvit.measure.values import Tuning
from effvit.messages import shown

__all__ = ["fingerprint", "refuse_other_conditions"]

OF_MACHINE = ("processor", "cores", "device", "torch")
OF_CONDITIONS = ("batch_size", "input_size", "threads", "device", "dtype")
OF_OPTIONS = ("weights", "pixels", "compile", "cuda_graphs")


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """What tells these tensors from others: the beginning of the SHA-256 of their bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_other_conditions(before: Tuning, now: Tuning) -> None:
    """Raise a ValueError that names both values if what was measured before does not hold now."""
    values = {
        "host": (before.host, now.host),
        **{name: (getattr(before.conditions, name), getattr(now.conditions, name)) for name in OF_CONDITIONS},
        **{name: (before.conditions.options.get(name), now.conditions.options.get(name)) for name in OF_OPTIONS},
        **{name: (before.machine.get(name), now.machine.get(name)) for name in OF_MACHINE},
    }
    for name, (old, new) in values.items():
        if old != new:
            raise ValueError(
                f"the search to go on with was made with {name} {shown(old)}, now it is {shown(new)}; give what it was "
                "made with, or begin anew without --resume"
            )
