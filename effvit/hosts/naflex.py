"""Native resolution: timm's ``NaFlexVit`` with a reduction method, on images or on patches of images of any sizes.

Beside images (B, 3, H, W) it takes batches as timm's NaFlex collator makes them, a dict of patches, coordinates and a
valid mask (``effvit.hosts.native_patches``): each image with its own grid of patches. An image gives the same alone as
among images of other sizes, whichever way the batch runs (``ReducedNaFlex.batching``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from effvit.block import with_gradients
from effvit.hosts.host import HOST_CLASSES, ReducedHost, TokenFeatures, check_counts
from effvit.hosts.native_patches import (
    NativeBatch,
    NativeEmbeds,
    NominalPatches,
    check_native,
    joined,
    placed_map,
    to_slots,
)
from effvit.hosts.stages import Stage
from effvit.hosts.surface import BlockFeatures, Intermediates, refuse_mask
from effvit.protocols import Size
from effvit.recording import refuse_fx, refuse_open_sides
from effvit.recover import FILLS, to_grid, unpacked
from effvit.schedule import check_choice
from effvit.tokens import TokenMap, fix_traced_size

__all__ = ["BATCHING", "CLASS_TOKEN_HOSTS", "NO_CLASS_TOKEN_HOSTS", "ReducedNaFlex"]

CLASS_TOKEN_HOSTS = (
    *(f"naflexvit_{size}_patch16_radio_v3" for size in ("base", "large", "huge", "giant")),
    *(f"naflexvit_{size}_patch16_radio_v4" for size in ("so400m", "huge")),
)
NO_CLASS_TOKEN_HOSTS = (
    *(f"naflexvit_base_patch16_{kind}" for kind in ("gap", "par_gap", "parfac_gap", "siglip")),
    "naflexvit_so400m_patch16_siglip",
)
BATCHING = ("auto", "grouped", "padded", "packed")

Images: TypeAlias = "Tensor | Mapping[str, Tensor]"
"""Images (B, 3, H, W), or the dict of timm's NaFlex collator."""


class RotaryTables(Protocol):
    """What is asked of timm's rotary embeddings."""

    def get_embed(self, shape: Size, dtype: torch.dtype | None = None) -> Tensor:
        """(H*W, D) table of a grid; (depth, heads, H*W, D) of the mixed kind."""
        ...


class Part(NamedTuple):
    """Some images of a batch that ran together.

    Attributes:
        images: Their numbers.
        final: Tokens behind the last block run.
        taken: Tokens behind the blocks asked for.
    """

    images: list[int]
    final: TokenFeatures
    taken: list[TokenFeatures]


