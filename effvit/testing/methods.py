"""The contract of methods and hosts as test classes, for those of this package and for your own.

    import effvit.testing
    import my_package  # registers the method "normdrop"

    @effvit.testing.parametrize("normdrop")
    class TestNormDrop(effvit.testing.Contract):
        pass

runs a method with the settings of its ``example`` on a small host of every kind that it takes. A host of your own joins
them as ``effvit.testing.HOSTS["mine"] = function that makes a small one``, and
``effvit.testing.parametrize(hosts=["mine"])`` runs every method on it. pytest is needed, and
``pytest.register_assert_rewrite("effvit.testing")`` in a conftest.py before the import lets it show the values of a
failed assertion.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.block import call_block
from effvit.hosts.host import ReducedHost
from effvit.hosts.lvvit import LVViT
from effvit.recover import FILLS
from effvit.reducers import METHODS
from effvit.tokens import TokenMap

__all__ = [
    "HOSTS",
    "Contract",
    "assert_equal_scores_and_gradients",
    "assert_law",
    "double",
    "make_host",
    "make_images",
    "make_model",
    "pairs",
    "parametrize",
]

SIZE: dict[str, Any] = {
    "img_size": (48, 64),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 7,
}
ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_heads": 2}


def _gated(**kwargs: Any) -> Eva:
    """A host whose attention has gates, which timm's blocks take as an argument and its models do not hand on."""
    host = Eva(**kwargs)
    for block in host.blocks:
        block.attn.gate = nn.Linear(host.embed_dim, block.attn.attn_dim)
    host.init_weights()
    return host


HOSTS: dict[str, Callable[..., nn.Module]] = {
    "class_token": partial(VisionTransformer, **SIZE),
    "distilled": partial(VisionTransformerDistilled, **SIZE),
    "registers": partial(
        VisionTransformer,
        **SIZE,
        reg_tokens=4,
        init_values=0.1,
        qk_norm=True,
        no_embed_class=True,
        pre_norm=True,
    ),
    "average_pool": partial(VisionTransformer, **SIZE, class_token=False, global_pool="avg"),
    "register_no_class": partial(VisionTransformer, **SIZE, class_token=False, reg_tokens=1, global_pool="avg"),
    "attention_pool": partial(VisionTransformer, **SIZE, class_token=False, global_pool="map"),
    "eva02": partial(Eva, **(SIZE | ROPE), swiglu_mlp=True, scale_mlp=True, qkv_fused=False, init_values=0.1),
    "dinov3": partial(Eva, **(SIZE | ROPE), rope_type="dinov3", num_reg_tokens=4, init_values=0.1, global_pool="token"),
    "rope_mixed": partial(Eva, **(SIZE | ROPE), rope_type="mixed", attn_type="rope", global_pool="token"),
    "gated_grouped": partial(
        _gated,
        **(SIZE | ROPE),
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
        class_token=True,
        global_pool="avg",
    ),
    "lvvit": partial(LVViT, **(SIZE | {"patch_size": 16, "img_size": (64, 80)})),
}


def make_host(name: str, **kwargs: Any) -> Any:
    """A host with weights far enough from their initialisation that attention differs between tokens."""
    torch.manual_seed(0)
    host = HOSTS[name](**kwargs).eval()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter.ndim) ** 0.5)
    return host


def make_model(method: str, host: str, **settings: Any) -> Any:
    """The host under the method with the settings of its ``example``, some of them changed."""
    return effvit.sparsify(make_host(host), method, **(METHODS[method].example() | settings)).eval()


