"""What a method makes of a batch of small grids, and the way back: for hosts that need their full maps again.

A host with windows cuts its map into windows, which are a batch of small grids of tokens, and takes full grids back. A
method serves all such hosts by one of two forms, and knows nothing of windows:

- Groups (``Reducer.group``): as many tokens of every grid share one, for one block. The host merges what enters
  attention and the MLP, and gives each token what became of its group.
- Smaller grids (``Reducer.shrink``): every grid becomes a smaller one, for any number of blocks, which see a map of
  them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Groups", "SmallGrids"]


class Groups(Protocol):
    """Which tokens of each grid share one, as many groups in every grid."""

    @property
    def anchor(self) -> Tensor:
        """(B, K) token of the grid whose position each group keeps."""

    @property
    def target(self) -> Tensor:
        """(B, N) group of each token."""

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, C) -> means of the groups (B, K, C), and what each counts for as a key, None for one."""
        ...

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets what its group became: y (B, K, C) -> (B, N, C)."""
        ...


class SmallGrids(Protocol):
    """Smaller grids in place of larger ones."""

    @property
    def x(self) -> Tensor:
        """(B, h, w, C) tokens of the smaller grids."""

    def restore(self, z: Tensor) -> Tensor:
        """The full grids (B, H*W, C), given what became of the tokens of the smaller ones, z (B, h*w, C)."""
        ...

    def labels(self) -> Tensor:
        """(B, H*W) token of the smaller grid that each of the full one is most like, for images of tokens."""
        ...
