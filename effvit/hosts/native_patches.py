"""Images of sizes of their own as one batch of patches: what timm's NaFlex collator gives, checked and put in order.

Every image has a full grid of patches of its own, and its row is padded to the longest. Where the values of a batch
are read, they are read here, once: which patches are valid, and the grids that their coordinates span.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.layers.macs import resampling
from effvit.protocols import Size
from effvit.reducers.base import refuse_recording
from effvit.tokens import History, Layout, TokenMap, Trail, autocast_enabled, ranges_of, take_rows

__all__ = [
    "NativeBatch",
    "NativeEmbeds",
    "NominalPatches",
    "Placed",
    "check_native",
    "joined",
    "placed_map",
    "to_slots",
]

KEYS = ("patches", "patch_coord", "patch_valid")


class NativeEmbeds(Protocol):
    """What is asked of timm's ``NaFlexEmbeds``, which makes prefix tokens and positions too."""

    proj: nn.Linear | nn.Conv2d
    norm_input: nn.Module | None
    norm: nn.Module
    patch_size: Size
    in_chans: int
    channels_last: bool
    is_linear: bool
    supports_patch_interpolation: bool
    dynamic_img_pad: bool
    default_img_size: Size | None
    pos_embed: Tensor
    pos_embed_y: Tensor
    pos_embed_x: Tensor
    pos_embed_interp_mode: str
    pos_embed_antialias: bool
    pos_embed_ar_preserving: bool
    pos_embed_type: str
    pos_embed_grid_size: Size | None

    def __call__(
        self, x: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
    ) -> tuple[Tensor, Size | None]: ...

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """(H, W) patch grid of images of that size."""
        ...


class NominalPatches:
    """The part of ``NaFlexEmbeds`` that cuts and projects patches, under the names of timm's ``PatchEmbed``.

    Attributes:
        img_size: (H, W) that the model is counted and profiled at; images of any other are taken as well. The one that
            it was made for or set to, else that of its pretrained configuration, else that of its table of positions.
        grid_size: (H, W) of its patches.
    """

    def __init__(self, embeds: NativeEmbeds, cfg: Mapping[str, Any]) -> None:
        self.embeds = embeds
        self.patch_size = embeds.patch_size
        self.dynamic_img_pad = embeds.dynamic_img_pad
        self.proj = embeds.proj
        rows, columns = embeds.pos_embed_grid_size or (16, 16)  # timm's own default, where no table has a size
        size: Size = rows * self.patch_size[0], columns * self.patch_size[1]
        if cfg.get("input_size"):
            size = cfg["input_size"][1], cfg["input_size"][2]
        self.img_size: Size = embeds.default_img_size or size
        self.grid_size: Size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size)

    def __call__(self, x: Tensor, /) -> Tensor:
        """Embedded tokens (B, P+N, C) of images (B, C, H, W): prefix tokens and positions included, as in timm."""
        return self.embeds(x)[0]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the projection."""
        return self.proj.parameters()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers that a patch passes, in order."""
        layers = (("norm_input", self.embeds.norm_input), ("proj", self.proj), ("norm", self.embeds.norm))
        return iter([(name, layer) for name, layer in layers if layer is not None])

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """(H, W) patch grid of images of another size."""
        height, width = self.embeds.dynamic_feat_size(img_size)
        return height, width

    def resampling_macs(self, grid: Size) -> int:
        """MACs of timm's resampling of the table of positions for a patch grid (H, W); 0 on that of the table."""
        embeds = self.embeds
        wanted = (max(grid), max(grid)) if embeds.pos_embed_ar_preserving else grid
        if embeds.pos_embed_type == "factorized":
            tables = ((embeds.pos_embed_y, wanted[0]), (embeds.pos_embed_x, wanted[1]))
            return sum(resampling(table.shape[1:2], (side,), table.shape[2], 2) for table, side in tables)
        if embeds.pos_embed_type != "learned" or tuple(embeds.pos_embed.shape[1:3]) == grid:
            return 0
        taps = 4 if embeds.pos_embed_interp_mode == "bicubic" else 2
        _, *sides, dim = embeds.pos_embed.shape
        return resampling(sides, wanted, dim, taps, embeds.pos_embed_antialias)


