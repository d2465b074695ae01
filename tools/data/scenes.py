"""Objects on photographs: labelled images of 96 x 96 made on the spot, in batches, by tensor operations alone.

Each image shows one object of a class of `data.cutouts`, which covers a small part of it, and up to three distractors
of no class, on a crop of a photograph. Which patches matter thus differs from image to image. The object is never
hidden by more than a third, and its mask and box are exact, because they are known before the image is.

An image may be drawn with a margin around it: the same scene seen further, so that crops of it which lie a few pixels
apart are what a camera turned slightly would see.

An image is a function of (split, seed, index) alone: all that is random in it is a hash of these numbers (splitmix64,
Steele et al. 2014), and all sums of resampling are sums of whole numbers below 2^24, which float32 holds exactly in
whatever order they are added. So an image is the same in every batch, and indices are endless: an epoch can be any
range of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from data.cutouts import CLASSES, LEVELS, SIDE, SPLITS, Bank, Scenery, Split, open_split
from effvit.schedule import check_choice, check_count

__all__ = ["MAX_MARGIN", "SIZE", "Cutouts", "Scenes", "draw_scenes", "patch_coverage", "scene_labels"]

SIZE = 96  # pixels of an image's side
DISTRACTORS = 3  # at most; every number from 0 on is equally likely
COVERAGE = (0.04, 0.25)  # share of the image inside the outline of an object, logarithmically uniform between
MAX_LENGTH = 80  # pixels of an object's longer side; slender ones cover less than COVERAGE asks for
MAX_HIDDEN = 1 / 3  # share of the object that distractors may hide
MAX_MARGIN = (LEVELS[0] - SIZE) // 2  # pixels around an image
CHUNK = 16  # images that are made at once, so that they stay in the processor's cache

WEIGHT_STEPS = 240  # a filter's weights are multiples of 1/240: sums of 255 * (240 + rounding)^2 stay below 2^24
COVERAGE_STEPS = 256  # areas that are drawn, in a table: exp() differs in the last bit with the place in a batch
AREAS = SIZE**2 * torch.logspace(math.log10(COVERAGE[0]), math.log10(COVERAGE[1]), COVERAGE_STEPS, dtype=torch.float64)
DRAWS = 12  # numbers that one part of a scene may draw
MASK64 = (1 << 64) - 1


class Scenes(NamedTuple):
    """A batch of images.

    Attributes:
        images: (B, 3, SIZE, SIZE) uint8, RGB; with a margin (B, 3, SIZE + 2 margin, SIZE + 2 margin).
        labels: (B,) int64, the class of the labelled object, a number of `data.cutouts.CLASSES`.
        boxes: (B, 4) int64, its left, top, right and bottom: the first two are its outermost pixels, the last two lie
            one beyond.
        masks: (B, H, W) as the images, bool: the pixels that show it.
        photographs: (B,) int64, the photograph behind it, a number of ``Scenery.names``.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor
    photographs: Tensor


# -- numbers ---------------------------------------------------------------------------------------------


def uniforms(seed: int, stream: int, indices: Tensor, draws: int) -> Tensor:
    """(B, draws) float64 in [0, 1), a hash of the seed, the stream, each index (B,) and the number of the draw."""
    keys = mix(indices + mix(torch.tensor(2 * seed + stream)))  # (B,)
    counters = torch.arange(1, draws + 1) * signed(0x9E3779B97F4A7C15)
    return shift(mix(keys[:, None] + counters), 11).double() * 2.0**-53


def mix(values: Tensor) -> Tensor:
    """splitmix64's output function, on int64, whose products wrap around as those of uint64 do."""
    values = (values ^ shift(values, 30)) * signed(0xBF58476D1CE4E5B9)
    values = (values ^ shift(values, 27)) * signed(0x94D049BB133111EB)
    return values ^ shift(values, 31)


