"""Zero-TPrune: prune by a page rank on the attention graph, after removing look-alikes (arXiv 2305.17328).

No official code is published. The docstrings say where the paper leaves a choice open and which one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState, EditMap, SumMap, map_sums, piece_shape, take_heads
from effvit.protocols import Settings
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule, rates_by_block
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.keep_rate import Rated
from effvit.schedule import (
    check_blocks,
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_switch,
    per_block,
    spread_blocks,
)
from effvit.tokens import TokenMap, flat_rows, ranges_of, take_rows, wide_dtype, wide_product, widened

__all__ = [
    "KEYS",
    "PARTITIONS",
    "PRESETS",
    "SIMILARITIES",
    "ZeroTPrune",
    "aggregate_heads",
    "head_variance",
    "match_groups",
    "split_groups",
    "weighted_page_rank",
]

PARTITIONS = ("sequential_u", "sequential_i", "alternate")
KEYS = ("concatenated", "averaged")
SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (B, |A|, D), (B, |B|, D) -> (B, |A|, |B|)
    "cosine": lambda a, b: wide_product(F.normalize(a, dim=-1), F.normalize(b, dim=-1).transpose(-2, -1)),
    "dot": lambda a, b: wide_product(a, b.transpose(-2, -1)),
    "euclidean": lambda a, b: -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1),
}


class Preset(NamedTuple):
    """Settings of a schedule for twelve blocks, see ``ZeroTPrune.plan``."""

    reduce_at: tuple[int, ...]
    keep_rate: float | tuple[float, ...]
    num_iters: tuple[int, ...]
    r: int


# Schedules for DeiT-S at 224 px. The authors publish costs but not the schedules behind them (project page), so
# these are named for what they are: one as quoted by others, and fits of a uniform rate to a published cost, counted
# as the authors do, with pruning behind the MLP.
PRESETS: dict[str, Preset] = {
    "quoted_deit_small": Preset(
        reduce_at=(0, 2, 5, 8, 10),
        keep_rate=(1.0, 0.9, 0.8, 0.7, 1.0),
        num_iters=(30, 5, 5, 1, 1),
        r=10,
    ),
    "fit_deit_small_3.08_gmacs": Preset(
        reduce_at=(0, 2, 5, 8, 10),
        keep_rate=0.9019,
        num_iters=(30, 5, 5, 1, 1),
        r=10,
    ),
    "fit_deit_small_2.50_gmacs": Preset(
        reduce_at=(0, 2, 5, 8, 10),
        keep_rate=0.8217,
        num_iters=(30, 5, 5, 1, 1),
        r=10,
    ),
    "fit_deit_small_3.97_gmacs": Preset(
        reduce_at=(2, 5, 8, 10),
        keep_rate=0.9346,
        num_iters=(5, 5, 1, 1),
        r=5,
    ),
}


def start_signal(like: Tensor, number: int, first_boost: float, num_class: int) -> Tensor:
    """What tokens vote with first (B, heads, N): ``first_boost`` times as much for the class-like ones in front.

    Args:
        like: A tensor of that shape, for device and dtype.
        number: Tokens that vote, over which the signal sums to 1.
        first_boost: Weight of the class-like tokens relative to any other.
        num_class: Class-like tokens.
    """
    total = number - num_class + num_class * first_boost
    signal = torch.ones_like(like)
    return torch.cat([signal[..., :num_class] * (first_boost / total), signal[..., num_class:] / total], dim=-1)


def weighted_page_rank(
    weights: Tensor,
    num_iters: int,
    first_boost: float = 1.0,
    num_class: int = 1,
    kept: Tensor | None = None,
    number: int | None = None,
    renormalise: bool = True,
) -> Tensor:
    """Importance every token of each head gathers by repeated voting with its attention, s <- A^T s (section 3.2).

    The printed equation has A in place of A^T; with it a uniform signal would be a fixed point and rank nothing,
    while the paper's algorithm box has A^T, which is used.

    Args:
        weights: (B, heads, N, N) softmax map, rows sum to 1.
        num_iters: Votes.
        first_boost: Initial weight of the class-like tokens relative to any other ("Zero-TPrune" starts with
            sqrt(N), "Zero-TPrune-uni" with 1).
        num_class: Class-like tokens in front.
        kept: (B, N) 1 for the tokens of the sub-graph to vote on, 0 for the others; no sub-matrix is made.
        number: How many ones ``kept`` has for each image.
        renormalise: Whether rows of the sub-graph sum to 1 again, or each loses what it gives to the others.

    Returns:
        (B, heads, N), sums to 1 over the tokens.
    """
    signal = start_signal(weights[..., 0], number or weights.shape[-1], first_boost, num_class).unsqueeze(2)
    if kept is None:
        for _ in range(num_iters):
            signal = wide_product(signal, weights)  # (B, heads, 1, N)
        return signal.squeeze(2)
    mask = kept.to(weights.dtype)
    if not renormalise:
        mask = mask[:, None, None]  # (B, 1, 1, N)
        signal = signal * mask
        for _ in range(num_iters):
            signal = to_sum_one(wide_product(signal, weights) * mask)
        return signal.squeeze(2)
    row_sum = wide_product(weights.flatten(1, 2), mask.unsqueeze(-1)).unflatten(1, weights.shape[1:3])
    mask = mask[:, None, None]  # (B, 1, 1, N)
    row_scale = mask / row_sum.transpose(2, 3)  # (B, heads, 1, N); zero for those that left, so they do not vote
    for _ in range(num_iters):
        signal = wide_product(signal * row_scale, weights)
    return (signal * mask).squeeze(2)


def to_sum_one(signal: Tensor) -> Tensor:
    """The signal (..., N) of a vote that loses some of it, scaled to sum 1: each vote is, before too little is left."""
    return signal / signal.sum(-1, keepdim=True)


def page_rank_in_pieces(q: Tensor, k: Tensor, num_iters: int, signal: Tensor, mask: Tensor | None = None) -> Tensor:
    """``weighted_page_rank`` on a map that is too large to hold: some of it is, and the rest formed for each vote.

    As much of it is held as is left of what the MLP takes, beside queries, keys and a piece that is formed.

    Args:
        q: (B, heads, N, D) queries of those that vote, whose products with the keys are the logits of the map.
        k: (B, heads, D, N) their keys; products with few rows are 1.3 times as fast where these lie in this order.
        num_iters: Votes.
        signal: (B, heads, N) what they vote with first.
        mask: (B, N) 1 for the tokens that vote and are voted for, 0 for those that take a share of the rows only.

    Returns:
        (B, heads, N), sums to 1 over the tokens that vote.
    """
    length, most = q.shape[2], 6 * q.numel()
    heads, rows = piece_shape(q)
    shape, q = q.shape[:2], q.flatten(0, 1)  # (B * heads, N, D)
    k = k.flatten(0, 1)  # (B * heads, D, N)
    if mask is not None:
        mask = mask.to(signal.dtype).unsqueeze(1).expand_as(signal)  # (B, heads, N)
        signal = signal * mask
        mask = mask.flatten(0, 1).unsqueeze(1)  # (B * heads, 1, N)
    signal = signal.flatten(0, 1).unsqueeze(1)  # (B * heads, 1, N)
    ranks = []
    for first in range(0, len(q), heads):
        maps = slice(first, first + heads)
        rank, held = signal[maps], list[Tensor]()  # (heads, 1, N)
        for _ in range(num_iters):
            gathered = torch.zeros_like(rank)
            for place, start in enumerate(range(0, length, rows)):
                span = slice(start, start + rows)
                if place < len(held):
                    weights = held[place]
                else:
                    weights = wide_product(q[maps, span], k[maps]).softmax(dim=-1)  # (heads, rows, N)
                    if (place + 1) * heads * rows * length <= most:
                        held.append(weights)
                gathered += wide_product(rank[..., span], weights)
            rank = gathered if mask is None else to_sum_one(gathered * mask[maps])
        ranks.append(rank)
    return torch.cat(ranks).squeeze(1).unflatten(0, shape)


def aggregate_heads(signal: Tensor, var_range: tuple[float, float] | None, number: int | None = None) -> Tensor:
    """Root mean square of the head scores over the heads whose variance is in range (EIR and VHF, section 3.2).

    The variance is that of N * s over the N tokens (mean one): the published range of 0.01 to 0.7
    does not say on which scale, and scores of 197 tokens that sum to one vary by 0.005 at most. If no head is in
    range, all are used.

    Args:
        signal: (B, heads, N) from weighted_page_rank.
        var_range: Smallest and largest variance of a head that counts; None counts all.
        number: Tokens of the sub-graph, outside which the scores are 0; None means N.

    Returns:
        (B, N).
    """
    if var_range is None:
        return signal.square().mean(1).sqrt()
    square = signal.square()
    variance = _variance(square, number)
    passed = variance.clamp(*var_range) == variance  # (B, heads)
    passed = (passed | ~passed.any(1, keepdim=True)).to(signal.dtype).unsqueeze(-1)  # (B, heads, 1)
    return ((square * passed).sum(1) / passed.sum(1)).sqrt()


def head_variance(signal: Tensor, number: int | None = None) -> Tensor:
    """(B, heads) population variance of the head scores, scaled to mean one, over the ``number`` tokens they rank.

    Scores sum to 1, so those times n have the mean square n * sum(s^2).
    """
    return _variance(signal.square(), number)


def _variance(square: Tensor, number: int | None) -> Tensor:
    return square.sum(-1) * (number or square.shape[-1]) - 1


def split_groups(importance: Tensor, partition: str) -> tuple[Tensor, Tensor]:
    """Groups A (B, N // 2), to prune from, and B (B, N - N // 2) of the patch tokens (S-stage, section 3.3).

    Args:
        importance: (B, N) of the patch tokens; it only orders them.
        partition: "sequential_u": A is the less important half, the paper's best; "sequential_i": the more
            important half; "alternate": every second token in ascending order.
    """
    half = importance.shape[1] // 2
    order = importance.argsort(dim=1)
    if partition == "sequential_u":
        return order[:, :half], order[:, half:]
    if partition == "sequential_i":
        return order[:, -half:], order[:, :-half]
    return order[:, : 2 * half : 2], torch.cat([order[:, 1 : 2 * half : 2], order[:, 2 * half :]], dim=1)


def match_groups(
    features: Tensor, group_a: Tensor, group_b: Tensor, similarity: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """Similarity of each token of group A to the one of B most similar to it, and which that is: (B, |A|) each.

    In float32 (float64 for float64), whatever the dtype of the features.
    """
    best, place = _similarities(features, group_a, group_b, similarity).max(-1)
    return best, group_b.gather(1, place)


def _similarities(features: Tensor, group_a: Tensor, group_b: Tensor, similarity: str) -> Tensor:
    """(B, |A|, |B|) similarity of each token of group A to each of B."""
    length, features = features.shape[1], widened(features)
    ranges = ranges_of(features, 1, 0)
    a = take_rows(features, flat_rows(group_a, length, ranges=ranges))  # (B, |A|, heads * D)
    b = take_rows(features, flat_rows(group_b, length, ranges=ranges))  # (B, |B|, heads * D)
    return SIMILARITIES[similarity](a, b)


class ZeroTPrune(Rated):
    """Prune at the end of a block: look-alikes first, then the least important tokens (Zero-TPrune, 2305.17328).

    Importance is a page rank on the attention of the block that has just run. A single vote (stage I') only
    orders the tokens for the S-stage, which removes r near-duplicates by their keys, heads concatenated; the
    I-stage then votes ``num_iters`` times among those left and keeps the best ``keep_rate`` of them, in image
    order. Only reducing blocks compute a softmax map, and use it for their own output too. A map that is large is
    formed in pieces, and anew for the votes of the I-stage: MACs are counted as if it were held.

    The paper prunes behind the MLP. An MLP sees one token at a time, so pruning before it, as here, gives the same
    tokens for less: costs lie below those the authors count.
    """

    name = "zero_tprune"
    summary = "page rank on the attention graph, after removing look-alikes (2305.17328)"
    rate_of_few = 0.98
    open_sides = 1

    def __init__(
        self,
        keep_rate: float,
        r: int,
        num_iters: int,
        cls_boost: float | None,
        var_range: tuple[float, float] | None,
        partition: str,
        similarity: str,
        keys: str,
        renormalise: bool,
    ) -> None:
        super().__init__()
        self.keep_rate = keep_rate
        self.base_keep_rate = keep_rate
        self.r = r
        self.num_iters = num_iters
        self.cls_boost = cls_boost
        self.var_range = var_range
        self.partition = partition
        self.similarity = similarity
        self.keys = keys
        self.renormalise = renormalise

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        preset: str | None = None,
        keep_rate: float | Sequence[float] | None = None,
        reduce_at: Sequence[int] | None = None,
        r: int | Sequence[int] | None = None,
        num_iters: int | Sequence[int] | None = None,
        cls_boost: float | None = None,
        var_range: Sequence[float] | None = (0.01, 0.7),
        partition: str = "sequential_u",
        similarity: str = "cosine",
        keys: str = "concatenated",
        renormalise: bool = True,
    ) -> dict[int, Reducer]:
        """Settings of the method. What is None comes from the preset.

        Args:
            depth: Blocks of the host.
            preset: One of PRESETS for a 12-block host, "quoted_deit_small" if None; for another depth its blocks
                are spread in proportion.
            keep_rate: Fraction that the I-stage keeps of what the S-stage left, in (0, 1]; one value, or one for
                each block. 1 for all blocks, with r not given, reduces nothing.
            reduce_at: 0-based blocks after which tokens are pruned.
            r: Near-duplicates the S-stage removes, at most half of the tokens; one value or one for each block.
            num_iters: Votes of the I-stage; one value or one for each block. The paper gives 30-50 for the
                first, 5-10 for the middle and 1 for the deep blocks; None takes 30, 5, 1 by thirds of the depth.
            cls_boost: Initial weight of the class-like tokens; None means the square root of the number of
                tokens, 1 gives "Zero-TPrune-uni". Without class token it has no effect.
            var_range: Variance range of the heads that count; None counts all.
            partition: How the S-stage splits the tokens, one of PARTITIONS.
            similarity: How it compares them, one of SIMILARITIES.
            keys: What it compares, the keys of all heads "concatenated" or "averaged" as in ToMe; the paper leaves it
                open.
            renormalise: Whether the attention among the tokens that the S-stage left sums to 1 again before the I-stage
                votes; if not, tokens lose what they give to those that left. The paper leaves this open too.
        """
        if preset is not None:
            check_choice("preset", preset, PRESETS)
        chosen = PRESETS[preset or "quoted_deit_small"]
        published = spread_blocks(chosen.reduce_at, depth)
        blocks = check_blocks("reduce_at", published if reduce_at is None else reduce_at, depth)
        as_preset = len(blocks) == len(chosen.reduce_at)
        if r is None:
            r = 0 if keep_rate in (1, 1.0) else chosen.r
        if keep_rate is None:
            keep_rate = chosen.keep_rate if as_preset else 0.8
        if num_iters is None:
            num_iters = chosen.num_iters if as_preset else tuple((30, 5, 1)[3 * b // depth] for b in blocks)
        check_choice("partition", partition, PARTITIONS)
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("keys", keys, KEYS)
        check_switch("renormalise", renormalise)
        if cls_boost is not None:
            check_number("cls_boost", cls_boost, "positive")
        if var_range is not None:
            pair = isinstance(var_range, (list, tuple)) and len(var_range) == 2
            numbers = pair and all(isinstance(v, (int, float)) for v in var_range)
            if not numbers or not var_range[0] <= var_range[1]:  # NaN is refused
                raise ValueError(f"var_range must be (smallest, largest) variance, got {var_range!r}")
        rates = {b: check_fraction("keep_rate", v) for b, v in per_block("keep_rate", keep_rate, blocks).items()}
        pairs = {b: check_count("r", v) for b, v in per_block("r", r, blocks).items()}
        iters = {b: check_count("num_iters", v, 1) for b, v in per_block("num_iters", num_iters, blocks).items()}
        variances = None if var_range is None else (float(var_range[0]), float(var_range[1]))
        return {
            b: cls(rates[b], pairs[b], iters[b], cls_boost, variances, partition, similarity, keys, renormalise)
            for b in blocks
            if rates[b] < 1 or pairs[b] > 0
        }

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.7, "reduce_at": (0, 2), "r": 2, "num_iters": 3}

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        listed = any(isinstance(settings.get(name), (list, tuple)) for name in ("r", "num_iters"))
        named = rates_by_block(cls, settings, depth, anywhere=False)
        # Lists are for the blocks they name; and where a block takes nothing by its rate, r removes tokens there.
        if listed or named is None or 0 in named.taken:
            return named
        return rates_by_block(cls, settings, depth, anywhere=True)

    def after_similar(self, num_tokens: int) -> int:
        """Patch tokens the S-stage leaves of ``num_tokens``."""
        # By floats as the rate: torch.export would fix the parity that // 2 has at the traced size.
        return num_tokens - min(self.r, math.floor(num_tokens / 2))

    def count(self, num_tokens: int, num_patches: int) -> int:
        left = math.floor(self.keep_rate * self.after_similar(num_tokens) + 0.5)
        return max(1, left) if self.any_size else left

    def cost(self, at: BlockSizes) -> Change:
        similar = min(self.r, at.tokens // 2)
        width = at.heads * at.head_dim if self.keys == "concatenated" else at.head_dim
        left = max(math.floor(self.keep_rate * (at.tokens - similar) + 0.5), int(self.any_size))
        votes = matching = 0
        if similar:
            votes += 1
            matching = alternating_pairs(at.tokens, width)
        if left < at.tokens - similar:
            votes += self.num_iters + (bool(similar) and self.renormalise)  # whose sums of rows cost as much as a vote
        return Change(at.tokens, at.tokens, left, votes * at.map_entries + matching)

    def map_edit(self) -> EditMap | None:
        return SumMap(self.first_signal, hold=True)

    def boost(self, number: int) -> float:
        """Initial weight of the class-like tokens among ``number`` tokens that vote."""
        return torch.sym_sqrt(number) if self.cls_boost is None else self.cls_boost

    def first_signal(self, state: AttnState) -> Tensor:
        """(B, heads, P+N) what the tokens have in the vote of stage I'."""
        number = state.keys.num_prefix + state.keys.num_tokens
        like = state.q[..., 0].to(wide_dtype(state.q.dtype))
        return start_signal(like, number, self.boost(number), state.keys.num_class)

    @torch.no_grad()
    def first_importance(self, state: AttnState) -> Tensor:
        """(B, P+N) page rank of all tokens after one vote."""
        sums = state.sums
        if sums is None:
            assert state.weights is not None
            sums = map_sums(state.weights, self.first_signal(state))
        return aggregate_heads(sums.received, self.var_range)

    @torch.no_grad()
    def importance(self, state: AttnState, num_iters: int, kept: Tensor | None = None) -> Tensor:
        """(B, P+N) page rank of all tokens, or of those where kept (B, P+N) is 1 and 0 for the others."""
        keys = state.keys
        number = keys.num_prefix + (keys.num_tokens if kept is None else self.after_similar(keys.num_tokens))
        boost = self.boost(number)
        if state.weights is not None:
            signal = weighted_page_rank(state.weights, num_iters, boost, keys.num_class, kept, number, self.renormalise)
            return aggregate_heads(signal, self.var_range, number)
        (q, k), index = state.map_factors(), None
        if kept is not None and self.renormalise:
            index = image_order(kept, number)  # (B, number)
            rows = flat_rows(index, kept.shape[1])
            q, k = take_heads(q, rows), take_heads(k, rows)  # (B, heads, number, D)
        k = k.transpose(2, 3).contiguous()  # (B, heads, D, N or number)
        signal = start_signal(q[..., 0], number, boost, keys.num_class)  # (B, heads, N or number)
        signal = page_rank_in_pieces(q, k, num_iters, signal, kept if index is None else None)
        if kept is None:
            return aggregate_heads(signal, self.var_range)
        if index is None:
            return aggregate_heads(signal, self.var_range, number)
        ranks = aggregate_heads(signal, self.var_range)  # (B, number)
        return ranks.new_zeros(kept.shape).scatter(1, index, ranks)

    def features(self, k: Tensor) -> Tensor:
        """(B, N, heads * D), or (B, N, D), of the patches, which the S-stage compares; k is (B, heads, N, D)."""
        return widened(k).mean(dim=1) if self.keys == "averaged" else k.transpose(1, 2).flatten(2)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        num_prefix, distinct = tokens.num_prefix, self.after_similar(tokens.num_tokens)
        number = self.count(tokens.num_tokens, tokens.num_patches)
        left = kept = None
        if distinct < tokens.num_tokens:
            scores = check_finite(self.first_importance(state)[:, num_prefix:], self.origin("page rank"), state.x)
            features = self.features(state.k[:, :, num_prefix:].detach())
            group_a, group_b = split_groups(scores, self.partition)
            closest = _similarities(features, group_a, group_b, self.similarity).amax(-1)  # (B, |A|)
            pruned = group_a.gather(1, closest.topk(tokens.num_tokens - distinct, dim=1).indices)  # (B, r)
            left = torch.ones_like(scores, dtype=torch.int64).scatter(1, pruned, 0)  # (B, N) 1 where still there
            kept = F.pad(left, (num_prefix, 0), value=1)  # (B, P+N)
        if number < distinct:
            scores = check_finite(
                self.importance(state, self.num_iters, kept)[:, num_prefix:], self.origin("page rank"), x
            )
            if left is not None:
                scores = scores.masked_fill(left == 0, -1)
            return tokens.select(x, scores.topk(number, dim=1).indices.sort(dim=1).values, number)
        return (x, tokens) if left is None else tokens.select(x, image_order(left, number), number)


def image_order(left: Tensor, number: int) -> Tensor:
    """Positions of the ``number`` ones in each row of left (B, N), ascending: (B, number)."""
    place = torch.arange(left.shape[1], device=left.device)
    return (place - left * left.shape[1]).sort(dim=1).values[:, :number] + left.shape[1]
