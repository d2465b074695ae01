"""CubistMerge against its release: grids with and without two tokens that go into one, and whole models."""

from __future__ import annotations

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect, plain_host

import effvit
from effvit.reducers.cubistmerge import merge_grid
from effvit.tokens import flat_rows, take_rows


def compare(case: Case) -> None:
    expect(case.config, checked=True)
    (compare_grids if "subcases" in case.config else compare_model)(case)


def compare_grids(case: Case) -> None:
    assert not case.config["state_names"]
    for number, row in enumerate(case.config["subcases"]):
        key, grid, taken = f"s{number}", (row["h"], row["w"]), (row["r_h"], row["r_w"])
        x = case[f"{key}/x"]
        assert x.shape == (row["B"], row["h"] * row["w"], row["C"])
        merged, *_ = merge_grid(x, grid, *taken)
        assert torch.equal(merged, case[f"{key}/merged_all_members"])  # comparisons alone, no arithmetic
        released, target, order = merge_grid(x, grid, *taken, compat=True)
        case.equal(target, f"{key}/group")
        assert torch.equal(released, case[f"{key}/merged"])
        assert torch.equal(take_rows(released, flat_rows(target, released.shape[1])), case[f"{key}/recovered"])
        assert torch.equal(target.gather(1, order), torch.arange(order.shape[1]).expand_as(order))
        assert row["differs_from_all_members"] == (not torch.equal(merged, released))
        assert row["differs_from_all_members"] == (row["targets_with_two_sources"] > 0)


def compare_model(case: Case) -> None:
    config, merges = case.config, case.config["merges"]
    tolerance = SINGLE if config["dtype"] == "float32" else DOUBLE
    expect(config, prefix_tokens=1 + config["reg_tokens"], targets_with_two_sources=0)
    host = plain_host(case, qkv_bias=config["qkv_bias"], reg_tokens=config["reg_tokens"])
    model = effvit.sparsify(
        host,
        "cubistmerge",
        reduce_at=[merge["before_block"] for merge in merges],
        r_h=[merge["r_h"] for merge in merges],
        r_w=[merge["r_w"] for merge in merges],
    )
    grid = (config["img_size"] // config["patch"],) * 2
    for merge in merges:
        assert model.reducers[merge["before_block"]].taken(tuple(merge["from_grid"])) == (merge["r_h"], merge["r_w"])
    assert model.reducers[merges[-1]["before_block"]].grid_behind(grid) == tuple(config["tokens_left"])
    with torch.no_grad():
        case.close(model(case["input"]), "output", tolerance)
        case.close(model.forward_features(case["input"]), "tokens", tolerance)
        trace = [features.tokens for features in model.trace_tokens(case["input"])]
    case.equal(trace[-1].source, "group")
    for number, merge in enumerate(merges):
        step = trace[merge["before_block"]].trail.step
        assert step is not None
        case.equal(step.target(trace[0].anchor), f"merge{number}/group")
    case.gradients(model)
