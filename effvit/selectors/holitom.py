"""HoliTom: patches of a video that do not change are merged over time, the others chosen by attention (2505.21334)."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.hosts.tower_exit import RECEIVED
from effvit.protocols import Size
from effvit.reducers.density import density_peaks
from effvit.schedule import check_count, check_fraction, check_number
from effvit.selectors.base import Features, Keep, Selector, left_over, required_scores
from effvit.selectors.selection import Selection
from effvit.tokens import wide_product, widened

__all__ = ["HoliTom", "Windows", "merge_static", "static_windows"]


class Windows(NamedTuple):
    """A video cut into windows.

    Attributes:
        spans: First and last frame of each.
        saved: Tokens that all of them save by merging the patches that do not change in a window.
    """

    spans: list[tuple[int, int]]
    saved: int


def static_windows(steps: Tensor, longest: int) -> Windows:
    """Cut a video into windows that save the most tokens (HoliTom, 2505.21334, section 3.2).

    A window of L frames in which n patches never change saves n (L - 1) tokens; a dynamic programme over the last
    frame, in which the shorter of two equally good windows wins (llava_arch.py@e9b2972).

    Args:
        steps: (T - 1, N) True where a patch stays the same from one frame to the next.
        longest: Frames that a window has at most.
    """
    best, cut = [0], [0]  # of the first frames: tokens saved, and where their last window begins
    for last in range(1, len(steps) + 1):
        back = steps[max(0, last + 1 - longest) : last].flip(0).long().cumprod(0).sum(1).tolist()
        choices = [(best[last - 1], last)]
        for length, same in enumerate(back, start=2):
            first = last + 1 - length
            choices.append(((best[first - 1] if first else 0) + same * (length - 1), first))
        saved, first = max(choices, key=lambda choice: choice[0])  # the first of equals
        best.append(saved)
        cut.append(first)
    spans: list[tuple[int, int]] = []
    last = len(steps)
    while last >= 0:
        spans.insert(0, (cut[last], last))
        last = cut[last] - 1
    return Windows(spans, best[-1])


def merge_static(x: Tensor, number: int, beta: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, C) merged into ``number`` peaks of density (DPC-kNN), each beta of itself and the rest of its members.

    The density is that of k neighbours, but of no more than there are peaks, as in llava_arch.py@e9b2972; of two at
    least, since one is the token itself. The release adds noise of 1e-6; here the first of equals is the denser one.

    Args:
        x: (n, C).
        number: 1 to n.
        beta: Weight of the peak, 1 for a peak without members.
        k: Neighbours in the density, the token itself included.

    Returns:
        (number, C) tokens, (number,) their places in x, and (n,) which of them each went into.
    """
    wide = widened(x).detach().unsqueeze(0)
    near = min(k, max(number, 2), len(x))
    centres = density_peaks(wide, number, near)[0] if len(x) > 1 else torch.zeros_like(x[:1, 0]).long()
    others = left_over(centres.unsqueeze(0), len(x))[0]
    nearest = torch.cdist(wide[0, others], wide[0, centres]).argmin(1) if len(others) else others
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    group[centres] = torch.arange(number, device=x.device)
    group[others] = nearest
    members = F.one_hot(nearest, number).to(wide.dtype).T  # (number, n - number)
    count = members.sum(1, keepdim=True)
    mean = wide_product(members, widened(x)[others]) / count.clamp(min=1)  # float16 overflows in the sum
    merged = torch.where(count > 0, beta * x[centres] + (1 - beta) * mean, x[centres])
    return merged.to(x.dtype), centres, group


class HoliTom(Selector):
    """Merge what stays the same in a window of frames, choose the rest by attention (HoliTom, 2505.21334).

    The part in front of the language model, llava_arch.py@e9b2972, for one video: patches whose cosine to the next
    frame is above ``tau`` throughout a window become one token each, and what that saves is given back to the ratio. Of
    the others each frame keeps the share with the most attention, which is what each patch receives in the block the
    tokens leave: the release deletes the last block of SigLIP, so that its "last" one is -2 here. Of the merged ones a
    share of density peaks stays, to which the rest is merged. The release's setting D, which would merge others too,
    cannot run above its default 0 and is left out. Of a window in which nothing moves one token stays at least, where
    the release may keep none. Its tokens are pooled frames behind the projector: give those for its results. A merged
    token has its position in the first frame of the window.

    Args:
        tau: Cosine from which on a patch stays the same.
        beta: Weight of a peak in its merged token.
        k: Neighbours in the density.
        longest: Frames that a window has at most.
    """

    name = "holitom"
    summary = "merge what stays the same in a video, choose the rest by attention (2505.21334)"
    row = RECEIVED
    whole_grid = True
    takes = "select_video"

    def __init__(self, *, tau: float = 0.8, beta: float = 0.6, k: int = 7, longest: int = 1024) -> None:
        super().__init__()
        self.tau, self.beta = check_number("tau", tau), check_fraction("beta", beta)
        self.k, self.longest = check_count("k", k, 2), check_count("longest", longest, 1)

    def count(self, keep: Keep, grid: Size) -> int | None:
        self.share(keep)
        return None

    def choose_video(self, features: Features, ratio: float) -> Selection:
        """The tokens of one video, whose frames are the images of the features (T, N, C)."""
        x, scores = features.x, required_scores(self, features)
        frames, cells = map(operator.index, x.shape[:2])  # numbers, not the symbols of a trace
        unit = F.normalize(widened(x).detach(), dim=-1)
        steps = (unit[1:] * unit[:-1]).sum(-1) > self.tau  # (T - 1, N)
        windows = static_windows(steps, self.longest)
        ratio = min(ratio / ((frames * cells - windows.saved) / (frames * cells)), 1)
        tokens: list[Tensor] = []
        ids: list[Tensor] = []
        group = torch.full((frames, cells), -1, dtype=torch.int64, device=x.device)
        for first, last in windows.spans:
            static = steps[first:last].all(0) if last > first else torch.zeros_like(scores[0], dtype=torch.bool)
            same, moving = static.nonzero().squeeze(1), (~static).nonzero().squeeze(1)
            still, changing = operator.index(len(same)), operator.index(len(moving))
            number = max(round(still * ratio), int(not changing))
            if number:
                mean = x[first : last + 1, same].mean(0)
                merged, centres, into = merge_static(mean, number, self.beta, self.k)
                group[first : last + 1, same] = into + sum(len(rows) for rows in ids)
                tokens.append(merged)
                ids.append(first * cells + same[centres])
            kept = math.ceil(changing * ratio)
            for frame in range(first, last + 1) if kept else ():
                top = moving[scores[frame, moving].topk(kept).indices.sort().values]
                group[frame, top] = torch.arange(kept, device=x.device) + sum(len(rows) for rows in ids)
                tokens.append(x[frame, top])
                ids.append(frame * cells + top)
        return self._in_order(torch.cat(tokens), torch.cat(ids), group, features)

    def _in_order(self, tokens: Tensor, ids: Tensor, group: Tensor, features: Features) -> Selection:
        order = ids.argsort()
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        group = torch.where(group < 0, -1, rank[group.clamp(min=0)]).view(1, -1)
        scores = required_scores(self, features).view(1, -1)
        counts = order.new_full((1,), len(order))
        grid = (len(features.x), *features.grid)
        return Selection(tokens[order].unsqueeze(0), ids[order].unsqueeze(0), counts, None, group, grid, scores)
