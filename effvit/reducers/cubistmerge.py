"""CubistMerge: take as many tokens out of every row, then out of every column, of the patch grid (arXiv 2509.21764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.protocols import Settings, Size
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.cost import BlockSizes, Change
from effvit.schedule import check_blocks, check_count, check_switch, per_block, spread_blocks
from effvit.tokens import Moved, TokenMap, flat_rows, fx_leaf, take_rows, widened

__all__ = ["CubistMerge", "Line", "merge_grid", "merge_lines"]


class Line(NamedTuple):
    """Rows of N tokens that have become rows of N - r.

    Attributes:
        x: (R, N-r, C) tokens left.
        kept: (R, N-r) places they had.
        target: (R, N) place in the new row of each old token.
    """

    x: Tensor
    kept: Tensor
    target: Tensor


@fx_leaf
def merge_lines(x: Tensor, r: int, compat: bool = False, origin: str = "tokens", images: int = 1) -> Line:
    """Rows x (R, N, C) without the r tokens of each that are most like a neighbour (CubistMerge, 2509.21764).

    Tokens at odd places may be removed, into the neighbour at an even place that is more like them by cosine, the left
    one of two equal ones. What absorbs them takes, channel by channel, the value of largest magnitude, its own of equal
    ones. The rest keeps its order.

    Args:
        x: The rows.
        r: Tokens to remove of each, at most N // 2.
        compat: Where two tokens go into one, let one of them be lost, as the release does (cume/cume.py@b8e9207, on a
            CPU): that of odd rank among the removed stays, of two of a kind the later one.
        origin: What the rows are, for messages.
        images: Rows of one image, for messages.

    Raises:
        ValueError: Tokens that are NaN, see ``check_finite``.
    """
    number, pairs = x.shape[1], x.shape[1] // 2
    if r == 0:
        places = torch.arange(number, device=x.device).expand(x.shape[0], -1)
        return Line(x, places, places)
    unit = F.normalize(widened(x.detach()), dim=-1)
    links = (unit[:, 1:] * unit[:, :-1]).sum(-1)  # (R, N-1)
    left, right = links[:, 0::2], links[:, 1::2]  # of the odd tokens
    right = F.pad(right, (0, pairs - right.shape[1]), value=float("-inf"))  # (R, N // 2)
    best = check_finite(torch.maximum(left, right), origin, x, images)
    ranked = best.argsort(dim=1, descending=True)[:, :r]
    removed = torch.zeros_like(left, dtype=torch.bool).scatter(1, ranked, torch.ones_like(ranked, dtype=torch.bool))
    goes_right = removed & (right > left)

    odd, even = x[:, 1::2], x[:, 0::2]
    from_right, from_left = removed & ~goes_right, goes_right
    if compat:
        from_right, from_left = without_lost(from_right, from_left, ranked)
    more = even.shape[1] - pairs  # 1 for rows of odd length, whose last token has no right neighbour
    for source, taken in ((odd * from_right.unsqueeze(-1), (0, more)), (odd * from_left.unsqueeze(-1), (1, more - 1))):
        source = F.pad(source, (0, 0, *taken))
        even = torch.where(source.abs() > even.abs(), source, even)
    stays = F.pad(torch.stack([torch.ones_like(removed), ~removed], dim=2).flatten(1), (0, more), value=True)  # (R, N)
    place = torch.ones_like(stays, dtype=torch.int64).cumsum(1) - 1
    kept = torch.where(stays, place, place + number).sort(dim=1).values[:, : number - r]
    merged = torch.stack([even[:, :pairs], odd], dim=2).flatten(1, 2)  # (R, 2 (N // 2), C)
    merged = torch.cat([merged, even[:, pairs:]], dim=1)
    moves = F.pad(torch.stack([torch.zeros_like(removed), goes_right], dim=2).flatten(1), (0, more))
    target = stays.cumsum(1) - 1 + moves
    return Line(take_rows(merged, flat_rows(kept, number)), kept, target)


def without_lost(from_right: Tensor, from_left: Tensor, ranked: Tensor) -> tuple[Tensor, Tensor]:
    """Which odd tokens (R, N // 2) reach the even one at their left and at their right in the release.

    Args:
        from_right: True where the token goes to its left.
        from_left: True where it goes to its right.
        ranked: (R, r) those removed, most similar first.
    """
    rank = torch.ones_like(ranked).cumsum(1) - 1
    number = ranked.shape[1]
    later = torch.zeros_like(from_right, dtype=torch.int64).scatter(1, ranked, rank + (rank % 2) * number)
    meets = from_right[:, 1:] & from_left[:, :-1]  # tokens 2i + 1 and 2i - 1 go into 2i
    first = meets & (later[:, 1:] > later[:, :-1])
    second = meets & (later[:, 1:] < later[:, :-1])
    return from_right & ~F.pad(second, (1, 0)), from_left & ~F.pad(first, (0, 1))


@fx_leaf
def merge_grid(
    x: Tensor, grid: Size, r_h: int, r_w: int, compat: bool = False, origin: str = "tokens", grids: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens x (B, H*W, C) of a grid as those of one of H - r_h rows and W - r_w columns.

    Every row loses r_w tokens, then every column of what is left loses r_h. Rows choose for themselves, so that a
    column of the new grid is a staircase in the image.

    Args:
        x: The tokens.
        grid: (H, W).
        r_h: Rows to take out, at most half of them.
        r_w: Columns, likewise.
        compat: As for ``merge_lines``.
        origin: What the tokens are, for messages.
        grids: Grids of one image, for messages.

    Returns:
        (B, h*w, C) tokens in order of rows, the place (B, H*W) of each old token among them, and the old token
        (B, h*w) whose place each new one keeps.
    """
    height, width = grid
    batch, w = x.shape[0], width - r_w
    rows = merge_lines(x.reshape(batch * height, width, -1), r_w, compat, origin, grids * height)
    columns = rows.x.unflatten(0, (batch, height)).transpose(1, 2).flatten(0, 1)  # (B*w, H, C)
    down = merge_lines(columns, r_h, compat, origin, grids * w)
    merged = down.x.unflatten(0, (batch, w)).transpose(1, 2).flatten(1, 2)  # (B, h*w, C)
    column = rows.target.unflatten(0, (batch, height)).flatten(1)  # (B, H*W)
    row = torch.ones_like(column).cumsum(1) - 1
    row = torch.div(row, width, rounding_mode="floor")
    target = down.target.unflatten(0, (batch, w)).flatten(1).gather(1, column * height + row) * w + column
    old_row = down.kept.unflatten(0, (batch, w)).transpose(1, 2).flatten(1)  # (B, h*w)
    new_column = (torch.ones_like(old_row).cumsum(1) - 1) % w
    old_column = rows.kept.unflatten(0, (batch, height)).flatten(1).gather(1, old_row * w + new_column)
    return merged, target, old_row * width + old_column


class CutGrids(NamedTuple):
    """Grids of fewer rows and columns in place of larger ones, see ``effvit.reducers.grids``.

    Attributes:
        x: (B, h, w, C) tokens that are left.
        target: (B, H*W) which of them took in each token of the full grid.
    """

    x: Tensor
    target: Tensor

    def restore(self, z: Tensor) -> Tensor:
        """The full grids (B, H*W, C): each token is what became of the one that took it in, of z (B, h*w, C)."""
        return take_rows(z, flat_rows(self.target, z.shape[1]))

    def labels(self) -> Tensor:
        """(B, H*W) the token that took in each one."""
        return self.target


class CubistMerge(Reducer):
    """Merge once before a block, so that the tokens are a smaller grid from there on (CubistMerge, 2509.21764).

    No patch is dropped: each is carried by the token that took it in, which keeps its position, RoPE and relative
    positions included.

    Deviations from cume@b8e9207: where two tokens go into one, the largest magnitude of all three stays (the release
    loses one of the two; ``compat=True``); an average over patches weights tokens by the patches they took in. How the
    authors' fork of DINOv3 rotates the smaller grid, and their fork of SAM biases it, is not known: in a host with
    windows every window becomes a smaller one, whose biases are interpolated at the distances of equal cells.

    Attributes:
        earlier: The reducers of the blocks before, which say how large the grid is.
    """

    name = "cubistmerge"
    summary = "merge neighbours in every row and column, so that the tokens stay a grid (2509.21764)"
    keeps_every_patch = True

    def __init__(self, r_h: int, r_w: int, compat: bool, block: int, earlier: tuple[CubistMerge, ...]) -> None:
        super().__init__()
        self.block = block
        self.r_h = r_h
        self.r_w = r_w
        self.compat = compat
        self.earlier = earlier

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        r_h: int | Sequence[int] = 2,
        r_w: int | Sequence[int] = 2,
        reduce_at: Sequence[int] | None = None,
        compat: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method. The authors compare 1 and 2 rows and columns of 14.

        Args:
            depth: Blocks of the host.
            r_h: Rows to take out of the grid, at most half of them; one value, or one for each block of ``reduce_at``.
            r_w: Columns, likewise.
            reduce_at: 0-based blocks before which tokens merge; None means block 1 of 12, in proportion for another
                depth. A host with windows, which become smaller ones and are restored behind its stages, takes one.
            compat: Lose tokens as the release does where two go into one.
        """
        blocks = check_blocks("reduce_at", spread_blocks((1,), depth) if reduce_at is None else reduce_at, depth)
        check_switch("compat", compat)
        taken = {name: per_block(name, value, blocks) for name, value in (("r_h", r_h), ("r_w", r_w))}
        plan: dict[int, CubistMerge] = {}
        for block in blocks:
            rows, columns = (check_count(name, values[block]) for name, values in taken.items())
            if rows or columns:
                plan[block] = cls(rows, columns, compat, block, tuple(plan.values()))
        return dict(plan)

    @classmethod
    def off(cls) -> Settings:
        return {"r_h": 0, "r_w": 0}

    @classmethod
    def example(cls) -> Settings:
        return {"r_h": 1, "r_w": 1, "reduce_at": (0, 2)}

    @classmethod
    def example_in_windows(cls) -> Settings:
        return {"r_h": 1, "r_w": 1}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        seventh = max(1, int(num_patches**0.5) // 7)  # leaves three quarters of the patches, twice as many half of them
        return [{"r_h": r, "r_w": r} for r in (seventh, 2 * seventh)]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"r_h": r, "r_w": r} for r in range(1, int(num_patches**0.5) // 2 + 1)]]

    @property
    def reduce_at(self) -> list[int]:
        """The merging blocks up to this one, which the grid depends on.

        ``model.settings`` compares it, so that it tells of an earlier reducer that was taken out by hand.
        """
        return [reducer.block for reducer in (*self.earlier, self)]

    def grid_behind(self, grid: Size) -> Size:
        """(h, w) of the tokens behind this reducer on images of a patch grid (H, W).

        Raises:
            ValueError: A grid that cannot lose so many rows or columns, on a host of one size.
        """
        for reducer in (*self.earlier, self):
            grid = reducer.shrunk(grid)
        return grid

    def taken(self, grid: Size) -> Size:
        """Rows and columns that leave a grid: on a host of any size no more than half of them."""
        if not self.any_size:
            for name, r, side in (("r_h", self.r_h, grid[0]), ("r_w", self.r_w, grid[1])):
                if r > side // 2:
                    raise ValueError(
                        f"cubistmerge takes at most every second of {side} rows or columns of the grid, "
                        f"got {name}={r} in block {self.block}; take fewer, or some before a later block"
                    )
        return min(self.r_h, grid[0] // 2), min(self.r_w, grid[1] // 2)

    def shrunk(self, grid: Size) -> Size:
        """What this reducer alone leaves of a grid."""
        r_h, r_w = self.taken(grid)
        return grid[0] - r_h, grid[1] - r_w

    def count_on(self, num_tokens: int, grid: tuple[int, int]) -> int:
        h, w = self.grid_behind(grid)
        return h * w

    def cost(self, at: BlockSizes) -> Change:
        h, w = self.grid_behind(at.grid)
        return Change(h * w, h * w, h * w, 0)

    def cells(self, grid: Size) -> Size:
        return self.shrunk(grid)

    def shrink(self, x: Tensor, images: Tensor) -> CutGrids:
        """Each grid of x (B*nW, H, W, C) with r_h rows and r_w columns less."""
        grid = (x.shape[1], x.shape[2])
        grids = x.shape[0] // images.shape[0]
        merged, target, _ = merge_grid(
            x.flatten(1, 2), grid, *self.taken(grid), self.compat, self.origin("tokens"), grids
        )
        return CutGrids(merged.unflatten(1, self.cells(grid)), target)

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        grid = self.earlier[-1].grid_behind(tokens.grid) if self.earlier else tokens.grid
        r_h, r_w = self.taken(grid)
        if tokens.num_tokens != grid[0] * grid[1] or tokens.present is not None:
            raise ValueError(
                f"cubistmerge in block {self.block} merges neighbours of a whole grid of {grid[0]} x {grid[1]}, got "
                f"{tokens.num_tokens} tokens; train with patch_drop_rate=0"
            )
        if not (r_h or r_w):
            return x, tokens
        prefix, patches = tokens.split(x)
        merged, target, order = merge_grid(patches, grid, r_h, r_w, self.compat, self.origin("tokens"))
        x = torch.cat([prefix, merged], dim=1)
        size = merged_sizes(tokens.size, target, order, tokens.num_prefix)
        cells = (grid[0] - r_h, grid[1] - r_w)
        moved = tokens.relabel(Moved(target, order), cells[0] * cells[1], size=size, keeps_every_patch=True)
        return x, replace(moved, cells=cells)


@fx_leaf
def merged_sizes(size: Tensor | None, target: Tensor, order: Tensor, num_prefix: int) -> Tensor:
    """(B, P+K) patches that each token stands for, 1 for prefix tokens.

    Args:
        size: (B, P+N) those before; None: one each.
        target: (B, N) new place of every old token.
        order: (B, K) old token of each new one.
        num_prefix: P.
    """
    patches = torch.ones_like(target, dtype=torch.float32) if size is None else size[:, num_prefix:]
    sums = torch.zeros_like(order, dtype=patches.dtype).scatter_add(1, target, patches)
    return F.pad(sums, (num_prefix, 0), value=1)
