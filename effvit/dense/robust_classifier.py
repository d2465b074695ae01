"""Classifiers of mmpretrain trained for robust attention: token-aware pooling and attention diversification.

Registered after ``custom_imports = dict(imports=["effvit.dense.robust_classifier"])``. Needs the ``mm`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from effvit.dense.classifiers import EffViTClassifier
from effvit.hosts.attention_diversity import AttentionDiversity
from effvit.hosts.token_pooling import pool_tokens
from effvit.schedule import check_number

__all__ = ["RobustClassifier"]


@MODELS.register_module()
class RobustClassifier(EffViTClassifier):
    """A reduced or plain ViT with TAP in its blocks that learns with ADL (2303.11126; main.py@6e4dbff for defaults).

    The loss is that of ``EffViTClassifier`` and ``diversity_weight`` times the attention diversification loss.

    Args:
        model_name: As for ``EffViTClassifier``; a plain ViT is given with ``sparsify``, if only as
            ``dict(method="tome", r=0)``, which computes the same.
        num_scales: Scales of token-aware pooling, see ``pool_tokens``; 0 for none.
        pooled_blocks: 0-based blocks that pool; None: all. A pooled block needs all patches.
        diversity_weight: Weight of the loss; 0 for none.
        diversity_threshold: See ``attention_similarity``.
        kwargs: Those of ``EffViTClassifier``.

    Raises:
        ValueError: As ``EffViTClassifier``; ``pretrained`` beside pooling, whose weights no checkpoint has.
        TypeError: A model that is no plain ViT.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool | str = False,
        *,
        num_scales: int = 4,
        pooled_blocks: Sequence[int] | None = None,
        diversity_weight: float = 1.0,
        diversity_threshold: float = 2.0,
        **kwargs: Any,
    ) -> None:
        if pretrained and num_scales:
            raise ValueError(
                "token-aware pooling changes what every block gets, and its weights are in no checkpoint; train "
                "without pretrained, or with num_scales=0"
            )
        super().__init__(model_name, pretrained, **kwargs)
        self.diversity_weight = check_number("diversity_weight", diversity_weight)
        self.diversity_threshold = check_number("diversity_threshold", diversity_threshold, "positive")
        if self.diversity_weight:
            AttentionDiversity(self.model, diversity_threshold)  # refuses what it cannot read now, not in training
        if num_scales:
            self.model = pool_tokens(self.model, num_scales=num_scales, blocks=pooled_blocks)

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Those of ``EffViTClassifier`` for images (B, C, H, W), and "diversity_loss"; mmengine adds them up."""
        if not self.diversity_weight:
            return super().loss(inputs, data_samples, **kwargs)
        with AttentionDiversity(self.model, self.diversity_threshold) as diversity:
            losses = super().loss(inputs, data_samples, **kwargs)
            return losses | {"diversity_loss": self.diversity_weight * diversity.loss()}
