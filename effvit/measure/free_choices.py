"""What a setting found by a search is held against: token choices that nobody has to search for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn

from effvit.hosts.surface import Reduced
from effvit.measure.controls import control_of
from effvit.measure.ladders import can_take
from effvit.measure.variants import reduce_by
from effvit.protocols import Settings

__all__ = ["CONTROL", "SEEDS", "FreeModel", "default_models", "random_controls"]

CONTROL = "random"
SEEDS = (0, 1, 2)  # a single draw may be lucky


class FreeModel(NamedTuple):
    """A model that needs no search.

    Attributes:
        method: Its method.
        settings: What ``effvit.sparsify`` makes it with from the dense model.
        model: The model.
    """

    method: str
    settings: Settings
    model: nn.Module


def random_controls(choice: Reduced, images: Tensor, seeds: Sequence[int] = SEEDS) -> list[FreeModel]:
    """Models that drop patches at random to the token counts of the choice, one for each seed.

    Args:
        choice: A reduced model.
        images: (B, channels, H, W) to take the mean counts on where they depend on the image.
        seeds: Of the draws.

    Raises:
        TypeError, ValueError: As ``effvit.measure.controls.control_of``: some settings have no such control.
    """
    controls = (control_of(cast("nn.Module", choice), CONTROL, images=images, seed=seed) for seed in seeds)
    return [FreeModel(CONTROL, control.settings, control) for control in controls]


def default_models(dense: nn.Module, methods: Sequence[str]) -> list[FreeModel]:
    """The methods at their default settings; those whose defaults the model cannot take are left out."""
    return [
        FreeModel(method, {}, cast("nn.Module", reduce_by(dense, method, {})))
        for method in methods
        if can_take(dense, method, {})
    ]
