"""Ladders of settings: what `effvit tune` tries of each method, from weak to strong, and how it is climbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from effvit.hosts.host import HOST_CLASSES
from effvit.measure.ideal import plain_parts
from effvit.measure.variants import check_dense, reduce_by
from effvit.protocols import Settings
from effvit.reducers import METHODS

__all__ = ["Family", "Place", "can_take", "families", "tuned_methods", "usable_part", "weakest"]


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
    """Ladders of settings of the methods for a plain ViT; settings the model cannot take are left out.

    Raises:
        TypeError: A model that is no plain ViT.
        ValueError: A model that is reduced already, a method that is not tuned, or none that the model can take.
    """
    known = tuned_methods()
    methods = known if methods is None else list(dict.fromkeys(methods))
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not tuned; tuned are {', '.join(known)}")
    check_dense(dense)
    of_one_grid = hasattr(dense, "blocks") and not hasattr(dense, "stage_ends")  # timm's Hieras have blocks of stages
    if not of_one_grid and type(dense) not in HOST_CLASSES:
        raise TypeError(f"tuned are plain ViTs, whose blocks follow each other in 'blocks', not {type(dense).__name__}")
    host = plain_parts(dense)
    depth, patches = len(host.blocks), host.patch_embed.num_patches
    found = []
    for method in methods:
        for ladder in METHODS[method].ladders(depth, patches):
            usable = usable_part(dense, method, ladder)
            if usable:
                found.append(Family(method, tuple(usable)))
    if not found:
        raise ValueError(f"{type(dense).__name__} can take none of {', '.join(methods)}")
    return found


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
