"""LLaVA-Mini's compressor: a few learnt queries attend to all tokens (arXiv 2501.03895)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.protocols import Size
from effvit.schedule import check_count
from effvit.selectors.base import Choice, Features, Keep, SelectionSizes, Selector

__all__ = ["QueryPooler", "position_table"]


def position_table(side: int, dim: int) -> Tensor:
    """(side^2, dim) sines and cosines: the first half of the channels from the column, the second from the row."""
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim / 4))
    place = torch.arange(side, dtype=torch.float32)
    phase = torch.outer(place, frequency)  # (side, dim / 4)
    one = torch.cat([phase.sin(), phase.cos()], dim=1)  # (side, dim / 2)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1)


class QueryPooler(Selector):
    """g x g learnt queries attend to all cells (LLaVA-Mini, 2501.03895, ICLR 2025; its vision part).

    llavamini_arch.py@47da113, with its names of parameters. The queries and keys have positions, the keys' a bicubic
    enlargement of the g x g table; the values have none. No residual, no MLP. It runs in front of the projector on the
    tokens of block -2; the official grids are square. Each token is a mixture of all cells, so there are no groups,
    and it has the position of the cell in the middle of its part of the image.

    Args:
        dim: C, channels of the tokens that leave.
        grid_size: g; the paper's images become one token, g = 1.
        num_heads: Heads of the attention.
        in_dim: Channels of the tower's tokens; None: C.
    """

    name = "llava_mini"
    summary = "learnt queries attend to all cells (2501.03895)"
    whole_grid = True
    learns = True

    pos_embed: Tensor

    def __init__(self, dim: int, *, grid_size: int = 2, num_heads: int = 8, in_dim: int | None = None) -> None:
        super().__init__()
        if check_count("dim", dim, 4) % 4 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of 4 and of num_heads={num_heads}, got {dim}")
        self.dim, self.grid_size = dim, check_count("grid_size", grid_size, 1)
        self.in_dim = dim if in_dim is None else check_count("in_dim", in_dim, 1)
        self.query = nn.Parameter(torch.randn(grid_size**2, dim) * 0.02)
        self.register_buffer("pos_embed", position_table(grid_size, dim))  # no parameter, so that nothing decays it
        self.kv_proj = nn.Identity() if self.in_dim == dim else nn.Linear(self.in_dim, dim, bias=False)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(dim), nn.LayerNorm(dim)

    @classmethod
    def untrained(cls, dim: int, **settings: Any) -> QueryPooler:
        """Queries made anew for tokens of ``dim`` channels, which those that leave have too."""
        return cls(dim, **({"in_dim": dim} | settings))

    def count(self, keep: Keep, grid: Size) -> int | None:
        if keep not in (None, self.grid_size**2):
            raise ValueError(
                f"these queries give {self.grid_size**2} tokens, got keep={keep}; leave it out, or make a "
                "QueryPooler of another grid_size"
            )
        if self.grid_size > min(grid):
            raise ValueError(f"{self.grid_size} x {self.grid_size} queries need at least as many cells, got {grid}")
        return self.grid_size**2

    def check(self, kept: int, features: Features) -> None:
        if features.x.shape[2] != self.in_dim:
            raise ValueError(
                f"the queries attend to tokens of {self.in_dim} channels, got {features.x.shape[2]}; make a "
                "QueryPooler with that in_dim"
            )

    def _qkv(self, x: Tensor, grid: Size) -> tuple[Tensor, Tensor, Tensor]:
        values = self.ln_kv(self.kv_proj(x))  # (B, N, C)
        table = self.pos_embed.float().T.unflatten(1, (self.grid_size, self.grid_size)).unsqueeze(0)
        places = F.interpolate(table, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)  # (1, N, C)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(x.shape[0], -1, -1)  # (B, g*g, C)
        return queries, values + places.to(values.dtype), values

    def attend(self, x: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
        """(B, g*g, C) tokens of x (B, H*W, in_dim), and (B, g*g, H*W) their attention, the mean over the heads."""
        out: Tensor
        attention: Tensor
        out, attention = self.attn(*self._qkv(x, grid))
        return out, attention

    def cost(self, at: SelectionSizes) -> int:
        queries, dim = self.grid_size**2, self.dim
        projections = 2 * (queries + at.tokens) * dim**2  # of queries and results, of keys and values
        if self.in_dim != dim:
            projections += at.tokens * self.in_dim * dim
        norms = 5 * (queries + at.tokens) * dim
        positions = 4**2 * at.tokens * dim  # bicubic
        return projections + 2 * queries * at.tokens * dim + norms + positions

    def choose(self, features: Features, kept: int) -> Choice:
        out: Tensor = self.attn(*self._qkv(features.x, features.grid), need_weights=False)[0]
        height, width = features.grid
        middle = 2 * torch.arange(self.grid_size, device=out.device) + 1
        ids = (middle * height // (2 * self.grid_size)).unsqueeze(1) * width + middle * width // (2 * self.grid_size)
        return Choice(ids.flatten().expand(out.shape[0], -1), out, mixed=True)
