"""ToMe: how many tokens merge, and what their sizes count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hosts import make_host
from slow_merging import slow_merge

import effvit
from effvit.attention import AttnState
from effvit.reducers.bipartite import kth_bipartite_target
from effvit.reducers.tome import ToMe
from effvit.tokens import TokenMap


def test_odd_number_of_tokens_loses_the_smaller_half() -> None:
    """At most the tokens of one of two alternating sets can merge: of 15 seven, of 8 four, of 4 two, of 2 one."""
    model = effvit.sparsify(make_host("class_token", dynamic_img_size=True), "tome", r=100).eval()
    assert model.token_counts((3, 5)) == [8, 4, 2, 1]
    with torch.no_grad():
        features = model.trace_tokens(torch.randn(2, 3, 3 * 8, 5 * 8))
    assert [tokens.anchor.shape[1] for _, tokens in features] == [8, 4, 2, 1]


def test_sizes_of_a_half_precision_model_count_every_patch() -> None:
    """All 300 tokens of a set are equally alike to those of the other, so one token takes them: bfloat16 has no 301."""
    x = torch.ones(1, 600, 8, dtype=torch.bfloat16)
    tokens, k = TokenMap.full(x, (20, 30), 0, 0), torch.ones(1, 2, 600, 4, dtype=torch.bfloat16)
    merged, left = ToMe.plan(1, r=300)[0].reduce(x, tokens, AttnState.of(k, k, k, 0.5, tokens))
    assert left.size is not None
    assert merged.dtype == torch.bfloat16
    assert left.size[0].tolist() == torch.bincount(left.source[0], minlength=300).tolist()
    assert left.size.max() == 301


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_merging_is_that_of_the_slow_search(num_prefix: int, prop_attn: bool) -> None:
    """Two blocks, so that sizes differ in the second; keys are averaged over heads."""
    length = num_prefix + 12
    x, tokens = torch.randn(3, length, 5), TokenMap.full(torch.zeros(3, length, 1), (3, 4), num_prefix, 0)
    reducer = ToMe.plan(1, r=4, prop_attn=prop_attn)[0]
    size = torch.ones(3, 12)
    for left in (8, 4):
        k = torch.randn(3, 2, x.shape[1], 4)
        metric = k.mean(1)[:, num_prefix:]
        merged = [slow_merge(*image, 4, num_prefix) for image in zip(x, size, metric, strict=True)]
        x, tokens = reducer.reduce(x, tokens, AttnState.of(k, k, k, 0.5, tokens))
        size = torch.stack([sizes for _, sizes in merged])
        assert torch.allclose(x, torch.stack([kept for kept, _ in merged]), atol=1e-6)
        assert tokens.size is not None
        assert torch.equal(tokens.size, F.pad(size, (num_prefix, 0), value=1))
        assert tokens.num_tokens == left
        assert tokens.key_weight is (tokens.size if prop_attn else None)


def test_kth_tokens_absorb_by_the_cosine() -> None:
    """Of four tokens the second and fourth absorb. The first is parallel to the second, though nearer to the fourth."""
    metric = torch.tensor([[[1.0, 1.0], [0.1, 0.1], [0.0, 1.0], [0.0, 2.0]]])
    assert kth_bipartite_target(metric, 2).tolist() == [[0, 0, 1, 1]]
