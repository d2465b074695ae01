"""Reads of a device: what a forward pass asks of the values of its tensors, found on a CPU.

Where Python needs a value, or a shape depends on values, it waits until a GPU has done all that was launched before. On
a CPU that costs nothing and so stays unseen: here every such read is found, with the line that made it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from effvit.reducers.base import check_bounded, check_distinct, check_finite, check_group, check_weights

__all__ = ["Read", "assert_reads", "count_reads", "place_of_call", "place_of_error"]

aten = torch.ops.aten

# Operators whose result is a Python value, or has a shape that depends on values.
VALUES = {
    aten._local_scalar_dense,  # item, bool, int, float, a tensor as an index of Python or as a condition
    aten.equal,
    aten.allclose,
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
# The checks of values read on a CPU alone, or where a user asks for it; see their docstrings.
ONLY_ON_A_CPU: set[CodeType] = {
    inspect.unwrap(check).__code__
    for check in (check_finite, check_bounded, check_weights, check_distinct, check_group)
}
AT_WORK = {__name__, "effvit.testing.fakes", "contextlib"}  # modules of which no frame is the place of a read


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


def _own(frame: FrameType) -> bool:
    """Whether a frame belongs neither to torch nor to what is at work here."""
    module: str = frame.f_globals.get("__name__", "")
    return module not in AT_WORK and module.partition(".")[0] != "torch"


def _own_frame() -> FrameType | None:
    """The innermost frame of our own that is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _own(frame):
        frame = frame.f_back
    return frame


def _place(frame: FrameType, line: int) -> str:
    return f"{frame.f_globals.get('__name__')}:{line} in {frame.f_code.co_name}"


def place_of_call() -> str:
    """The line outside torch that is running: "my_package.my_module:12 in reduce"."""
    frame = _own_frame()
    return "an unknown line" if frame is None else _place(frame, frame.f_lineno)


def place_of_error(error: BaseException) -> str:
    """The innermost line outside torch that an error came from, likewise."""
    lines = [(frame, line) for frame, line in walk_tb(error.__traceback__) if _own(frame)]
    return _place(*lines[-1]) if lines else "an unknown line"


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


def assert_reads(run: Callable[[], object], number: int) -> None:
    """``run`` reads the device ``number`` times; the message of the AssertionError names operators and lines."""
    reads = count_reads(run)
    lines = "".join(f"\n  {read}" for read in reads)
    assert len(reads) == number, (
        f"the device was read {len(reads)} times, but the blocks declare {number} reads in all (Reducer.reads_counts: "
        f"one in a forward pass of each block that reads how many tokens stay){lines}"
    )


def count_reads(run: Callable[[], object]) -> list[Read]:
    """Every read of a device that ``run`` makes, in order, found by running it on a CPU.

    What only a CPU reads, the check of scores for NaN, is left out. Copies between devices do not happen on a CPU; what
    the kernels of a device read by themselves, as some of ``torch.linalg`` do, is not seen.
    """
    reads: list[Read] = []

    def note(operator: str) -> None:
        frame = _own_frame()
        if frame is None or frame.f_code not in ONLY_ON_A_CPU:
            reads.append(Read(operator, place_of_call()))

    with _Methods(note), _Operators(note):
        run()
    return reads
