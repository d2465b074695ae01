"""DyMU: merge every pair of tokens above a learnt similarity, as many as the image has (arXiv 2504.17040)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings
from effvit.recording import is_exported, is_exported_again, is_recorded
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import alternating_match, mean_keys, merge_sizes, move_shares
from effvit.reducers.ragged import RAGGED, packs, padded_if
from effvit.schedule import check_choice, check_count, check_number, check_switch, dymu_r, per_block
from effvit.tokens import (
    TokenMap,
    fix_traced_size,
    fx_leaf,
    position_of,
    rows_in_sequence,
    take_rows,
    trimmed,
    true_places,
    wide_dtype,
)

__all__ = [
    "DyMU",
    "Merge",
    "apply_merge",
    "descending_rank",
    "plan_merge",
    "top_of_batch",
]

# Similarities this near the threshold count as equal to it: another batch size changes the order of sums, and with
# it the last digits, and an image must not depend on that.
TIE = 1e-6
OFFICIAL_EPS = 1e-4  # what the official batch path adds to every size it divides by


class Merge(NamedTuple):
    """Which of the N patch tokens go where.

    Attributes:
        source: (B, |A|) the tokens of set A.
        destination: (B, |A|) the token of set B most similar to each of them.
        merged: (B, |A|) True where the source is merged into its destination.
        order: (B, K) the tokens that stay, in their new order.
        valid: (B, K) False for the padding of images that keep fewer; None if no slot is empty.
        lengths: Tokens that each image keeps, if they were read from the device.
        threshold: The similarity above which tokens were merged: the given one, or that of the batch.
        official: The order, and so the division, of the official batch path.
    """

    source: Tensor
    destination: Tensor
    merged: Tensor
    order: Tensor
    valid: Tensor | None
    lengths: tuple[int, ...] | None
    threshold: Tensor
    official: bool
    fuses: bool = False

    def target(self, like: Tensor) -> Tensor:
        """(B, N) new place of every old token, -1 for padding; ``like`` is any (B, N) int64."""
        return merge_target(self, like)


@fx_leaf
def merge_target(merge: Merge, like: Tensor) -> Tensor:
    """(B, N) new place of every old token, -1 for padding; ``like`` is any (B, N) int64."""
    itself = torch.arange(like.shape[1], device=like.device).expand_as(like)
    into = itself.scatter(1, merge.source, torch.where(merge.merged, merge.destination, merge.source))  # (B, N)
    return position_of(merge.order, like, merge.valid).gather(1, into)


def descending_rank(values: Tensor) -> Tensor:
    """Rank of every entry of values (B, N) in its row, 0 for the largest; equal values by position."""
    ordered, order = values.sort(dim=1, descending=True)
    level = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))  # (B, N)
    by_position = (level * values.shape[1] + order).argsort(1)  # unique whole numbers: no stable sort is needed
    place = torch.ones_like(order).cumsum(1) - 1
    return torch.zeros_like(order).scatter(1, order.gather(1, by_position), place)


def top_of_batch(best: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """The r * B largest similarities of a batch, whatever image they are in (DyMU section 3.1, rank mode).

    Args:
        best: (B, |A|), -inf for what may not be merged.
        r: Tokens an average image is to lose.
        num_prefix: Prefix tokens; those in set A count as rows that are never merged, as in the official code.

    Returns:
        (B, |A|) True for the rows to merge, and the threshold of the batch: the largest similarity that is not
        merged, at least 0. Merging what is strictly above it merges the same rows.
    """
    rows = F.pad(best, ((num_prefix + 1) // 2, 0), value=float("-inf"))
    rank = descending_rank(rows.reshape(1, -1)).view_as(rows)[:, (num_prefix + 1) // 2 :]
    number = r * len(best)
    ordered = rows.flatten().sort(descending=True).values  # (B * rows,)
    return (rank < number) & best.isfinite(), ordered[min(number, len(ordered) - 1)].clamp(min=0)


@fx_leaf
def plan_merge(
    metric: Tensor,
    valid: Tensor | None,
    num_prefix: int,
    threshold: Tensor | None,
    r: int = 0,
    max_r: int | None = None,
    compat: bool = False,
    trim: bool = True,
    keep_mask: bool = False,
    packed: bool = False,
) -> Merge:
    """Choose the tokens to merge (DyMU, 2504.17040, section 3.1).

    By default an image merges, in any batch, what tome.py@c57d75a merges when the image is alone: at most half of
    its tokens; what is left of A comes first, then B; A keeps its order if there is a prefix token and falls by
    similarity if not; an image that merges nothing keeps its order.

    Args:
        metric: (B, N, D) features of the patch tokens, compared by cosine.
        valid: (B, N) False for padding.
        num_prefix: Prefix tokens in front of the patches.
        threshold: Merge what is more similar. None: merge the most similar of the batch and find its threshold.
        r: Tokens an average image is to lose, for ``threshold=None``.
        max_r: At most so many are merged in each image.
        compat: Reproduce the official batch: more than one image, or a batch without threshold, is merged without
            the limit of one half, and left as A, then B, each in its order, even where nothing was merged.
        trim: Cut the padding to the longest image.
        keep_mask: Return the mask even if no slot is empty.
        packed: The tokens are to be packed.
    """
    if compat:
        metric = fix_traced_size(metric, 0)  # one image is merged otherwise than several
    batch, number = metric.shape[:2]
    if compat and (is_exported_again() or (is_exported() and isinstance(batch, torch.SymInt))):
        raise ValueError(
            "dymu with compat=True merges a batch of one image otherwise than a larger one, as the official code does, "
            "so it cannot be exported with a dynamic batch; export with a fixed batch, or use compat=False"
        )
    official = compat and (threshold is None or batch > 1)
    patch = torch.arange(number, device=metric.device).expand(batch, -1)  # (B, N)
    first_a, first_b = num_prefix % 2, (num_prefix + 1) % 2
    in_a, in_b = slice(first_a, None, 2), slice(first_b, None, 2)
    source = patch[:, in_a]  # (B, |A|)
    if number < 2:
        best, destination = metric.new_full(source.shape, -math.inf), source
    else:
        best, match = alternating_match(metric, num_prefix, valid)
        destination = 2 * match + first_b
        best = best.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)  # nothing is merged by such values
    falling = not official and num_prefix == 0
    rank = None
    if falling or max_r is not None or (not official and num_prefix % 2 == 0):
        rank = descending_rank(best)
        limit = torch.full_like(patch[:, :1], number) if valid is None else valid.sum(1, keepdim=True)
        limit = torch.full_like(limit, number) if official else limit // 2
        best = best.masked_fill(rank >= (limit if max_r is None else limit.clamp(max=max_r)), -math.inf)
    if threshold is None:
        merged, threshold = top_of_batch(best, min(r, number // 2), num_prefix)
    else:
        merged = best > threshold.to(best.dtype) + (0 if compat else TIE)

    # Sorted by numbers that are places modulo N: A comes first, then B, then what is dropped and padding. An image that
    # merges nothing keeps its order.
    behind = number * (number + 1)
    merges = merged.sum(1, keepdim=True)  # (B, 1)
    place, counts = patch, number - merges.squeeze(1)
    if valid is not None:
        place, counts = torch.where(valid, patch, patch + behind), counts - number + valid.sum(1)
    place_a, place_b = place[:, in_a], place[:, in_b]
    if falling and rank is not None:
        place_a = place_a + torch.where(merges > 0, 2 * rank - source, 0)
    place_b = torch.add(place_b, 1 if official else merges, alpha=number)
    order = torch.cat([place_a + behind * merged, place_b], dim=1).sort(dim=1).values % number  # (B, N)
    if falling and rank is not None:
        order = torch.where(merges > 0, patch.scatter(1, 2 * rank, source), patch).gather(1, order)
    kept = trimmed(order, counts, number, trim, keep_mask, packed)
    return Merge(source, destination, merged, *kept, threshold, official)


@fx_leaf
def number_merged(tokens: TokenMap, merge: Merge) -> int | None:
    """How many tokens of the batch are merged: how many fewer are left, where that was read from the device."""
    if merge.lengths is None:
        return None
    before = tokens.sequence_lengths()
    return sum(before) - len(before) * tokens.num_prefix - sum(merge.lengths)


def apply_merge(x: Tensor, tokens: TokenMap, merge: Merge, packed: bool) -> tuple[Tensor, TokenMap]:
    """Size-weighted mean of merged tokens.

    Each merged token adds its share of the difference to its destination, so two equal tokens merge without any
    rounding, and rows that do not merge are not computed with.

    Args:
        x: (B, P+N, C) tokens, or (1, T, C) packed.
        tokens: Their map.
        merge: Which tokens go where.
        packed: Return a packed sequence.

    Returns:
        (B, P+K, C), or packed, and its map with sizes.
    """
    size = tokens.size
    if size is None:
        one = torch.ones_like(tokens.layout.ranges.images, dtype=wide_dtype(x.dtype))  # (B, 1)
        size = one.expand(-1, tokens.num_prefix + tokens.width)
    number = None if is_recorded(x) else number_merged(tokens, merge)
    first = tokens.layout.ranges.first(tokens.num_prefix + tokens.width, tokens.num_prefix)
    source = (merge.source + first).flatten()  # (B * |A|,) rows of all images, padded
    destination = (merge.destination + first).flatten()
    merged: Tensor | None = merge.merged.flatten()
    if number is not None:  # only the merged rows are computed with
        place = true_places(merge.merged, number)
        source, destination, merged = source.index_select(0, place), destination.index_select(0, place), None
    sizes = size.flatten()
    gain = sizes.index_select(0, source)
    gain = gain if merged is None else torch.where(merged, gain, 0)
    sizes, share = merge_sizes(sizes, gain, destination)
    share = share if merged is None else torch.where(merged.unsqueeze(1), share, 0)  # of padding it is 0 / 0
    kept = tokens.rows(merge.order)  # (B, P+K)
    size = sizes.index_select(0, kept.flatten()).view(kept.shape)
    if merge.valid is not None:
        size = size * F.pad(merge.valid, (tokens.num_prefix, 0), value=True)
    left = tokens.relabel(
        merge,
        tokens.num_tokens,
        size=size,
        key_weight=size,
        valid=merge.valid,
        packed=packed,
        keeps_every_patch=True,
        lengths=merge.lengths,
    )
    source, destination, kept = rows_in_sequence(tokens, source, destination, kept)
    rows = x.flatten(0, 1)
    rows = move_shares(rows.clone(), rows.index_select(0, source), destination, share)
    x = take_rows(rows.unsqueeze(0), left.pack(kept) if packed else kept)
    return official_division(x, size, merge.official), left


@fx_leaf
def official_division(x: Tensor, size: Tensor, official: bool) -> Tensor:
    """x (B, P+N, C) as if its weighted sums had been divided by their size + 1e-4, if ``official``."""
    if not official:
        return x
    return x * (size / (size + OFFICIAL_EPS)).unsqueeze(-1).to(x.dtype)


class DyMU(Reducer):
    """Merge the tokens that are more similar than the block's threshold (DToMe of DyMU, 2504.17040, section 3.1).

    Place, similarity, sets and proportional attention are those of ToMe; but the threshold, learnt so that an
    average image loses r tokens, lets a simple image lose more of them and a complex one fewer. Thresholds come from
    ``effvit.calibrate``, a checkpoint, or the setting ``thresholds``; without any of them the model refuses to run.

    Deviations from tome.py@c57d75a, all but the last two undone by ``compat=True``: every batch is merged as its
    images would be alone (officially another order of tokens and 1e-4 on each size in batches of two and more);
    similarities within 1e-6 of the threshold are not above it; all prefix tokens are protected, not only the class
    token; what is not finite is never merged. LayerScale is applied, which the official timm block forgets.

    A forward pass reads from the device once per reducing block: how many tokens each image keeps, which tells how
    many are merged. (Twice where only the buffer says that there is a threshold, filled past ``load_state_dict``.)

    Attributes:
        threshold: Saved buffer, in float32 or wider whatever the dtype of the model.
        num_batches: Saved buffer, calibration batches the threshold is the mean of; 0 for none.
        ranking: Merge the most similar of the batch and hand its threshold on in ``TokenMap.carry``.
    """

    name = "dymu"
    summary = "merge what is more similar than thresholds learnt from batches (2504.17040)"
    variable_length = True
    # Not graph_reads_counts: for merges of unknown numbers of tokens inductor's vector code (torch 2.11, CPU) gave
    # wrong scores in three blocks of DeiT-Ti; backend="eager" and code without vectors gave the right ones.
    reads_counts = True
    keeps_every_patch = True
    learns = True
    threshold: Tensor
    num_batches: Tensor

    def __init__(self, r: int, threshold: float | None, max_r: int | None, ragged: str, compat: bool) -> None:
        super().__init__()
        self.r = r
        self.given = threshold
        self.max_r = max_r
        self.ragged = ragged
        self.compat = compat
        self.ranking = False
        self.register_buffer("threshold", torch.empty((), dtype=torch.float32))
        self.register_buffer("num_batches", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        r_total: int | Sequence[int] = 96,
        r_schedule: str = "constant",
        thresholds: Sequence[float] | None = None,
        max_r_per_instance_ratio: float | None = None,
        ragged: str = "auto",
        compat: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            r_total: Tokens an average image is to lose over all blocks, which calibration aims at; or a list with
                one number for each block. A block with 0 merges nothing. The default is that of the official
                vit_base_patch16_siglip_224_tome.
            r_schedule: How ``r_total`` is spread, "constant", "linear" or "reverse_linear", see
                ``schedule.dymu_r``.
            thresholds: Cosine similarities to merge above, one for each block, in place of calibration; they
                stay even if a checkpoint holds others. Those of blocks with r 0 are not used.
            max_r_per_instance_ratio: At most this multiple of a block's r is merged in each image; None: no limit.
            ragged: How images with different counts share a batch: "padded" to the longest with a key mask, "packed"
                one after another with variable-length attention and no padding, or "auto", whichever is faster for
                the batch (see ``effvit.reducers.ragged``). Equal results; "packed" cannot be exported.
            compat: Reproduce the official padded batch, in which an image is merged otherwise than alone.
        """
        check_choice("ragged", ragged, RAGGED)
        check_switch("compat", compat)
        ragged = padded_if(compat, ragged)
        blocks = tuple(range(depth))
        if isinstance(r_total, (list, tuple)):
            values: dict[int, int] = per_block("r_total", r_total, blocks)
            rs = [check_count("r_total", r) for r in values.values()]
        else:
            rs = dymu_r(r_total, depth, r_schedule)  # type: ignore[arg-type]
        given = check_thresholds(thresholds, blocks)
        limits = [None] * depth if max_r_per_instance_ratio is None else check_limits(max_r_per_instance_ratio, rs)
        return {b: cls(rs[b], given[b], limits[b], ragged, compat) for b in blocks if rs[b] > 0}

    @classmethod
    def off(cls) -> Settings:
        return {"r_total": 0}

    @classmethod
    def example(cls) -> Settings:
        return {"thresholds": (0.9, 0.8, 0.7, 0.6)}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return [{"r_total": 28 if num_patches < FEW_PATCHES else 5 * num_patches // 7}]

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens

    def cost(self, at: BlockSizes) -> Change:
        return Change(at.tokens, at.tokens, at.left, alternating_pairs(at.tokens, at.head_dim))

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        self.check_ready()
        if self.ragged == "packed":
            self.refuse_packed_recording(x)
        recorded = is_recorded(x)  # a graph keeps its way, whatever the image
        metric = mean_keys(state.k)
        metric = (tokens.unpack(metric) if tokens.packed else metric)[:, tokens.num_prefix :]  # (B, N, D)
        check_finite(metric, self.origin("keys"), state.x)
        merge = plan_merge(
            metric,
            tokens.valid,
            tokens.num_prefix,
            None if self.ranking else self.threshold,
            self.r,
            self.max_r,
            self.compat,
            keep_mask=recorded,
            packed=self.ragged == "packed",
        )
        if self.ranking:
            tokens = replace(tokens, carry=merge.threshold)
        # A trace that is only counted goes on too: it would drop an unused matching as dead code.
        recorded = recorded or torch.jit.is_tracing()
        if not (recorded or merge.official or number_merged(tokens, merge)):
            return x, tokens
        # No kernel for packed batches takes a bias of pairs.
        packed = state.pairs is None and packs(self.ragged, merge.lengths, tokens.num_prefix, state.q)
        packed = packed or tokens.packed
        return apply_merge(x, tokens, merge, packed)

    # -- thresholds --------------------------------------------------------------------------------------------

    @property
    def has_learnt(self) -> bool:
        return self.given is None and self.ready

    def take_over(self, former: Reducer) -> bool:
        """As any reducer, if the thresholds were learnt for the same r; given ones need none."""
        same = isinstance(former, DyMU) and former.r == self.r
        return self.given is not None or (same and super().take_over(former))

    @classmethod
    def learnt_settings(cls, reducers: Mapping[int, Reducer], depth: int) -> Settings:
        """The learnt thresholds as the setting, with 1.0 for blocks that merge nothing; none before calibration."""
        learnt = {b: float(r.threshold) for b, r in reducers.items() if isinstance(r, DyMU) and r.has_learnt}
        if not reducers or learnt.keys() != reducers.keys():
            return {}
        return {"thresholds": [learnt.get(block, 1.0) for block in range(depth)]}

    def reset_parameters(self) -> None:
        """Back to the given threshold, or to none."""
        self.set_threshold(1.0 if self.given is None else self.given, 0)
        self.ready = self.given is not None

    def check_ready(self) -> None:
        """Raise a ValueError while there is no threshold: the model would silently merge nothing."""
        if self.ready or self.ranking or self.num_batches.is_meta:
            return
        if is_recorded(self.num_batches) or not self.num_batches:
            raise ValueError(
                f"dymu in block {self.block} has no threshold yet, so it would merge nothing; call "
                "effvit.calibrate(model, batches), load a calibrated checkpoint, or give the setting thresholds"
            )

    def set_threshold(self, threshold: float, num_batches: int) -> None:
        """Set the threshold to a mean over so many calibration batches."""
        self.threshold.fill_(threshold)
        self.num_batches.fill_(num_batches)
        self.ready = num_batches > 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DyMU:
        """Move and cast as any module, but keep the threshold in float32 or wider: means do not fit bfloat16."""
        before = self.threshold
        super()._apply(fn, recurse)
        if before.is_meta and not self.threshold.is_meta:  # to_empty: the memory holds anything
            self.reset_parameters()
        elif self.threshold.dtype not in (torch.float32, torch.float64):
            self.threshold = before.to(self.threshold.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as any module, but leave given thresholds alone, and those a checkpoint has nothing about."""
        threshold = self.threshold if self.given is None else torch.full_like(self.threshold, self.given)
        own = {f"{prefix}threshold": threshold, f"{prefix}num_batches": self.num_batches}
        if self.given is not None or f"{prefix}threshold" not in state_dict:
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        number = state_dict[f"{prefix}num_batches"]
        self.ready = self.given is not None or (not number.is_meta and bool(number > 0))


def check_thresholds(thresholds: Sequence[float] | None, blocks: tuple[int, ...]) -> list[float | None]:
    """One threshold for each block, or None for each."""
    if thresholds is None:
        return [None] * len(blocks)
    if not isinstance(thresholds, (list, tuple)):
        raise TypeError(f"thresholds must be a sequence with one number for each block, got {thresholds!r}")
    given: dict[int, float] = per_block("thresholds", thresholds, blocks)
    values = [check_number("thresholds", value) for value in given.values()]
    for value in values:
        if not -1 <= value <= 1:
            raise ValueError(f"thresholds must be cosine similarities in [-1, 1], got {value}")
    return list(values)


def check_limits(ratio: float, rs: list[int]) -> list[int | None]:
    """Tokens an image may lose in each block."""
    limits = [int(check_number("max_r_per_instance_ratio", ratio, "positive") * r) for r in rs]
    if any(rs) and not any(limits):
        raise ValueError(f"max_r_per_instance_ratio {ratio} of r {rs} lets no block merge a token; raise one of them")
    return list(limits)
