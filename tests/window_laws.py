"""Laws that tests of hosts with windows share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops
from effvit.protocols import Size


def assert_checkpointing_changes_nothing(model: nn.Module, x: Tensor) -> None:
    """Neither scores nor gradients, of which every parameter has one."""
    scores = model(x)
    scores.square().sum().backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in plain.items() if gradient is None or not gradient.any()] == []
    model.zero_grad()
    model.set_grad_checkpointing()
    again = model(x)
    again.square().sum().backward()
    assert torch.equal(again, scores)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def assert_closed_form_is_the_count(model: nn.Module, size: Size) -> None:
    """On images (3, H, W), with every operator of the trace counted."""
    assert sum(closed_form_macs(model, (3, *size)).values()) == count_flops(model, (3, *size), strict=True).total


def assert_half_precision_runs(model: nn.Module, x: Tensor) -> None:
    """Under autocast, and in bfloat16 throughout."""
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
