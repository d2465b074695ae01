"""Cells of a grid of patches: what a merger behind a tower makes one token of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_count

__all__ = ["cell_grid", "cell_means", "check_sides", "to_cells"]


def check_sides(name: str, sides: Size) -> Size:
    """``sides`` if they are two whole numbers of at least 1, rows and columns; else an error that names them."""
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"{name} must be two whole numbers, rows and columns, got {sides!r}")
    height, width = (check_count(name, side, 1) for side in sides)
    return height, width


def cell_grid(grid: Size, merge: int, filled: bool = False) -> Size:
    """(H, W) cells of ``merge`` x ``merge`` patches on a grid of patches.

    Args:
        grid: (H, W) patches.
        merge: Side of a cell.
        filled: The last cells of a row and of a column may lack patches, which the merger fills with zeros (DeepSeek).

    Raises:
        ValueError: A side that is not a multiple, of cells that are not filled.
    """
    check_count("merge", merge, 1)
    if filled:
        return -(-grid[0] // merge), -(-grid[1] // merge)
    for name, side in zip(("height", "width"), grid, strict=True):
        if side % merge:
            raise ValueError(
                f"a merger of {merge} x {merge} patches needs sides that are multiples of {merge}, but the {name} of "
                f"the grid {grid[0]} x {grid[1]} is {side}; resize or pad the image"
            )
    return grid[0] // merge, grid[1] // merge


def to_cells(x: Tensor, grid: Size, merge: int) -> Tensor:
    """Patches (B, H*W, C) as cells (B, H*W / merge^2, merge^2 * C): row by row, and so are the patches in each.

    What mergers take that join patches into channels (the pixel shuffle of InternVL, the merger of Qwen's towers).
    """
    if merge == 1:
        return x
    height, width = cell_grid(grid, merge)
    inside = x.unflatten(1, (height, merge, width, merge))  # (B, h, m, w, m, C)
    return inside.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, h*w, m*m*C)


def cell_means(x: Tensor, grid: Size, merge: int, filled: bool = False) -> Tensor:
    """The mean of each cell's patches: (B, H*W, C) -> (B, cells, C); likewise without the C.

    So scores of patches become scores of cells (the vLLM, OpenVINO and Qwen readings of VisionZip and CDPruner). A cell
    that lacks patches (``filled``, as for ``cell_grid``) has the mean of those it has.
    """
    if merge == 1:
        return x
    apart = x.unsqueeze(-1) if x.ndim == 2 else x
    if filled and (grid[0] % merge or grid[1] % merge):
        share = _filled_means(x.new_ones(1, apart.shape[1], 1), grid, merge)  # (1, cells, 1) of patches that are there
        means = _filled_means(apart, grid, merge) / share
    else:
        means = to_cells(apart, grid, merge).unflatten(2, (merge * merge, -1)).mean(dim=2)
    return means.squeeze(-1) if x.ndim == 2 else means


def _filled_means(x: Tensor, grid: Size, merge: int) -> Tensor:
    """Means of the cells of x (B, H*W, C), in which patches that are lacking count as zeros: (B, cells, C)."""
    height, width = cell_grid(grid, merge, filled=True)
    behind = (0, 0, 0, width * merge - grid[1], 0, height * merge - grid[0])
    whole = F.pad(x.unflatten(1, grid), behind).flatten(1, 2)
    return cell_means(whole, (height * merge, width * merge), merge)
