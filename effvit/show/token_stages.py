"""What becomes of each patch of an image, stage by stage: what pictures of tokens are drawn from."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from effvit.hosts.stages import ALONE, DROPPED, FUSED, MERGED, SOFT, Stage, map_stage
from effvit.measure.flops import eval_twin

__all__ = ["ALONE", "DROPPED", "FUSED", "MERGED", "SOFT", "Stage", "TracesStages", "map_stage", "trace_stages"]


@runtime_checkable
class TracesStages(Protocol):
    """A model that tells what becomes of the patches of an image."""

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """The stages of an image (1, 3, H, W), in the order of the blocks; the model is in eval mode."""


@torch.no_grad()
def trace_stages(model: nn.Module, x: Tensor) -> list[Stage]:
    """What each reducing block makes of the patches of an image.

    Args:
        model: A plain ViT made by ``effvit.sparsify``, a ``TokenSelector`` around a tower, an architecture with soft
            tokens (STViT, STViT-R, super-token ViT, LookupViT, SiT), or another with a method ``trace_stages``.
            It is run in eval mode and left as it is.
        x: The image as the model takes it (1, 3, H, W).

    Returns:
        The stages in the order of the blocks; none where no block reduces.

    Raises:
        TypeError: A model whose tokens cannot be traced.
        ValueError: An STViT-R whose key windows do not give every patch its shares.
    """
    if isinstance(model, TracesStages):
        like = next(model.parameters())
        return eval_twin(model).trace_stages(x.to(like.device, like.dtype))
    raise TypeError(
        "tokens can be traced in a plain ViT made by effvit.sparsify and in STViT, STViTSwin, SuperTokenViT, "
        f"LookupViT, SiT, got a {type(model).__name__}; reduce it by a method first"
    )