class ReducedNaFlex(ReducedHost, NaFlexVit):
    """timm's ``NaFlexVit`` with a reduction method.

    Attributes:
        batching: How images with grids of their own share a batch, with equal results. "padded" to the longest with a
            key mask, as timm does; "packed" one after another without padding; both for methods that declare
            ``takes_padding``. "grouped": those of equal grids run together, without padding, for every method.
            "auto": "padded" where the method takes padding, else "grouped". Images of one grid always run together.
    """

    batching: str = "auto"
    dynamic_img_size = True  # positions are resampled for every size
    embeds: NativeEmbeds
    rope: RotaryTables | None
    rope_is_mixed: bool
    has_class_token: bool

    if TYPE_CHECKING:

        def forward_head(
            self, patches: Tensor, pre_logits: bool = False, patch_valid: Tensor | None = None
        ) -> Tensor: ...

    @property
    def patch_embed(self) -> NominalPatches:  # type: ignore[override]
        """What cuts images into patches, as hosts with timm's ``PatchEmbed`` have it."""
        return NominalPatches(self.embeds, getattr(self, "pretrained_cfg", None) or {})

    @property
    def num_class_tokens(self) -> int:
        return int(self.has_class_token)

    # -- what one forward pass does ----------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.embeds.pos_embed_type != "none":  # timm asks whether the grid is that of the table
            sides = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            refuse_open_sides(sides, 0, "a NaFlexVit with a table of positions", "resampled positions")
        x, grid = self.embeds(x)
        assert grid is not None
        rope = None if self.rope is None else self.rope.get_embed(shape=grid)
        return self.norm_pre(fix_traced_size(x, 1)), rope  # a trace holds the positions of one grid

    def _block_positions(self, positions: Tensor | None, block: int) -> Tensor | None:
        return positions[block] if self.rope_is_mixed and positions is not None else positions

    def _start(
        self, x: Tensor | NativeBatch, memory: bool, reference: bool = False
    ) -> tuple[Tensor, Tensor | None, TokenMap]:
        if not isinstance(x, NativeBatch):
            return super()._start(x, memory, reference)
        self.check_whole()
        embedded, _ = self.embeds(x.patches, patch_coord=x.coord, patch_valid=x.valid)  # (B, P+N, C)
        rope = None if self.rope is None else self._tables(x, self.rope, embedded.dtype)
        embedded = self.norm_pre(embedded)
        if len(set(x.grids)) == 1:
            return self._enter(embedded, rope, x.grids[0], memory, reference)
        tokens = placed_map(embedded, x, self.num_prefix_tokens, self.num_class_tokens)
        if x.packed:
            embedded, tokens = tokens.pack(embedded), replace(tokens, packed=True)
        return embedded, rope, tokens.remember(embedded) if memory else tokens

    def _tables(self, batch: NativeBatch, rope: RotaryTables, dtype: torch.dtype) -> Tensor:
        """Rotary table of a grid, or (B, heads or 1, cells, D) of all grids on their canvas, one a block if mixed."""
        grids = list(batch.by_grid())
        together: Callable[..., list[Tensor]] | None = getattr(rope, "get_batch_embeds", None)
        if together is not None and not self.rope_is_mixed:
            tables = together(grids, dtype=dtype)
        else:
            tables = [rope.get_embed(shape=grid, dtype=dtype) for grid in grids]
        if len(grids) == 1:
            return tables[0]
        height, width = batch.canvas
        canvases = [
            F.pad(table.unflatten(-2, grid), (0, 0, 0, width - grid[1], 0, height - grid[0])).flatten(-3, -2)
            for table, grid in zip(tables, grids, strict=True)
        ]
        each = torch.tensor([grids.index(grid) for grid in batch.grids], device=canvases[0].device)
        table = torch.stack(canvases).index_select(0, each)  # (B, cells, D), or (B, depth, heads, cells, D)
        return table.transpose(0, 1) if self.rope_is_mixed else table.unsqueeze(1)

    def _native(
        self, x: Images, patch_coord: Tensor | None, patch_valid: Tensor | None, attn_mask: Tensor | None
    ) -> NativeBatch | None:
        """The batch of patches, checked, if that is what was given; None for images.

        Raises:
            TypeError, ValueError: As ``check_native``, or for an attention mask.
        """
        if isinstance(x, torch.fx.Proxy):
            refuse_fx(x, "the sizes of the images of a NaFlexVit are known only at run time", "use torch.export")
            return None
        refuse_mask(self, attn_mask, is_causal=False)
        if isinstance(x, Mapping):
            given = {"patch_coord": patch_coord, "patch_valid": patch_valid, **x}
        elif patch_coord is not None or patch_valid is not None:
            given = {"patches": x, "patch_coord": patch_coord, "patch_valid": patch_valid}
        else:
            return None
        batch = check_native({name: part for name, part in given.items() if part is not None}, self.embeds)
        for grid in batch.by_grid():
            check_counts(self, grid)
        return batch

    def _native_with(self, x: Images, memory: bool) -> NativeBatch | None:
        """``_native`` of what is to be made into tokens; a ValueError for memory of images of several grids."""
        batch = self._native(x, None, None, None)
        grids = 1 if batch is None else len(batch.by_grid())
        if memory and grids > 1:
            raise ValueError(
                f"memory is for full maps, which images of {grids} different grids do not share; leave memory out, or "
                "give images of one grid"
            )
        return batch

    def _way(self, reference: bool) -> str:
        """How images of several grids run: "grouped", "padded" or "packed".

        Raises:
            ValueError: "padded" or "packed" asked of a method that takes no padding.
        """
        check_choice("batching", self.batching, BATCHING)
        takes = all(reducer.takes_padding for reducer in self.reducers.values())
        if not takes and self.batching in ("padded", "packed"):
            raise ValueError(
                f"{self.method} takes no padding, so images of several grids cannot be {self.batching} in one batch; "
                "set model.batching to 'grouped' or 'auto', which give the same result"
            )
        dropping = self.training and self.token_drop is not None
        if not takes or dropping or (reference and self.reducers):  # each of these reads full grids
            return "grouped"
        return "padded" if self.batching == "auto" else self.batching

    def _run(
        self,
        batch: NativeBatch,
        take: Sequence[int] = (),
        num_blocks: int | None = None,
        memory: bool = False,
        reference: bool = False,
    ) -> list[Part]:
        """The blocks on a batch of patches; arguments as ``_forward_blocks``."""
        way, images = self._way(reference), batch.by_grid()
        if way == "grouped" or len(images) == 1:
            batches = {tuple(numbers): batch.of_grid(grid) for grid, numbers in images.items()}
        else:
            batch = batch.trimmed() if self.reducers else batch  # as timm runs it, to the bit, if nothing is reduced
            batches = {tuple(range(len(batch.grids))): replace(batch, packed=way == "packed")}
        options = (take, num_blocks, memory, reference)
        return [Part(list(numbers), *self._forward_blocks(part, *options)) for numbers, part in batches.items()]  # type: ignore[arg-type]

    def _pooled_features(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, Tensor | None]:
        """Tokens that timm's ``forward_head`` is exact on, and which of them are patches; None: all."""
        if tokens.layout.own is None:
            return self._poolable(x, tokens), None
        if not self._pools_patches or tokens.size is None:
            return x, tokens.valid
        place = torch.arange(tokens.carriers().shape[1], device=x.device)
        own = torch.tensor(tokens.layout.own, device=x.device).unsqueeze(1)
        return self._poolable(x, tokens), place < own

    def _scores_of(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Class scores of tokens as the blocks left them."""
        x, tokens = self._normalised(x, tokens)
        if self.attn_pool is not None and tokens.pool_weight() is not None:
            return self._attention_pooled(x, tokens)
        x, valid = self._pooled_features(x, tokens)
        return self.forward_head(x, patch_valid=valid)

    def _batch_scores(self, batch: NativeBatch, parts: list[Part]) -> Tensor:
        if not self.global_pool:  # of every token, of which images have different numbers
            return self.forward_head(self._together(batch, parts)[0])
        scores = torch.cat([self._scores_of(*part.final) for part in parts])
        return scores[_inverse(parts, scores)] if len(parts) > 1 else scores

    def _together(self, batch: NativeBatch, parts: list[Part]) -> tuple[Tensor, TokenMap]:
        """Normalised tokens of the whole batch and their map."""
        normalised = [(part.images, *self._normalised(*part.final)) for part in parts]
        return normalised[0][1:] if len(normalised) == 1 else joined(batch, normalised)

    # -- timm's surface ----------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        x: Images,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Class scores (B, num_classes).

        Args:
            x: Images (B, 3, H, W), or a dict with ``patches``, ``patch_coord`` and ``patch_valid``, or the patches.
            patch_coord: (B, N, 2) row and column of each patch in its image, beside patches.
            patch_valid: (B, N) False for padding.
            attn_mask: Refused: a mask over the full sequence has no meaning once tokens have moved.
        """
        batch = self._native(x, patch_coord, patch_valid, attn_mask)
        if batch is None:
            scores = self._scores_of(*self._forward_blocks(x)[0])  # type: ignore[arg-type]
        else:
            scores = self._batch_scores(batch, self._run(batch))
        return with_gradients(scores, self.recovery) if self.training else scores  # only maps need the recovery

    def forward_features(  # type: ignore[override]
        self,
        patches: Images,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor | None]:
        """Normalised tokens (B, P+N, C) of images, made so that ``forward_head`` is exact on them.

        Of patches a dict, as timm gives it for ``forward_head(**features)``: ``patches`` (B, P+N, C) in image order and
        ``patch_valid`` (B, N). Arguments as ``forward``.
        """
        batch = self._native(patches, patch_coord, patch_valid, attn_mask)
        if batch is None:
            return super().forward_features(patches)  # type: ignore[arg-type]
        x, tokens = self._together(batch, self._run(batch))
        x, valid = self._pooled_features(x, tokens)
        every = torch.ones_like(x[:, self.num_prefix_tokens :, 0], dtype=torch.bool)
        return {"patches": x, "patch_valid": every if valid is None else valid}

    def forward_tokens(self, x: Images, memory: bool = False, *, block: int | None = None) -> TokenFeatures:
        """As of every host. Of images with grids of their own, padded, and their map on a grid that holds all of them.

        Args:
            x: Images (B, 3, H, W), or a dict of patches.
            memory: As of every host; for a dict only where all images have one grid.
            block: As of every host; not for a dict.

        Raises:
            ValueError: ``memory`` for images of several grids, or ``block`` for a dict.
        """
        batch = self._native_with(x, memory)
        if batch is None:
            return super().forward_tokens(x, memory, block=block)  # type: ignore[arg-type]
        if block is not None:
            raise ValueError(f"block={block} is for images; of a dict of patches take trace_tokens(patches)[{block}]")
        return TokenFeatures(*self._together(batch, self._run(batch, memory=memory, reference=memory)))

    def trace_tokens(self, x: Images, memory: bool = False) -> list[TokenFeatures]:
        """Tokens (not normalised) and TokenMap after every block; arguments and errors as ``forward_tokens``."""
        batch = self._native_with(x, memory)
        if batch is None:
            return super().trace_tokens(x, memory)  # type: ignore[arg-type]
        parts = self._run(batch, take=range(len(self.blocks)), memory=memory, reference=memory)
        traces = []
        for i in range(len(self.blocks)):
            left = [(part.images, *unpacked(*part.taken[i])) for part in parts]
            traces.append(TokenFeatures(*(left[0][1:] if len(left) == 1 else joined(batch, left))))
        return traces

    def trace_stages(self, x: Images) -> list[Stage]:
        """What each reducing block makes of the patches of an image (1, 3, H, W), or of the dict of one."""
        return super().trace_stages(x)  # type: ignore[arg-type]

    def _intermediates(self, x: Tensor | NativeBatch, take: Sequence[int], num_blocks: int | None) -> BlockFeatures:
        if not isinstance(x, NativeBatch):
            return super()._intermediates(x, take, num_blocks)
        fill = self.recover if self.reducers else "zero"  # then every patch is there
        _, memory, reference = FILLS[fill]
        parts = self._run(x, take, num_blocks, memory, reference)
        patches, prefixes = [], []
        for i in range(len(take)):
            grids, heads = [], []
            for part in parts:
                y, tokens = unpacked(*part.taken[i])
                cells = to_grid(y, tokens, fill, self.recovery)  # (B', H*W, C)
                if tokens.layout.own is not None:
                    cells = cells.gather(1, x.places.unsqueeze(-1).expand(-1, -1, cells.shape[2]))  # (B, N, C)
                grids.append((part.images, cells))
                heads.append(tokens.split(y)[0])
            patches.append(to_slots(x, grids))
            prefixes.append(torch.cat(heads)[_inverse(parts, heads[0])])

        def final() -> Tensor:
            return self._pooled_features(*self._together(x, parts))[0]

        return BlockFeatures(patches, prefixes, x.grids[0], final)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Images,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """Features of several blocks on the patches of each image; arguments and returns as timm's method.

        Of images (B, 3, H, W) they are full maps. Of a batch of patches they are sequences (B, N, C) beside its
        ``patch_coord``, zeros in the padding, and ``output_dict`` adds ``patch_valid``; with ``output_fmt="NLC"``, or
        as maps (B, C, H, W) where all images have one grid and no padding.

        Raises:
            ValueError: Maps of images with grids of their own, or an attention mask.
        """
        batch = self._native(x, patch_coord, patch_valid, attn_mask)
        if batch is not None and output_fmt == "NCHW":
            remedy = "are no maps (B, C, H, W) of them; use output_fmt='NLC', whose rows stand beside patch_coord"
            batch = _trimmed(batch, remedy)
        result = Intermediates.forward_intermediates(
            self,
            x if batch is None else batch,  # type: ignore[arg-type]
            indices,
            return_prefix_tokens,
            norm,
            stop_early,
            output_fmt,
            intermediates_only,
            output_dict,
        )
        if batch is not None and output_dict:
            order = batch.order
            result["patch_valid"] = batch.valid if order is None else batch.valid.gather(1, order.argsort(dim=1))
        return result

    def on_one_grid(self, x: Images) -> Tensor | NativeBatch:
        """Images as they are, or a batch of patches in image order and without padding, if its images have one grid.

        Raises:
            TypeError, ValueError: As ``check_native``, and for images of several grids.
        """
        batch = self._native(x, None, None, None)
        remedy = "is no grid for the ids of all; give the images of one grid at a time"
        return x if batch is None else _trimmed(batch, remedy)  # type: ignore[return-value]

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Set the size that the model is counted and profiled at; images of any size are taken with no change.

        Raises:
            ValueError: Another patch size, or a size that the settings leave no token of.
        """
        own = self.embeds.patch_size
        wanted = own if patch_size is None else _pair(patch_size)
        if wanted != tuple(own):
            raise ValueError(
                f"the patches of a NaFlexVit stay {own[0]} x {own[1]}, got patch_size {wanted[0]} x {wanted[1]}; "
                "create it with enable_patch_interpolator=True and give patches of another size in a dict"
            )
        if img_size is not None:
            size = _pair(img_size)
            check_counts(self, self.patch_embed.dynamic_feat_size(size))
            self.embeds.default_img_size = size
            for reducer in self.reducers.values():
                reducer.resize(self.patch_embed.grid_size)


def _trimmed(batch: NativeBatch, remedy: str) -> NativeBatch:
    """The batch in image order without slots of padding; a ValueError if its images have several grids."""
    grids = batch.by_grid()
    if len(grids) > 1:
        raise ValueError(
            f"the images have {len(grids)} different grids, {', '.join(f'{h} x {w}' for h, w in grids)}, so there "
            f"{remedy}"
        )
    return batch.trimmed()


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _inverse(parts: list[Part], like: Tensor) -> Tensor:
    """(B,) where each image is among those of the parts, one after another."""
    order = torch.tensor([image for part in parts for image in part.images], device=like.device)
    return order.argsort()


HOST_CLASSES[NaFlexVit] = ReducedNaFlex
