"""Expedite: cluster the tokens of the middle blocks, reconstruct all of them afterwards (arXiv 2210.01035)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.protocols import Settings
from effvit.recording import compile_each_size
from effvit.recover import NORMS, closeness, reconstruct_tokens, restore
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import Rated
from effvit.reducers.tiles import Tiling, cut_side, first_patch, lay_tiles, tile_clusters, untile_clusters
from effvit.schedule import check_blocks, check_choice, check_count, check_fraction, check_number
from effvit.tokens import Moved, Reference, TokenMap, fx_leaf, wide_product, widened

__all__ = [
    "ClusteredGrids",
    "Expedite",
    "Restore",
    "cell_middles",
    "cluster_centres",
    "cluster_tokens",
    "nearest_centre",
]


def cluster_tokens(
    x: Tensor, clusters: tuple[int, int], num_iters: int = 5, temperature: float = 5e-3, window_size: int = 5
) -> Tensor:
    """``cluster_centres`` in the dtype of x."""
    return cluster_centres(x, clusters, num_iters, temperature, window_size).to(x.dtype)


@fx_leaf
def cluster_centres(
    x: Tensor, clusters: tuple[int, int], num_iters: int = 5, temperature: float = 5e-3, window_size: int = 5
) -> Tensor:
    """Centres of a local soft k-means on maps of tokens (Expedite, 2210.01035, token clustering layer).

    Centres start as means over the cells of an h x w grid (adaptive average pooling: cells overlap where sizes
    do not divide). In each iteration a token is shared among the clusters near its cell by a softmax over
    -temperature * squared distance, and a centre becomes the mean of its shares. As in
    hourglass_image_encoder.py@75a1c30 no gradient flows through the shares. The squared norm of a token is left
    out of the distance, since the softmax does not see it.

    A token starts in the cell (row * h // H, column * w // W) of the cluster grid, and near it, in all iterations,
    are the clusters at most window_size // 2 rows and columns away. (Officially the cell is found by float32
    interpolation, which puts a row or column elsewhere for some sizes above 43, such as 82 and 2.) Officially
    all tokens are compared with all clusters, and a mask takes out what is not near; here the cluster grid is cut into
    tiles, each compared with the rectangle of tokens that can reach it (``effvit.reducers.tiles``).

    Args:
        x: (B, H, W, C) maps; whole images, or windows of them as one batch.
        clusters: (h, w), at most (H, W).
        num_iters: Iterations; 0 leaves the means of the cells.
        temperature: Factor on the squared distance, above 0: the larger, the harder the clusters.
        window_size: Odd side of the window of clusters a token may belong to.

    Returns:
        (B, h, w, C) in float32 (float64 for float64), since patches are assigned to the centres by distance.

    Raises:
        ValueError: More clusters than tokens on a side, an even window.
    """
    grid = (x.shape[1], x.shape[2])
    check_clusters(clusters, grid)
    check_window(window_size)
    x = widened(x)
    centres = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), clusters)  # (B, C, h, w)
    if num_iters == 0:
        return centres.permute(0, 2, 3, 1)
    rows, columns = (cut_side(*side, window_size) for side in zip(grid, clusters, strict=True))
    tiling = lay_tiles(rows, columns, x)
    tokens = x.flatten(1, 2).index_select(1, tiling.seen).unflatten(1, (tiling.number, -1)).flatten(0, 1)  # (B*T, L, C)
    with torch.no_grad():
        shares = _shares(tokens, tile_clusters(centres, rows, columns), tiling, temperature)
        for _ in range(num_iters - 1):
            shares = _shares(tokens, _means(tokens, shares), tiling, temperature)
    return untile_clusters(_means(tokens, shares), rows, columns)


def _shares(tokens: Tensor, centres: Tensor, tiling: Tiling, temperature: float) -> Tensor:
    """Softmax over the centres near each token: tokens (B*T, L, C), centres (B*T, G, C) -> (B*T, L, G), 0 elsewhere."""
    tiles = closeness(tokens, centres, temperature)
    flat = tiles.unflatten(0, (-1, tiling.number)).flatten(1)  # (B, T*L*G)
    pairs = tiling.pairs.expand(flat.shape[0], -1)  # (B, H*W*K)
    near = flat.gather(1, pairs).unflatten(1, tiling.beyond.shape)  # (B, H*W, K)
    shares = near.masked_fill(tiling.beyond, -math.inf).softmax(-1).flatten(1)
    # Added, not written: a pair beyond the edge has a share of 0 in the place of another pair.
    return torch.zeros_like(flat).scatter_add(1, pairs, shares).view_as(tiles)


def _means(tokens: Tensor, shares: Tensor) -> Tensor:
    """Means of the tokens (B*T, L, C) by their shares (B*T, L, G): (B*T, G, C)."""
    sums = wide_product(shares.transpose(1, 2), tokens)
    return sums / shares.sum(1).unsqueeze(-1).clamp(min=1e-16)


@torch.no_grad()
def nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    """Hard labels: which of all centres (B, M, C), near or far on the grid, is closest to each token (B, N, C).

    Returns:
        (B, N) int64, exact for any number of centres (officially in the dtype of the features).
    """
    return closeness(x, centres, 1.0).argmax(-1)


def cell_middles(grid: tuple[int, int], clusters: tuple[int, int], like: Tensor) -> Tensor:
    """(h*w,) the patch in the middle of every cell of the cluster grid, all different; ``like`` gives the device."""
    rows, columns = (
        (first[:-1] + first[1:] - 1) // 2
        for first in (
            first_patch(torch.arange(cells + 1, device=like.device), patches, cells)
            for patches, cells in zip(grid, clusters, strict=True)
        )
    )
    return (rows.unsqueeze(1) * grid[1] + columns).flatten()


def check_clusters(clusters: tuple[int, int], grid: tuple[int, int]) -> None:
    """Raise a ValueError unless there is at least one cluster and at most one for each row and column."""
    if any(not 1 <= cells <= patches for cells, patches in zip(clusters, grid, strict=True)):
        raise ValueError(
            f"clusters must be at least 1 x 1 and at most one for each token, got {clusters[0]} x {clusters[1]} for a "
            f"grid of {grid[0]} x {grid[1]}; use fewer clusters, a keep_rate, or larger images"
        )


def check_window(window_size: int) -> None:
    """Raise an error unless the window is a whole odd number."""
    if check_count("window_size", window_size, 1) % 2 == 0:
        raise ValueError(f"window_size must be odd, so that a cluster is in its middle, got {window_size}")


class ClusteredGrids(NamedTuple):
    """Centres of clusters in place of grids of tokens, see ``effvit.reducers.grids``.

    Attributes:
        x: (B, h, w, C) centres.
        reference: The tokens of the full grids and the centres, and how to reconstruct.
    """

    x: Tensor
    reference: Reference

    def restore(self, z: Tensor) -> Tensor:
        """The full grids (B, H*W, C), reconstructed from what became of the centres, z (B, h*w, C)."""
        patches, centres, temperature, k, norm = self.reference
        assert centres is not None
        return reconstruct_tokens(z, patches, centres, temperature, k, norm)

    def labels(self) -> Tensor:
        """(B, H*W) nearest centre of each token."""
        patches, centres, *_ = self.reference
        assert centres is not None
        return nearest_centre(patches, centres)


class Expedite(Rated):
    """Replace the patches by the centres of soft clusters before one block (Expedite, 2210.01035).

    The blocks behind work on the centres, as on patches of a coarser grid; sizes do not enter attention. What
    needs all patches gets them reconstructed: dense maps, and heads that pool anything but the class token. No
    parameters, no training. Clusters take the position of the middle of their cell (RoPE, pictures), and hard
    labels say which patch is whose, except that this middle always belongs to its own cluster, so that none is empty.
    ``torch.compile`` makes a graph for every grid of clusters that a schedule of keep rates passes through.

    In a plain vision transformer the whole image is clustered; in a host with windows (``effvit.hosts.windows``) each
    window is, as the official code does in those of SAM (hourglass_image_encoder.py@75a1c30).
    """

    name = "expedite"
    keeps_every_patch = True
    open_sides = 0
    soft = True
    summary = "soft clusters in the middle blocks, all patches reconstructed afterwards (2210.01035)"
    recover = "reconstruct"

    def __init__(
        self,
        keep_rate: float | None,
        num_clusters: tuple[int, int] | None,
        num_iters: int,
        temperature: float,
        window_size: int,
        k: int | None,
        norm: str,
    ) -> None:
        super().__init__()
        self.keep_rate = keep_rate
        self.base_keep_rate = keep_rate
        self.num_clusters = num_clusters
        self.num_iters = num_iters
        self.temperature = temperature
        self.window_size = window_size
        self.k = k
        self.norm = norm

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | None = None,
        num_clusters: int | Sequence[int] | None = None,
        cluster_at: int | None = None,
        restore_at: int | None = None,
        num_iters: int = 5,
        temperature: float = 5e-3,
        window_size: int = 5,
        k: int | None = None,
        norm: str = "l2",
    ) -> dict[int, Reducer]:
        """Settings of the method; defaults are those of scripts/amg.py@75a1c30, but for the norm, there "official".

        Args:
            depth: Blocks of the host.
            keep_rate: Clusters as a fraction of the patches, in (0, 1]; each side of the grid is scaled by its
                square root and rounded. 1 clusters nothing. None means 0.51, the published 10 x 10 clusters of
                14 x 14 patches.
            num_clusters: The grid (h, w) of clusters in place of a rate, or a square number of them; at most one for
                each patch of a side on a host that takes images of any size.
            cluster_at: 0-based block before which the patches are clustered (the paper's alpha); None means 6 of
                32, in proportion for another depth.
            restore_at: 0-based block before which all patches are restored, so that the blocks from there on see
                the full sequence again (the paper's alpha + beta); None means behind the last block.
            num_iters: Iterations of the clustering.
            temperature: Factor on the squared distance, for clusters and reconstruction. It depends on the scale
                of the host's features; the default is for SAM.
            window_size: Odd side of the window of clusters a patch may belong to.
            k: Centres a patch is reconstructed from; None means 20. All where there are fewer, for a given k only
                on a host that takes images of any size.
            norm: "l2", "l1" or "official", see ``effvit.recover.reconstruct_tokens``.
        """
        first = 6 * depth // 32 if cluster_at is None else cluster_at
        check_blocks("cluster_at", (first,), depth)
        if restore_at is not None and check_blocks("restore_at", (restore_at,), depth)[0] <= first:
            raise ValueError(f"restore_at must be a block behind cluster_at, got {restore_at} and {first}")
        if keep_rate is not None and num_clusters is not None:
            raise ValueError(
                f"keep_rate and num_clusters both set the clusters, got {keep_rate} and {num_clusters}; give one"
            )
        check_choice("norm", norm, NORMS)
        check_number("temperature", temperature, "positive")
        check_window(window_size)
        check_count("num_iters", num_iters)
        if k is not None:
            check_count("k", k, 1)
        rate = (
            None if num_clusters is not None else check_fraction("keep_rate", 0.51 if keep_rate is None else keep_rate)
        )
        if rate == 1:
            return {}
        grid = None if num_clusters is None else cluster_grid(num_clusters)
        plan: dict[int, Reducer] = {first: cls(rate, grid, num_iters, temperature, window_size, k, norm)}
        if restore_at is not None:
            plan[restore_at] = Restore()
        return plan

    @classmethod
    def example(cls) -> Settings:
        return {
            "keep_rate": 0.5,
            "cluster_at": 1,
            "num_iters": 3,
            "window_size": 3,
            "temperature": 0.05,
            "k": 4,
        }

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        return None  # one place to cluster at

    def clusters(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(h, w) clusters for an image of that patch grid."""
        if self.num_clusters is not None:
            if not self.any_size:
                return self.num_clusters
            return min(self.num_clusters[0], grid[0]), min(self.num_clusters[1], grid[1])
        assert self.keep_rate is not None
        side = math.sqrt(self.keep_rate)
        return max(1, math.floor(grid[0] * side + 0.5)), max(1, math.floor(grid[1] * side + 0.5))

    def count_on(self, num_tokens: int, grid: tuple[int, int]) -> int:
        clusters = self.clusters(grid)
        check_clusters(clusters, grid)
        number = clusters[0] * clusters[1]
        if self.k is not None and self.k > number and not self.any_size:
            raise ValueError(
                f"k must be at most the number of clusters, got {self.k} for {clusters[0]} x {clusters[1]} clusters of "
                f"a {grid[0]} x {grid[1]} grid; use a smaller k, None for 20 at most, or more clusters"
            )
        return number

    def cost(self, at: BlockSizes) -> Change:
        patches = at.grid[0] * at.grid[1]
        side = math.sqrt(self.keep_rate or 0)
        cells = self.num_clusters or tuple(max(1, math.floor(n * side + 0.5)) for n in at.grid)
        clusters = math.prod(cells)
        if clusters == patches:
            return Change(patches, patches, patches, 0)
        # Hard labels of the patches, patches * clusters * dim, are for maps and pictures alone: no score needs them.
        # Means of cells to start from; in each iteration the distances of all pairs in the tiles, then the new means.
        sides = (cut_side(*side, self.window_size) for side in zip(at.grid, cells, strict=True))
        macs = patches * at.dim + self.num_iters * 2 * math.prod(side.pairs for side in sides) * at.dim
        return Change(clusters, clusters, clusters, macs)

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        clusters = self.clusters(tokens.grid)
        return (x, tokens) if clusters == tokens.grid else self.cluster(x, tokens, clusters)

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        cells = self.clusters(grid)
        self.count_on(grid[0] * grid[1], grid)
        return cells

    def restore_macs(self, grid: tuple[int, int], dim: int) -> int:
        """For each token and cell a distance and a share."""
        cells = self.clusters(grid)
        return 2 * grid[0] * grid[1] * cells[0] * cells[1] * dim

    def shrink(self, x: Tensor, images: Tensor) -> ClusteredGrids:
        """Centres of the soft clusters of each grid of x (B*nW, H, W, C), as officially in the windows of SAM."""
        clusters = self.clusters((x.shape[1], x.shape[2]))
        centres = cluster_centres(x, clusters, self.num_iters, self.temperature, self.window_size)
        rows = x.shape[0] // images.shape[0]
        check_finite(centres.detach().flatten(1, 2).sum(-1), self.origin("cluster centres"), images, rows)
        reference = Reference(x.flatten(1, 2), centres.flatten(1, 2), self.temperature, self.k, self.norm)
        return ClusteredGrids(centres.to(x.dtype), reference)

    def cluster(self, x: Tensor, tokens: TokenMap, clusters: tuple[int, int]) -> tuple[Tensor, TokenMap]:
        """Patches of the full grid in x (B, P + H*W, C) -> (B, P + h*w, C) centres and their map."""
        if tokens.moved:
            raise ValueError(
                "expedite clusters the full grid, but patches were dropped before; "
                "create the host with patch_drop_rate=0, or use it in eval mode only"
            )
        compile_each_size((*tokens.grid, *clusters))  # the tiles are chosen by comparing sizes
        prefix, patches = tokens.split(x)
        options = (self.num_iters, self.temperature, self.window_size)
        centres = cluster_centres(patches.unflatten(1, tokens.grid), clusters, *options).flatten(1, 2)  # (B, h*w, C)
        check_finite(centres.detach().sum(-1), self.origin("cluster centres"), x)
        source, anchor = assign_patches(patches, centres, tokens.grid, clusters)
        k = self.k if self.k is None or not self.any_size else min(self.k, centres.shape[1])
        reference = Reference(patches, centres, self.temperature, k, self.norm)
        left = tokens.relabel(Moved(source, anchor), clusters[0] * clusters[1], keeps_every_patch=True)
        left = replace(left, history=left.history._replace(reference=reference), cells=clusters)
        return torch.cat([prefix, centres.to(x.dtype)], dim=1), left


def cluster_grid(num_clusters: int | Sequence[int]) -> tuple[int, int]:
    """(h, w) of the setting: a pair as it is, a square number as its root twice."""
    if isinstance(num_clusters, (list, tuple)):
        if len(num_clusters) != 2:
            raise ValueError(f"num_clusters must be (rows, columns) or a square number, got {num_clusters!r}")
        return check_count("num_clusters", num_clusters[0], 1), check_count("num_clusters", num_clusters[1], 1)
    number = check_count("num_clusters", num_clusters, 1)  # type: ignore[arg-type]
    side = math.isqrt(number)
    if side * side != number:
        raise ValueError(f"num_clusters must be a square number or (rows, columns), got {number}")
    return side, side


@fx_leaf
def assign_patches(
    patches: Tensor, centres: Tensor, grid: tuple[int, int], clusters: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(B, H*W) cluster of each patch and (B, h*w) the patch whose position each cluster keeps."""
    anchor = cell_middles(grid, clusters, patches).expand(patches.shape[0], -1)
    own = torch.arange(anchor.shape[1], device=anchor.device).expand_as(anchor)
    return nearest_centre(patches, centres).scatter(1, anchor, own), anchor


class Restore(Reducer):
    """Restore all patches before a block, which then sees the full sequence again."""

    name = "expedite"
    keeps_every_patch = True

    def count_on(self, num_tokens: int, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    def cost(self, at: BlockSizes) -> Change:
        patches = at.grid[0] * at.grid[1]
        return Change(patches, patches, patches, 2 * patches * at.tokens * at.dim)

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        return restore(x, tokens)
