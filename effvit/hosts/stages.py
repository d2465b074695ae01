"""What becomes of each patch of an image in one block, as arrays: what a model tells of its tokens, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from effvit.tokens import TokenMap

__all__ = ["ALONE", "DROPPED", "FUSED", "MERGED", "SOFT", "Stage", "map_stage", "soft_stage"]

DROPPED, ALONE, MERGED, FUSED, SOFT = range(5)


@dataclass(frozen=True, eq=False)
class Stage:
    """The patches of one image as the tokens of a block have them.

    Attributes:
        block: Number of the block that makes these tokens; in pyramids counted through all stages.
        tokens: N, their number without prefix tokens.
        labels: (H, W) int64, the token that carries each patch, -1 where it was dropped; of soft tokens the one with
            the largest share. Pyramids have the map of their stage in place of the patches.
        fused: (N,) True for tokens that sum up patches without standing for them; None: there are none.
        assignment: (H, W, N) share that each soft token has in each patch; None where a patch has one token at most.
            What super tokens outside the map hold of a pixel is lost, all other shares sum to 1.
        handed_over: The tokens leave a tower behind this block, and the labels are those of cells.
    """

    block: int
    tokens: int
    labels: np.ndarray
    fused: np.ndarray | None = None
    assignment: np.ndarray | None = None
    handed_over: bool = False

    @property
    def soft(self) -> bool:
        """Whether every patch is a mixture of several tokens."""
        return self.assignment is not None

    @property
    def states(self) -> np.ndarray:
        """(H, W) what became of each patch: DROPPED, ALONE, MERGED, FUSED, or SOFT for all of them."""
        if self.soft:
            return np.full(self.labels.shape, SOFT)
        carried = self.labels >= 0
        members = np.bincount(self.labels[carried], minlength=1)
        states = np.full(self.labels.shape, DROPPED)
        states[carried] = np.where(members[self.labels[carried]] > 1, MERGED, ALONE)
        if self.fused is not None:
            states[carried & self.fused[self.labels]] = FUSED
        return states


def map_stage(tokens: TokenMap, block: int = 0) -> Stage:
    """The first image of a TokenMap."""
    fused = None if tokens.fused is None else tokens.fused[0].cpu().numpy()
    return Stage(block, int(tokens.counts()[0]), tokens.labels()[0].cpu().numpy(), fused)


def soft_stage(block: int, assignment: Tensor, grid: tuple[int, int]) -> Stage:
    """The stage of soft tokens with shares (H*W, N) of the patches."""
    shares = assignment.unflatten(0, grid).float().cpu().numpy()  # (H, W, N)
    return Stage(block, shares.shape[-1], shares.argmax(-1), assignment=shares)
