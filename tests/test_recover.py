"""Dense maps: exact where nothing was reduced, and what each fill gives to a patch that no token stands for."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hosts import MERGE, SETTINGS, make_host, make_images, make_model
from torch import Tensor, nn

import effvit
from effvit.recover import (
    FILLS,
    AttentionRecovery,
    TokenRecoveringAttention,
    TokenRecovery,
    nearest_token,
    reconstruct_tokens,
    restore,
    to_grid,
    to_map,
)
from effvit.tokens import Moved, TokenMap

GRID = (3, 5)
NUM_PATCHES = 15
PREFIX = 2


def trained_recovery() -> AttentionRecovery:
    """A module of the fill "attention" whose projection is not zero."""
    generator = torch.Generator().manual_seed(0)
    recovery = AttentionRecovery(4, 2)
    for parameter in recovery.parameters():
        parameter.data.normal_(generator=generator)
    return recovery


RECOVERY = trained_recovery()


def full_map(batch: int = 2) -> TokenMap:
    return TokenMap.full(torch.zeros(batch, PREFIX + NUM_PATCHES, 4), GRID, PREFIX, num_class=1)


def known() -> TokenMap:
    """The full map with what every fill asks for."""
    return full_map().remember(features(NUM_PATCHES)).refer(features(NUM_PATCHES))


def random_order(batch: int, kept: int) -> Tensor:
    return torch.rand(batch, NUM_PATCHES).argsort(dim=1)[:, :kept]


def features(number: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, PREFIX + number, 4)


def slow_nearest(tokens: TokenMap) -> list[list[int]]:
    """The first of the tokens with the smallest squared distance, patch by patch."""
    valid = torch.ones_like(tokens.anchor, dtype=torch.bool) if tokens.valid is None else tokens.valid
    width = tokens.grid[1]
    result = []
    for anchors, real in zip(tokens.anchor.tolist(), valid.tolist(), strict=True):
        row = []
        for patch in range(tokens.num_patches):
            distances = [
                (a // width - patch // width) ** 2 + (a % width - patch % width) ** 2 if r else 10**6
                for a, r in zip(anchors, real, strict=True)
            ]
            row.append(distances.index(min(distances)))
        result.append(row)
    return result


class TestSmallMap:
    """Tokens that are a grid of their own, as a map of it."""

    @pytest.mark.parametrize(
        ("method", "settings", "cells"),
        [
            ("cubistmerge", {"r_h": 1, "r_w": 2, "reduce_at": [1]}, (5, 6)),
            ("cubistmerge", {"r_h": 1, "r_w": 1, "reduce_at": [1, 3]}, (4, 6)),
            ("expedite", {"cluster_at": 2, "num_clusters": (3, 4)}, (3, 4)),
            ("cubistmerge", {"r_h": 0, "r_w": 0}, (6, 8)),
            ("expedite", {"cluster_at": 1, "restore_at": 3, "num_clusters": (3, 4)}, (6, 8)),
        ],
    )
    def test_it_holds_the_tokens_in_order_of_rows(
        self, method: str, settings: dict[str, Any], cells: tuple[int, int]
    ) -> None:
        model = effvit.sparsify(make_host("class_token"), method, **settings).eval()
        x, tokens = model.forward_tokens(torch.randn(2, 3, 48, 64))
        small = effvit.to_small_map(x, tokens)
        assert small.shape[2:] == cells
        assert torch.equal(small.flatten(2).transpose(1, 2), tokens.split(x)[1])
        if method == "cubistmerge":  # every patch is carried by one of them
            full = small.flatten(2).gather(2, tokens.source.unsqueeze(1).expand(-1, small.shape[1], -1))
            assert torch.equal(full.unflatten(2, tokens.grid), effvit.to_map(x, tokens))

    @pytest.mark.parametrize("method", ["tome", "evit"])
    def test_tokens_that_are_no_grid_are_refused(self, method: str) -> None:
        model = make_model(method, "class_token")
        features = model.forward_tokens(torch.randn(2, 3, 48, 64))
        with pytest.raises(ValueError, match=r"no grid of their own, as those of cubistmerge .*; use to_map"):
            effvit.to_small_map(*features)


class TestNearest:
    @pytest.mark.parametrize("kept", [1, 2, 6, NUM_PATCHES])
    def test_token_is_that_of_the_slow_search(self, kept: int) -> None:
        tokens = full_map().keep(random_order(2, kept), kept)
        assert nearest_token(tokens).tolist() == slow_nearest(tokens)

    def test_padding_is_never_the_nearest(self) -> None:
        valid = torch.tensor([[True, True, False, False], [True, False, False, False]])
        tokens = full_map().keep(random_order(2, 4), 4, valid=valid)
        nearest = nearest_token(tokens)
        assert nearest.tolist() == slow_nearest(tokens)
        assert nearest[1].eq(0).all()

    def test_padding_is_not_even_near_to_the_farthest_corner(self) -> None:
        """The only token stands in one corner of a 3 x 5 grid, and the padding in the other."""
        valid = torch.tensor([[True, False]])
        tokens = full_map(batch=1).keep(torch.tensor([[0, NUM_PATCHES - 1]]), 2, valid=valid)
        assert nearest_token(tokens).tolist() == [[0] * NUM_PATCHES]

    def test_anchor_is_nearest_to_itself(self) -> None:
        tokens = full_map().keep(random_order(2, 7), 7)
        assert torch.equal(nearest_token(tokens).gather(1, tokens.anchor), torch.arange(7).expand(2, -1))

    def test_grid_of_one_row(self) -> None:
        tokens = TokenMap.full(torch.zeros(1, 6, 4), (1, 6), 0, 0).keep(torch.tensor([[4, 0]]), 2)
        assert nearest_token(tokens).tolist() == [[1, 1, 0, 0, 0, 0]]  # patch 2 is as near to both: the first token


@pytest.mark.parametrize("fill", FILLS)
class TestEveryFill:
    def test_unreduced_sequence_is_given_back(self, fill: str) -> None:
        x = features(NUM_PATCHES)
        assert torch.equal(to_grid(x, full_map(), fill, RECOVERY), x[:, PREFIX:])
        assert torch.equal(to_map(x, full_map(), fill, RECOVERY).flatten(2).transpose(1, 2), x[:, PREFIX:])

    def test_shuffled_sequence_is_put_back_in_order(self, fill: str) -> None:
        x, order = features(NUM_PATCHES), random_order(2, NUM_PATCHES)
        tokens = known().keep(order, NUM_PATCHES)
        grid = to_grid(x, tokens, fill, RECOVERY)
        assert torch.equal(grid.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)), x[:, PREFIX:])

    def test_kept_patches_have_the_feature_of_their_token(self, fill: str) -> None:
        x, index = features(6), random_order(2, 6)
        tokens = known().keep(index, 6)
        grid = to_grid(x, tokens, fill, RECOVERY)
        assert torch.equal(grid.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)), x[:, PREFIX:])

    def test_merged_patches_have_the_feature_of_their_token(self, fill: str) -> None:
        target = (torch.arange(NUM_PATCHES) // 3).expand(2, -1)
        tokens = known()
        tokens = tokens.relabel(Moved(target, torch.arange(0, NUM_PATCHES, 3).expand(2, -1)), 5)
        x = features(5)
        assert torch.equal(to_grid(x, tokens, fill, RECOVERY), x[:, PREFIX:].repeat_interleave(3, dim=1))

    def test_only_a_map_that_keeps_every_patch_needs_no_memory(self, fill: str) -> None:
        target, anchor = (torch.arange(NUM_PATCHES) // 3).expand(2, -1), torch.arange(0, NUM_PATCHES, 3).expand(2, -1)
        merged = full_map().relabel(Moved(target, anchor), 5, keeps_every_patch=True)
        kept = merged.keep(torch.tensor([[0, 2, 3], [1, 3, 4]]), 3)
        later = kept.relabel(
            Moved(torch.zeros_like(kept.anchor), torch.zeros_like(kept.anchor[:, :1])), 1, keeps_every_patch=True
        )
        assert [tokens.complete for tokens in (merged, kept, later)] == [True, False, False]
        x = features(5)
        if fill != "reconstruct":
            assert torch.equal(to_grid(x, merged, fill), x[:, PREFIX:].repeat_interleave(3, dim=1))
        if fill in ("last", "attention"):
            with pytest.raises(ValueError, match="holds no memory"):
                to_grid(features(1), later, fill, RECOVERY)

    def test_packed_sequence_is_recovered_like_the_padded_one(self, fill: str) -> None:
        arguments: dict[str, Any] = {"valid": torch.tensor([[True, True, True], [True, False, False]])}
        start, index = known(), random_order(2, 3)
        padded, packed = start.keep(index, 3, **arguments), start.keep(index, 3, packed=True, **arguments)
        x = features(3)
        assert torch.equal(to_grid(packed.pack(x), packed, fill, RECOVERY), to_grid(x, padded, fill, RECOVERY))

    def test_map_is_the_grid_with_channels_first(self, fill: str) -> None:
        x, index = features(6), random_order(2, 6)
        tokens = known().keep(index, 6)
        dense = to_map(x, tokens, fill, RECOVERY)
        assert dense.shape == (2, 4, *GRID)
        assert dense.is_contiguous()
        for patch, feature in enumerate(to_grid(x, tokens, fill, RECOVERY)[0]):
            assert torch.equal(dense[0, :, patch // GRID[1], patch % GRID[1]], feature)


class TestAttention:
    def test_untrained_module_gives_the_last_features(self) -> None:
        x, tokens = features(6), known().keep(random_order(2, 6), 6)
        fresh = AttentionRecovery(4, 2)
        assert torch.equal(to_grid(x, tokens, "attention", fresh), to_grid(x, tokens, "last"))

    def test_dropped_patches_add_what_they_read_from_the_tokens(self) -> None:
        before, x = features(NUM_PATCHES), features(6)
        tokens = full_map().remember(before).keep(random_order(2, 6), 6)
        grid = to_grid(x, tokens, "attention", RECOVERY)
        heads = nn.MultiheadAttention(4, 2, batch_first=True)
        attn = RECOVERY.attn
        heads.in_proj_weight.data = torch.cat([attn.q.weight, attn.kv.weight])
        heads.in_proj_bias.data = torch.cat([attn.q.bias, attn.kv.bias])
        heads.out_proj.weight.data, heads.out_proj.bias.data = attn.proj.weight.data, attn.proj.bias.data
        patches, left = before[:, PREFIX:], RECOVERY.norm(x[:, PREFIX:])
        expected = patches + heads(RECOVERY.norm(patches), left, left)[0]
        dropped = tokens.source == -1
        assert torch.allclose(grid[dropped], expected[dropped], atol=1e-5)

    def test_a_module_of_few_heads_is_cheaper(self) -> None:
        narrow, wide = AttentionRecovery(8, 1, head_dim=2), AttentionRecovery(8, 4)
        assert [narrow.attn.q.out_features, narrow.attn.kv.out_features, narrow.attn.proj.in_features] == [2, 4, 2]
        x, s = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
        assert torch.equal(narrow(x, s), x)  # untrained, both add nothing
        assert torch.equal(wide(x, s), x)
        model = effvit.sparsify(make_host("class_token"), "evit", recover="attention")
        assert model.recovery.attn.num_heads == max(1, model.blocks[0].attn.num_heads // 4)

    def test_padding_is_not_read(self) -> None:
        valid = torch.tensor([[True, True, False], [True, False, False]])
        x, tokens = features(3), known().keep(random_order(2, 3), 3, valid=valid)
        changed = torch.cat([x[:, :PREFIX], x[:, PREFIX:] + ~valid.unsqueeze(-1)], dim=1)
        grids = [to_grid(y, tokens, "attention", RECOVERY) for y in (x, changed)]
        assert torch.equal(*grids)

    def test_module_and_memory_are_asked_for(self) -> None:
        x, tokens = features(6), known().keep(random_order(2, 6), 6)
        with pytest.raises(ValueError, match=r"recover 'attention' is trained: give its module, model\.recovery"):
            to_grid(x, tokens, "attention")
        with pytest.raises(ValueError, match="recover 'attention' needs the features the dropped patches had"):
            to_grid(x, full_map().keep(random_order(2, 6), 6), "attention", RECOVERY)

    @pytest.mark.parametrize("method", sorted(set(effvit.list_methods()) - MERGE))
    def test_every_method_trains_it_and_loads_the_host_without_it(self, method: str) -> None:
        host = make_host("class_token")
        model = effvit.sparsify(host, method, recover="attention", **SETTINGS[method])
        x = make_images(model)
        plain = effvit.sparsify(host, method, recover="last", **SETTINGS[method])
        maps, expected = (net.eval().forward_intermediates(x, indices=1)[1][0] for net in (model, plain))
        assert torch.allclose(maps, expected, atol=1e-6)
        model.train()
        for reducer in model.reducers.values():
            reducer.eval()  # DynamicViT's lets all patches stay while it trains
        model.forward_intermediates(x, indices=1)[1][0].square().sum().backward()
        assert model.recovery.attn.proj.weight.grad.abs().max() > 0
        model.recovery.attn.proj.weight.data.normal_()
        weights = model.recovery.attn.proj.weight.clone()
        model.load_state_dict(host.state_dict())
        assert torch.equal(model.recovery.attn.proj.weight, weights)

    @pytest.mark.parametrize("method", sorted(MERGE))
    def test_methods_that_drop_nothing_refuse_it(self, method: str) -> None:
        with pytest.raises(ValueError, match=f"{method} with these settings drops no patch"):
            effvit.sparsify(make_host("class_token"), method, recover="attention", **SETTINGS[method])

    def test_module_is_kept_by_another_method_and_left_out_by_another_fill(self) -> None:
        model = effvit.sparsify(make_host("class_token"), "evit", recover="attention", reduce_at=(1,))
        other = effvit.sparsify(model, "hot", recover="attention", reduce_at=(1,))
        assert other.recovery.attn.q.weight is model.recovery.attn.q.weight
        with pytest.warns(UserWarning, match="evit had learnt recovery, which the new model is without"):
            assert effvit.sparsify(model, "tome", r=2).recovery is None
        assert "recovery.attn.q.weight" in model.state_dict()

    def test_architectures_with_full_maps_refuse_a_fill(self) -> None:
        with pytest.raises(ValueError, match="has no setting 'recover': no patch is dropped"):
            timm.create_model("supertoken_small_224", recover="last")


class TestDroppedPatches:
    def test_zero_gives_zeros(self) -> None:
        tokens = full_map().keep(random_order(2, 6), 6)
        grid = to_grid(features(6), tokens, "zero")
        assert torch.equal(grid.abs().sum(-1) == 0, tokens.source == -1)

    def test_nearest_gives_the_feature_of_the_nearest_token(self) -> None:
        x, tokens = features(6), full_map().keep(random_order(2, 6), 6)
        grid = to_grid(x, tokens, "nearest")
        for image, nearest in enumerate(slow_nearest(tokens)):
            for patch, token in enumerate(nearest):
                if tokens.source[image, patch] == -1:
                    assert torch.equal(grid[image, patch], x[image, PREFIX + token])

    def test_last_gives_the_feature_before_the_block_that_dropped_the_patch(self) -> None:
        first, second, third = features(NUM_PATCHES), features(8), features(3)
        one, two = random_order(2, 8), torch.rand(2, 8).argsort(dim=1)[:, :3]
        tokens = full_map().remember(first).keep(one, 8).remember(second).keep(two, 3)
        grid = to_grid(third, tokens, "last")
        for image in range(2):
            expected = first[image, PREFIX:].clone()
            expected[one[image]] = second[image, PREFIX:]
            expected[one[image, two[image]]] = third[image, PREFIX:]
            assert torch.equal(grid[image], expected)

    def test_fused_patches_count_as_dropped_for_last_only(self) -> None:
        before, after = features(NUM_PATCHES), features(3)
        ranked = random_order(2, 3)
        tokens = full_map().remember(before).fuse(ranked, 2)
        in_fused = (tokens.source == 2).unsqueeze(-1)
        fused = after[:, PREFIX + 2 :].expand(-1, NUM_PATCHES, -1)
        for fill in ("zero", "nearest"):
            assert torch.equal(to_grid(after, tokens, fill) * in_fused, fused * in_fused)
        assert torch.equal(to_grid(after, tokens, "last") * in_fused, before[:, PREFIX:] * in_fused)

    def test_host_remembers_what_entered_the_block_that_dropped_a_patch(self) -> None:
        """Blocks 1 and 2 drop patches; until then the output of the block before stands for each."""
        model = make_model("evit", "class_token", fuse_token=False, reduce_at=(1, 2))
        with torch.no_grad():
            traced = model.trace_tokens(make_images(model), memory=True)
        expected = traced[0].x[:, 1:].clone()
        for x, tokens in (traced[1], traced[3]):
            for image in range(2):
                expected[image, tokens.anchor[image]] = x[image, 1:]
        assert torch.equal(to_grid(*traced[3], "last"), expected)

    def test_host_compares_patches_before_the_first_reduction_alone(self) -> None:
        model = make_model("evit", "class_token", fuse_token=False, reduce_at=(1, 2))
        with torch.no_grad():
            traced = model.trace_tokens(make_images(model), memory=True)
        reference = traced[3].tokens.reference
        assert reference is not None
        assert torch.equal(reference.patches, traced[0].x[:, 1:])

    def test_gradient_of_last_reaches_the_dropped_features(self) -> None:
        before, after = features(NUM_PATCHES).requires_grad_(), features(6).requires_grad_()
        tokens = full_map().remember(before).keep(random_order(2, 6), 6)
        to_grid(after, tokens, "last").sum().backward()
        assert before.grad is not None
        assert after.grad is not None
        assert torch.equal(before.grad[:, PREFIX:].sum(-1) / 4, (tokens.source == -1).float())
        assert torch.equal(after.grad[:, PREFIX:], torch.ones(2, 6, 4))

    def test_reconstruct_mixes_the_tokens_the_patch_was_like(self) -> None:
        before, x, index = features(NUM_PATCHES), features(6), random_order(2, 6)
        tokens = full_map().refer(before).keep(index, 6)
        grid = to_grid(x, tokens, "reconstruct")
        for image in range(2):
            patches = before[image, PREFIX:]
            distance = (patches[:, None] - patches[index[image]]).square().sum(-1)
            weights = torch.exp(-5e-3 * distance)
            mixture = weights / weights.square().sum(-1, keepdim=True).sqrt() @ x[image, PREFIX:]
            dropped = tokens.source[image] == -1
            assert torch.allclose(grid[image, dropped], mixture[dropped], atol=1e-5)

    def test_fused_tokens_and_padding_take_no_part_in_reconstruct(self) -> None:
        start, x = full_map().refer(features(NUM_PATCHES)), features(3)
        fused = start.fuse(random_order(2, 3), 2)
        padded = start.keep(random_order(2, 3), 3, valid=torch.tensor([[True, True, False]]).expand(2, -1))
        for tokens in (fused, padded):
            changed = torch.cat([x[:, :-1], x[:, -1:] + 1], dim=1)
            assert torch.equal(to_grid(x, tokens, "reconstruct"), to_grid(changed, tokens, "reconstruct"))

    def test_only_a_fused_token_left_is_what_all_patches_get(self) -> None:
        tokens, x = full_map().refer(features(NUM_PATCHES)).fuse(random_order(2, 1), 0), features(1)
        assert torch.equal(to_grid(x, tokens, "reconstruct"), x[:, PREFIX:].expand(-1, NUM_PATCHES, -1))

    def test_reconstruct_without_reference_is_refused(self) -> None:
        tokens = full_map().keep(random_order(2, 6), 6)
        message = r"recover 'reconstruct' needs features from before .* forward_tokens\(x, memory=True\) or use"
        with pytest.raises(ValueError, match=message):
            to_grid(features(6), tokens, "reconstruct")


class TestReconstruction:
    """reconstruct_tokens against its formula, w = exp(-T D), the k largest of each row, norm one."""

    def official(self, z: Tensor, x: Tensor, c: Tensor, temperature: float, k: int) -> Tensor:
        distance = (x[:, :, None] - c[:, None]).square().sum(-1)
        weights = torch.exp(-temperature * distance)
        weights = weights * (weights >= weights.topk(k, dim=-1).values[..., -1:])
        return torch.nn.functional.normalize(weights, dim=-1) @ z

    @pytest.mark.parametrize("k", [1, 3, 7])
    def test_is_the_formula(self, k: int) -> None:
        z, x, c = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((7, 5), (20, 6), (7, 6)))
        expected = self.official(z, x, c, 0.1, k)
        for norm in ("l2", "official"):
            assert torch.allclose(reconstruct_tokens(z, x, c, 0.1, k, norm), expected, atol=1e-12)

    def test_official_norm_shrinks_far_patches_as_the_official_code(self) -> None:
        z, x, c = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((7, 5), (20, 6), (7, 6)))
        expected = self.official(z, x, c, 6.0, 3)
        assert torch.allclose(reconstruct_tokens(z, x, c, 6.0, 3, "official"), expected, atol=1e-12)
        assert not torch.allclose(reconstruct_tokens(z, x, c, 6.0, 3), expected, atol=1e-3)

    def test_mean_of_equal_tokens_is_the_token(self) -> None:
        z = torch.randn(2, 1, 5).expand(-1, 7, -1)
        mixed = reconstruct_tokens(z, torch.randn(2, 20, 6), torch.randn(2, 7, 6), 0.1, 3, "l1")
        assert torch.allclose(mixed, z[:, :1].expand(-1, 20, -1), atol=1e-6)

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_patch_far_from_all_tokens_gets_the_nearest_instead_of_zeros(self, norm: str) -> None:
        z, x, c = torch.randn(1, 3, 4), torch.full((1, 2, 4), 100.0), torch.randn(1, 3, 4)
        assert (self.official(z, x, c, 1.0, 2) == 0).all()
        assert (reconstruct_tokens(z, x, c, 1.0, 2, "official") == 0).all()
        nearest = (x[:, :, None] - c[:, None]).square().sum(-1).argmin(-1)
        assert torch.allclose(reconstruct_tokens(z, x, c, 1.0, 2, norm)[0], z[0, nearest[0]], atol=1e-5)

    @pytest.mark.parametrize("number", [3, 20, 30])
    def test_default_is_twenty_tokens_or_all_of_fewer(self, number: int) -> None:
        """scripts/amg.py@75a1c30 reconstructs from 20 at a temperature of 5e-3."""
        z, x, c = (torch.randn(1, n, 6, dtype=torch.float64) for n in (number, 9, number))
        expected = self.official(z, x, c, 5e-3, min(20, number))
        assert torch.allclose(reconstruct_tokens(z, x, c), expected, atol=1e-12)

    def test_autocast_rounds_nothing(self) -> None:
        """A restored sequence is the residual stream of the blocks behind, which rank tokens by it."""
        z, x, c = torch.randn(2, 7, 5), torch.randn(2, 20, 6), torch.randn(2, 7, 6)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = reconstruct_tokens(z, x, c, 0.1, 3)
        assert torch.equal(rounded, reconstruct_tokens(z, x, c, 0.1, 3))

    def test_more_neighbours_than_tokens_or_an_unknown_norm(self) -> None:
        z, x, c = torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 3, 4)
        for k in (0, 4):
            with pytest.raises(
                ValueError, match=f"k must be at least 1 and at most the number of tokens, got {k} for 3"
            ):
                reconstruct_tokens(z, x, c, k=k)
        with pytest.raises(ValueError, match="norm must be one of l2, l1, official, got 'max'"):
            reconstruct_tokens(z, x, c, norm="max")

    def test_restored_sequence_is_a_full_grid_with_the_old_prefix(self) -> None:
        x, tokens = features(6), full_map().refer(features(NUM_PATCHES)).keep(random_order(2, 6), 6)
        restored, full = restore(x, tokens)
        assert torch.equal(restored[:, :PREFIX], x[:, :PREFIX])
        assert torch.equal(restored[:, PREFIX:], to_grid(x, tokens, "reconstruct"))
        assert not full.moved
        assert restore(restored, full)[0] is restored


class TestTokenRecoveringAttention:
    def test_is_queries_plus_attention_to_the_kept_tokens(self) -> None:
        module = TokenRecoveringAttention(16, num_heads=2)
        kept, queries = torch.randn(3, 5, 16), torch.randn(3, 9, 16)
        heads = [
            (module.linear_q(queries)[..., s] @ module.linear_k(kept)[..., s].transpose(1, 2) / 8**0.5).softmax(-1)
            @ module.linear_v(kept)[..., s]
            for s in (slice(0, 8), slice(8, 16))
        ]
        expected = queries + module.proj(torch.cat(heads, dim=-1))
        assert torch.allclose(module(kept, queries), expected, atol=1e-6)

    def test_learned_queries_start_small_and_different_or_as_officially_at_zero(self) -> None:
        learned = TokenRecoveringAttention(16, 9, num_heads=2)
        assert learned.x_token is not None
        assert 0 < learned.x_token.std() < 0.03
        given = TokenRecoveringAttention(16, num_heads=2)
        given.load_state_dict({name: value for name, value in learned.state_dict().items() if name != "x_token"})
        kept = torch.randn(3, 5, 16)
        assert torch.equal(learned(kept), given(kept, learned.x_token))
        zeros = TokenRecoveringAttention(16, 9, num_heads=2, zero_init=True)
        assert zeros.x_token is not None
        assert (zeros.x_token == 0).all()
        assert TokenRecoveringAttention(16, 9, device="meta").x_token.is_meta

    def test_every_parameter_gets_a_gradient(self) -> None:
        module = TokenRecoveringAttention(16, 9, num_heads=2)
        module(torch.randn(3, 5, 16)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())

    def test_wrong_arguments_are_named(self) -> None:
        kept, queries = torch.randn(3, 5, 16), torch.randn(3, 9, 16)
        message = r"give queries to a module without learned ones \(num_queries=None\), and none to a module with"
        with pytest.raises(ValueError, match=message):
            TokenRecoveringAttention(16)(kept)
        with pytest.raises(ValueError, match=message):
            TokenRecoveringAttention(16, 9)(kept, queries)
        with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 16 and 3"):
            TokenRecoveringAttention(16, num_heads=3)
        with pytest.raises(ValueError, match="zero_init is for learned queries, but num_queries is None"):
            TokenRecoveringAttention(16, zero_init=True)


class TestTokenRecovery:
    def test_patches_keep_their_places_and_ask_the_tokens(self) -> None:
        recovery = TokenRecovery(4, 2, init_values=None).double()
        x, s = torch.randn(2, NUM_PATCHES, 4).double(), torch.randn(2, 3, 4).double()
        order = torch.randperm(NUM_PATCHES)
        assert torch.allclose(recovery(x[:, order], s), recovery(x, s)[:, order], rtol=0, atol=1e-12)
        assert torch.allclose(recovery(x, s[:, [2, 0, 1]]), recovery(x, s), rtol=0, atol=1e-12)  # tokens have no place
        assert not torch.allclose(recovery(x, 2 * s - x[:, :3]), recovery(x, s))

    def test_is_the_attention_to_the_tokens_and_the_mlp_each_with_a_residual(self) -> None:
        recovery = TokenRecovery(4, 2, init_values=None).double()
        x, s = torch.randn(2, NUM_PATCHES, 4).double(), torch.randn(2, 3, 4).double()
        attended = x + recovery.attn(recovery.norm1(x), recovery.norm1(s))  # STViT-R's recovery, pre-norm
        expected = attended + recovery.mlp(recovery.norm2(attended))
        assert torch.allclose(recovery(x, s), expected, rtol=0, atol=1e-12)