@dataclass(frozen=True)
class NativeBatch:
    """Patches of B images, those of each image in front and in image order, row by row of its grid.

    Attributes:
        patches: (B, N, D) flattened patches, or (B, N, h, w, 3) of a patch size of their own; zeros in the padding.
        coord: (B, N, 2) row and column of each patch in the grid of its image; zeros in the padding.
        valid: (B, N) False for padding.
        grids: (H, W) of each image, whose number of patches is H * W.
        order: (B, N) slot that each patch had in the batch as it was given; None: the one it has.
        packed: The images are to run one after another in one row, without padding.
    """

    patches: Tensor
    coord: Tensor
    valid: Tensor
    grids: tuple[Size, ...]
    order: Tensor | None = None
    packed: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each image."""
        return tuple(height * width for height, width in self.grids)

    @property
    def canvas(self) -> Size:
        """The least grid (H, W) that holds every image's in its upper left corner."""
        return max(height for height, _ in self.grids), max(width for _, width in self.grids)

    @property
    def places(self) -> Tensor:
        """(B, N) cell of the canvas that each patch lies in, 0 for padding."""
        return self.coord[..., 0] * self.canvas[1] + self.coord[..., 1]

    def by_grid(self) -> dict[Size, list[int]]:
        """The images of each grid."""
        images: dict[Size, list[int]] = {}
        for image, grid in enumerate(self.grids):
            images.setdefault(grid, []).append(image)
        return images

    def of_grid(self, grid: Size) -> NativeBatch:
        """The images of one grid, without padding."""
        images, length = self.by_grid()[grid], grid[0] * grid[1]
        index = torch.tensor(images, device=self.valid.device)
        patches, coord, valid = (y[index, :length] for y in (self.patches, self.coord, self.valid))
        return NativeBatch(patches, coord, valid, (grid,) * len(images))

    def trimmed(self) -> NativeBatch:
        """The batch without slots that are padding in every image."""
        width = max(self.lengths)
        return replace(
            self, patches=self.patches[:, :width], coord=self.coord[:, :width], valid=self.valid[:, :width], order=None
        )


def check_native(batch: Mapping[str, Tensor], embeds: NativeEmbeds) -> NativeBatch:
    """The batch in image order, or an error that says what is wrong with it.

    Args:
        batch: ``patches`` (B, N, D) or (B, N, h, w, 3), ``patch_coord`` (B, N, 2) and ``patch_valid`` (B, N), as
            ``timm.data.naflex_dataset.NaFlexCollator`` gives them. Slots may be in any order.
        embeds: The embedding of the model.

    Raises:
        TypeError: A part that is no tensor or of another dtype.
        ValueError: A missing part, another shape, an image without a valid patch, or one whose coordinates are not
            those of one full grid; and where the batch is recorded, since its grids are read from it.
    """
    missing = [name for name in KEYS if batch.get(name) is None]
    if missing:
        raise ValueError(
            f"a batch of patches needs {', '.join(KEYS)}, got no {' and no '.join(missing)}; take what timm's "
            "NaFlexCollator gives, or give images (B, C, H, W)"
        )
    if batch.get("attn_mask") is not None:
        raise ValueError(
            "a reduced model takes no attn_mask, which is defined on the full sequence, whose tokens move and leave; "
            "leave it out: padding is masked by patch_valid"
        )
    patches, coord, valid = (batch[name] for name in KEYS)
    _check_parts(patches, coord, valid, embeds)
    refuse_recording(
        patches,
        "the grids of a batch of patches are read from its coordinates",
        "record the model on images (B, C, H, W) of one size",
    )
    return _in_order(patches, coord, valid)


