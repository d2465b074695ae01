"""What every method on every host must hold: the tests below run for each pair."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hosts import (
    HOSTS,
    MERGE,
    OFF,
    PAIRS,
    SETTINGS,
    make_host,
    make_images,
    make_model,
)
from timm.models.eva import Eva
from torch import Tensor

import effvit
from effvit.block import call_block
from effvit.models.host import ReducedHost
from effvit.recover import FILLS, to_grid
from effvit.reducers import METHODS
from effvit.tokens import TokenMap


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


@pytest.mark.parametrize(("method", "host"), PAIRS)
class TestEveryPair:
    """The contract; a method or host added to ``hosts.py`` inherits all of it."""

    def test_output_is_finite_and_tokens_are_really_removed(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        assert model(x).isfinite().all()
        assert model(x).shape == (2, 7)
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
        model = effvit.sparsify(dense, method, **OFF[method])
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
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
            gradients.append((out, [p.grad.clone() for p in model.parameters()]))
        assert torch.equal(gradients[0][0], gradients[1][0])
        for plain, checkpointed in zip(gradients[0][1], gradients[1][1], strict=True):
            assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-6)

    def test_forward_intermediates_ends_with_forward_features(self, method: str, host: str) -> None:
        model = make_model(method, host)
        x = make_images(model)
        final, maps = model.forward_intermediates(x)
        assert torch.allclose(final, model.forward_features(x), rtol=1e-5, atol=1e-5)
        grid = model.patch_embed.grid_size
        assert [m.shape for m in maps] == [(2, 32, *grid)] * len(model.blocks)
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
        made = effvit.sparsify(make_host(host, img_size=size), method, **SETTINGS[method]).eval()
        made.load_state_dict(model.state_dict())
        x = make_images(model)
        assert maps_and_scores(model, x)[-2].shape == (2, 32, 3, 7)
        for own, expected in zip(maps_and_scores(model, x), maps_and_scores(made, x), strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)

    def test_dynamic_sizes_equal_a_model_of_that_size(self, method: str, host: str) -> None:
        dynamic = effvit.sparsify(make_host(host, dynamic_img_size=True), method, **SETTINGS[method])
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
        model = effvit.sparsify(dense, method, **SETTINGS[method])
        assert all(own is shared for own, shared in zip(model.parameters(), dense.parameters(), strict=True))
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
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("fill", FILLS)
    def test_every_fill_gives_full_finite_maps(self, method: str, host: str, fill: str) -> None:
        if fill == "attention" and method in MERGE:
            with pytest.raises(ValueError, match="drops no patch"):
                make_model(method, host, recover=fill)
            return
        model = make_model(method, host, recover=fill)
        maps = model.forward_intermediates(make_images(model), indices=2, intermediates_only=True, norm=True)
        assert len(maps) == 2
        assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("host", ["average_pool", "attention_pool", "register_no_class", "class_token"])
def test_merging_two_identical_tokens_changes_nothing(host: str) -> None:
    model = make_model("tome", host, r=1).double()
    dense = make_host(host).double()
    with torch.no_grad():
        for net in (model, dense):
            if net.pos_embed is not None:
                net.pos_embed.zero_()
    x = make_images(model).double()
    x[:, :, :8, 8:16] = x[:, :, :8, :8]
    assert model.trace_tokens(x)[0].x.shape[1] == dense.patch_embed.num_patches + dense.num_prefix_tokens - 1
    one = effvit.sparsify(dense, "tome", r=[1, 0, 0, 0])
    assert torch.allclose(one(x), dense(x), rtol=0, atol=1e-10)


def test_packed_and_padded_batches_of_ats_agree() -> None:
    ragged = 0
    for host in (
        "class_token",
        "distilled",
        "registers",
        "eva02",
        "dinov3",
        "rope_mixed",
        "gated_grouped",
        "lvvit",
    ):
        padded = double(make_model("ats", host))
        packed = double(make_model("ats", host, ragged="packed"))
        x = make_images(padded, batch=4).double()
        assert torch.allclose(packed(x), padded(x), rtol=0, atol=1e-10)
        ragged += len(set(padded.forward_tokens(x).tokens.counts().tolist())) > 1
        for own, other in zip(
            packed.forward_intermediates(x, intermediates_only=True),
            padded.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert torch.allclose(own, other, rtol=0, atol=1e-10)
    assert ragged > 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_attention_agrees_with_one_call_an_image() -> None:
    from effvit.attention import _jagged_attention, variable_length_attention

    query_mask = torch.tensor([[True] * 3 + [False], [True] * 4])
    key_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    q, k, v = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    expected = variable_length_attention(q, k, v, query_mask, key_mask, 0.0)
    actual = _jagged_attention(q, k, v, query_mask.sum(1), key_mask.sum(1), 0.0)
    assert torch.allclose(actual, expected, atol=1e-6)


def test_ats_keeps_its_slots_with_the_same_result() -> None:
    trimmed = double(make_model("ats", "class_token"))
    static = double(make_model("ats", "class_token", drop_tokens=False))
    x = make_images(trimmed, batch=3).double()
    assert torch.allclose(static(x), trimmed(x), rtol=0, atol=1e-10)
    assert static.forward_tokens(x).x.shape[1] > trimmed.forward_tokens(x).x.shape[1]


def test_patch_dropout_enters_the_token_map() -> None:
    model = effvit.sparsify(make_host("class_token", patch_drop_rate=0.5), "tome", r=2).train()
    tokens = model.forward_tokens(make_images(model)).tokens
    assert (tokens.source == -1).sum(1).tolist() == [24, 24]
    assert_law(tokens)


def test_patches_that_patch_dropout_drops_have_their_embedding_in_the_maps() -> None:
    model = effvit.sparsify(make_host("class_token", patch_drop_rate=0.5), "tome", r=2).train()
    x = make_images(model)
    embedded = model._embed(x)[0][:, model.num_prefix_tokens :]
    features, tokens = model.forward_tokens(x, memory=True)
    dropped = tokens.source == -1
    assert torch.equal(to_grid(features, tokens, "last")[dropped], embedded[dropped])


def test_token_counts_fall_as_published_for_deit_small() -> None:
    # EViT: measured on the official code for 196 patches; ToMe: the last step is clamped to half of what is left.
    counts = {
        ("evit", 0.7): [139, 99, 71],
        ("tome", 16): [180, 164, 148, 132, 116, 100, 84, 68, 52, 36, 20, 10],
        ("gtp", 14): [196 - 14 * (i + 1) for i in range(12)],
    }
    with torch.device("meta"):
        evit = effvit.sparsify("deit_tiny_patch16_224", "evit", keep_rate=0.7).token_counts()
        assert [evit[3], evit[6], evit[9]] == counts["evit", 0.7]
        assert effvit.sparsify("deit_tiny_patch16_224", "tome", r=16).token_counts() == counts["tome", 16]
        assert effvit.sparsify("deit_tiny_patch16_224", "gtp", num_prop=14).token_counts() == counts["gtp", 14]


def test_keep_rate_can_follow_a_schedule() -> None:
    model = make_model("evit", "class_token")
    x = make_images(model)
    model.set_keep_rate(1.0)
    assert torch.equal(model(x), make_host("class_token")(x))
    model.set_keep_rate([0.9, 0.5])
    assert model.token_counts() == [48, 45, 24, 24]
    model.set_keep_rate(None)
    assert torch.equal(model(x), make_model("evit", "class_token")(x))


def test_reduced_model_can_be_given_another_method() -> None:
    evit = make_model("evit", "class_token")
    tome = effvit.sparsify(evit, "tome", **SETTINGS["tome"])
    x = make_images(evit)
    assert torch.equal(tome(x), make_model("tome", "class_token")(x))
    assert evit.method == "evit"


def test_layer_decay_groups_cover_every_parameter() -> None:
    from timm.optim import param_groups_layer_decay

    for host in HOSTS:
        model = make_model("tome", host)
        grouped = [p for group in param_groups_layer_decay(model) for p in group["params"]]
        assert len(grouped) == len(list(model.parameters()))
        assert model.no_weight_decay() == make_host(host).no_weight_decay()


def test_map_with_sizes_weights_attention_pooling_like_the_unmerged_sequence() -> None:
    model = double(make_model("tome", "attention_pool"))
    x = make_images(model).double()
    features = model.forward_tokens(x)
    assert features.tokens.size is not None
    unmerged = model.forward_head(model.forward_features(x))
    assert torch.allclose(model(x), unmerged, rtol=0, atol=1e-12)
    unweighted = model.forward_head(features.x)
    assert not torch.allclose(model(x), unweighted, rtol=0, atol=1e-4)
    assert replace(features.tokens, key_weight=None).size is features.tokens.size
