"""Where and how much a method reduces: settings as users write them -> one value for each block.

All checks of schedules live here, so that every method reports a bad one in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from effvit.messages import counted
from effvit.protocols import Settings

__all__ = [
    "R_SCHEDULES",
    "block_number",
    "check_blocks",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_number",
    "check_r",
    "check_switch",
    "cosine_keep_rate",
    "dymu_r",
    "keep_rate_ladder",
    "per_block",
    "spread_blocks",
    "spread_evenly",
    "spread_ladder",
    "tome_r",
]

ValueT = TypeVar("ValueT")
R_SCHEDULES = ("constant", "linear", "reverse_linear")


def check_fraction(name: str, value: float) -> float:
    """``value`` if it is in (0, 1], else a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:  # NaN fails too
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return float(value)


def check_count(name: str, value: int, minimum: int = 0) -> int:
    """``value`` if it is a whole number of at least ``minimum``, else a TypeError or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise a ValueError unless the value is one of those known."""
    choices = tuple(known)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_switch(name: str, value: bool) -> bool:
    """``value`` if it is True or False, else a TypeError that names it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_number(name: str, value: float, rule: str = "finite") -> float:
    """``value`` if it is a finite number (and above 0 for the rule "positive"), else a ValueError that names it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (rule == "positive" and value <= 0):
        raise ValueError(f"{name} must be a {rule} number, got {value!r}")
    return float(value)


def check_r(r: float) -> float:
    """Tokens that leave a block, as a whole number, or the share of them below 1."""
    whole = isinstance(r, int) and not isinstance(r, bool) and r >= 0
    if not whole and not (isinstance(r, float) and 0 < r < 1):
        raise ValueError(f"r must be a whole number of tokens or a share of them in (0, 1), got {r!r}")
    return r


def check_blocks(name: str, blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """The 0-based block numbers as a tuple.

    Raises:
        TypeError: Not a sequence of whole numbers.
        ValueError: A block outside the model, or given twice, or out of order.
    """
    listed = isinstance(blocks, Sequence) and not isinstance(blocks, (str, bytes))
    if not listed or any(isinstance(b, bool) or not isinstance(b, int) for b in blocks):
        raise TypeError(f"{name} must be a sequence of 0-based block numbers, got {blocks!r}")
    for block in blocks:
        if not 0 <= block < depth:
            raise ValueError(f"{name} names block {block}, but the model has blocks 0 to {depth - 1}")
    repeated = sorted({b for b in blocks if list(blocks).count(b) > 1})
    if repeated:
        raise ValueError(f"{name} names block {repeated[0]} twice: {list(blocks)}")
    if list(blocks) != sorted(blocks):
        raise ValueError(f"{name} must be in ascending order, got {list(blocks)}")
    return tuple(blocks)


def block_number(block: int, depth: int) -> int:
    """The 0-based number of a block that may be counted from the last one, -1.

    Raises:
        TypeError: No whole number.
        ValueError: A block outside the model.
    """
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f"block must be a whole number, got {block!r}")
    if not -depth <= block < depth:
        raise ValueError(f"block must be in {-depth} to {depth - 1} for a model of {depth} blocks, got {block}")
    return block % depth


def spread_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks published for a 12-block model, moved in proportion to a model of ``depth`` blocks."""
    return tuple(dict.fromkeys(block * depth // 12 for block in blocks))


def per_block(name: str, value: ValueT | Sequence[ValueT], blocks: tuple[int, ...]) -> dict[int, ValueT]:
    """{block: value} from one value for all blocks or a sequence with one for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != len(blocks):
            raise ValueError(
                f"{name} has {counted(len(value), 'value')} for {counted(len(blocks), 'block')} {list(blocks)}; "
                "give one value for all, or one for each block"
            )
        return dict(zip(blocks, value, strict=True))
    return dict.fromkeys(blocks, value)  # type: ignore[arg-type]


LADDER_RATES = tuple(round(0.98 - 0.02 * step, 2) for step in range(40))


def keep_rate_ladder() -> list[Settings]:
    """The keep rates 0.98, 0.96 ... 0.2, as settings."""
    return [{"keep_rate": rate} for rate in LADDER_RATES]


def spread_evenly(total: int, blocks: int) -> list[int]:
    """``total`` whole tokens over the blocks, the larger shares first."""
    share, rest = divmod(total, blocks)
    return [share + 1] * rest + [share] * (blocks - rest)


