"""When a measurement may go on from a file: on the same model, images and machine alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from effvit.measure.values import Tuning
from effvit.messages import shown

__all__ = ["fingerprint", "refuse_differences", "refuse_other_conditions"]

OF_MACHINE = ("processor", "cores", "device", "torch")
OF_CONDITIONS = ("batch_size", "input_size", "threads", "device", "dtype")
OF_OPTIONS = ("weights", "pixels", "labels", "compile", "cuda_graphs")


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
    refuse_differences(
        values, "the search to go on with was made", "give what it was made with, or begin anew without --resume"
    )


def refuse_differences(values: Mapping[str, tuple[object, object]], what: str, remedy: str) -> None:
    """Raise a ValueError that names both values, before and now, of the first that differs.

    Args:
        values: Name -> (before, now); of two lists, what only one of them has is named.
        what: Beginning of the message.
        remedy: Its end.
    """
    for name, (old, new) in values.items():
        if old != new:
            if isinstance(old, list) and isinstance(new, list) and set(old) != set(new):
                old, new = ([entry for entry in own if entry not in other] for own, other in ((old, new), (new, old)))
            raise ValueError(f"{what} with {name} {shown(old)}, now it is {shown(new)}; {remedy}")
