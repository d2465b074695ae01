"""Reading golden cases and comparing with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SINGLE, DOUBLE = 1e-5, 1e-10
# What a json says of where a case comes from and of how near its decisions are: nothing a comparison could follow.
PROVENANCE = {
    *("method", "case", "note", "notes", "legend", "summary", "source", "reference", "script", "formula", "weights"),
    *("shims", "keys", "tensors", "file_bytes", "official", "repo", "official_repo", "commit", "official_commit"),
    *("torch", "timm", "versions", "device", "threads", "seed", "seed_attempts", "accepted", "repeat_bit_equal"),
    *("decisions_same_f64", "f64_same_decisions", "no_grad_diff", "grad_output_equals_eval", "qk", "cls_group_ok"),
    *("min_margin", "min_gaps", "min_sparsity_threshold_rel_gap", "min_knn_cosine_gap", "smallest_decision_margin"),
    *("decision_margin", "cut_margin", "variance_margin", "calibration_gaps", "max_abs_f32_f64", "f32_f64_max_diff"),
    *("max_diff_exact_vs_expanded", "output_absmax", "out_absmax", "grad_absmax", "grad_max_abs_f32_f64"),
    *("min_adjacent_rel_gap", "max_abs_error_f64", "max_rel_f64", "margins", "margin_is", "files", "licence"),
    *(
        "official_part",
        "per_image",
        "order_from",
        "checked",
        "shim",
        "state_names",
        "max_rel_grad_error_f64",
        "margin_note",
        "scikit_learn",
        "min_density_gap",
        "note_v",
    ),
}
# Names of the recorded input, whose first axis is the batch.
INPUTS = ("input", "input_compressed", "attention", "importance", "cls/attn", "s0/x", "q", "tokens", "top_attention")
LOSSES = ("output.square().sum()", "sum of squared outputs")  # of the recorded gradients, summed over outputs
DIVERSE_LOSS = "mean of squared outputs + attention diversification loss of this block's map"  # of golden_tapadl's


class Record(Mapping[str, Any]):
    """An object of a json that knows which of its entries were read; objects inside it do too."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = {key: recorded(value) for key, value in content.items()}
        self.unread = set(content) - PROVENANCE

    def __getitem__(self, key: str) -> Any:
        value = self.content[key]
        self.unread.discard(key)
        return value

    def __contains__(self, key: object) -> bool:  # asking whether an entry is there is not reading it
        return key in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


def recorded(value: Any) -> Any:
    """A value of a json with each object in it as a ``Record``."""
    if isinstance(value, list):
        return [recorded(item) for item in value]
    return Record(value) if isinstance(value, dict) else value


def unread(value: Any, name: str = "") -> list[str]:
    """Dotted names of the entries that nobody read, in a Record or a list; inside PROVENANCE there are none."""
    if isinstance(value, list):
        return [entry for i, item in enumerate(value) for entry in unread(item, f"{name}{i}.")]
    if not isinstance(value, Record):
        return []
    inside = [
        entry for key in value.content.keys() - PROVENANCE for entry in unread(value.content[key], f"{name}{key}.")
    ]
    return sorted([f"{name}{key}" for key in value.unread] + inside)


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
    def config(self) -> Record:
        return Record(json.loads(self.path.read_text()))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def check_conditions(self) -> None:
        """Assert that batch, dtype and size of the recorded input are those the configuration names.

        They are arguments of the script that made the case. What only some methods record is read by their readers.
        """
        given = next((self[key] for key in INPUTS if key in self), None)
        if given is None:  # functions of sizes alone
            assert "subcases" in self.config, f"none of the inputs {', '.join(INPUTS)} is recorded"
            return
        inside = self.config.get("config", {})
        for place in (self.config, inside):
            for key in ("batch", "batch_size", "B"):
                assert place.get(key, len(given)) == len(given), (
                    f"{key} is {place[key]}, but the input has {len(given)}"
                )
            for key in ("img", "shape"):
                if key in place and isinstance(place[key], list):
                    size = [*given.shape] if key == "shape" else [*given.shape[2:]]
                    assert place[key] == size, f"{key} is {place[key]}, but the input is {tuple(given.shape)}"
            if str(place.get("dtype", "")).startswith("torch."):
                assert place["dtype"] == str(given.dtype)
        for key in ("grad_loss", "loss"):
            stated = self.config.get(key)
            assert stated is None or stated.startswith((*LOSSES, DIVERSE_LOSS)), (
                f"the gradients of {stated!r} are not compared"
            )

    @property
    def training(self) -> bool:
        """Whether the case was recorded in training mode; any other mode than that and "eval" is an error."""
        mode = self.config.get("mode", "eval").split(",")[0]
        assert mode in ("eval", "train"), f"mode {mode!r} is not compared"
        return mode == "train"

    def evaluated(self) -> None:
        """Assert that the case was recorded in eval mode, the only one its reader compares."""
        assert not self.training, "the case was recorded in training mode, but is compared in eval mode"

    def finish(self) -> None:
        """Raise an AssertionError that names the arguments which the comparison did not read."""
        left = unread(self.config)
        assert not left, f"{self.method}/{self.name}: recorded, but not read by the comparison: {', '.join(left)}"

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


def plain_host(case: Case, **kwargs: Any) -> VisionTransformer:
    """timm's ViT of the sizes, weights and dtype that a case records, in eval mode."""
    config = case.config
    case.evaluated()
    host = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        num_classes=config["num_classes"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        **kwargs,
    )
    assert set(config["state_names"]) == case.state().keys()
    host.to(getattr(torch, config["dtype"])).load_state_dict(case.state())
    return host.eval()


def expect(record: Mapping[str, Any], **values: Any) -> None:
    """Assert that arguments which the package has no counterpart of have the one value that needs none, if recorded."""
    for key, value in values.items():
        if key in record:
            assert record[key] == value, f"{key}={record[key]!r} has no counterpart here, only {value!r}"


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
