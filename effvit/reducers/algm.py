"""ALGM: merge alike windows first, then alike tokens wherever they are, as many as the image has (2406.09936)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings, Size
from effvit.recording import is_recorded
from effvit.reducers.base import Reducer, check_finite, refuse_recording
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import alternating_match
from effvit.reducers.merging import TIE, Merge, apply_merge, descending_rank
from effvit.reducers.ragged import RAGGED, packs, padded_if
from effvit.schedule import check_blocks, check_choice, check_count, check_number, check_switch, spread_blocks
from effvit.tokens import Compact, TokenMap, fx_leaf, trimmed, widened

__all__ = ["ALGM", "plan_global_merge", "plan_local_merge"]


def reaching(similarity: Tensor, threshold: Tensor, compat: bool) -> Tensor:
    """(B, n) True where the similarities (B, n) reach the threshold; with ``compat`` as many as in every image.

    Similarities within ``TIE`` of the threshold reach it. Officially each image merges only as many as the image of the
    batch with the fewest, its most similar ones.
    """
    reached = similarity >= threshold - TIE
    if not compat:
        return reached
    return descending_rank(similarity) < reached.sum(1).amin()


def arrange(rank: Tensor, last: int, left: Tensor, keep_mask: bool, packed: bool) -> Compact:
    """The tokens that are ``left`` (B, N), by ascending ``rank`` (B, N) of 0 to ``last``, equal ones in their order."""
    number = rank.shape[1]
    place = torch.arange(number, device=rank.device)
    # One sort of numbers that are places modulo N: a stable one is not in every runtime.
    order = (torch.where(left, rank, last + 1) * number + place).sort(dim=1).values % number
    return trimmed(order, left.sum(1), number, True, keep_mask, packed)


@fx_leaf
def plan_local_merge(
    x: Tensor,
    tokens: TokenMap,
    window: int,
    threshold: float,
    compat: bool = False,
    keep_mask: bool = False,
    packed: bool = False,
    origin: str = "tokens",
    entered: Tensor | None = None,
) -> Merge:
    """Merge each window of the grid whose tokens are alike (ALGM, 2406.09936; local_merge.py@674eaa2).

    The similarity of a window is the mean cosine of its pairs, which the sum of its unit vectors tells: no pair is
    formed. Windows lie in the upper left corner of the grid; what is left over at its right and lower border, and a
    window of which a patch is missing, is not merged (the official code asserts that windows fit).

    Args:
        x: (B, N, C) features of the patch tokens, of which none has been merged before.
        tokens: Their map.
        window: Side of a window, in patches.
        threshold: Windows that reach it are merged.
        compat: Reproduce the official batch, see ``reaching``.
        keep_mask: Return the mask even if no slot is empty.
        packed: The tokens are to be packed.
        origin: What the features are, for messages.
        entered: (B, ...) what entered the block, for messages.

    Returns:
        The merge. Merged windows come first, by falling similarity, then the other tokens in their order.

    Raises:
        ValueError: Similarities that are NaN, see ``check_finite``.
    """
    batch, number = x.shape[:2]
    rows, columns = (side // window for side in tokens.grid)
    area, windows = window * window, rows * columns
    row, column = tokens.anchor // tokens.grid[1] // window, tokens.anchor % tokens.grid[1] // window
    inside = (row < rows) & (column < columns)
    real = torch.ones_like(inside) if tokens.valid is None else tokens.valid
    window_of = torch.where(inside & real, row * columns + column, windows)  # (B, N), the last for none
    slot = (window_of + (windows + 1) * torch.arange(batch, device=x.device).unsqueeze(1)).flatten()
    unit = F.normalize(widened(x.detach()), dim=-1)  # (B, N, C)
    sums = unit.new_zeros(batch * (windows + 1), x.shape[2]).index_add(0, slot, unit.flatten(0, 1))
    present = unit.new_zeros(batch * (windows + 1)).index_add(0, slot, torch.ones_like(unit[..., 0]).flatten())
    similarity = ((sums.square().sum(-1) - area) / (area * (area - 1))).masked_fill(present < area, -math.inf)
    similarity = similarity.view(batch, windows + 1)[:, :windows]
    similarity = check_finite(similarity, origin, entered)

    level = similarity.new_full((), threshold)
    alike = F.pad(reaching(similarity, level, compat), (0, 1)).gather(1, window_of)  # (B, N)
    rank = F.pad(descending_rank(similarity), (0, 1), value=windows).gather(1, window_of)  # (B, N)
    corner = (row * tokens.grid[1] + column) * window  # (B, N) the first patch of the window
    first = tokens.source.gather(1, torch.where(alike, corner, tokens.anchor)).clamp(min=0)
    place = torch.arange(number, device=x.device).expand(batch, -1)
    merged = alike & (first != place)
    kept = arrange(torch.where(alike, rank, windows), windows, real & ~merged, keep_mask, packed)
    return Merge(place, first, merged, *kept, level, official=False)


@fx_leaf
def plan_global_merge(
    x: Tensor,
    valid: Tensor | None,
    num_prefix: int,
    layer: int,
    compat: bool = False,
    keep_mask: bool = False,
    packed: bool = False,
    origin: str = "tokens",
    entered: Tensor | None = None,
) -> Merge:
    """Merge the pairs of tokens that stand out (ALGM, 2406.09936; global_merge.py@674eaa2).

    Sets and pairs are ToMe's. A token of set A is merged if its best similarity reaches the mean of all plus their
    standard deviation over the number of the layer.

    Args:
        x: (B, N, C) features of the patch tokens, compared by cosine.
        valid: (B, N) False for padding.
        num_prefix: Prefix tokens in front of the patches.
        layer: Number of the block, counted from 1.
        compat: Reproduce the official batch: one threshold, the mean of those of its images, and see ``reaching``.
        keep_mask: Return the mask even if no slot is empty.
        packed: The tokens are to be packed.
        origin: What the features are, for messages.
        entered: (B, ...) what entered the block, for messages.

    Returns:
        The merge. What is left of set A comes first, then set B, each in its order.

    Raises:
        ValueError: Similarities that are NaN, see ``check_finite``.
    """
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)  # (B, N)
    source = place[:, num_prefix % 2 :: 2]  # (B, |A|)
    if x.shape[1] < 2:
        best, destination = widened(x).new_full(source.shape, -math.inf), source
    else:
        best, match = alternating_match(x.detach(), num_prefix, valid)
        best, destination = check_finite(best, origin, entered), 2 * match + (num_prefix + 1) % 2

    paired = best.isfinite()
    number = paired.sum(1, keepdim=True)  # (B, 1)
    mean = best.masked_fill(~paired, 0).sum(1, keepdim=True) / number.clamp(min=1)
    deviation = (best - mean).masked_fill(~paired, 0).square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
    deviation = deviation.sqrt()
    if compat:
        mean, deviation = mean.mean(0, keepdim=True), deviation.mean(0, keepdim=True)
    threshold = (mean + deviation / layer).masked_fill(number < 2, math.inf)  # one pair has no deviation
    merged = reaching(best, threshold, compat)
    real = torch.ones_like(place, dtype=torch.bool) if valid is None else valid
    left = real & ~torch.zeros_like(real).scatter(1, source, merged)
    kept = arrange((place + num_prefix) % 2, 1, left, keep_mask, packed)
    return Merge(source, destination, merged, *kept, threshold, official=False)


class ALGM(Reducer):
    """Merge alike windows of 2 x 2 patches, later the pairs of tokens that stand out (ALGM, 2406.09936).

    The first block of ``reduce_at`` merges windows, every further one pairs. Tokens are compared by their features
    behind attention, which itself is left alone: sizes only weigh means. How many are merged depends on the image.

    Deviations from the official algm_segmenter.py@674eaa2, the first undone by ``compat=True``: thresholds and counts
    are those of each image (officially they are means and minima over the batch, so that an image changes with its
    neighbours); similarities within 1e-6 of a threshold reach it; all prefix tokens are protected, not only the class
    token; grids need not be square, nor a multiple of the window.

    A forward pass reads from the device once per reducing block: how many tokens each image keeps.

    Attributes:
        layer: Number of the block, counted from 1.
        reduce_at: Numbers of all blocks that merge, counted from 0.
        local: Whether windows are merged, not pairs.
    """

    name = "algm"
    summary = "merge alike windows, then the pairs of tokens that stand out (2406.09936)"
    variable_length = True
    reads_counts = True  # not graph_reads_counts, for the reason that DyMU gives: its merges are the same
    keeps_every_patch = True
    open_sides = 0  # windows of 2 x 2

    def __init__(
        self,
        layer: int,
        reduce_at: tuple[int, ...],
        threshold: float,
        window: int,
        prop_attn: bool,
        ragged: str,
        compat: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.reduce_at = reduce_at
        self.local = layer == reduce_at[0] + 1
        self.threshold = threshold
        self.window = window
        self.prop_attn = prop_attn
        self.ragged = ragged
        self.compat = compat
        self.takes_padding = not compat

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        threshold: float = 0.88,
        reduce_at: Sequence[int] | None = None,
        window: int = 2,
        prop_attn: bool = False,
        ragged: str = "auto",
        compat: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            threshold: Mean cosine of the pairs of a window from which on it is merged, in [-1, 1]. The default is that
                of the official scripts; published are 0.88 to 0.955.
            reduce_at: 0-based blocks that merge: the first of them windows, each further one pairs. None means the
                first block and depth // 3, the published 0 and 4 of 12 (of ViT-L's 24 the authors took 0 and 6).
            window: Side of a window, in patches.
            prop_attn: A token of size s receives attention like s equal tokens, as in ToMe; the authors do not.
            ragged: How images with different counts share a batch: "padded" to the longest with a key mask, "packed"
                one after another with variable-length attention and no padding, or "auto", whichever is faster for
                the batch (see ``effvit.reducers.ragged``). Equal results; "packed" cannot be exported.
            compat: Reproduce the official batch, in which every image merges as many tokens as the one with the fewest.
        """
        if not -1 <= check_number("threshold", threshold) <= 1:
            raise ValueError(f"threshold must be a cosine similarity in [-1, 1], got {threshold}")
        check_count("window", window, 2)
        check_switch("prop_attn", prop_attn)
        check_choice("ragged", ragged, RAGGED)
        check_switch("compat", compat)
        places = spread_blocks((0, 4), depth) if reduce_at is None else reduce_at
        blocks = check_blocks("reduce_at", places, depth)
        options = (blocks, threshold, window, prop_attn, padded_if(compat, ragged), compat)
        return {block: cls(block + 1, *options) for block in blocks}

    @classmethod
    def off(cls) -> Settings:
        return {"reduce_at": ()}

    @classmethod
    def example(cls) -> Settings:
        return {"threshold": 0.1}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        # Random weights see no alike windows, so that the pairs of one block alone would be an eighth of the cost.
        return [{"threshold": 0.78, "reduce_at": [0, 1, 2]}]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"threshold": percent / 100} for percent in range(98, 58, -4)]]

    def resize(self, grid: Size) -> None:
        if self.local and not self.any_size and self.window > min(grid):
            raise ValueError(f"window must be at most the sides of the patch grid, got {self.window} for {grid}")

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens

    def cost(self, at: BlockSizes) -> Change:
        return Change(at.tokens, at.tokens, at.left, 0 if self.local else alternating_pairs(at.tokens, at.dim))

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        self.check_recordable(x)
        recorded = is_recorded(x)  # a graph keeps its way, whatever the image
        num_prefix = tokens.num_prefix
        patches = (tokens.unpack(x) if tokens.packed else x)[:, num_prefix:]  # (B, N, C)
        asked = (self.compat, recorded, self.ragged == "packed", self.origin("similarities"), state.x)
        if self.local:
            merge = plan_local_merge(patches, tokens, self.window, self.threshold, *asked)
        else:
            merge = plan_global_merge(patches, tokens.valid, num_prefix, self.layer, *asked)
        packed = state.packable and packs(self.ragged, merge.lengths, num_prefix, state.q)
        x, left = apply_merge(x, tokens, merge, packed or tokens.packed)
        return x, left if self.prop_attn else replace(left, key_weight=None)

    def check_recordable(self, x: Tensor) -> None:
        """Raise a ValueError where a graph cannot be made, or holds for the batch alone that it was made with."""
        if self.ragged == "packed":
            self.refuse_packed_recording(x)
        if self.compat:
            refuse_recording(
                x,
                f"{self.name} in block {self.block}: with compat=True an image merges what its batch allows",
                "use compat=False",
            )
