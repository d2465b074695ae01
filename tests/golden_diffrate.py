"""DiffRate against its official code, with given numbers of tokens; its search in training is not compared."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit.hosts.host import ReducedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers.diffrate_presets import PRESETS

SEARCH = ("prune_ddp", "merge_ddp")  # what the search has learnt, which no longer says anything once numbers are given
HOSTS = {
    "ViT-T-DeiT": "deit_tiny",
    "ViT-S-DeiT": "deit_small",
    "ViT-B-DeiT": "deit_base",
    "ViT-B-MAE": "mae_base",
    "ViT-L-MAE": "mae_large",
    "ViT-H-MAE": "mae_huge",
}
CONVOLUTIONAL = {"CAFormer-S36"}  # no host here


def compare(case: Case) -> None:
    config = case.config
    case.evaluated()
    expect(config, checked=True, loss=None, max_rel_grad_error_f64=None, granularity=4)
    assert set(config["state_names"]) == case.state().keys()
    assert config["min_margin"] > 0 < config["min_adjacent_gap"]
    assert config["max_abs_error_f64"] >= 0
    tolerance = DOUBLE if config["dtype"] == "float64" else SINGLE
    model = make(case)
    with torch.no_grad():
        case.close(model(case["input"]), "output", tolerance)
        trace = model.trace_tokens(case["input"])
    ids = torch.arange(model.patch_embed.num_patches + 1).expand(len(case["input"]), -1)  # with the class token
    for block, ((_, tokens), merge) in enumerate(zip(trace, config["merge_kept_num"], strict=True)):
        assert tokens.num_tokens == merge - 1
        ids = ids.gather(1, case[f"block{block}/order"][:, :merge])
        if block in model.reducers and tokens.moved:  # the official code sorts where nothing leaves too
            assert torch.equal(tokens.anchor + 1, ids[:, 1:])
            weight = tokens.key_weight
            assert weight is not None
            case.close(weight.unsqueeze(-1), f"block{block}/size", tolerance)
    group = torch.where(trace[-1].tokens.source < 0, -1, trace[-1].tokens.source + 1)
    case.equal(torch.nn.functional.pad(group, (1, 0)), "group")
    terms = closed_form_macs(model, (3, config["img_size"], config["img_size"]))
    counted = sum(terms[name] for name in ("embedding", "projection", "attention", "mlp", "head"))
    counted += 3 * config["patch"] ** 2 * config["embed_dim"]  # officially the class token is embedded as a patch is
    case.close(torch.tensor([counted]), "flops", DOUBLE)


def make(case: Case) -> ReducedHost:
    config = case.config
    host = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
    ).to(getattr(torch, config["dtype"]))
    host.load_state_dict({name: value for name, value in case.state().items() if not any(s in name for s in SEARCH)})
    settings = {
        "prune_to": [number - 1 for number in config["prune_kept_num"]],
        "merge_to": [number - 1 for number in config["merge_kept_num"]],
    }
    model = effvit.sparsify(host.eval(), "diffrate", **settings)
    assert isinstance(model, ReducedHost)
    return model


def compare_presets(_: Path, content: dict[str, Any]) -> None:
    left = dict(PRESETS)
    assert content["rates"].keys() == {*HOSTS, *CONVOLUTIONAL}
    for host, name in HOSTS.items():
        for target, numbers in content["rates"][host].items():
            preset = left.pop(f"{name}_{target}")
            assert [number + 1 for number in preset.prune_to] == numbers["prune_kept_num"]
            assert [number + 1 for number in preset.merge_to] == numbers["merge_kept_num"]
    assert not left
