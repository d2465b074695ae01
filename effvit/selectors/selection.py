"""Selection: the tokens that leave a vision tower, as a value that says which cell of the grid each of them is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.tokens import flat_rows, take_rows

__all__ = ["Packed", "Selection"]


class Packed(NamedTuple):
    """The tokens of all images one after another, without padding.

    Attributes:
        tokens: (T, C).
        cu_seqlens: (B+1,) int32 first token of each image, and their number at the end.
    """

    tokens: Tensor
    cu_seqlens: Tensor


class Selection(NamedTuple):
    """The tokens that leave a vision tower, in image order, and where they are.

    A cell is a patch, or ``merge`` x ``merge`` patches that a merger behind the tower makes one token of. The law every
    method keeps whose tokens have a group: ``group[b, ids[b, k]] == k`` for every token k.

    Attributes:
        tokens: (B, K, C); behind ``counts`` there is padding of zeros.
        ids: (B, K) cell whose position each token has, ascending; a merged token has that of one of its cells. 0 in the
            padding.
        counts: (B,) tokens of each image.
        valid: (B, K) False for padding; None for a method whose count does not depend on the image.
        group: (B, cells) token that each cell is part of, -1 for one that is dropped; None where every token is a
            mixture of all cells.
        grid: (H, W) cells, or (T, H, W) of a video of T frames.
        scores: (B, cells) what the method ranked the cells by, where it did.
        prefix: (B, P, C) class and register tokens as they leave the tower; None where tokens were given.
    """

    tokens: Tensor
    ids: Tensor
    counts: Tensor
    valid: Tensor | None
    group: Tensor | None
    grid: tuple[int, ...]
    scores: Tensor | None = None
    prefix: Tensor | None = None

    def positions(self, start: int = 0) -> Tensor:
        """(B, K, 2) row and column of each token on the dense grid, for rotary positions; (B, K, 3) with the frame.

        They are those of the dense run, never renumbered: the text behind an image goes on from the largest side of
        ``grid``, whatever was kept.

        Args:
            start: Position of the image's first cell, added to each coordinate.
        """
        strides = [math.prod(self.grid[axis + 1 :]) for axis in range(len(self.grid))]
        places = [self.ids // stride % side for side, stride in zip(self.grid, strides, strict=True)]
        return torch.stack(places, dim=-1) + start

    def take(self, other: Tensor) -> Tensor:
        """The rows of the same cells in another tensor (B, cells, ...), such as another block's: (B, K, ...).

        Raises:
            ValueError: Another number of images or cells.
        """
        cells = math.prod(self.grid)
        if other.shape[:2] != (self.ids.shape[0], cells):
            raise ValueError(
                f"take needs a tensor of {self.ids.shape[0]} images and {cells} cells {self.grid}, got shape "
                f"{tuple(other.shape)}; give the full grid in image order, without prefix tokens"
            )
        return take_rows(other, flat_rows(self.ids, cells))

    def packed(self) -> Packed:
        """The tokens without padding, one image after another, as variable-length kernels take them."""
        ends = self.counts.cumsum(0)
        lengths = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        tokens = self.tokens.flatten(0, 1)
        return Packed(tokens if self.valid is None else tokens[self.valid.flatten()], lengths)

    def mask(self) -> Tensor:
        """(B, cells) True for the cells whose position a token has."""
        cells = math.prod(self.grid)
        kept = torch.zeros(self.ids.shape[0], cells, dtype=torch.int64, device=self.ids.device)
        held = torch.ones_like(self.ids) if self.valid is None else self.valid.long()
        return kept.scatter_add(1, self.ids, held) > 0
