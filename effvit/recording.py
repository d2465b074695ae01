"""Whether values may be read: the one place that decides what "recorded" means.

A method whose token count depends on the image, or a check that looks at values, may do so only where it runs on the
tensors themselves. Everything that depends on data asks ``is_recorded`` and, where the answer is yes, computes the same
result with counts fixed by the shapes alone, or raises an error that names the way that works.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch._dynamo.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = [
    "compile_each_size",
    "count_in_graph",
    "counts_in_graphs",
    "graphs_count",
    "is_exported",
    "is_exported_again",
    "is_legacy_onnx",
    "is_recorded",
    "refuse_fx",
    "refuse_legacy_onnx",
    "refuse_open_sides",
    "traced_once",
]

_TRACED_ONCE: ContextVar[bool] = ContextVar("traced_once", default=False)
_COUNTS_IN_GRAPHS: ContextVar[bool] = ContextVar("counts_in_graphs", default=False)


@contextmanager
def traced_once() -> Iterator[None]:
    """Context in which ``torch.jit.trace`` counts as a plain run: for traces that are read, and never run again."""
    token = _TRACED_ONCE.set(True)
    try:
        yield
    finally:
        _TRACED_ONCE.reset(token)


@contextmanager
def counts_in_graphs() -> Iterator[None]:
    """Context in which what ``torch.compile`` compiles reads token counts, as plain runs do; see ``graphs_count``."""
    token = _COUNTS_IN_GRAPHS.set(True)
    try:
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            yield
    finally:
        _COUNTS_IN_GRAPHS.reset(token)


@torch.compiler.assume_constant_result  # dynamo cannot trace into a ContextVar
def _counts_in_graphs() -> bool:
    return _COUNTS_IN_GRAPHS.get()


def graphs_count() -> bool:
    """Whether a graph is compiled that reads token counts while it runs; sizes made of them are unknown until then."""
    return torch.compiler.is_dynamo_compiling() and _counts_in_graphs()


def count_in_graph(count: Tensor, least: int, most: int) -> int:
    """A count from ``least`` to ``most`` as a size of the graph that reads it; another is an error when it runs.

    Compilers take sizes of 0 and 1 for special, so a size that may be one of them, or whose half may, is of no use.
    """
    size = int(count.item())
    torch._check(size >= least)
    torch._check(size <= most)
    return size


def is_legacy_onnx() -> bool:
    """Whether ``torch.onnx.export`` with ``dynamo=False``, the exporter by way of a trace, is at work."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def is_exported() -> bool:
    """Whether ``torch.export`` records in its default mode, which runs the model; False under ``torch.compile``.

    ``torch.compiler.is_exporting`` is True under ``torch.compile`` too.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


@torch.compiler.assume_constant_result  # dynamo cannot trace into its imports
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def is_exported_again() -> bool:
    """Whether ``torch.onnx.export`` with ``dynamo=True`` records in strict mode, after an error in its default mode.

    Strict mode, which is dynamo's, shows a size that was to be dynamic as a number of Python.
    """
    return torch.compiler.is_dynamo_compiling() and _in_onnx_export()


def num_open_sides(grid: Iterable[int]) -> int:
    """Sides of a grid, 0 to 2, that an exporter leaves open, so that a count read from them is an expression.

    0 under ``torch.compile``, which makes another graph for another size, and for placeholders of ``torch.fx``.
    """
    if torch.compiler.is_dynamo_compiling() or isinstance(grid, torch.fx.Proxy):
        return 0
    return sum(isinstance(side, torch.SymInt) for side in grid)


def refuse_open_sides(sides: Iterable[int], follows: int, name: str, cause: str) -> None:
    """Raise a ValueError where ``torch.export`` would fix a size silently, or compute on counts for hours.

    Args:
        sides: Height and width, of images or of a patch grid.
        follows: Sides of the two that may be open.
        name: What is exported, for the message.
        cause: What depends on the sides, in the plural.
    """
    if num_open_sides(sides) > follows:
        limit = ("a dynamic height or width; fix both", "both height and width dynamic; fix one of them")[follows]
        raise ValueError(
            f"{name} has {cause} that torch.export cannot follow with {limit}, and export once for every size "
            "(the batch may be dynamic)"
        )


def compile_each_size(sides: Iterable[int]) -> None:
    """Let ``torch.compile`` make a graph for every height and width, not one for all after many minutes of algebra.

    Args:
        sides: Height and width of images.
    """
    if torch.compiler.is_dynamo_compiling():
        for side in sides:
            operator.index(side)  # a Python number is asked for, so dynamo guards on its value


def refuse_legacy_onnx(name: str) -> None:
    """Raise a ValueError under ``torch.onnx.export`` with ``dynamo=False``.

    That exporter fixes batch sizes that were asked to be dynamic, and adds rows of equal number only once.

    Args:
        name: What cannot be exported, for the message.
    """
    if is_legacy_onnx():
        raise ValueError(
            f"{name} cannot be exported by torch.onnx.export with dynamo=False, whose graphs compute something else; "
            "use torch.onnx.export(..., dynamo=True)"
        )


def refuse_fx(x: Tensor, cause: str, remedy: str, extractors: bool = True) -> None:
    """Raise a TypeError if ``x`` is a placeholder of ``torch.fx``, for shapes that are known only at run time.

    Args:
        x: What enters the model.
        cause: Why it cannot be traced, for the message.
        remedy: What to do.
        extractors: Feature extractors too, which know the modules and functions of timm that must not be traced.
    """
    if isinstance(x, torch.fx.Proxy) and (extractors or type(x.tracer) is torch.fx.Tracer):
        raise TypeError(f"{cause}, so torch.fx cannot trace it; {remedy}")


def is_recorded(x: Tensor) -> bool:
    """Whether operations on ``x`` are recorded, transformed or only simulated, so that no value of it may be read.

    That is so under ``torch.compile``, ``torch.export``, both ONNX exporters (which trace or export),
    ``torch.jit.trace``, ``make_fx``, CUDA graph capture and the transforms of ``torch.func``, and for placeholders of
    ``torch.fx``, fake tensors and tensors on the meta device.
    """
    if torch.compiler.is_compiling():  # first, since dynamo folds it to a constant and skips the rest
        return True
    if torch.jit.is_tracing() and not _TRACED_ONCE.get():
        return True
    if type(x) is not Tensor and isinstance(x, (torch.fx.Proxy, FakeTensor)):
        return True
    if get_proxy_mode() is not None or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    device = x.device.type
    return device == "meta" or (device == "cuda" and torch.cuda.is_current_stream_capturing())
