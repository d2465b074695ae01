"""Token reduction consistency: a model learns from itself with fewer tokens leaving (MCTF, arXiv 2403.10030, 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effvit.hosts.host import method_settings, sparsify
from effvit.hosts.surface import Reduced
from effvit.schedule import check_r

__all__ = ["LighterTeacher", "class_probability", "consistency"]


class LighterTeacher:
    """A reduced model itself, on the same parameters, with an r drawn anew whenever it is asked for.

    The teacher of MCTF's training: models/deit.py@2004da0 draws r below a limit for every batch, whole numbers of
    tokens or hundredths of them. It is no module, so optimizers and checkpoints see the parameters once.

    Args:
        model: Reduced by a method with a setting ``r``.
        limit: Above all r that are drawn, at least 1, or a share of the tokens in (0, 1).

    Raises:
        ValueError: A method without ``r``, a limit out of range.
        TypeError: A model that is not reduced.
    """

    def __init__(self, model: nn.Module, limit: float) -> None:
        if not isinstance(model, Reduced):
            raise TypeError(
                f"a lighter teacher is made of a model that effvit.sparsify gave, got {type(model).__name__}"
            )
        if "r" not in method_settings(model.method):
            raise ValueError(
                f"{model.method} has no r that could be lower in a teacher; take one that has it, as mctf and tome do"
            )
        self.limit = check_r(limit)
        if self.limit <= 0:
            raise ValueError(f"limit must be above 0, or the teacher reduces nothing ever, got {limit}")
        self.model = model
        self._made: dict[float, nn.Module] = {}

    def draw(self, generator: torch.Generator | None = None) -> nn.Module:
        """The model with one of the r below the limit, all as likely, in the model's mode."""
        parts = 1 if self.limit >= 1 else 100
        number = torch.randint(max(1, int(self.limit * parts)), (), generator=generator)
        return self.with_r(int(number) / parts)

    def with_r(self, r: float) -> nn.Module:
        """The model with this r."""
        if r not in self._made:
            settings: dict[str, Any] = {**self.model.settings, "r": int(r) if r >= 1 or r == 0 else r}
            self._made[r] = sparsify(self.model, self.model.method, recover=self.model.recover, **settings)
        return self._made[r].train(self.model.training)


def class_probability(scores: Tensor, present: Tensor) -> Tensor:
    """(B,) probability that scores give to the classes of each image, which may be mixed from two.

    Args:
        scores: (B, classes).
        present: (B, classes) nonzero for the classes in the image.
    """
    return (scores.softmax(-1) * (present > 0)).sum(-1)


def consistency(student: Tensor, teacher: Tensor, probability: Tensor, confidence: float = 0.4) -> Tensor:
    """Mean squared difference of features, of the images that the student is confident of (engine.py@2004da0).

    The teacher gets no gradient. Without such images it is 0.

    Args:
        student: (B, C) features that the head reads.
        teacher: (B, C) those of the teacher.
        probability: (B,) of ``class_probability`` for the student's scores.
        confidence: Probability above which an image counts.
    """
    counts = (probability > confidence).to(student.dtype)
    difference = (teacher.detach() - student).square().mean(dim=1)  # (B,)
    return (difference * counts).sum() / counts.sum().clamp(min=1)
