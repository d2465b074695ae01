"""Ladders of settings: what `effvit tune` tries of each method, from weak to strong, and how it is climbed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, cast

from torch import nn

from effvit.hosts.host import HOST_CLASSES, WINDOW_CLASSES
from effvit.hosts.windows import ReducedWindows, window_methods
from effvit.measure.ideal import plain_parts
from effvit.measure.variants import check_dense, reduce_by
from effvit.protocols import Setting, Settings
from effvit.reducers import METHODS

__all__ = ["Family", "Place", "can_take", "families", "has_windows", "tuned_methods", "usable_part", "weakest"]


@dataclass(frozen=True)
class Family:
    """Settings of one method that differ in strength alone.

    Attributes:
        method: Name of the method.
        ladder: Settings from weak to strong.
    """

    method: str
    ladder: tuple[Settings, ...]


class Place(NamedTuple):
    """Where a setting stands: the number of the ladder, and that of its rung."""

    ladder: int
    rung: int


def tuned_methods() -> tuple[str, ...]:
    """Names of the methods that have ladders, those registered from outside among them."""
    return tuple(name for name, method in METHODS.items() if method.ladders(12, 196))


def families(dense: nn.Module, methods: Sequence[str] | None = None) -> list[Family]:
    """Ladders of settings of the methods for a host; settings the model cannot take are left out.

    Raises:
        TypeError: A model that is no plain ViT and no host with windows.
        ValueError: A model that is reduced already, a method that is not tuned, or none that the model can take.
    """
    known = tuned_methods()
    methods = known if methods is None else list(dict.fromkeys(methods))
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not tuned, since its `ladders` names no settings: it has to be calibrated or trained "
            f"first, or its class does not define them; tuned are {', '.join(known)}"
        )
    check_dense(dense)
    sizes = ladder_sizes(dense)
    found = []
    for method in methods:
        for ladder in METHODS[method].ladders(sizes.depth, sizes.patches):
            usable = usable_part(dense, method, passing_over(sizes.passed, ladder))
            if usable:
                found.append(Family(method, tuple(usable)))
    if not found:
        raise ValueError(f"{type(dense).__name__} can take none of {', '.join(methods)}")
    return found


class LadderSizes(NamedTuple):
    """What ladders of a host are made for.

    Attributes:
        depth: Blocks.
        patches: Patches that a plain ViT has.
        passed: Blocks in which no method acts.
    """

    depth: int
    patches: int
    passed: Sequence[int] = ()


def ladder_sizes(dense: nn.Module) -> LadderSizes:
    """Blocks and patches that ladders of a host are made for; errors as for ``families``.

    In a host with windows each block has all of their tokens again, and can go on with half: of all blocks together
    that is what a plain ViT of so many patches can take away.
    """
    if has_windows(dense):
        method = window_methods()[0]
        host = cast(ReducedWindows, reduce_by(dense, method, METHODS[method].off()))
        depth, area = len(host.all_blocks()), max(host.window_areas) or plain_parts(dense).patch_embed.num_patches
        return LadderSizes(depth, depth * area // 2, host.stage_starts)
    if not hasattr(dense, "blocks") and type(dense) not in HOST_CLASSES:
        raise TypeError(
            "tuned are plain ViTs, whose blocks follow each other in 'blocks', and hosts with windows, not "
            f"{type(dense).__name__}"
        )
    parts = plain_parts(dense)
    return LadderSizes(len(parts.blocks), parts.patch_embed.num_patches)


def passing_over(passed: Collection[int], ladder: Sequence[Settings]) -> list[Settings]:
    """The ladder with 0 for these blocks in lists of values for blocks, each rung once."""
    rungs = [{name: with_zeros(value, passed) for name, value in settings.items()} for settings in ladder]
    return [rung for rung, _ in groupby(rungs)]  # a token more in one of these blocks made no difference


def with_zeros(value: Setting, blocks: Collection[int]) -> Setting:
    """A list of values for blocks with 0 for these; any other value as it is."""
    if not isinstance(value, list):
        return value
    return [0 if block in blocks else number for block, number in enumerate(value)]


def has_windows(dense: nn.Module) -> bool:
    """Whether tokens come back in every window, so that no schedule says how many are left from block to block."""
    return type(dense) in WINDOW_CLASSES


def usable_part(dense: nn.Module, method: str, ladder: Sequence[Settings]) -> Sequence[Settings]:
    """The ladder from the first setting the model can take to the last before one that leaves no token."""
    start = next((rung for rung, settings in enumerate(ladder) if can_take(dense, method, settings)), len(ladder))
    ladder = ladder[start:]
    end = weakest(lambda rungs: {0: not can_take(dense, method, ladder[rungs[0]])}, [len(ladder)])[0]
    return ladder[:end]


def can_take(dense: nn.Module, method: str, settings: Settings) -> bool:
    """True if the model accepts these settings."""
    try:
        reduce_by(dense, method, settings)
    except (ValueError, TypeError):
        return False
    return True


def weakest(reaches: Callable[[dict[int, int]], Mapping[int, bool]], lengths: Sequence[int]) -> dict[int, int | None]:
    """For each ladder the first rung that reaches the aim, by bisection of all ladders side by side.

    Args:
        reaches: Ladder -> rung to try; returns for each whether that rung reaches it. Higher rungs reach more.
        lengths: Rungs of each ladder.

    Returns:
        Ladder -> rung, None where even the last does not reach it.
    """
    low, high = dict.fromkeys(range(len(lengths)), 0), dict(enumerate(lengths))
    while any(low[ladder] < high[ladder] for ladder in low):
        tried = {ladder: (low[ladder] + high[ladder]) // 2 for ladder in low if low[ladder] < high[ladder]}
        for ladder, reached in reaches(tried).items():
            if reached:
                high[ladder] = tried[ladder]
            else:
                low[ladder] = tried[ladder] + 1
    return {ladder: rung if rung < lengths[ladder] else None for ladder, rung in low.items()}
