"""Zero-TPrune: which heads count, how the tokens are split, and that what was pruned stays so."""

from __future__ import annotations

import pytest
import torch

from effvit.attention import AttnState
from effvit.reducers.zero_tprune import PARTITIONS, ZeroTPrune, aggregate_heads, split_groups
from effvit.tokens import TokenMap

# Times four tokens: (1, 1, 1, 1) and (2, 1, 0.5, 0.5), of variance 0 and (1 + 0 + 0.25 + 0.25) / 4 = 0.375.
FLAT, UNEVEN = (0.25, 0.25, 0.25, 0.25), (0.5, 0.25, 0.125, 0.125)


@pytest.mark.parametrize(
    ("var_range", "heads"),
    [
        ((0.0, 0.375), (FLAT, UNEVEN)),  # both ends belong to the range
        ((0.0, 0.37), (FLAT,)),
        ((0.375, 1.0), (UNEVEN,)),
        ((0.1, 0.2), (FLAT, UNEVEN)),  # none is in range: all count
        (None, (FLAT, UNEVEN)),
    ],
)
def test_heads_in_the_variance_range_count(
    var_range: tuple[float, float] | None, heads: tuple[tuple[float, ...], ...]
) -> None:
    """Section 3.2: the root mean square over the heads that are listed, by hand."""
    expected = torch.tensor(heads).square().mean(0).sqrt()
    assert torch.allclose(aggregate_heads(torch.tensor([[FLAT, UNEVEN]]), var_range)[0], expected)


@pytest.mark.parametrize(
    ("partition", "group_a", "group_b"),
    [
        ("sequential_u", [1, 3], [0, 2, 4]),
        ("sequential_i", [2, 4], [1, 3, 0]),
        ("alternate", [1, 0], [3, 2, 4]),
    ],
)
def test_groups_are_those_of_the_paper(partition: str, group_a: list[int], group_b: list[int]) -> None:
    """Section 3.3 on five tokens that rank 1, 3, 0, 2, 4 from the least important to the most, split by hand."""
    a, b = split_groups(torch.tensor([[0.3, 0.1, 0.4, 0.2, 0.5]]), partition)
    assert (a.tolist(), b.tolist()) == ([group_a], [group_b])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_pruned_look_alikes_do_not_come_back_where_no_patch_gathers_importance(partition: str) -> None:
    """All attention goes to the class token, so all patches tie at zero; pruned ones must stay out of the choice."""
    x, weights = torch.randn(16, 9, 8), torch.zeros(16, 1, 9, 9)
    weights[..., 0] = 1
    tokens, k = TokenMap.full(x, (2, 4), 1, 1), torch.randn(16, 1, 9, 8)
    state = AttnState(k, k, k, 1.0, tokens=tokens, keys=tokens, x=x, weights=weights)
    settings = {"reduce_at": (0,), "r": 3, "num_iters": 2, "var_range": None, "partition": partition}
    left, kept = (ZeroTPrune.plan(1, keep_rate=rate, **settings)[0].reduce(x, tokens, state)[1] for rate in (1.0, 0.4))
    assert (left.num_tokens, kept.num_tokens) == (5, 2)
    assert all(set(few.tolist()) <= set(more.tolist()) for few, more in zip(kept.anchor, left.anchor, strict=True))
