"""The dumbbell unit of STViT-R on Swin (arXiv 2303.08685): fewer tokens for some layers, then all of them again.

A unit is a window-attention block on image tokens X, two layers of the semantic token generation module (STGM)
that make a few tokens S of each window, blocks on S alone, and a recovery in which X attends to S. Maps go in and out,
so units can be stacked, and used in any stage of a pyramid. Everything is in the layout (B, H, W, C).

Two forms exist, and weights of one run in the other:

* of classification (changsn/STViT-R@b4a27a0, models/layers.py): the first STGM layer attends to a window of keys near
  its own, the second and the recovery to all tokens there are;
* of dense tasks (changsn/STViT-R-Object-Detection@8b8eb1e, mmdet/models/backbones/layers.py), key_windows="dense":
  both STGM layers and the recovery ask windows, so that the cost grows with the size of the map alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from timm.layers import RelPosBias, resample_abs_pos_embed
from torch import Tensor, nn

from effvit.architectures.semantic_tokens import SEED_POOLS, LearnedSeeds, SemanticBlock, max_seeds, seed_terms
from effvit.layers.cross_attention import CrossBlock, CrossSettings, SharedSettings, WindowCrossBlock
from effvit.layers.macs import Terms, cross_block, layers, window_cross, windows
from effvit.layers.windows import (
    from_windows,
    inside_windows,
    key_mask,
    live_cells,
    num_windows,
    resize_bias_table,
    to_windows,
)
from effvit.protocols import Factory, Size
from effvit.recording import is_exported
from effvit.recover import RestoreBlock, TokenRecovery
from effvit.schedule import check_choice, check_switch
from effvit.tokens import fx_leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "KEY_WINDOWS",
    "DumbbellUnit",
    "GroupBlock",
    "Recovery",
    "SemanticLayers",
    "WindowSeedBlock",
    "check_key_windows",
    "recovery_terms",
]

KEY_WINDOWS = ("inside", "cls", "dense")

Recovery: TypeAlias = RestoreBlock | TokenRecovery
"""Gives the image tokens back: by windows or, for short sequences, from all semantic tokens."""


def check_key_windows(key_windows: str, use_global: bool, relative_pos: bool) -> None:
    """Raise a ValueError for an unknown form, or for settings that need a grid of fixed size where none is."""
    check_choice("key_windows", key_windows, KEY_WINDOWS)
    for name, value in (("use_global", use_global), ("relative_pos", relative_pos)):
        if check_switch(name, value) and key_windows == "dense":
            raise ValueError(
                f"{name}=True holds a table for a semantic grid of one size, which key_windows='dense' does not have; "
                f"use key_windows='inside' or {name}=False"
            )


@fx_leaf
def check_grid(s: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """The map s (B, h, w, C), if tables for a grid of another size than (h, w) are not to be used on it."""
    if grid is not None and tuple(s.shape[1:3]) != tuple(grid):
        raise ValueError(
            f"use_global and relative_pos hold tables for {grid[0]} x {grid[1]} semantic tokens, but the image has "
            f"{s.shape[1]} x {s.shape[2]}; call model.set_input_size with the size of the image"
        )
    return s


@fx_leaf
def seed_map(seeds: Tensor, image: Sequence[int], window: int, samples: int, live: bool) -> Tensor:
    """Seeds of windows (B * nW, samples², C) as a map (B, h, w, C); ``live`` leaves out those of padding alone."""
    full = [num_windows(side, window) * samples for side in image]
    rows, columns = [live_cells(side, window, samples) for side in image] if live else full
    return from_windows(seeds, samples, full)[:, :rows, :columns]


@fx_leaf
def masked_bias(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One additive mask of a relative position bias (1, heads, N, N) and a mask (B * nW, 1, 1, N), True for keys."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, float("-inf"))


class WindowSeedBlock(WindowCrossBlock):
    """A layer of the STGM on windows: the semantic tokens of a window attend to the image tokens in and around it.

    Without semantic tokens given, seeds are pooled from each window.

    Args:
        dim: Channels.
        num_heads: Heads.
        window: Side of a window of image tokens.
        samples: Side of its semantic tokens.
        kernel: Side of the key windows; unused with key_windows="cls".
        key_windows: "dense": windows hang over the border, with ``mask_mode``, and hold image tokens alone.
            "inside" and "cls": windows lie on the map, and a window's own seeds are keys too.
        mask_mode: As for ``WindowCrossBlock``. With "correct", padding has no part in seeds and no seeds of its own.
        residual: Add the seeds to what their attention returns.
        use_conv_pos: Add a depth-wise 3 x 3 convolution of the seeds of each window to them.
        seed_pool: "max", as released, or "learned" (see ``LearnedSeeds``).
        pools: Whether seeds are pooled here at all; else ``use_conv_pos`` and ``seed_pool`` have no effect.
        kwargs: Those of ``CrossBlock``.

    Raises:
        ValueError: An unknown ``seed_pool``, or more semantic than image tokens in a window.
    """

    CLS_KERNEL, CLS_STRIDE = 10, 4  # literals of the released classification code

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 7,
        samples: int = 3,
        kernel: int = 10,
        key_windows: str = "inside",
        mask_mode: str = "correct",
        residual: bool = True,
        use_conv_pos: bool = False,
        seed_pool: str = "max",
        pools: bool = True,
        **kwargs: Unpack[CrossSettings],
    ) -> None:
        super().__init__(dim, num_heads, samples, window, kernel, mask_mode, **kwargs)
        check_key_windows(key_windows, False, False)
        if seed_pool not in SEED_POOLS:
            raise ValueError(f"seed_pool must be {' or '.join(map(repr, SEED_POOLS))}, got {seed_pool!r}")
        if not 0 < samples <= window:
            raise ValueError(f"window_samples must be in [1, {window}], the side of a window, got {samples}")
        dd: Factory = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.key_form, self.residual = key_windows, residual
        self.pool = LearnedSeeds(dim, **dd) if pools and seed_pool == "learned" else None
        self.conv_pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pools and use_conv_pos else None

    def seeds(self, x: Tensor) -> Tensor:
        """P (B, h, w, C) of image tokens x (B, H, W, C): ``samples`` rows and columns for each window."""
        samples, window = self.window, self.stride
        correct = self.mask_mode == "correct"
        pool = max_seeds if self.pool is None else self.pool
        seeds = pool(to_windows(x, window, edge=correct), (window, window), (samples, samples))  # (B * nW, s², C)
        if self.conv_pos is not None:
            grid = seeds.transpose(1, 2).unflatten(2, (samples, samples))  # (B * nW, C, s, s)
            seeds = (grid + self.conv_pos(grid)).flatten(2).transpose(1, 2)  # (B * nW, s², C)
        return seed_map(seeds, x.shape[1:3], window, samples, live=correct)

    def forward(self, x: Tensor, s: Tensor | None = None) -> Tensor:  # type: ignore[override]  # maps
        """Image tokens x (B, H, W, C), and semantic tokens s (B, h, w, C) of an earlier layer -> (B, h, w, C)."""
        s = self.seeds(x) if s is None else s
        y = self.cross(s, x, x.shape[1:3], self.stride) if self.key_form == "dense" else self._cross_inside(s, x)
        return self.feedforward(s + self.drop_path1(y) if self.residual else y)

    def _cross_inside(self, s: Tensor, x: Tensor) -> Tensor:
        """The attention branch with key windows on the map, and a window's own seeds as keys: (B, h, w, C)."""
        literal = self.key_form == "cls"
        kernel, stride = (self.CLS_KERNEL, self.CLS_STRIDE) if literal else (self.kernel, None)
        y: Tensor = self.norm1(s)
        q = to_windows(self.attn.q(y), self.window)  # (B * nW, s², C)
        own = to_windows(self.attn.kv(y), self.window)  # (B * nW, s², 2C)
        near = inside_windows(self.attn.kv(self.norm1(x)), self.stride, kernel, stride)  # (B * nW, kH * kW, 2C)
        kv = torch.cat([own, near], dim=1)  # (B * nW, s² + kH * kW, 2C)
        y = from_windows(self.attn.mix(q, kv, own_keys_mask(s, self.window, kv)), self.window, s.shape[1:3])
        return self.ls1(self.attn.project(y))


