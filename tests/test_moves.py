"""Schedules block by block: what methods say of them, how reduction moves between blocks, and what that costs."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import effvit
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.draws import drawn
from effvit.measure.moves import balanced, improved
from effvit.measure.staircase import (
    FewTokens,
    predicted,
    shortened,
    staircase_of,
    staircase_of_macs,
    token_counts,
)
from effvit.measure.values import Staircase
from effvit.reducers import METHODS
from effvit.reducers.block_schedule import BlockSchedule

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "tome": [{"r": [3, 0, 2, 1]}, {"r": 2, "prop_attn": False}],
    "gtp": [{"num_prop": [2, 1], "reduce_at": [1, 3]}],
    "evit": [{"keep_rate": 0.6}, {"keep_rate": [0.7, 0.8], "reduce_at": [0, 2], "fuse_token": False}],
    "ats": [{"keep_rate": 0.5}],
    "hot": [{"keep_rate": 0.5, "reduce_at": [1, 2]}],
    "pitome": [{"keep_rate": 0.7}, {"keep_rate": [0.8, 0.5], "reduce_at": [0, 3], "protect_at": [0]}],
    "vid_tldr": [{"r": [3, 0, 2, 1]}],
    "dpcknn": [{"keep_rate": 0.5, "reduce_at": [1, 2], "k": 3}],
    "atc": [{"keep_rate": 0.6, "reduce_at": [1, 2], "linkage": "complete"}],
    "zero_tprune": [
        {"keep_rate": 0.8, "reduce_at": [0, 2], "r": [2, 1], "num_iters": 3},
        {"keep_rate": [0.8, 0.9], "reduce_at": [0, 2], "r": 1},
        {"keep_rate": [0.8, 1.0], "reduce_at": [0, 2], "r": 1},
    ],
}


@pytest.fixture(scope="module")
def dense() -> Any:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3).eval()


@pytest.mark.parametrize(("method", "settings"), [(m, s) for m, entries in SETTINGS.items() for s in entries])
def test_a_schedule_that_was_read_makes_the_same_model(dense: Any, method: str, settings: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    schedule = METHODS[method].block_schedule(settings, 4)
    same = effvit.sparsify(dense, method, **schedule.settings())
    expected = effvit.sparsify(dense, method, **settings)
    assert torch.equal(same(x), expected(x))
    assert same.token_counts() == expected.token_counts()
    assert token_counts(method, schedule.settings(), 4, (4, 4)) == expected.token_counts()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("evit", {"num_tokens": 5}),
        ("ats", {}),
        ("expedite", {"keep_rate": 0.5}),
        ("evit", {"keep_rate": 1.0}),
        ("vid_tldr", {"r": 0.2}),
        ("kmedoids", {}),
    ],
)
def test_settings_without_a_value_for_each_block_have_no_schedule(method: str, settings: dict[str, Any]) -> None:
    assert METHODS[method].block_schedule(settings, 4) is None


def test_settings_that_leave_nothing_or_are_refused_have_no_counts() -> None:
    assert token_counts("gtp", {"num_prop": [8, 8]}, 2, (4, 4)) is None
    assert token_counts("tome", {"r": -1}, 2, (4, 4)) is None


class TestSchedule:
    def test_rates_leave_out_blocks_that_take_nothing(self) -> None:
        schedule = BlockSchedule("keep_rate", (0, 30, 5), (0, 1, 2), {"k": 3}, is_rate=True, names_blocks=True)
        assert schedule.settings() == {"k": 3, "keep_rate": [0.7, 0.95], "reduce_at": [1, 2]}

    def test_a_block_takes_neither_less_than_nothing_nor_nearly_all(self) -> None:
        rates = BlockSchedule("keep_rate", (10, 90), (0, 1), {}, is_rate=True)
        assert rates.changed({0: -11}) is None
        assert rates.changed({1: 6}) is None
        assert rates.changed({0: -10, 1: 5}) == BlockSchedule("keep_rate", (0, 95), (0, 1), {}, is_rate=True)

    def test_a_stronger_schedule_has_its_total_and_its_proportions(self) -> None:
        schedule = BlockSchedule("r", (8, 0, 4), (0, 1, 2), {})
        assert schedule.scaled(1.25).taken == (10, 0, 5)
        assert sum(schedule.scaled(1.1).taken) == 13
        assert BlockSchedule("keep_rate", (90,), (0,), {}, is_rate=True).scaled(1.3).taken == (95,)


class TestMoves:
    START = BlockSchedule("r", (4, 4, 4, 4), (0, 1, 2, 3), {})

    @staticmethod
    def cost(schedule: BlockSchedule) -> float | None:
        """A token taken in an earlier block saves more."""
        saved = sum(taken * (4 - block) for block, taken in enumerate(schedule.taken))
        return 100.0 - saved if sum(schedule.taken) < 30 else None

    def test_all_reduction_ends_where_it_harms_least(self) -> None:
        """A token costs as much harm in every block but the second, so that is where all of it belongs."""

        def harm(schedule: BlockSchedule) -> float:
            return sum(taken * (1.0, 0.1, 1.0, 1.0)[block] for block, taken in enumerate(schedule.taken))

        found = improved(self.START, self.cost, harm, moves=300)
        assert found.taken[0] == found.taken[2] == found.taken[3] == 0
        assert self.cost(found) <= self.cost(self.START)

    def test_the_cost_of_the_start_is_never_exceeded(self) -> None:
        asked: list[float | None] = []

        def judge(schedule: BlockSchedule) -> float:
            asked.append(self.cost(schedule))
            return -float(len(asked))  # each is nearer than the last

        improved(self.START, self.cost, judge, moves=50)
        assert len(asked) == 51
        assert all(price <= 60 for price in asked if price is not None)

    def test_a_later_block_takes_more_for_what_an_earlier_one_leaves(self) -> None:
        moved = balanced(self.START, 0, 3, 2, self.cost, 60.0)
        assert moved is not None
        assert moved.taken == (2, 4, 4, 12)  # 2 tokens in block 0 save as much as 8 in block 3
        assert balanced(self.START, 3, 0, 4, self.cost, 60.0).taken == (5, 4, 4, 0)

    def test_nothing_moves_without_a_source_or_a_possible_target(self) -> None:
        flat = BlockSchedule("r", (0, 4), (0, 1), {})
        assert balanced(flat, 0, 1, 2, self.cost, 100.0) is None
        assert balanced(self.START, 0, 3, 4, self.cost, 40.0) is None

    def test_what_the_model_cannot_take_is_left(self) -> None:
        assert improved(self.START, self.cost, lambda s: 1.0 if s is self.START else None, moves=20) is self.START
        assert improved(self.START, lambda _: None, lambda _: 1.0, moves=20) is self.START


class TestDraws:
    START, cost = TestMoves.START, staticmethod(TestMoves.cost)

    def test_the_least_harmful_draw_is_kept_and_the_same_each_time(self) -> None:
        judged: dict[tuple[int, ...], float] = {}

        def harm(schedule: BlockSchedule) -> float:
            harms = zip(schedule.taken, (1.0, 0.1, 1.0, 1.0), strict=True)
            return judged.setdefault(schedule.taken, sum(taken * harm for taken, harm in harms))

        found = drawn(self.START, self.cost, harm, 100)
        assert len(judged) == 101
        assert found.taken == min(judged, key=judged.__getitem__)
        assert found.taken == (0, 14, 0, 0)  # 3 * 14 is the first to save the 40 of the start
        assert drawn(self.START, self.cost, harm, 100) == found

    def test_draws_are_different_and_no_stronger_than_the_cost_of_the_start_asks_for(self) -> None:
        judged: list[BlockSchedule] = []
        drawn(self.START, self.cost, lambda schedule: float(judged.append(schedule) or 0), 60)
        assert len({schedule.taken for schedule in judged}) == len(judged) == 61
        assert {sum(taken > 0 for taken in schedule.taken) for schedule in judged} == {1, 2, 3, 4}
        prices = [self.cost(schedule) for schedule in judged]
        assert max(prices) <= 60
        assert min(prices) > 60 - 4  # a unit saves 4 at most

    def test_what_costs_too_much_or_the_model_cannot_take_is_left(self) -> None:
        assert drawn(self.START, self.cost, lambda s: 1.0 if s is self.START else None, 20) is self.START
        assert drawn(self.START, lambda _: None, lambda _: 1.0, 20) is self.START
        assert drawn(self.START, lambda s: 1.0 if s is self.START else None, lambda _: 1.0, 20) is self.START

    def test_the_blocks_of_zero_tprune_are_drawn_too(self, dense: Any) -> None:
        settings = {"keep_rate": 0.8, "reduce_at": [0, 2], "r": 1}
        start = METHODS["zero_tprune"].block_schedule(settings, 4)
        blocks: set[tuple[int, ...]] = set()

        def cost(schedule: BlockSchedule) -> float | None:
            counts = token_counts("zero_tprune", schedule.settings(), 4, (4, 4))
            return None if counts is None else float(sum(counts))

        def judge(schedule: BlockSchedule) -> float:
            effvit.sparsify(dense, "zero_tprune", **schedule.settings())
            blocks.add(tuple(schedule.settings()["reduce_at"]))
            return 1.0

        drawn(start, cost, judge, 20)
        assert len(blocks) > 5


class TestStaircase:
    STEPS = Staircase((4, 8, 16), (1.0, 2.0, 10.0), 5.0)

    def test_a_block_costs_the_mean_of_what_enters_and_leaves(self) -> None:
        # entering 16, 8: 10 + 2; leaving 8, 6: 2 + 1.5
        assert predicted(self.STEPS, 16, [8, 6]) == pytest.approx(5 + (12 + 3.5) / 2)
        assert predicted(self.STEPS, 16, [16, 16]) == pytest.approx(25)

    def test_noise_does_not_make_more_tokens_cheaper(self) -> None:
        found = staircase_of({0: 1.0, 2: 3.0, 4: 2.5, 8: 5.0}, depth=2)
        assert found == Staircase((2, 4, 8), (1.0, 1.0, 2.0), 1.0)

    def test_multiply_adds_of_all_tokens_are_those_of_the_model(self, dense: Any) -> None:
        total = sum(closed_form_macs(dense, (3, 64, 64)).values())
        steps = staircase_of_macs(dense, total)
        assert predicted(steps, 16, [16] * 4) == pytest.approx(total)
        assert predicted(steps, 16, [8] * 4) < total

    def test_the_blocks_that_are_timed_are_the_dense_ones(self, dense: Any) -> None:
        models = shortened(dense)
        assert list(models) == [0, 2, 5, 8, 10, 13, 16]
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(models[16](x), dense(x))
        assert not torch.equal(models[8](x), dense(x))
        seen: list[int] = []
        for block in dense.blocks:
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        FewTokens(dense, 6, 3)(x)
        assert seen == [7] * 3
        assert shortened(torch.nn.Identity()) == {}
