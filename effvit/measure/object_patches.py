"""What a reduced model keeps of an object, block by block: whether it chooses the patches that matter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost
from effvit.measure.flops import eval_twin
from effvit.measure.values import ObjectPatches
from effvit.tokens import TokenMap

__all__ = ["ObjectShares", "mean_object_patches", "object_shares"]


class ObjectShares(NamedTuple):
    """Shares of an object's patches in each image, behind each block, in [0, 1].

    Attributes:
        tokens: (B, depth) float64, of those that are tokens of their own: some token sits on the patch. Where patches
            were merged that is one of a group, in Expedite the middle of each cell of clusters.
        represented: (B, depth) float64, of those that a token stands for, alone or with others it was merged with.
    """

    tokens: Tensor
    represented: Tensor


@torch.no_grad()
def object_shares(model: nn.Module, images: Tensor, coverage: Tensor) -> ObjectShares:
    """The shares of an object's patches that are tokens and that are represented, behind each block of a reduced ViT.

    A patch counts by how much of it the object covers: a share is the sum of ``coverage`` over the patches that are
    left, divided by that over all. Neither EViT's fused token, which sums up what was dropped without standing for any
    patch, nor the neighbours that GTP hands its dropped tokens to represent a patch.

    Args:
        model: A plain ViT reduced by ``effvit.sparsify``, by a method or a control; it is run in eval mode and left as
            it is.
        images: (B, channels, H, W) as the model takes them.
        coverage: (B, H*W patches) share of each patch that the object covers, or any other weight of at least 0,
            patches row by row.

    Raises:
        TypeError: Any other model. Tokens of SiT, STViT and LookupViT are mixtures that sit on no patch; windowed hosts
            restore their patches in every block.
        ValueError: Coverage of another shape, negative or not finite, or an image without an object.
    """
    if not isinstance(model, ReducedHost):
        raise TypeError(
            "patches of an object are followed in a plain ViT that effvit.sparsify has reduced, whose tokens sit on "
            f"patches; those of a {type(model).__name__} cannot be told, give effvit.sparsify(vit, method)"
        )
    trace = [features.tokens for features in eval_twin(model).trace_tokens(images)]
    weights = checked_weights(coverage, len(images), trace[0].num_patches).to(images.device)
    return ObjectShares(
        torch.stack([(weights * sits_on(tokens)).sum(1) for tokens in trace], dim=1),
        torch.stack([(weights * tokens.on_its_own()).sum(1) for tokens in trace], dim=1),
    )


def checked_weights(coverage: Tensor, number: int, patches: int) -> Tensor:
    """Coverage as float64 weights that sum to 1 in each image; errors as of ``object_shares``."""
    if tuple(coverage.shape) != (number, patches):
        raise ValueError(
            f"coverage must be ({number}, {patches}), a number for each patch of each image, got "
            f"{tuple(coverage.shape)}"
        )
    weights = coverage.double()
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("coverage must be finite and at least 0; give the share of each patch that the object covers")
    sums = weights.sum(1, keepdim=True)
    if not sums.all():
        empty = int((sums == 0).nonzero()[0, 0])
        raise ValueError(f"every image must show an object, but image {empty} has coverage 0 everywhere; leave it out")
    return weights / sums


def sits_on(tokens: TokenMap) -> Tensor:
    """(B, H*W) True for a patch that a token sits on which stands for it: the token is its anchor's, and not fused."""
    living = torch.ones_like(tokens.anchor) if tokens.valid is None else tokens.valid.long()
    if tokens.fused is not None:
        living = living * ~tokens.fused
    # Added, not written: a slot of padding may name the same patch as a token.
    return torch.zeros_like(tokens.source).scatter_add(1, tokens.anchor, living) > 0


def mean_object_patches(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> ObjectPatches:
    """Means of ``object_shares`` over the images of all batches (images, coverage), each image counting once.

    Raises:
        TypeError, ValueError: As ``object_shares``, or no images.
    """
    shares = [object_shares(model, images, coverage) for images, coverage in batches]
    if not shares:
        raise ValueError("there are no images to follow an object in; give at least one batch")
    tokens, represented = (torch.cat(values).cpu() for values in zip(*shares, strict=True))
    return ObjectPatches(tokens.mean(0).tolist(), represented.mean(0).tolist(), len(tokens))
