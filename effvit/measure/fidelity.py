"""How close a reduced model's outputs are to the dense model's, and to the labels of images that have them."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from effvit.measure.flops import eval_twin
from effvit.measure.values import Classified, Fidelity

__all__ = ["Outputs", "classified", "compare_outputs", "fidelity", "outputs"]

Outputs = tuple[Tensor, Tensor]  # scores (B, classes) and features in front of the classifier (B, C)


class Classifier(Protocol):
    """What is asked of timm's classifiers."""

    def forward_features(self, x: Tensor, /) -> Tensor:
        """What comes before the head."""
        ...

    def forward_head(self, x: Tensor, /, pre_logits: bool = False) -> Tensor:
        """Scores of what ``forward_features`` returned, or with ``pre_logits`` the features they are made of."""
        ...


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, batch_size: int = 32) -> Outputs:
    """Scores (B, classes) and features in front of the classifier (B, C), float32.

    Args:
        model: A classifier with timm's ``forward_features`` and ``forward_head``.
        images: (B, channels, H, W), in the dtype of the model.
        batch_size: Images at a time.

    Raises:
        TypeError: A model without these methods, or without a classifier.
    """
    if not hasattr(model, "forward_head"):
        raise TypeError(f"{type(model).__name__} has no forward_features and forward_head, whose outputs are compared")
    num_classes: int = getattr(model, "num_classes", 0)
    if num_classes < 1:
        raise TypeError(f"{type(model).__name__} has no classifier (num_classes=0), whose outputs are compared")
    twin = cast(Classifier, eval_twin(model))
    scores: list[Tensor] = []
    features: list[Tensor] = []
    for chunk in images.split(batch_size):
        y = twin.forward_features(chunk)
        scores.append(twin.forward_head(y))
        features.append(twin.forward_head(y, pre_logits=True))
    return torch.cat(scores).float(), torch.cat(features).float()


def compare_outputs(dense: Outputs, own: Outputs) -> Fidelity:
    """The distances of one model's ``outputs`` from the dense model's, on the same images."""
    (dense_scores, dense_features), (scores, features) = dense, own
    expected = functional.log_softmax(dense_scores, dim=-1)
    divergence = functional.kl_div(
        functional.log_softmax(scores, dim=-1), expected, reduction="batchmean", log_target=True
    )
    cosine = functional.cosine_similarity(dense_features, features, dim=-1)
    return Fidelity(
        divergence=max(0.0, float(divergence)),
        feature_distance=max(0.0, float(1 - cosine.mean())),
        agreement=float((scores.argmax(-1) == dense_scores.argmax(-1)).float().mean()),
        images=len(scores),
    )


def classified(own: Outputs, labels: Tensor) -> Classified:
    """Loss and top-1 of one model's ``outputs``, labels (B,) int64 the numbers of its classes.

    Raises:
        ValueError: Scores that are not finite, of which there is no loss.
    """
    scores = own[0]
    if not scores.isfinite().all():
        raise ValueError("scores must be finite to have a loss, but hold NaN or infinity; check the weights")
    loss = functional.cross_entropy(scores, labels)
    right = (scores.argmax(-1) == labels).double().mean()
    return Classified(loss=float(loss), top1=100 * float(right), images=len(labels))


def fidelity(dense: nn.Module, model: nn.Module, images: Tensor) -> Fidelity:
    """Distances of a model from the dense one on images (B, channels, H, W); see ``outputs`` and ``Fidelity``."""
    return compare_outputs(outputs(dense, images), outputs(model, images))
