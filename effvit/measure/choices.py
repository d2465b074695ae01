"""What a choice of tokens gains over the controls beside it, read from an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from effvit.measure.controls import CONTROLS, SEED, control_name
from effvit.measure.values import Evaluated, Evaluation

__all__ = ["Choice", "choices_of"]


@dataclass(frozen=True)
class Choice:
    """A reduced model and the controls that were evaluated beside it.

    Attributes:
        model: The model.
        controls: Control -> its models, of "random" one for each seed; those that were not evaluated are missing.
    """

    model: Evaluated
    controls: Mapping[str, list[Evaluated]]

    def gain(self, control: str) -> float | None:
        """Top-1 less that of the control, the mean over seeds, in percent points; None if it was not evaluated."""
        beside = self.controls.get(control)
        if beside is None:
            return None
        return self.model.accuracy.value - sum(model.accuracy.value for model in beside) / len(beside)

    @property
    def gains(self) -> dict[str, float]:
        """Control -> gain over it, for those that were evaluated."""
        found = {control: self.gain(control) for control in self.controls}
        return {control: gain for control, gain in found.items() if gain is not None}


def choices_of(evaluation: Evaluation) -> list[Choice]:
    """The reduced models of an evaluation in their order, each with the controls named after it.

    Raises:
        ValueError: No reduced model has a control.
    """
    models = evaluation.models[1:]
    beside = {model.name: dict(controls_among(model.name, models)) for model in models}
    are_controls = {control.name for own in beside.values() for group in own.values() for control in group}
    if not are_controls:
        raise ValueError(
            "a choice of tokens is held against controls, but the evaluation has none; measure them with effvit "
            "evaluate --control random uniform resolution"
        )
    return [Choice(model, beside[model.name]) for model in models if model.name not in are_controls]


def controls_among(name: str, models: Sequence[Evaluated]) -> Iterator[tuple[str, list[Evaluated]]]:
    """(control, its models) for each control of the model of that name which there is among the models."""
    for control in CONTROLS:
        plain = control_name(name, control)
        found = [model for model in models if model.name == plain or model.name.startswith(plain + SEED)]
        if found:
            yield control, found
