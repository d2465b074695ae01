"""Kernels and memory that each method takes beside its dense host: exact counts, no timing.

A method that begins to launch more must say why. What a batch needs once (ranges, GTP's graph) counts as a share of the
blocks that reduce.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import effvit
from effvit.hosts.calibration import needs_calibration
from effvit.measure.launches import device_kernels, launches
from effvit.measure.profiler import peak_memory

SIZE = (2, 3, 224, 224)
# Kernels a reducing block of DeiT-Tiny for two images on a CPU, settings the method's defaults unless named.
KERNELS: dict[str, tuple[dict[str, Any], float]] = {
    "evit": ({}, 15.0),
    "tome": ({"r": 13}, 28.25),
    "gtp": ({}, 33.83),
    "ats": ({}, 46.33),
    "zero_tprune": ({}, 79.8),
    "dymu": ({"r_total": 96}, 58.33),  # calibrated, so that every block merges some
    "algm": ({"threshold": 0.1}, 96.5),  # in two blocks of the model
    "dynamicvit": ({}, 20.0),
    "diffrate": ({}, 43.36),
    "expedite": ({}, 134.0),  # in one block of the model
    "hot": ({}, 32.0),
    "pitome": ({}, 44.33),
    "mctf": ({}, 105.73),  # its map is formed and pooled
    "vid_tldr": ({}, 62.5),  # in two blocks of the model
    "cubistmerge": ({}, 133.0),  # in one block of the model
    "dpcknn": ({}, 54.33),
    "kmedoids": ({}, 32.17),  # half of the blocks only weigh
    "sinkhorn": ({}, 27.0),
    "patchmerger": ({}, 8.0),
    "atc": ({}, 1157.0),  # for each token that goes
    "random": ({}, 8.67),
    "uniform": ({}, 8.67),
    "radial": ({}, 8.67),
}

SQUARE = ("mctf", "kmedoids", "sinkhorn", "atc")  # they hold a map, all distances, or shares of all tokens in all codes


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
    if needs_calibration(model):
        effvit.calibrate(model, [x])
    added = (launches(model, x) - launches(dense, x)) / len(model.reducers)
    assert added == pytest.approx(expected, abs=0.05)


def test_a_cpu_has_no_kernels_of_a_device(dense: nn.Module) -> None:
    assert device_kernels(dense, torch.zeros(SIZE)) is None


@pytest.fixture(scope="module")
def large() -> tuple[nn.Module, Tensor, int]:
    """A host of 1,600 patches, an image, and the peak bytes of the host's forward pass."""
    torch.manual_seed(0)
    host = timm.create_model("deit_tiny_patch16_224", img_size=640).eval()
    x = torch.randn(1, 3, 640, 640)
    return host, x, peak_memory(host, x)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in KERNELS if name not in SQUARE])
def test_memory_of_large_images_stays_near_that_of_the_dense_model(
    method: str, large: tuple[nn.Module, Tensor, int]
) -> None:
    """What grows with the square of the tokens, a map or all distances, would be far above."""
    host, x, dense_peak = large
    model = effvit.sparsify(host, method).eval()
    if needs_calibration(model):
        effvit.calibrate(model, [x])
    assert peak_memory(model, x) < 1.5 * dense_peak
