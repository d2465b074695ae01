"""Agreement with DyMU's official code: both of its paths, calibration, matching, and virtual unmerging."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.layers import apply_rot_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import effvit
from effvit.hosts.calibration import ranking
from effvit.hosts.checkpoints import official_state_dict, place_learnt
from effvit.hosts.host import ReducedHost, TokenFeatures
from effvit.reducers.merging import apply_merge, plan_merge
from effvit.reducers.unmerge import remerge, virtual_unmerge, virtual_unmerged_attention
from effvit.schedule import dymu_r
from effvit.tokens import TokenMap

CLIP_NAMES = {
    "image_size": "img_size",
    "width": "embed_dim",
    "layers": "depth",
    "heads": "num_heads",
    "output_dim": "num_classes",
}


def compare(case: Case) -> None:
    if "sub" in case.config:
        compare_functions(case)
    elif "mapping" in case:
        compare_virtual_unmerging(case)
    else:
        compare_model(case)


def compare_schedule(_: Path, content: dict[str, Any]) -> None:
    for name, expected in content["schedule"].items():
        depth, r_total, schedule = name.split("_", 2)
        assert dymu_r(int(r_total[1:]), int(depth[1:]), schedule) == expected, name


def tolerance(case: Case) -> float:
    return DOUBLE if case["input"].dtype == torch.float64 else SINGLE


# -- models ----------------------------------------------------------------------------------------------------


def build(case: Case) -> tuple[VisionTransformer, dict[str, Any]]:
    """The host with the official weights, and the settings of the method."""
    config = dict(case.config["config"])
    settings = {"r_total": config.pop("r_total"), "r_schedule": config.pop("r_schedule", "constant")}
    ratio = config.pop("max_r_per_instance_ratio", None)
    thresholds = config.pop("specified_thresholds", None)
    expect(config, prop_attn=True, update_threshold=False)
    assert config.get("merge_mode", "batch_level") in ("batch_level", "instance_level")
    for other in ("merge_mode", "update_threshold", "prop_attn"):
        config.pop(other, None)
    state = case.state()
    assert case.config["kind"] in ("clip", "timm")
    if case.config["kind"] == "clip":
        config = {CLIP_NAMES.get(name, name): value for name, value in config.items()}
        act = "quick_gelu" if config.pop("quick_gelu", False) else "gelu"
        norm = partial(nn.LayerNorm, eps=1e-5)
        config = {"pre_norm": True, **config}  # open_clip's tower has it unless the case says otherwise
        host = VisionTransformer(**config, norm_layer=norm, act_layer=act)
        state = {f"visual.{name}": value for name, value in state.items()}
    else:
        host = VisionTransformer(**config)
    host.to(case["input"].dtype)
    state, _ = official_state_dict(checkpoint_filter_fn(state, host))
    host.load_state_dict({name: value for name, value in state.items() if not name.endswith("threshold")})
    if case.config["kind"] == "timm":
        for block in host.blocks:  # officially there, but not applied
            block.ls1 = nn.Identity()
        state = {name: value for name, value in state.items() if ".ls1." not in name}
    settings |= {"max_r_per_instance_ratio": ratio, "thresholds": thresholds}
    settings["state"] = state
    return host.eval(), settings


def compare_model(case: Case) -> None:
    config = case.config
    assert config["mode"] in ("batch", "single")
    assert config["calibration_how"] in (
        (None,) if not config["calibration_batches"] else ("train", "update_threshold")
    )
    host, settings = build(case)
    state = settings.pop("state")
    depth = len(host.blocks)
    assert dymu_r(settings["r_total"], depth, settings["r_schedule"]) == config["r_schedule_resolved"]
    if config["config"].get("merge_mode", "batch_level") == "instance_level":
        compare_run(case, effvit.sparsify(host, "tome", r=config["r_schedule_resolved"]), "")
        return
    if config["calibration_batches"]:
        model = effvit.sparsify(host, "dymu", compat=True, **(settings | {"thresholds": None}))
        model.to(case["input"].dtype)
        for i in range(config["calibration_batches"]):
            with ranking(model):
                compare_run(case, model, f"calib{i}/")
            key = f"calib{i}/thresholds"
            thresholds = effvit.calibrate(model, [case[f"calib{i}/input"]])
            case.close(torch.tensor(thresholds, dtype=case[key].dtype), key, tolerance(case))
        case.close(thresholds_of(model, case), "thresholds", tolerance(case))

    reloaded = effvit.sparsify(host, "dymu", compat=True, **settings).to(case["input"].dtype)
    place_learnt(state, reloaded)
    reloaded.load_state_dict(state)
    if config["calibration_batches"]:
        case.close(thresholds_of(reloaded, case), "thresholds", tolerance(case))
    if settings["thresholds"] is None:  # those given to the official model go before what its buffers hold
        settings["thresholds"] = case["thresholds"].tolist()
    official = effvit.sparsify(host, "dymu", compat=True, **settings)
    if config["mode"] == "batch" and len(case["input"]) > 1:
        compare_run(case, official, "")
        if config["kind"] == "timm":
            case.gradients(official)
        if "output_f64" in case:
            case.close(run(official.double(), case["input"].double(), case), "output_f64", DOUBLE)
        return
    own = effvit.sparsify(host, "dymu", **settings)  # an image alone is the default, whatever its batch
    packed = effvit.sparsify(host, "dymu", ragged="packed", **settings)
    for model in (own, packed):
        case.close(run(model, case["input"], case), "output", tolerance(case))
    for i, image in enumerate(case["input"].split(1)):
        for model in (official, own):
            compare_layers(case, model, image, f"img{i}/")
    case.close(torch.cat([run(official, image, case) for image in case["input"].split(1)]), "output", tolerance(case))


def thresholds_of(model: ReducedHost, case: Case) -> Tensor:
    values = [1.0 if block.reducer is None else float(block.reducer.threshold) for block in model.blocks]
    return torch.tensor(values, dtype=case["thresholds"].dtype)


def compare_run(case: Case, model: ReducedHost, prefix: str) -> None:
    x = case[f"{prefix}input"]
    case.close(run(model, x, case), f"{prefix}output", tolerance(case))
    compare_layers(case, model, x, prefix)


def run(model: ReducedHost, x: Tensor, case: Case) -> Tensor:
    """Output with the official read-out, whose mean and maximum do not weight by size."""
    pool = case.config["config"].get("global_pool", "token")
    with torch.no_grad():
        if pool in ("token", "map"):
            return model(x)
        x, tokens = model.forward_tokens(x)
        mask = tokens.sequence_mask()[:, tokens.num_prefix :].unsqueeze(-1)
        x = x[:, tokens.num_prefix :]
        mean = (x * mask).sum(1) / mask.sum(1)
        largest = x.masked_fill(~mask, float("-inf")).amax(1)
        pooled = {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[pool]
        return model.head(model.fc_norm(pooled))


def compare_layers(case: Case, model: ReducedHost, x: Tensor, prefix: str) -> None:
    with torch.no_grad():
        layers = model.trace_tokens(x)
    for i, features in enumerate(layers):
        key = f"{prefix}layer{i}"
        if f"{key}/count" in case:
            compare_tokens(case, features, key)
        if f"{key}/x" in case:
            mask = features.tokens.sequence_mask().unsqueeze(-1)  # padding holds nothing
            case.tensors[f"{key}/valid_x"] = case[f"{key}/x"] * mask
            case.close(features.x * mask, f"{key}/valid_x", tolerance(case))


def compare_tokens(case: Case, features: TokenFeatures, key: str) -> None:
    tokens = features.tokens
    mask = tokens.sequence_mask()
    case.equal(mask.sum(1), f"{key}/count")
    check_counts(case, key, mask.sum(1).tolist())
    case.equal(~mask, f"{key}/padding")
    group = torch.cat([torch.arange(tokens.num_prefix).expand(len(mask), -1), tokens.source + tokens.num_prefix], 1)
    case.equal(group, f"{key}/group")
    size = torch.ones_like(mask) if tokens.size is None else tokens.size
    case.close(size.to(case[f"{key}/size"].dtype), f"{key}/size")


def check_counts(case: Case, key: str, own: Any) -> None:
    """Assert that the configuration holds the same counts; ``key`` is layer0, img0/layer0 or calib0/layer0."""
    *run, layer = key.split("/")
    counts, block = case.config["counts"], int(layer.removeprefix("layer"))
    if run and run[0].startswith("calib"):
        counts = case.config["calibration_counts"][int(run[0].removeprefix("calib"))]
    elif run:  # one image alone
        counts, own = counts[int(run[0].removeprefix("img"))], own[0]
    assert own == counts[block], f"{key}/count"


# -- functions -------------------------------------------------------------------------------------------------


def compare_functions(case: Case) -> None:
    for i, row in enumerate(case.config["sub"]):
        assert row["path"] in ("batch", "inst")
        assert case[f"s{i}/x"].shape[:2] == (row["B"], row["N"])
        compare_matching(case, f"s{i}", row)


def compare_matching(case: Case, key: str, row: dict[str, Any]) -> None:
    prefix, single = int(row["class_token"]), row["path"] == "inst"
    metric, x = case[f"{key}/metric"], case[f"{key}/x"]
    tokens = TokenMap.full(x, (1, row["N"] - prefix), prefix, prefix)
    valid = None
    assert (row["padding"] is not None) == (f"{key}/padding_in" in case)
    if f"{key}/padding_in" in case:
        valid = case[f"{key}/padding_in"][:, prefix:] == 0
        assert (~valid).sum(1).tolist() == row["padding"]
    size = case[f"{key}/size_in"].squeeze(-1)
    tokens = replace(tokens, valid=valid, size=size if valid is None else size * F.pad(valid, (prefix, 0), value=True))
    threshold = None if row["threshold"] is None else torch.tensor(row["threshold"])
    merge = plan_merge(
        metric[:, prefix:], valid, prefix, threshold, row["r"], row["max_r_per_instance"], compat=not single
    )
    if threshold is None:
        case.close(merge.threshold, f"{key}/batch_threshold")
        assert float(merge.threshold) == pytest.approx(row["batch_threshold"], abs=SINGLE)
        pairs = (tokens.counts() + prefix + 1) // 2 - prefix  # that exist; the official code goes on with -inf
        if row["r"] * row["B"] > int(pairs.sum()):
            official = (tokens.counts() + prefix).sum() - sum(row["count"])
            assert merge.merged.sum() <= pairs.sum() < official
            return
    assert merge.official is not single
    out, left = apply_merge(x, tokens, merge, packed=False)
    recorded = make_fx(lambda y: apply_merge(y, tokens, merge, packed=False)[0])(x)  # with fixed shapes
    assert torch.allclose(recorded(x), out, atol=1e-6)
    mask = left.sequence_mask()
    assert mask.sum(1).tolist() == row["count"], key
    assert left.size is not None
    case.close(left.size.unsqueeze(-1), f"{key}/size_out")
    case.close(out * mask.unsqueeze(-1), f"{key}/x_out")
    if f"{key}/padding_out" in case:
        case.equal(~mask, f"{key}/padding_out")
    group = torch.cat([torch.arange(prefix).expand(len(x), -1), left.source + prefix], dim=1)
    real = torch.ones_like(group, dtype=torch.bool) if valid is None else F.pad(valid, (prefix, 0), value=True)
    case.tensors[f"{key}/real_group"] = case[f"{key}/group"][real]
    case.equal(group[real], f"{key}/real_group")
    dense = virtual_unmerge(out.unsqueeze(1), group.clamp(min=0)).squeeze(1)
    case.tensors[f"{key}/real_dense"] = case[f"{key}/dense"] * real.unsqueeze(-1)
    case.close(dense * real.unsqueeze(-1), f"{key}/real_dense")


def compare_virtual_unmerging(case: Case) -> None:
    q, k, v, group = case["q"], case["k"], case["v"], case["mapping"]
    cos, sin = case["cos"], case["sin"]
    causal = case.config["causal"]
    sizes = [case.config[name] for name in ("B", "H", "N_un", "D")]
    assert q.shape == k.shape == v.shape == torch.Size(sizes)
    assert group.shape[-1] == case.config["N"]
    out = virtual_unmerged_attention(q, k, v, group, cos, sin, is_causal=causal)
    case.close(out, "attn_out_remerged", DOUBLE)
    full = [apply_rot_embed(virtual_unmerge(y, group), sin[:, None], cos[:, None], half=True) for y in (q, k)]
    case.close(full[0] @ full[1].transpose(-2, -1) / q.shape[-1] ** 0.5, "scores", DOUBLE)
    attended = F.scaled_dot_product_attention(*full, virtual_unmerge(v, group), is_causal=causal)
    case.close(attended, "attn_out_full", DOUBLE)
    case.close(remerge(case["attn_out_full"], group, q.shape[2]), "attn_out_remerged", DOUBLE)