def shift(values: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right and fill with zeros, as uint64 would be."""
    return (values >> bits) & (MASK64 >> bits)


def signed(value: int) -> int:
    """The int64 of the same bits as a uint64."""
    return value - (1 << 64) if value >> 63 else value


def between(low: float, high: float, uniform: Tensor) -> Tensor:
    """Uniform numbers of [0, 1) in [low, high)."""
    return low + (high - low) * uniform


def whole(uniform: Tensor, number: Tensor | int) -> Tensor:
    """Uniform numbers of [0, 1) as whole ones below ``number``."""
    return (uniform * number).long()


# -- parts of a scene ------------------------------------------------------------------------------------


def spans(start: Tensor, scale: Tensor, extent: Tensor, opaque: Tensor, margin: int) -> tuple[Tensor, int]:
    """The pixels of the image that objects reach along one axis: the first of each (B,), and how many of every one.

    Args:
        start, scale, extent: (B,) as of ``axis_weights``.
        opaque: (B, SIDE) bool, which pixels of the bank have an opaque one beside them.
        margin: Pixels in front of the image and behind it, which count as the image.
    """
    begin, pixels = ((SIDE - extent) // 2)[:, None], torch.arange(SIDE)
    beyond = torch.maximum(begin - pixels, pixels + 1 - begin - extent[:, None])  # of an object with gaps above 0
    border = scale.clamp(min=1) + 1 + scale * torch.where(opaque, beyond, 0).amax(1)  # the filter reaches so far too
    number = min(SIZE + 2 * margin, int((scale * extent + 2 * border).max()) + 2)
    return (start - border).floor().long().clamp(-margin, SIZE + margin - number), number


def axis_weights(first: Tensor, number: int, start: Tensor, scale: Tensor, extent: Tensor, mirrored: Tensor) -> Tensor:
    """A triangle filter that resizes one axis of cut-outs and puts it at its place.

    Args:
        first: (B,) the first pixel of the image that is wanted.
        number: Of pixels that are.
        start: (B,) where the cut-out begins in the image, pixels.
        scale: (B,) pixels of the image per pixel of the bank.
        extent: (B,) pixels of the bank that are opaque, in its middle.
        mirrored: (B,) bool.

    Returns:
        (B, number, SIDE) float32, whole numbers: WEIGHT_STEPS times the share of each pixel of the bank in each of the
        image.
    """
    pixels = first[:, None] + torch.arange(number)
    offset = (pixels + 0.5 - start[:, None]) / scale[:, None]  # (B, number), from the object's border
    offset = torch.where(mirrored[:, None], extent[:, None] - offset, offset)
    source = (offset + ((SIDE - extent) // 2)[:, None] - 0.5).float()
    sharpness = scale.clamp(max=1).float()[:, None, None]
    distance = (source[..., None] - torch.arange(SIDE)).abs_().mul_(sharpness)  # (B, number, SIDE)
    weights = distance.neg_().add_(1).clamp_(min=0)
    return weights.mul_(WEIGHT_STEPS / weights.sum(-1, keepdim=True).clamp(min=1e-6)).round_()


class Placed(NamedTuple):
    """Objects of random size, place and light, each in a part of its image that holds all of it.

    Attributes:
        layers: (B, H, 4, W) in [0, 1]: colours times opacity, and opacity.
        tops: (B,) first row of each part, counted from that of the margin.
        lefts: (B,) first column, likewise.
    """

    layers: Tensor
    tops: Tensor
    lefts: Tensor

    def over(self, layers: Tensor) -> Tensor:
        """These in front of what the first of the layers (B or more, L, 4, L) hold, which are written to."""
        rows, columns = self.layers.shape[1], self.layers.shape[3]
        for own, layer, top, left in zip(self.layers, layers, self.tops.tolist(), self.lefts.tolist(), strict=False):
            layer[top : top + rows, :, left : left + columns].mul_(1 - own[:, 3:]).add_(own)
        return layers


def place_objects(bank: Bank, chosen: Tensor, draws: Tensor, inside: bool, margin: int = 0) -> Placed:
    """Cut-outs as they lie in images with a margin.

    Args:
        bank: Where they are.
        chosen: (B,) their numbers.
        draws: (B, 9) uniform numbers.
        inside: Whether all of an object lies in the image; else its centre does.
        margin: Pixels around the image, in which no object is placed but into which some reach.
    """
    extents = bank.extents[chosen].double()
    scale = (AREAS[whole(draws[:, 0], COVERAGE_STEPS)] / bank.areas[chosen]).sqrt()
    scale = torch.minimum(scale, MAX_LENGTH / extents.amax(1))
    lengths = scale[:, None] * extents  # (B, 2), pixels of the image
    starts = draws[:, 1:3] * (SIZE - lengths) if inside else draws[:, 1:3] * SIZE - lengths / 2
    pixels = bank.pixels[chosen]  # (B, SIDE, 4, SIDE)
    opaque = pixels[:, :, 3] > 0
    tops, height = spans(starts[:, 0], scale, extents[:, 0], opaque.any(2), margin)
    lefts, width = spans(starts[:, 1], scale, extents[:, 1], opaque.any(1), margin)
    rows = axis_weights(tops, height, starts[:, 0], scale, extents[:, 0], torch.zeros(len(chosen), dtype=torch.bool))
    columns = axis_weights(lefts, width, starts[:, 1], scale, extents[:, 1], draws[:, 3] < 0.5)
    wide = pixels.float().flatten(1, 2) @ columns.mT  # (B, SIDE * 4, width)
    placed = rows @ wide.unflatten(1, (SIDE, 4)).flatten(2)  # (B, height, 4 * width)
    placed = placed.unflatten(2, (4, -1)).div_(255 * WEIGHT_STEPS**2)  # (B, height, 4, width)
    opacity = placed[:, :, 3:].clamp_(max=1)  # rounded weights may sum to more
    gain = between(0.5, 1.1, draws[:, 4:5]) * between(0.9, 1.1, draws[:, 5:8])  # (B, 3)
    lift = between(0, 0.25, draws[:, 8:9])
    colours = placed[:, :, :3].mul_(per_channel(gain)).add_(opacity * per_channel(lift))
    torch.minimum(colours, opacity, out=colours)
    return Placed(placed, tops + margin, lefts + margin)


def per_channel(values: Tensor) -> Tensor:
    """(B, channels) as it multiplies (B, H, channels, W)."""
    return values.float()[:, None, :, None]


def crop_scenery(scenery: Scenery, chosen: Tensor, draws: Tensor, margin: int = 0) -> Tensor:
    """Crops (B, L, 3, L) of those photographs in random sizes, some mirrored, changed in contrast and colour.

    L is SIZE + 2 margin. What is cropped is drawn for this size, so that the margin is photograph too.
    """
    side = SIZE + 2 * margin
    shape = scenery.shapes[chosen, whole(draws[:, 1], scenery.shapes.shape[1])]  # (B, 3)
    begin, height, width = shape.unbind(1)
    top, left = whole(draws[:, 2], height - side + 1), whole(draws[:, 3], width - side + 1)
    packed = scenery.pixels.view(torch.int32)[:, 0]  # four bytes at once
    crops = torch.empty(len(chosen), side, side, dtype=torch.int32)
    places = begin + top * width + left
    mirrored = (draws[:, 4] >= 0.5).tolist()
    for crop, place, row, turned in zip(crops, places.tolist(), width.tolist(), mirrored, strict=True):
        seen = packed.as_strided((side, side), (row, 1), place)
        crop.copy_(seen.flip(1) if turned else seen)
    pixels = crops.view(torch.uint8).view(-1, side, side, 4)[..., :3].mT.contiguous()
    gain = between(0.6, 1.1, draws[:, 5:6]) * between(0.85, 1.15, draws[:, 6:9])  # (B, 3)
    grey = between(0.4, 0.6, draws[:, 9:10]) - gain / 2
    return pixels.float().mul_(per_channel(gain / 255)).add_(per_channel(grey)).clamp_(0, 1)


# -- scenes ----------------------------------------------------------------------------------------------


def draw_scenes(split: Split, name: str, indices: Sequence[int], seed: int = 0, margin: int = 0) -> Scenes:
    """The images of these indices.

    With a margin they are larger by so many pixels on each side. Objects, their light and what hides what are those of
    the image without it; the photograph, too, is the same, but another part of it, where there is room for the margin.

    Args:
        split: What they are made of.
        name: The split's, one of `data.cutouts.SPLITS`: the two draw different numbers.
        indices: From 0 on; there is no last.
        seed: Of everything that is drawn.
        margin: At most MAX_MARGIN.

    Raises:
        ValueError: An unknown split, no index, a negative one, a negative seed, or a margin that some photograph has no
            room for.
    """
    if check_count("margin", margin) > MAX_MARGIN:
        raise ValueError(
            f"margin must be at most {MAX_MARGIN}, since the smallest photographs have {LEVELS[0]} pixels, got {margin}"
        )
    draws = scene_draws(name, indices, seed)
    order = distractor_counts(draws).argsort(descending=True, stable=True)
    with torch.autocast("cpu", enabled=False):  # its bfloat16 does not hold the sums of resampling
        chunks = [draw_chunk(split, chunk, margin) for chunk in draws[order].split(CHUNK)]
    back = order.argsort()
    return Scenes(*(torch.cat(values)[back] for values in zip(*chunks, strict=True)))


def scene_draws(name: str, indices: Sequence[int], seed: int) -> Tensor:
    """(B, DISTRACTORS + 2, DRAWS) uniform numbers: of the scene, of the labelled object, of each distractor.

    Arguments and errors as of ``draw_scenes``.
    """
    check_choice("split", name, SPLITS)
    check_count("seed", seed)
    wanted = torch.as_tensor(indices, dtype=torch.int64)
    if wanted.ndim != 1 or not len(wanted) or (wanted < 0).any():
        raise ValueError(f"indices must be whole numbers of at least 0, and there must be one, got {list(indices)}")
    parts = DISTRACTORS + 2
    return uniforms(seed, SPLITS.index(name), wanted, parts * DRAWS).unflatten(1, (parts, DRAWS))


def scene_labels(split: Split, name: str, indices: Sequence[int], seed: int = 0) -> Tensor:
    """(B,) the classes of ``draw_scenes`` with these arguments, without an image being drawn."""
    return drawn_labels(split, scene_draws(name, indices, seed))


def drawn_labels(split: Split, draws: Tensor) -> Tensor:
    """(B,) the class of each scene."""
    return whole(draws[:, 1, 0], len(split.objects.counts))


def distractor_counts(draws: Tensor) -> Tensor:
    """How many distractors each scene has, (B,)."""
    return whole(draws[:, 0, 11], DISTRACTORS + 1)


def draw_chunk(split: Split, draws: Tensor, margin: int) -> Scenes:
    """A few scenes; draws is (B, DISTRACTORS + 2, DRAWS), those with most distractors first."""
    scene, labelled = draws[:, 0], draws[:, 1]
    counts = split.objects.counts
    labels = drawn_labels(split, draws)
    chosen = (counts.cumsum(0) - counts)[labels] + whole(labelled[:, 1], counts[labels])
    side = SIZE + 2 * margin
    placed = place_objects(split.objects, chosen, labelled[:, 2:], inside=True, margin=margin)
    layer = placed.over(torch.zeros(len(draws), side, 4, side))
    others = place_distractors(split.distractors, distractor_counts(draws), draws[:, 2:], margin)
    opacity, hiding = layer[:, :, 3], others[:, :, 3]  # (B, L, L)
    shape = opacity >= 0.5  # lies inside the image, so that a margin changes nothing of what is in front
    hidden = shape & (hiding >= 0.5)
    in_front = (scene[:, 10] < 0.5) | (hidden.sum((1, 2)) > MAX_HIDDEN * shape.sum((1, 2)))
    in_front = in_front[:, None, None]
    masks = shape & (in_front | ~hidden)
    seen = 1 - opacity * in_front, 1 - hiding * ~in_front  # of the distractors, of the object
    layer = layer.mul_(seen[1][:, :, None]).add_(others.mul_(seen[0][:, :, None]))
    photographs = whole(scene[:, 0], len(split.scenery.names))
    images = crop_scenery(split.scenery, photographs, scene, margin).mul_(1 - layer[:, :, 3:]).add_(layer[:, :, :3])
    images = images.mul_(255).round_().to(torch.uint8).transpose(1, 2)  # no colour is above its opacity
    return Scenes(images.contiguous(), labels, mask_boxes(masks), masks, photographs)


def place_distractors(bank: Bank, numbers: Tensor, draws: Tensor, margin: int) -> Tensor:
    """So many distractors (B,), the largest numbers first, as one layer; ``draws`` is (B, DISTRACTORS, DRAWS)."""
    side = SIZE + 2 * margin
    layers = torch.zeros(len(numbers), side, 4, side)
    for slot in range(DISTRACTORS):
        own = draws[: int((numbers > slot).sum()), slot]
        if len(own):
            place_objects(bank, whole(own[:, 0], len(bank.pixels)), own[:, 2:], False, margin).over(layers)
    return layers


def mask_boxes(masks: Tensor) -> Tensor:
    """(B, 4) the extents of masks (B, H, W), of which none is empty; see `Scenes`."""
    sides = []
    for axis in (1, 2):  # columns, then rows
        occupied = masks.any(axis).int()  # (B, W), then (B, H)
        sides.append((occupied.argmax(1), occupied.shape[1] - occupied.flip(1).argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1)


def patch_coverage(masks: Tensor, patch_size: int = 8) -> Tensor:
    """(B, N) the share of each patch that masks (B, H, W) cover, patches row by row.

    Raises:
        ValueError: A patch size that does not divide the sides.
    """
    if patch_size < 1 or any(side % patch_size for side in masks.shape[1:]):
        raise ValueError(f"patch_size must divide the sides {tuple(masks.shape[1:])} of the masks, got {patch_size}")
    return F.avg_pool2d(masks[:, None].float(), patch_size).flatten(1)


class Cutouts(Dataset[tuple[Tensor, int]]):
    """A data set of (image (3, SIZE, SIZE) uint8, class) for PyTorch; a DataLoader asks it for whole batches.

    Args:
        split: "train" or "test".
        root: See `data.cutouts.open_split`.
        length: Number of images that it says it has; any index from 0 on can be asked for.
        seed: See `draw_scenes`.
        parts: What images are made of in place of what was fetched.
    """

    classes = CLASSES

    def __init__(
        self,
        split: str,
        root: str | os.PathLike[str] | None = None,
        *,
        length: int,
        seed: int = 0,
        parts: Split | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        self.split = split
        self.length = check_count("length", length, 1)
        self.seed = check_count("seed", seed)
        self.parts = open_split(split, root) if parts is None else parts

    def __len__(self) -> int:
        return self.length

    def scenes(self, indices: Sequence[int], margin: int = 0) -> Scenes:
        """The images of these indices with their boxes and masks, and a margin around them; see `draw_scenes`."""
        return draw_scenes(self.parts, self.split, indices, self.seed, margin)

    def labels(self) -> list[int]:
        """The classes of the first ``len(self)`` images."""
        return scene_labels(self.parts, self.split, range(len(self)), self.seed).tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        drawn = self.scenes(indices)
        return list(zip(drawn.images, drawn.labels.tolist(), strict=True))
