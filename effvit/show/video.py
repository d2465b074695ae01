"""Figures of the tokens that leave the frames of one video."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from effvit.data.preparation import load_images
from effvit.hosts.stages import Stage
from effvit.measure.flops import eval_twin
from effvit.selectors import Selection, VideoSelector
from effvit.show.visualize import PANEL, compose, paint, seen_by, stack

__all__ = ["video_figure", "video_stage"]

FRAMES_IN_A_ROW = 6


def video_stage(selection: Selection, block: int = 0) -> Stage:
    """What is handed over of a video, with labels (T * H, W): the frames one below the other.

    Args:
        selection: As ``effvit.select_video`` gives it.
        block: Behind which the tokens left the tower.

    Raises:
        TypeError: Tokens that are mixtures of all cells.
    """
    if selection.group is None:
        raise TypeError("tokens that are mixtures of all cells belong to none of them, so that no figure shows them")
    labels = selection.group[0].view(-1, selection.grid[-1])
    return Stage(block, int(selection.counts[0]), labels.cpu().numpy(), handed_over=True)


@torch.no_grad()
def video_figure(model: VideoSelector, frames: Iterable[Image.Image], *, title: str | None = None) -> Image.Image:
    """Each frame as the model sees it, above what is handed over of it.

    A token that is merged over time is counted in the frame that it has its position in, and has the mean colour of all
    its patches in all frames.

    Args:
        model: It is run in eval mode and left as it is.
        frames: As many images as it takes, of any size.
        title: Text at the top; None: the name of the method and the number of tokens.

    Raises:
        ValueError: Another number of frames.
        TypeError: As ``video_stage``.
    """
    x = load_images(model, frames)
    like = next(model.parameters())
    selection = eval_twin(model)(x.to(like.device, like.dtype))
    stage = video_stage(selection, model.tower.block)
    _, rows, columns = selection.grid
    cell = max(1, round(PANEL / max(rows, columns)))  # pixels of a cell
    width, height = columns * cell, rows * cell
    views = [seen_by(model, frame).resize((width, height), Image.Resampling.BICUBIC) for frame in x]
    painted = paint(stack(views), stage)  # as one image, so that a group has one colour in all its frames
    counts = np.bincount((selection.ids[0] // (rows * columns)).cpu().numpy(), minlength=len(views))
    panels = [
        (
            f"frame {number}",
            f"{counts[number]} tokens",
            stack([view, painted.crop((0, number * height, width, (number + 1) * height))]),
        )
        for number, view in enumerate(views)
    ]
    heading = f"{model.selector.name}, {stage.tokens} tokens of {len(views)} frames" if title is None else title
    states = set(stage.states.flatten().tolist())
    strips = [panels[first : first + FRAMES_IN_A_ROW] for first in range(0, len(panels), FRAMES_IN_A_ROW)]
    return stack(
        [
            compose(strip, heading if number == 0 else "", states if number == len(strips) - 1 else set())
            for number, strip in enumerate(strips)
        ]
    )