def spread_ladder(depth: int, num_patches: int) -> list[list[int]]:
    """About 50 growing totals of tokens to take away of ``num_patches``, each spread over ``depth`` blocks."""
    totals = range(depth // 2, num_patches, max(1, num_patches // 50))
    return [spread_evenly(total, depth) for total in totals]


def tome_r(r: int | Sequence[int] | tuple[int, float], depth: int) -> list[int]:
    """Tokens to merge in each block (ToMe, 2210.09461, section 3 and tome/utils.py@af95e4b ``parse_r``).

    Args:
        r: An int for a constant schedule; a pair (r, inflection) with a float inflection in [-1, 1] for a linear
            one of about the same total, from 2r down to 0 at -1 and from 0 up to 2r at 1; a list of ints with
            one value a block, filled up with 0.
        depth: Number of blocks.

    Returns:
        ``depth`` ints. Values are truncated toward zero as in the official code, so the total of a linear
        schedule may lie a little below r * depth.
    """
    if isinstance(r, (list, tuple)) and len(r) == 2 and isinstance(r[1], float):
        mean, inflection = check_count("r", r[0]), r[1]
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r must be in [-1, 1], got {inflection}")
        first = int(mean * (1 - inflection))
        step = (2 * mean - 2 * first) / (depth - 1) if depth > 1 else 0.0
        return [int(first + step * i) for i in range(depth)]
    if isinstance(r, (list, tuple)):
        if len(r) > depth:
            raise ValueError(f"r has {len(r)} values, but the model has {depth} blocks")
        return [check_count("r", value) for value in r] + [0] * (depth - len(r))
    return [check_count("r", r)] * depth  # type: ignore[arg-type]


def dymu_r(r_total: int, depth: int, r_schedule: str = "constant") -> list[int]:
    """Tokens an average image loses in each block, in all ``r_total`` (DyMU, 2504.17040; tome.py@c57d75a).

    Args:
        r_total: Tokens to merge over all blocks.
        depth: Number of blocks.
        r_schedule: "constant": the same in every block, the first ones take the remainder; "linear": falling from
            2 * r_total // depth until the total is reached, then 0; "reverse_linear": the same from behind.

    Returns:
        ``depth`` ints with the sum ``r_total``. Where a falling line of whole numbers stays below the total (for
        few tokens, on which the official code does not end), the rest is spread as in "constant".
    """
    check_count("r_total", r_total)
    check_choice("r_schedule", r_schedule, R_SCHEDULES)
    values = [0] * depth
    if r_schedule != "constant":
        first = 2 * r_total // depth
        for i in range(depth):
            values[i] = min(int(first - i * (first / depth)), r_total - sum(values))
    share, extra = divmod(r_total - sum(values), depth)
    values = [value + share + (i < extra) for i, value in enumerate(values)]
    return values[::-1] if r_schedule == "reverse_linear" else values


def cosine_keep_rate(
    step: int, steps_per_epoch: int, keep_rate: float, start_epoch: int = 10, epochs: int = 100
) -> float:
    """Keep rate of a training step: 1 at first, then a half cosine down to ``keep_rate`` (EViT, 2202.07800).

    Follows helpers.py@5ca95a7 ``adjust_keep_rate``; the defaults are those of training from scratch. For fine
    tuning use ``epochs=0, start_epoch=0``, which gives ``keep_rate`` from the first step.

    Args:
        step: Training step, counted from 0 over the whole run.
        steps_per_epoch: Steps in an epoch.
        keep_rate: Rate to end at, in (0, 1].
        start_epoch: Epochs without reduction at first.
        epochs: Epochs the decrease takes.

    Returns:
        The rate to give to ``model.set_keep_rate``.
    """
    check_fraction("keep_rate", keep_rate)
    check_count("steps_per_epoch", steps_per_epoch, minimum=1)
    check_count("start_epoch", start_epoch)
    check_count("epochs", epochs)
    epoch = check_count("step", step) // steps_per_epoch
    if epoch < start_epoch:
        return 1.0
    if epoch >= start_epoch + epochs:
        return keep_rate
    progress = (step - steps_per_epoch * start_epoch) / (steps_per_epoch * epochs)
    return keep_rate + (1 - keep_rate) * (math.cos(math.pi * progress) + 1) * 0.5
