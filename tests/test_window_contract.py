"""The contract of methods inside windows, on the small hosts of ``effvit.testing``, and for a method from outside."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from effvit.reducers import METHODS, Reducer
from effvit.show.visualize import token_figure
from effvit.testing import WINDOW_HOSTS, WindowContract, make_window_model, parametrize_windows, window_pairs
from effvit.testing.models import noise
from effvit.testing.windows import WINDOW_SIZE

LAWS = [law for law in dir(WindowContract) if law.startswith("test_") and law != "test_compiles_as_one_graph"]


@parametrize_windows()
class TestEveryPair(WindowContract):
    """All methods that act inside windows on all hosts with windows."""

    @pytest.mark.slow  # as long as all other laws together
    def test_compiles_as_one_graph(self, method: str, host: str) -> None:
        super().test_compiles_as_one_graph(method, host)


class Neighbours(NamedTuple):
    """Two tokens that follow each other share one."""

    anchor: Tensor
    target: Tensor

    def merge(self, x: Tensor) -> tuple[Tensor, None]:
        return (x.gather(1, self._rows(self.anchor, x)) + x.gather(1, self._rows(self._behind(), x))) / 2, None

    def spread(self, y: Tensor) -> Tensor:
        return y.gather(1, self._rows(self.target, y))

    def _behind(self) -> Tensor:
        return (self.anchor + 1).clamp(max=self.target.shape[1] - 1)

    @staticmethod
    def _rows(index: Tensor, x: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


class Halves(Reducer):
    """Every second token goes into the one before it: a method as another package would write it."""

    name = "halves"
    summary = "every second token goes into the one before it"
    keeps_every_patch = True

    @classmethod
    def plan(cls, depth: int, *, merges: bool = True) -> dict[int, Reducer]:
        return {block: cls() for block in range(depth) if merges}

    @classmethod
    def off(cls) -> dict[str, bool]:
        return {"merges": False}

    def group(self, features: Tensor, x: Tensor, area: int) -> Neighbours:
        place = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)
        return Neighbours(place[:, ::2], place // 2)


@pytest.mark.parametrize(("law", "host"), [*zip(LAWS, itertools.cycle(WINDOW_HOSTS), strict=False)])
def test_method_from_outside_is_held_to_the_contract(monkeypatch: pytest.MonkeyPatch, law: str, host: str) -> None:
    """It says how tokens are grouped and nothing of any network."""
    monkeypatch.setitem(METHODS, "halves", Halves)
    assert ("halves", host) in window_pairs(["halves"])
    getattr(WindowContract(), law)("halves", host)


@pytest.mark.parametrize(("method", "host"), window_pairs())
def test_tokens_of_an_image_are_drawn(method: str, host: str) -> None:
    model = make_window_model(method, host)
    stages = model.trace_stages(noise(1, WINDOW_SIZE))
    figure = token_figure(model, Image.new("RGB", WINDOW_SIZE[::-1], "red"))
    assert figure.width > len(stages) * WINDOW_SIZE[1]


def test_method_that_drops_tokens_has_no_place_in_the_contract() -> None:
    with pytest.raises(ValueError, match=r"evit has neither Reducer\.group nor Reducer\.shrink.* leave it out of"):
        parametrize_windows("evit")
    assert window_pairs(["evit", "tome"]) == [("tome", host) for host in WINDOW_HOSTS]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.groups()])
def test_padding_of_a_window_is_grouped_the_same_whatever_rounding_makes_of_it(method: str) -> None:
    """Equal tokens are ranked by place: noise as of the matrix product of another runtime decides nothing."""
    reducer = METHODS[method].plan(4, **METHODS[method].example_in_windows())[0]
    draws = torch.Generator().manual_seed(0)
    padding = torch.randn(1, 1, 16, generator=draws).expand(5, 19, 16)
    features = torch.cat([torch.randn(5, 30, 16, generator=draws), padding], dim=1)
    rounded = features * (1 + 1e-6 * torch.randn(features.shape, generator=draws))
    groups, others = (reducer.group(y, y, 49) for y in (features, rounded))
    assert torch.equal(groups.target, others.target)
    assert torch.equal(groups.anchor, others.anchor)
