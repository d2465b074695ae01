"""The contract of every method on every host, and what single methods add to it.

By default each law of the contract meets every method and every host, and each pair of method and host some law; the
whole product runs with ``-m release``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hosts import HOSTS, PAIRS, SETTINGS, cover, make_host, make_images, make_model, packed_map, released

import effvit
import effvit.testing
from effvit.recover import to_grid
from effvit.testing import assert_law, double

LAWS = [name for name in dir(effvit.testing.Contract) if name.startswith("test_")]
COVER = cover(LAWS, PAIRS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is TestEveryPair:
        metafunc.parametrize(("method", "host"), released(PAIRS, COVER[metafunc.function.__name__]))


class TestEveryPair(effvit.testing.Contract):
    """The contract of all methods on all hosts."""

    @pytest.mark.slow  # as long as all other laws together
    def test_compiles_as_one_graph(self, method: str, host: str) -> None:
        super().test_compiles_as_one_graph(method, host)


class TestCover:
    def test_each_two_of_law_method_and_host_meet(self) -> None:
        met = {(law, method, host) for law, pairs in COVER.items() for method, host in pairs}
        methods, hosts = ({*members} for members in zip(*PAIRS, strict=True))
        assert {(law, method) for law, method, _ in met} == {(law, method) for law in LAWS for method in methods}
        assert {(law, host) for law, _, host in met} == {(law, host) for law in LAWS for host in hosts}
        assert {(method, host) for _, method, host in met} == {*PAIRS}

    def test_number_of_cases_grows_with_the_longer_side_and_not_with_the_product(self) -> None:
        laws = [f"law{i}" for i in range(20)]
        for methods, hosts in ((10, 5), (10, 10), (20, 10), (20, 20)):
            pairs = [(f"method{i}", f"host{j}") for i in range(methods) for j in range(hosts)]
            assert sum(map(len, cover(laws, pairs).values())) < 1.3 * 20 * max(methods, hosts)


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
    from effvit.attention import Images, jagged_attention, variable_length_attention

    queries, keys = packed_map(3, 4), packed_map(5, 3)
    q, k, v = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    expected = variable_length_attention(q, k, v, queries, keys, 0.0)
    actual = jagged_attention(q, k, v, Images.of(queries), Images.of(keys), 0.0)
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
