"""PatchMerger and Sinkhorn: what they compute, where their mixtures stand, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from safetensors.torch import save_file

import effvit
from effvit.reducers.mixing import mixture_places
from effvit.reducers.sinkhorn import transport_plan, unit_codes

METHODS = ("sinkhorn", "patchmerger")


def official_plan(scores: torch.Tensor, eps: float, num_iters: int) -> torch.Tensor:
    """Section 1 of the method as the release writes it, with its marginals."""
    codes, tokens = scores.shape[1:]
    marginal = -math.log(codes + tokens)
    logits = scores / eps
    f, g = torch.zeros(len(scores), codes, 1).double(), torch.zeros(len(scores), 1, tokens).double()
    for _ in range(num_iters):
        f = marginal - (logits + g).logsumexp(2, keepdim=True)
        g = marginal - (logits + f).logsumexp(1, keepdim=True)
    return (logits + f + g - marginal).exp()


@pytest.mark.parametrize("num_iters", [1, 2, 5])
def test_transport_plan_is_that_of_the_release_whose_marginals_cancel(num_iters: int) -> None:
    scores = 2 * torch.rand(2, 5, 12, dtype=torch.float64) - 1
    plan = transport_plan(scores, 0.3, num_iters)
    assert torch.allclose(plan, official_plan(scores, 0.3, num_iters), rtol=1e-12)
    assert torch.allclose(plan.sum(1), torch.ones(2, 12).double())


def test_codes_are_divided_by_their_norm_outside_the_graph() -> None:
    codes = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(unit_codes(codes), F.normalize(codes, dim=-1))
    (unit_codes(codes) * torch.arange(24.0).view(4, 6)).sum().backward()
    assert torch.equal(codes.grad, torch.arange(24.0, dtype=torch.float64).view(4, 6))  # type: ignore[arg-type]


def test_sinkhorn_sums_unit_tokens() -> None:
    model = make_model("sinkhorn", "average_pool").double()
    patches = torch.randn(2, 48, 32, dtype=torch.float64)
    mixed, shares = model.reducers[1].mix(patches)  # type: ignore[operator]
    assert torch.allclose(mixed, shares @ F.normalize(patches, dim=-1))
    assert torch.allclose(model.reducers[1].mix(3 * patches)[0], mixed)  # type: ignore[operator]


@pytest.mark.parametrize("scaled", [False, True])
def test_patchmerger_is_attention_of_its_queries_to_normed_tokens(scaled: bool) -> None:
    """The expectation is torch's own attention, of one head."""
    model = make_model("patchmerger", "average_pool", scaled_attn=scaled).double()
    reducer = model.reducers[1]
    patches = torch.randn(2, 48, 32, dtype=torch.float64)
    normed = reducer.norm(patches)  # type: ignore[operator]
    queries = reducer.queries.expand(2, -1, -1)  # type: ignore[operator]
    expected = F.scaled_dot_product_attention(queries, normed, normed, scale=None if scaled else 1.0)
    assert torch.allclose(reducer.mix(patches)[0], expected)  # type: ignore[operator]


def test_a_mixture_stands_on_the_token_that_weighs_most_among_its_own() -> None:
    shares = torch.tensor([[[0.6, 0.3, 0.0, 0.2], [0.1, 0.5, 0.9, 0.1], [0.0, 0.1, 0.2, 0.1]]])
    anchor, mixture = mixture_places(shares)
    # Token 3 weighs least in its mixture, the first, and is given to the third, in which no token weighs most.
    assert anchor.tolist() == [[0, 2, 3]]
    assert mixture.tolist() == [[0, 1, 1, 2]]


def test_mixtures_stand_on_different_tokens_of_their_own() -> None:
    """However the weights are, one mixture taking all tokens and as many mixtures as tokens too."""
    for number, length in ((1, 1), (3, 3), (4, 9), (9, 9)):
        shares = torch.rand(5, number, length)
        shares[0, 0] = 2
        shares[1] = 0.5
        anchor, mixture = mixture_places(shares)
        assert all(len(set(row)) == number for row in anchor.tolist())
        assert torch.equal(mixture.gather(1, anchor), torch.arange(number).expand(5, -1))


@pytest.mark.parametrize("method", METHODS)
def test_model_without_trained_weights_says_so_once(method: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        effvit.sparsify(make_host("class_token"), method, num_tokens=(9, 5), reduce_at=(1, 2))
    assert [str(warning.message).partition(":")[0] for warning in said] == [
        f"{method} is made with random weights, which mix tokens to no purpose"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_model_that_takes_weights_over_says_nothing(method: str) -> None:
    """They are the parameters of the given model, so nothing about it is random that was not before."""
    model = make_model(method, "class_token")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = effvit.sparsify(model, method, **model.settings)
    for own, given in zip(again.reducers[1].parameters(), model.reducers[1].parameters(), strict=True):
        assert own is given


@pytest.mark.parametrize("method", METHODS)
def test_number_of_tokens_stays_with_the_weights(method: str) -> None:
    """None asks for shares of the patches, once: the settings tell the numbers, for other sizes too."""
    model = effvit.sparsify(make_host("class_token"), method, reduce_at=(1, 3))
    assert model.token_counts() == [48, 33, 33, 23]
    assert model.settings["num_tokens"] == [33, 23]
    model.set_input_size((64, 64))
    assert model.token_counts() == [64, 33, 33, 23]
    again = effvit.sparsify(make_host("class_token", img_size=(64, 64)), method, **model.settings)
    again.load_state_dict(model.state_dict())
    x = make_images(model)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("method", ["dpcknn", *METHODS])
def test_weights_of_the_plain_host_load(method: str, tmp_path: Path) -> None:
    small = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    host = timm.create_model("deit_tiny_patch16_224", **small)
    save_file(host.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    settings = {"num_tokens": 2, "reduce_at": (3,)}
    if method == "dpcknn":
        settings["k"] = 2
    model = timm.create_model(
        f"{method}_deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **small, **settings
    )
    assert torch.equal(model.head.weight, host.head.weight)


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_than_enter_are_refused(method: str) -> None:
    message = f"{method} in block 1 makes 9 tokens, but only 8 enter it; use larger images or a smaller num_tokens"
    with pytest.raises(ValueError, match=message):
        effvit.sparsify(make_host("class_token"), method, num_tokens=(8, 9), reduce_at=(0, 1))
    dynamic = effvit.sparsify(make_host("class_token", dynamic_img_size=True), method, num_tokens=9, reduce_at=(1,))
    with pytest.raises(ValueError, match=message):
        dynamic(torch.zeros(1, 3, 16, 32))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("sinkhorn", {"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ("sinkhorn", {"eps": float("nan")}, "eps must be a positive number, got nan"),
        ("sinkhorn", {"num_iters": 0}, "num_iters must be at least 1, got 0"),
        ("sinkhorn", {"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ("patchmerger", {"scaled_attn": 1}, "scaled_attn must be True or False, got 1"),
        ("patchmerger", {"num_tokens": 2.0}, "num_tokens must be a whole number, got 2.0"),
        ("patchmerger", {"num_tokens": [3, 2], "reduce_at": (1,)}, "num_tokens has 2 values for 1 block"),
    ],
)
def test_settings_out_of_range_are_named(method: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        effvit.sparsify(make_host("class_token"), method, **settings)