def _check_parts(patches: Tensor, coord: Tensor, valid: Tensor, embeds: NativeEmbeds) -> None:
    """Types, dtypes and shapes."""
    for name, part in zip(KEYS, (patches, coord, valid), strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(part).__name__}; take what timm's NaFlexCollator gives"
            )
    if not embeds.is_linear:
        raise ValueError(
            "this model embeds patches by a convolution over images (embed_proj_type='conv'), so it takes no batch of "
            "patches; create it with embed_proj_type='linear', or give images (B, C, H, W)"
        )
    (height, width), channels = embeds.patch_size, embeds.in_chans
    dim = height * width * channels
    if patches.ndim == 3 and patches.shape[2] != dim:
        raise ValueError(
            f"patches must be (B, N, {dim}), {height} x {width} pixels of {channels} channels each, got "
            f"{tuple(patches.shape)}; cut the images into patches of the model's patch size"
        )
    if patches.ndim == 5:
        sides = tuple(patches.shape[2:4] if embeds.channels_last else patches.shape[3:5])
        if patches.shape[4 if embeds.channels_last else 2] != channels:
            raise ValueError(f"patches must have {channels} channels, got {tuple(patches.shape)}; check their layout")
        if sides != (height, width) and not embeds.supports_patch_interpolation:
            raise ValueError(
                f"patches must be of {height} x {width} pixels, got {sides[0]} x {sides[1]}; cut them so, or create "
                "the model with enable_patch_interpolator=True"
            )
    if patches.ndim not in (3, 5) or 0 in patches.shape:
        raise ValueError(
            f"patches must be (B, N, {dim}) or (B, N, rows, columns, {channels}) with at least one image and slot, "
            f"got {tuple(patches.shape)}; give images (B, C, H, W) as a tensor, not as patches"
        )
    slots = tuple(patches.shape[:2])
    if tuple(coord.shape) != (*slots, 2) or coord.dtype.is_floating_point or coord.dtype == torch.bool:
        raise ValueError(
            f"patch_coord must hold whole numbers {(*slots, 2)}, row and column of each patch, got "
            f"{tuple(coord.shape)} of {coord.dtype}; take what timm's NaFlexCollator gives"
        )
    if tuple(valid.shape) != slots or valid.dtype != torch.bool:
        raise ValueError(
            f"patch_valid must be a mask {slots} of torch.bool, False for padding, got {tuple(valid.shape)} of "
            f"{valid.dtype}; take what timm's NaFlexCollator gives"
        )
    weight = embeds.proj.weight
    if patches.dtype != weight.dtype and not autocast_enabled(patches):
        raise TypeError(
            f"expected patches of dtype {weight.dtype}, the model's, got {patches.dtype}; convert the patches or the "
            "model, or run under torch.autocast"
        )


def _in_order(patches: Tensor, coord: Tensor, valid: Tensor) -> NativeBatch:
    """The batch with the patches of every image in image order, in front; its coordinates are those of full grids."""
    coord = coord.long()
    inside = coord.masked_fill(~valid.unsqueeze(-1), 0)  # (B, N, 2)
    sides = inside.amax(1) + 1  # (B, 2)
    cells = inside[..., 0] * sides[:, 1:] + inside[..., 1]  # (B, N)
    number = valid.shape[1]
    place = torch.arange(number, device=valid.device)
    behind = sides.prod(1, keepdim=True) + place  # (B, N), behind every cell
    cells, order = torch.where(valid, cells, behind).sort(dim=1)
    counts = valid.sum(1)
    full = ((cells == place) | (place >= counts.unsqueeze(1))).all(1) & (counts == sides.prod(1))
    least = inside.flatten(1).amin(1)
    in_order = (order == place).all(1)
    table = torch.stack([counts, least, *sides.unbind(1), full.long(), in_order.long()], dim=1).tolist()  # the one read
    for image, (count, lowest, rows, columns, is_full, _) in enumerate(table):
        if count == 0:
            raise ValueError(
                f"image {image} has no valid patch among its {number}; leave images without patches out of the batch"
            )
        if lowest < 0:
            raise ValueError(
                f"patch_coord must be rows and columns from 0, got {lowest} in image {image}: it lies outside of the "
                "grid; count from the upper left patch of the image"
            )
        if not is_full:
            raise ValueError(
                f"the coordinates of an image must be those of one full grid, each cell once, but the {count} valid "
                f"patches of image {image} span {rows} x {columns} cells: one lies outside of the grid, is missing or "
                "is there twice; give all patches of the image, with a max_seq_len that does not cut it off"
            )
    grids = tuple((rows, columns) for _, _, rows, columns, _, _ in table)
    if all(row[-1] for row in table):
        return NativeBatch(_blanked(patches, valid), inside, valid, grids)
    taken = order.unsqueeze(-1)
    patches = torch.take_along_dim(patches.flatten(2), taken, 1).view_as(patches)
    valid = valid.gather(1, order)
    return NativeBatch(_blanked(patches, valid), torch.take_along_dim(inside, taken, 1), valid, grids, order)


def _blanked(patches: Tensor, valid: Tensor) -> Tensor:
    """The patches, zeros where there is padding: NaN there would reach every token as 0 times NaN."""
    return patches.masked_fill(~valid.view(*valid.shape, *[1] * (patches.ndim - 2)), 0)


class Placed(NamedTuple):
    """The step from the cells of a canvas to the patches of images that cover a part of it each: a ``Step``.

    Attributes:
        order: (B, N) cell of each patch.
        valid: (B, N) False for padding, whose cell says nothing.
    """

    order: Tensor
    valid: Tensor
    fuses: bool = False

    def target(self, like: Tensor) -> Tensor:
        """(B, H*W) patch in each cell, -1 for a cell without one; ``like`` is any (B, H*W) int64."""
        place = torch.arange(self.order.shape[1], device=like.device).expand_as(self.order)
        none = torch.full_like(like, -1)
        return none.scatter_reduce(1, self.order, place.masked_fill(~self.valid, -1), "amax")


