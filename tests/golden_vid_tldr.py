"""vid-TLDR against the official function that scores and merges; its models are of videos and were not run."""

from __future__ import annotations

from dataclasses import replace

import torch
from golden_cases import Case, expect
from torch import Tensor

from effvit.attention import AttnState
from effvit.reducers.bipartite import matching_target
from effvit.reducers.vid_tldr import Thinned, VidTLDR, foreground_scores, sharpness
from effvit.tokens import TokenMap


def compare(case: Case) -> None:
    expect(case.config, checked=True)
    assert not case.config["state_names"]
    for number, row in enumerate(case.config["subcases"]):
        key, number_of_tokens = f"s{number}", row["T"]
        x, attention = case[f"{key}/x"], case[f"{key}/attention"]
        assert attention.shape == (row["B"], row["heads"], number_of_tokens, number_of_tokens)
        tokens = TokenMap.full(x, (1, number_of_tokens), 0, 0)
        if f"{key}/size" in case:
            tokens = replace(tokens, key_weight=case[f"{key}/size"].squeeze(-1))
        state = state_of(attention, tokens)
        case.close(foreground_scores(sharpness(state)), f"{key}/score")
        merged, left = VidTLDR.plan(1, r=row["r"])[0].reduce(x, tokens, state)
        case.close(merged, f"{key}/merged")
        assert left.key_weight is not None
        case.close(left.key_weight.unsqueeze(-1), f"{key}/merged_size")
        step = left.trail.step
        assert isinstance(step, Thinned)
        target = matching_target(step.matching, tokens.source)
        case.equal(target, f"{key}/pos")
        case.close(source_matrix(step, target), f"{key}/source")
        assert torch.equal(left.source >= 0, case[f"{key}/source"].sum(1) > 0)


def state_of(attention: Tensor, tokens: TokenMap) -> AttnState:
    """What a block with this attention map knows, whatever the sizes of its tokens."""
    k = torch.eye(attention.shape[-1]).expand_as(attention)
    return AttnState.of(attention.log(), k, k, 1.0, tokens)


def source_matrix(step: Thinned, target: Tensor) -> Tensor:
    """The part of every old token in every new one, (B, N-r, N)."""
    part = torch.ones_like(target, dtype=torch.float32).scatter(1, step.matching.source, step.part)
    matrix = torch.zeros(len(target), step.order.shape[1], target.shape[1])
    return matrix.scatter(1, target.unsqueeze(1), part.unsqueeze(1))
