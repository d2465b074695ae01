"""GlobalCom2: the thumbnail says how much of each crop to keep, and has a say in which tokens (arXiv 2501.05179)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_number
from effvit.selectors.base import Features, Keep, SelectionSizes, required_scores
from effvit.selectors.parts import Parts, PartSelector, highest_each

__all__ = ["GlobalCom2", "crop_ratios", "thumbnail_on_crops"]


def crop_ratios(scores: Tensor, grid: Size, crops: Size, ratio: float, temperature: float = 10.0) -> Tensor:
    """(P,) share of its tokens that each crop keeps, by the thumbnail's scores (N,), about ``ratio`` in the mean.

    R (1 + p - mean p), at most 1, with p the softmax of the scores summed over the part that a crop shows (2501.05179,
    llava_arch.py@96b2d00). Rows and columns left over by the division belong to the last crop. In float64.
    """
    row = (torch.arange(grid[0], device=scores.device) // max(grid[0] // crops[0], 1)).clamp(max=crops[0] - 1)
    column = (torch.arange(grid[1], device=scores.device) // max(grid[1] // crops[1], 1)).clamp(max=crops[1] - 1)
    crop = (row.unsqueeze(1) * crops[1] + column).flatten()  # (N,)
    sums = torch.zeros(crops[0] * crops[1], dtype=torch.float64, device=scores.device)
    sums = sums.index_add(0, crop, scores.double())
    p = ((sums - sums.max()) / temperature).exp()
    p = p / (p.sum() + 1e-8)
    return (ratio * (1 + p - p.mean())).clamp(max=1)


def thumbnail_on_crops(scores: Tensor, grid: Size, crops: Size, valid: Tensor) -> Tensor:
    """The thumbnail's scores (N,) enlarged to the part of the canvas that shows the image: (P, N), 0 in the padding."""
    rows, columns = valid.any(1).nonzero().flatten(), valid.any(0).nonzero().flatten()
    size = (len(rows), len(columns))
    enlarged = F.interpolate(scores.view(1, 1, *grid), size, mode="bilinear", align_corners=False)[0, 0]
    canvas = scores.new_zeros(valid.shape)
    canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = enlarged
    return on_crops(canvas, grid, crops)


def on_crops(canvas: Tensor, grid: Size, crops: Size) -> Tensor:
    """A canvas (rows * H, columns * W) cut into crops: (P, N)."""
    return (
        canvas.unflatten(1, (crops[1], grid[1]))
        .unflatten(0, (crops[0], grid[0]))
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )


class GlobalCom2(PartSelector):
    """Keep more of the crops that the thumbnail scores high, and its high cells in them (GlobalCom2, 2501.05179).

    llava_arch.py@96b2d00: scores are the class token's LOGITS in the last block, the mean over the heads. The thumbnail
    keeps its int(N R) best; a crop the best of its own scores plus the enlarged thumbnail's, each of norm 1 over the
    cells that show the image. The release writes kept tokens at their places among those cells, and takes one image's
    scores for the whole batch; here they stand where they are.

    Args:
        temperature: Of the softmax over the crops.
    """

    name = "globalcom2"
    summary = "the thumbnail says how much of each crop to keep, and which tokens (2501.05179)"
    row = "logits"
    weighs_scores = True
    reads_last = True
    reads_padding = True
    whole_grid = True

    def __init__(self, *, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, "positive")

    def count(self, keep: Keep, grid: Size) -> int | None:
        self.share(keep)
        return None

    def cost_parts(self, at: SelectionSizes, parts: Parts, keep: Keep) -> int:
        enlarged = parts.crops[0] * parts.crops[1] * at.tokens  # cells, each of 2 x 2 by the bilinear kernel
        return 0 if keep == 1 else 4 * enlarged

    def choose_parts(self, features: Features, parts: Parts, keep: Keep) -> Tensor:
        ratio, (whole, own) = self.share(keep), parts.split(required_scores(self, features))
        canvas = (parts.crops[0] * features.grid[0], parts.crops[1] * features.grid[1])
        valid = torch.ones(canvas, dtype=torch.bool, device=own.device) if parts.valid is None else parts.valid
        shown = on_crops(valid, features.grid, parts.crops)  # (P - 1, N)
        if ratio == 1:  # the release's ratios are below it for crops that score low
            return parts.join(torch.ones_like(shown[0]), shown)
        enlarged = thumbnail_on_crops(whole, features.grid, parts.crops, valid)
        joint = F.normalize(own * shown, dim=1) + F.normalize(enlarged * shown, dim=1)
        ratios = crop_ratios(whole, features.grid, parts.crops, ratio, self.temperature)
        counts = (shown.sum(1) * ratios).long()
        kept = highest_each(joint.masked_fill(~shown, -math.inf), counts)
        first = highest_each(whole.unsqueeze(0), torch.tensor([int(len(whole) * ratio)], device=own.device))[0]
        return parts.join(first, kept)
