"""Towers of vision-language models as hosts: timm's Qwen3, DeepSeek and Gemma 4, as encoders and as classifiers.

Sources of the towers: Qwen3-VL (2511.21631), DeepSeek-V4.1-Flash (2609.19969) and Gemma 4 (2607.02770), as timm has
them. Tokens are reduced inside as in any host, and rotary tables follow ``TokenMap.anchor``. The projector behind the
blocks needs the whole patch grid: Qwen's merger joins 2 x 2 patches, DeepSeek's aligner 3 x 3 with zeros beyond the
border, and Gemma's pooler averages 3 x 3 by their coordinates. So the grid is restored before it, and a language model
reads as many tokens as from the dense tower, in the same order:

- A merged patch has the feature of its token.
- A dropped patch has what the setting ``recover`` gives it: by default ("last") the feature it had when it was dropped.
- Where a mean of patches is read in place of a projector, a dropped patch has the mean of the others, which so stays
  theirs.

``forward_tokens`` gives the reduced tokens themselves, with the patch of each, to callers that take fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn, Protocol, cast

import torch
from timm.layers import to_2tuple
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4PatchEmbed, Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import Tensor, nn

from effvit.block import BlockList, rehouse
from effvit.hosts import tower_blocks  # noqa: F401  # which registers the blocks
from effvit.hosts.host import HOST_CLASSES, ReducedHost, check_counts
from effvit.hosts.surface import BlockFeatures, refuse_mask
from effvit.hosts.tower_costs import tower_form
from effvit.layers.macs import Terms
from effvit.protocols import Layer, PatchEmbedding, Size
from effvit.recover import FILLS, restore, to_grid, unpacked
from effvit.tokens import Memory, TokenMap, fix_traced_size

__all__ = [
    "NAMES",
    "TOWERS",
    "ReducedDeepseekClassifier",
    "ReducedDeepseekEncoder",
    "ReducedGemma4Classifier",
    "ReducedGemma4Encoder",
    "ReducedQwen3Classifier",
    "ReducedQwen3Encoder",
    "ReducedTower",
    "SizedPatchEmbed",
    "TowerClassifier",
    "mean_filled",
]

NAMES = (
    *(f"qwen3_vit_{size}{form}" for size in ("88m", "306m", "416m") for form in ("", "_merge", "_enc")),
    *(f"deepseek_vit_412m{form}" for form in ("", "_align", "_enc")),
    *(f"gemma4_vit_{size}{form}" for size in ("167m", "570m") for form in ("", "_enc")),
)
"""timm's towers: as a classifier of patches, as one of projected tokens, and as the encoder with its projector."""

DEFAULT_SIZE = 768  # pixels of a side, as timm's configurations of Gemma say


def mean_filled(x: Tensor, tokens: TokenMap) -> Tensor:
    """Patch tokens of x (B, P+N, C) on the full grid, (B, H*W, C), whose mean is that of the patches not dropped.

    Dropped patches get that mean, in which a merged token counts once for each of its patches.
    """
    patches = to_grid(x, tokens, "zero")
    if tokens.complete:
        return patches
    carried = (tokens.source >= 0).unsqueeze(-1)  # (B, H*W, 1)
    share = carried.to(x.dtype).mean(1, keepdim=True)
    return torch.where(carried, patches, patches.mean(1, keepdim=True) / share)


class Encoder(Protocol):
    """What is asked of timm's encoders."""

    blocks: BlockList
    patch_embed: PatchEmbedding
    output_fmt: str
    grad_checkpointing: bool


class RotaryEncoder(Encoder, Protocol):
    """What is asked of the encoders of Qwen and DeepSeek."""

    def _pos_embed(self, x: Tensor, /) -> tuple[Tensor, Tensor]: ...


class Merger(Layer, Protocol):
    """Qwen's projector."""

    merge_size: int


class QwenEncoder(Protocol):
    """What is asked of Qwen's encoder."""

    merger: Merger | None


class Aligner(Layer, Protocol):
    """DeepSeek's projector."""

    downsample_ratio: int


