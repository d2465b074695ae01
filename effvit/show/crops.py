"""Figures of the tokens that leave the parts of one image: of its thumbnail, and of its crops side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from effvit.data.preparation import data_config
from effvit.hosts.stages import Stage
from effvit.images import as_rgb
from effvit.measure.flops import eval_twin
from effvit.protocols import Size
from effvit.selectors import CropSelector, SelectedParts, Selector
from effvit.show.visualize import PANEL, compose, paint

__all__ = ["crops_figure", "cut", "part_stages", "parts_figure"]


def cut(tower: nn.Module, image: Image.Image, crops: Size) -> Tensor:
    """A thumbnail and rows x columns crops of an image, row by row, as the tower takes them: (1 + crops, C, H, W).

    The image is stretched to the canvas of the crops, so that it fills it; language models that pad it cut their own.
    """
    config = data_config(tower)
    channels, height, width = config["input_size"]
    rows, columns = crops
    mode = "L" if channels == 1 else "RGB"
    views = [
        as_rgb(image).convert(mode).resize((width * m, height * n), Image.Resampling.BICUBIC)
        for n, m in ((1, 1), (rows, columns))
    ]
    thumbnail, canvas = (
        torch.from_numpy(np.array(v)).view(v.height, v.width, channels).permute(2, 0, 1) for v in views
    )
    pieces = canvas.unflatten(2, (columns, width)).unflatten(1, (rows, height))  # (C, rows, H, columns, W)
    parts = torch.cat([thumbnail.unsqueeze(0), pieces.permute(1, 3, 0, 2, 4).flatten(0, 1)])
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (parts.float() / 255 - mean) / std


def part_stages(selected: SelectedParts, block: int = 0) -> tuple[Stage, Stage]:
    """What is handed over of the thumbnail, and of all crops on their canvas.

    Args:
        selected: With a thumbnail.
        block: Behind which the tokens left the tower.

    Raises:
        ValueError: Crops without a thumbnail.
        TypeError: Tokens that are mixtures of all cells.
    """
    selection, parts = selected.selection, selected.parts
    if parts.thumbnail is None:
        raise ValueError("a figure of parts shows the thumbnail beside the crops, got crops alone; select with it")
    if selection.group is None:
        raise TypeError("tokens that are mixtures of all cells belong to none of them, so that no figure shows them")
    whole, own = parts.split(selection.group)  # (N,), (P - 1, N)
    first, counts = parts.split(selection.counts)
    labels = torch.where(own < 0, -1, own + (counts.cumsum(0) - counts).unsqueeze(1))
    grid = selection.grid
    canvas = labels.unflatten(1, grid).unflatten(0, parts.crops).transpose(1, 2).flatten(2).flatten(0, 1)
    return (
        Stage(block, int(first), whole.unflatten(0, grid).cpu().numpy(), handed_over=True),
        Stage(block, int(counts.sum()), canvas.cpu().numpy(), handed_over=True),
    )


def parts_figure(
    tower: nn.Module, image: Image.Image, method: str | Selector, *, crops: Size, title: str | None = None, **asked: Any
) -> Image.Image:
    """The image beside what is handed over of its thumbnail and of its crops.

    Args:
        tower: As for ``effvit.select_parts``, in eval mode.
        image: Of any size.
        method: A selector, by its name or itself.
        crops: (rows, columns) of crops.
        title: Text at the top; None: the name of the method.
        asked: Further keywords of ``effvit.CropSelector``, such as keep and exact; ``cut`` puts the thumbnail first.

    Raises:
        TypeError: A place of the thumbnail.
        TypeError, ValueError: As ``effvit.CropSelector`` and ``part_stages``.
    """
    return crops_figure(CropSelector(tower, method, crops=crops, thumbnail="first", **asked), image, title=title)


@torch.no_grad()
def crops_figure(model: CropSelector, image: Image.Image, *, title: str | None = None) -> Image.Image:
    """The image beside what is handed over of its thumbnail and of its crops.

    Args:
        model: Of parts with the thumbnail first; it is run in eval mode and left as it is.
        image: Of any size.
        title: Text at the top; None: the name of the method.

    Raises:
        ValueError: Another place of the thumbnail.
        TypeError: As ``part_stages``.
    """
    if model.layout.thumbnail != "first":
        raise ValueError(
            f"a figure cuts an image with its thumbnail first, got thumbnail={model.layout.thumbnail!r}; make a "
            "CropSelector with thumbnail='first'"
        )
    like, crops = next(model.parameters()), model.layout.crops
    parts = cut(model, image, crops).to(like.device, like.dtype)
    stages = part_stages(eval_twin(model)(parts), model.tower.block)
    rows, columns = stages[1].labels.shape
    cell = max(1, round(PANEL / max(rows, columns)))  # pixels of a cell of the crops
    view = as_rgb(image).resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    panels = [("input", f"{1 + crops[0] * crops[1]} parts", view)]
    panels += [
        (name, f"{stage.tokens} tokens", paint(view, stage))
        for name, stage in zip(("thumbnail", "crops"), stages, strict=True)
    ]
    shown = {int(state) for stage in stages for state in np.unique(stage.states)}
    return compose(panels, model.selector.name if title is None else title, shown)
