"""Attention of tokens on each of its ways: dropout, gates and picked rows."""

from __future__ import annotations

import pytest
import torch
from hosts import make_host, make_model
from torch import Tensor, nn

from effvit.attention import ATTENTION_CLASSES, AttnState, Selection
from effvit.block import rehouse
from effvit.tokens import TokenMap, flat_rows, take_rows

WAYS = ("fused", "eager", "edited", "packed")


def attend(attn: nn.Module, x: Tensor, way: str) -> Tensor:
    """Attention of a sequence (B, 1 + N, C) of one class token and a row of patches."""
    tokens = TokenMap.full(x, (1, x.shape[1] - 1), 1, 1)
    attn.fused_attn = way == "fused"
    if way == "packed":
        every = tokens.source
        tokens = tokens.keep(every, every.shape[1], valid=torch.ones_like(every, dtype=torch.bool), packed=True)
        return tokens.unpack(attn(tokens.pack(x), tokens))
    return attn(x, tokens, edit_map=(lambda weights: weights) if way == "edited" else None)


def gated(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """timm's module with a gate, which its classes offer but none of its hosts here uses, and ours with its weights."""
    module = cls(32, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm, gated=True).eval()
    return module, rehouse(module, ATTENTION_CLASSES[cls])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_drops_attention_in_training_alone(way: str) -> None:
    """At a rate of 1 dropout zeroes the softmax map, which leaves the bias of the projection."""
    attn = make_model("tome", "class_token").blocks[0].attn
    attn.attn_drop.p = 1.0
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert torch.equal(attend(attn.train(), x, way), attn.proj.bias.expand(2, 9, -1))
        evaluated = attend(attn.eval(), x, way)
    expected = make_host("class_token").blocks[0].attn(x)
    assert torch.allclose(evaluated, expected, atol=1e-6)


@pytest.mark.parametrize("cls", ATTENTION_CLASSES)
def test_gated_attention_is_that_of_timm(cls: type[nn.Module]) -> None:
    theirs, ours = gated(cls)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert torch.equal(ours(x, TokenMap.full(x, (1, 8), 1, 1)), theirs(x))


@pytest.mark.parametrize("cls", ATTENTION_CLASSES)
def test_picked_rows_are_those_of_the_whole_attention(cls: type[nn.Module]) -> None:
    """A query attends alone: each picked row, its gate included, is that of timm's module, which picks none."""
    theirs, ours = gated(cls)
    x = torch.randn(2, 9, 32)
    tokens = TokenMap.full(x, (1, 8), 1, 1)
    index = torch.tensor([[5, 0, 3], [1, 2, 7]])
    rows = flat_rows(index, 9, 1)

    def pick(_: AttnState) -> Selection:
        return Selection(rows, tokens.keep(index, 3))

    with torch.no_grad():
        assert torch.allclose(ours(x, tokens, pick=pick), take_rows(theirs(x), rows), atol=1e-6)
