"""Attention of tokens on each of its ways: dropout, gates and picked rows."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from effvit import attention
from effvit.attention import (
    ATTENTION_CLASSES,
    AttnState,
    Beside,
    Picked,
    SumMap,
    bias_as_features,
    biased_attention,
    map_sums,
)
from effvit.block import rehouse
from effvit.testing import assert_runs_on_fakes
from effvit.tokens import TokenMap, flat_rows, take_rows, wide_dtype

GATED = (Attention, AttentionRope, EvaAttention)
WAYS = ("fused", "eager", "edited", "summed", "packed")
EDITS = {"edited": lambda weights: weights, "summed": SumMap()}


def attend(attn: nn.Module, x: Tensor, way: str) -> Tensor:
    """Attention of a sequence (B, 1 + N, C) of one class token and a row of patches."""
    tokens = TokenMap.full(x, (1, x.shape[1] - 1), 1, 1)
    attn.fused_attn = way == "fused"
    if way == "packed":
        every = tokens.source
        tokens = tokens.keep(every, every.shape[1], valid=torch.ones_like(every, dtype=torch.bool), packed=True)
        return tokens.unpack(attn(tokens.pack(x), tokens))
    return attn(x, tokens, edit_map=EDITS.get(way))


GATED = [cls for cls in ATTENTION_CLASSES if "gated" in inspect.signature(cls).parameters]


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


@pytest.mark.parametrize("cls", GATED)
def test_gated_attention_is_that_of_timm(cls: type[nn.Module]) -> None:
    theirs, ours = gated(cls)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert torch.equal(ours(x, TokenMap.full(x, (1, 8), 1, 1)), theirs(x))


@pytest.mark.parametrize("cls", GATED)
def test_picked_rows_are_those_of_the_whole_attention(cls: type[nn.Module]) -> None:
    """A query attends alone: each picked row, its gate included, is that of timm's module, which picks none."""
    theirs, ours = gated(cls)
    x = torch.randn(2, 9, 32)
    tokens = TokenMap.full(x, (1, 8), 1, 1)
    index = torch.tensor([[5, 0, 3], [1, 2, 7]])
    rows = flat_rows(index, 9, 1)

    def pick(_: AttnState) -> Picked:
        return Picked(rows, tokens.keep(index, 3))

    with torch.no_grad():
        assert torch.allclose(ours(x, tokens, pick=pick), take_rows(theirs(x), rows), atol=1e-6)


@pytest.mark.parametrize("mapped", [False, True], ids=["beside", "map"])
def test_class_rows_are_those_of_the_softmax_map_with_weights_and_without_padding(mapped: bool) -> None:
    """A key of weight w counts like w keys, padding like none: exp(scale q k) times that, over its sum."""
    x, q, k = torch.randn(2, 8, 16), torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    tokens = replace(TokenMap.full(x, (2, 3), 2, 2), key_weight=torch.rand(2, 8) + 0.5, valid=valid)
    weight = tokens.key_weight * F.pad(valid, (2, 0), value=True)  # (B, P+N)
    weighted = (q @ k.transpose(-2, -1) * 0.3).exp() * weight[:, None, None]
    expected = weighted / weighted.sum(-1, keepdim=True)
    state = AttnState.of(q, k, k, 0.3, tokens)
    assert torch.allclose(state.softmax_map(), expected, atol=1e-6)
    rows = state._replace(weights=expected if mapped else None).class_rows()
    assert torch.allclose(rows, expected[:, :, :2], atol=1e-6)


def weigh(state: AttnState) -> Tensor:
    """Weights of the queries: those of the class token and the first patch count more."""
    return torch.ones_like(state.q[..., 0]).index_fill(2, torch.tensor([0, 1]), 3.5)


@pytest.mark.parametrize("entries", [12 * 81, 200, 18, 1], ids=["many heads", "heads", "rows", "row"])
@pytest.mark.parametrize("weighted", [False, True])
def test_map_in_pieces_is_summed_and_applied_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, entries: int, weighted: bool
) -> None:
    """Nine tokens and three heads of two images, of whose maps 81 entries each only so many are held."""
    monkeypatch.setattr(attention, "CACHED_ENTRIES", entries)
    q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
    x = torch.randn(2, 9, 12)
    tokens = replace(TokenMap.full(x, (2, 4), 1, 1), key_weight=torch.rand(2, 9) + 0.5)
    state = AttnState.of(q, k, v, 0.5, tokens)
    applied, out = attention.sum_and_apply(state, SumMap(weigh if weighted else None))
    beside = attention.sum_beside(state, SumMap(weigh if weighted else None))
    weights = state.softmax_map()
    expected = map_sums(weights, weigh(state) if weighted else None)
    assert torch.allclose(out, weights @ v, atol=1e-6)
    for found in (applied.sums, beside.sums):
        assert found is not None
        assert torch.allclose(found.diagonal, weights.diagonal(dim1=-2, dim2=-1), atol=1e-6)
        assert torch.allclose(found.received, expected.received, atol=1e-6)
    rows = weigh(state).unsqueeze(-1) if weighted else 1.0
    assert torch.allclose(expected.received, (rows * weights).sum(-2), atol=1e-6)


