"""STViT on DeiT against a reconstruction: blocks and pooling of the released STViT-R, wired as the paper says.

No official code of this model exists (``"official": false`` in the cases), so the names of the parameters are the
reconstruction's and are mapped here, not in the model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case
from torch import Tensor

from effvit.models.stvit import STViT

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


def build(case: Case, **kwargs: Any) -> Reference:
    """The model of a case; an argument of the reference that is not known here is an error."""
    args = dict(case.config["config"]["kwargs"])
    args.pop("restore", None)
    semantic = args.pop("sem")
    stgm = 2
    own = {ARGUMENTS.get(name, name): value for name, value in args.items() if name in ARGUMENTS or name in SAME}
    unknown = args.keys() - ARGUMENTS.keys() - set(SAME)
    assert not unknown, f"arguments of the reference without a counterpart: {sorted(unknown)}"
    model = Reference(depth=args["base"] + stgm + semantic, num_stgm=stgm, **own, **kwargs)
    model.load_state_dict(model.adapt_state_dict(case.state())[0])
    return model.eval().to(case["input"].dtype)


def compare(case: Case) -> None:
    tolerance = DOUBLE if case["input"].dtype == torch.float64 else SINGLE
    model = build(case)
    with torch.no_grad():
        if not close(model(case["input"]), case["output"], tolerance) and "state/restore.norm1.weight" in case:
            # The paper does not say whether the classifier of a model with recovery reads X' or S.
            model = build(case, recovery=True)
        case.close(model(case["input"]), "output", tolerance)
        compare_intermediates(case, model, tolerance)
    case.adapted_gradients(model, lambda x: [model(x)], tolerance)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def compare_intermediates(case: Case, model: Reference, tolerance: float) -> None:
    base, last = model.num_base, model.num_base + model.num_stgm - 1
    seen: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({f"block{i}": out}))
        for i, block in enumerate(model.blocks)
    ]
    (x, s), _ = model._run(case["input"])
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
    recovered = [key for key in case.tensors if key.startswith("inter/") and ("restor" in key or "recover" in key)]
    if recovered:
        recovering = build(case, recovery=True)
        own |= {key.removeprefix("inter/"): recovering._to_patches(x, s, None) for key in recovered}
    recorded = {key.removeprefix("inter/") for key in case.tensors if key.startswith("inter/")}
    assert recorded <= own.keys(), f"recorded without a counterpart: {sorted(recorded - own.keys())}"
    for name in recorded:
        case.close(own[name], f"inter/{name}", tolerance)
