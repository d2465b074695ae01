"""A local search over schedules: reduction moves between blocks while the outputs come nearer to the dense ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import permutations

from effvit.reducers.block_schedule import BlockSchedule

__all__ = ["Cost", "balanced", "fewest_units", "improved"]

SEED = 0
LARGEST_STEPS = 4  # units that a block may take more for each that another takes less

Cost = Callable[[BlockSchedule], "float | None"]
"""What a schedule costs, predicted; None for one that is not possible."""


def improved(start: BlockSchedule, cost: Cost, judge: Cost, moves: int) -> BlockSchedule:
    """The schedule with the least divergence among those that moves between two blocks lead to at no higher cost.

    Moves are tried in random order (seeded), from large ones to single units. One that brings the outputs nearer is
    made at once and tried again.

    Args:
        start: Schedule to begin with; its cost is not exceeded.
        cost: What a schedule costs.
        judge: Divergence of a schedule; None for one that the model cannot take.
        moves: Schedules to judge, at most.
    """
    limit, least = cost(start), judge(start)
    if limit is None or least is None:
        return start
    best, rng, seen = start, random.Random(SEED), {start.taken}
    pairs = list(permutations(range(len(start.blocks)), 2))
    step = max(1, max(start.taken) // 2)
    while moves > 0:
        rng.shuffle(pairs)
        before = best
        share = moves if step == 1 else -(-moves // 2)
        for source, target in pairs:
            moved = balanced(best, source, target, step, cost, limit)
            while moved is not None and moved.taken not in seen and share > 0:
                seen.add(moved.taken)
                moves, share = moves - 1, share - 1
                divergence = judge(moved)
                if divergence is None or divergence >= least:
                    break
                best, least = moved, divergence
                moved = balanced(best, source, target, step, cost, limit)
        if step == 1 and best is before:
            break
        step = max(1, step // 2)
    return best


def balanced(
    schedule: BlockSchedule, source: int, target: int, step: int, cost: Cost, limit: float
) -> BlockSchedule | None:
    """The schedule whose block ``source`` takes ``step`` units less, and ``target`` the fewest more that cost no more.

    Returns:
        None where no number of units does, or the source takes none.
    """
    least = min(step, schedule.taken[source])
    if least == 0:
        return None
    return fewest_units(
        LARGEST_STEPS * least, lambda more: schedule.changed({source: -least, target: more}), cost, limit
    )


def fewest_units(
    most: int, schedule_of: Callable[[int], BlockSchedule | None], cost: Cost, limit: float
) -> BlockSchedule | None:
    """The schedule of the fewest units, from 0 to ``most``, that costs no more than the limit; None if none does.

    Args:
        most: Units at most.
        schedule_of: The schedule that takes so many; None, as a cost of None, where that is too much.
        cost: What a schedule costs, less for each further unit.
        limit: Cost not to exceed.
    """
    low, high, found = 0, most, None
    while low <= high:
        units = (low + high) // 2
        schedule = schedule_of(units)
        price = None if schedule is None else cost(schedule)
        if price is None:
            high = units - 1
        elif price <= limit:
            found, high = schedule, units - 1
        else:
            low = units + 1
    return found
