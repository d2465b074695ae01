"""``is_recorded`` under every recorder and transform, and not in plain runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from effvit.recording import compile_each_size, is_exported, is_recorded, traced_once


class Asker(nn.Module):
    """Adds one where the input is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        recorded = is_recorded(x)
        if not torch.compiler.is_compiling():  # graphs cannot append, what they compute tells
            self.answers.append(recorded)
        return x + 1 if recorded else x


def compiled(model: Asker, x: Tensor) -> None:
    result = torch.compile(model, backend="eager", fullgraph=True)(x)
    model.answers.append(bool((result == x + 1).all()))


def exported(model: Asker, x: Tensor) -> None:
    program = torch.export.export(model, (x,), strict=False)
    model.answers.append(bool((program.module()(x) == x + 1).all()))


def traced(model: Asker, x: Tensor) -> None:
    torch.jit.trace(model, x, check_trace=False)


def symbolically_traced(model: Asker, x: Tensor) -> None:
    torch.fx.symbolic_trace(model)


def made_fx(model: Asker, x: Tensor) -> None:
    make_fx(model)(x)


def batched(model: Asker, x: Tensor) -> None:
    torch.func.vmap(model)(x)


def differentiated(model: Asker, x: Tensor) -> None:
    torch.func.grad(lambda y: model(y).sum())(x)


def fake(model: Asker, x: Tensor) -> None:
    with FakeTensorMode() as mode:
        model(mode.from_tensor(x))


def meta(model: Asker, x: Tensor) -> None:
    model(x.to("meta"))


@pytest.mark.parametrize(
    "recorder",
    [compiled, exported, traced, symbolically_traced, made_fx, batched, differentiated, fake, meta],
)
def test_recorders_and_transforms_count(recorder: Callable[[Asker, Tensor], None]) -> None:
    torch._dynamo.reset()
    model = Asker()
    recorder(model, torch.randn(2, 3))
    assert model.answers
    assert all(model.answers)


def test_torch_export_is_told_from_torch_compile() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if is_exported() else x

    x = torch.zeros(2)
    assert torch.equal(torch.export.export(Asks(), (x,), strict=False).module()(x), x + 1)
    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(x), x)
    assert torch.equal(Asks()(x), x)


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_that_are_not_followed_have_a_graph_each(dynamic: bool | None) -> None:
    def padded(x: Tensor) -> Tensor:
        compile_each_size(x.shape[-2:])
        return F.pad(x, (0, -x.shape[3] % 7))

    counter = CompileCounter()
    compiled = torch.compile(padded, backend=counter, fullgraph=True, dynamic=dynamic)
    for height, width in ((8, 9), (9, 10), (12, 10)):
        x = torch.randn(2, 3, height, width)
        assert torch.equal(compiled(x), padded(x))
    assert counter.frame_count == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_plain_run_does_not(mode: Callable[..., torch.no_grad]) -> None:
    model = Asker()
    with mode():
        model(torch.randn(2, 3))
    assert model.answers == [False]


def test_trace_that_is_only_read_counts_as_a_plain_run_as_long_as_its_context() -> None:
    answers: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        answers.append(is_recorded(x))
        return x + 1

    with traced_once():
        torch.jit.trace(ask, torch.zeros(1), check_trace=False)
    torch.jit.trace(ask, torch.zeros(1), check_trace=False)
    assert answers == [False, True]