def make_images(model: Any, batch: int = 2) -> Tensor:
    """Images (B, 3, H, W) of the model's size, the same ones at every call."""
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def pairs(methods: Iterable[str] | None = None, hosts: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """(method, host) for all that fit each other, of all or of these methods and hosts."""
    names = list(HOSTS if hosts is None else hosts)
    no_class_token = {name for name in names if getattr(make_host(name), "cls_token", None) is None}
    return [
        (method, host)
        for method in (METHODS if methods is None else methods)
        for host in names
        if not (METHODS[method].needs_class_token and host in no_class_token)
    ]


def parametrize(*methods: str, hosts: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """Decorator of a subclass of ``Contract``: all tests with these methods, or all there are, on these hosts, or all.

    Raises:
        ValueError: An unknown method; the message names the nearest.
    """
    for method in methods:
        effvit.method_settings(method)
    return pytest.mark.parametrize(("method", "host"), pairs(methods or None, hosts))


def double(model: ReducedHost) -> ReducedHost:
    """The model in float64, where no decision is a matter of rounding."""
    return copy.deepcopy(model).double()


def assert_law(tokens: TokenMap) -> None:
    """source is a right inverse of anchor, and points to existing tokens."""
    number = tokens.anchor.shape[1]
    valid = torch.ones_like(tokens.anchor, dtype=torch.bool) if tokens.valid is None else tokens.valid
    place = torch.arange(number).expand_as(tokens.anchor)
    assert torch.equal(tokens.source.gather(1, tokens.anchor)[valid], place[valid])
    assert tokens.source.min() >= -1
    assert (tokens.source < tokens.counts().unsqueeze(1)).all()


def maps_and_scores(model: ReducedHost, x: Tensor) -> list[Tensor]:
    """The maps of all blocks and the scores."""
    return [*model.forward_intermediates(x, intermediates_only=True), model(x)]


def scores_and_gradients(run: Any, model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``run`` makes of the images, and the gradients of the model's parameters that have one, by name."""
    model.zero_grad()
    scores = run(x)
    scores.square().sum().backward()
    return scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_scores_and_gradients(other: Any, model: Any, x: Tensor) -> None:
    """``other`` runs ``model`` in another way: it gives the same scores, and the parameters the same gradients."""
    expected, own = scores_and_gradients(model, model, x)
    scores, recorded = scores_and_gradients(other, model, x)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert recorded.keys() == own.keys()
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in own.values())  # all there is where the true one is 0
    for name, gradient in own.items():
        slack = max(noise, 1e-4 * gradient.abs().max().item())
        assert torch.allclose(recorded[name], gradient, rtol=1e-3, atol=slack), name


class Contract:
    """What a method on a host must hold; see the module for how to run it on your own."""

    def test_output_is_finite_and_tokens_are_really_removed(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        assert model(x).isfinite().all()
        assert model(x).shape == (2, model.num_classes)
        features = model.trace_tokens(x)
        assert features[-1].x.shape[1] < model.num_prefix_tokens + model.patch_embed.num_patches
        for (y, tokens), bound in zip(features, model.token_counts(), strict=True):
            assert y.isfinite().all()
            assert y.shape[1] == model.num_prefix_tokens + tokens.anchor.shape[1]
            assert tokens.anchor.shape[1] <= bound
            assert METHODS[method].variable_length or tokens.anchor.shape[1] == bound
            assert_law(tokens)

    def test_nothing_reduced_is_bit_equal_to_timm(self, method: str, host: str) -> None:
        dense = make_host(host)
        model = effvit.sparsify(dense, method, **METHODS[method].off())
        x = make_images(dense)
        assert torch.equal(model(x), dense(x))
        assert torch.equal(model.forward_features(x), dense.forward_features(x))
        for own, timm_map in zip(
            model.forward_intermediates(x, intermediates_only=True),
            dense.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert torch.equal(own, timm_map)

    def test_an_image_does_not_depend_on_its_batch(self, method: str, host: str) -> None:
        model = double(make_model(method, host))
        x = make_images(model, batch=3).double()
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
        assert torch.allclose(together, alone, rtol=0, atol=1e-10)

    def test_eval_is_deterministic(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        assert torch.equal(model(x), model(x))

    def test_gradients_reach_every_parameter(self, method: str, host: str) -> None:
        model = make_model(method, host).train()
        model(make_images(model)).square().sum().backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert not without

    def test_checkpointing_changes_no_output_and_no_gradient(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        scores, plain = scores_and_gradients(model, model, x)
        model.set_grad_checkpointing(True)
        again, checkpointed = scores_and_gradients(model, model, x)
        assert torch.equal(again, scores)
        assert plain.keys() == checkpointed.keys() == dict(model.named_parameters()).keys()
        for name, gradient in plain.items():
            assert torch.allclose(gradient, checkpointed[name], rtol=1e-5, atol=1e-6)

    def test_forward_intermediates_ends_with_forward_features(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        final, maps = model.forward_intermediates(x)
        assert torch.allclose(final, model.forward_features(x), rtol=1e-5, atol=1e-5)
        grid = model.patch_embed.grid_size
        assert [m.shape for m in maps] == [(2, model.embed_dim, *grid)] * len(model.blocks)
        assert all(m.isfinite().all() for m in maps)

    def test_forward_head_of_forward_features_is_forward(self, method: str, host: str) -> None:
        model = double(make_model(method, host))
        x = make_images(model).double()
        assert torch.allclose(model.forward_head(model.forward_features(x)), model(x), rtol=0, atol=1e-10)

    def test_prefix_tokens_are_untouched_by_the_reduction_itself(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x, rope, tokens = model._start(make_images(model), memory=False)
        block = next(block for block in model.blocks if block.reducer is not None)
        index = list(model.blocks).index(block)
        for before in model.blocks[:index]:
            x, tokens = call_block(before, x, tokens, model._block_rope(rope, index))
        block_rope = model._block_rope(rope, index)
        entered: list[Tensor] = []
        hook = block.attn.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
        reduced, _ = call_block(block, x, tokens, block_rope)
        hook.remove()
        prefix = model.num_prefix_tokens
        assert torch.allclose(entered[0][:, :prefix], block.norm1(x)[:, :prefix], rtol=1e-5, atol=1e-6)
        if entered[0].shape[1] < x.shape[1]:  # reduced before attention, which then has fewer keys
            return
        reducer, block.reducer = block.reducer, None
        start = reducer.start(x, tokens) if tokens.carry is None else tokens
        plain, _ = call_block(block, x, start, block_rope)
        block.reducer = reducer
        assert torch.allclose(reduced[:, :prefix], plain[:, :prefix], rtol=1e-5, atol=1e-6)

    def test_state_dict_keys_are_those_of_timm(self, method: str, host: str) -> None:
        own = list(make_model(method, host).state_dict())
        learnt = [name for name in own if ".reducer." in name]  # what a method learns beside the weights
        assert [name for name in own if name not in learnt] == list(make_host(host).state_dict())
        assert bool(learnt) == METHODS[method].learns

    def test_model_survives_pickle_and_torch_save(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))

    def test_bf16_gives_scores_near_those_of_float32(self, method: str, host: str) -> None:
        """Under autocast and as a whole; near alone, since tokens of almost equal scores may change places."""
        model = make_model(method, host)
        x = make_images(model)
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.cosine_similarity(model(x).float(), expected).min() > 0.9
        half = copy.deepcopy(model).bfloat16()
        assert F.cosine_similarity(half(x.bfloat16()).float(), expected).min() > 0.9

    def test_other_input_sizes_after_set_input_size(self, method: str, host: str) -> None:
        """The expectation is a model made for that size, with the weights that the other one has then."""
        model = make_model(method, host)
        patch = model.patch_embed.patch_size[0]
        size = (3 * patch, 7 * patch)
        model.set_input_size(size)
        made = effvit.sparsify(make_host(host, img_size=size), method, **METHODS[method].example()).eval()
        made.load_state_dict(model.state_dict())
        x = make_images(model)
        assert maps_and_scores(model, x)[-2].shape == (2, model.embed_dim, 3, 7)
        for own, expected in zip(maps_and_scores(model, x), maps_and_scores(made, x), strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)

    def test_dynamic_sizes_equal_a_model_of_that_size(self, method: str, host: str) -> None:
        dynamic: Any = effvit.sparsify(make_host(host, dynamic_img_size=True), method, **METHODS[method].example())
        x = make_images(dynamic)
        fixed = make_model(method, host)
        if not isinstance(dynamic, Eva):  # for Eva the order of construction changes the random weights
            dynamic.load_state_dict(fixed.state_dict())
            assert torch.allclose(dynamic(x), fixed(x), rtol=1e-5, atol=1e-5)
        patch = dynamic.patch_embed.patch_size[0]
        for size in ((3 * patch, 5 * patch), (5 * patch, 4 * patch)):
            x, resized = torch.randn(2, 3, *size), make_model(method, host)
            resized.load_state_dict(dynamic.state_dict())
            resized.set_input_size(size)
            for own, expected in zip(maps_and_scores(dynamic, x), maps_and_scores(resized, x), strict=True):
                assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)

    def test_original_model_is_left_alone_and_shares_the_weights(self, method: str, host: str) -> None:
        dense = make_host(host)
        x = make_images(dense)
        before = dense(x)
        model: Any = effvit.sparsify(dense, method, **METHODS[method].example())
        own = {name: parameter for name, parameter in model.named_parameters() if ".reducer." not in name}
        assert own.keys() == dict(dense.named_parameters()).keys()
        assert all(own[name] is shared for name, shared in dense.named_parameters())
        model.train()
        model.set_grad_checkpointing()
        model.set_input_size((4 * model.patch_embed.patch_size[0],) * 2)
        model.reset_classifier(3)
        assert not dense.training
        assert torch.equal(dense(x), before)

    def test_fused_attention_can_be_switched_off(self, method: str, host: str) -> None:
        model = double(make_model(method, host))
        x = make_images(model).double()
        fused = model(x)
        for block in model.blocks:
            block.attn.fused_attn = False
        assert torch.allclose(model(x), fused, rtol=0, atol=1e-9)

    def test_hooks_on_the_attention_modules_fire_once_a_block(self, method: str, host: str) -> None:
        model = make_model(method, host)
        calls = []
        for block in model.blocks:
            block.attn.register_forward_hook(lambda *_: calls.append(1))
        model(make_images(model))
        assert len(calls) == len(model.blocks)

    def test_compiles_as_one_graph(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        assert_equal_scores_and_gradients(torch.compile(model, fullgraph=True, backend="eager"), model, x)

    @pytest.mark.parametrize("fill", FILLS)
    def test_every_fill_gives_full_finite_maps(self, method: str, host: str, fill: str) -> None:
        if fill == "attention" and METHODS[method].keeps_every_patch:
            with pytest.raises(ValueError, match="drops no patch"):
                make_model(method, host, recover=fill)
            return
        model = make_model(method, host, recover=fill)
        maps = model.forward_intermediates(make_images(model), indices=2, intermediates_only=True, norm=True)
        assert len(maps) == 2
        assert all(m.isfinite().all() for m in maps)
