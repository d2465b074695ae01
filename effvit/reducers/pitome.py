"""PiToMe: merge tokens that many others are like, and protect the rest (arXiv 2405.16148)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings
from effvit.recording import is_recorded
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.bipartite import Matching, MergedGrids, bipartite_soft_matching, matching_target, merge_tokens
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.keep_rate import Rated
from effvit.reducers.matching import falling, mean_keys
from effvit.schedule import check_blocks, check_fraction, check_number, check_switch, keep_rate_ladder, per_block
from effvit.tokens import Ranges, TokenMap, fx_leaf, ranges_of, take_rows, wide_product, widened

__all__ = ["PiToMe", "energy", "energy_matching"]

LEAST_RATE = 0.5  # no more than half of the tokens of a block find a partner
SIMILARITIES_AT_ONCE = 2**19  # 2 MiB, which stay in the cache of a CPU until they are summed


@fx_leaf
@torch.no_grad()
def energy(metric: Tensor, margin: float) -> Tensor:
    """(B, N) energy of each token: high for one of many alike, low for one of few (PiToMe, 2405.16148, section 3).

    The mean over all tokens, itself included, of ELU(cosine - margin), algo/pitome/merge.py@550b5de. Only some rows of
    the cosines are held, but where they are recorded, since other images may be larger. It has no gradient, as the
    choice that it makes has none.

    Args:
        metric: (B, N, D) features of the patch tokens.
        margin: Cosine from which on another token counts as alike; below it, it counts against.
    """
    batch, number = metric.shape[:2]
    unit = F.normalize(widened(metric), dim=-1)
    rows = number if is_recorded(unit) else max(1, SIMILARITIES_AT_ONCE // (batch * number))
    similarities = (wide_product(part, unit.transpose(1, 2)) for part in unit.split(rows, dim=1))  # (B, rows, N)
    return torch.cat([F.elu(part.sub_(margin), inplace=True).mean(dim=-1) for part in similarities], dim=1)


@fx_leaf
def energy_matching(
    metric: Tensor,
    r: int,
    margin: float,
    protects: bool,
    num_prefix: int,
    ranges: Ranges | None = None,
    origin: str = "tokens",
    x: Tensor | None = None,
    by_place: bool = False,
) -> Matching:
    """Match r tokens by ToMe's rule, with the tokens in order of falling energy in place of the image's.

    Args:
        metric: (B, N, D) features of the patch tokens, compared by cosine.
        r: Tokens to merge, at most N // 2.
        margin: As for ``energy``.
        protects: Only the 2 r tokens of most energy are candidates, and every second of them merges; False: all are,
            and the r most similar merge.
        num_prefix: Prefix tokens in front of the patches, which are no candidates.
        ranges: Those of the batch, for P + N places at least; None: made here.
        origin: What the features are, for messages.
        x: (B, P+N, C) tokens that entered the block, for messages; of fewer images, each has as many rows of features.
        by_place: What is equal but for rounding is ordered and matched by place, see ``falling``.

    Returns:
        The matching. The new order is the protected tokens by energy, what is left of the first set by falling
        similarity, then the second set by energy, as in the official code; with r 0 all tokens where they were.

    Raises:
        ValueError: Energies that are NaN, see ``check_finite``.
    """
    number = metric.shape[1]
    ranges = ranges_of(metric, num_prefix + number, num_prefix) if ranges is None else ranges
    places = ranges.sequence
    if r == 0:
        return Matching(places[:, :0], places[:, : num_prefix + number], places[:, :0], num_prefix)
    rows = 1 if x is None else max(1, metric.shape[0] // x.shape[0])
    order = falling(check_finite(energy(metric, margin), origin, x, rows), by_place)  # (B, N)
    number_compared = 2 * r if protects else number
    compared = take_rows(metric, torch.add(order[:, :number_compared], ranges.images, alpha=number))
    pairs = bipartite_soft_matching(compared, r, 0, ranges, origin, x, by_place=by_place)
    order = order + num_prefix
    candidates, protected = order[:, :number_compared], order[:, number_compared:]
    kept = torch.cat([places[:, :num_prefix], protected, candidates.gather(1, pairs.kept)], dim=1)
    into = pairs.into + (num_prefix + protected.shape[1])
    return Matching(candidates.gather(1, pairs.merged), kept, into, num_prefix)


class PiToMe(Rated):
    """Merge tokens of high energy, those that many others are like (PiToMe, 2405.16148).

    Place, similarity and means are those of ToMe: keys averaged over heads, as they enter attention, between attention
    and MLP. What differs is who may merge: the sets alternate along the order of falling energy, and in the blocks of
    ``protect_at`` all but the tokens of most energy are left alone. A block loses floor(N - keep_rate N) of N patches.

    Deviations from algo/pitome/patch@550b5de: all prefix tokens are protected, not only the class token; a block with
    too few tokens to lose one is left as it is (officially permuted, or an error); an average over patches weights
    merged tokens by their size.
    """

    name = "pitome"
    summary = "merge the tokens that many others are like, and protect the rest (2405.16148)"
    keeps_every_patch = True
    rate_of_few = 0.95
    open_sides = 0

    def __init__(self, keep_rate: float, margin: float, protects: bool, prop_attn: bool) -> None:
        super().__init__()
        self.keep_rate = self.base_keep_rate = keep_rate
        self.margin = margin
        self.protects = protects
        self.prop_attn = prop_attn

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.9,
        reduce_at: Sequence[int] | None = None,
        margins: Sequence[float] = (0.75, 0.0),
        protect_at: Sequence[int] | None = None,
        prop_attn: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method. The authors have one rate for all blocks and no default; 0.9 is ours.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction of the patch tokens that each block leaves, in [0.5, 1]; one value, or one for each
                block of ``reduce_at``.
            reduce_at: 0-based blocks that merge; None means all, as in the paper.
            margins: Margin of the energy in the first block, and what it would be in one behind the last; the blocks
                between lie on the line. The authors use (0.75, 0) for DeiT and MAE, (0.9, 0) for timm's AugReg weights,
                CLIP and BLIP, (0.75, 0.35) for BLIP-2.
            protect_at: 0-based blocks that protect the tokens of low energy; None means the second half of the depth,
                as for DeiT. The authors' MAE has it the other way round, the first half.
            prop_attn: Proportional attention: a token of size s receives attention like s equal tokens. The authors
                have none.
        """
        blocks = check_blocks("reduce_at", range(depth) if reduce_at is None else reduce_at, depth)
        half = range((depth + 1) // 2, depth)
        protecting = check_blocks("protect_at", half if protect_at is None else protect_at, depth)
        first, last = check_margins(margins)
        check_switch("prop_attn", prop_attn)
        rates = {b: check_rate(rate) for b, rate in per_block("keep_rate", keep_rate, blocks).items()}
        return {
            b: cls(rate, first + (last - first) * b / depth, b in protecting, prop_attn)
            for b, rate in rates.items()
            if rate < 1
        }

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.8}

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"keep_rate": rate} for rate in rates_in_ladder()]]

    def num_merged(self, num_tokens: int) -> int:
        """Tokens that are merged away of ``num_tokens``; ``set_keep_rate`` may have set a rate below the least."""
        return math.floor(num_tokens - num_tokens * check_rate(self.keep_rate))

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens - self.num_merged(num_tokens)

    def cost(self, at: BlockSizes) -> Change:
        merged = math.floor(at.tokens - at.tokens * self.keep_rate)
        compared = 2 * merged if self.protects else at.tokens
        macs = at.tokens**2 * at.head_dim + alternating_pairs(compared, at.head_dim)
        return Change(at.tokens, at.tokens, at.tokens - merged, macs if merged else 0)

    @torch.no_grad()
    def group(self, features: Tensor, x: Tensor, area: int) -> MergedGrids:
        """Groups of the pairs of each grid, compared as they enter the block, see ``ToMe.group``."""
        r = self.num_merged(features.shape[1])
        origin = self.origin("tokens")
        matching = energy_matching(features, r, self.margin, self.protects, 0, origin=origin, x=x, by_place=True)
        return MergedGrids(matching, matching_target(matching, features[..., 0].long()), self.prop_attn)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        r = self.num_merged(tokens.num_tokens)
        if r == 0:
            return x, tokens
        ranges, num_prefix = tokens.layout.ranges, tokens.num_prefix
        metric = mean_keys(state.k)[:, num_prefix:]  # (B, N, D)
        origin = self.origin("keys")
        matching = energy_matching(metric, r, self.margin, self.protects, num_prefix, ranges, origin, state.x)
        x, size = merge_tokens(x, tokens.size, matching, ranges)
        weight = size if self.prop_attn else None
        return x, tokens.relabel(matching, tokens.num_tokens - r, size, weight, keeps_every_patch=True)


def rates_in_ladder() -> list[float]:
    """The keep rates of ``keep_rate_ladder`` that the method takes."""
    rates = [settings["keep_rate"] for settings in keep_rate_ladder()]
    return [rate for rate in rates if isinstance(rate, float) and rate >= LEAST_RATE]


def check_rate(rate: float) -> float:
    """The keep rate of a block, if at most half of the tokens leave at it."""
    if check_fraction("keep_rate", rate) < LEAST_RATE:
        raise ValueError(
            f"pitome merges pairs, so keep_rate must be at least {LEAST_RATE} in each block, got {rate}; "
            "merge in more blocks"
        )
    return rate


def check_margins(margins: Sequence[float]) -> tuple[float, float]:
    """The margins of the first block and behind the last."""
    if not isinstance(margins, (list, tuple)) or len(margins) != 2:
        raise ValueError(f"margins must be a pair, of the first block and behind the last, got {margins!r}")
    first, last = (check_number("margins", margin) for margin in margins)
    return first, last
