"""What a model that learns to drop patches gives to its losses (DynamicViT, 2106.02034, section 3.3)."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from effvit.hosts.host import ReducedHost, as_host
from effvit.hosts.towers import ReducedTower
from effvit.reducers.dynamicvit import DynamicViT

__all__ = ["DenseOutput", "PrunedOutput", "check_learns_to_prune", "dense_output", "pruned_output"]


class PrunedOutput(NamedTuple):
    """What a model makes of images while it learns which patches to drop.

    Attributes:
        logits: (B, classes).
        tokens: (B, N, C) normalised patch tokens, dropped ones included.
        decisions: (B, N) of each pruning block: 1 for a patch that is left, 0 for one that was dropped there or before.
        rates: Share of all patches that each of these blocks is to leave: no more than the one before.
    """

    logits: Tensor
    tokens: Tensor
    decisions: tuple[Tensor, ...]
    rates: tuple[float, ...]


class DenseOutput(NamedTuple):
    """What its dense teacher makes of them.

    Attributes:
        logits: (B, classes).
        tokens: (B, N, C) normalised patch tokens.
    """

    logits: Tensor
    tokens: Tensor


def check_learns_to_prune(model: nn.Module) -> list[DynamicViT]:
    """The reducers of a model that learns to drop patches, in order.

    Raises:
        TypeError: No plain host; the towers of vision-language models, whose heads read full grids.
        ValueError: Another method, or settings under which nothing is dropped.
    """
    if not isinstance(model, ReducedHost) or isinstance(model, ReducedTower):
        raise TypeError(
            f"expected a plain ViT with a head on its tokens, reduced by dynamicvit, got {type(model).__name__}; make "
            "one by effvit.sparsify(model, 'dynamicvit') or a name dynamicvit_* of timm.create_model"
        )
    reducers = [reducer for reducer in model.reducers.values() if isinstance(reducer, DynamicViT)]
    if not reducers:
        raise ValueError(
            f"{model.method} with these settings learns no decisions to drop patches; give method 'dynamicvit' and a "
            "keep_rate below 1"
        )
    return reducers


def pruned_output(model: ReducedHost, images: Tensor) -> PrunedOutput:
    """Scores, tokens and decisions of images (B, 3, H, W), in one forward pass of a model in training mode.

    Raises:
        TypeError: As ``check_learns_to_prune``.
        ValueError: As ``check_learns_to_prune``; a model in eval mode.
    """
    reducers = check_learns_to_prune(model)
    if not all(reducer.training for reducer in reducers):
        raise ValueError("dynamicvit takes decisions that have a gradient in training mode alone; call train() first")
    x, tokens = model.forward_tokens(images)
    assert isinstance(tokens.carry, tuple)
    rates = tuple(accumulate((reducer.rate for reducer in reducers), min))
    return PrunedOutput(model.token_scores(x, tokens), tokens.split(x)[1], tokens.carry, rates)


def dense_output(model: nn.Module, images: Tensor) -> DenseOutput:
    """Scores and patch tokens of a dense teacher, a plain ViT of timm, for images (B, 3, H, W)."""
    host = as_host(model)
    x, tokens = host.forward_tokens(images)
    return DenseOutput(host.token_scores(x, tokens), tokens.split(x)[1])
