"""The controls against two independent constructions of their orders, which have no official code."""

from __future__ import annotations

import torch
from golden_cases import Case, expect, plain_host

import effvit
from effvit.reducers.static_selection import lowest, random_ranks, uniform_ranks


def compare(case: Case) -> None:
    expect(case.config, checked=True)
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
        with torch.no_grad():
            case.close(model(case["input"]), "output")
            trace = model.trace_tokens(case["input"])
        for stage, block in enumerate(blocks):
            for anchor in trace[block].tokens.anchor:
                case.equal(anchor, f"stage{stage}/kept")
