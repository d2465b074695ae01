"""A map of tokens and a coarser grid of clusters, cut into tiles outside of which no pair is near (Expedite).

A token starts in the cell (row * h // H, column * w // W) of the h x w clusters. Near it are the K clusters at most
``radius`` rows and columns away. Rows and columns of clusters are cut into bands; a band of rows and a band of
columns make a tile of G clusters, and the L tokens that some cluster of it is near are a rectangle of the map. So one
product of T tiles, (B*T, L, C) by (B*T, C, G), has all pairs that are near, where (B, H*W, C) by (B, C, h*w) has all.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Side", "Tiling", "cut_side", "first_patch", "lay_tiles", "tile_clusters", "untile_clusters"]

Cell = TypeVar("Cell", int, Tensor)


class Side(NamedTuple):
    """The rows (or columns) of both grids, cut into bands.

    Attributes:
        patches: Rows of patches, H or W.
        cells: Rows of clusters, h or w.
        radius: Rows of clusters on either side of a cell that are near.
        bands: Number of bands.
        width: Rows of clusters in a band. The last band may hold some beyond the grid, which are near no patch.
        reach: Rows of patches that a band is compared with, as many as the band with the longest reach needs.
    """

    patches: int
    cells: int
    radius: int
    bands: int
    width: int
    reach: int

    @property
    def pairs(self) -> int:
        """Pairs of a row of patches and a row of clusters that are compared."""
        return self.bands * self.reach * self.width

    @property
    def price(self) -> int:
        """Pairs, and for each repeated row of patches as many as cost the same time."""
        return self.pairs + 5 * self.bands * self.reach


class Tiling(NamedTuple):
    """Which patches and which pairs the tiles of an image hold, one column of tiles after another.

    Attributes:
        number: Number of tiles T.
        seen: (T*L,) the patches that each tile is compared with.
        pairs: (H*W*K,) for the window of clusters around each patch, the place of the pair in (T, L, G) flattened.
        beyond: (H*W, K) True where the window passes the edge of the grid. Such a pair has the place of another one.
    """

    number: int
    seen: Tensor
    pairs: Tensor
    beyond: Tensor


def first_patch(cell: Cell, patches: int, cells: int) -> Cell:
    """The first row of patches that starts in a row of cells, or would if the grid went on."""
    return (cell * patches + cells - 1) // cells


def cut_side(patches: int, cells: int, window_size: int) -> Side:
    """The cheapest bands for H or W patches and h or w clusters, where a window of clusters is near.

    Wide bands compare more pairs that are not near, up to all pairs in one band; narrow bands repeat more patches and
    make products too thin to be fast. Of all widths this takes the one with the least (width + 5) * reach * bands; the
    5 was chosen by timing 14 x 14 to 64 x 64 patches of 384 channels on a CPU.
    """
    radius = min(window_size // 2, cells - 1)
    best: Side | None = None
    for width in range(1, cells + 1):
        bands = -(-cells // width)
        around = min(bands - 1, 2) * radius  # clusters the window adds to a band, where it has a neighbour
        reach = min(first_patch(width + around, patches, cells), patches)
        side = Side(patches, cells, radius, bands, width, reach)
        if best is None or side.price < best.price:
            best = side
    assert best is not None  # there is at least one cluster
    return best


def tile_clusters(centres: Tensor, rows: Side, columns: Side) -> Tensor:
    """Centres (B, C, h, w) in the order of the tiles: (B*T, G, C), with zeros beyond the grid."""
    below, beside = (side.bands * side.width - side.cells for side in (rows, columns))
    tiles = F.pad(centres, (0, beside, 0, below)).unflatten(3, (-1, columns.width)).unflatten(2, (-1, rows.width))
    return tiles.permute(0, 4, 2, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def untile_clusters(tiles: Tensor, rows: Side, columns: Side) -> Tensor:
    """Inverse of ``tile_clusters`` with the channels last: (B*T, G, C) -> (B, h, w, C)."""
    tiles = tiles.unflatten(1, (rows.width, columns.width)).unflatten(0, (-1, columns.bands, rows.bands))
    centres = tiles.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
    return centres[:, : rows.cells, : columns.cells]


def lay_tiles(rows: Side, columns: Side, like: Tensor) -> Tiling:
    """The tiles of all bands of rows and of columns; ``like`` gives the device."""
    num_patches, num_clusters = rows.reach * columns.reach, rows.width * columns.width
    down = _lay_bands(rows, like)
    across = down if columns == rows else _lay_bands(columns, like)  # a square grid needs half of the kernels
    seen = across.seen[:, None, None, :] + columns.patches * down.seen[None, :, :, None]  # (bands, bands, reach, reach)
    row = (down.band * num_patches + down.patch * columns.reach) * num_clusters + down.cluster * columns.width
    column = (across.band * (rows.bands * num_patches) + across.patch) * num_clusters + across.cluster
    pairs = row[:, None, :, None] + column[None, :, None, :]  # (H, W, K of rows, K of columns)
    beyond = down.beyond[:, None, :, None] | across.beyond[None, :, None, :]
    return Tiling(rows.bands * columns.bands, seen.flatten(), pairs.flatten(), beyond.flatten(2).flatten(0, 1))


class _Bands(NamedTuple):
    """The bands of a side: the rows of patches each sees, and the window of K rows of clusters around each row.

    Attributes:
        seen: (bands, reach) rows of patches.
        band: (H, K) the band of the row of clusters.
        patch: (H, K) the place of the row of patches among those the band sees.
        cluster: (H, K) the place of the row of clusters in its band.
        beyond: (H, K) True where the window passes the edge; the row of clusters is then that at the edge.
    """

    seen: Tensor
    band: Tensor
    patch: Tensor
    cluster: Tensor
    beyond: Tensor


def _lay_bands(side: Side, like: Tensor) -> _Bands:
    cell = torch.arange(-side.radius, side.cells - side.radius, side.width, device=like.device)  # (bands,)
    first = first_patch(cell, side.patches, side.cells).clamp(0, side.patches - side.reach)
    row = torch.arange(side.patches, device=like.device).unsqueeze(1)  # (H, 1)
    window = row * side.cells // side.patches + torch.arange(-side.radius, side.radius + 1, device=like.device)
    near = window.clamp(0, side.cells - 1)  # (H, K)
    band = near // side.width
    seen = first.unsqueeze(1) + torch.arange(side.reach, device=like.device)
    return _Bands(seen, band, row - first[band], near % side.width, near != window)
