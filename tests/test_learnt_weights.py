"""What methods learn beside the weights of the host, when a model is loaded, reduced again or frozen.

Expectations are laws: what a file does not know of stays as it is, a file of a reduced model must have all of it, and a
model that is reduced again leaves the given one alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts import SETTINGS, make_host
from torch import nn

import effvit
from effvit.reducers import METHODS

LEARN = [name for name, method in METHODS.items() if method.learns]
PARAMETERS = [name for name in LEARN if name != "dymu"]  # which learns thresholds, in buffers
NEW = "ignore:.*random weights:UserWarning"

pytestmark = pytest.mark.filterwarnings(NEW)


def make_learner(method: str, **settings: Any) -> Any:
    """A model of the method, what it learns shaken, so that it is not what a new one has."""
    model = effvit.sparsify(make_host("class_token"), method, **(SETTINGS[method] | settings))
    with torch.no_grad():
        for parameter in learnt(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".reducer." in name}


def host_weights() -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in make_host("class_token").state_dict().items()}


class TestReducedAgain:
    @pytest.mark.parametrize("method", PARAMETERS)
    @pytest.mark.parametrize("trains", [True, False])
    def test_parameters_are_as_frozen_as_they_were(self, method: str, trains: bool) -> None:
        model = make_learner(method).requires_grad_(trains)
        again = effvit.sparsify(model, method, **SETTINGS[method])
        shared = learnt(again)
        assert shared.keys() == learnt(model).keys()
        for name, parameter in learnt(model).items():
            assert parameter.requires_grad is trains
            assert shared[name] is parameter

    @pytest.mark.parametrize("method", PARAMETERS)
    def test_they_are_taken_from_a_copy_that_never_trained(self, method: str) -> None:
        """As averages of weights are: a copy in eval mode, whose weights are written in place."""
        model, average = make_learner(method), make_learner(method).eval()
        with torch.no_grad():
            for own, value in zip(average.parameters(), model.parameters(), strict=True):
                own.copy_(value)
        again = learnt(effvit.sparsify(average, method, **SETTINGS[method]))
        for name, parameter in learnt(model).items():
            assert torch.equal(again[name], parameter)


class TestLoading:
    @pytest.mark.parametrize("method", LEARN)
    def test_weights_of_the_plain_host_leave_it_as_it_is(self, method: str) -> None:
        model, weights = make_learner(method), host_weights()
        before = {name: value.clone() for name, value in model.state_dict().items() if ".reducer." in name}
        model.load_state_dict(weights)
        after = model.state_dict()
        assert before.keys() | weights.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in (before | weights).items())

    @pytest.mark.parametrize("method", LEARN)
    def test_timm_loads_a_file_of_the_plain_host(self, method: str, tmp_path: Path) -> None:
        torch.save(host_weights(), tmp_path / "host.pth")
        model = make_learner(method)
        timm.models.load_checkpoint(model, tmp_path / "host.pth")
        assert torch.equal(model.head.weight, host_weights()["head.weight"])

    @pytest.mark.parametrize("method", PARAMETERS)
    def test_part_of_another_model_takes_them_too(self, method: str) -> None:
        whole = nn.ModuleDict({"teacher": make_learner(method), "student": make_learner(method)})
        state = whole.state_dict()
        state = {name: value for name, value in state.items() if not name.startswith("student.")}
        state |= {f"student.{name}": value for name, value in host_weights().items()}
        kept = {name: value.clone() for name, value in learnt(whole["student"]).items()}
        whole.load_state_dict(state)
        assert all(torch.equal(value, kept[name]) for name, value in learnt(whole["student"]).items())

    @pytest.mark.parametrize("method", PARAMETERS)
    def test_file_with_fewer_blocks_names_those_that_it_lacks(self, method: str, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"num_tokens": 9} if "num_tokens" in METHODS[method].defaults() else {}
        file = make_learner(method, reduce_at=(1,), **settings).state_dict()
        model = make_learner(method, reduce_at=(1, 2), **settings)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks.2.reducer'):
            model.load_state_dict(file)
        torch.save(file, tmp_path / "fewer.pth")
        with pytest.raises(ValueError, match=r"blocks\.2\.reducer.* is missing"):
            effvit.load_checkpoint(model, tmp_path / "fewer.pth")

    @pytest.mark.parametrize("method", PARAMETERS)
    def test_model_without_memory_is_assigned_them(self, method: str) -> None:
        file = make_learner(method).state_dict()
        with torch.device("meta"):
            model = effvit.sparsify(make_host("class_token"), method, **SETTINGS[method])
        model.load_state_dict(file, assign=True)
        assert all(torch.equal(value, file[name]) for name, value in model.state_dict().items())
