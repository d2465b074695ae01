"""Classifiers of mmpretrain that learn from themselves with fewer tokens leaving, as MCTF does (arXiv 2403.10030).

Registered after ``custom_imports = dict(imports=["effvit.dense.consistency_classifier"])``. Needs the ``mm`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from effvit.dense.classifiers import EffViTClassifier
from effvit.hosts.reduction_consistency import LighterTeacher, class_probability, consistency
from effvit.schedule import check_fraction, check_number

__all__ = ["ConsistencyClassifier"]


@MODELS.register_module()
class ConsistencyClassifier(EffViTClassifier):
    """A reduced ViT and, as its teacher, itself with a smaller r (MCTF, 2403.10030; the README@2004da0 for defaults).

    Losses are ``EffViTClassifier``'s "task_loss", "teacher_loss", the config's loss of the teacher's scores, which
    trains the same weights, and "consistency_loss", the squared difference of what both heads read, for images that the
    student is confident of. Each batch runs twice.

    Args:
        model_name: As for ``EffViTClassifier``; the model, or ``sparsify``, has a method with a setting ``r``.
        teacher_limit: The r of the teacher is drawn below it for every batch, see ``LighterTeacher``; the authors have
            half of the student's.
        teacher_weight: Weight of the teacher's loss.
        consistency_weight: Weight of the consistency.
        confidence: Probability of its classes above which an image counts for the consistency, in (0, 1].
        kwargs: Those of ``EffViTClassifier``.

    Raises:
        ValueError: As ``EffViTClassifier``; a method without ``r``, weights, limit or confidence out of range.
        TypeError: A model that is not reduced.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool | str = False,
        *,
        teacher_limit: float = 8,
        teacher_weight: float = 1.0,
        consistency_weight: float = 3.0,
        confidence: float = 0.4,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, pretrained, **kwargs)
        self.lighter = LighterTeacher(self.model, teacher_limit)
        self.teacher_weight = check_number("teacher_weight", teacher_weight)
        self.consistency_weight = check_number("consistency_weight", consistency_weight)
        if min(self.teacher_weight, self.consistency_weight) < 0:
            raise ValueError(
                f"teacher_weight and consistency_weight must be at least 0, got {teacher_weight} and "
                f"{consistency_weight}"
            )
        self.confidence = check_fraction("confidence", confidence)

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Scalars of images (B, C, H, W): "task_loss", "teacher_loss" and "consistency_loss"; mmengine adds them up."""
        (scores, student), (seen, teacher) = (_scored(model, inputs) for model in (self.model, self.lighter.draw()))
        losses = self.losses_of(scores, inputs, data_samples, **kwargs)
        losses["teacher_loss"] = self.teacher_weight * self._task_loss((seen,), data_samples, **kwargs)
        with torch.no_grad():
            probability = class_probability(scores, classes_of(data_samples, scores))
        own = consistency(student, teacher, probability, self.confidence)
        return losses | {"consistency_loss": self.consistency_weight * own}


def _scored(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, classes) of images (B, C, H, W), and the features (B, C) that the head reads."""
    features = model.forward_features(images)
    return model.forward_head(features), model.forward_head(features, pre_logits=True)


def classes_of(data_samples: Sequence[Any], scores: Tensor) -> Tensor:
    """(B, classes) nonzero for the classes of each image, of which mixed images have several."""
    if "gt_score" in data_samples[0]:
        return torch.stack([sample.gt_score for sample in data_samples]).to(scores.device)
    labels = torch.cat([sample.gt_label for sample in data_samples]).to(scores.device)
    return F.one_hot(labels, scores.shape[1])
