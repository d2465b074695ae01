"""Kernels that each method launches beside its dense host in a reducing block: exact counts, no timing.

At batch 1 and on a GPU the number of launches decides, so a method that begins to launch more must say why. A kernel is
an ATen call that is no view, no allocation and no read of a value. What a batch needs once (ranges, GTP's graph) counts
as a share of the blocks that reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effvit
from effvit.reducers import METHODS

FREE = {
    *("view", "expand", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "permute", "as_strided", "detach"),
    *("alias", "unbind", "split", "split_with_sizes", "_unsafe_view", "diagonal", "lift_fresh", "unfold", "narrow"),
    *("_reshape_alias", "chunk", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "sym_size"),
    *("_local_scalar_dense", "is_nonzero"),
}
SIZE = (2, 3, 224, 224)
# Kernels a reducing block of DeiT-Tiny for two images on a CPU, settings the method's defaults unless named.
KERNELS: dict[str, tuple[dict[str, Any], float]] = {
    "evit": ({}, 15.67),
    "tome": ({"r": 13}, 30.17),
    "gtp": ({}, 37.67),
    "ats": ({}, 54.22),
    "zero_tprune": ({}, 85.2),
    "dymu": ({"r_total": 96}, 80.67),  # calibrated, so that every block merges some; 5 spare it four reads
    "expedite": ({}, 133.0),  # in one block of the model
    "hot": ({}, 32.0),
}


class Launches(TorchDispatchMode):
    """Counts the kernels that are launched inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = function._schema.name.split("::")[1].rstrip("_")
        self.kernels[name] += name not in FREE
        return function(*args, **(kwargs or {}))


def launches(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        model(x)  # what is made once and kept is not counted
        with Launches() as counter:
            model(x)
    return counter.kernels.total()


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