def placed_map(x: Tensor, batch: NativeBatch, num_prefix: int, num_class: int) -> TokenMap:
    """The map of the embedded tokens x (B, P+N, C) of images with grids of their own, on the canvas of all of them."""
    canvas, number = batch.canvas, batch.valid.shape[1]
    cells = canvas[0] * canvas[1]
    ranges = ranges_of(x, num_prefix + max(number, cells), num_prefix)
    patches = ranges.sequence[:, :cells]
    return TokenMap(
        Trail(patches, Trail(patches), Placed(batch.places, batch.valid)),
        Layout(canvas, num_prefix, num_class, ranges, batch.lengths),
        num_tokens=number,
        moved=True,
        valid=batch.valid,
        lengths=batch.lengths,
        history=History(present=batch.places),
    )


class Joining(NamedTuple):
    """A step whose result is known, for maps that were joined: a ``Step`` that is never asked for its target."""

    order: Tensor
    fuses: bool = False

    def target(self, like: Tensor) -> Tensor:
        raise NotImplementedError("the source of a joined map is known")


def joined(batch: NativeBatch, parts: list[tuple[list[int], Tensor, TokenMap]]) -> tuple[Tensor, TokenMap]:
    """Tokens and maps of the images of each grid as one padded batch and its map on the canvas.

    Args:
        batch: All images.
        parts: Numbers of some images, all of one grid, their tokens (B', P+K', C), and the map of these.

    Returns:
        (B, P+K, C) and their map, without what was kept for fills.
    """
    (_, first, sample), canvas = parts[0], batch.canvas
    prefix = sample.num_prefix
    width = max(tokens.width for _, _, tokens in parts)
    cells, total = canvas[0] * canvas[1], len(batch.grids)
    x = first.new_zeros(total, prefix + width, first.shape[2])
    source = torch.full((total, cells), -1, device=x.device)
    anchor = torch.zeros((total, width), dtype=torch.int64, device=x.device)
    valid = torch.zeros((total, width), dtype=torch.bool, device=x.device)
    fused = torch.zeros_like(valid)
    weighted = any(tokens.size is not None for _, _, tokens in parts)
    size = torch.ones((total, prefix + width), device=x.device) if weighted else None
    for images, y, tokens in parts:
        index, number = torch.tensor(images, device=x.device), tokens.width
        height, breadth = tokens.grid
        corner = torch.arange(height, device=x.device).unsqueeze(1) * canvas[1]
        corner = (corner + torch.arange(breadth, device=x.device)).flatten()  # (H*W,) cells of the part's grid
        x = x.index_copy(0, index, F.pad(y, (0, 0, 0, width - number)))
        source[index.unsqueeze(1), corner] = tokens.source
        anchor[index, :number] = corner[tokens.anchor]
        valid[index, :number] = True if tokens.valid is None else tokens.valid
        if tokens.fused is not None:
            fused[index, :number] = tokens.fused
        if size is not None and tokens.size is not None:
            size[index, : prefix + number] = tokens.size.to(size.dtype)
    known = {"source": source, "anchor": anchor}
    fuses = bool(any(tokens.fused is not None for _, _, tokens in parts))
    ranges = ranges_of(x, prefix + max(width, cells), prefix)
    patches = ranges.sequence[:, :cells]
    return x, TokenMap(
        Trail(patches, Trail(patches), Joining(anchor, fuses), known | ({"fused": fused} if fuses else {})),
        Layout(canvas, prefix, sample.num_class, ranges, batch.lengths),
        num_tokens=width,
        moved=True,
        complete=all(tokens.complete for _, _, tokens in parts),
        size=size,
        valid=valid,
        history=History(present=batch.trimmed().places),
    )


def to_slots(batch: NativeBatch, parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """Features of all patches of some images in image order, each (B', H*W or more, C), in the slots of the batch.

    Returns:
        (B, N, C) beside ``patch_coord`` as it was given, zeros in the padding.
    """
    slots = batch.valid.shape[1]
    first = parts[0][1]
    out = first.new_zeros(len(batch.grids), slots, first.shape[2])
    for images, y in parts:
        out = out.index_copy(0, torch.tensor(images, device=out.device), F.pad(y, (0, 0, 0, slots - y.shape[1])))
    out = out.masked_fill(~batch.valid.unsqueeze(-1), 0)
    if batch.order is None:
        return out
    back = batch.order.argsort(dim=1)  # slot as given -> place in image order
    rows = back + torch.arange(len(back), device=back.device).unsqueeze(1) * slots
    return take_rows(out, rows)
