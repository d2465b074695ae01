"""``torch.compile`` of models whose token counts depend on the image, without giving up what they save."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

import effvit.packed_operator  # noqa: F401 - graphs call it by its name
from effvit.block import ReducibleBlock, check_model
from effvit.recording import counts_in_graphs, is_recorded
from effvit.reducers import Reducer

__all__ = ["compile"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def compile(model: ModelT, **options: Any) -> ModelT:
    """The model itself, whose calls run compiled from now on; ``state_dict``, class and all methods stay.

    A model of fixed token counts is compiled as by ``model.compile(**options)``. Where counts depend on the image,
    plain ``torch.compile`` makes a graph of all slots, which saves nothing. For ATS the graph reads the counts while it
    runs, in each block as a plain run does, and goes on with sizes that it did not know before. So any counts take the
    same graph, padded or packed. Of other such methods (DyMU, ALGM; see ``Reducer.graph_reads_counts``) only the MLPs
    of the blocks are compiled, for all sizes at once: the rest runs as it is, and they keep what they save.

    Else calls are compiled: ``forward_features``, ``forward_intermediates`` and ``forward_tokens`` run as they are, but
    a model of ``features_only=True``, or any module that holds a reduced one, can be given as a whole. Copies, pickles
    and what ``effvit.sparsify`` makes of the model are not compiled. A second call takes the new options.

    Args:
        model: A model of ``effvit.sparsify`` or ``timm.create_model``, or a module that holds some.
        options: Those of ``torch.compile``, such as ``mode``, ``dynamic``, ``fullgraph`` and ``backend``. What is
            compiled for all sizes at once is so whatever ``dynamic`` says.

    Raises:
        TypeError: No module, or what ``torch.compile`` made of one.
    """
    if isinstance(model, OptimizedModule):
        raise TypeError(
            "the model is compiled by torch.compile already; give effvit.compile the model that torch.compile was given"
        )
    check_model(model)
    ragged = [module for module in model.modules() if isinstance(module, Reducer) and module.variable_length]
    if all(reducer.graph_reads_counts for reducer in ragged):
        model._compiled_call_impl = _recordable(model, torch.compile(_own_call(), **options), bool(ragged))
        return model
    of_any_size = torch.compile(_own_call(), **{**options, "dynamic": True})
    for mlp in (cast("nn.Module", part.mlp) for part in model.modules() if isinstance(part, ReducibleBlock)):
        mlp._compiled_call_impl = _recordable_part(mlp, of_any_size)
    return model


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def _own_call() -> Callable[..., Any]:
    """``_call`` with a code object of its own.

    To that dynamo ties what it has compiled: eight forms at most, of all models together if they shared it, and a plain
    ``torch.compile`` of the same model holds graphs of all slots, which must not be taken here.
    """
    return FunctionType(_call.__code__.replace(), globals(), _call.__name__)


def _recordable(model: nn.Module, compiled: Callable[..., Any], counts: bool) -> Callable[..., Any]:
    """The compiled ``_call`` of the model, in whose graphs token counts are read or not; recorders meet the model."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return model._call_impl(*args, **kwargs)
        with counts_in_graphs() if counts else nullcontext():
            return compiled(model, *args, **kwargs)

    return call


def _recordable_part(part: nn.Module, compiled: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """The compiled ``_call`` of a module that takes one tensor; recorders meet the module."""

    def call(x: Tensor) -> Tensor:
        recorded = is_recorded(x) or torch.jit.is_tracing()
        out: Tensor = part._call_impl(x) if recorded else compiled(part, x)
        return out

    return call
