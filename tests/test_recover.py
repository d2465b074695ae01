"""Dense maps: exact where nothing was reduced, and what each fill gives to a patch that no token stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effvit.recover import FILLS, TokenRecovery, nearest_token, to_grid, to_map
from effvit.tokens import TokenMap

GRID = (3, 5)
NUM_PATCHES = 15
PREFIX = 2


def full_map(batch: int = 2) -> TokenMap:
    return TokenMap.full(torch.zeros(batch, PREFIX + NUM_PATCHES, 4), GRID, PREFIX, num_class=1)


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
        assert torch.equal(to_grid(x, full_map(), fill), x[:, PREFIX:])
        assert torch.equal(to_map(x, full_map(), fill).flatten(2).transpose(1, 2), x[:, PREFIX:])

    def test_shuffled_sequence_is_put_back_in_order(self, fill: str) -> None:
        x, order = features(NUM_PATCHES), random_order(2, NUM_PATCHES)
        tokens = full_map().remember(features(NUM_PATCHES)).keep(order, NUM_PATCHES)
        grid = to_grid(x, tokens, fill)
        assert torch.equal(grid.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)), x[:, PREFIX:])

    def test_kept_patches_have_the_feature_of_their_token(self, fill: str) -> None:
        x, index = features(6), random_order(2, 6)
        tokens = full_map().remember(features(NUM_PATCHES)).keep(index, 6)
        grid = to_grid(x, tokens, fill)
        assert torch.equal(grid.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)), x[:, PREFIX:])

    def test_merged_patches_have_the_feature_of_their_token(self, fill: str) -> None:
        target = (torch.arange(NUM_PATCHES) // 3).expand(2, -1)
        tokens = full_map().remember(features(NUM_PATCHES))
        tokens = tokens.relabel(target, torch.arange(0, NUM_PATCHES, 3).expand(2, -1), 5)
        x = features(5)
        assert torch.equal(to_grid(x, tokens, fill), x[:, PREFIX:].repeat_interleave(3, dim=1))

    def test_packed_sequence_is_recovered_like_the_padded_one(self, fill: str) -> None:
        arguments: dict[str, Any] = {"valid": torch.tensor([[True, True, True], [True, False, False]])}
        start, index = full_map().remember(features(NUM_PATCHES)), random_order(2, 3)
        padded, packed = start.keep(index, 3, **arguments), start.keep(index, 3, packed=True, **arguments)
        x = features(3)
        assert torch.equal(to_grid(packed.pack(x), packed, fill), to_grid(x, padded, fill))

    def test_map_is_the_grid_with_channels_first(self, fill: str) -> None:
        x, index = features(6), random_order(2, 6)
        tokens = full_map().remember(features(NUM_PATCHES)).keep(index, 6)
        dense = to_map(x, tokens, fill)
        assert dense.shape == (2, 4, *GRID)
        assert dense.is_contiguous()
        for patch, feature in enumerate(to_grid(x, tokens, fill)[0]):
            assert torch.equal(dense[0, :, patch // GRID[1], patch % GRID[1]], feature)


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

    def test_gradient_of_last_reaches_the_dropped_features(self) -> None:
        before, after = features(NUM_PATCHES).requires_grad_(), features(6).requires_grad_()
        tokens = full_map().remember(before).keep(random_order(2, 6), 6)
        to_grid(after, tokens, "last").sum().backward()
        assert before.grad is not None
        assert after.grad is not None
        assert torch.equal(before.grad[:, PREFIX:].sum(-1) / 4, (tokens.source == -1).float())
        assert torch.equal(after.grad[:, PREFIX:], torch.ones(2, 6, 4))


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
