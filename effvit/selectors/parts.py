"""Selection over the parts of one image: a thumbnail and crops, as LLaVA-NeXT and InternVL cut large images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from effvit.protocols import Setting, Size
from effvit.reducers.base import refuse_recording
from effvit.schedule import check_choice
from effvit.selectors.base import Choice, Features, Keep, SelectionSizes, Selector
from effvit.selectors.cells import check_sides
from effvit.selectors.registry import make_selector
from effvit.selectors.select import (
    CLASS_ROW,
    TowerFeatures,
    arranged,
    check_features,
    check_tensor,
    choose_tokens,
    features_of,
    refuse_unused,
)
from effvit.selectors.selection import Selection
from effvit.tokens import compact

__all__ = [
    "PartSelector",
    "Parts",
    "SelectedParts",
    "check_budget",
    "choose_in_parts",
    "highest_each",
    "lay_out",
    "select_parts",
    "valid_cells",
]

THUMBNAILS = ("first", "last")


class Parts(NamedTuple):
    """How an image was cut.

    Attributes:
        crops: (rows, columns) of crops.
        thumbnail: Where the whole image stands among the parts: "first", "last", or None for crops alone.
        valid: (rows * H, columns * W) cells of the crops that show the image and no padding; None: all.
    """

    crops: Size
    thumbnail: str | None
    valid: Tensor | None = None

    @property
    def number(self) -> int:
        """Parts of the image."""
        return self.crops[0] * self.crops[1] + (self.thumbnail is not None)

    def check(self, given: Tensor) -> None:
        """Raise an error, a ValueError for tensors, if the images or features (P, ...) are not those of all parts."""
        check_tensor("parts", given)
        if given.shape[:1] != (self.number,):
            (rows, columns), without = self.crops, self.thumbnail is None
            raise ValueError(
                f"{rows} x {columns} crops {'without a' if without else 'and a'} thumbnail are {self.number} parts, "
                f"got {given.shape[0] if given.ndim else 'a single number'}; give those of one image"
            )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (P, ...) as that of the thumbnail (...) and that of the crops (P - 1, ...)."""
        return (x[0], x[1:]) if self.thumbnail == "first" else (x[-1], x[:-1])

    def join(self, thumbnail: Tensor, crops: Tensor) -> Tensor:
        """The inverse of ``split``."""
        pair = [thumbnail.unsqueeze(0), crops]
        return torch.cat(pair if self.thumbnail == "first" else pair[::-1])


class SelectedParts(NamedTuple):
    """The tokens that leave the parts of one image.

    Attributes:
        selection: Of all parts, in the order they were given.
        parts: How the image was cut.
    """

    selection: Selection
    parts: Parts

    def canvas_ids(self) -> Tensor:
        """(P, K) cell of each token on the canvas of all crops, row by row; -1 for the thumbnail and for padding.

        The row on the canvas, behind which language models put a newline token, is that divided by its width, the
        columns of crops times those of a crop's grid.
        """
        ids, (height, width) = self.selection.ids, self.selection.grid
        crop = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) - int(self.parts.thumbnail == "first")
        row = torch.div(crop, self.parts.crops[1], rounding_mode="floor") * height + ids // width
        canvas = row * self.parts.crops[1] * width + crop % self.parts.crops[1] * width + ids % width
        outside = (crop < 0) | (crop >= self.parts.crops[0] * self.parts.crops[1])
        outside = outside if self.selection.valid is None else outside | ~self.selection.valid
        return canvas.masked_fill(outside, -1)


class PartSelector(Selector):
    """A method that shares a budget out over the parts of one image; a subclass supplies ``choose_parts``."""

    takes = "select_parts"

    def count(self, keep: Keep, grid: Size) -> int | None:
        return None

    def choose_parts(self, features: Features, parts: Parts, keep: Keep) -> Tensor:
        """(P, N) True for the cells that stay, of features of the P parts."""
        raise NotImplementedError

    def cost_parts(self, at: SelectionSizes, parts: Parts, keep: Keep) -> int:
        """MACs of ``choose_parts`` in closed form, as ``Selector.cost``; ``at`` is what it meets in each part.

        Raises:
            NotImplementedError: The method has no closed form.
        """
        raise NotImplementedError


def highest_each(scores: Tensor, counts: Tensor) -> Tensor:
    """(P, N) True for the ``counts`` (P,) largest scores (P, N) of each part."""
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return rank < counts.unsqueeze(1)


def valid_cells(image_size: Size, crops: Size, grid: Size) -> Tensor:
    """(rows * H, columns * W) True for cells of the canvas that show an image of (height, width) pixels.

    LLaVA fits the image into the canvas and pads it evenly on two sides; the rule of its unpadding, to whole cells.

    Args:
        image_size: (height, width) of the image before it was fitted; a side of less than a cell counts as one.
        crops: (rows, columns) of crops.
        grid: (H, W) cells of a crop.
    """
    check_sides("image_size", image_size)
    height, width = crops[0] * grid[0], crops[1] * grid[1]
    top = left = 0
    if image_size[1] / image_size[0] > width / height:
        top = (height - max(1, int(image_size[0] * (width / image_size[1])))) // 2
    else:
        left = (width - max(1, int(image_size[1] * (height / image_size[0])))) // 2
    valid = torch.zeros(height, width, dtype=torch.bool)
    valid[top : height - top, left : width - left] = True
    return valid


