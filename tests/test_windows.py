"""Windows of maps: against timm's Swin, against padding and unfolding, and against loops over positions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from effvit.architectures.swin_parts import WindowBlock
from effvit.layers.cross_attention import WindowCrossBlock
from effvit.layers.windows import (
    cell_of_position,
    from_windows,
    inside_windows,
    key_mask,
    live_cells,
    near_mask,
    overlapping_windows,
    resize_bias_table,
    shift_mask,
    spread_cells,
    to_windows,
)


def a_map(height: int, width: int, channels: int = 4, batch: int = 2) -> Tensor:
    return torch.randn(batch, height, width, channels, generator=torch.Generator().manual_seed(0)).double()


def randomised(block: WindowCrossBlock) -> WindowCrossBlock:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.5)
    return block.double()


class TestDisjointWindows:
    @pytest.mark.parametrize("shift", [0, 2])
    @pytest.mark.parametrize("size", [(10, 15), (7, 12), (3, 5), (3, 12)])
    def test_from_windows_undoes_to_windows(self, size: tuple[int, int], shift: int) -> None:
        x = a_map(*size)
        for shift_small in (False, True):
            windows = to_windows(x, 5, shift, shift_small)
            assert windows.shape == (2 * math.ceil(size[0] / 5) * math.ceil(size[1] / 5), 25, 4)
            assert torch.equal(from_windows(windows, 5, size, shift, shift_small), x)

    def test_padding_is_zero_or_copies_the_edge(self) -> None:
        x = a_map(4, 4)
        assert torch.equal(to_windows(x, 3)[3], F.pad(x[0, 3:, 3:], (0, 0, 0, 2, 0, 2)).flatten(0, 1))
        assert torch.equal(to_windows(x, 3, edge=True)[3], x[0, 3, 3].expand(9, -1))

    def test_mask_and_blocks_are_timms_where_no_map_is_padded(self) -> None:
        torch.manual_seed(0)
        timms = SwinTransformerBlock(8, (10, 15), num_heads=2, window_size=5, shift_size=2).double()
        ours = WindowBlock(8, 2, 5, shifted=True).double()
        ours.load_state_dict(timms.state_dict())
        x = a_map(10, 15, 8)
        assert torch.equal(shift_mask(x, 5, 2), timms.get_attn_mask(x))
        assert torch.allclose(ours(x), timms(x), rtol=0, atol=1e-12)

    def test_a_side_that_one_window_covers_is_shifted_only_on_demand(self) -> None:
        x = a_map(5, 10)
        assert not shift_mask(x[:, :, :5], 5, 2, shift_small=False).any()
        assert shift_mask(x[:, :, :5], 5, 2, shift_small=True).any()
        assert torch.equal(to_windows(x, 5, 2, shift_small=False), to_windows(x.roll(-2, 2), 5))


class TestOverlappingWindows:
    @pytest.mark.parametrize(("size", "kernel", "stride"), [((14, 21), 14, 7), ((7, 7), 21, 7), ((6, 9), 8, 3)])
    def test_border_and_order_are_those_of_unfold_on_a_padded_map(
        self, size: tuple[int, int], kernel: int, stride: int
    ) -> None:
        x = a_map(*size)
        before, after = (kernel - stride) // 2, math.ceil((kernel - stride) / 2)
        padded = F.pad(x.permute(0, 3, 1, 2), (before, after, before, after), value=5.0)
        unfolded = F.unfold(padded, kernel, stride=stride)  # (B, C * kernel², nW)
        expected = unfolded.unflatten(1, (4, -1)).permute(0, 3, 2, 1).flatten(0, 1)
        border = torch.full((4,), 5.0).double()
        assert torch.equal(overlapping_windows(x, kernel, stride, border), expected)

    @pytest.mark.parametrize("size", [(10, 12), (7, 7), (3, 15)])
    def test_correct_mask_is_true_on_the_map(self, size: tuple[int, int]) -> None:
        inside = key_mask(a_map(*size), 9, 4)
        assert inside is not None
        nan = torch.full((4,), float("nan")).double()
        windows = overlapping_windows(a_map(*size), 9, 4, nan)
        assert torch.equal(inside[:, 0, 0], ~windows.isnan().any(-1))
        assert key_mask(a_map(*size), 9, 4, mode="none") is None

    def test_disjoint_windows_of_a_whole_map_need_no_mask(self) -> None:
        assert key_mask(a_map(6, 9), 3, 3) is None
        assert key_mask(a_map(6, 8), 3, 3) is not None

    def test_official_mask_hides_only_the_corner_where_both_sides_are_padded(self) -> None:
        # The released slice [-pad_b:, -pad_r:], by hand: an 8 x 10 map with windows of 7 is padded to 14 x 14.
        mask = key_mask(a_map(8, 10), 7, 7, "official", (8, 10), 7)
        assert mask is not None
        hidden = from_windows(mask[:4].reshape(4, 49, 1) < 0, 7, (14, 14))[0, :, :, 0]
        expected = torch.zeros(14, 14, dtype=torch.bool)
        expected[-6:, -4:] = True
        assert torch.equal(hidden, expected)
        mask = key_mask(a_map(7, 14), 7, 7, "official", (7, 14), 7)
        assert mask is not None
        assert (mask == -1000).all()  # no padding: -0: is the whole map

    @pytest.mark.parametrize("size", [(14, 14), (14, 28), (20, 9), (5, 6)])
    def test_inside_windows_stay_on_the_map_and_hold_their_own_window(self, size: tuple[int, int]) -> None:
        height, width = size
        position = torch.arange(height * width).reshape(1, height, width, 1)
        windows = inside_windows(position, 7, 10)[..., 0]  # (nW, k²)
        assert windows.shape == (math.ceil(height / 7) * math.ceil(width / 7), min(10, height) * min(10, width))
        assert all(len(set(window.tolist())) == windows.shape[1] for window in windows)
        own = to_windows(position + 1, 7)[..., 0] - 1  # -1: padding
        for window, inside in zip(windows, own, strict=True):
            assert set(inside.tolist()) - {-1} <= set(window.tolist())

    def test_literal_windows_are_the_inside_ones_on_a_14_x_14_map_and_refused_where_they_do_not_fit(self) -> None:
        x = a_map(14, 14)
        assert torch.equal(inside_windows(x, 7, 10, stride=4), inside_windows(x, 7, 10))
        for size in ((28, 28), (14, 15), (7, 14)):
            with pytest.raises(ValueError, match=r"key_windows='cls' .* use key_windows='inside'"):
                inside_windows(a_map(*size), 7, 10, stride=4)


class TestCells:
    @pytest.mark.parametrize("window", [3, 4, 7, 8])
    def test_live_cells_are_those_whose_bin_holds_a_position(self, window: int) -> None:
        """Cell i of s in a window of side w covers floor(i w / s) to ceil((i + 1) w / s), as in adaptive pooling."""
        for samples, side in itertools.product(range(1, window + 1), range(1, 3 * window + 1)):
            starts = [n * window + i * window // samples for n in range(4) for i in range(samples)]
            assert live_cells(side, window, samples) == sum(start < side for start in starts)

    def test_every_position_lies_in_a_live_cell(self) -> None:
        for side in range(1, 30):
            cells = cell_of_position(side, 7, 3, torch.device("cpu"))
            assert int(cells.max()) < live_cells(side, 7, 3)
            assert (cells.diff() >= 0).all()

    def test_spread_cells_by_hand(self) -> None:
        s = torch.arange(4.0).reshape(1, 2, 2, 1)
        assert spread_cells(s, (3, 4), window=4, samples=2)[0, :, :, 0].tolist() == [
            [0, 0, 1, 1],
            [0, 0, 1, 1],
            [2, 2, 3, 3],
        ]
        assert spread_cells(s[:, :1, :1], (2, 2), window=4, samples=2, merged=2).unique().tolist() == [0]

    def test_bias_tables_are_resampled_and_kept_at_their_own_size(self) -> None:
        table = torch.randn(5 * 9, 2)
        assert torch.allclose(resize_bias_table(table, (3, 5), (3, 5)), table, atol=1e-6)
        assert resize_bias_table(table, (3, 5), (6, 4)).shape == (11 * 7, 2)
        assert torch.allclose(resize_bias_table(torch.ones(25, 2), (3, 3), (5, 2)), torch.ones(27, 2))


class TestWindowCrossBlock:
    def test_projecting_once_is_projecting_every_window(self) -> None:
        # The released order: pad with zeros, unfold, norm, project; mode "none" has no mask.
        block = randomised(WindowCrossBlock(4, 2, window=7, stride=3, kernel=9, mask_mode="none"))
        x, s = a_map(14, 21), a_map(6, 9)
        windows = overlapping_windows(s, 9, 3, torch.zeros(4).double())
        queries = to_windows(x, 7)
        expected = from_windows(block.ls1(block.attn(block.norm1(queries), block.norm1(windows))), 7, (14, 21))
        actual = block.cross(x, s, (14, 21), 7)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12)

    # The small map is masked as a whole, the large one cut into windows.
    @pytest.mark.parametrize(("queries", "keys", "kernel"), [((5, 6), (6, 7), 7), ((11, 12), (15, 16), 6)])
    def test_correct_mask_is_attention_to_the_real_keys_alone(
        self, queries: tuple[int, int], keys: tuple[int, int], kernel: int
    ) -> None:
        block = randomised(WindowCrossBlock(4, 2, window=3, stride=4, kernel=kernel))
        x, y = a_map(*queries), a_map(*keys)
        actual = block.cross(x, y, keys, 4)
        for row in range(queries[0]):
            for column in range(queries[1]):
                top, left = row // 3 * 4 - 1, column // 3 * 4 - 1
                real = y[:, max(top, 0) : top + kernel, max(left, 0) : left + kernel].flatten(1, 2)
                query = block.norm1(x[:, row, column].unsqueeze(1))
                expected = block.ls1(block.attn(query, block.norm1(real)))[:, 0]
                assert torch.allclose(actual[:, row, column], expected, rtol=0, atol=1e-12)

    def test_no_mask_is_made_where_every_key_is_near(self) -> None:
        x, y = a_map(14, 14), a_map(6, 6)
        assert near_mask(x, y, 7, 3, 27) is None
        assert near_mask(x, y, 7, 3, 9) is None
        assert near_mask(x, y, 7, 3, 7) is not None

    def test_settings_that_make_no_sense_are_named(self) -> None:
        with pytest.raises(ValueError, match="mask_mode must be one of correct, official, none, got 'strict'"):
            WindowCrossBlock(4, 2, 7, 3, 9, mask_mode="strict")
        with pytest.raises(ValueError, match=r"key windows must be at least as large .* got 2 for 3"):
            WindowCrossBlock(4, 2, 7, 3, 2)
