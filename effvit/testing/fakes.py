"""Models on fake CUDA tensors, which have a device and a shape but no values: what only a GPU would tell, without one.

A tensor made on another device, a copy between devices and a read of a value are errors here. The backward pass does
not run on fakes, and neither does what a model does only where it may read values (``effvit.recording.is_recorded``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effvit.testing.reads import place_of_call, place_of_error

__all__ = ["assert_runs_on_fakes"]

COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.copy}
READS = (DataDependentOutputException, DynamicOutputShapeException)


class _Call(nn.Module):
    """A function of a model as a module, so that ``functional_call`` gives it other weights."""

    def __init__(self, model: nn.Module, run: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(x)


class _NoCopies(TorchDispatchMode):
    """Between devices; a number of dimension 0 is no copy, since operators take it as an argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given = [y for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor)]
        if func.overloadpacket in COPIES:
            devices = [y.device for y in (*given, out)]
        elif func.overloadpacket is torch.ops.aten.index:
            devices = [y.device for y in given]
        else:
            return out
        if len(set(devices)) > 1:
            way = " to ".join(dict.fromkeys(device.type for device in devices))
            raise AssertionError(f"a copy from {way} by {func.overloadpacket}, at {place_of_call()}")
        return out


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """Autocast to bfloat16 on CUDA, which ``torch.autocast`` refuses where there is none, or no autocast."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def assert_runs_on_fakes(model: nn.Module, run: Callable[[Tensor], object], x: Tensor, autocast: bool = False) -> None:
    """``run``, which calls ``model``, works on images like x on a GPU: reads no value, makes nothing on another device.

    Args:
        model: Its weights take part as fake CUDA tensors; in training mode those that want a gradient still do.
        run: Images -> what the model makes of them: tensors, in lists, tuples or dicts.
        x: (B, 3, H, W), for the shape.
        autocast: Under autocast to bfloat16.

    Raises:
        AssertionError: Something does not; the message names the operator and the line.
    """
    call = _Call(model, run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty_like(value, device="cuda").requires_grad_(model.training and value.requires_grad)
            for name, value in (*call.named_parameters(), *call.named_buffers())
        }
        images = torch.empty_like(x, device="cuda")
        with torch.set_grad_enabled(model.training), _autocast(autocast), _NoCopies():
            try:
                out = torch.func.functional_call(call, state, (images,), tie_weights=True)
            except READS as error:
                raise AssertionError(f"{error} read a value from the device, at {place_of_error(error)}") from error
            except RuntimeError as error:
                raise AssertionError(f"{error}, at {place_of_error(error)}") from error
    tensors = [y for y in tree_leaves(out) if isinstance(y, Tensor)]
    assert tensors, "nothing came out of the model"
    elsewhere = {str(y.device) for y in tensors if y.device.type != "cuda"}
    assert not elsewhere, f"images on a GPU gave results on {', '.join(elsewhere)}"
