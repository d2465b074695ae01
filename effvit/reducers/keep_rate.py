"""What methods share that have the setting ``keep_rate``, and those of them that keep so many tokens block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from effvit.protocols import Settings
from effvit.reducers.base import FEW_PATCHES, Reducer
from effvit.reducers.block_schedule import BlockSchedule, rates_by_block
from effvit.reducers.cost import BlockSizes
from effvit.schedule import check_blocks, check_count, check_fraction, keep_rate_ladder, per_block, spread_blocks

__all__ = ["HasKeepRate", "ImageShare", "KeepRate", "Rated", "kept_in_blocks"]


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


class ImageShare(Rated):
    """One block's share of a method that keeps int(N r^(j+1)) of the N patches of the image in its j-th block, from 0.

    Those are the counts of DynamicViT (2106.02034) and of TokenReduction (2308.04657) at their blocks 3, 6 and 9 of 12.

    Args:
        keep_rate: Fraction of the patches of the earlier blocks that stays.
        num_tokens: Number of tokens to keep in place of a rate.
        block: Number of the block it sits in.
        earlier: The reducers of the blocks before, on whose rates the number of patches depends.
    """

    def __init__(self, keep_rate: float, num_tokens: int | None, block: int, earlier: tuple[ImageShare, ...]) -> None:
        super().__init__()
        self.keep_rate = self.base_keep_rate = keep_rate
        self.num_tokens = num_tokens
        self.block = block
        self.earlier = earlier

    @classmethod
    def in_blocks(
        cls,
        depth: int,
        keep_rate: float | Sequence[float],
        reduce_at: Sequence[int] | None,
        num_tokens: int | Sequence[int] | None,
        *options: Any,
    ) -> dict[int, Reducer]:
        """{block: reducer} of the settings that all such methods share, and of what else a reducer takes.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction r of the patches that stays in each reducing block, in (0, 1]: the first keeps int(N r)
                of the N patches of the image, the next int(N r^2); one value, or one for each block.
            reduce_at: 0-based blocks that reduce; None means (3, 6, 9) of 12, in proportion for another depth.
            num_tokens: Absolute numbers in place of a rate; one value, or one for each block.
            options: Arguments of the class behind ``earlier``.
        """
        blocks = check_blocks("reduce_at", spread_blocks((3, 6, 9), depth) if reduce_at is None else reduce_at, depth)
        plan: dict[int, ImageShare] = {}
        for block, (rate, number) in kept_in_blocks(blocks, keep_rate, num_tokens).items():
            plan[block] = cls(rate, number, block, tuple(plan.values()), *options)
        return dict(plan)

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.6, "reduce_at": (1, 2)}

    @property
    def reduce_at(self) -> list[int]:
        """The reducing blocks up to this one, which the number of patches depends on.

        ``model.settings`` compares it, so that it tells of an earlier reducer that was taken out by hand.
        """
        chain = (*self.earlier, self)
        return [reducer.block for reducer in chain if reducer.keep_rate < 1 or reducer.num_tokens is not None]

    @property
    def share(self) -> float:
        """Fraction of the patches of the image that stays by the rates: r^(j+1) where they are equal."""
        rates = [reducer.keep_rate for reducer in (*self.earlier, self)]
        return math.prod([rate ** rates.count(rate) for rate in dict.fromkeys(rates)])

    def count(self, num_tokens: int, num_patches: int) -> int:
        if self.num_tokens is not None:
            return min(self.num_tokens, num_tokens)
        kept = math.floor(num_patches * self.share)  # torch.export would fix the number that int gives
        return min(max(1, kept) if self.any_size else kept, num_tokens)

    def num_left(self, at: BlockSizes) -> int:
        """Patch tokens that stay by the closed form, in the words of the paper."""
        patches = at.grid[0] * at.grid[1]
        kept = max(int(patches * self.share), int(self.any_size)) if self.num_tokens is None else self.num_tokens
        return min(kept, at.tokens)