@fx_leaf
def own_keys_mask(s: Tensor, samples: int, kv: Tensor) -> Tensor | None:
    """Mask of the keys (B * nW, Nk, 2C) whose first samples² are the window's semantic tokens, some of them padding."""
    mask = key_mask(s, samples, samples)
    if mask is None:
        return None
    rest = mask.new_ones((mask.shape[0], 1, 1, kv.shape[1] - mask.shape[3]))
    return torch.cat([mask, rest], dim=3)  # (B * nW, 1, 1, Nk)


class GroupBlock(CrossBlock):
    """Self-attention of semantic tokens: among the ones of a window, or among all.

    Args:
        dim: Channels.
        num_heads: Heads.
        samples: Side of the groups, the semantic tokens of one window; None for one group of all tokens.
        bias_grid: (h, w) that a relative position bias is learned for; None for no bias.
        kwargs: Those of ``CrossBlock``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        samples: int | None = None,
        bias_grid: tuple[int, int] | None = None,
        **kwargs: Unpack[CrossSettings],
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.samples = samples
        dd: Factory = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.rel_pos = None if bias_grid is None else RelPosBias(bias_grid, num_heads, **dd)

    def set_bias_grid(self, grid: tuple[int, int]) -> None:
        """Resample the relative position bias to another grid (h, w)."""
        old: Any = self.rel_pos
        table = old.relative_position_bias_table
        new = RelPosBias(grid, self.attn.num_heads, device=table.device, dtype=table.dtype)
        # Contiguous, as .safetensors asks for.
        resized = resize_bias_table(table.detach(), old.window_size, grid)
        new.relative_position_bias_table = nn.Parameter(resized.contiguous(), requires_grad=table.requires_grad)
        self.rel_pos = new

    def forward(self, s: Tensor) -> Tensor:  # type: ignore[override]  # one map, queries and keys
        """Semantic tokens (B, h, w, C) -> (B, h, w, C)."""
        y: Tensor = self.norm1(s)
        q: Tensor = self.attn.q(y)
        kv: Tensor = self.attn.kv(y)
        bias: Tensor | None = None if self.rel_pos is None else self.rel_pos.get_bias()
        if bias is not None and is_exported():
            bias = bias.detach()  # for a mask with gradient, torch 2.11 traces one kernel and exports another's layout
        if self.samples is None:
            y = self.attn.mix(q.flatten(1, 2), kv.flatten(1, 2), bias).view_as(q)  # (B, h, w, C)
        else:
            q, kv = to_windows(q, self.samples), to_windows(kv, self.samples)  # (B * nW, s², C), (B * nW, s², 2C)
            mask = masked_bias(bias, key_mask(s, self.samples, self.samples))
            y = from_windows(self.attn.mix(q, kv, mask), self.samples, s.shape[1:3])  # (B, h, w, C)
        y = self.drop_path1(self.ls1(self.attn.project(y)))
        return self.feedforward(s + y)

    def closed_form(self, grid: Size) -> Terms:
        """MACs by term for a grid (h, w) of semantic tokens."""
        tokens = grid[0] * grid[1]
        pairs = tokens**2 if self.samples is None else windows(grid, self.samples) * self.samples**4
        return cross_block(self, tokens, tokens, pairs, normed=tokens)


class SeedSettings(TypedDict):
    """Keywords of ``WindowSeedBlock`` that both layers of the STGM share."""

    window: int
    samples: int
    key_windows: str
    mask_mode: str


class SemanticLayers(nn.Module):
    """From image tokens to semantic tokens: two layers of the STGM, then blocks on the semantic tokens alone.

    The blocks attend within the semantic tokens of a window and among all of them, in turn.

    Args:
        dim: Channels.
        num_heads: Heads.
        drop_path: Rate of stochastic depth of each layer; their number is that of the layers, at least 2.
        window: Side of a window of image tokens.
        samples: Side of its semantic tokens.
        kernels: Sides of the key windows of the two STGM layers.
        key_windows: One of KEY_WINDOWS, as for ``WindowSeedBlock``. In all but "dense", the second layer asks all
            image and semantic tokens.
        grid: (h, w), all semantic tokens of an image; only for ``use_global`` and ``relative_pos``.
        shortcut: Add the seeds to the attention of the first layer. The second always has a residual.
        use_global: Add learned global cluster centres to the queries of the second layer.
        relative_pos: Learn a relative position bias in the blocks on semantic tokens.
        use_conv_pos: As for ``WindowSeedBlock``.
        seed_pool: As for ``WindowSeedBlock``.
        mask_mode: As for ``WindowCrossBlock``.
        kwargs: Those of ``CrossBlock``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        window: int = 7,
        samples: int = 3,
        kernels: Sequence[int] = (10, 10),
        key_windows: str = "inside",
        grid: tuple[int, int] = (6, 6),
        shortcut: bool = True,
        use_global: bool = False,
        relative_pos: bool = False,
        use_conv_pos: bool = False,
        seed_pool: str = "max",
        mask_mode: str = "correct",
        **kwargs: Unpack[SharedSettings],
    ) -> None:
        super().__init__()
        check_key_windows(key_windows, use_global, relative_pos)
        self.grid = grid if use_global or relative_pos else None
        form: SeedSettings = {"window": window, "samples": samples, "key_windows": key_windows, "mask_mode": mask_mode}
        self.stgm1 = WindowSeedBlock(
            dim,
            num_heads,
            kernel=kernels[0],
            residual=shortcut,
            use_conv_pos=use_conv_pos,
            seed_pool=seed_pool,
            drop_path=drop_path[0],
            **form,
            **kwargs,
        )
        self.stgm2: WindowSeedBlock | SemanticBlock
        if key_windows == "dense":
            self.stgm2 = WindowSeedBlock(
                dim, num_heads, kernel=kernels[1], pools=False, drop_path=drop_path[1], **form, **kwargs
            )
        else:
            centres = grid[0] * grid[1] if use_global else 0
            self.stgm2 = SemanticBlock(dim, num_heads, centres, drop_path=drop_path[1], **kwargs)
        self.blocks = nn.Sequential(
            *(
                GroupBlock(
                    dim,
                    num_heads,
                    samples=None if i % 2 else samples,
                    bias_grid=(grid if i % 2 else (samples, samples)) if relative_pos else None,
                    drop_path=rate,
                    **kwargs,
                )
                for i, rate in enumerate(drop_path[2:])
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Image tokens (B, H, W, C) -> semantic tokens (B, h, w, C)."""
        s = check_grid(self.stgm1(x), self.grid)  # (B, h, w, C)
        if isinstance(self.stgm2, SemanticBlock):
            s = self.stgm2(s.flatten(1, 2), x.flatten(1, 2))[0].view_as(s)  # (B, h, w, C)
        else:
            s = self.stgm2(x, s)
        return self.blocks(s)

    def assignment(self, x: Tensor) -> Tensor:
        """Shares (B, H*W, Ns) of the semantic tokens in image tokens x (B, H, W, C), each row of which sums to 1.

        Raises:
            ValueError: Key windows that do not give every image token its shares.
        """
        if not isinstance(self.stgm2, SemanticBlock):
            raise ValueError(
                "the semantic tokens of key_windows='dense' attend inside of windows and have no share in most "
                "patches; create the model with key_windows='inside'"
            )
        s = check_grid(self.stgm1(x), self.grid)  # (B, h, w, C)
        shares: Tensor = self.stgm2(s.flatten(1, 2), x.flatten(1, 2), True)[1]
        return shares

    def closed_form(self, size: Size) -> tuple[Terms, Size]:
        """MACs by term for a map of (H, W) image tokens, and the grid (h, w) of the semantic tokens made of it."""
        first = self.stgm1
        samples, window = first.window, first.stride
        number = windows(size, window)
        if first.mask_mode == "correct":
            grid = live_cells(size[0], window, samples), live_cells(size[1], window, samples)
        else:
            grid = -(-size[0] // window) * samples, -(-size[1] // window) * samples
        tokens, patches = grid[0] * grid[1], size[0] * size[1]
        terms = seed_terms(first.pool, (window, window), (samples, samples), number)
        if first.conv_pos is not None:
            terms += layers("pooling", first.conv_pos, number * samples**2)
        if first.key_form == "dense":
            assert isinstance(self.stgm2, WindowSeedBlock)
            terms += window_cross(first, grid, size) + window_cross(self.stgm2, grid, size)
        else:
            kernel = first.CLS_KERNEL if first.key_form == "cls" else first.kernel
            near = min(kernel, size[0]) * min(kernel, size[1])
            pairs = number * samples**2 * (samples**2 + near)
            terms += cross_block(first, tokens, tokens + patches, pairs, normed=tokens + patches)
            assert isinstance(self.stgm2, SemanticBlock)
            terms += cross_block(self.stgm2, tokens, tokens + patches, normed=2 * tokens + patches)
        for block in self.blocks:
            assert isinstance(block, GroupBlock)
            terms += block.closed_form(grid)
        return terms, grid

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample global centres and relative position biases to another semantic grid (h, w)."""
        if self.grid is None or grid == self.grid:
            return
        for block in self.blocks:
            if block.rel_pos is not None and block.samples is None:
                block.set_bias_grid(grid)
        centres = getattr(self.stgm2, "global_centres", None)
        if centres is not None:
            self.stgm2.global_centres = nn.Parameter(
                resample_abs_pos_embed(centres.detach(), grid, self.grid, num_prefix_tokens=0),
                requires_grad=centres.requires_grad,
            )
        self.grid = grid


class DumbbellUnit(nn.Module):
    """A block on image tokens, the layers on semantic tokens made of them, and the recovery of the image tokens.

    Args:
        block: A block on image tokens, (B, H, W, C) -> (B, H, W, C).
        semantic: Makes semantic tokens (B, h, w, C) of them.
        recover: Gives the image tokens back: by windows or, for short sequences, from all semantic tokens.
    """

    def __init__(self, block: nn.Module, semantic: SemanticLayers, recover: Recovery) -> None:
        super().__init__()
        self.block, self.semantic, self.recover = block, semantic, recover

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        s: Tensor = self.semantic(x)  # (B, h, w, C)
        if isinstance(self.recover, RestoreBlock):
            return self.recover(x, s)
        return self.recover(x.flatten(1, 2), s.flatten(1, 2)).view_as(x)  # (B, H, W, C)

    def assignment(self, x: Tensor) -> Tensor:
        """As of ``SemanticLayers``, for the map x (B, H, W, C) that comes in."""
        return self.semantic.assignment(self.block(x))


def recovery_terms(block: Recovery, size: Size, semantic: Size) -> Terms:
    """MACs by term of image tokens that attend to the semantic tokens."""
    if isinstance(block, RestoreBlock):
        return window_cross(block, size, semantic)
    return cross_block(block, size[0] * size[1], semantic[0] * semantic[1])
