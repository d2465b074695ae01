"""MCTF against its official blocks: positions, sizes and tokens behind the last block."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from golden_pitome import with_prefix
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.block import call_block
from effvit.reducers.mctf import POOLING, STEPS
from effvit.tokens import TokenMap, Trail

OFFICIAL_STEPS = {1: "attention", 2: "tokens", 0: "after"}
OFFICIAL_POOLING = {1: "attention", 0: "size", 3: "mean", 2: "max"}


def compare(case: Case) -> None:
    config = case.config
    expect(config, checked=True, official_commit="2004da0cad3231fa74cbd60b6042b0bd133aacde")
    assert {*OFFICIAL_STEPS.values()} == {*STEPS}
    assert {*OFFICIAL_POOLING.values()} == {*POOLING}
    model = effvit.sparsify(
        blocks_alone(case),
        "mctf",
        r=config["r"],
        reduce_at=config["active_blocks"],
        step=OFFICIAL_STEPS[config["one_step_ahead"]],
        tau_sim=config["tau_sim"],
        tau_info=config["tau_info"],
        tau_size=config["tau_size"],
        bidirection=bool(config["bidirection"]),
        prop_attn=bool(config["prop_attn"]),
        pooling=OFFICIAL_POOLING[config["pooling_type"]],
    )
    tolerance = SINGLE if config["dtype"] == "float32" else DOUBLE
    x = case["input"]
    tokens = TokenMap.full(x, model.patch_embed.grid_size, 1, 1)
    left = [tokens.num_tokens]
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            former = tokens.trail
            x, tokens = call_block(block, x, tokens)
            if number in config["active_blocks"]:
                left.append(tokens.num_tokens)
                case.equal(with_prefix(moved(tokens.trail, former), 1), f"block{number}/pos")
    assert [before - after for before, after in pairwise(left)] == config["r_used"]
    case.close(x, "output", tolerance)
    case.equal(with_prefix(tokens.source, 1), "group")
    assert tokens.size is not None
    case.close(tokens.size.unsqueeze(-1), "size", tolerance)


def moved(trail: Trail, former: Trail) -> Tensor:
    """(B, N) where each token of an earlier trail went, by all steps since."""
    if trail is former:
        return torch.arange(former.anchor.shape[1]).expand_as(former.anchor)
    before = moved(trail.former, former)
    return trail.step.target(trail.former.anchor).gather(1, before)


def blocks_alone(case: Case) -> VisionTransformer:
    """timm's ViT with the weights of its blocks that a case records, in its dtype and in eval mode."""
    config = case.config
    case.evaluated()
    side = round((config["tokens"] - 1) ** 0.5)
    host = VisionTransformer(
        img_size=8 * side,
        patch_size=8,
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
    )
    state = {name.removeprefix("blocks."): value for name, value in case.state().items()}
    host.blocks.to(getattr(torch, config["dtype"])).load_state_dict(state)
    return host.eval()