class DeepseekEncoder(Protocol):
    """What is asked of DeepSeek's encoder."""

    norm: Layer
    aligner: Aligner | None


class Pooler(Protocol):
    """Gemma's projector."""

    pooling_kernel_size: int

    def __call__(self, x: Tensor, places: Tensor, padding: None, /) -> tuple[Tensor, Tensor]: ...


class GemmaEncoder(Protocol):
    """What is asked of Gemma's encoder."""

    patch_embed: SizedPatchEmbed
    global_pool: str
    pooler: Pooler
    std_bias: Tensor | None
    std_scale: Tensor

    def rotary_emb(self, x: Tensor, places: Tensor, /) -> tuple[Tensor, Tensor]:
        """Cosines and sines of places (B, N, 2), in columns and rows: (B, N, D) each."""
        ...


class Resizable(Protocol):
    """A patch embedding whose images may become others."""

    def set_input_size(self, img_size: Size) -> None:
        """Take images (H, W)."""


class ReducedTower(ReducedHost):
    """What all towers share, as the encoder alone; a class below it adds those of one family.

    Attributes:
        dynamic_img_size: A tower takes images of any size that its patches, and what reads them, can be cut from.
        tower: The encoder: this model, or a part of it in a classifier.
    """

    dynamic_img_size = True
    num_prefix_tokens = 0  # timm's classifier of Gemma does not say so
    cls_token = None
    attn_pool = None
    remedy: ClassVar[str] = ""  # for images that are not cut into whole patches
    fills_cells: ClassVar[bool] = False  # the projector pads a grid that is not cut into whole cells

    @property
    def tower(self) -> nn.Module:
        """The encoder."""
        return self

    # What a family supplies.

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> patch tokens (B, N, C) and the rotary table (N, 2D)."""
        tower = cast("RotaryEncoder", self.tower)
        x, rope = tower._pos_embed(tower.patch_embed(x))
        return fix_traced_size(x, 1), rope  # a trace holds the rotary table of one grid

    def _norm_tokens(self, x: Tensor) -> Tensor:
        """x: a tower without a norm behind its blocks."""
        return x

    @property
    def _projects(self) -> bool:
        """Whether the tokens of a language model are made of the patches."""
        raise NotImplementedError

    @property
    def merge(self) -> int:
        """Side in patches of the cells that the projector makes one token of each; 1 where nothing is projected."""
        raise NotImplementedError

    def _project(self, x: Tensor, grid: Size) -> Tensor:
        """Patches (B, H, W, C), of a Gemma tower (B, H*W, C) -> tokens of a language model (B, cells, C')."""
        raise NotImplementedError

    # What follows from it.

    def _settle(self) -> None:
        self.token_drop = None

    def _norm_patches(self, x: Tensor) -> Tensor:
        return self._norm_tokens(x)

    @property
    def _pools_patches(self) -> bool:
        """Whether what is behind the blocks reads a mean of patches."""
        return not self._projects and self.global_pool == "avg"

    def _start(self, x: Tensor, memory: bool, reference: bool = False) -> tuple[Tensor, Tensor | None, TokenMap]:
        if isinstance(x, Mapping):
            raise TypeError(
                f"a {type(self).__name__} takes images (B, {self.in_chans}, H, W), got {', '.join(map(repr, x))}: "
                "patches with coordinates come in no grid that could be restored; give images, or run the dense model"
            )
        if type(x) is not torch.fx.Proxy and getattr(x, "ndim", 0) == 4:
            self._check_patches((x.shape[-2], x.shape[-1]))
        return super()._start(x, memory, reference)

    def _check_patches(self, size: Size) -> None:
        """Raise a ValueError for images (H, W) that are not cut into whole patches."""
        patch = self.patch_embed.patch_size
        if not self.patch_embed.dynamic_img_pad and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(
                f"image size {size[0]} x {size[1]} is not a multiple of the patch size {patch[0]} x {patch[1]}; resize "
                f"the images{self.remedy}"
            )

    @property
    def cell(self) -> int:
        """Side in patches of the cells that a grid must be cut into without a rest; 1 if any grid is taken."""
        return 1 if self.fills_cells else self.merge

    def _check_cells(self, x: Tensor) -> None:
        """Raise a ValueError for images whose patches the projector cannot take, before a block has run."""
        if self.cell > 1 and isinstance(x, Tensor) and x.ndim == 4:
            self._check_patches((x.shape[-2], x.shape[-1]))
            self._check_grid(self._grid_of(x))

    def _check_grid(self, grid: Size) -> None:
        cell, patch = self.cell, self.patch_embed.patch_size
        if grid[0] % cell or grid[1] % cell:
            raise ValueError(
                f"this tower reads cells of {cell} x {cell} patches, so both sides of the grid must be multiples of "
                f"{cell}, got {grid[0]} x {grid[1]} patches; give images of multiples of {cell * patch[0]} x "
                f"{cell * patch[1]} pixels, or take the patches from forward_tokens or forward_intermediates"
            )

    def _grid_of(self, x: Tensor) -> Size:
        """(H, W) patch grid of images x."""
        return self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

    def _remember(self, x: Tensor, tokens: TokenMap) -> TokenMap:
        """The map that remembers x; of all sequences before, without gradients, one feature a patch is kept.

        A tower has so many patches and blocks that sequences of every block would be its peak of memory.
        """
        tokens = tokens.remember(x)
        memory = tokens.memory
        if memory is None or len(memory.sequences) < 2 or (torch.is_grad_enabled() and x.requires_grad):
            return tokens
        ranges, number = tokens.layout.ranges, tokens.num_patches
        compact = Memory((memory.features(),), ranges.first(number, 0) + ranges.sequence[:, :number])
        return replace(tokens, history=tokens.history._replace(memory=compact))

    def _whole(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Tokens (B, N, C) behind the last block -> normalised patches of the full grid, (B, H*W, C)."""
        if not self._pools_patches:
            return self._norm_tokens(to_grid(x, tokens, self.recover, self.recovery))
        x, tokens = restore(x, tokens) if tokens.soft else unpacked(x, tokens)
        return mean_filled(self._norm_tokens(x), tokens)

    def _finished(self, x: Tensor, tokens: TokenMap) -> Tensor:
        return self._shaped(self._whole(x, tokens), tokens.grid)

    def _shaped(self, patches: Tensor, grid: Size) -> Tensor:
        """Patches (B, H*W, C) of the full grid as timm's tower returns them, which is how its projector takes them."""
        in_rows = cast("Encoder", self.tower).output_fmt == "NHWC"
        return patches.unflatten(1, grid) if in_rows else patches

    def project(self, x: Tensor, grid: Size) -> Tensor:
        """Tokens of a language model (B, cells, C'), of all patches x (B, H*W, C) as they leave the last block."""
        return self._project(self._shaped(self._norm_tokens(x), grid), grid)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Patches of the full grid as timm's tower returns them: (B, H, W, C), of Gemma's (B, H*W, C)."""
        refuse_mask(self, attn_mask, is_causal)
        _, memory, reference = FILLS[self.recover]
        if self._pools_patches:
            memory = reference = False
        final, _ = self._forward_blocks(x, memory=memory, reference=reference)
        return self._finished(*final)

    def _class_scores(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """What timm's encoder returns: projected tokens (B, cells, C'), the mean of patches (B, C), or the patches."""
        if self._projects:
            self._check_cells(x)
            return self._project(self.forward_features(x, attn_mask, is_causal), self._grid_of(x))
        patches = self.forward_features(x, attn_mask, is_causal)
        return patches.mean(dim=tuple(range(1, patches.ndim - 1))) if self._pools_patches else patches

    def closed_form(self, size: Size, token_counts: Sequence[int] | None = None) -> Terms:
        """MACs of one image (H, W) by term; ``token_counts`` as for ``effvit.measure.closed_form``."""
        return tower_form(self, size, token_counts)

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Take note of the size that images have by default; a tower takes others as well.

        Raises:
            ValueError: Another patch size, a size that patches or cells of the projector cannot be cut from, or one on
                whose grid the settings leave no token.
        """
        patch = self.patch_embed.patch_size
        if patch_size is not None and to_2tuple(patch_size) != tuple(patch):
            raise ValueError(
                f"a tower has a fixed patch size of {patch[0]} x {patch[1]}, got {patch_size}; leave it out"
            )
        size: Size = to_2tuple(img_size or self.patch_embed.img_size)
        self._check_patches(size)
        grid = self.patch_embed.dynamic_feat_size(size)
        self._check_grid(grid)
        check_counts(self, grid)
        cast("Resizable", self.patch_embed).set_input_size(img_size=size)
        for reducer in self.reducers.values():
            reducer.resize(grid)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> NoReturn:
        """Raise a TypeError: an encoder has no classifier."""
        raise TypeError(
            f"a {type(self).__bases__[-1].__name__} has no classifier; create the model without '_enc' in its name"
        )


class TowerClassifier(ReducedTower):
    """A classifier of timm around a tower, which it holds as ``encoder``."""

    encoder: nn.Module

    @property
    def tower(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    @property
    def blocks(self) -> BlockList:  # type: ignore[override]
        """The blocks of the encoder."""
        return cast("Encoder", self.encoder).blocks

    @property
    def patch_embed(self) -> PatchEmbedding:  # type: ignore[override]
        """The patch embedding of the encoder."""
        return cast("Encoder", self.encoder).patch_embed

    @property
    def grad_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether the encoder recomputes its blocks for gradients."""
        return cast("Encoder", self.encoder).grad_checkpointing

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """What timm's ``forward_head`` takes: patches of the full grid, or projected tokens (B, cells, C')."""
        self._check_cells(x)
        features = super().forward_features(x, attn_mask, is_causal)
        return self._project(features, self._grid_of(x)) if self._projects else features

    def _class_scores(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def _intermediates(self, x: Tensor, take: Sequence[int], num_blocks: int | None) -> BlockFeatures:
        if num_blocks is None:
            self._check_cells(x)
        features = super()._intermediates(x, take, num_blocks)
        if not self._projects:
            return features

        def final() -> Tensor:
            self._check_grid(features.grid)
            return self._project(features.final(), features.grid)

        return features._replace(final=final)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:  # type: ignore[override]
        """timm's new classifier, and pooling if one is given."""
        super(ReducedHost, self).reset_classifier(num_classes, global_pool)  # type: ignore[misc]


class QwenTower(ReducedTower):
    """Qwen's towers: a learned grid and RoPE, no norm behind the blocks, a merger of 2 x 2 patches."""

    @property
    def _merger(self) -> Merger | None:
        return cast("QwenEncoder", self.tower).merger

    @property
    def _projects(self) -> bool:
        return self._merger is not None

    @property
    def merge(self) -> int:
        return 1 if self._merger is None else self._merger.merge_size

    def _project(self, x: Tensor, grid: Size) -> Tensor:
        assert self._merger is not None
        return self._merger(x)


class DeepseekTower(ReducedTower):
    """DeepSeek's tower: RMSNorm, SwiGLU, RoPE alone, an aligner of 3 x 3 patches that pads the grid with zeros."""

    remedy = " or create the model with dynamic_img_pad=True"
    fills_cells = True

    @property
    def _aligner(self) -> Aligner | None:
        return cast("DeepseekEncoder", self.tower).aligner

    def _norm_tokens(self, x: Tensor) -> Tensor:
        return cast("DeepseekEncoder", self.tower).norm(x)

    @property
    def _projects(self) -> bool:
        return self._aligner is not None

    @property
    def merge(self) -> int:
        return 1 if self._aligner is None else self._aligner.downsample_ratio

    def _project(self, x: Tensor, grid: Size) -> Tensor:
        assert self._aligner is not None
        return self._aligner(x)


class SizedPatchEmbed(Gemma4PatchEmbed):
    """timm's ``Gemma4PatchEmbed`` with the size that images have by default, which timm's own does not keep."""

    img_size: Size
    patch_size: Size
    dynamic_img_pad = False

    @property
    def grid_size(self) -> Size:
        """(H, W) patches of an image of the default size."""
        return self.dynamic_feat_size(self.img_size)

    @property
    def num_patches(self) -> int:
        """How many they are."""
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """(H, W) patch grid of images of another size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def set_input_size(self, img_size: Size) -> None:
        """Take note of another default size."""
        self.img_size = img_size


class GemmaTower(ReducedTower):
    """Gemma's towers: sandwich norms, RoPE of two axes, a mean over 3 x 3 patches by their coordinates."""

    @property
    def _gemma(self) -> GemmaEncoder:
        return cast("GemmaEncoder", self.tower)

    def _settle(self) -> None:
        super()._settle()
        embed = rehouse(self._gemma.patch_embed, SizedPatchEmbed)
        embed.img_size = self._default_size()
        self._gemma.patch_embed = embed

    def _default_size(self) -> Size:
        """The size that the model was created for, by its keywords or its configuration."""
        given: Mapping[str, int | Size] = self.__dict__.get("_model_args") or {}
        config: Mapping[str, Sequence[int]] = getattr(self, "pretrained_cfg", None) or {}
        size: Size = to_2tuple(given.get("img_size") or tuple(config.get("input_size", ())[-2:]) or DEFAULT_SIZE)
        return size

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, places, _ = self._gemma.patch_embed(x)
        cos, sin = self._gemma.rotary_emb(x, places[:1])  # (1, N, D) each: all images have the same grid
        return fix_traced_size(x, 1), torch.cat([sin, cos], dim=-1)[0]

    @property
    def _projects(self) -> bool:
        return self._gemma.global_pool == "soft"

    @property
    def merge(self) -> int:
        return self._gemma.pooler.pooling_kernel_size if self._projects else 1

    def _project(self, x: Tensor, grid: Size) -> Tensor:
        tower = self._gemma
        places, _ = tower.patch_embed._default_patch_coord(x.shape[0], *grid, x.device)  # (B, H*W, 2): rows, columns
        x, _ = tower.pooler(x, places.flip(-1), None)  # (B, cells, C)
        return x if tower.std_bias is None else (x - tower.std_bias) * tower.std_scale


# -- hosts -------------------------------------------------------------------------------------------------------


class ReducedQwen3Encoder(QwenTower, Qwen3VitEncoder):
    """timm's ``Qwen3VitEncoder`` with a reduction method."""


class ReducedQwen3Classifier(TowerClassifier, QwenTower, Qwen3VitClassifier):
    """timm's ``Qwen3VitClassifier`` with a reduction method."""


class ReducedDeepseekEncoder(DeepseekTower, DeepseekVitEncoder):
    """timm's ``DeepseekVitEncoder`` with a reduction method."""


class ReducedDeepseekClassifier(TowerClassifier, DeepseekTower, DeepseekVitClassifier):
    """timm's ``DeepseekVitClassifier`` with a reduction method."""


class ReducedGemma4Encoder(GemmaTower, Gemma4VitEncoder):
    """timm's ``Gemma4VitEncoder`` with a reduction method."""

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of any host; a dict has ``patch_valid`` too, as timm's: (B, H*W), True for the patches of images."""
        found = super().forward_intermediates(x, *args, **kwargs)
        if isinstance(found, dict):
            height, width = self._grid_of(x)
            found["patch_valid"] = torch.ones(x.shape[0], height * width, dtype=torch.bool, device=x.device)
        return found


class ReducedGemma4Classifier(TowerClassifier, GemmaTower, Gemma4VitClassifier):
    """timm's ``Gemma4VitClassifier`` with a reduction method."""

    _intermediates = ReducedTower._intermediates  # as timm's, whose final features are the patches in any case


TOWERS: dict[type[nn.Module], type[ReducedTower]] = {
    Qwen3VitEncoder: ReducedQwen3Encoder,
    Qwen3VitClassifier: ReducedQwen3Classifier,
    DeepseekVitEncoder: ReducedDeepseekEncoder,
    DeepseekVitClassifier: ReducedDeepseekClassifier,
    Gemma4VitEncoder: ReducedGemma4Encoder,
    Gemma4VitClassifier: ReducedGemma4Classifier,
}
HOST_CLASSES |= TOWERS
