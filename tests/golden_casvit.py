"""Agreement of CAS-ViT with the official code (Tianfang-Zhang/CAS-ViT@041d2d6)."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, check_official_keys, expect
from torch import Tensor

from effvit.architectures.casvit import CASViT

# Official argument -> ours.
ARGUMENTS = {
    "layers": "depths",
    "embed_dims": "dims",
    "mlp_ratios": "mlp_ratio",
    "num_classes": "num_classes",
    "attn_bias": "qkv_bias",
    "drop_rate": "proj_drop_rate",
    "drop_path_rate": "drop_path_rate",
    "distillation": "distilled",
    "fork_feat": "out_norm",
}
STAGES = (0, 1, 2, 3)


def build(case: Case) -> CASViT:
    expect(case.config["config"], cls="RCViT")
    kwargs = dict(case.config["config"]["kwargs"])
    assert not set(kwargs) - set(ARGUMENTS), f"arguments without a counterpart: {sorted(set(kwargs) - set(ARGUMENTS))}"
    model = CASViT(**{ARGUMENTS[key]: value for key, value in kwargs.items()})
    if model.out_norms is not None:
        model.prune_intermediate_layers(STAGES, prune_norm=True)
    state, dropped = model.adapt_state_dict(case.state())
    assert not dropped
    model.load_state_dict(state)
    model.to(case["input"].dtype)
    return model.train(case.training)


def outputs(model: CASViT, x: Tensor) -> list[Tensor]:
    """The official outputs: maps of a dense model, scores of both heads in training, else one tensor of scores."""
    if model.out_norms is not None:
        return model.forward_intermediates(x, intermediates_only=True)
    out = model(x)
    return list(out) if isinstance(out, tuple) else [out]


def trace(model: CASViT, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the official code would have recorded under the same names, and the outputs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    hooks = [model.stem.register_forward_hook(keep("patch_embed"))]
    for i, stage in enumerate(model.stages):
        hooks.append(stage.register_forward_hook(keep(f"network.{2 * i}.out")))
        if i:
            hooks.append(stage.downsample.register_forward_hook(keep(f"network.{2 * i - 1}.out")))
        for j, block in enumerate(stage.blocks):
            hooks.append(block.register_forward_hook(keep(f"network.{2 * i}.{j}.out")))
            hooks.append(block.attn.register_forward_hook(keep(f"network.{2 * i}.{j}.attn.out")))
    with torch.no_grad():
        result = outputs(model, x)
    for hook in hooks:
        hook.remove()
    return seen, result


def compare(case: Case) -> None:
    model = build(case)
    tolerance = DOUBLE if case["input"].dtype == torch.float64 else SINGLE
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen, result = trace(model, case["input"])
    names = sorted(key for key in case.tensors if key.partition("/")[0] == "output")
    for actual, name in zip(result, names, strict=True):
        case.close(actual, name, tolerance)
    for key in case.tensors:
        if key.startswith("inter/") and not (key.startswith("inter/head") or key.startswith("inter/norm")):
            case.close(seen[key.removeprefix("inter/")], key, tolerance)
    model.load_state_dict(model.state_dict() | statistics)  # a case in training mode has moved them
    case.adapted_gradients(model, lambda x: outputs(model, x), tolerance)


def compare_keys(content: dict[str, Any]) -> None:
    size, _, dense = content["model"].removeprefix("rcvit_").partition("_")
    check_official_keys(content, f"casvit_{size}_224", take=STAGES if dense else None, out_norm=bool(dense))
