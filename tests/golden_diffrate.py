"""DiffRate and its search against their official code."""

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
from effvit.hosts.rate_search import SearchedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers.diffrate_presets import PRESETS

SEARCH = ("prune_ddp", "merge_ddp")  # what the search has learnt, which no longer says anything once numbers are given
SEARCH_LOSS = "sum of squared outputs + 5 (flops/1e6 - 1.3251072000000002)^2"
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
    if case.training:
        compare_search(case)
        return
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


def compare_search(case: Case) -> None:
    """A pass of the search: decisions, sizes, scores, multiply-adds, and gradients of logits and weights."""
    config = case.config
    expect(config, checked=True, dtype="float32", loss=SEARCH_LOSS)
    assert set(config["state_names"]) == case.state().keys()
    assert config["min_margin"] > 0 < config["min_adjacent_gap"]
    assert max(config["max_abs_error_f64"], config["max_rel_grad_error_f64"]) < SINGLE
    searched = SearchedHost(make_host(case), step=config["granularity"])
    state, found = case.state(), {search.block: search for search in searched.searches}
    numbers = {(block, kind): getattr(own, kind) for block, own in found.items() for kind in ("prune", "merge")}
    for (block, kind), number in numbers.items():
        assert torch.equal(number.candidates, state[f"blocks.{block}.{kind}_ddp.kept_token_candidate"])
        number.logits.data.copy_(state[f"blocks.{block}.{kind}_ddp.selected_probability"])
    output = searched(case["input"])
    settings = searched.settings()
    compare_masks(case, searched)
    for kind in ("prune", "merge"):
        assert [number + 1 for number in settings[f"{kind}_to"]] == config[f"{kind}_kept_num"]
    case.close(output.scores, "output")
    class_token = 3 * config["patch"] ** 2 * config["embed_dim"]  # officially embedded as a patch is
    macs = output.macs + class_token
    case.close(macs.double().reshape(1), "flops", SINGLE)
    loss = output.scores.square().sum() + 5 * (macs / 1e6 - 1.3251072000000002).square()
    case.close(loss.reshape(1), "loss")
    loss.backward()
    for key in [key for key in case.tensors if key.startswith("grad/")]:
        name = key.removeprefix("grad/")
        _, place, kind, *_ = [*name.split("."), "", ""]
        if kind.endswith("_ddp"):
            if place == "0":  # the only candidate
                assert not case[key].any()
                continue
            gradient = numbers[int(place), kind.removesuffix("_ddp")].logits.grad
        else:
            gradient = searched.host.get_parameter(name).grad
        assert gradient is not None, key
        case.close(gradient, key)


def compare_masks(case: Case, searched: SearchedHost) -> None:
    """Which tokens are left behind each block, and their sizes, in the order in which the official code sorts."""
    with torch.no_grad():
        trace = searched.host.trace_tokens(case["input"])
    ids = torch.arange(searched.host.patch_embed.num_patches + 1).expand(len(case["input"]), -1)
    for block, (_, tokens) in enumerate(trace):
        ids = ids.gather(1, case[f"block{block}/order"])
        for name, values in (("mask", tokens.policy), ("size", tokens.key_weight)):
            expected = case[f"block{block}/{name}"].reshape(ids.shape)
            if values is None:
                assert (expected == 1).all()
            else:
                case.near(values.gather(1, ids), expected, f"block{block}/{name}")


def make_host(case: Case) -> VisionTransformer:
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
    return host.eval()


def make(case: Case) -> ReducedHost:
    config = case.config
    settings = {
        "prune_to": [number - 1 for number in config["prune_kept_num"]],
        "merge_to": [number - 1 for number in config["merge_kept_num"]],
    }
    model = effvit.sparsify(make_host(case), "diffrate", recover=None, share=True, **settings)
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
