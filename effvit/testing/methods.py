"""The contract of methods and hosts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor

import effvit
from effvit.attention import PoolTokens
from effvit.block import call_block
from effvit.protocols import Settings
from effvit.recover import FILLS
from effvit.reducers import METHODS
from effvit.reducers.ragged import RAGGED
from effvit.testing.fakes import assert_runs_on_fakes
from effvit.testing.laws import (
    assert_equal_scores_and_gradients,
    assert_law,
    copies_through_files,
    double,
    maps_and_scores,
    maps_of_every_fill,
    scores_and_gradients,
    scores_and_intermediates,
)
from effvit.testing.models import HOSTS, example, make_host, make_images, make_model, reduce
from effvit.testing.reads import assert_reads, count_reads

__all__ = ["Contract", "pairs", "parametrize"]


def pairs(methods: Iterable[str] | None = None, hosts: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """(method, host) for all that fit each other, of all or of these methods and hosts."""
    names = list(HOSTS if hosts is None else hosts)
    no_class_token = {
        name for name in names if not any(own.rpartition(".")[2] == "cls_token" for own in make_host(name).state_dict())
    }
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
        model = reduce(dense, method, METHODS[method].off())
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
        # A choice among tokens has no gradient but in training, so what a method learns may be without one here.
        of_host = {name for name, _ in model.named_parameters() if ".reducer." not in name}
        assert plain.keys() == checkpointed.keys() >= of_host
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
        x, positions, tokens = model._start(make_images(model), memory=False)
        block = next(block for block in model.blocks if block.reducer is not None)
        index = list(model.blocks).index(block)
        for before in model.blocks[:index]:
            x, tokens = call_block(before, x, tokens, model._block_positions(positions, index))
        block_positions = model._block_positions(positions, index)
        entered: list[Tensor] = []
        hook = block.attn.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
        reduced, _ = call_block(block, x, tokens, block_positions)
        hook.remove()
        prefix = model.num_prefix_tokens
        assert torch.allclose(entered[0][:, :prefix], block.norm1(x)[:, :prefix], rtol=1e-5, atol=1e-6)
        reducer, block.reducer = block.reducer, None
        assert reducer is not None
        if entered[0].shape[1] < x.shape[1] or isinstance(reducer.map_edit(), PoolTokens):
            return  # reduced before the values are made, of which there are then fewer
        start = reducer.start(x, tokens) if tokens.carry is None else tokens
        plain, _ = call_block(block, x, start, block_positions)
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
        for again in copies_through_files(model):
            assert torch.equal(again(x), model(x))

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
        made = reduce(make_host(host, img_size=size), method, example(method)).eval()
        made.load_state_dict(model.state_dict())
        x = make_images(model)
        assert maps_and_scores(model, x)[-2].shape == (2, model.embed_dim, 3, 7)
        for own, expected in zip(maps_and_scores(model, x), maps_and_scores(made, x), strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)

    def test_dynamic_sizes_equal_a_model_of_that_size(self, method: str, host: str) -> None:
        if not hasattr(make_host(host), "dynamic_img_size"):
            pytest.skip("timm's class takes images of the size it was made for alone")
        dynamic = reduce(make_host(host, dynamic_img_size=True), method, example(method))
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
        model = reduce(dense, method, example(method))
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

    def test_runs_on_fake_cuda_tensors(self, method: str, host: str) -> None:
        """All fills, training and autocast: no tensor is made on another device, and nothing static reads a value."""
        model = make_model(method, host, recover=None if METHODS[method].keeps_every_patch else "attention")

        def scores_and_fills(x: Tensor) -> list[object]:
            return [model(x), maps_of_every_fill(model, model.forward_tokens(x, memory=True))]

        x = make_images(model)
        assert_runs_on_fakes(model, scores_and_fills, x)
        assert_runs_on_fakes(model.train(), partial(scores_and_intermediates, model), x, autocast=True)

    def test_device_is_read_once_a_block_at_most_as_declared(self, method: str, host: str) -> None:
        """Counted on real tensors, padded and packed, in training too; dense maps take no further read.

        The first pass is not counted, in which a method may look whether there are weights of its own to choose by.
        What the dense host reads is timm's: ``F.one_hot`` looks at its indices on a CPU (Gemma's position table).
        """
        own = len(count_reads(partial(make_host(host), make_images(make_host(host)))))
        recover = None if METHODS[method].keeps_every_patch else "attention"
        ways = [way for way in RAGGED if way != "packed" or make_model(method, host).packable]
        ragged: list[Settings] = [{"ragged": way} for way in ways] if "ragged" in METHODS[method].defaults() else [{}]
        for settings in ragged:
            model = make_model(method, host, recover=recover, **settings)
            declared = own + sum(reducer.reads_counts for reducer in model.reducers.values())
            x = make_images(model)
            model.eval()(x)
            for training in (False, True):
                assert_reads(partial(model.train(training), x), declared)
                assert_reads(partial(model.forward_intermediates, x), declared)
                assert_reads(partial(maps_of_every_fill, model, model.forward_tokens(x, memory=True)), 0)

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
