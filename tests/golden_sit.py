"""Comparison of SiT with the official code (models/lvvit.py of Sense-X/SiT@f577808)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, check_official_keys, expect
from torch import Tensor

from effvit.architectures.sit import LayerTokens, SiT

NAMES = {
    **{f"sit_lvvit_{size}": f"sit_lvvit_{size}_224" for size in ("tiny", "xsmall", "small", "medium")},
    "sit_lvvit_large": "sit_lvvit_large_288",
}
# Official arguments under the same name here; those of the second line have no effect on what is compared.
SAME = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "skip_lam")
IGNORED = ("drop_path_decay", "with_cp")


def build_model(case: Case) -> SiT:
    """The model of a case with its official weights, in the case's dtype and mode."""
    expect(case.config["config"], cls="LVViT")
    given = case.config["config"]["kwargs"]
    official = {"stage_blocks": [1, 1, 1, 13], "distillation_type": None, "depth": 16, **given}
    slimmed = official.pop("distillation_type") not in (None, "none")
    assert not official.pop("conv_distillation", False), "the official path with a CNN teacher does not run"
    assert official.pop("head_dim", None) is None, "heads of another width do not fit the official reshape"
    scale = official.pop("qk_scale", None)
    stages = official.pop("stage_blocks")
    kwargs: dict[str, Any] = {
        "stem": {"4c": "4c", "6c": "6c"}.get(official.pop("p_emb", "4cg"), "patch"),
        "stage_blocks": stages if slimmed else None,
        "keep_rate": official.pop("keeping_ratio", 0.5),
        "reverse": slimmed,
        "skip_lam": official.pop("skip_lam", 1.0),
        "num_heads": official.pop("num_heads", 12),
        "embed_dim": official.pop("embed_dim", 384),
        "mlp_ratio": official.pop("mlp_ratio", 4.0),
        "qkv_bias": official.pop("qkv_bias", False),
        "proj_drop_rate": official.get("drop_rate", 0.0),
        "pos_drop_rate": official.pop("drop_rate", 0.0),
        **{name: official.pop(name) for name in (*SAME, "attn_drop_rate", "drop_path_rate") if name in official},
    }
    assert not set(official) - set(IGNORED), f"unknown arguments {official}"
    model = SiT(**kwargs)
    state, dropped = model.adapt_state_dict(case.state())
    assert all(name.startswith("aux_head.") for name in dropped), dropped
    model.load_state_dict(state)
    if scale is not None:
        for block in model.blocks:
            block.attn.scale, block.attn.fused_attn = scale, False
    return model.to(case["input"].dtype).train(case.training)


def forward(model: SiT, x: Tensor) -> LayerTokens:
    """What the official forward computes: slimmed tokens in eval mode, rebuilt ones in train mode."""
    return model.forward_distill(x) if model.training else model.forward_layers(x)


def recorded_outputs(case: Case, model: SiT, out: LayerTokens) -> dict[str, Tensor]:
    """The official outputs a case holds; train mode returns the logits twice."""
    official = [out.logits, *([out.logits] if model.training else []), *out.tokens]
    named = {"output": out.logits} | {f"output/{i}": output for i, output in enumerate(official)}
    return {key: output for key, output in named.items() if key in case}


def intermediates(model: SiT, x: Tensor) -> tuple[LayerTokens, dict[str, Tensor]]:
    """The outputs for images x and everything on the way, under the recorded names."""
    seen: dict[str, Tensor] = {}

    def record_slimming(module: Any, args: Any, out: Any) -> None:
        i = list(model.slimming).index(module)
        seen.update({f"tsm.{i}.in": args[0], f"tsm.{i}.out": out[0]})

    def record_stem(_module: Any, _args: Any, out: Tensor) -> None:
        seen["patch_embed"] = out.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)

    hooks = [module.register_forward_hook(record_slimming) for module in model.slimming]
    hooks.append(model.patch_embed.register_forward_hook(record_stem))
    with torch.no_grad():
        out = forward(model, x)
        rebuilt = out.tokens if model.training else model.rebuild(out.tokens)
    for hook in hooks:
        hook.remove()
    seen |= {f"layer_tokens.{i}": tokens for i, tokens in enumerate(out.tokens)}
    seen |= {f"rtsm.{i}.out": tokens for i, tokens in enumerate(rebuilt)}
    return out, seen