def select_parts(
    tower: nn.Module | None,
    parts: Tensor | None,
    method: str | Selector,
    *,
    crops: Size,
    thumbnail: str | None = "first",
    image_size: Size | None = None,
    keep: Keep = None,
    block: int | None = None,
    merge: int | None = None,
    tokens: Tensor | None = None,
    grid: Size | None = None,
    scores: Tensor | str = CLASS_ROW,
    keys: Tensor | None = None,
    relevance: Tensor | None = None,
    early: Tensor | None = None,
    max_norm: float | None = None,
    **settings: Setting,
) -> SelectedParts:
    """The tokens of one image that was cut into crops.

    HiRED and GlobalCom2 share a budget out over the parts; any other method chooses in each part alone, ``keep`` of it.

    Args:
        tower: As for ``select_tokens``; None where ``tokens`` are given.
        parts: (P, 3, H, W) the crops of one image row by row, and its thumbnail.
        method: As for ``select_tokens``, and so are block, merge, tokens, grid, scores, keys, relevance, max_norm and
            settings.
        crops: (rows, columns) of crops.
        thumbnail: Where it stands among the parts: "first" (LLaVA-NeXT), "last" (InternVL), or None.
        image_size: (height, width) of the image, by which GlobalCom2 knows padding; None: there is none.
        keep: Share of the cells of all parts for HiRED, where a number is one of tokens in all; of each part otherwise.
        early: (P, N) scores of the first block for ``tokens``, which HiRED needs.

    Raises:
        ValueError: A number of parts that is not that of the crops; a budget without a thumbnail to share it by, or
            of which rounding leaves nothing; what ``select_tokens`` refuses.
    """
    layout = lay_out(crops, thumbnail)
    selector = make_selector(method, settings)
    refuse_unused(selector, image_size=image_size)
    given = tokens if parts is None else parts
    if given is not None:
        layout.check(given)
    found = features_of(
        selector,
        tower,
        parts,
        keep=keep,
        block=block,
        merge=merge,
        max_norm=max_norm,
        tokens=tokens,
        grid=grid,
        scores=scores,
        keys=keys,
        relevance=relevance,
        early=early,
    )
    return choose_in_parts(selector, found, layout, keep, image_size)


def lay_out(crops: Size, thumbnail: str | None) -> Parts:
    """(rows, columns) of crops, and where the thumbnail stands, as ``Parts``; an error for what is neither."""
    if thumbnail is not None:
        check_choice("thumbnail", thumbnail, THUMBNAILS)
    return Parts(check_sides("crops", crops), thumbnail)


def check_budget(selector: Selector, layout: Parts, grid: Size) -> None:
    """Raise a ValueError if a budget cannot be shared over these crops by a thumbnail of that grid of cells (H, W)."""
    if not isinstance(selector, PartSelector):
        return
    if layout.thumbnail is None:
        raise ValueError(
            f"{selector.name} shares its budget by what the thumbnail shows; give it with the crops, or use "
            "'class_attention', which chooses in each crop alone"
        )
    (rows, columns), (height, width) = layout.crops, grid
    if rows > height or columns > width:
        raise ValueError(
            f"{selector.name} shares its budget by the cells of the thumbnail, {height} x {width} here, which show no "
            f"part of some of {rows} x {columns} crops; cut at most {height} x {width}, or use 'class_attention', "
            "which chooses in each crop alone"
        )


def choose_in_parts(
    selector: Selector, found: TowerFeatures, layout: Parts, keep: Keep, image_size: Size | None = None
) -> SelectedParts:
    """What the selector makes of features of the parts; arguments and errors as of ``select_parts``."""
    features, of_map, prefix = found
    check_budget(selector, layout, features.grid)
    if not isinstance(selector, PartSelector):
        return SelectedParts(choose_tokens(selector, features, keep, of_map, prefix), layout)
    if image_size is not None:
        valid = valid_cells(image_size, layout.crops, features.grid).to(features.x.device)
        layout = layout._replace(valid=valid)
    check_features(features, selector)
    refuse_recording(
        features.x,
        f"{selector.name} leaves as many tokens of a part as its image needs",
        "use a method that keeps a number of each, such as 'class_attention'",
    )
    kept = selector.choose_parts(features, layout, keep)
    if not kept.any():
        raise ValueError(
            f"keep={keep} of {kept.shape[1]} cells in each of {kept.shape[0]} parts leaves no token by the rule of "
            f"{selector.name}; keep more"
        )
    place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    chosen = compact(place, kept, kept.shape[1], trim=True, keep_mask=True)
    group = torch.where(kept, kept.cumsum(1) - 1, -1)
    choice = Choice(chosen.order, group=group, valid=chosen.valid)
    return SelectedParts(arranged(choice, features, of_map, prefix), layout)
