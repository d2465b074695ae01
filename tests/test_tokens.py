"""Laws of TokenMap: what keeping, merging and fusing compose to, and what is read off the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from effvit.tokens import (
    Moved,
    TokenMap,
    fix_traced_size,
    flat_rows,
    position_of,
    rows_in_sequence,
    scattered_places,
    take_rows,
    true_places,
    wide_dtype,
)

GRID = (3, 4)
NUM_PATCHES = 12
PREFIX = 2


def full_map(batch: int = 2, num_prefix: int = PREFIX) -> TokenMap:
    x = torch.zeros(batch, num_prefix + NUM_PATCHES, 4)
    return TokenMap.full(x, GRID, num_prefix, num_class=min(num_prefix, 1))


def random_choice(batch: int, number: int, kept: int) -> Tensor:
    """(B, kept) different positions below ``number``, in random order."""
    return torch.rand(batch, number).argsort(dim=1)[:, :kept]


def kept_map(*counts: int, batch: int = 2) -> TokenMap:
    """The full map after keeping random tokens, once for each count."""
    tokens = full_map(batch)
    for count in counts:
        tokens = tokens.keep(random_choice(batch, tokens.num_tokens, count), count)
    return tokens


def assert_right_inverse(tokens: TokenMap) -> None:
    place = torch.arange(tokens.num_tokens).expand_as(tokens.anchor)
    valid = torch.ones_like(tokens.anchor, dtype=torch.bool) if tokens.valid is None else tokens.valid
    assert torch.equal(tokens.source.gather(1, tokens.anchor)[valid], place[valid])


class TestRows:
    def test_rows_are_gathered_as_by_indexing_each_image(self) -> None:
        x, index = torch.randn(3, 7, 5), random_choice(3, 7, 4)
        expected = torch.stack([image[chosen] for image, chosen in zip(x, index, strict=True)])
        assert torch.equal(take_rows(x, flat_rows(index, 7)), expected)

    def test_offset_puts_the_prefix_in_front(self) -> None:
        x, index = torch.randn(3, 2 + 5, 4), random_choice(3, 5, 3)
        taken = take_rows(x, flat_rows(index, 7, offset=2))
        assert torch.equal(taken[:, :2], x[:, :2])
        assert torch.equal(taken[:, 2:], take_rows(x[:, 2:], flat_rows(index, 5)))

    def test_position_is_the_inverse_of_a_selection(self) -> None:
        index = random_choice(3, 9, 5)
        position = position_of(index, torch.zeros(3, 9, dtype=torch.int64))
        assert torch.equal(position.gather(1, index), torch.arange(5).expand(3, -1))
        assert (position >= 0).sum(1).tolist() == [5, 5, 5]

    @pytest.mark.parametrize(
        ("dtype", "wide"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
    )
    def test_wide_dtype_is_at_least_float32(self, dtype: torch.dtype, wide: torch.dtype) -> None:
        assert wide_dtype(dtype) is wide


class TestKeep:
    def test_full_map_is_the_identity(self) -> None:
        tokens = full_map()
        assert torch.equal(tokens.source, torch.arange(NUM_PATCHES).expand(2, -1))
        assert torch.equal(tokens.anchor, tokens.source)
        assert tokens.counts().tolist() == [NUM_PATCHES] * 2
        assert not tokens.moved

    def test_kept_tokens_carry_their_own_patch_and_others_none(self) -> None:
        index = random_choice(2, NUM_PATCHES, 5)
        tokens = full_map().keep(index, 5)
        assert torch.equal(tokens.anchor, index)
        assert_right_inverse(tokens)
        assert (tokens.source == -1).sum(1).tolist() == [7, 7]

    def test_keeping_twice_is_keeping_the_chosen_of_the_chosen(self) -> None:
        first, second = random_choice(2, NUM_PATCHES, 8), random_choice(2, 8, 3)
        twice = full_map().keep(first, 8).keep(second, 3)
        once = full_map().keep(first.gather(1, second), 3)
        assert torch.equal(twice.source, once.source)
        assert torch.equal(twice.anchor, once.anchor)

    def test_keeping_all_in_order_changes_no_label(self) -> None:
        tokens = kept_map(7)
        same = tokens.keep(torch.arange(7).expand(2, -1), 7)
        assert torch.equal(same.source, tokens.source)
        assert torch.equal(same.anchor, tokens.anchor)

    def test_fields_of_tokens_follow_their_token(self) -> None:
        size = torch.rand(2, PREFIX + NUM_PATCHES)
        tokens = replace(full_map(), size=size, key_weight=2 * size)
        index = random_choice(2, NUM_PATCHES, 4)
        left = tokens.keep(index, 4)
        assert left.size is not None
        assert left.key_weight is not None
        expected = torch.cat([size[:, :PREFIX], size[:, PREFIX:].gather(1, index)], dim=1)
        assert torch.equal(left.size, expected)
        assert torch.equal(left.key_weight, 2 * expected)

    def test_padding_carries_no_patch(self) -> None:
        valid = torch.tensor([[True, True, True], [True, False, False]])
        tokens = full_map().keep(torch.tensor([[3, 7, 1], [4, 2, 0]]), 3, valid=valid)
        assert tokens.counts().tolist() == [3, 1]
        assert_right_inverse(tokens)
        assert (tokens.source >= 0).sum(1).tolist() == [3, 1]


class TestMergeAndFuse:
    def test_merges_compose(self) -> None:
        halves = (torch.arange(NUM_PATCHES) // 2).expand(2, -1)
        pairs = full_map().relabel(Moved(halves, torch.arange(0, NUM_PATCHES, 2).expand(2, -1)), 6)
        fours = pairs.relabel(Moved(halves[:, :6], torch.arange(0, 6, 2).expand(2, -1)), 3)
        assert torch.equal(fours.source, (torch.arange(NUM_PATCHES) // 4).expand(2, -1))
        assert_right_inverse(pairs)
        assert_right_inverse(fours)

    def test_dropped_patches_stay_dropped(self) -> None:
        tokens = kept_map(6)
        dropped = tokens.source == -1
        later = tokens.relabel(Moved(torch.zeros_like(tokens.anchor), torch.zeros_like(tokens.anchor[:, :1])), 1)
        assert torch.equal(later.source == -1, dropped)
        assert torch.equal(later.source[~dropped], torch.zeros_like(later.source[~dropped]))

    def test_fused_token_carries_all_that_is_not_kept(self) -> None:
        ranked = random_choice(2, NUM_PATCHES, 5)
        tokens = full_map().fuse(ranked, 4)
        assert tokens.num_tokens == 5
        assert_right_inverse(tokens)
        assert torch.equal(tokens.anchor, ranked)
        assert (tokens.source == 4).sum(1).tolist() == [NUM_PATCHES - 4] * 2
        assert tokens.fused is not None
        assert tokens.fused.tolist() == [[False] * 4 + [True]] * 2
        assert tokens.on_its_own().sum(1).tolist() == [4, 4]

    def test_fused_token_that_is_kept_stays_one(self) -> None:
        tokens = full_map().fuse(torch.tensor([[0, 1, 2, 3]]).expand(2, -1), 3)  # tokens 0 1 2 and the fused 3
        kept = tokens.keep(torch.tensor([[1, 3]]).expand(2, -1), 2)
        assert kept.fused is not None
        assert kept.fused[0].tolist() == [False, True]
        assert kept.on_its_own()[0].nonzero().flatten().tolist() == [1]

    def test_fused_token_can_be_fused_again(self) -> None:
        tokens = full_map().fuse(torch.tensor([[0, 1, 2, 3]]).expand(2, -1), 3)  # tokens 0 1 2 and the fused 3
        kept = tokens.fuse(torch.tensor([[3, 0, 1]]).expand(2, -1), 2)
        assert kept.fused is not None
        assert kept.fused[0].tolist() == [True, False, True]
        assert kept.on_its_own()[0].nonzero().flatten().tolist() == [0]
        assert kept.source[0].tolist() == [1, 2, 2] + [0] * 9

    def test_labels_are_the_source_on_the_grid(self) -> None:
        tokens = kept_map(5)
        labels = tokens.labels()
        assert labels.shape == (2, *GRID)
        for token, patch in enumerate(tokens.anchor[0].tolist()):
            assert labels[0, patch // GRID[1], patch % GRID[1]] == token


class TestPacking:
    def ragged_map(self) -> TokenMap:
        valid = torch.tensor([[True, True, True, False], [True, True, True, True], [True, False, False, False]])
        return full_map(batch=3).keep(random_choice(3, NUM_PATCHES, 4), 4, valid=valid, packed=True)

    def test_unpacking_a_packed_sequence_gives_it_back(self) -> None:
        tokens = self.ragged_map()
        mask = tokens.sequence_mask()
        x = torch.randn(3, PREFIX + 4, 5).masked_fill(~mask.unsqueeze(-1), 0)
        packed = tokens.pack(x)
        assert packed.shape == (1, 3 * PREFIX + 8, 5)
        assert torch.equal(tokens.unpack(packed), x)
        assert torch.equal(tokens.pack(tokens.unpack(packed)), packed)

    def test_images_follow_one_another(self) -> None:
        tokens = self.ragged_map()
        x = torch.randn(3, PREFIX + 4, 5)
        packed = tokens.pack(x)[0]
        images = packed.split((tokens.counts() + PREFIX).tolist())
        for image, row, count in zip(images, x, tokens.counts().tolist(), strict=True):
            assert torch.equal(image, row[: PREFIX + count])

    def test_mask_covers_prefix_and_valid_tokens(self) -> None:
        tokens = self.ragged_map()
        assert tokens.sequence_mask().sum(1).tolist() == [PREFIX + 3, PREFIX + 4, PREFIX + 1]
        assert full_map().sequence_mask().all()


@pytest.mark.parametrize("places", [true_places, scattered_places])
def test_places_of_a_mask_are_those_that_nonzero_reads(places: Callable[[Tensor, int], Tensor]) -> None:
    mask = torch.rand(5, 7) < 0.3
    expected = mask.flatten().nonzero().squeeze(1)
    assert torch.equal(places(mask if places is true_places else mask.flatten(), len(expected)), expected)
    assert places(torch.zeros(4, dtype=torch.bool), 0).shape == (0,)


class TestKeyBias:
    def test_unit_weights_need_no_bias(self) -> None:
        assert kept_map(5).key_bias(torch.float32) is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_wide_bias_makes_a_token_count_as_often_as_its_weight(self, dtype: torch.dtype) -> None:
        weight = torch.tensor([[1.0, 1.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
        tokens = replace(full_map(batch=1).keep(torch.tensor([[0, 1, 2]]), 3), key_weight=weight)
        bias = tokens.key_bias(dtype)
        assert bias is not None
        assert bias.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert bias.shape == (1, 1, 1, PREFIX + 3)
        share = bias.double().softmax(-1).flatten()
        assert torch.allclose(share, torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0]).double() / 8, atol=1e-6)

    def test_bias_of_a_float64_model_is_exact(self) -> None:
        weight = 1 + torch.rand(2, PREFIX + NUM_PATCHES, dtype=torch.float64)
        bias = replace(full_map(), key_weight=weight).key_bias(torch.float64)
        assert bias is not None
        assert torch.equal(bias[:, 0, 0], weight.log())

    def test_bias_of_a_float64_model_is_exact_for_weights_of_float32(self) -> None:
        weight = torch.full((1, PREFIX + NUM_PATCHES), 3.0)
        bias = replace(full_map(batch=1), key_weight=weight).key_bias(torch.float64)
        assert bias is not None
        assert bias[0, 0, 0].tolist() == pytest.approx([math.log(3)] * (PREFIX + NUM_PATCHES), rel=1e-15)

    def test_weighted_padding_receives_no_attention(self) -> None:
        valid = torch.tensor([[True, False]])
        tokens = full_map(batch=1).keep(torch.tensor([[0, 1]]), 2, valid=valid)
        tokens = replace(tokens, key_weight=torch.tensor([[1.0, 1.0, 2.0, 3.0]]))
        bias = tokens.key_bias(torch.float32)
        assert bias is not None
        assert torch.allclose(bias.softmax(-1).flatten(), torch.tensor([1.0, 1.0, 2.0, 0.0]) / 4)

    def test_padding_receives_no_attention(self) -> None:
        valid = torch.tensor([[True, False], [True, True]])
        tokens = full_map().keep(random_choice(2, NUM_PATCHES, 2), 2, valid=valid)
        bias = tokens.key_bias(torch.float32)
        assert bias is not None
        share = bias.softmax(-1)[:, 0, 0]
        assert torch.allclose(share[0], torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)
        assert torch.allclose(share[1], torch.full((4,), 0.25))


class TestPositionTable:
    def slow(self, table: Tensor, tokens: TokenMap) -> Tensor:
        """One row at a time: what the token's anchor patch would rotate by."""
        heads = table.unsqueeze(0) if table.ndim == 2 else table
        rows = [[[head[patch] for patch in image] for head in heads] for image in tokens.anchor.tolist()]
        return torch.stack([torch.stack([torch.stack(head) for head in image]) for image in rows])

    @pytest.mark.parametrize("shape", [(NUM_PATCHES, 6), (3, NUM_PATCHES, 6)])
    def test_row_of_each_token_is_that_of_its_anchor(self, shape: tuple[int, ...]) -> None:
        table, tokens = torch.randn(shape), kept_map(9, 5)
        assert torch.equal(tokens.position_table(table), self.slow(table, tokens))

    def test_table_itself_is_used_until_a_token_moves(self) -> None:
        table = torch.randn(NUM_PATCHES, 6)
        assert full_map().position_table(table) is table

    def test_full_selection_in_order_gives_the_table_to_every_image(self) -> None:
        table = torch.randn(NUM_PATCHES, 6)
        tokens = full_map().keep(torch.arange(NUM_PATCHES).expand(2, -1), NUM_PATCHES)
        assert torch.equal(tokens.position_table(table), table.expand(2, 1, -1, -1))


