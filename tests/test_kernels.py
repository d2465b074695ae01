"""Kernels that each method launches beside its dense host in a reducing block: exact counts, no timing.

A method that begins to launch more must say why. What a batch needs once (ranges, GTP's graph) counts as a share of the
blocks that reduce.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import effvit
from effvit.measure.launches import device_kernels, launches
from effvit.reducers import METHODS

SIZE = (2, 3, 224, 224)
# Kernels a reducing block of DeiT-Tiny for two images on a CPU, settings the method's defaults unless named.
KERNELS: dict[str, tuple[dict[str, Any], float]] = {
    "evit": ({}, 15.0),
    "tome": ({"r": 13}, 29.25),
    "gtp": ({}, 33.83),
    "ats": ({}, 46.33),
    "zero_tprune": ({}, 79.8),
    "dymu": ({"r_total": 96}, 57.75),  # calibrated, so that every block merges some
    "expedite": ({}, 134.0),  # in one block of the model
    "hot": ({}, 32.0),
}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").eval()


def test_every_method_has_its_row() -> None:
    assert set(KERNELS) == set(effvit.list_methods())


@pytest.mark.parametrize("method", KERNELS)
def test_a_reducing_block_launches_as_many_kernels_as_the_table_says(method: str, dense: nn.Module) -> None:
    settings, expected = KERNELS[method]
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    model = effvit.sparsify(dense, method, **settings).eval()
    if METHODS[method].learns:
        effvit.calibrate(model, [x])
    added = (launches(model, x) - launches(dense, x)) / len(model.reducers)
    assert added == pytest.approx(expected, abs=0.05)


def test_a_cpu_has_no_kernels_of_a_device(dense: nn.Module) -> None:
    assert device_kernels(dense, torch.zeros(SIZE)) is None
