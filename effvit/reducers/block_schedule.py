"""How much a method takes in each block, in whole units that can be moved from one block to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from effvit.protocols import Settings

if TYPE_CHECKING:
    from effvit.reducers.base import Reducer

__all__ = ["MOST_PERCENT", "BlockSchedule", "rates_by_block", "tokens_by_block"]

MOST_PERCENT = 95  # of the tokens that enter a block: what is left of 196 in three such blocks is one token


@dataclass(frozen=True)
class BlockSchedule:
    """A setting with a value for each block, as ``effvit.measure.tune`` changes it.

    Attributes:
        setting: Its name, such as "r" or "keep_rate".
        taken: What each of ``blocks`` takes: tokens, or, of a rate, percent of the tokens that enter the block.
        blocks: Numbers of the blocks.
        others: The method's further settings.
        is_rate: The setting is the fraction that stays, not a number of tokens that go.
        names_blocks: "reduce_at" says which blocks the values are for, so that those that take nothing are left out.
    """

    setting: str
    taken: tuple[int, ...]
    blocks: tuple[int, ...]
    others: Settings
    is_rate: bool = False
    names_blocks: bool = False

    def settings(self) -> Settings:
        """The method's settings."""
        pairs = [(b, taken) for b, taken in zip(self.blocks, self.taken, strict=True) if taken or not self.names_blocks]
        values = [round(1 - taken / 100, 2) if self.is_rate else taken for _, taken in pairs]
        named: Settings = {"reduce_at": [block for block, _ in pairs]} if self.names_blocks else {}
        return {**self.others, self.setting: values, **named}

    def changed(self, amounts: dict[int, int]) -> BlockSchedule | None:
        """The schedule with {place among ``blocks``: units more}; None where a block would take less than nothing."""
        taken = [value + amounts.get(place, 0) for place, value in enumerate(self.taken)]
        if min(taken) < 0 or (self.is_rate and max(taken) > MOST_PERCENT):
            return None
        return replace(self, taken=tuple(taken))

    def scaled(self, factor: float) -> BlockSchedule:
        """The schedule that takes so many times as much in all, in the same proportions."""
        sums = [round(factor * total) for total in accumulate(self.taken)]
        taken = [after - before for before, after in zip([0, *sums], sums, strict=False)]
        return replace(self, taken=tuple(min(value, MOST_PERCENT) if self.is_rate else value for value in taken))


def tokens_by_block(method: type[Reducer], setting: str, settings: Settings, depth: int) -> BlockSchedule:
    """The schedule of a method whose setting is a number of tokens for each block of the host."""
    plan = method.plan(depth, **settings)
    taken: Sequence[int] = [getattr(plan[block], setting) if block in plan else 0 for block in range(depth)]
    return BlockSchedule(setting, tuple(taken), tuple(range(depth)), without(settings, setting, "reduce_at"))


def rates_by_block(method: type[Reducer], settings: Settings, depth: int, anywhere: bool) -> BlockSchedule | None:
    """The schedule of a method whose "keep_rate" is a fraction for each block; None for absolute numbers in its place.

    Args:
        method: The method.
        settings: Its settings.
        depth: Blocks of the host.
        anywhere: Any block may reduce; False leaves it to those that do by these settings.
    """
    if settings.get("num_tokens") is not None:
        return None
    plan, setting = method.plan(depth, **settings), "keep_rate"
    blocks = range(depth) if anywhere else sorted(plan)
    rates: Sequence[float | None] = [getattr(plan[block], setting) if block in plan else 1.0 for block in blocks]
    taken = [round(100 * (1 - rate)) for rate in rates if rate is not None]
    if len(taken) < len(blocks) or not sum(taken) > 0:
        return None
    named = ("reduce_at",) if anywhere else ()
    others = without(settings, setting, *named)
    return BlockSchedule(setting, tuple(taken), tuple(blocks), others, is_rate=True, names_blocks=anywhere)


def without(settings: Settings, *names: str) -> Settings:
    """The settings but those of these names."""
    return {name: value for name, value in settings.items() if name not in names}
