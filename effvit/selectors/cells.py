"""Cells of a grid of patches: what a merger behind a tower makes one token of."""

from __future__ import annotations

from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_count

__all__ = ["cell_grid", "cell_means", "to_cells"]


def cell_grid(grid: Size, merge: int) -> Size:
    """(H, W) cells of ``merge`` x ``merge`` patches on a grid of patches.

    Raises:
        ValueError: A side that is not a multiple.
    """
    check_count("merge", merge, 1)
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


def cell_means(x: Tensor, grid: Size, merge: int) -> Tensor:
    """The mean of each cell's patches: (B, H*W, C) -> (B, H*W / merge^2, C); likewise without the C.

    So scores of patches become scores of cells (the vLLM, OpenVINO and Qwen readings of VisionZip and CDPruner).
    """
    if merge == 1:
        return x
    apart = x.unsqueeze(-1) if x.ndim == 2 else x
    means = to_cells(apart, grid, merge).unflatten(2, (merge * merge, -1)).mean(dim=2)
    return means.squeeze(-1) if x.ndim == 2 else means
