"""EViT: how many tokens are kept, and that keeping them all is the host."""

from __future__ import annotations

import pytest
import torch
from hosts import make_host, make_images, make_model

from effvit.attention import AttnState
from effvit.reducers.evit import EViT
from effvit.tokens import TokenMap


@pytest.mark.parametrize("num_tokens", [48, 60])
def test_absolute_number_beyond_the_patches_keeps_all_and_fuses_nothing(num_tokens: int) -> None:
    """With no token to sum up there is no fused one (section 3.1): counts and scores are those of timm's host."""
    model = make_model("evit", "class_token", num_tokens=num_tokens)
    x = make_images(model)
    assert model.token_counts() == [48] * 4
    assert torch.equal(model(x), make_host("class_token")(x))


@pytest.mark.parametrize("num_class", [1, 2], ids=["class", "distilled"])
@pytest.mark.parametrize("fuse_token", [True, False])
def test_kept_are_the_most_attended_and_the_fused_token_their_rest_by_attention(
    num_class: int, fuse_token: bool
) -> None:
    """Section 3.1, eq. 3 and 4, image by image: attention is the mean over heads and class-like tokens."""
    x, q, k = torch.randn(3, 12, 5), torch.randn(3, 2, 12, 4), torch.randn(3, 2, 12, 4)
    tokens = TokenMap.full(x, (3, 3), 3, num_class)  # a register too, which scores nothing
    reducer = EViT.plan(1, keep_rate=0.5, reduce_at=(0,), fuse_token=fuse_token)[0]
    reduced, left = reducer.reduce(x, tokens, AttnState.of(q, k, k, 0.5, tokens))
    attention = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, :num_class].mean((1, 2))[:, 3:]
    assert left.num_tokens == reducer.count(9, 9) == 5 + fuse_token  # 4.5 rounded up
    for image, scores, out, anchor in zip(x, attention, reduced, left.anchor, strict=True):
        order = scores.argsort(descending=True)
        rest = (scores[order[5:], None] * image[3 + order[5:]]).sum(0, keepdim=True)
        expected = torch.cat([image[:3], image[3 + order[:5]], rest[: int(fuse_token)]])
        assert torch.allclose(out, expected, atol=1e-6)
        assert anchor.tolist() == order[: 5 + fuse_token].tolist()


def test_absolute_number_counts_beside_a_rate_of_one() -> None:
    assert EViT.plan(4, keep_rate=1.0, num_tokens=3, reduce_at=(1,))[1].count(9, 9) == 4  # and the fused one


@pytest.mark.parametrize(("host", "number"), [("class_token", 1), ("distilled", 2), ("average_pool", 0)])
def test_distillation_token_is_a_class_token_too(host: str, number: int) -> None:
    model = make_model("tome", host)
    assert model.forward_tokens(make_images(model)).tokens.num_class == number


def test_defaults_are_the_published_ones() -> None:
    """Section 4.1: a rate of 0.7 in the 4th, 7th and 10th of 12 layers, with the fused token."""
    plan = EViT.plan(12)
    assert {block: (reducer.keep_rate, reducer.fuse_token) for block, reducer in plan.items()} == dict.fromkeys(
        (3, 6, 9), (0.7, True)
    )
