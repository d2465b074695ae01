"""ATS: sample the tokens an image needs by the inverse of a score distribution (arXiv 2111.15667)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState, Pick, Picked
from effvit.protocols import Settings
from effvit.recording import is_recorded
from effvit.reducers.base import Reducer, check_finite, refuse_recording
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import Rated
from effvit.reducers.ragged import RAGGED, packs, padded_if
from effvit.schedule import (
    check_blocks,
    check_choice,
    check_count,
    check_fraction,
    check_switch,
    per_block,
)
from effvit.tokens import compact, fx_leaf, packed_rows

__all__ = ["ATS", "GRIDS", "inverse_transform_sample", "significance"]

GRIDS = ("official", "midpoint")
VALUE_NORMS = ("concat", "per_head")


def significance(state: AttnState, value_norm: str = "concat") -> Tensor:
    """Score of every patch token: class attention times the norm of its value (ATS section 3.1, eq. 3).

    With a distillation token the attention rows of both class-like tokens are averaged.

    Args:
        state: State of the block.
        value_norm: "concat": norm over the concatenated heads, as ats_block.py@9271257; "per_head": a norm for
            each head, summed after weighting with that head's attention.

    Returns:
        (B, N), sums to 1 for each image; 0 for padding.
    """
    keys = state.keys
    rows = state.class_rows()[..., keys.num_prefix :]  # (B, heads, num_class, N)
    attention = rows[:, :, 0] if keys.num_class == 1 else rows.mean(2)  # (B, heads, N)
    over = (1, 3) if value_norm == "concat" else (3,)
    norm = torch.linalg.vector_norm(state.v, dim=over, dtype=attention.dtype)  # (B, P+N), or (B, heads, P+N)
    if value_norm == "concat":
        norm = keys.unpack(norm) if keys.packed else norm
        score = attention.sum(1) * norm[:, keys.num_prefix :]
    else:
        norm = keys.unpack(norm.transpose(1, 2)).transpose(1, 2) if keys.packed else norm
        score = (attention * norm[..., keys.num_prefix :]).sum(1)
    if keys.valid is not None:
        score = score * keys.valid
    return F.normalize(score, p=1.0, dim=1)


class Sample(NamedTuple):
    """Sampled tokens, in ascending order of score.

    Attributes:
        order: (B, N) tokens in ascending order of score, padding first.
        picked: (B, N) True where ``order`` was sampled.
    """

    order: Tensor
    picked: Tensor


@fx_leaf
def inverse_transform_sample(
    scores: Tensor, num_points: int | Tensor, valid: Tensor | None = None, grid: str = "official", compat: bool = False
) -> Sample:
    """Tokens nearest, on the cumulated score, to a regular grid of points (ATS section 3.2, Algorithm 1).

    The distribution runs over ascending scores and is scaled to [0, 1]; a token is sampled if at least one grid
    point is nearer to it than to any other (ties: the lower token). Since grid and distribution are sorted, that
    is a comparison of two grid positions a token, with no distance matrix and no search for duplicates.

    Args:
        scores: (B, N), not negative; 0 for padding.
        num_points: Grid points, at least 2; (B, 1) if each image has its own number.
        valid: (B, N) False for padding.
        grid: "official": points from the smallest non-zero value to 1, as ats_block.py@9271257; "midpoint":
            (2k - 1) / 2K.
        compat: Reproduce the official batch: padding takes part in the scaling, so that an image's sample
            depends on its neighbours; with fewer points than tokens the lowest are cropped beforehand.

    Returns:
        The sample. The highest score is always in it for the official grid, whose last point is 1.
    """
    real = None
    if valid is None:
        ascending, order = scores.sort(dim=1)
        cumulated = lowest = ascending.cumsum(1)  # (B, N)
    else:
        ascending, order = scores.masked_fill(~valid, -1).sort(dim=1)
        real = ascending >= 0
        cumulated = ascending.clamp(min=0).cumsum(1)
        lowest = cumulated if compat else cumulated.masked_fill(~real, float("inf"))
    top, bottom = cumulated[:, -1:], lowest.amin(1, keepdim=True)  # (B, 1)
    tiny = torch.finfo(scores.dtype).tiny
    height = (cumulated - bottom) / (top - bottom).clamp(min=tiny)  # (B, N), 0 to 1
    if real is not None:
        height = height.clamp(min=0)  # of padding

    if grid == "official":
        first = height.masked_fill(height <= 0, 1).amin(1, keepdim=True)
        step = ((1 - first) / (num_points - 1)).clamp(min=tiny)
    else:
        step = 1 / num_points.to(top.dtype) if isinstance(num_points, Tensor) else torch.full_like(top, 1 / num_points)
        first = step / 2
    # The last grid point nearer to token j than to j + 1 is the last one up to the middle between the two.
    middle = (height[:, :-1] + height[:, 1:]) / 2
    last_point = ((middle - first) / step).floor().clamp(min=-1)
    if compat:
        place = torch.ones_like(order[:, :-1]).cumsum(1) - 1
        last_point = last_point.masked_fill(place < scores.shape[1] - num_points, -1)
    # (B, 1), since a number in F.pad would fix the image size of a graph.
    if isinstance(num_points, Tensor):
        every_point = (num_points - 1).to(top.dtype)
    else:
        every_point = torch.full_like(top, num_points - 1)
    reached = torch.cat([last_point, every_point], dim=1) > F.pad(last_point, (1, 0), value=-1)  # (B, N)
    return Sample(order, reached if real is None else reached & real)


class ATS(Rated):
    """Adaptive token sampling (ATS, 2111.15667): how many tokens stay depends on the image.

    Tokens are sampled before attention, whose keys still cover all of them; only the sampled query rows are
    computed. Tokens leave in ascending order of score, as in the official code.

    By default an image's result does not depend on its batch: the score distribution is scaled over the image's
    own tokens. ``compat=True`` reproduces ats_block.py@9271257, which scales it over the padding too.

    A forward pass reads from the device once per reducing block: how many tokens each image keeps. Padded with
    ``drop_tokens=False`` it never does.
    """

    name = "ats"
    summary = "sample tokens from the class-attention distribution, as many as the image needs (2111.15667)"
    needs_class_token = True
    variable_length = True
    graph_reads_counts = True
    rate_of_many = 0.5  # by default it samples as often as there are tokens, and even attention then drops next to none

    def __init__(
        self,
        keep_rate: float | None,
        num_tokens: int | None,
        grid: str,
        value_norm: str,
        ragged: str,
        drop_tokens: bool,
        compat: bool,
    ) -> None:
        super().__init__()
        self.keep_rate = keep_rate
        self.base_keep_rate = keep_rate
        self.num_tokens = num_tokens
        self.grid = grid
        self.value_norm = value_norm
        self.ragged = ragged
        self.drop_tokens = drop_tokens
        self.compat = compat
        self.takes_padding = not compat
        self.reads_counts = drop_tokens or ragged == "packed"

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] | None = None,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        grid: str = "official",
        value_norm: str = "concat",
        ragged: str = "auto",
        drop_tokens: bool = True,
        compat: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            keep_rate: Sampling points as a fraction of the patches of the image, in (0, 1]: at most so many
                tokens stay. None, the published setting, takes as many points as patches, of which many fall on
                the same token; 1 switches the method off. One value, or one for each block.
            reduce_at: 0-based blocks that sample; None means all from block depth // 4 on (3 to 11 of 12).
            num_tokens: Sampling points as an absolute number in place of a rate (the official NUM_TOKENS, which
                counts the class token, minus 1).
            grid: "official" or "midpoint", see ``inverse_transform_sample``.
            value_norm: "concat" or "per_head", see ``significance``.
            ragged: How images with different counts share a batch: "padded" to the longest with a key mask, "packed"
                one after another with variable-length attention and no padding, or "auto", whichever is faster for
                the batch (see ``effvit.reducers.ragged``). Equal results; "packed" cannot be exported.
            drop_tokens: Cut the padding to the longest image; False keeps ``num_tokens`` slots, as whatever is
                compiled, exported or traced does. Same result, except with ``compat``, which then refuses to be.
            compat: Reproduce the official batch dependence and cropping.
        """
        for name, value, known in (
            ("grid", grid, GRIDS),
            ("value_norm", value_norm, VALUE_NORMS),
            ("ragged", ragged, RAGGED),
        ):
            check_choice(name, value, known)
        ragged = padded_if(compat, ragged)
        check_switch("drop_tokens", drop_tokens)
        check_switch("compat", compat)
        blocks = check_blocks("reduce_at", range(depth // 4, depth) if reduce_at is None else reduce_at, depth)
        points: dict[int, int | None] = dict.fromkeys(blocks)
        rates: dict[int, float | None] = dict.fromkeys(blocks)
        if num_tokens is not None:
            points = {
                b: check_count("num_tokens", v, 2) for b, v in per_block("num_tokens", num_tokens, blocks).items()
            }
        if num_tokens is not None and keep_rate is not None:
            raise ValueError(
                f"keep_rate and num_tokens both set the sampling points, got {keep_rate} and {num_tokens}; give one"
            )
        if keep_rate is not None:
            rates = {b: check_fraction("keep_rate", v) for b, v in per_block("keep_rate", keep_rate, blocks).items()}
        options = (grid, value_norm, ragged, drop_tokens, compat)
        return {b: cls(rates[b], points[b], *options) for b in blocks if rates[b] != 1}

    @classmethod
    def example(cls) -> Settings:
        return {"reduce_at": (1, 2, 3)}

    def num_points(self, num_patches: int) -> int:
        """Sampling points for an image of so many patches."""
        if self.num_tokens is not None:
            return self.num_tokens
        return max(2, math.ceil((1.0 if self.keep_rate is None else self.keep_rate) * num_patches))

    def count(self, num_tokens: int, num_patches: int) -> int:
        return min(self.num_points(num_patches), num_tokens)

    def cost(self, at: BlockSizes) -> Change:
        return Change(at.tokens, at.left, at.left, at.class_rows)

    def pick(self) -> Pick | None:
        return None if self.keep_rate == 1 else self.sample  # off by set_keep_rate, as ``plan`` leaves such a block out

    def sample(self, state: AttnState) -> Picked:
        """Sample the query rows that are computed from the scores of all tokens."""
        tokens = state.keys
        self.check_recordable(state.q)
        own = tokens.layout.own
        width = self.count(tokens.num_tokens, tokens.num_patches if own is None else max(own))
        num_points: int | Tensor = self.num_points(tokens.num_patches)
        if own is not None:
            num_points = torch.tensor([[self.num_points(number)] for number in own], device=state.q.device)  # (B, 1)
        with torch.no_grad():
            scores = check_finite(significance(state, self.value_norm), self.origin("token scores"), state.x)
            sample = inverse_transform_sample(scores, num_points, tokens.valid, self.grid, self.compat)
            must_pack = self.ragged == "packed"
            kept = compact(sample.order, sample.picked, width, self.drop_tokens, is_recorded(scores), must_pack)
        packed = state.packable and packs(self.ragged, kept.lengths, tokens.num_prefix, state.q)
        packed = packed or tokens.packed
        left = tokens.keep(kept.order, width, valid=kept.valid, packed=packed, lengths=kept.lengths)
        rows = packed_rows(tokens, kept.order, left) if packed else tokens.rows(kept.order)
        return Picked(rows, left)

    def check_recordable(self, q: Tensor) -> None:
        """Raise a ValueError where a graph of fixed shapes would differ from a plain run, or cannot be made."""
        if self.ragged == "packed":
            self.refuse_packed_recording(q)
        if self.compat and self.drop_tokens:
            refuse_recording(
                q,
                f"{self.name} in block {self.block}: compat=True depends on how much padding drop_tokens=True cuts off",
                "use drop_tokens=False, or compat=False",
            )
