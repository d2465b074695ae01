"""Matryoshka: one set of weights for many numbers of tokens, by average pooling (M3, arXiv 2405.17430)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.protocols import Size
from effvit.schedule import check_count
from effvit.selectors.base import Choice, Features, Keep, SelectionSizes, Selector

__all__ = ["Matryoshka", "MatryoshkaLoss", "pool_windows", "stride_for"]


def stride_for(number: int, cells: int) -> int:
    """Side of the windows for ``number`` of the cells, int(sqrt(N / s)) as in llava_arch.py@ec30cd3."""
    return math.isqrt(cells // number)


def pool_windows(x: Tensor, grid: Size, stride: int) -> tuple[Tensor, Tensor]:
    """Means of x (B, H*W, C) over windows of ``stride`` x ``stride``: (B, n, C) row by row, and (H*W,) their windows.

    Cells of a last row or column that fills no window are in none, -1, as in the release.
    """
    pooled = F.avg_pool2d(x.unflatten(1, grid).permute(0, 3, 1, 2), stride)  # (B, C, h, w), channels last
    height, width = pooled.shape[2:]
    row = torch.arange(grid[0], device=x.device).unsqueeze(1) // stride  # (H, 1)
    column = torch.arange(grid[1], device=x.device) // stride  # (W,)
    window = torch.where((row < height) & (column < width), row * width + column, -1)
    return pooled.flatten(2).transpose(1, 2), window.flatten()


class Matryoshka(Selector):
    """The means of windows of k x k cells (Matryoshka multimodal models, M3, 2405.17430).

    The number of tokens must be that of whole windows: where the grid is no multiple of k, the release leaves out rows
    and columns or gives more tokens than asked; here that is an error that names the numbers there are. The release
    pools behind the projector. A share of the cells is rounded to the nearest number. A token has the position of the
    cell in the middle of its window.
    """

    name = "matryoshka"
    summary = "average windows of cells, with one training for all numbers of tokens (2405.17430)"
    whole_grid = True

    def rounded(self, share: float, cells: int) -> int:
        return round(share * cells)

    def count(self, keep: Keep, grid: Size) -> int | None:
        number = self.number(keep, math.prod(grid))
        if self.stride(number, grid) is None:
            known = [math.prod(grid) // k**2 for k in range(1, min(grid) + 1) if not (grid[0] % k or grid[1] % k)]
            raise ValueError(
                f"matryoshka averages whole windows: of {grid[0]} x {grid[1]} cells it gives "
                f"{', '.join(map(str, known))} tokens, got keep={keep}"
            )
        return number

    def stride(self, number: int, grid: Size) -> int | None:
        """Side of the windows that leave ``number`` tokens of the grid; None if there is none."""
        k = stride_for(number, math.prod(grid))
        whole = grid[0] % k == 0 == grid[1] % k
        return k if whole and number * k**2 == math.prod(grid) else None

    def cost(self, at: SelectionSizes) -> int:
        return at.tokens * at.dim  # each number is added up once

    def choose(self, features: Features, kept: int) -> Choice:
        k = self.stride(kept, features.grid)
        assert k is not None
        pooled, window = pool_windows(features.x, features.grid, k)
        height, width = features.grid
        rows = torch.arange(k // 2, height, k, device=window.device).unsqueeze(1) * width
        ids = (rows + torch.arange(k // 2, width, k, device=window.device)).flatten()
        batch = pooled.shape[0]
        return Choice(ids.expand(batch, -1), pooled, window.expand(batch, -1))


class MatryoshkaLoss(nn.Module):
    """The mean of a loss over several numbers of tokens, all with the same weights (2405.17430, section 3.2).

    Args:
        criterion: From what the head gives and the target to a loss.
        scales: Numbers of tokens, each of which the grid allows.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], scales: Sequence[int]) -> None:
        super().__init__()
        if not scales:
            raise ValueError("scales must name at least one number of tokens, got none; the paper has 1 to 576")
        self.criterion = criterion
        self.scales = [check_count("scales", scale, 1) for scale in scales]
        self.pooling = Matryoshka()

    def forward(self, head: Callable[[Tensor], Tensor], tokens: Tensor, grid: Size, target: Tensor) -> Tensor:
        """The loss of ``head`` on tokens (B, H*W, C) of a grid, pooled to each scale."""
        losses = []
        for scale in self.scales:
            kept = self.pooling.count(scale, grid)
            assert kept is not None
            pooled = self.pooling.choose(Features(tokens, grid), kept).tokens
            assert pooled is not None
            losses.append(self.criterion(head(pooled), target))
        return torch.stack(losses).mean()
