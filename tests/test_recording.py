"""``is_recorded`` under every recorder and transform, and not in plain runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from effvit.recording import is_recorded


class Asker(nn.Module):
    """Adds one where the input is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        recorded = is_recorded(x)
        if not torch.compiler.is_dynamo_compiling():  # the graph cannot append
            self.answers.append(recorded)
        return x + 1 if recorded else x


def compiled(model: Asker, x: Tensor) -> None:
    result = torch.compile(model, backend="eager", fullgraph=True)(x)
    model.answers.append(bool((result == x + 1).all()))


def exported(model: Asker, x: Tensor) -> None:
    program = torch.export.export(model, (x,), strict=False)
    model.answers = [bool((program.module()(x) == x + 1).all())]  # export gives the list back as it was


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_plain_run_does_not(mode: Callable[..., torch.no_grad]) -> None:
    model = Asker()
    with mode():
        model(torch.randn(2, 3))
    assert model.answers == [False]
