"""Selection over the frames of one video: ``select_video``, and its module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from effvit.layers.macs import Terms
from effvit.protocols import Setting, Size
from effvit.reducers.base import refuse_recording
from effvit.schedule import check_count
from effvit.selectors.base import Keep, Selector
from effvit.selectors.holitom import HoliTom
from effvit.selectors.registry import make_selector
from effvit.selectors.select import (
    CLASS_ROW,
    SelectingTower,
    TowerFeatures,
    check_features,
    choose_tokens,
    features_of,
)
from effvit.selectors.selection import Selection

__all__ = ["VideoSelector", "select_video"]


def select_video(
    tower: nn.Module | None,
    frames: Tensor | None,
    method: str | Selector = HoliTom.name,
    *,
    keep: Keep = None,
    block: int | None = None,
    merge: int | None = None,
    tokens: Tensor | None = None,
    grid: Size | None = None,
    scores: Tensor | str = CLASS_ROW,
    keys: Tensor | None = None,
    relevance: Tensor | None = None,
    max_norm: float | None = None,
    **settings: Setting,
) -> Selection:
    """The tokens of one video, as a Selection of one "image" whose grid is (T, H, W).

    HoliTom looks at all frames; any other method chooses in each frame alone, ``keep`` of it. The prefix (1, T * P, C)
    is that of all frames, one after another.

    Args:
        tower: As for ``select_tokens``; None where ``tokens`` are given.
        frames: (T, 3, H, W).
        method: As for ``select_tokens``, and so are block, merge, tokens, grid, scores, keys, relevance, max_norm and
            settings, of frames in place of images.
        keep: Share of the cells of all frames for HoliTom, in (0, 1]; of each frame otherwise, or a number.

    Raises:
        ValueError: A share out of range, a method for crops, NaN; what ``select_tokens`` refuses.
        TypeError: Both or neither of a tower and tokens.
    """
    selector = make_selector(method, settings)
    if isinstance(selector, HoliTom):
        selector.share(keep)
    found = features_of(
        selector,
        tower,
        frames,
        keep=keep,
        block=block,
        merge=merge,
        max_norm=max_norm,
        tokens=tokens,
        grid=grid,
        scores=scores,
        keys=keys,
        relevance=relevance,
    )
    return choose_in_video(selector, found, keep)


def choose_in_video(selector: Selector, found: TowerFeatures, keep: Keep) -> Selection:
    """What the selector makes of features of the frames; arguments and errors as of ``select_video``."""
    features, of_map, prefix = found
    if not isinstance(selector, HoliTom):
        return one_after_another(choose_tokens(selector, features, keep, of_map, prefix))
    check_features(features, selector)
    refuse_recording(
        features.x,
        f"{selector.name} leaves as many tokens as the video needs",
        "use a method that keeps a number in each frame, such as 'class_attention'",
    )
    chosen = selector.choose_video(features, selector.share(keep))
    return chosen if prefix is None else chosen._replace(prefix=prefix.flatten(0, 1).unsqueeze(0))


def one_after_another(chosen: Selection) -> Selection:
    """What was chosen in each frame, T images, as the Selection of one video."""
    frames = torch.arange(len(chosen.ids), device=chosen.ids.device).unsqueeze(1)  # (T, 1)
    ids = chosen.ids + frames * math.prod(chosen.grid)
    group = chosen.group
    if group is not None:
        before = (chosen.counts.cumsum(0) - chosen.counts).unsqueeze(1)
        group = torch.where(group < 0, -1, group + before).reshape(1, -1)
    tokens, ids = (
        (x.flatten(0, 1) if chosen.valid is None else x[chosen.valid]).unsqueeze(0) for x in (chosen.tokens, ids)
    )
    return Selection(
        tokens,
        ids,
        chosen.counts.sum().view(1),
        None,
        group,
        (len(frames), *chosen.grid),
        None if chosen.scores is None else chosen.scores.reshape(1, -1),
        None if chosen.prefix is None else chosen.prefix.flatten(0, 1).unsqueeze(0),
    )


class VideoSelector(SelectingTower):
    """A tower and a selector as one module, the frames of a video (T, 3, H, W) -> Selection.

    The module of ``effvit.select_video``, as ``effvit.TokenSelector`` is of ``effvit.select_tokens``. Its multiply-adds
    and times are those of all frames of one video.

    Args:
        tower: As for ``select_video``, and so is the method.
        method: A selector, by its name or itself.
        frames: T.
        asked: keep, block, merge, scores, max_norm and settings, as for ``effvit.TokenSelector``.

    Raises:
        TypeError: A tower that ``sparsify`` does not take.
        ValueError: Less than one frame; what ``select_video`` refuses of the arguments.
    """

    def __init__(self, tower: nn.Module, method: str | Selector, *, frames: int, **asked: Any) -> None:
        super().__init__(tower, method, **asked)
        if isinstance(self.selector, HoliTom):
            self.selector.share(self.keep)
        self.views = check_count("frames", frames, 1)
        self.settings |= {"frames": frames}

    @property
    def adapts(self) -> bool:
        """Whether the number of tokens, and so the cost, depends on the video."""
        return isinstance(self.selector, HoliTom) or super().adapts

    def forward(self, frames: Tensor, relevance: Tensor | None = None) -> Selection:
        """The tokens that leave the frames (T, 3, H, W) of one video; ``relevance`` (T, N) as for ``select_tokens``."""
        if len(frames) != self.views:
            raise ValueError(
                f"this selector is for videos of {self.views} frames, got {len(frames)}; make one with "
                f"frames={len(frames)}"
            )
        return choose_in_video(self.selector, self.read(frames, relevance), self.keep)

    def closed_form(self, size: Size) -> Terms:
        """MACs of all frames (H, W) by term; errors as of ``TokenSelector.closed_form``, HoliTom's always."""
        if isinstance(self.selector, HoliTom):
            raise ValueError(
                f"{self.selector.name} merges what stays the same, so its cost depends on the video and does not "
                "follow from sizes; count on frames by effvit.count_flops(..., images=...)"
            )
        return self.view_by_view(size)