def test_gradient_beside_the_sums_is_that_of_the_whole_map() -> None:
    """With a gradient the output comes from the fused kernel, and autograd does not see the map that is summed."""
    attn = make_model("tome", "class_token").blocks[0].attn
    x = torch.randn(2, 9, 32, requires_grad=True)
    tokens = replace(TokenMap.full(x, (2, 4), 1, 1), key_weight=torch.rand(2, 9) + 0.5)
    beside: Beside[AttnState] = Beside()
    cotangent = torch.randn(2, 9, 32)
    own = attn(x, tokens, edit_map=SumMap(), beside=beside)
    whole = attn(x, tokens, edit_map=lambda weights: weights)
    assert torch.allclose(own, whole, atol=1e-6)
    variables = [x, *(p for p in attn.parameters())]
    for mine, theirs in zip(*(torch.autograd.grad(y, variables, cotangent) for y in (own, whole)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert beside.value.sums is not None
    assert not beside.value.sums.received.requires_grad
    with torch.no_grad():
        assert torch.allclose(attn(x, tokens, edit_map=SumMap()), whole, atol=1e-6)


def test_grouped_keys_are_those_of_timm() -> None:
    """Two groups of two query heads each: the first two read the first key head."""
    module = AttentionRope(32, num_heads=4, num_kv_heads=2, qkv_fused=False).eval()
    ours = rehouse(module, ATTENTION_CLASSES[AttentionRope])
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert torch.allclose(ours(x, TokenMap.full(x, (1, 8), 1, 1)), module(x), atol=1e-6)


class Doubled(nn.Module):
    """A layer in place of another that adds to what its weight gives, as an adapter does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight  # timm reads it

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("cls", GATED)
def test_layer_in_place_of_the_projection_is_called(cls: type[nn.Module]) -> None:
    """Doubled queries, keys and values are those of doubled weights; DINOv3 has a bias beside, which is not doubled."""
    module = cls(32, num_heads=2, qkv_bias=cls is EvaAttention, norm_layer=nn.LayerNorm).eval()
    x = torch.randn(2, 9, 32)
    wrapped, doubled = (rehouse(copy.deepcopy(module), ATTENTION_CLASSES[cls]) for _ in range(2))
    wrapped.qkv = Doubled(wrapped.qkv)
    with torch.no_grad():
        doubled.qkv.weight.mul_(2)
        for attn in (wrapped, doubled):
            if cls is EvaAttention:
                attn.v_bias.copy_(torch.arange(32.0))
        tokens = TokenMap.full(x, (1, 8), 1, 1)
        assert torch.allclose(wrapped(x, tokens), doubled(x, tokens), atol=1e-5)


def test_bias_that_rides_in_features_keeps_sixteen_bits_in_bfloat16() -> None:
    """Of the two parts of eight bits each; what is added to the products over the scale is the bias."""
    zeros, bias = torch.zeros(1, 2, 7, 8, dtype=torch.bfloat16), torch.rand(1, 7) * 5
    q, k, _ = bias_as_features(zeros, zeros, zeros, bias, 0.25)
    product = q.float() @ k.float().transpose(-2, -1) * 0.25
    assert torch.allclose(product, bias[:, None, None].expand_as(product), rtol=2**-15, atol=0)


@pytest.mark.parametrize("rotate_half", [False, True])
@pytest.mark.parametrize("cls", [AttentionRope, EvaAttention])
def test_rotated_attention_is_that_of_timm(cls: type[nn.Module], rotate_half: bool) -> None:
    """DINOv3 and SigLIP-like hosts pair the halves of a head, others its neighbours."""
    module = cls(32, num_heads=2, norm_layer=nn.LayerNorm, rotate_half=rotate_half).eval()
    x, rope = torch.randn(2, 9, 32), torch.randn(8, 32)  # sine and cosine of 16 channels for each patch
    with torch.no_grad():
        ours = rehouse(module, ATTENTION_CLASSES[cls])(x, TokenMap.full(x, (2, 4), 1, 1), rope)
        assert torch.equal(ours, module(x, rope=rope))


def test_rehoused_module_shares_parameters_and_no_slot() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    new = rehouse(module, nn.Sequential)
    assert new[0] is module[0]
    new[0] = nn.Identity()
    new.register_buffer("mean", torch.zeros(1))
    assert isinstance(module[0], nn.Linear)
    assert not list(module.buffers())


def key_bias(*weights: float) -> Tensor:
    """(1, 1, 1, N) the logarithm of key weights, of which 0 is a padded slot."""
    return torch.tensor(weights).log()[None, None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_bias_as_features_attends_as_the_mask_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 3, number, 16).to(dtype) for number in (5, 7, 7))
    bias = torch.cat([key_bias(1, 3, 9, 1, 0, 0, 2), key_bias(1, 1, 1, 1, 1, 1, 0)]).to(wide_dtype(dtype))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), bias.double())
    monkeypatch.setattr(attention, "bias_keeps_from_flash", lambda q, k: True)
    out = biased_attention(q, k, v, bias, 0.0)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    error = (out.double() - expected).abs().max()
    assert error < {torch.float64: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.parametrize("method", ["tome", "ats", "dymu", "algm"])
def test_models_score_the_same_with_the_bias_as_features(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(method, "class_token")
    x = make_images(model, 3)
    x[1] *= 0.2
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(attention, "bias_keeps_from_flash", lambda q, k: True)
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("number", "dtype", "enabled", "masked"),
    [
        (600, torch.bfloat16, True, False),
        (600, torch.float16, True, False),
        (600, torch.float32, True, True),
        (600, torch.bfloat16, False, True),
        (100, torch.bfloat16, True, True),
    ],
)
def test_flash_attention_gets_no_mask_on_a_gpu(
    number: int, dtype: torch.dtype, enabled: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention takes half precision and no mask; on few keys a mask is cheaper than more features."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: enabled)
    masks: list[Tensor | None] = []
    attend = F.scaled_dot_product_attention

    def looking(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", looking)

    def run(x: Tensor) -> Tensor:
        return biased_attention(x, x, x, x.new_zeros(2, 1, 1, number, dtype=torch.float32), 0.0)

    assert_runs_on_fakes(nn.Identity(), run, torch.zeros(2, 3, number, 64, dtype=dtype))
    assert [mask is not None for mask in masks] == [masked]
