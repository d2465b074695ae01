"""Agreement of the super-token SViT with the official code (hhb072/STViT@c9ed9a4)."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, check_official_keys, expect
from torch import Tensor

from effvit.architectures.supertoken import SuperTokenViT
from effvit.layers.super_tokens import associate, to_cells

# Official argument -> ours, where the names differ; the rest have the same name.
ARGUMENTS = {"embed_dim": "dims", "drop_rate": "proj_drop_rate"}
# Swallowed by the official ``**kwargs`` or accepted and never read: without effect on the result, whatever their value.
IGNORED = {
    "use_checkpoint",
    "checkpoint_num",
    "freeze_bn",
    "stoken_refine",
    "stoken_refine_attention",
    "hard_label",
    "rpe",
}


def build(case: Case) -> SuperTokenViT:
    expect(case.config["config"], cls="STViT")
    kwargs = case.config["config"]["kwargs"]
    model = SuperTokenViT(**{ARGUMENTS.get(key, key): value for key, value in kwargs.items() if key not in IGNORED})
    state, dropped = model.adapt_state_dict(case.state())
    assert all("fold.weights" in name for name in dropped)
    model.load_state_dict(state)
    model.to(case["input"].dtype)
    return model.train(case.training)


def trace(model: SuperTokenViT, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the official code would have recorded under the same names, and the output."""
    seen: dict[str, Tensor] = {}

    def nchw(y: Tensor) -> Tensor:
        return y.permute(0, 3, 1, 2)

    def attention(name: str) -> Any:
        def record(attn: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[f"{name}.attn_out"] = nchw(output)
            if attn.cell != (1, 1):
                pixels = to_cells(inputs[0], attn.cell)
                for i in range(attn.n_iter):
                    seen[f"{name}.affinity.iter{i}"] = associate(pixels, i + 1).flatten(1, 2).transpose(2, 3)
                tokens = [seen.pop("refined_in"), seen.pop("refined_out")]
                for when, y in zip(("before", "after"), tokens, strict=True):
                    grid = y.transpose(1, 2).unflatten(2, pixels.shape[1:3])
                    seen[f"{name}.super_tokens_{when}_refine"] = grid

        return record

    def refine(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["refined_in"], seen["refined_out"] = inputs[0], output

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    hooks = [model.stem.register_forward_hook(keep("patch_embed"))]
    for i, stage in enumerate(model.stages):
        if i:
            hooks.append(stage.downsample.register_forward_hook(keep(f"layers.{i - 1}.stage_out")))
        for j, block in enumerate(stage.blocks):
            name = f"layers.{i}.blocks.{j}"
            hooks.append(block.register_forward_hook(keep(f"{name}.out")))
            hooks.append(block.attn.refine.register_forward_hook(refine))
            hooks.append(block.attn.register_forward_hook(attention(name)))
    hooks.append(model.stages.register_forward_hook(keep(f"layers.{len(model.stages) - 1}.stage_out")))
    hooks.append(model.head.drop.register_forward_hook(keep("forward_features")))
    with torch.no_grad():
        output = model(x)
    for hook in hooks:
        hook.remove()
    return seen, output


def compare(case: Case) -> None:
    model = build(case)
    tolerance = DOUBLE if case["input"].dtype == torch.float64 else SINGLE
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen, output = trace(model, case["input"])
    case.close(output, "output", tolerance)
    recorded = [key.removeprefix("inter/") for key in case.tensors if key.startswith("inter/")]
    assert {key for key in recorded if "affinity" in key or "blocks" in key} <= set(seen)
    for key in recorded:
        if key in seen:
            case.close(seen[key], f"inter/{key}", tolerance)
    model.load_state_dict(model.state_dict() | statistics)  # a case in training mode has moved them
    case.adapted_gradients(model, lambda x: [model(x)], tolerance)


def compare_keys(content: dict[str, Any]) -> None:
    name = content["model"].replace("stvit_", "supertoken_")
    check_official_keys(content, f"{name}_224", dropped=("fold.weights",))
