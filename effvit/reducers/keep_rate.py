"""What methods share that have the setting ``keep_rate``, and those of them that keep so many tokens block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from effvit.protocols import Settings
from effvit.reducers.base import FEW_PATCHES, Reducer
from effvit.reducers.block_schedule import BlockSchedule, rates_by_block
from effvit.schedule import check_count, check_fraction, keep_rate_ladder, per_block

__all__ = ["HasKeepRate", "KeepRate", "Rated", "kept_in_blocks"]


def kept_in_blocks(
    blocks: tuple[int, ...], keep_rate: float | Sequence[float], num_tokens: int | Sequence[int] | None
) -> dict[int, tuple[float, int | None]]:
    """{block: (rate, absolute number or None)} of the blocks that drop anything, checked.

    Args:
        blocks: The blocks the settings are for.
        keep_rate: Fraction of the patch tokens that stay, in (0, 1]; one value, or one for each block.
        num_tokens: Absolute numbers in place of a rate; one value, or one for each block.
    """
    rates = {b: check_fraction("keep_rate", r) for b, r in per_block("keep_rate", keep_rate, blocks).items()}
    numbers: dict[int, int | None] = dict.fromkeys(blocks)
    if num_tokens is not None:
        numbers |= {b: check_count("num_tokens", n, 1) for b, n in per_block("num_tokens", num_tokens, blocks).items()}
    return {b: (rates[b], numbers[b]) for b in blocks if rates[b] < 1 or numbers[b] is not None}


@runtime_checkable
class HasKeepRate(Protocol):
    """A reducer whose keep rate can change after the model was made.

    Attributes:
        keep_rate: The rate now, which ``set_keep_rate`` changes.
        base_keep_rate: The rate the model was made with.
    """

    keep_rate: float
    base_keep_rate: float


class Rated(Reducer):
    """One block's share of a method with the setting ``keep_rate``, of which 1 turns it off.

    Attributes:
        rate_of_few: The rate that ``effvit demo`` shows where the default, meant for 196 patches, takes too much.
        rate_of_many: The rate that it shows elsewhere, or None for the default.
    """

    rate_of_few = 0.8
    rate_of_many: float | None = None

    @classmethod
    def off(cls) -> Settings:
        return {"keep_rate": 1.0}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        rate = cls.rate_of_few if num_patches < FEW_PATCHES else cls.rate_of_many
        return [{} if rate is None else {"keep_rate": rate}]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [keep_rate_ladder()]

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        return rates_by_block(cls, settings, depth, anywhere=True)


class KeepRate(Rated):
    """One block's share of a method that keeps ceil(keep_rate * N) of N tokens, or ``num_tokens`` of them.

    Attributes:
        num_tokens: The absolute number in place of a rate, or None.
    """

    def __init__(self, keep_rate: float, num_tokens: int | None) -> None:
        super().__init__()
        self.keep_rate = self.base_keep_rate = keep_rate
        self.num_tokens = num_tokens

    def num_kept(self, num_tokens: int) -> int:
        """Tokens that stay of ``num_tokens``."""
        if self.num_tokens is not None:
            return min(self.num_tokens, num_tokens)
        return math.ceil(self.keep_rate * num_tokens)
