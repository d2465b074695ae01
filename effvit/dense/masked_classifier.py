"""Classifiers of mmpretrain that see in training what their averaged teacher attends to (A-CLIP, 2212.08653).

Registered after ``custom_imports = dict(imports=["effvit.dense.masked_classifier"])``. Needs the ``mm`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from effvit.block import copy_shared
from effvit.dense.classifiers import EffViTClassifier
from effvit.hosts.attentive_mask import mask_attentively, tower_scores
from effvit.hosts.host import ReducedHost
from effvit.schedule import check_fraction

__all__ = ["MaskedClassifier"]


@MODELS.register_module()
class MaskedClassifier(EffViTClassifier):
    """A plain ViT that trains on the patches which an average of itself attends to; in evaluation it sees all.

    The teacher starts as a copy of the model at the first step and follows it before each further one, as officially
    (models.py@83d1f14); its parameters alone are averaged. No checkpoint holds it: a training that is resumed starts it
    anew.

    Args:
        model_name: As for ``EffViTClassifier``; the host needs a class token, and ``sparsify`` a method under which all
            tokens stay, such as ``dict(method="tome", r=0)``.
        ratio: See ``attended_patches``.
        block: Likewise.
        momentum: Share of the teacher that stays at each step; the official one rises from 0.996 to 1.
        kwargs: Those of ``EffViTClassifier``.

    Raises:
        ValueError: As ``EffViTClassifier`` and ``mask_attentively``; from ``loss``, as ``tower_scores``.
        TypeError: A model that is not reduced.
    """

    def __init__(
        self, model_name: str, *, ratio: float = 0.5, block: int = 2, momentum: float = 0.996, **kwargs: Any
    ) -> None:
        super().__init__(model_name, **kwargs)
        self.momentum = check_fraction("momentum", momentum)
        self.model = mask_attentively(self.model, ratio=ratio, block=block)
        self.averaged: list[ReducedHost] = []  # a list, since the teacher is no submodule

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Those of ``EffViTClassifier`` for images (B, C, H, W), on the patches that the teacher attends to."""
        scores = tower_scores(self.follow(), inputs)
        with self.model.token_drop.attending(scores):
            return super().loss(inputs, data_samples, **kwargs)

    @torch.no_grad()
    def follow(self) -> ReducedHost:
        """The teacher, one step nearer to the model."""
        if not self.averaged:
            self.averaged.append(copy_shared(self.model, share=False).eval().requires_grad_(False))
        else:
            for own, new in zip(self.averaged[0].parameters(), self.model.parameters(), strict=True):
                own.lerp_(new, 1 - self.momentum)
        return self.averaged[0]
