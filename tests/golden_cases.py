"""Reading golden cases and comparing with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SINGLE, DOUBLE = 1e-5, 1e-10


@dataclass
class Case:
    """One golden case: its tensors, its configuration, and the worst error met so far."""

    method: str
    path: Path  # of the json
    worst: float = field(default=0.0)

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def state(self) -> dict[str, Tensor]:
        """The official weights, without the all-zero ``out_zero_mask`` of ATS, which is no weight."""
        return {
            key.removeprefix("state/"): value
            for key, value in self.tensors.items()
            if key.startswith("state/") and not key.endswith("out_zero_mask")
        }

    def close(self, actual: Tensor, key: str, tolerance: float = SINGLE) -> None:
        """Assert that actual equals the recorded tensor within ``tolerance`` of its largest entry."""
        self.near(actual, self[key], key, tolerance)

    def near(self, actual: Tensor, expected: Tensor, key: str, tolerance: float = SINGLE) -> None:
        """Assert that actual equals the expected tensor, which ``key`` names, as ``close`` does."""
        assert actual.shape == expected.shape, f"{key}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
        scale = expected.abs().max().clamp(min=1e-12).double()
        error = float(((actual.detach().double() - expected.double()).abs().max() / scale) if actual.numel() else 0)
        self.worst = max(self.worst, error) if tolerance == SINGLE else self.worst
        assert error <= tolerance, f"{key}: relative error {error:.2e} above {tolerance:.0e}"

    def equal(self, actual: Tensor, key: str) -> None:
        """Assert that actual equals the recorded integers."""
        assert torch.equal(actual.cpu().long(), self[key].long()), f"{key} differs"

    def same_sets(self, actual: Tensor, key: str) -> None:
        """Assert that every row holds the same integers, in any order."""
        assert torch.equal(actual.sort(-1).values, self[key].sort(-1).values), f"{key}: sets differ"

    def gradients(self, model: nn.Module, output_mode: str = "eval") -> None:
        """Compare all recorded gradients of loss = output.square().sum()."""
        recorded = [key for key in self.tensors if key.startswith("grad/")]
        if not recorded and "grad_input" not in self:
            return
        model.train(output_mode == "train")
        x = self["input"].clone().requires_grad_()
        loss = model(x).square().sum()
        loss.backward()
        if "loss" in self:
            self.close(loss.reshape(1), "loss")
        for key in recorded:
            gradient = model.get_parameter(key.removeprefix("grad/")).grad
            assert gradient is not None, key
            self.close(gradient, key)
        if "grad_input" in self:
            assert x.grad is not None
            self.close(x.grad, "grad_input")
        model.eval()

    def official_gradients(self, model: Any) -> dict[str, Tensor]:
        """The recorded gradients under our names, NaN where none was recorded; empty without any.

        Weights nobody recorded a gradient of are NaN in the official dictionary, so that a rule of
        ``adapt_state_dict`` which joins or permutes weights can be used for their gradients as it is.
        """
        recorded = {key.removeprefix("grad/"): value for key, value in self.tensors.items() if key.startswith("grad/")}
        unknown = {
            key: torch.full_like(value, float("nan"))
            for key, value in self.state().items()
            if value.is_floating_point()
        }
        return model.adapt_state_dict(unknown | recorded)[0] if recorded else {}

    def adapted_gradients(
        self,
        model: Any,
        outputs: Callable[[Tensor], list[Tensor]],
        tolerance: float = SINGLE,
        left_out: tuple[str, ...] = (),
    ) -> None:
        """Compare the recorded gradients of the summed squares of ``outputs(input)`` under the official names.

        Parameters whose name starts with one of ``left_out`` get their gradient, but are left to the caller to compare.
        """
        official = self.official_gradients(model)
        if not official and "grad_input" not in self:
            return
        model.zero_grad()
        x = self["input"].clone().requires_grad_()
        sum(out.square().sum() for out in outputs(x)).backward()
        compared = 0
        for name, expected in official.items():
            known = ~expected.isnan()
            if known.any() and not name.startswith(left_out):
                gradient = model.get_parameter(name).grad
                assert gradient is not None, name
                self.near(gradient[known], expected[known], f"gradient of {name}", tolerance)
                compared += 1
        assert compared or not official, "no recorded gradient belongs to a parameter of the model"
        if "grad_input" in self:
            assert x.grad is not None
            self.close(x.grad, "grad_input", tolerance)


def check_official_keys(
    content: dict[str, Any],
    name: str,
    dropped: tuple[str, ...] = (),
    take: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> None:
    """Assert that a list of official parameter names and shapes becomes exactly ours.

    Args:
        content: A ``keys_*.json`` of an architecture.
        name: Our registered name.
        dropped: Parts of the names that have no place in our model; anything else must be used.
        take: Stages of a dense model, which ends with them; None for a classifier.
        kwargs: Arguments of ``timm.create_model``.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
        if take is not None:
            model.prune_intermediate_layers(take, prune_norm=True)
        official = {
            key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (dtype, shape) in content["keys"].items()
        }
    state, unused = model.adapt_state_dict(official)
    assert {key: tuple(v.shape) for key, v in state.items()} == {
        key: tuple(v.shape) for key, v in model.state_dict().items()
    }
    assert all(any(part in key for part in dropped) for key in unused), unused


def find_cases(folder: Path, method: str) -> list[Case]:
    """Cases of one method with tensors beside the json, in order of their names."""
    if not (folder / method).is_dir():
        return []
    return [
        Case(method, path)
        for path in sorted((folder / method).glob("*.json"))
        if path.with_suffix(".safetensors").is_file()
    ]


def find_tables(folder: Path, method: str) -> list[Path]:
    """json files without tensors: schedules and lists of parameter names."""
    if not (folder / method).is_dir():
        return []
    return [path for path in sorted((folder / method).glob("*.json")) if not path.with_suffix(".safetensors").is_file()]
