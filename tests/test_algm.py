"""ALGM: which windows and pairs merge, in which order, alone and in the official batch; restored behind a decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import effvit
from effvit.dense.mask_transformer import MaskTransformer, restore_scores
from effvit.hosts.host import TokenFeatures
from effvit.reducers.algm import plan_global_merge, plan_local_merge
from effvit.reducers.merging import Merge, apply_merge
from effvit.tokens import TokenMap


def full_map(x: Tensor, grid: tuple[int, int], num_prefix: int = 0) -> TokenMap:
    return TokenMap.full(F.pad(x, (0, 0, num_prefix, 0)), grid, num_prefix, num_class=0)


def merged_pairs(merge: Merge, image: int) -> dict[int, int]:
    """Merged token -> the one that it goes into."""
    rows = zip(merge.source[image].tolist(), merge.destination[image].tolist(), merge.merged[image], strict=True)
    return {source: destination for source, destination, merged in rows if merged}


def slow_windows(x: Tensor, grid: tuple[int, int], window: int, threshold: float) -> tuple[dict[int, int], list[int]]:
    """The merge of x (N, C) and its order from the definition: all ordered pairs of each window, one after another."""
    found = []
    for top in range(0, grid[0] - window + 1, window):
        for left in range(0, grid[1] - window + 1, window):
            members = [(top + i) * grid[1] + left + j for i in range(window) for j in range(window)]
            pairs = [float(F.cosine_similarity(x[a], x[b], dim=0)) for a in members for b in members if a != b]
            if sum(pairs) / len(pairs) >= threshold:
                found.append((sum(pairs) / len(pairs), members))
    found.sort(key=lambda each: -each[0])
    pairs_merged = {member: members[0] for _, members in found for member in members[1:]}
    taken = {member for _, members in found for member in members}
    return pairs_merged, [members[0] for _, members in found] + [i for i in range(len(x)) if i not in taken]


def slow_pairs(x: Tensor, num_prefix: int, layer: int) -> tuple[dict[int, int], list[int]]:
    """The merge of x (N, C) and its order from the definition."""
    in_a = [i for i in range(len(x)) if (i + num_prefix) % 2 == 0]
    in_b = [i for i in range(len(x)) if (i + num_prefix) % 2]
    similar = {a: [float(F.cosine_similarity(x[a], x[b], dim=0)) for b in in_b] for a in in_a}
    best = torch.tensor([max(row) for row in similar.values()], dtype=torch.float64)
    threshold = float(best.mean() + best.std() / layer)
    pairs = {a: in_b[row.index(max(row))] for a, row in similar.items() if max(row) >= threshold}
    return pairs, [a for a in in_a if a not in pairs] + in_b


@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((5, 7), 2), ((7, 6), 3)])
def test_windows_merged_are_those_of_the_slow_search(grid: tuple[int, int], window: int) -> None:
    x = torch.randn(3, math.prod(grid), 3, dtype=torch.float64) + 0.5
    merge = plan_local_merge(x, full_map(x, grid), window, 0.4)
    assert merge.merged.any()
    for image in range(3):
        pairs, order = slow_windows(x[image], grid, window, 0.4)
        assert merged_pairs(merge, image) == pairs
        kept = merge.order[image] if merge.valid is None else merge.order[image][merge.valid[image]]
        assert kept.tolist() == order


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("layer", [1, 5])
def test_pairs_merged_are_those_of_the_slow_search(num_prefix: int, layer: int) -> None:
    x = torch.randn(3, 21, 4, dtype=torch.float64)
    merge = plan_global_merge(x, None, num_prefix, layer)
    assert merge.merged.any()
    for image in range(3):
        pairs, order = slow_pairs(x[image], num_prefix, layer)
        assert merged_pairs(merge, image) == pairs
        kept = merge.order[image] if merge.valid is None else merge.order[image][merge.valid[image]]
        assert kept.tolist() == order


def test_padding_changes_no_pair() -> None:
    """An image of 14 tokens among longer ones: the expectation is the image alone."""
    x = torch.randn(2, 21, 4, dtype=torch.float64)
    valid = torch.arange(21) < torch.tensor([[21], [14]])
    merge, alone = plan_global_merge(x, valid, 1, 5), plan_global_merge(x[1:, :14], None, 1, 5)
    assert merged_pairs(merge, 1) == merged_pairs(alone, 0)
    assert merge.valid is not None
    assert merge.order[1][merge.valid[1]].tolist() == alone.order[0].tolist()


def test_a_window_that_misses_a_patch_is_not_merged() -> None:
    """As patch dropout in training leaves them: of equal patches all whole windows merge, the others stay."""
    x = torch.ones(1, 16, 3)
    tokens = full_map(x, (4, 4))
    kept = torch.tensor([[i for i in range(16) if i != 5]])  # of the first window
    merge = plan_local_merge(x[:, :15], tokens.keep(kept, 15), 2, 0.9)
    _, left = apply_merge(x[:, :15], tokens.keep(kept, 15), merge, packed=False)
    assert left.size is not None
    assert left.size[0].tolist() == [4, 4, 4, 1, 1, 1]
    assert left.source[0].view(4, 4).tolist() == [[3, 4, 0, 0], [5, -1, 0, 0], [1, 1, 2, 2], [1, 1, 2, 2]]


def test_more_windows_than_tokens_lose_no_token() -> None:
    """Of 28 patches that are left of 14 x 14 with 49 windows, the first four are a window of equal ones."""
    x = torch.randn(1, 28, 8)
    x[:, :4] = x[:, :1]
    kept = torch.tensor([[0, 1, 14, 15, *range(30, 196, 7)]])
    merge = plan_local_merge(x, full_map(torch.empty(1, 196, 8), (14, 14)).keep(kept, 28), 2, 0.9)
    assert merged_pairs(merge, 0) == {1: 0, 2: 0, 3: 0}
    assert merge.order[0].tolist() == [0, *range(4, 28)]


def test_patch_dropout_leaves_its_patches_to_the_merged_tokens() -> None:
    """Of 196 patches 39 are left, now and then a whole one of 49 windows: each is counted where it is found."""
    settings = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0, "patch_drop_rate": 0.8}
    host = VisionTransformer(img_size=56, patch_size=4, **settings)  # type: ignore[arg-type]
    model = effvit.sparsify(host, "algm", threshold=-1.0, reduce_at=(0,)).train()
    _, left = model.forward_tokens(torch.randn(64, 3, 56, 56))
    assert left.size is not None
    assert left.valid is not None
    assert int(left.valid.sum()) < 64 * 39  # some windows merged
    for source, size, real in zip(left.source, left.size[:, 1:], left.valid, strict=True):
        found = source[source >= 0].bincount(minlength=left.num_tokens)
        assert int(found.sum()) == 39
        assert torch.equal(found[real].float(), size[real])


def test_an_image_of_one_colour_merges_in_one_way_whatever_rounding_says() -> None:
    """All similarities are 1 but for rounding, which the official code leaves to the device."""
    x = torch.full((1, 64, 37), 0.1)
    tokens = full_map(x, (8, 8), 1)
    merge = plan_local_merge(x, tokens, 2, 1.0)
    assert int(merge.merged.sum()) == 48
    assert merge.order[0].tolist() == [16 * row + 2 * column for row in range(4) for column in range(4)]
    merge = plan_global_merge(x, None, 1, 5)
    assert int(merge.merged.sum()) == 32


@pytest.mark.parametrize("number", [0, 1, 2])
def test_too_few_tokens_for_a_deviation_merge_nothing(number: int) -> None:
    """Of one pair the official deviation is NaN, which nothing reaches."""
    merge = plan_global_merge(torch.ones(2, number, 4), None, 1, 5)
    assert not merge.merged.any()
    assert merge.order.shape == (2, number)


def test_official_batch_merges_what_its_least_similar_image_merges() -> None:
    host = make_host("class_token")
    x = make_images(host, batch=3)
    own, official = (effvit.sparsify(host, "algm", threshold=0.1, compat=c).eval() for c in (False, True))
    counts = own.trace_tokens(x)[0].tokens.counts()
    assert len(set(counts.tolist())) > 1
    assert official.trace_tokens(x)[0].tokens.counts().tolist() == [int(counts.max())] * 3
    assert torch.equal(official(x[:1]), own(x[:1]))  # of one image both are the same


def test_sizes_count_every_patch_and_weigh_keys_only_if_asked() -> None:
    for prop_attn in (False, True):
        model = make_model("algm", "registers", prop_attn=prop_attn, threshold=-1.0)
        _, tokens = model.forward_tokens(make_images(model))
        assert tokens.size is not None
        assert tokens.size[:, tokens.num_prefix :].sum(1).tolist() == [48, 48]
        assert (tokens.key_weight is not None) == prop_attn


def test_features_of_a_merged_token_are_the_mean_of_its_patches() -> None:
    x = torch.randn(2, 1 + 24, 5, dtype=torch.float64)
    tokens = TokenMap.full(x, (4, 6), 1, 1)
    once, left = apply_merge(x, tokens, plan_local_merge(x[:, 1:], tokens, 2, 0.0), packed=False)
    twice, left = apply_merge(once, left, plan_global_merge(once[:, 1:], left.valid, 1, 5), packed=False)
    for image in range(2):
        for token in range(int(left.counts()[image])):
            members = x[image, 1:][left.source[image] == token]
            assert torch.allclose(twice[image, 1 + token], members.mean(0), atol=1e-12)


def test_default_blocks_are_the_published_ones_in_proportion() -> None:
    for depth, blocks in ((1, [0]), (2, [0]), (4, [0, 1]), (12, [0, 4]), (24, [0, 8])):
        host = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=depth, num_heads=1)
        model = effvit.sparsify(host, "algm")
        assert list(model.reducers) == blocks
        assert [reducer.local for reducer in model.reducers.values()] == [True, False][: len(blocks)]


class TestBadInput:
    @pytest.mark.parametrize("threshold", [1.01, -2])
    def test_threshold_that_is_no_cosine(self, threshold: float) -> None:
        with pytest.raises(ValueError, match=rf"threshold must be a cosine similarity in \[-1, 1\], got {threshold}"):
            effvit.sparsify(make_host("class_token"), "algm", threshold=threshold)

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"threshold": math.nan}, ValueError, "threshold must be a finite number, got nan"),
            ({"threshold": "0.9"}, ValueError, "threshold must be a finite number, got '0.9'"),
            ({"threshold": [0.9, 0.8]}, ValueError, r"threshold must be a finite number, got \[0.9, 0.8\]"),
            ({"window": 1}, ValueError, "window must be at least 2, got 1"),
            ({"window": (2, 2)}, TypeError, r"window must be a whole number, got \(2, 2\)"),
            ({"window": 7}, ValueError, r"window must be at most the sides of the patch grid, got 7 for \(6, 8\)"),
            ({"reduce_at": (0, 4)}, ValueError, "reduce_at names block 4, but the model has blocks 0 to 3"),
            ({"reduce_at": (1, 0)}, ValueError, r"reduce_at must be in ascending order, got \[1, 0\]"),
            ({"reduce_at": 0}, TypeError, "reduce_at must be a sequence of 0-based block numbers, got 0"),
        ],
    )
    def test_setting_out_of_range(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        host = make_host("class_token")
        with pytest.raises(error, match=message):
            effvit.sparsify(host, "algm", **settings)

    def test_window_that_an_image_of_any_size_is_too_small_for_merges_nothing(self) -> None:
        model = effvit.sparsify(
            make_host("class_token", dynamic_img_size=True), "algm", window=4, reduce_at=(0,)
        ).eval()
        assert model.trace_tokens(torch.randn(1, 3, 24, 40))[0].x.shape[1] == 1 + 15

    @pytest.mark.parametrize("block", [0, 1])
    def test_nan_in_an_image_is_named(self, block: int) -> None:
        model = make_model("algm", "class_token", reduce_at=(0,) if block == 0 else (0, 1), threshold=1.0)
        x = make_images(model)
        x[1, 0, 3, 3] = math.nan
        with pytest.raises(ValueError, match=r"algm in block 0: similarities are NaN for image 1 .*hold NaN or infin"):
            model(x)

    def test_windowed_host_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"algm does not work inside windows.*use method 'tome' or 'expedite'"):
            effvit.sparsify("swin_tiny_patch4_window7_224", "algm")


class TestBehindTheDecoder:
    def decoder(self) -> MaskTransformer:
        torch.manual_seed(0)
        return MaskTransformer(32, 5, num_heads=2).double().eval()

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        model = make_model("algm", "registers", threshold=0.0).double()
        x, decoder = make_images(model, batch=3).double(), self.decoder()
        features = model.forward_tokens(x)
        assert features.tokens.valid is not None
        alone = torch.cat([decoder(model.forward_tokens(image[None])) for image in x])
        assert torch.allclose(decoder(features), alone, atol=1e-12)
        assert alone.shape == (3, 5, 6, 8)

    def test_of_unmerged_tokens_it_is_the_decoder_of_the_maps(self) -> None:
        """Both ways to restore are the same where there is nothing to restore."""
        model = make_model("algm", "class_token", reduce_at=()).double()
        x, decoder = make_images(model).double(), self.decoder()
        after = decoder(model.forward_tokens(x))
        patches = model.forward_intermediates(x)[1][-1].flatten(2).transpose(1, 2)
        patches = model.norm(patches)
        before = decoder(TokenFeatures(patches, full_map(patches, (6, 8))))
        assert torch.allclose(after, before, atol=1e-10)

    def test_a_linear_decoder_gives_the_same_in_front_and_behind(self) -> None:
        """It works token by token, so that it commutes with the gather that restores."""
        model = make_model("algm", "class_token", threshold=0.0).double()
        x, weight = make_images(model).double(), torch.randn(32, 5, dtype=torch.float64)
        features = model.forward_tokens(x)
        behind = restore_scores(features.x[:, 1:] @ weight, features.tokens)
        in_front = torch.einsum("bchw,ck->bkhw", effvit.to_map(*features), weight)
        assert torch.allclose(behind, in_front, atol=1e-12)

    def test_dropped_patches_have_no_scores_to_restore(self) -> None:
        model = make_model("evit", "class_token")
        with pytest.raises(ValueError, match=r"some patches were dropped or fused; reduce by a method that merges"):
            MaskTransformer(32, 5, num_heads=2)(model.forward_tokens(make_images(model)))

    def test_gradients_reach_backbone_and_decoder(self) -> None:
        model, decoder = make_model("algm", "class_token").train(), MaskTransformer(32, 5, num_heads=2)
        decoder(model.forward_tokens(make_images(model))).square().sum().backward()
        assert all(parameter.grad is not None for parameter in decoder.parameters())
        assert model.patch_embed.proj.weight.grad is not None