def compare(case: Case) -> None:
    """Outputs, tokens after every block, every slimming and reverse module, and gradients."""
    model, x = build_model(case), case["input"]
    tolerance = DOUBLE if x.dtype == torch.float64 else SINGLE
    if model.slimming and "keeped_patches" in case.config["config"]:
        assert model.num_tokens == case.config["config"]["keeped_patches"][1:]
    out, seen = intermediates(model, x)
    if "layer_patches" in case.config["config"] and not model.training:
        found = [tokens.shape[1] for tokens in out.tokens]
        recorded = case.config["config"]["layer_patches"]  # before the first layer too, and the last stage twice
        assert found == recorded[1 : 1 + len(found)], f"patches of the layers {found}, recorded {recorded}"
    outputs = recorded_outputs(case, model, out)
    assert outputs, "the case records no output"
    for key, output in outputs.items():
        case.close(output, key, tolerance)
    case.near(model(x), out.logits, "forward against forward_layers", tolerance)
    for key in case.tensors:
        if key.startswith("inter/") and key.removeprefix("inter/") in seen:
            case.close(seen[key.removeprefix("inter/")], key, tolerance)
    compare_gradients(case, model, tolerance)
    if tolerance == SINGLE:
        double, _ = intermediates(model.double(), x.double())
        case.near(double.logits, out.logits, "output in float64")


def compare_gradients(case: Case, model: SiT, tolerance: float) -> None:
    """All gradients; those of a slimming module as one vector, with room for the rounding of float32.

    The tokens a slimming module mixes grow alike with depth, so its gradients are small differences: the bias of its
    last layer has none (a constant does not change a softmax), and the official float32 gradients of late modules
    agree with float64 in two digits or fewer. They must be as close to our float64 gradient as our float32 one is,
    but for a factor of 8.
    """

    def outputs(model: SiT, x: Tensor) -> list[Tensor]:
        return list(recorded_outputs(case, model, forward(model, x)).values())

    case.adapted_gradients(model, lambda x: outputs(model, x), tolerance, left_out=("slimming.",))
    official = case.official_gradients(model)
    if not official:
        return
    single, double = copy.deepcopy(model).float(), copy.deepcopy(model).double()
    for dtype, copied in ((torch.float32, single), (torch.float64, double)):
        copied.zero_grad()
        sum(out.square().sum() for out in outputs(copied, case["input"].to(dtype))).backward()
    for i in range(len(model.slimming)):
        names = [name for name in official if name.startswith(f"slimming.{i}.") and not official[name].isnan().any()]
        if names:
            recorded, rounded, exact = (
                torch.cat([gradient(name).flatten().double() for name in names])
                for gradient in (
                    official.__getitem__,
                    lambda name: single.get_parameter(name).grad,
                    lambda name: double.get_parameter(name).grad,
                )
            )
            rounding = float((rounded - exact).abs().max() / exact.abs().max())
            room = 8 * rounding * (1 if tolerance == SINGLE else 2**-29)  # float64 has 29 bits more
            case.near(exact, recorded, f"gradient of slimming.{i}", max(tolerance, room))


def compare_keys(content: dict[str, Any]) -> None:
    """The official names and shapes become exactly ours, with and without the reverse modules."""
    name = NAMES[content["model"]]
    check_official_keys(content, name, dropped=("aux_head.", "rtsm."))
    check_official_keys(content, name, dropped=("aux_head.",), reverse=True)
