"""A Monte-Carlo search over schedules: what each block takes is drawn at random, and the least harmful draw is kept."""

from __future__ import annotations

import random
from dataclasses import replace

from effvit.measure.moves import SEED, Cost, fewest_units
from effvit.reducers.block_schedule import BlockSchedule

__all__ = ["drawn"]

FINENESS = 1000  # units that the shares of the blocks are rounded to
LARGEST_TOTAL = 8  # times what the first schedule takes, at most: few tokens are left to a late block
ATTEMPTS = 10  # draws for each schedule that is to be judged; the others repeat one or cannot be strong enough


def drawn(start: BlockSchedule, cost: Cost, judge: Cost, draws: int) -> BlockSchedule:
    """The schedule with the least divergence among ``start`` and schedules drawn at random that cost no more.

    Zero-TPrune (2305.17328) finds where and how much to prune by a Monte-Carlo search within a budget of FLOPs; what it
    draws from is not published. Here (seeded) the number of blocks that reduce is uniform, then the blocks, then their
    shares, by a flat Dirichlet distribution; in all they take the fewest units that cost no more than ``start``.

    Args:
        start: Schedule to begin with; its cost is not exceeded.
        cost: What a schedule costs.
        judge: Divergence of a schedule; None for one that the model cannot take.
        draws: Schedules to judge, at most.
    """
    limit, least = cost(start), judge(start)
    if limit is None or least is None:
        return start
    best, rng, seen = start, random.Random(SEED), {start.taken}
    for _ in range(ATTEMPTS * draws):
        if len(seen) > draws:
            break
        schedule = weakest(draw_shares(rng, start), LARGEST_TOTAL * sum(start.taken), cost, limit)
        if schedule is None or schedule.taken in seen:
            continue
        seen.add(schedule.taken)
        divergence = judge(schedule)
        if divergence is not None and divergence < least:
            best, least = schedule, divergence
    return best


def weakest(shares: BlockSchedule, most: int, cost: Cost, limit: float) -> BlockSchedule | None:
    """The schedule of these shares that takes the fewest units, ``most`` at most, and costs no more than the limit."""
    return fewest_units(most, lambda units: shares.scaled(units / FINENESS), cost, limit)


def draw_shares(rng: random.Random, like: BlockSchedule) -> BlockSchedule:
    """A schedule of FINENESS units in all, in blocks and shares drawn at random."""
    places = rng.sample(range(len(like.blocks)), rng.randint(1, len(like.blocks)))
    shares = {place: rng.expovariate(1) for place in places}
    total = sum(shares.values())
    taken = [round(FINENESS * shares.get(place, 0) / total) for place in range(len(like.blocks))]
    return replace(like, taken=tuple(taken))
