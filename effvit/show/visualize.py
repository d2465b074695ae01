"""Figures of the tokens: which patches a model keeps, merges, fuses and drops, stage by stage."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeAlias, TypeVar

import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from effvit.data.preparation import data_config, load_images
from effvit.hosts.host import ReducedHost, method_settings
from effvit.images import as_rgb
from effvit.measure.costs import method_of
from effvit.measure.selections import Selecting
from effvit.measure.values import TokenRecord, TokenStage
from effvit.protocols import Setting, Settings, Size
from effvit.selectors import TokenSelector
from effvit.show.token_stages import ALONE, DROPPED, FUSED, MERGED, SOFT, Stage, map_stage, trace_stages
from effvit.tokens import TokenMap

__all__ = [
    "draw_tokens",
    "model_text",
    "settings_text",
    "stack",
    "token_figure",
    "token_record",
    "token_stages",
]

Item = TypeVar("Item")
Numbers: TypeAlias = NDArray[np.float64]
Whole: TypeAlias = NDArray[np.int64]
Truths: TypeAlias = NDArray[np.bool_]


STATE_NAMES = {
    ALONE: "kept",
    MERGED: "merged: mean colour of the group",
    FUSED: "fused into one token",
    DROPPED: "dropped",
    SOFT: "a mixture of tokens: coloured by the one with the largest share",
}
# Colour, and its share in a mixture with the grey image; both are told from black and from white.
TINTS = {DROPPED: ((120, 46, 40), 0.66), FUSED: ((96, 84, 152), 0.62)}
BORDER = (255, 255, 255)
SOFT_SHARE = 0.5  # of the group's colour in the mixture with the grey image
HUE_STEP = 0.618034  # golden ratio: neighbouring numbers get hues far apart

SMALL = 64  # longest side, pixels, of an image that a record holds enlarged
ENLARGED = 8
PANEL = 300  # longest side of a panel, pixels
GAP = 14
TEXT = (33, 37, 41)
FAINT_TEXT = (108, 117, 125)
TITLE_SIZE, CAPTION_SIZE = 17, 14


def seen_by(model: nn.Module, x: Tensor) -> Image.Image:
    """The image the model sees: a normalised image x (3, H, W), or (1, H, W) grey, back in RGB."""
    config = data_config(model)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config["mean"], config["std"]))
    pixels = ((x.float() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def patch_numbers(length: int, patches: int) -> Whole:
    """(length,) the patch each pixel of a side lies in."""
    return np.arange(length) * patches // length


def draw_tokens(image: Image.Image, tokens: TokenMap | Tensor) -> Image.Image:
    """The image with its patches as the tokens have them; same size.

    Patches with a token of their own are left as they are; those that share a token have its mean colour, with a
    border around each group; members of a fused token get a violet tint, dropped patches a dark red one.

    Args:
        image: The image the model sees, of any size.
        tokens: The TokenMap of this one image, or labels (H, W) as ``TokenMap.labels`` has them.

    Raises:
        ValueError: A TokenMap of several images, or labels that are not (H, W).
    """
    if isinstance(tokens, TokenMap):
        if len(tokens.source) != 1:
            raise ValueError(
                f"draw_tokens draws one image, but the TokenMap is of {len(tokens.source)}; "
                "run the model on one image, or give tokens.labels()[i]"
            )
        return paint(image, map_stage(tokens))
    if tokens.ndim != 2:
        raise ValueError(f"labels must be (H, W), got a tensor of shape {tuple(tokens.shape)}")
    labels = tokens.cpu().numpy()
    return paint(image, Stage(0, int(labels.max()) + 1, labels))


def paint(image: Image.Image, stage: Stage) -> Image.Image:
    """``draw_tokens`` for a stage."""
    pixels: Numbers = np.asarray(as_rgb(image), dtype=np.float64)
    rows, columns = (patch_numbers(n, k) for n, k in zip(pixels.shape[:2], stage.labels.shape, strict=True))
    group: Whole = stage.labels[rows[:, None], columns]  # (height, width)
    state: Whole = stage.states[rows[:, None], columns]
    grey: Numbers = pixels.mean(-1, keepdims=True)
    drawn = pixels.copy()
    for kind, (tint, share) in TINTS.items():
        drawn = np.where((state == kind)[..., None], (1 - share) * grey + share * np.array(tint), drawn)
    merged: Truths = state == MERGED
    drawn[merged] = mean_colours(pixels[merged], group[merged])
    soft: Truths = state == SOFT
    hues: Numbers = np.stack([group[soft] * HUE_STEP % 1, np.full(soft.sum(), 0.75), np.full(soft.sum(), 1.0)], axis=-1)
    drawn[soft] = (1 - SOFT_SHARE) * grey[soft] + SOFT_SHARE * 255 * hsv_to_rgb(hues)
    drawn[borders(group, merged | soft)] = BORDER
    return Image.fromarray(drawn.round().astype(np.uint8))


def mean_colours(pixels: Numbers, group: Whole) -> Numbers:
    """For each of the pixels (K, 3) the mean colour of its group (K,): (K, 3)."""
    count = np.bincount(group, minlength=1)
    sums = np.stack([np.bincount(group, weights=channel, minlength=1) for channel in pixels.T], axis=-1)
    return (sums / np.maximum(count, 1)[:, None])[group]


def borders(group: Whole, grouped: Truths) -> Truths:
    """(height, width) True for pixels of a group that has borders whose neighbour belongs to another token."""
    edge = np.zeros_like(grouped)
    for g, parted in ((group, edge), (group.T, edge.T)):  # views, so that edge itself is written
        differs: Truths = g[1:] != g[:-1]
        parted[1:] |= differs
        parted[:-1] |= differs
    return edge & grouped


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font matplotlib brings along, so that images look the same everywhere."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def spread(stages: Sequence[Item], number: int) -> list[Item]:
    """At most ``number`` of the stages, evenly spread, the last always among them."""
    number = min(number, len(stages))
    return [stages[(i + 1) * len(stages) // number - 1] for i in range(number)]


def settings_text(model: ReducedHost) -> str:
    """The method and those of its settings that are not the defaults, e.g. "evit keep_rate=0.5"."""
    defaults = method_settings(model.method)
    changed = {name: value for name, value in model.settings.items() if value != listed(defaults[name])}
    return " ".join([model.method, *(f"{name}={value}" for name, value in changed.items())])


def listed(value: Setting) -> Setting:
    """The value with tuples turned to lists, as ``ReducedHost.settings`` holds it."""
    return [listed(v) for v in value] if isinstance(value, (tuple, list)) else value


def model_text(model: nn.Module) -> str:
    """The method and settings of a reduced model, the selection behind a tower, else the name of an architecture."""
    if isinstance(model, ReducedHost):
        return settings_text(model)
    if isinstance(model, TokenSelector):
        inside = f"{model.tower.host.method}, " if model.tower.reducing else ""
        return inside + str(Selecting(model.selector.name, model.keep, model.own_settings))
    config: Settings = getattr(model, "pretrained_cfg", {})
    return str(config.get("architecture", type(model).__name__))


def token_stages(model: nn.Module, image: Image.Image) -> list[Stage]:
    """What each reducing block makes of the patches of a photograph, as arrays.

    Args:
        model: As for ``effvit.show.token_stages.trace_stages``, which also names the errors.
        image: A photograph of any size.

    Returns:
        The stages in the order of the blocks; none where no block reduces.
    """
    return trace_stages(model, load_images(model, [image]))


def token_figure(model: nn.Module, image: Image.Image, *, title: str | None = None, num_stages: int = 5) -> Image.Image:
    """The image as the model sees it and, for its reducing blocks, what became of the patches.

    Args:
        model: A model made by ``effvit.sparsify``, a ``TokenSelector`` or an architecture with soft tokens; it is run
            in eval mode and left as it is.
        image: A photograph of any size.
        title: Text at the top; None means ``model_text``.
        num_stages: Most stages shown; of more, evenly spread ones and the last.

    Raises:
        TypeError: A model whose tokens cannot be traced.
    """
    x = load_images(model, [image])
    stages = trace_stages(model, x)
    view = seen_by(model, x[0])
    grid: Size = stages[0].labels.shape if stages else (view.height, view.width)
    cell = max(1, round(PANEL / max(grid)))  # pixels of a patch
    view = view.resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    count = f"{stages[0].labels.size} patches" if stages else "no block reduces"
    panels = [("input", count, view)]
    shown: set[int] = set()
    for stage in spread(stages, num_stages):
        place = f"handed over, block {stage.block}" if stage.handed_over else f"block {stage.block}"
        panels.append((place, f"{stage.tokens} tokens", paint(view, stage)))
        shown |= set(stage.states.flatten().tolist())
    return compose(panels, model_text(model) if title is None else title, shown)


def token_record(
    model: nn.Module, image: Image.Image, *, name: str, model_name: str, host: str | None, note: str | None = None
) -> TokenRecord:
    """What the model sees of the image, and its tokens after each block that changes them, for ``effvit report``.

    Args:
        model: As for ``token_figure``.
        image: A photograph of any size; the record holds what the model sees of it, enlarged if that is small.
        name: Name of the photograph.
        model_name: Name of the model.
        host: Name of the dense host, None for a model that was asked for by its own name.
        note: What to know when looking at it.
    """
    x = load_images(model, [image])
    file = BytesIO()
    view = seen_by(model, x[0])
    if max(view.size) < SMALL:  # a border is a pixel wide and would hide its patch
        view = view.resize((view.width * ENLARGED, view.height * ENLARGED), Image.Resampling.NEAREST)
    view.save(file, "PNG")
    method, settings = method_of(model, (x.shape[-2], x.shape[-1]))
    stages = [
        TokenStage(
            block=stage.block,
            tokens=stage.tokens,
            labels=stage.labels.tolist(),
            fused=[] if stage.fused is None else stage.fused.nonzero()[0].tolist(),
            soft=stage.soft,
            handed_over=stage.handed_over or None,
        )
        for stage in trace_stages(model, x)
    ]
    return TokenRecord(
        model=model_name,
        host=host,
        method=method,
        settings=settings,
        name=name,
        note=note,
        picture="data:image/png;base64," + b64encode(file.getvalue()).decode(),
        stages=stages,
    )


def compose(panels: Sequence[tuple[str, str, Image.Image]], title: str, states: set[int]) -> Image.Image:
    """Panels (name, count, image) side by side under the title, over a legend of the states."""
    side, height = panels[0][2].size
    heading, caption = font(TITLE_SIZE), font(CAPTION_SIZE)
    line = CAPTION_SIZE + 8
    top = GAP + TITLE_SIZE + GAP
    legend = top + height + line + GAP
    keys = [state for state in STATE_NAMES if state in states]
    key_widths = [int(caption.getlength(STATE_NAMES[key])) + CAPTION_SIZE + 34 for key in keys]
    width = GAP + max(len(panels) * (side + GAP), int(heading.getlength(title)) + GAP, sum(key_widths, GAP))
    figure = Image.new("RGB", (width, legend + (line + GAP if keys else 0)), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((GAP, GAP), title, TEXT, heading)
    for i, (name, count, image) in enumerate(panels):
        left = GAP + i * (side + GAP)
        figure.paste(image, (left, top))
        draw.text((left, top + height + 5), name, TEXT, caption)
        draw.text((left + side, top + height + 5), count, FAINT_TEXT, caption, anchor="ra")
    left = GAP
    for key, key_width in zip(keys, key_widths, strict=True):
        figure.paste(swatch(key, panels[0][2]), (left, legend))
        draw.text((left + CAPTION_SIZE + 8, legend), STATE_NAMES[key], TEXT, caption)
        left += key_width
    return figure


def stack(figures: Sequence[Image.Image]) -> Image.Image:
    """Figures below each other on white."""
    sheet = Image.new("RGB", (max(f.width for f in figures), sum(f.height for f in figures)), "white")
    top = 0
    for figure in figures:
        sheet.paste(figure, (0, top))
        top += figure.height
    return sheet


def swatch(state: int, view: Image.Image) -> Image.Image:
    """A small sample of how patches of that state are drawn, on the image that they are of."""
    side = CAPTION_SIZE + 2
    labels: Whole = np.array([[-1]] if state == DROPPED else [[0]] if state in (ALONE, FUSED) else [[0, 1], [0, 1]])
    shares: Numbers | None = np.eye(2)[labels] if state == SOFT else None
    return paint(view.resize((side, side)), Stage(0, 2, labels, np.array([state == FUSED] * 2), shares))
