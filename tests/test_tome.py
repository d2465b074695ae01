"""ToMe: how many tokens merge, and what their sizes count."""

from __future__ import annotations

import torch
from hosts import make_host

import effvit
from effvit.attention import AttnState
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
    merged, left = ToMe.plan(1, r=300)[0].reduce(x, tokens, AttnState(k, k, k, 0.5, tokens=tokens, keys=tokens))
    assert left.size is not None
    assert merged.dtype == torch.bfloat16
    assert left.size[0].tolist() == torch.bincount(left.source[0], minlength=300).tolist()
    assert left.size.max() == 301
