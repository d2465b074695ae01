"""Schedules against closed forms; refusals are tested in test_bad_input.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from effvit.schedule import (
    check_count,
    check_number,
    cosine_keep_rate,
    per_block,
    spread_blocks,
    spread_evenly,
    tome_r,
)

DEPTHS = (1, 2, 3, 12, 24)


class TestToMe:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_int_is_a_constant_schedule(self, depth: int) -> None:
        assert tome_r(8, depth) == [8] * depth

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_list_is_filled_up_with_zeros(self, depth: int) -> None:
        assert tome_r([5], depth) == [5] + [0] * (depth - 1)
        assert tome_r([], depth) == [0] * depth
        assert tome_r(list(range(depth)), depth) == list(range(depth))

    def test_pair_of_ints_is_a_list_and_not_an_inflection(self) -> None:
        assert tome_r([8, 1], 3) == [8, 1, 0]
        assert tome_r((8, 0), 3) == [8, 0, 0]

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_inflection_zero_is_constant(self, depth: int) -> None:
        assert tome_r((8, 0.0), depth) == [8] * depth

    @pytest.mark.parametrize("depth", [2, 3, 12, 24])
    def test_decreasing_schedule_falls_from_twice_r_to_zero(self, depth: int) -> None:
        schedule = tome_r((8, -1.0), depth)
        assert (schedule[0], schedule[-1]) == (16, 0)
        assert schedule == sorted(schedule, reverse=True)
        assert schedule == [math.floor(16 - 16 * i / (depth - 1) + 1e-9) for i in range(depth)]

    @pytest.mark.parametrize("depth", [2, 3, 12, 24])
    def test_increasing_schedule_is_the_decreasing_one_reversed(self, depth: int) -> None:
        assert tome_r((8, 1.0), depth) == tome_r((8, -1.0), depth)[::-1]

    @pytest.mark.parametrize("inflection", [-1.0, -0.5, 0.25, 1.0])
    def test_total_is_r_times_depth_but_for_truncation(self, inflection: float) -> None:
        total = sum(tome_r((13, inflection), 12))
        assert 13 * 12 - 12 < total <= 13 * 12

    def test_published_schedules_of_a_twelve_block_model(self) -> None:
        # parse_r of the official code, recorded for depth 12.
        assert tome_r((16, -1.0), 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
        assert tome_r((16, -0.5), 12) == [24, 22, 21, 19, 18, 16, 15, 13, 12, 10, 9, 8]


class TestPerBlock:
    def test_one_value_is_given_to_all(self) -> None:
        assert per_block("r", 3, (1, 4)) == {1: 3, 4: 3}

    def test_sequence_gives_one_to_each(self) -> None:
        assert per_block("r", [3, 5], (1, 4)) == {1: 3, 4: 5}
        assert per_block("r", (3, 5), (1, 4)) == {1: 3, 4: 5}

    def test_no_block_takes_no_value(self) -> None:
        assert per_block("r", 3, ()) == {}

    def test_published_blocks_are_spread_in_proportion(self) -> None:
        assert spread_blocks((3, 6, 9), 12) == (3, 6, 9)
        assert spread_blocks((3, 6, 9), 24) == (6, 12, 18)
        assert spread_blocks((3, 6, 9), 4) == (1, 2, 3)

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_spread_blocks_exist_and_differ(self, depth: int) -> None:
        blocks = spread_blocks((0, 2, 5, 8, 10), depth)
        assert list(blocks) == sorted(set(blocks))
        assert all(0 <= block < depth for block in blocks)


class TestCosine:
    def rates(self, keep_rate: float, steps: int = 7, start: int = 3, epochs: int = 5) -> list[float]:
        total = steps * (start + epochs + 2)
        return [cosine_keep_rate(step, steps, keep_rate, start, epochs) for step in range(total)]

    def test_nothing_is_reduced_before_the_start(self) -> None:
        assert self.rates(0.7)[: 7 * 3] == [1.0] * 21

    def test_schedule_starts_at_one_and_ends_at_the_rate(self) -> None:
        rates = self.rates(0.7)
        assert rates[21] == 1.0
        assert rates[7 * 8 :] == [0.7] * 14
        assert rates[7 * 8 - 1] == pytest.approx(0.7, abs=1e-3)

    def test_rate_never_rises(self) -> None:
        rates = self.rates(0.5)
        assert rates == sorted(rates, reverse=True)

    def test_middle_is_half_way(self) -> None:
        assert cosine_keep_rate(60, 1, 0.5) == pytest.approx(0.75)

    def test_quarter_is_the_cosine_of_an_eighth_turn(self) -> None:
        assert cosine_keep_rate(35, 1, 0.6) == pytest.approx(0.6 + 0.4 * (1 + math.sqrt(0.5)) / 2)

    def test_fine_tuning_has_the_rate_from_the_first_step(self) -> None:
        assert cosine_keep_rate(0, 100, 0.7, start_epoch=0, epochs=0) == 0.7

    def test_rate_one_stays_one(self) -> None:
        assert set(self.rates(1.0)) == {1.0}


@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_count_is_a_whole_number_and_no_truth_value(value: Any) -> None:
    with pytest.raises(TypeError, match="r must be a whole number, got"):
        check_count("r", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None])
def test_number_is_finite(value: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be a finite number, got"):
        check_number("alpha", value)


def test_tokens_that_do_not_divide_are_spread_with_the_larger_shares_first() -> None:
    assert spread_evenly(11, 4) == [3, 3, 3, 2]
