"""MCTF: fuse tokens that are alike, say little and are small, in both directions (arXiv 2403.10030)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effvit.attention import AttnState, EditMap, Pooled, PoolTokens, SumMap, sum_beside
from effvit.protocols import Host, Settings
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.bipartite import Matching, merge_tokens
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import SMALLEST_NORM
from effvit.schedule import check_blocks, check_choice, check_number, check_r, check_switch, per_block, spread_ladder
from effvit.tokens import Ranges, TokenMap, fx_leaf, position_of, wide_product, widened

__all__ = [
    "MCTF",
    "POOLING",
    "STEPS",
    "Criteria",
    "fuse_tokens",
    "fusion_weights",
    "pool_map",
    "pooling_weights",
    "two_way_matching",
]

STEPS = ("attention", "tokens", "after")
"""What is fused: the tokens of a block and its attention map (``one_step_ahead`` 1 of the official code), the tokens
alone before attention (2), or what leaves the block (0)."""

POOLING = ("attention", "size", "mean", "max")
"""What tokens become together: a mean, in which each weighs the attention it receives times its size (``pooling_type``
1), its size (0) or one (3), or the largest value of each channel (2)."""

LEAST_TOKENS = 10  # that a block leaves, prefix tokens included


class Criteria(NamedTuple):
    """How much each of three criteria counts; 0 leaves one out.

    Attributes:
        similarity: Temperature of the cosine of two tokens.
        information: Temperature of the inverse of the attention that tokens receive.
        size: Temperature of the inverse of their sizes.
    """

    similarity: float
    information: float
    size: float


@fx_leaf
def fusion_weights(x: Tensor, received: Tensor, size: Tensor | None, criteria: Criteria, num_prefix: int) -> Tensor:
    """Attractiveness of every pair of a patch token in set A and one in set B (MCTF, eq. 2 to 6): (B, |A|, |B|).

    The sets alternate along the whole sequence, prefix tokens included: A has its even, B its odd places. Large for
    tokens that are alike, receive little attention and stand for few patches.

    Args:
        x: (B, P+N, C) tokens.
        received: (B, P+N) attention each receives, the mean over heads and queries.
        size: (B, P+N) patches each stands for; None: one each.
        criteria: What counts.
        num_prefix: P, tokens that are in neither set.
    """
    first_a, first_b = num_prefix + num_prefix % 2, num_prefix + (num_prefix + 1) % 2
    x = widened(x)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    weights = x.new_ones(())
    if criteria.similarity:
        cosines = wide_product(x[:, first_a::2], x[:, first_b::2].transpose(1, 2))
        weights = ((cosines + 1) / 2) ** (1 / criteria.similarity)
    for value, temperature in ((received, criteria.information), (size, criteria.size)):
        if temperature and value is not None:
            value = value.to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
            inverse = value.amin(dim=1, keepdim=True) / value  # (B, P+N) 1 for the token of least
            pairs = inverse[:, first_a::2].unsqueeze(2) * inverse[:, first_b::2].unsqueeze(1)
            weights = weights * pairs ** (1 / temperature)
    shape = x.shape[0], len(range(first_a, x.shape[1], 2)), len(range(first_b, x.shape[1], 2))
    return weights.expand(shape)


@fx_leaf
def two_way_matching(weights: Tensor, r: int, num_prefix: int, both_ways: bool, x: Tensor) -> Matching:
    """Which r tokens go where: a half from A into B, then, in what that leaves, the others from B into A.

    Each goes into the token it is most attracted by. The second half is decided by the same weights without what left
    A, and takes along what it received.

    Args:
        weights: (B, |A|, |B|) of ``fusion_weights``.
        r: Tokens that leave, at most half of the patches.
        num_prefix: Prefix tokens in front of the patches.
        both_ways: False: all r go from A into B.
        x: (B, P+N, C) the tokens, for their places.

    Returns:
        The matching. The new order is what is left of A, then what is left of B by falling attraction, or all of B.
    """
    batch, number_a, number_b = weights.shape
    first = r // 2 if both_ways else r
    start_a, start_b = num_prefix + num_prefix % 2, num_prefix + (num_prefix + 1) % 2
    numbers = torch.arange(x.shape[1], device=x.device).expand(batch, -1)
    behind = num_prefix + number_a - first  # where B begins in the new sequence
    best, match = weights.max(dim=2)  # (B, |A|)
    ranked = best.argsort(dim=1, descending=True)
    gone, left = ranked[:, :first], ranked[:, first:].sort(dim=1).values  # (B, first), (B, |A|-first)
    target = match.gather(1, gone)  # of B
    if not both_ways:
        kept = torch.cat([numbers[:, :num_prefix], start_a + 2 * left, numbers[:, start_b::2]], dim=1)
        return Matching(start_a + 2 * gone, kept, behind + target, num_prefix)
    back = weights.scatter(1, gone.unsqueeze(2).expand(-1, -1, number_b), float("-inf"))
    best, match = back.max(dim=1)  # (B, |B|) the token of A
    ranked = best.argsort(dim=1, descending=True)
    gone_b, left_b = ranked[:, : r - first], ranked[:, r - first :]
    place_a = position_of(left, match[:, :1].expand(-1, number_a))  # in the new sequence, of what is left
    into = num_prefix + place_a.gather(1, match.gather(1, gone_b))
    place_b = (position_of(left_b, match) + behind).scatter(1, gone_b, into)
    return Matching(
        torch.cat([start_a + 2 * gone, start_b + 2 * gone_b], dim=1),
        torch.cat([numbers[:, :num_prefix], start_a + 2 * left, start_b + 2 * left_b], dim=1),
        torch.cat([place_b.gather(1, target), into], dim=1),
        num_prefix,
    )


@fx_leaf
def pooling_weights(
    received: Tensor, size: Tensor | None, pooling: str, matching: Matching
) -> tuple[Tensor | None, Tensor]:
    """What each token weighs in a mean, (B, T), None for the largest value, and the sizes (B, T') of those left.

    Args:
        received: (B, T) attention each token receives.
        size: (B, T) patches each stands for; None: one each.
        pooling: One of ``POOLING``.
        matching: Which tokens go where.
    """
    size = torch.ones_like(received) if size is None else size
    left = size.gather(1, matching.kept).scatter_add(1, matching.into, size.gather(1, matching.merged))
    if pooling == "max":
        return None, left
    if pooling == "size":
        return size, left
    if pooling == "mean":
        return torch.ones_like(size), left
    return received.clamp(min=torch.finfo(received.dtype).tiny) * size / size.amax(1, keepdim=True), left


@fx_leaf
def fuse_tokens(x: Tensor, weight: Tensor | None, matching: Matching, ranges: Ranges | None = None) -> Tensor:
    """Tokens x (B, T, C), those that go together fused: (B, T', C).

    Args:
        x: The tokens.
        weight: (B, T) what each weighs in a mean; None: the largest value of each channel is taken.
        matching: Which tokens go where.
        ranges: Those of the batch; None: made here.
    """
    if weight is not None:
        return merge_tokens(x, weight, matching, ranges)[0]
    kept, merged, into = (
        y.unsqueeze(-1).expand(-1, -1, x.shape[2]) for y in (matching.kept, matching.merged, matching.into)
    )
    return x.gather(1, kept).scatter_reduce(1, into, x.gather(1, merged), "amax")


@fx_leaf
def pool_map(weights: Tensor, weight: Tensor | None, matching: Matching) -> Tensor:
    """Map of fused tokens, (B, heads, T', T').

    Args:
        weights: (B, heads, T, T) softmax map, of which fused keys are summed.
        weight: (B, T) by which fused queries are averaged; None: the largest entry is taken, as the official code does,
            so that rows may sum to more than 1.
        matching: Which tokens go where.
    """
    shape = weights.shape[:3]
    kept, merged, into = (y[:, None, None].expand(*shape, -1) for y in (matching.kept, matching.merged, matching.into))
    pooled = weights.gather(3, kept).scatter_add(3, into, weights.gather(3, merged))  # (B, heads, T, T')
    rows = fuse_tokens(pooled.transpose(1, 2).flatten(2), weight, matching)  # (B, T', heads * T')
    return rows.unflatten(2, (shape[1], -1)).transpose(1, 2)


class Fusion(NamedTuple):
    """Tokens fused: x (B, P+K, C), their map, which went where, and what each weighed before (B, P+N)."""

    x: Tensor
    tokens: TokenMap
    matching: Matching
    weight: Tensor | None


class MCTF(Reducer):
    """Fuse the r tokens of each block that are alike, receive little attention and are small (MCTF, 2403.10030).

    Half of them go from the even places of the sequence into the odd ones, the others the other way. By default the
    block's own attention map decides, and is pooled with the tokens: no second softmax is needed, and values are
    computed of the fused tokens alone. Official code: mlvlab/MCTF @ 2004da0, utils/mctf.py and
    models/modules/blocks.py.

    Deviations: prefix tokens, whatever their number, are never fused, and stay in front.

    Args:
        r: Tokens that leave: a whole number, or a share of the patches below 1.
        step: One of ``STEPS``.
        criteria: What makes tokens attractive to each other.
        bidirection: Whether tokens go both ways.
        prop_attn: Whether a fused token counts as a key by its size.
        pooling: One of ``POOLING``.
    """

    name = "mctf"
    summary = "fuse tokens that are alike, little attended and small (2403.10030)"
    open_sides = 0  # which tokens alternate is a matter of their number
    keeps_every_patch = True

    def __init__(
        self, r: float, step: str, criteria: Criteria, bidirection: bool, prop_attn: bool, pooling: str
    ) -> None:
        super().__init__()
        self.r = r
        self.step = step
        self.tau_sim, self.tau_info, self.tau_size = criteria
        self.bidirection = bidirection
        self.prop_attn = prop_attn
        self.pooling = pooling
        self.num_prefix = 1

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        r: float | Sequence[float] = 16,
        reduce_at: Sequence[int] | None = None,
        step: str = "attention",
        tau_sim: float = 1.0,
        tau_info: float = 20.0,
        tau_size: float = 40.0,
        bidirection: bool = True,
        prop_attn: bool = True,
        pooling: str = "attention",
    ) -> dict[int, Reducer]:
        """Settings of the method; the defaults are the paper's for DeiT.

        Args:
            depth: Blocks of the host.
            r: Tokens that leave each reducing block: whole numbers, or shares of its patch tokens below 1; one value,
                or one for each block. At most half of the tokens leave, and 10 stay, prefix tokens included.
            reduce_at: 0-based blocks that reduce; None: all but the first.
            step: What is fused: "attention" for the tokens and the map of the block's attention, "tokens" for the
                tokens alone before an attention of their own, "after" for what leaves the block.
            tau_sim: Temperature of the similarity; 0 leaves the criterion out.
            tau_info: Temperature of the informativeness, likewise.
            tau_size: Temperature of the size, likewise.
            bidirection: Fuse in both directions, a half of the tokens in each.
            prop_attn: Proportional attention: a token of size s receives attention like s equal tokens.
            pooling: What fused tokens become: their mean by the "attention" that each receives times its size, by
                "size" alone, or with equal weights, "mean", or the "max" of each channel.
        """
        check_choice("step", step, STEPS)
        check_choice("pooling", pooling, POOLING)
        check_switch("bidirection", bidirection)
        check_switch("prop_attn", prop_attn)
        for name, value in (("tau_sim", tau_sim), ("tau_info", tau_info), ("tau_size", tau_size)):
            if check_number(name, value) < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        criteria = Criteria(float(tau_sim), float(tau_info), float(tau_size))
        if not any(criteria):
            raise ValueError("one of tau_sim, tau_info and tau_size must be above 0, or nothing tells tokens apart")
        blocks = check_blocks("reduce_at", range(1, depth) if reduce_at is None else reduce_at, depth)
        values = {block: check_r(value) for block, value in per_block("r", r, blocks).items()}
        return {
            block: cls(value, step, criteria, bidirection, prop_attn, pooling)
            for block, value in values.items()
            if value > 0
        }

    @classmethod
    def off(cls) -> Settings:
        return {"r": 0}

    @classmethod
    def example(cls) -> Settings:
        return {"r": 5}

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"r": r} for r in spread_ladder(depth - 1, num_patches)]] if depth > 1 else []

    @property
    def place(self) -> str | None:  # type: ignore[override]
        """Where tokens leave: before the attention's keys and queries; behind the block is no place of a control."""
        return None if self.step == "after" else "block"

    @property
    def criteria(self) -> Criteria:
        """What makes tokens attractive to each other."""
        return Criteria(self.tau_sim, self.tau_info, self.tau_size)

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        self.num_prefix = host.num_prefix_tokens

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens - self.num_fused(num_tokens)

    def num_fused(self, num_tokens: int) -> int:
        """Tokens that leave of so many patch tokens."""
        r = int(self.r) if self.r >= 1 else int(num_tokens * self.r)
        return max(0, min(r, num_tokens + self.num_prefix - LEAST_TOKENS, num_tokens // 2))

    def cost(self, at: BlockSizes) -> Change:
        share = at.tokens * self.r if self.r < 1 else self.r
        fused = max(0, min(int(share), at.tokens // 2, at.prefix + at.tokens - LEAST_TOKENS))
        left, pairs = at.tokens - fused, alternating_pairs(at.tokens, at.dim) if self.tau_sim else 0
        if not fused:
            return Change(at.tokens, at.tokens, at.tokens, 0)
        weighted = self.prop_attn and at.tokens < math.prod(at.grid)
        scores = at.map_entries * (at.head_dim + weighted)  # sizes as a bias are one more feature of the keys
        if self.step == "after":
            return Change(at.tokens, at.tokens, at.tokens, pairs + at.map_entries * weighted, behind=left)
        if self.step == "tokens":
            return Change(left, left, left, pairs + scores, scored=at.tokens)
        spared = at._replace(tokens=left).map_entries * at.head_dim
        return Change(left, left, left, pairs + scores - spared, scored=at.tokens, valued=left)

    def map_edit(self) -> EditMap | None:
        if self.step == "after":
            return SumMap()
        return PoolTokens(lambda tokens: self.num_fused(tokens.num_tokens) > 0, self.pool, self.step == "attention")

    def pool(self, x: Tensor, state: AttnState) -> Pooled:
        """The tokens x (B, P+N, C) that entered a block fused, and its map with them unless they get another."""
        if self.step == "tokens":
            x, tokens, *_ = self.fuse(x, state.tokens, received_by(state), state.x)
            return Pooled(x, tokens, None)
        weights = state.softmax_map()
        fusion = self.fuse(x, state.tokens, weights.detach().mean(dim=(1, 2)), state.x)
        return Pooled(fusion.x, fusion.tokens, pool_map(weights, fusion.weight, fusion.matching))

    def note(self, state: AttnState) -> tuple[Tensor, Tensor | None] | None:
        if self.step != "after" or self.num_fused(state.tokens.num_tokens) == 0:
            return None
        return received_by(state), state.x

    def after(self, x: Tensor, tokens: TokenMap, note: Any) -> tuple[Tensor, TokenMap]:
        if note is None:
            return x, tokens
        x, tokens, *_ = self.fuse(x, tokens, *note)
        return x, tokens

    def fuse(self, x: Tensor, tokens: TokenMap, received: Tensor, origin: Tensor | None) -> Fusion:
        """Tokens x (B, P+N, C) -> (B, P+N-r, C).

        Args:
            x: The tokens, by which they are compared too.
            tokens: Their map.
            received: (B, P+N) attention that each receives.
            origin: What entered the block, for messages.
        """
        r, num_prefix = self.num_fused(tokens.num_tokens), tokens.num_prefix
        with torch.no_grad():
            weights = fusion_weights(x, received, tokens.size, self.criteria, num_prefix)
            check_finite(weights, self.origin("fusion weights"), origin)
            matching = two_way_matching(weights, r, num_prefix, self.bidirection, x)
            weight, size = pooling_weights(received, tokens.size, self.pooling, matching)
        x = fuse_tokens(x, weight, matching, tokens.layout.ranges)
        of_keys = size if self.prop_attn else None
        tokens = tokens.relabel(matching, tokens.num_tokens - r, size, of_keys, keeps_every_patch=True)
        return Fusion(x, tokens, matching, weight)


def received_by(state: AttnState) -> Tensor:
    """(B, P+N) attention each token receives, the mean over heads and queries; the map is summed a piece at a time."""
    sums = sum_beside(state, SumMap()).sums if state.sums is None else state.sums
    assert sums is not None
    return sums.received.detach().mean(dim=1) / state.q.shape[2]
