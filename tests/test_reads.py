"""The two laws on devices: they find each way to read one, name its line, and leave out what only a CPU reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effvit.reducers.base import check_bounded, check_distinct, check_finite, check_group, check_weights
from effvit.testing import assert_reads, assert_runs_on_fakes, count_reads
from effvit.tokens import true_places

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "number": lambda x: float(x.sum()),
    "condition": lambda x: 1 if (x > 0).any() else 0,
    "index": lambda x: [10, 20][x[0, 0].long() * 0],
    "slice": lambda x: x[: (x > 0).sum()],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[0][x[0] > 0],
    "assigned rows": lambda x: x.clone().index_put_((x > 0,), x[x > 0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64), 0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
}
NO_READS: dict[str, Callable[[Tensor], object]] = {
    "number for a mask": lambda x: x.masked_fill(x > 0, 1.0),
    "rows by numbers": lambda x: x[x.argsort(0)[:, 0]],
    "device of another": lambda x: x.to(x.device),
    "repeats": lambda x: x.repeat_interleave(2, 0),
    "places": lambda x: true_places(torch.ones(3, dtype=torch.bool), 3),
    "check of scores": lambda x: check_finite(x, "scores", None),
    "check of features": lambda x: check_bounded(x, "features"),
    "check of ids": lambda x: check_distinct(x.argsort(1), None, 4, "ids"),
    "check of groups": lambda x: check_group(x.argsort(1).argsort(1), x.argsort(1), None, "groups"),
    "check of relevances": lambda x: check_weights(x, "relevances", ""),
}


@pytest.mark.parametrize("name", READS)
def test_every_way_to_read_a_value_is_found(name: str) -> None:
    reads = count_reads(lambda: READS[name](torch.rand(3, 4) + 1))
    assert reads
    assert all(read.place.startswith(f"{__name__}:") for read in reads)


@pytest.mark.parametrize("name", NO_READS)
def test_what_reads_nothing_is_not_counted(name: str) -> None:
    assert not count_reads(lambda: NO_READS[name](torch.rand(3, 4)))


def test_each_read_counts_once() -> None:
    x = torch.rand(3, 4)
    assert [str(read.operator) for read in count_reads(lambda: (x.sum().item(), x.tolist()))] == [
        "aten._local_scalar_dense",
        "Tensor.tolist",
    ]


def test_wrong_number_of_reads_is_told_with_operators_and_lines() -> None:
    with pytest.raises(
        AssertionError,
        match=r"read 1 times, but the blocks declare 0 .*\n *aten\._local_scalar_dense at test_reads:\d+ in <lambda>",
    ):
        assert_reads(lambda: torch.ones(2).sum().item(), 0)


def test_true_places_are_those_of_nonzero() -> None:
    for mask in (torch.rand(5, 7) < 0.4, torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert torch.equal(true_places(mask, int(mask.sum())), mask.flatten().nonzero().squeeze(1))


class Made(nn.Module):
    """A model of one layer that does something else with its images first."""

    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> object:
        return self.layer(self.make(x))


FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "read": (lambda x: x * x.sum().item(), "aten._local_scalar_dense.default read a value"),
    "shape": (lambda x: x[(x > 0).any(1)], "aten.nonzero.default read a value"),
    "list": (lambda x: x * len(x[0].tolist()), "read a value"),
    "made elsewhere": (lambda x: x + torch.arange(4), "two different devices"),
    "taken away": (lambda x: x + x.cpu().sum(), "a copy from cuda to cpu"),
    "brought": (lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]), "a copy from cpu to cuda"),
    "index brought": (lambda x: x[torch.tensor([0, 1])], "a copy from cuda to cpu by aten.index"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_on_a_device_is_found_and_its_line_named(name: str) -> None:
    make, message = FAULTS[name]
    model = Made(make)
    with pytest.raises(AssertionError, match=rf"{message}.*at {__name__}:\d+ in <lambda>"):
        assert_runs_on_fakes(model, model, torch.rand(3, 4))


def test_result_on_another_device_is_a_fault() -> None:
    model = nn.Identity()
    with pytest.raises(AssertionError, match="images on a GPU gave results on cpu"):
        assert_runs_on_fakes(model, lambda x: torch.zeros(2), torch.rand(3, 4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_mode_and_autocast_are_really_on(training: bool, autocast: bool) -> None:
    model = nn.Linear(4, 4).train(training)
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        seen.append(model(x))
        return seen[0]

    assert_runs_on_fakes(model, run, torch.rand(3, 4), autocast)
    assert seen[0].requires_grad == training
    assert seen[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert not torch.is_autocast_enabled("cuda")
    assert model.weight.device.type == "cpu"
