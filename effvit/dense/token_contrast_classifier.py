"""Classifiers of mmpretrain whose patches are kept from becoming alike: token contrast (arXiv 2303.01267).

Registered after ``custom_imports = dict(imports=["effvit.dense.token_contrast_classifier"])``. Needs the ``mm`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from effvit.dense.classifiers import EffViTClassifier
from effvit.hosts.token_contrast import activation_labels, class_activations, patch_contrast
from effvit.schedule import check_count, check_number

__all__ = ["TokenContrastClassifier"]


@MODELS.register_module()
class TokenContrastClassifier(EffViTClassifier):
    """A ViT that learns with the patch token contrast of ToCo (2303.01267, section 3.3; defaults of its VOC script).

    An auxiliary classifier on the largest features over the patches of an earlier block, where they are less alike
    yet, tells which patches show the class; the patches of the last block are held to that. Losses are
    ``EffViTClassifier``'s "task_loss", "aux_loss" of the auxiliary classifier and "contrast_loss".

    Deviations from rulixiang/ToCo@6d47d97, which segments: one class an image under the config's loss, activations of
    the one image size, and neither the contrast of class tokens between crops nor a decoder.

    The auxiliary classifier lies in the model as ``aux_head``, also in checkpoints; ``tools/export_weights.py --without
    aux_head`` makes files of them that load into the model alone.

    Args:
        model_name: As for ``EffViTClassifier``, with a head that reads the class token.
        aux_block: 0-based block that the auxiliary classifier reads; None: the third from the end.
        aux_weight: Weight of its loss.
        contrast_weight: Weight of the contrast.
        low, high: Thresholds of ``activation_labels``.
        kwargs: Those of ``EffViTClassifier``.

    Raises:
        ValueError: As ``EffViTClassifier``; a head that pools patches, a block that is not there, thresholds, mixed
            images.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool | str = False,
        *,
        aux_block: int | None = None,
        aux_weight: float = 1.0,
        contrast_weight: float = 0.2,
        low: float = 0.25,
        high: float = 0.7,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, pretrained, **kwargs)
        if getattr(self.data_preprocessor, "batch_augments", None) is not None:
            raise ValueError("images that are mixed show several classes; token contrast takes no train_cfg.augments")
        if getattr(self.model, "global_pool", None) != "token":
            raise ValueError(
                f"token contrast is for heads that read the class token, but that of {model_name} does not; take a "
                "plain ViT with global_pool='token'"
            )
        last = len(self.model.blocks) - 1
        self.aux_block = check_count("aux_block", last - 2 if aux_block is None else aux_block)
        if self.aux_block >= last:
            raise ValueError(f"aux_block must be in front of the last block, {last}, got {self.aux_block}")
        self.aux_weight = check_number("aux_weight", aux_weight)
        self.contrast_weight = check_number("contrast_weight", contrast_weight)
        if min(self.aux_weight, self.contrast_weight) < 0:
            raise ValueError(
                f"aux_weight and contrast_weight must be at least 0, got {aux_weight} and {contrast_weight}"
            )
        self.thresholds = low, high
        activation_labels(torch.zeros(1, 1, 1), torch.zeros(1, 1), low, high)  # refuses them now, not in training
        self.model.aux_head = nn.Linear(self.model.embed_dim, self.model.num_classes, bias=False)

    def init_weights(self) -> None:
        """As ``EffViTClassifier``, whose weights know no auxiliary head."""
        head = self.model.aux_head
        del self.model.aux_head
        try:
            super().init_weights()
        finally:
            self.model.aux_head = head

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Scalars of images (B, C, H, W): "task_loss", "aux_loss" and "contrast_loss", with a teacher also its own."""
        taken = [self.aux_block, len(self.model.blocks) - 1]
        features, (early, last) = self.model.forward_intermediates(inputs, indices=taken, output_fmt="NLC")
        scores, aux = self.model.forward_head(features), self.model.aux_head
        losses = self.losses_of(scores, inputs, data_samples, **kwargs)
        losses["aux_loss"] = self.aux_weight * self._task_loss((aux(early.amax(1)),), data_samples, **kwargs)
        with torch.no_grad():
            labels = torch.cat([sample.gt_label for sample in data_samples]).to(inputs.device)  # type: ignore[attr-defined]
            present = F.one_hot(labels, self.model.num_classes)
            known = activation_labels(class_activations(early, aux.weight), present, *self.thresholds)
        contrast = patch_contrast(self.model.norm(last), known)
        return losses | {"contrast_loss": self.contrast_weight * contrast}
