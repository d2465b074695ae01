"""Square windows of maps (B, H, W, C): disjoint, shifted and overlapping ones, their masks, and cells inside them.

Maps of any size are cut after padding to whole windows at the bottom and right, as Swin's detection code does. Keys
of overlapping windows are gathered, whole tokens at a time, after they were projected: one copy, no padding, and the
backward pass is an addition of rows.

Windows here are counted in raster order and are a batch: (B * nH * nW, tokens, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

from effvit.tokens import fix_traced_size, fx_leaf

__all__ = [
    "MASK_MODES",
    "cell_of_position",
    "from_windows",
    "inside_windows",
    "key_mask",
    "live_cells",
    "near_mask",
    "num_windows",
    "overlapping_windows",
    "resize_bias_table",
    "shift_mask",
    "spread_cells",
    "to_windows",
]

MASK_MODES = ("correct", "official", "none")
Size = Sequence[int]  # (H, W): also a torch.Size


def num_windows(side: int, window: int) -> int:
    """Windows that cover ``side`` positions, the last of them partly if need be."""
    return (side + window - 1) // window  # not -(-side // window): torch 2.11 fails on symbols below 0


def window_sides(window: int | Size) -> tuple[int, int]:
    """Rows and columns of a window that may be given by one number for both."""
    rows, columns = (window, window) if isinstance(window, int) else window
    return rows, columns


def shift_of(side: int, window: int, shift: int, shift_small: bool) -> int:
    """The shift along a side: none where one window covers it, unless ``shift_small``."""
    return shift if shift_small or side > window else 0


@fx_leaf
def to_windows(x: Tensor, window: int | Size, shift: int = 0, shift_small: bool = True, edge: bool = False) -> Tensor:
    """Disjoint windows of a map.

    Args:
        x: (B, H, W, C), padded to whole windows at the bottom and right.
        window: Side of a window, or its rows and columns.
        shift: Positions the padded map is rolled up and left before it is cut (Swin's shifted windows).
        shift_small: Roll sides that a single window covers, too.
        edge: Pad with copies of the last row and column instead of zeros.

    Returns:
        (B * nW, window * window, C).
    """
    x = fix_traced_size(x, 1, 2)
    height, width = x.shape[1:3]
    sides = window_sides(window)
    rows, columns = (num_windows(side, w) * w for side, w in zip((height, width), sides, strict=True))
    if (rows, columns) != (height, width):
        if edge:
            x = x.index_select(1, torch.arange(rows, device=x.device).clamp(max=height - 1))  # (B, rows, W, C)
            x = x.index_select(2, torch.arange(columns, device=x.device).clamp(max=width - 1))  # (B, rows, columns, C)
        else:
            x = F.pad(x, (0, 0, 0, columns - width, 0, rows - height))  # (B, rows, columns, C)
    up, left = (shift_of(side, w, shift, shift_small) for side, w in zip((height, width), sides, strict=True))
    if up or left:
        x = x.roll((-up, -left), (1, 2))
    return window_partition(x, sides).flatten(1, 2)


@fx_leaf
def from_windows(windows: Tensor, window: int | Size, size: Size, shift: int = 0, shift_small: bool = True) -> Tensor:
    """The map (B, H, W, C) of ``size`` (H, W) that ``to_windows`` cut into (B * nW, window * window, C)."""
    height, width = size
    sides = window_sides(window)
    rows, columns = (num_windows(side, w) * w for side, w in zip((height, width), sides, strict=True))
    x = window_reverse(windows.unflatten(1, sides), sides, rows, columns)  # (B, rows, columns, C)
    up, left = (shift_of(side, w, shift, shift_small) for side, w in zip((height, width), sides, strict=True))
    if up or left:
        x = x.roll((up, left), (1, 2))
    return x[:, :height, :width]


@fx_leaf
def shift_mask(x: Tensor, window: int, shift: int, shift_small: bool = True) -> Tensor:
    """(nW, N, N) of x's dtype with N = window²: -100 between parts of a shifted window that are no neighbours.

    The parts and the value are Swin's (2103.14030); padded positions belong to the part they border on.
    """

    def parts(side: int) -> Tensor:
        padded, e = num_windows(side, window) * window, shift_of(side, window, shift, shift_small)
        position = torch.arange(padded, device=x.device)
        part = (position >= padded - window).int() + (position >= padded - e).int()
        return part if e else torch.zeros_like(part)

    part = 3 * parts(x.shape[1])[:, None] + parts(x.shape[2])  # (H, W)
    part = window_partition(part[None, :, :, None], (window, window)).flatten(1)  # (nW, N)
    apart = part[:, :, None] != part[:, None, :]  # (nW, N, N)
    return x.new_zeros(apart.shape).masked_fill(apart, -100.0)


def window_positions(side: int, kernel: int, stride: int, device: torch.device) -> Tensor:
    """(n, kernel) positions along a side of the overlapping windows, each centred on its ``stride`` positions.

    A difference that is odd leans to the end. Positions below 0 and from ``side`` on are outside the map.
    """
    start = torch.arange(num_windows(side, stride), device=device) * stride - (kernel - stride) // 2
    return start[:, None] + torch.arange(kernel, device=device)


def gather_windows(x: Tensor, rows: Tensor, columns: Tensor, border: Tensor | None = None) -> Tensor:
    """Tokens of x (B, H, W, C) at rows (nH, kH) and columns (nW, kW): (B * nH * nW, kH * kW, C), in one copy.

    Positions outside the map get the token ``border`` (C,), or without one that of the nearest position.
    """
    height, width = x.shape[1:3]
    index = rows.clamp(0, height - 1)[:, None, :, None] * width + columns.clamp(0, width - 1)[None, :, None, :]
    windows = x.flatten(1, 2).index_select(1, index.flatten())  # (B, nH * nW * kH * kW, C)
    if border is not None:
        # Not one more row to gather: the gradients of thousands of border keys would be added up one by one.
        windows = torch.where(_inside(rows, columns, height, width).reshape(-1, 1), windows, border)
    return windows.reshape(-1, index.shape[2] * index.shape[3], x.shape[3])


def _inside(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """(nH, nW, kH, kW): whether a position is on the map."""
    inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    return inside_rows[:, None, :, None] & inside_columns[None, :, None, :]


@fx_leaf
def overlapping_windows(x: Tensor, kernel: int, stride: int, border: Tensor | None = None) -> Tensor:
    """Windows of kernel x kernel tokens around each stride x stride tokens of a map.

    Args:
        x: (B, H, W, C); windows cover it as if it were padded to whole strides.
        kernel: Side of a window.
        stride: Side of what a window is centred on.
        border: (C,) token of positions outside the map. None: the nearest one on it, for keys that are masked.

    Returns:
        (B * nW, kernel * kernel, C).
    """
    rows, columns = (window_positions(side, kernel, stride, x.device) for side in x.shape[1:3])
    return gather_windows(x, rows, columns, border)


@fx_leaf
def inside_windows(x: Tensor, window: int, kernel: int, stride: int | None = None) -> Tensor:
    """Windows of at most kernel x kernel tokens near each window x window tokens, moved so that they stay on the map.

    On a 14 x 14 map with windows of 7 and a kernel of 10 these are the key windows of the released classification
    code, which start at 0 and 4. They need no mask on maps of any size.

    Args:
        x: (B, H, W, C).
        window: Side of the windows they belong to.
        kernel: Side of the key windows; all of a side that is shorter.
        stride: Start the windows at multiples of it instead, as the released code does whatever the map.

    Returns:
        (B * nW, kH * kW, C).

    Raises:
        ValueError: With ``stride``, the map has another number of such windows than of windows.
    """
    positions = []
    for side in x.shape[1:3]:
        n, k = num_windows(side, window), min(kernel, side)
        start = torch.arange(n, device=x.device)
        if stride is None:
            start = (start * window - (kernel - window) // 2).clamp(0, side - k)
        elif side % window or (side - kernel) // stride + 1 != n or side < kernel:
            raise ValueError(
                f"key_windows='cls' takes the {kernel} x {kernel} key windows at a stride of {stride} that the "
                f"released classification code has, but a {x.shape[1]} x {x.shape[2]} map does not have one for each "
                f"of its windows of {window}; use key_windows='inside', which is the same on a 14 x 14 map with "
                "windows of 7 and fits all others, or 'dense'"
            )
        else:
            start = start * stride
        positions.append(start[:, None] + torch.arange(k, device=x.device))
    return gather_windows(x, *positions)


@fx_leaf
def key_mask(
    x: Tensor, kernel: int, stride: int, mode: str = "correct", image: Size = (0, 0), window: int = 1
) -> Tensor | None:
    """Mask for attention to ``overlapping_windows`` of a map: (B * nW, 1, 1, kernel²), or None where none is needed.

    "correct": True for keys on the map, the rest gets no attention. "none": no mask, so that all queries attend to
    what is outside. "official": what the released detection code adds to the logits (mmdet/models/backbones/
    layers.py@8b8eb1e of changsn/STViT-R-Object-Detection), for agreement with it: -1000 outside of the *padded* map,
    and inside it only where the padding of rows and that of columns meet. Where either of the two is not padded at
    all, its slice ``-0:`` is the whole side; on the semantic grid the padding is counted in image tokens.

    Args:
        x: The map of keys (B, H, W, C).
        kernel: Side of a key window.
        stride: Side of what it is centred on.
        mode: One of MASK_MODES.
        image: (H, W) of the map of image tokens; only for "official".
        window: Side of its windows; only for "official".
    """
    if mode == "none":
        return None
    sides = x.shape[1:3]
    rows, columns = (window_positions(side, kernel, stride, x.device) for side in sides)
    if mode == "correct":
        if kernel == stride and not any(side % stride for side in sides):
            return None
        mask = _inside(rows, columns, *sides)
    else:
        height, width = (num_windows(side, stride) * stride for side in sides)
        pad_rows, pad_columns = (-side % window for side in image)
        late_rows = rows >= (height - pad_rows if pad_rows else -kernel)
        late_columns = columns >= (width - pad_columns if pad_columns else -kernel)
        masked = ~_inside(rows, columns, height, width)
        masked = masked | (late_rows[:, None, :, None] & late_columns[None, :, None, :])
        mask = x.new_zeros(masked.shape).masked_fill(masked, -1000.0)
    mask = mask.flatten(2).flatten(0, 1)  # (nW, kernel²)
    return mask.expand(x.shape[0], -1, -1).reshape(-1, 1, 1, mask.shape[1])


def near_mask(x: Tensor, y: Tensor, window: int, stride: int, kernel: int) -> Tensor | None:
    """(H * W, h * w): True for keys of y in the key window of a query of x; None if that is all of them.

    The mask that makes attention to a whole map that to its ``overlapping_windows``, of real keys alone.

    Args:
        x: The map of queries (B, H, W, C).
        y: The map of keys (B, h, w, C).
        window: Side of the windows of queries.
        stride: Side of the same windows on the map of keys.
        kernel: Side of the key windows.
    """
    near, all_near = [], True
    for queries, keys in zip(x.shape[1:3], y.shape[1:3], strict=True):
        before = (kernel - stride) // 2
        last = (num_windows(queries, window) - 1) * stride - before
        all_near = all_near and last <= 0 and kernel - before >= keys
        start = torch.div(torch.arange(queries, device=x.device), window, rounding_mode="floor") * stride - before
        key = torch.arange(keys, device=x.device)
        near.append((key >= start[:, None]) & (key < start[:, None] + kernel))
    if all_near:
        return None
    rows, columns = near
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def live_cells(side: int, window: int, samples: int) -> int:
    """Cells along a side that hold a real position, if each window of the padded side has ``samples`` of them.

    Cell i of a window covers floor(i w / s) to ceil((i + 1) w / s), as in adaptive pooling.
    """
    return -(-side * samples // window)  # no comparison of sides, which a trace would record as a sum of truth values


def cell_of_position(side: int, window: int, samples: int, device: torch.device) -> Tensor:
    """(side,) int64: the cell each position belongs to, if a window is shared out evenly among its cells."""
    position = torch.arange(side, device=device)
    start = torch.div(position, window, rounding_mode="floor")
    inside = position - start * window
    return start * samples + torch.div(inside * samples, window, rounding_mode="floor")


@fx_leaf
def spread_cells(s: Tensor, size: Size, window: int, samples: int, merged: int = 1) -> Tensor:
    """Each position of a map gets the token of the cell it lies in: s (B, h, w, C) -> (B, H, W, C).

    Args:
        s: One token a cell.
        size: (H, W).
        window: Positions along a window.
        samples: Cells along a window.
        merged: Cells along a side that were merged into one since, as were the positions.
    """
    for dim, side in enumerate(size, start=1):
        cell = cell_of_position(side * merged, window, samples, s.device)[::merged]
        s = s.index_select(dim, torch.div(cell, merged, rounding_mode="floor"))  # (B, H, w, C), then (B, H, W, C)
    return s


def resize_bias_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """A relative position bias table ((2h-1)(2w-1), heads) for another window (h, w), bicubic as in Swin's code.

    timm's own resampling needs an indexing that torch has deprecated.
    """
    sides, target = [2 * side - 1 for side in old], [2 * side - 1 for side in new]
    grid = table.transpose(0, 1).unflatten(1, sides).unsqueeze(0)  # (1, heads, 2h-1, 2w-1)
    return F.interpolate(grid, target, mode="bicubic")[0].flatten(1).transpose(0, 1)
