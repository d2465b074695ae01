"""Reads of a device: what a forward pass asks of the values of its tensors, found on a CPU.

Where Python needs a value, or a shape depends on values, it waits until a GPU has done all that was launched before. On
a CPU that costs nothing and so stays unseen: here every such read is found, with the line that made it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from effvit.reducers.base import check_finite

__all__ = ["Read", "count_reads", "place_of_call"]

aten = torch.ops.aten

# Operators whose result is a Python value, or has a shape that depends on values.
VALUES = {
    aten._local_scalar_dense,  # item, bool, int, float, a tensor as an index of Python or as a condition
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
}
# Methods that hand values to Python without an operator, on a CPU.
HANDED_OUT = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
# The check of scores reads on a CPU alone, or where a user asks for it; see its docstring.
ONLY_ON_A_CPU: set[CodeType] = {check_finite.__wrapped__.__code__}  # type: ignore[attr-defined]  # of functools.wraps


class Read(NamedTuple):
    """A value that was read from the device.

    Attributes:
        operator: What read it, "aten.nonzero" or "Tensor.tolist".
        place: The line that asked for it, "my_package.my_module:12 in reduce".
    """

    operator: str
    place: str

    def __str__(self) -> str:
        return f"{self.operator} at {self.place}"


def _own_frame() -> FrameType | None:
    """The innermost frame that belongs neither to torch nor to this module."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if frame.f_globals is not globals() and package not in ("torch", "contextlib", "functools"):
            return frame
        frame = frame.f_back
    return None


def place_of_call() -> str:
    """The line, outside torch, whose call is at work: "my_package.my_module:12 in reduce"."""
    frame = _own_frame()
    if frame is None:
        return "an unknown line"
    return f"{frame.f_globals.get('__name__')}:{frame.f_lineno} in {frame.f_code.co_name}"


def depends_on_values(operator: Any, arguments: Sequence[Any], settings: Mapping[str, Any]) -> bool:
    """Whether a call of an operator of ATen gives a value to Python, or has a shape that depends on values."""
    packet = operator.overloadpacket
    if packet in VALUES:
        return True
    if packet is aten.repeat_interleave:
        return bool(operator is aten.repeat_interleave.Tensor) and settings.get("output_size") is None
    if packet is aten.index:
        return _has_mask(arguments[1])
    if packet in (aten.index_put, aten.index_put_, aten._index_put_impl_):
        return _has_mask(arguments[1]) and arguments[2].numel() != 1  # one number fills the mask without a read
    return False


def _has_mask(indices: Iterable[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if depends_on_values(func, args, kwargs or {}):
            self.note(str(func.overloadpacket))
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_cpu = func is Tensor.to and "cpu" in (*args[1:2], (kwargs or {}).get("device"))  # not x.device, which is it
        if func in HANDED_OUT or to_cpu:
            self.note(f"Tensor.{func.__name__}")
        return func(*args, **kwargs or {})


def count_reads(run: Callable[[], object]) -> list[Read]:
    """Every read of a device that ``run`` makes, in order, found by running it on a CPU.

    What only a CPU reads, the check of scores for NaN, is left out. Copies between devices do not happen on a CPU; what
    the kernels of a device read by themselves, as some of ``torch.linalg`` do, is not seen.
    """
    reads: list[Read] = []

    def note(operator: str) -> None:
        frame = _own_frame()
        while frame is not None and frame.f_code in ONLY_ON_A_CPU:
            return
        reads.append(Read(operator, place_of_call()))

    with _Methods(note), _Operators(note):
        run()
    return reads
