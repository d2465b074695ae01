"""LookupViT: a reference written from the equations with loops; there is no official code."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.layers import to_2tuple
from torch import Tensor

from effvit.architectures.lookupvit import LookupBlock, LookupViT

__all__ = ["compare"]


# The readings of the paper that a case may follow; where several are built, another entry says which it is.
CHOICES = {
    "antialias": "True default (jax.image.resize semantics); False = half-pixel bilinear",
    "infusion": "transpose: post-softmax A^T, not renormalised",
    "input_norm": "none after patch embedding",
    "norms": "pre-norm everywhere, LN eps 1e-6",
    "pool": "LN then mean over tokens; output=head on compressed, output_lookup=head_lookup on lookup tokens",
    "mlp_lookup": "hidden D/2",
    "heads": "same number in all attentions",
}


def compare(case: Case) -> None:
    """Compare one block or one whole model, in float32 and, since the records are float64, in float64."""
    config = case.config["config"]
    expect(case.config, dtype="weights/input float32 (exact), results float64")
    choices = case.config["choices"]
    assert not set(choices) - {*CHOICES, "qkv_bias"}, f"unknown readings: {sorted(set(choices) - set(CHOICES))}"
    expect(choices, **CHOICES)
    kinds = {"one LookupViT block": compare_block, "tiny whole model": compare_model}
    run = kinds[case.config["kind"]]
    for dtype, tolerance in ((torch.float32, SINGLE), (torch.float64, DOUBLE)):
        run(case, config, dtype, tolerance)


def options(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    """Settings a block and a model share; the projection is there if the weights hold it."""
    state = case.state()
    qkv_bias = config.get("qkv_bias", case.config["choices"].get("qkv_bias", True))
    return {
        "num_heads": config["heads"],
        "mlp_ratio": config["mlp_ratio"],
        "qkv_bias": qkv_bias,
        "infuse_proj": config.get("infuse_proj", any(name.endswith("infuse.proj.weight") for name in state)),
        "infusion": config.get("infusion", config.get("mode")),
        "lookup_mlp_ratio": 1 / config["lookup_mlp_div"],
    }


def compare_block(case: Case, config: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    block = LookupBlock(config["dim"], **options(case, config)).eval()
    block.load_state_dict(case.state())
    block.to(dtype)
    compressed, lookup = (case[f"input_{name}"].to(dtype).requires_grad_() for name in ("compressed", "lookup"))
    assert (compressed.shape[1], lookup.shape[1]) == (config["M"], config["N"])
    seen: dict[str, Tensor] = {}
    watch(seen, block.norm1, "compressed_after_gather")
    watch(seen, block.norm2, "compressed_after_self")
    watch(seen, block.norm_c, "compressed_out")
    watch(seen, block.norm3, "lookup_after_infusion")
    block.cross.attn_drop.register_forward_hook(lambda _m, args, _o: seen.update(cross_attention=args[0]))
    seen["output_compressed"], seen["lookup_out"] = block(compressed, lookup)
    seen["output_lookup"] = seen["lookup_out"]
    for name, value in seen.items():
        key = name if name.startswith("output") else f"inter/{name}"
        if key in case:
            case.close(value, key, tolerance)
    skipped, none = block(compressed, lookup, infuse=False)
    case.close(skipped, "output_compressed", tolerance)
    assert none is None
    outputs = [seen["output_compressed"], seen["output_lookup"]]
    compare_gradients(case, block, outputs, {"input_compressed": compressed, "input_lookup": lookup}, tolerance)


def watch(seen: dict[str, Tensor], module: torch.nn.Module, name: str) -> None:
    """Keep what a module is given."""
    module.register_forward_hook(lambda _m, args, _o: seen.update({name: args[0]}))


def compare_model(case: Case, config: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    grids = config["compressed_grid"]
    many = isinstance(grids, list) and any("@" in key for key in case.tensors)
    model = LookupViT(
        img_size=config["img"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_classes=config["num_classes"],
        antialias=config["antialias"],
        compressed_pos_grid=config["pos_embed_compressed_grid"],
        compressed_grid=grids[0] if many else grids,
        **options(case, config),
    ).eval()
    state, dropped = model.adapt_state_dict(case.state())
    assert not dropped
    model.load_state_dict(state)
    model.to(dtype)
    for grid in grids if many else [grids]:
        model.set_compressed_grid(grid)
        rows, columns = to_2tuple(grid)
        compare_at(case, model, f"@{rows}x{columns}" if many else "", dtype, tolerance)


def compare_at(case: Case, model: LookupViT, suffix: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare everything recorded for one compressed grid."""
    x = case["input"].to(dtype)
    inter = f"inter{suffix}"
    blocks: list[tuple[Tensor, Tensor]] = []
    hooks = [block.register_forward_hook(lambda _m, _a, output: blocks.append(output)) for block in model.blocks]
    compressed, lookup = model._tokenise(x)
    final, maps = model.forward_intermediates(x, norm=True, output_fmt="NLC")
    seen = {"compressed_in": compressed, "lookup_in": lookup, "feat_compressed": final, "feat_lookup": maps[-1]}
    for i, (compressed, lookup) in enumerate(blocks):
        seen |= {f"block{i}/compressed_out": compressed, f"block{i}/lookup_out": lookup}
    for hook in hooks:
        hook.remove()
    for name, value in seen.items():
        if f"{inter}/{name}" in case:
            case.close(value, f"{inter}/{name}", tolerance)
    case.close(model(x), f"output{suffix}", tolerance)
    for scores, key in zip(model.forward_heads(x), ("output", "output_lookup"), strict=True):
        case.close(scores, f"{key}{suffix}", tolerance)
    if not suffix:
        image = x.clone().requires_grad_()
        compare_gradients(case, model, list(model.forward_heads(image)), {"input": image}, tolerance)


def compare_gradients(
    case: Case, module: torch.nn.Module, outputs: list[Tensor], inputs: dict[str, Tensor], tolerance: float
) -> None:
    """Gradients of the summed squares of the outputs, where a case records them."""
    recorded = [key for key in case.tensors if key.startswith("grad")]
    if not recorded:
        return
    sum(out.square().sum() for out in outputs).backward()
    for key in recorded:
        name = key.removeprefix("grad/").removeprefix("grad_")
        gradient = inputs[name].grad if name in inputs else module.get_parameter(name).grad
        assert gradient is not None, key
        case.close(gradient, key, tolerance)
