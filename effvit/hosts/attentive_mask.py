"""Attentive masking: in training a tower sees only the patches that its averaged teacher attends to (2212.08653)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.block import copy_shared, set_child
from effvit.hosts.host import ReducedHost
from effvit.protocols import Size
from effvit.reducers.base import check_finite
from effvit.schedule import check_count, check_fraction
from effvit.tokens import flat_rows, take_rows

__all__ = ["AttentiveDrop", "attended_patches", "mask_attentively", "scores_in_view", "tower_scores"]

View = tuple[int, int, int, int]


def attended_patches(scores: Tensor, grid: Size, ratio: float = 0.5, block: int = 2) -> Tensor:
    """The patches of the blocks with the largest mean scores, (B, K) in image order.

    A-CLIP (2212.08653; ``get_att_mask`` of models.py@83d1f14): of the M blocks of an image
    ``int(M * ratio) + 1`` stay. Of equal scores the first stays, which the official sort leaves to chance.

    Args:
        scores: (B, H*W).
        grid: (H, W) patch grid, of which ``block`` divides both sides.
        ratio: Share of the blocks, in (0, 1].
        block: Side of a block, in patches.

    Raises:
        ValueError: A grid that blocks do not divide, scores of another grid, or NaN.
    """
    height, width = grid
    if scores.ndim != 2 or scores.shape[1] != height * width:
        raise ValueError(
            f"scores must be (B, {height * width}) for a {height} x {width} grid, got {tuple(scores.shape)}"
        )
    if height % check_count("block", block, 1) or width % block:
        raise ValueError(f"block must divide the {height} x {width} patch grid, got {block}; take 1 for single patches")
    check_finite(scores, "attentive mask: scores", None)
    rows, columns = height // block, width // block
    means = F.avg_pool2d(scores.unflatten(1, (1, *grid)), block).flatten(1)  # (B, rows * columns)
    kept = min(int(rows * columns * check_fraction("ratio", ratio)) + 1, rows * columns)
    top = means.sort(dim=1, descending=True, stable=True).indices[:, :kept].sort(dim=1).values
    corner = top // columns * block * width + top % columns * block  # (B, kept)
    inside = torch.arange(block, device=scores.device)
    inside = (inside.unsqueeze(1) * width + inside).flatten()  # (block^2,)
    return (corner.unsqueeze(2) + inside).flatten(1).sort(dim=1).values


def scores_in_view(scores: Tensor, grid: Size, seen: Sequence[View], view: Sequence[View]) -> Tensor:
    """Scores (B, H*W) of the patches of one crop, carried over to another; 0 outside of the first.

    ``get_mask`` of models.py@83d1f14: bilinear to the pixels of the first crop, cut out, bilinear to the grid again
    without antialiasing.

    Args:
        scores: (B, H*W) of the crops that the teacher saw.
        grid: (H, W) patch grid of both crops.
        seen: (top, left, height, width) of each image's crop that the teacher saw, in pixels of the image.
        view: Likewise of the crop that the student sees.

    Raises:
        ValueError: Other numbers of crops than of images, or crops without a pixel.
    """
    if not len(scores) == len(seen) == len(view):
        raise ValueError(
            f"got scores of {len(scores)} images, {len(seen)} crops seen and {len(view)} views; give one each"
        )
    found = []
    for score, (top, left, height, width), (own_top, own_left, own_height, own_width) in zip(
        scores, seen, view, strict=True
    ):
        if min(height, width, own_height, own_width) < 1:
            raise ValueError(f"crops must have pixels, got {height} x {width} and {own_height} x {own_width}")
        pixels = F.interpolate(score.view(1, 1, *grid), (height, width), mode="bilinear", align_corners=False)
        down, right = own_top - top, own_left - left
        common = pixels[..., max(down, 0) : max(down + own_height, 0), max(right, 0) : max(right + own_width, 0)]
        own = pixels.new_zeros(1, 1, own_height, own_width)
        if common.numel():
            own[..., max(-down, 0) :, max(-right, 0) :][..., : common.shape[2], : common.shape[3]] = common
        found.append(F.interpolate(own, grid, mode="bilinear", align_corners=False).flatten())
    return torch.stack(found)


@torch.no_grad()
def tower_scores(model: nn.Module, images: Tensor) -> Tensor:
    """(B, N) attention of the class token to each patch, the mean over all blocks and heads (2212.08653).

    One row of attention a block, beside the fused kernel. The teacher is an average of the student, by
    ``torch.optim.swa_utils.AveragedModel``; this reads what it attends to, without its masking.

    Args:
        model: A model of ``effvit.sparsify`` that keeps all its tokens, such as ``sparsify(vit, "tome", r=0)``.
        images: (B, channels, H, W).

    Raises:
        TypeError: Another model.
        ValueError: No class token, tokens that are reduced, or a model in training mode.
    """
    host = _host(model)
    if not host.num_class_tokens:
        raise ValueError("the scores are attention of a class token, of which this tower has none; give one with one")
    if host.training:
        raise ValueError("scores come from a teacher that sees every patch; call eval() on it")
    if host.variable_length or min(host.token_counts()) < host.patch_embed.num_patches:
        raise ValueError(
            f"scores need every patch in every block, but {host.method} reduces them; give a teacher that does not"
        )
    rows: list[Tensor] = []

    def take(attention: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        state = given[-1].value
        rows.append(state.class_rows()[:, :, 0, state.keys.num_prefix :].mean(1))

    hooks = [block.attn.register_forward_hook(take) for block in host.blocks]
    try:
        host(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(rows).mean(0)


class AttentiveDrop(nn.Module):
    """Patch dropout by given scores, in place of timm's by chance: in training only the attended patches stay.

    Positions are added before, as in the official tower, and tokens stay in image order. In eval mode all patches stay.

    Args:
        grid: (H, W) patch grid.
        num_prefix: Prefix tokens, which always stay.
        ratio: Share of the blocks of patches that stays, see ``attended_patches``.
        block: Side of a block, in patches.
        train_only: False: in eval mode too.
    """

    def __init__(
        self, grid: Size, num_prefix: int, ratio: float = 0.5, block: int = 2, train_only: bool = True
    ) -> None:
        super().__init__()
        attended_patches(torch.zeros(1, grid[0] * grid[1]), grid, ratio, block)  # settings that do not fit raise here
        self.grid, self.num_prefix, self.ratio, self.block = grid, num_prefix, ratio, block
        self.train_only = train_only
        self.given: list[Tensor] = []

    @contextmanager
    def attending(self, scores: Tensor) -> Iterator[None]:
        """Within it, masks are made of these scores (B, H*W), one row for each image."""
        self.given.append(scores)
        try:
            yield
        finally:
            self.given.pop()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, P + H*W, C) -> those that stay (B, P+K, C) and which (B, K); None for all.

        Raises:
            ValueError: No scores, or those of another batch.
        """
        if self.train_only and not self.training:
            return x, None
        if not self.given:
            raise ValueError(
                "attentive masking needs scores; run the model inside `with model.token_drop.attending(scores)`, with "
                "what tower_scores(teacher, images) gives"
            )
        if len(self.given[-1]) != len(x):
            raise ValueError(f"got scores of {len(self.given[-1])} images for a batch of {len(x)}; give a row for each")
        index = attended_patches(self.given[-1], self.grid, self.ratio, self.block)
        return take_rows(x, flat_rows(index, x.shape[1], self.num_prefix)), index


