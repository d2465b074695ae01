"""Kernels that a forward pass launches: exact counts, no timing.

At batch 1 and on a GPU the number of launches decides. A launch is an ATen call that is no view, no allocation and no
read of a value: the same number on every device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches", "device_kernels", "launches"]

FREE = {
    *("view", "expand", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "permute", "as_strided", "detach"),
    *("alias", "unbind", "split", "split_with_sizes", "_unsafe_view", "diagonal", "lift_fresh", "unfold", "narrow"),
    *("_reshape_alias", "chunk", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "sym_size"),
    *("_local_scalar_dense", "is_nonzero"),
}


class Launches(TorchDispatchMode):
    """Counts the kernels that are launched inside the context.

    Attributes:
        kernels: Name of the ATen operator -> calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = str(func).split(".")[1].rstrip("_")  # aten.add_.Tensor
        self.kernels[name] += name not in FREE
        return func(*args, **(kwargs or {}))


def launches(model: nn.Module, x: Tensor) -> int:
    """Kernels that the model launches for a batch x (B, channels, H, W), not compiled."""
    with torch.no_grad():
        model(x)  # what is made once and kept is not counted
        with Launches() as counter:
            model(x)
    return counter.kernels.total()


def device_kernels(run: Callable[[Tensor], object], x: Tensor) -> int | None:
    """What a CUDA device executes for a batch x, compiled or not: kernels, copies and fills.

    None on other devices, and where the driver lets no one trace it.
    """
    if not x.is_cuda:
        return None
    with torch.inference_mode():
        run(x)
        torch.cuda.synchronize(x.device)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run(x)
            torch.cuda.synchronize(x.device)
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events() or ()) or None