class TestMemory:
    def test_patch_remembers_the_last_feature_of_the_token_that_stood_for_it(self) -> None:
        before, after = torch.randn(2, PREFIX + NUM_PATCHES, 4), torch.randn(2, PREFIX + 5, 4)
        tokens = full_map().remember(before)
        index = random_choice(2, NUM_PATCHES, 5)
        later = tokens.keep(index, 5).remember(after)
        assert later.memory is not None
        expected = before[:, PREFIX:].clone()
        for image in range(2):
            expected[image, index[image]] = after[image, PREFIX:]
        assert torch.equal(later.memory.features(), expected)

    def test_fused_token_overwrites_no_memory(self) -> None:
        before, after = torch.randn(2, PREFIX + NUM_PATCHES, 4), torch.randn(2, PREFIX + 3, 4)
        ranked = torch.tensor([[5, 0, 1]]).expand(2, -1)
        later = full_map().remember(before).fuse(ranked, 2).remember(after)
        assert later.memory is not None
        assert torch.equal(later.memory.features()[:, 5], after[:, PREFIX])
        assert torch.equal(later.memory.features()[:, 0], after[:, PREFIX + 1])
        assert torch.equal(later.memory.features()[:, 1:5], before[:, PREFIX + 1 : PREFIX + 5])

    def test_packed_features_are_remembered_like_padded_ones(self) -> None:
        before = torch.randn(2, PREFIX + NUM_PATCHES, 4)
        valid = torch.tensor([[True, True], [True, False]])
        index = random_choice(2, NUM_PATCHES, 2)
        padded = full_map().remember(before).keep(index, 2, valid=valid)
        packed = full_map().remember(before).keep(index, 2, valid=valid, packed=True)
        after = torch.randn(2, PREFIX + 2, 4)
        padded, packed = padded.remember(after), packed.remember(packed.pack(after))
        assert padded.memory is not None
        assert packed.memory is not None
        assert torch.equal(padded.memory.features(), packed.memory.features())

    def test_sequences_are_kept_and_not_copied(self) -> None:
        first, second = torch.randn(2, PREFIX + NUM_PATCHES, 4), torch.randn(2, PREFIX + NUM_PATCHES, 4)
        third = torch.randn(2, PREFIX + 5, 4)
        complete = full_map().remember(first).remember(second)
        assert complete.memory is not None
        assert [id(x) for x in complete.memory.sequences] == [id(second)]
        later = complete.keep(random_choice(2, NUM_PATCHES, 5), 5).remember(third)
        assert later.memory is not None
        assert [id(x) for x in later.memory.sequences] == [id(second), id(third)]

    def test_split_separates_prefix_and_patches(self) -> None:
        x = torch.randn(2, PREFIX + 5, 4)
        prefix, patches = kept_map(5).split(x)
        assert torch.equal(torch.cat([prefix, patches], dim=1), x)
        assert prefix.shape[1] == PREFIX


def test_traced_size_is_fixed_in_the_dimensions_named_only() -> None:
    traced = torch.jit.trace(lambda x: fix_traced_size(x, 1) + 1, torch.zeros(2, 3, 4))
    assert traced(torch.zeros(5, 3, 6)).shape == (5, 3, 6)
    with pytest.raises(RuntimeError, match=r"expanded size of the tensor \(3\) must match the existing size \(4\)"):
        traced(torch.zeros(2, 4, 4))


def test_rows_of_a_packed_sequence_are_behind_no_padding() -> None:
    """The first image has padding, so that the second lies elsewhere in the packed sequence."""
    valid, index = torch.tensor([[True, False], [True, True]]), torch.tensor([[0], [1]])
    tokens = full_map().keep(random_choice(2, NUM_PATCHES, 2), 2, valid=valid, packed=True)
    x = torch.randn(2, PREFIX + 2, 4)
    packed = take_rows(tokens.pack(x), rows_in_sequence(tokens, tokens.rows(index))[0])
    assert torch.equal(packed, take_rows(x, flat_rows(index, PREFIX + 2, PREFIX)))
