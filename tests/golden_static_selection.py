"""The controls: two independent constructions of their orders, and the official code of the radial patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from golden_cases import Case, expect, plain_host

import effvit
from effvit.reducers.static_selection import Radial, lowest, random_ranks, uniform_ranks


def compare(case: Case) -> None:
    expect(case.config, checked=True)
    if case.config.get("kind") == "heuristic":
        compare_rings(case)
    else:
        (compare_orders if "subcases" in case.config else compare_model)(case)


def compare_orders(case: Case) -> None:
    assert not case.config["state_names"]
    for number, config in enumerate(case.config["subcases"]):
        grid, key = tuple(config["grid"]), f"s{number}"
        for name, ranks in (("uniform", uniform_ranks(grid)), ("random", random_ranks(grid, config["seed"]))):
            case.equal(ranks, f"{key}/{name}_rank")
            patches = torch.arange(len(ranks)).unsqueeze(0)
            for kept in config["counts"]:
                case.equal(lowest(ranks, patches, kept)[0], f"{key}/{name}_k{kept}")


def compare_model(case: Case) -> None:
    config = case.config
    host = plain_host(case)
    method, blocks, counts = config["kind"], config["loc"], config["counts"]
    seed = {"seed": config["random_seed"]} if method == "random" else {}
    by_rate = effvit.sparsify(host, method, keep_rate=config["rate"], reduce_at=blocks, **seed)
    by_number = effvit.sparsify(host, method, num_tokens=counts, reduce_at=blocks, **seed)
    if method == "uniform":
        expect(config, random_seed=0)  # it draws nothing
    for model in (by_rate, by_number):
        assert [model.token_counts()[block] for block in blocks] == counts
        compare_run(case, model, blocks)


def compare_run(case: Case, model: Any, blocks: list[int]) -> None:
    """Scores, and the patches that stay in each of the blocks."""
    with torch.no_grad():
        case.close(model(case["input"]), "output")
        trace = model.trace_tokens(case["input"])
    for stage, block in enumerate(blocks):
        for anchor in trace[block].tokens.anchor:
            case.equal(anchor, f"stage{stage}/kept")


def compare_rings(case: Case) -> None:
    """Patches are masked there and dropped here, of which the class token notices nothing."""
    config = case.config
    expect(config, official_commit="88fe07ebbc5ffbf3a36814526577f1a8576e048d")
    host, official, blocks = plain_host(case), config["settings"], config["reduction_loc"]
    settings = {"reduce_at": blocks, "pattern": official["heuristic_pattern"]}
    if official["not_contiguous"]:
        expect(official, min_radius=None)
        model = effvit.sparsify(host, "radial", **settings, keep_rate=config["keep_rate"][0])
        by_number = effvit.sparsify(host, "radial", **settings, num_tokens=config["counts"])
        assert model.token_counts() == by_number.token_counts()
    else:
        blocks = list(range(min(blocks), max(blocks) + 1))
        model = effvit.sparsify(host, "radial", **settings, min_radius=official["min_radius"] or 0.0)
    compare_run(case, model, blocks)


def compare_counts(table: Path, content: Any) -> None:
    """A table of the patches that the official code keeps."""
    expect(content, official=True, checked=True)
    for row in content["rows"]:
        grid, pattern = (row["grid"], row["grid"]), row["pattern"]
        if "asked" in row:
            plan = Radial.plan(12, keep_rate=row["rate"], reduce_at=(3, 6, 9), pattern=pattern)
            kept = row["kept"]
        else:
            kept = list(row["kept"].values())
            plan = Radial.plan(
                row["depth"], reduce_at=row["reduction_loc"], pattern=pattern, min_radius=row["min_radius"] or 0.0
            )
            assert list(plan) == row["blocks"]
        assert [reducer.count_on(grid[0] ** 2, grid) for reducer in plan.values()] == kept
