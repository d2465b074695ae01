"""DyMU: merge every pair of tokens above a learnt similarity, as many as the image has (arXiv 2504.17040)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Settings
from effvit.recording import is_recorded
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.cost import BlockSizes, Change, alternating_pairs
from effvit.reducers.matching import mean_keys
from effvit.reducers.merging import apply_merge, number_merged, plan_merge
from effvit.reducers.ragged import RAGGED, packs, padded_if
from effvit.schedule import check_choice, check_count, check_number, check_switch, dymu_r, per_block
from effvit.tokens import TokenMap

__all__ = ["PRESETS", "DyMU"]


class Preset(NamedTuple):
    """Tokens to merge over all blocks, and the thresholds that were learnt for them, one for each block."""

    r_total: int
    thresholds: tuple[float, ...]


# Printed in comments of inference_siglip.py and inference_openai_clip.py @c57d75a, as bfloat16 holds them, for the two
# official models "72out". They belong to the weights "webli" and "openai" of these towers and to images of this size.
PRESETS = {
    "siglip_base_384_72out": Preset(
        504,
        (
            *(0.98046875, 0.90234375, 0.875, 0.8828125, 0.875, 0.8828125),
            *(0.890625, 0.890625, 0.8828125, 0.890625, 0.875, 0.875),
        ),
    ),
    "clip_large_336_72out": Preset(
        504,
        (
            *(0.99609375, 0.97265625, 0.94140625, 0.91015625, 0.87890625, 0.87890625),
            *(0.87890625, 0.84765625, 0.84765625, 0.87890625, 0.84765625, 0.84765625),
            *(0.87890625, 0.87890625, 0.91015625, 0.91015625, 0.91015625, 0.91015625),
            *(0.94140625, 0.87890625, 0.87890625, 0.97265625, 0.99609375, 0.81640625),
        ),
    ),
}


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
        self.takes_padding = not compat
        self.register_buffer("threshold", torch.empty((), dtype=torch.float32))
        self.register_buffer("num_batches", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        preset: str | None = None,
        r_total: int | Sequence[int] | None = None,
        r_schedule: str = "constant",
        thresholds: Sequence[float] | None = None,
        max_r_per_instance_ratio: float | None = None,
        ragged: str = "auto",
        compat: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            preset: One of PRESETS, published thresholds for a host of as many blocks: of SigLIP ViT-B/16 at 384 px
                (vit_base_patch16_siglip_384) or CLIP ViT-L/14 at 336 px (vit_large_patch14_clip_quickgelu_336).
            r_total: Tokens an average image is to lose over all blocks, which calibration aims at; or a list with
                one number for each block. A block with 0 merges nothing. None takes the preset's, beside which no other
                is possible, else 96, that of the official vit_base_patch16_siglip_224_tome.
            r_schedule: How ``r_total`` is spread, "constant", "linear" or "reverse_linear", see
                ``schedule.dymu_r``.
            thresholds: Cosine similarities to merge above, one for each block, in place of calibration; they
                stay even if a checkpoint holds others. Those of blocks with r 0 are not used. None takes the preset's.
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
        if preset is not None:
            check_choice("preset", preset, PRESETS)
            if depth != len(PRESETS[preset].thresholds):
                raise ValueError(
                    f"preset {preset!r} has thresholds of {len(PRESETS[preset].thresholds)} blocks, and the host has "
                    f"{depth}; give the setting thresholds, or call effvit.calibrate"
                )
            if r_total not in (None, PRESETS[preset].r_total):
                raise ValueError(
                    f"preset {preset!r} has thresholds that were learnt for r_total {PRESETS[preset].r_total}, got "
                    f"{r_total}; leave r_total out, or leave preset out and call effvit.calibrate"
                )
            r_total = PRESETS[preset].r_total
            thresholds = PRESETS[preset].thresholds if thresholds is None else thresholds
        r_total = 96 if r_total is None else r_total
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
        packed = state.packable and packs(self.ragged, merge.lengths, tokens.num_prefix, state.q)
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