def mask_attentively(
    model: nn.Module, *, ratio: float = 0.5, block: int = 2, train_only: bool = True, share: bool = True
) -> ReducedHost:
    """A plain ViT that sees in training only the patches that given scores attend to (A-CLIP, 2212.08653).

    Its ``token_drop`` is an ``AttentiveDrop``, which takes the place of timm's patch dropout and goes with any method.

    Args:
        model: A model of ``effvit.sparsify``; a plain one by ``sparsify(vit, "tome", r=0)``. Left as it is.
        ratio: See ``attended_patches``.
        block: Likewise.
        train_only: False: mask in eval mode too.
        share: Whether the new model has the parameters of the old one, or copies.

    Raises:
        TypeError: Another model.
        ValueError: A ratio out of range, or blocks that do not divide the patch grid.
    """
    masked = copy_shared(_host(model), share)
    drop = AttentiveDrop(masked.patch_embed.grid_size, masked.num_prefix_tokens, ratio, block, train_only)
    set_child(masked, "token_drop", drop.train(masked.training))
    return masked


def _host(model: nn.Module) -> ReducedHost:
    if not isinstance(model, ReducedHost):
        raise TypeError(
            f"expected a model made by effvit.sparsify, got {type(model).__name__}; "
            "effvit.sparsify(model, 'tome', r=0) computes the same as a plain ViT"
        )
    return model
