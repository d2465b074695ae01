"""What blocks cost at each number of tokens, measured once, so that schedules can be compared before they are timed.

On a device, latency does not fall in proportion to the tokens: kernels work on tiles, and a short sequence leaves them
idle. A schedule is predicted from the dense blocks at the token counts it leaves; what its method adds is known from
the schedule it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from torch import Tensor, nn

from effvit.measure.ideal import IDEAL_HOSTS, PlainViT, plain_parts
from effvit.measure.values import Staircase
from effvit.protocols import Layer, Settings, Size
from effvit.reducers import METHODS

__all__ = ["FewTokens", "predicted", "shortened", "staircase_of", "staircase_of_macs", "token_counts"]

STEPS = 6  # token counts that are measured, in equal distances up to all patches


class FewTokens(nn.Module):
    """A plain ViT that runs some of its blocks on its first tokens alone.

    Args:
        dense: The ViT, of a class in ``IDEAL_HOSTS``.
        count: Patch tokens that enter the first block.
        depth: Blocks that are run.
    """

    dense: PlainViT

    def __init__(self, dense: nn.Module, count: int, depth: int) -> None:
        super().__init__()
        self.dense = cast("PlainViT", dense)
        self.count = count
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense.norm_pre(self.dense._pos_embed(self.dense.patch_embed(x)))
        x = x[:, : self.dense.num_prefix_tokens + self.count]
        for block in self.dense.blocks[: self.depth]:
            x = cast("Layer", block)(x)
        return self.dense.forward_head(self.dense.norm(x))


def shortened(dense: nn.Module) -> dict[int, nn.Module]:
    """Patch tokens -> the host on so many in all its blocks, 0 for none of the blocks; empty for another host."""
    if type(dense) not in IDEAL_HOSTS:
        return {}
    host = cast("PlainViT", dense)
    depth, patches = len(host.blocks), host.patch_embed.num_patches
    counts = measured_counts(patches)
    return {0: FewTokens(dense, patches, 0), **{count: FewTokens(dense, count, depth) for count in counts}}


def measured_counts(patches: int) -> list[int]:
    """Token counts of a staircase."""
    return sorted({max(1, patches * step // STEPS) for step in range(1, STEPS + 1)})


def staircase_of(seconds: Mapping[int, float], depth: int) -> Staircase:
    """The staircase of a host from the durations of the models of ``shortened``.

    More tokens never cost less in it: where a duration says so, that is noise.
    """
    counts = sorted(seconds.keys() - {0})
    blocks = np.array([(seconds[count] - seconds[0]) / depth for count in counts])
    rising = np.maximum.accumulate(blocks.clip(min=0))
    return Staircase(tuple(counts), tuple(rising.tolist()), seconds[0])


def staircase_of_macs(dense: nn.Module, total: int) -> Staircase:
    """A staircase of multiply-adds, for an aim given in them, and for hosts whose blocks are not timed by themselves.

    Args:
        dense: The host.
        total: Its multiply-adds; what its blocks do not explain is outside them.
    """
    host = plain_parts(dense)
    dim: int = getattr(dense, "embed_dim")  # noqa: B009
    depth, patches = len(host.blocks), host.patch_embed.num_patches
    counts = measured_counts(patches)
    lengths = [host.num_prefix_tokens + count for count in counts]
    macs = [float(12 * length * dim**2 + 2 * length**2 * dim) for length in lengths]
    return Staircase(tuple(counts), tuple(macs), max(0.0, total - depth * macs[-1]))


def predicted(staircase: Staircase, patches: int, counts: Sequence[int]) -> float:
    """What a host costs whose blocks leave so many tokens, in the unit of the staircase.

    A block is taken for the mean of what it costs at the tokens that enter and that leave it: methods reduce between
    its two halves.
    """
    entering = np.interp([patches, *counts[:-1]], staircase.tokens, staircase.seconds)
    leaving = np.interp(counts, staircase.tokens, staircase.seconds)
    return staircase.rest + float(entering.sum() + leaving.sum()) / 2


def token_counts(method: str, settings: Settings, depth: int, grid: Size) -> list[int] | None:
    """Patch tokens that leave each block, at most; None for settings that the method refuses or that leave none."""
    try:
        plan = METHODS[method].plan(depth, **settings)
    except (ValueError, TypeError):
        return None
    left, counts = grid[0] * grid[1], []
    for block in range(depth):
        left = plan[block].count_on(left, grid) if block in plan else left
        counts.append(left)
    return counts if counts[-1] > 0 else None
