"""PiToMe against its official code: both rules of matching, and whole models."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from golden_cases import DOUBLE, SINGLE, Case, expect, plain_host
from torch import Tensor

import effvit
from effvit.reducers.bipartite import Matching, matching_target, merge_tokens
from effvit.reducers.pitome import PiToMe, energy, energy_matching
from effvit.tokens import TokenMap


def compare(case: Case) -> None:
    expect(case.config, checked=True)
    (compare_matching if "subcases" in case.config else compare_model)(case)


def with_prefix(target: Tensor, prefix: int) -> Tensor:
    """Targets among the patches as places in the sequence, that of the class token in front."""
    return F.pad(target + prefix, (prefix, 0))


def compare_matching(case: Case) -> None:
    assert not case.config["state_names"]
    for number, row in enumerate(case.config["subcases"]):
        key, prefix = f"s{number}", int(row["class_token"])
        x, size, metric = case[f"{key}/x"], case[f"{key}/size"].squeeze(-1), case[f"{key}/metric"][:, prefix:]
        assert metric.shape[:2] == (row["B"], row["T"])
        reducer = PiToMe.plan(1, keep_rate=row["ratio"])[0]
        assert row["T"] - reducer.count(row["T"], row["T"]) == row["r"]
        case.close(energy(metric.double(), row["margin"]), f"{key}/energy_f64", DOUBLE)
        matching: Matching = energy_matching(metric, row["r"], row["margin"], not row["use_bsm_pitome"], prefix)
        target = matching_target(matching, torch.zeros(metric.shape[:2], dtype=torch.int64))
        case.equal(with_prefix(target, prefix), f"{key}/pos")
        merged, sizes = merge_tokens(x, size, matching)
        case.close(merged, f"{key}/merged")
        case.close(sizes.unsqueeze(-1), f"{key}/merged_size")


def compare_model(case: Case) -> None:
    config = case.config
    assert config["patch_fn"] == "algo.pitome.patch.deit"
    depth, tolerance = config["depth"], SINGLE if config["dtype"] == "float32" else DOUBLE
    model = effvit.sparsify(plain_host(case), "pitome", keep_rate=config["ratio"])
    reducers = [model.reducers[block] for block in range(depth)]
    torch.testing.assert_close([float(reducer.margin) for reducer in reducers], config["margins"])
    assert [not reducer.protects for reducer in reducers] == config["use_bsm"]

    with torch.no_grad():
        case.close(model(case["input"]), "output", tolerance)
        trace = [features.tokens for features in model.trace_tokens(case["input"])]
    case.equal(with_prefix(trace[-1].source, 1), "group")
    left = [model.patch_embed.num_patches, *(tokens.num_tokens for tokens in trace)]
    assert [before - after for before, after in pairwise(left)] == config["r_per_block"]
    assert left[-1] + 1 == config["tokens_left"]
    assert official_macs([number + 1 for number in left[:-1]], config["embed_dim"]) == config["official_flops"]
    for block, tokens in enumerate(trace):
        assert tokens.size is not None
        case.close(tokens.size.unsqueeze(-1), f"block{block}/size", tolerance)
        case.equal(with_prefix(last_target(tokens), 1), f"block{block}/pos")
    case.gradients(model)


def last_target(tokens: TokenMap) -> Tensor:
    """Where the tokens that entered the block went in it."""
    former, step = tokens.trail.former, tokens.trail.step
    assert former is not None
    assert step is not None
    return step.target(former.anchor)


def official_macs(entering: list[int], dim: int) -> int:
    """As the official code counts: the tokens that enter the block in its MLP too, and no matching."""
    return sum(12 * number * dim**2 + 2 * number**2 * dim for number in entering)
