"""SiT (Self-slimmed Vision Transformer, arXiv 2111.12624): LV-ViT whose patch tokens are mixed into ever fewer ones.

Between two stages a token slimming module (the paper's TSM) forms K new tokens, each a learned convex combination of
all N old ones; the class token passes by. For training, reverse modules (RTSM) rebuild all N tokens after every block,
so that each can be compared with those of the dense teacher (``sit_distillation.py``).

Source: models/lvvit.py of Sense-X/SiT@f577808, the LV-ViT flavour, the only one released. Its dense teachers are the
same class without ``stage_blocks``. Deviations:

- Attention stays in the dtype of its input; officially it runs in float32, which fails for other weights.
- Tokens of every block are collected only when asked for.
- ``aux_head``, which the official model holds frozen and never calls, is left out.
- A model takes other input sizes than its own and slims them to the same numbers of tokens. Nothing is published for
  this; relative to N, the slimmed stages become cheaper as images grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from timm.layers import ConvNormAct, PatchEmbed, get_device_dtype, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint, named_apply
from timm.models._input import update_model_args
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from effvit.architectures.base import SoftTokenViT
from effvit.architectures.token_slimming import ReverseTokenSlimming, TokenSlimming, unpooling
from effvit.block import set_child
from effvit.hosts._names import Rules, renamed
from effvit.hosts.closed_form import classifier, embedding
from effvit.hosts.lvvit import DampedBlock, FixedPatchEmbed
from effvit.hosts.stages import Stage, soft_stage
from effvit.hosts.surface import check_images, patch_grid
from effvit.layers.macs import Terms, layers, plain_block
from effvit.protocols import Device, Factory, Size
from effvit.schedule import check_choice, check_count, check_fraction
from effvit.tokens import fix_traced_size, wide_product

__all__ = ["LayerTokens", "SiT"]

# Convolutions of a stem as (embed_dim over width, stride); "patch" is timm's single one.
STEMS: dict[str, tuple[tuple[int, int], ...]] = {
    "4c": ((8, 2), (4, 2), (2, 2), (1, 2)),
    "6c": ((8, 2), (8, 1), (8, 1), (4, 2), (2, 2), (1, 2)),
    "patch": (),
}
# Official parameter names -> ours; ``rtsm`` is train-only.
RENAMED: Rules = (
    (r"^patch_embed\.(conv|bn)(\d+)\.", lambda m: f"patch_embed.proj.{int(m[2]) - 1}.{m[1]}."),
    (r"^tsm\.(\d+)\.weight\.0\.", r"slimming.\1.norm."),
    (r"^tsm\.(\d+)\.weight\.1\.", r"slimming.\1.mlp.fc1."),
    (r"^tsm\.(\d+)\.weight\.3\.", r"slimming.\1.mlp.fc2."),
    (r"^tsm\.(\d+)\.scale$", r"slimming.\1.scale"),
    (r"^rtsm\.(\d+)\.mlp1\.", r"reverse.\1.mlp_tokens."),
    (r"^rtsm\.(\d+)\.mlp2\.", r"reverse.\1.mlp_channels."),
    (r"^rtsm\.", "reverse."),
)


class Convolutions(nn.Sequential):
    """Convolutions with BatchNorm, of one image as right as of several.

    For a batch of one, an eval-mode BatchNorm whose output is transposed gets wrong gradients on a CPU (torch 2.11), in
    plain training and under ``vmap(grad(...))``. Those of a slice are contiguous and right, here of the whole map.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> map (B, C, H', W')."""
        x = super().forward(x)
        return x.narrow(2, 0, x.shape[2])


class ConvStem(FixedPatchEmbed):
    """Patch embedding by 3x3 convolutions with BatchNorm, GELU between them; ``layers`` is an entry of STEMS.

    Images of any size: each halving rounds up, so the grid is (ceil(H / 16), ceil(W / 16)).
    """

    def __init__(
        self,
        *args: object,
        layers: Sequence[tuple[int, int]],
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ):
        dd: Factory = {"device": device, "dtype": dtype}
        super().__init__(*args, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **dd, **kwargs)
        stride = prod(s for _, s in layers)
        if self.patch_size != (stride, stride):
            raise ValueError(f"a stem of {len(layers)} convolutions has a stride of {stride}, got {patch_size=}")
        widths = [in_chans, *(embed_dim // divisor for divisor, _ in layers)]
        self.proj = Convolutions(
            *(
                ConvNormAct(widths[i], widths[i + 1], 3, s, act_layer=nn.GELU, apply_act=i + 1 < len(layers), **dd)
                for i, (_, s) in enumerate(layers)
            )
        )

    def _init_img_size(self, img_size: int | Size | None) -> tuple[Size | None, Size | None, int | None]:
        sizes: tuple[Size | None, Size | None, int | None] = super()._init_img_size(img_size)
        if sizes[0] is None:
            return sizes
        grid = -(-sizes[0][0] // self.patch_size[0]), -(-sizes[0][1] // self.patch_size[1])
        return sizes[0], grid, grid[0] * grid[1]


def check_stages(stage_blocks: Sequence[int] | None, depth: int) -> list[int]:
    """Blocks of each stage, one stage of all of them for None; a ValueError unless they add up to ``depth``."""
    if stage_blocks is None:
        return [depth]
    stages = [check_count("a stage of stage_blocks", blocks, minimum=1) for blocks in stage_blocks]
    if sum(stages) != depth:
        raise ValueError(f"stage_blocks must add up to the depth of {depth} blocks, got {stages}")
    return stages


def count_tokens(num_patches: int, num_stages: int, keep_rate: float, num_tokens: Sequence[int] | None) -> list[int]:
    """Patch tokens of every stage after the first; a ValueError if a stage is left without any."""
    if num_tokens is None:
        rate = check_fraction("keep_rate", keep_rate)
        num_tokens = [int(num_patches * rate**i) for i in range(1, num_stages)]
        if 0 in num_tokens:
            raise ValueError(
                f"keep_rate {keep_rate} leaves no token of {num_patches} patches in stage {num_tokens.index(0) + 1}; "
                "raise it, use fewer stages or larger images, or give num_tokens"
            )
    if len(num_tokens) != num_stages - 1:
        raise ValueError(
            f"num_tokens must have one value for each stage after the first, got {list(num_tokens)} "
            f"for {num_stages} stages"
        )
    return [check_count("a value of num_tokens", k, minimum=1) for k in num_tokens]


def upward(way_up: Tensor | None, scores: Tensor) -> Tensor:
    """Weights (B, H*W, K) that give the patches back from tokens slimmed once more.

    Args:
        way_up: (B, H*W, N) the same for the tokens before; None for the patches themselves.
        scores: (B, N, K) as of ``TokenSlimming``.
    """
    step = unpooling(scores)
    return step if way_up is None else wide_product(way_up, step)


class LayerTokens(NamedTuple):
    """What distillation compares.

    Attributes:
        logits: Class scores (B, num_classes).
        tokens: Patch tokens after each block, not normalised.
    """

    logits: Tensor
    tokens: list[Tensor]


class SiT(SoftTokenViT):
    """LV-ViT that slims its patch tokens between stages.

    Dense maps of later blocks are un-pooled with the slimming weights (``unpooling``), without parameters.

    Args:
        stem: "4c" or "6c" for that many convolutions, "patch" for timm's patch embedding.
        stage_blocks: Blocks of each stage; the tokens are slimmed between two stages. None for the dense teacher.
        keep_rate: Stage i works on ``int(N * keep_rate**i)`` of the N patch tokens (official ``keeping_ratio``).
        num_tokens: Tokens of the stages after the first, instead of ``keep_rate``; they fix the shape of the
            slimming modules, so a model for another input size needs them to load the same weights.
        skip_lam: Divisor of both residual branches.
        reverse: Build the reverse modules, which only distillation uses (``forward_distill``).
        args, kwargs: As timm's VisionTransformer; ``patch_drop_rate`` is refused.

    Raises:
        ValueError: Stages that do not add up to the depth, a stage without tokens, and options that exclude each
            other.
    """

    embed_dim: int
    num_prefix_tokens: int
    grad_checkpointing: bool

    def __init__(
        self,
        *args: object,
        stem: str = "4c",
        stage_blocks: Sequence[int] | None = None,
        keep_rate: float = 0.5,
        num_tokens: Sequence[int] | None = None,
        skip_lam: float = 2.0,
        reverse: bool = False,
        norm_layer: Callable[..., nn.Module] | str | None = None,
        **kwargs: object,
    ):
        check_choice("stem", stem, STEMS)
        if kwargs.get("patch_drop_rate"):
            raise ValueError("SiT mixes all patch tokens into fewer and takes no patch_drop_rate; leave it at 0")
        super().__init__(
            *args,
            embed_layer=partial(ConvStem, layers=STEMS[stem]) if STEMS[stem] else PatchEmbed,
            block_fn=partial(DampedBlock, skip_lam=skip_lam),
            norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-5),
            **kwargs,
        )
        stages = check_stages(stage_blocks, len(self.blocks))
        self.num_tokens = count_tokens(self.patch_embed.num_patches, len(stages), keep_rate, num_tokens)
        self.slim_before = {block: stage for stage, block in enumerate(accumulate(stages[:-1]))}
        dd: Factory = get_device_dtype(self)
        self.slimming = nn.ModuleList(TokenSlimming(self.embed_dim, k, **dd) for k in self.num_tokens)
        self.reverse = nn.ModuleList(self._reverse_modules(dd)) if reverse else None
        self.distilled_training = False
        init = get_init_weights_vit(self.weight_init_mode, needs_reset=False)
        for added in (self.slimming, self.reverse):
            if added is not None:
                named_apply(init, added)

    def _reverse_modules(self, dd: Factory) -> list[nn.Module]:
        """One module for each block, without parameters while it holds all patch tokens."""
        if not self.slimming or self.dynamic_img_size:
            what = "a model with dynamic_img_size=True" if self.slimming else "a dense model (stage_blocks=None)"
            raise ValueError(f"reverse modules rebuild a fixed number of slimmed tokens, but this is {what}")
        num_patches = current = self.patch_embed.num_patches
        modules: list[nn.Module] = []
        for i in range(len(self.blocks)):
            if i + 1 in self.slim_before:
                current = self.num_tokens[self.slim_before[i + 1]]
            if current == num_patches:
                modules.append(nn.Identity())
            else:
                modules.append(ReverseTokenSlimming(self.embed_dim, current, num_patches, **dd))
        return modules

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As timm, with the class token drawn like the position embedding (official)."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def _embed(self, x: Tensor) -> Tensor:
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def _slim(self, block: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, P+N, C) as the block takes them, and the scores (B, N, K) if they were slimmed for it."""
        if block not in self.slim_before:
            return x, None
        tokens, scores = self.slimming[self.slim_before[block]](x[:, self.num_prefix_tokens :])
        return torch.cat([x[:, : self.num_prefix_tokens], tokens], dim=1), scores  # (B, P+K, C)

    def _apply_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x) if self.grad_checkpointing else block(x)

    def _run(
        self, x: Tensor, take: Sequence[int] = (), num_blocks: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self._embed(x)
        way_up = None  # (B, H*W, K) from the current tokens to the patches
        taken = []
        for i, block in enumerate(self.blocks[:num_blocks]):
            x, scores = self._slim(i, x)
            if scores is not None and any(j >= i for j in take):
                way_up = upward(way_up, scores)
            x = self._apply_block(block, x)
            if i in take:
                prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
                taken.append((tokens if way_up is None else way_up.to(x.dtype) @ tokens, prefix))
        return x, taken

    def forward_layers(self, x: Tensor) -> LayerTokens:
        """Class scores of images (B, 3, H, W) and the patch tokens (B, K_i, C) after each block and its slimming."""
        check_images(x, self)
        x = fix_traced_size(x, 2, 3)
        x = self._embed(x)
        tokens = []
        for i, block in enumerate(self.blocks):
            x, _ = self._slim(i + 1, self._apply_block(block, x))
            tokens.append(x[:, self.num_prefix_tokens :])
        return LayerTokens(self.forward_head(self._finish(x)), tokens)

    def rebuild(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Tokens of ``forward_layers`` -> (B, N, C) each, by the reverse modules; those of a dense model as they are.

        Raises:
            ValueError: Slimmed tokens, but a model without reverse modules.
        """
        if self.reverse is not None:
            return [module(x) for module, x in zip(self.reverse, tokens, strict=True)]
        if self.slimming:
            raise ValueError("this SiT has no reverse modules to rebuild tokens with; create it with reverse=True")
        return list(tokens)

    def forward_distill(self, x: Tensor) -> LayerTokens:
        """``forward_layers`` with all N patch tokens after every block: what student and teacher are compared by."""
        out = self.forward_layers(x)
        return LayerTokens(out.logits, self.rebuild(out.tokens))  # dynamo knows no _replace

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let ``forward`` return ``forward_distill`` in train mode (timm's name for it)."""
        self.distilled_training = enable

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | LayerTokens:
        """Class scores (B, num_classes) of images (B, 3, H, W); see ``set_distilled_training``."""
        if self.distilled_training and self.training:
            return self.forward_distill(x)
        return super().forward(x, attn_mask, is_causal)

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Change the input size; the slimmed stages keep their numbers of tokens.

        Raises:
            ValueError: A model with reverse modules, which rebuild one number of patches, would get another.
        """
        num_patches = self.patch_embed._init_img_size(img_size or self.patch_embed.img_size)[2]
        if self.reverse is not None and (patch_size is not None or num_patches != self.patch_embed.num_patches):
            raise ValueError(
                f"the reverse modules rebuild {self.patch_embed.num_patches} patches, so the input size is fixed; "
                "create the model with reverse=False, or with the wanted img_size"
            )
        super().set_input_size(img_size, patch_size)
        if self.slimming:  # or a model saved now would be built again with counts for the new size
            update_model_args(self, num_tokens=self.num_tokens)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm, and cut the slimming modules behind the last block too."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.slim_before = {block: stage for block, stage in self.slim_before.items() if block < len(self.blocks)}
        self.slimming = self.slimming[: len(self.slim_before)]
        set_child(self, "reverse", None)
        return take

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As timm; a slimming module belongs to the block it feeds, a reverse module to the block it follows."""
        groups: dict[str, Any] = super().group_matcher(coarse)
        slimming = [(rf"^slimming\.{stage}\.", (block,)) for block, stage in self.slim_before.items()]
        groups["blocks"] = [*groups["blocks"], *slimming, (r"^reverse\.(\d+)", None)]
        return groups

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: between stages, N tokens are mixed into K."""
        terms, grid = embedding(self.patch_embed, size)
        left, prefix = grid[0] * grid[1], self.num_prefix_tokens
        for i, block in enumerate(self.blocks):
            if i in self.slim_before:
                stage = self.slim_before[i]
                terms += layers("reduction", self.slimming[stage], left)
                terms["reduction"] += left * self.num_tokens[stage] * self.embed_dim
                left = self.num_tokens[stage]
            terms += plain_block(block, prefix + left)
        return terms + classifier(self, left, left)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """Shares of each stage's slimmed tokens in the patches of an image (1, 3, H, W); for eval mode."""
        check_images(x, self)
        grid = patch_grid(x, self)
        x = self._embed(x)  # (B, P+N, C)
        stages, way_up = [], None
        for i, block in enumerate(self.blocks):
            x, scores = self._slim(i, x)
            if scores is not None:
                way_up = upward(way_up, scores)
                stages.append(soft_stage(i, way_up[0], grid))
            x = self._apply_block(block, x)
        return stages

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Official or own weights under our names, and the names of those that only serve training.

        Raises:
            ValueError: A checkpoint that slims to other numbers of tokens, or whose position embedding is not square.
        """
        adapted, dropped = {}, []
        for official, value in state.items():
            name = renamed(official, RENAMED)
            if name.startswith("aux_head.") or (name.startswith("reverse.") and self.reverse is None):
                dropped.append(official)
            else:
                adapted[name] = value
        self._check_counts(adapted)
        if self.pos_embed is not None and "pos_embed" in adapted:
            adapted["pos_embed"] = self._resized_positions(adapted["pos_embed"])
        return adapted, dropped

    def _check_counts(self, state: dict[str, Tensor]) -> None:
        names = [f"slimming.{i}.mlp.fc2.bias" for i in range(len(self.num_tokens))]
        counts = [len(state[name]) for name in names if name in state]
        if counts and counts != self.num_tokens:
            raise ValueError(
                f"the checkpoint slims to {counts} tokens, this model to {self.num_tokens}; create the model with "
                f"num_tokens={counts}, or at the checkpoint's input size and call set_input_size after loading"
            )

    def _resized_positions(self, table: Tensor) -> Tensor:
        if table.shape == self.pos_embed.shape:
            return table
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        number = table.shape[1] - prefix
        if isqrt(number) ** 2 != number:
            raise ValueError(
                f"the position embedding of the checkpoint has {number} positions, which is no square grid to resize "
                "from; create the model at the checkpoint's input size and call set_input_size after loading"
            )
        return resample_abs_pos_embed(table, new_size=self.patch_embed.grid_size, num_prefix_tokens=prefix)
