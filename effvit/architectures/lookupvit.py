"""LookupViT (arXiv 2407.12753): heavy blocks on few compressed tokens that exchange with the full patch grid.

Two sets of tokens pass through the model: lookup tokens (B, N, C), one a patch, and compressed tokens (B, M, C) on
a coarser grid of M = m * m. Self-attention and the wide MLP run on the compressed tokens alone; a bidirectional
cross-attention gathers from the patches and infuses back into them, and the patches have a small MLP of their own.
Nothing is pruned, so the lookup tokens are the dense feature map. The largest attention map is M x N.

There is no official code, and no public weights. What follows is our reading of the method from its abstract, what we
recall of the paper, and implementations by others, which disagree; parameter names are ours. Where these leave a point
open, one option settles it, and checkpoints of different choices are not interchangeable:

==================== ========================================================================================
``antialias``        whether shrinking to the compressed grid widens the bilinear kernel; on, as JAX resizes
                     images by default, which we take the authors to have used
``infusion``         what takes the place of the transposed attention weights on the way back to the patches
``infuse_proj``      output projection of the infusion; on: a block then takes 3NMC + 2M^2 C + (4N + 15M) C^2
                     MACs, which is the paper's expression as far as we recall
``lookup_mlp_ratio`` width of the patches' MLP, 1/2, own weights in every block
``lookup_head``      second classifier, on the mean of the lookup tokens; trained beside the first, unused in eval
``compressed_grid``  m, any at any time (``set_compressed_grid``): the position table is resized to it
==================== ========================================================================================

Fixed here: pre-norm everywhere, no norm behind the tokenisation, the embedded map (not the pixels) is resized, every
block has its own cross-attention, each head keeps its own weights, the infusion reads the refined compressed tokens,
no class token, final norm before the mean. Initialisation is that of timm's plain ViT, for all parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt

import torch
from timm.layers import DropPath, LayerNorm, Mlp, get_device_dtype, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._input import update_model_args
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from effvit.architectures.base import SoftTokenViT
from effvit.hosts.checkpoints import official_state_dict
from effvit.hosts.closed_form import embedding
from effvit.hosts.stages import Stage, soft_stage
from effvit.hosts.surface import check_images, patch_grid, refuse_mask
from effvit.layers.bidirectional_attention import GatherAttention, InfuseAttention, ProjectionSettings
from effvit.layers.macs import Terms, attention, layers, norm, plain_block
from effvit.layers.resize import resize_map
from effvit.protocols import Device, Factory, Layer, PatchEmbedding, Setting, Size
from effvit.recording import refuse_legacy_onnx
from effvit.tokens import fix_traced_size, fx_leaf

__all__ = ["LookupBlock", "LookupLoss", "LookupViT"]

# What a plain ViT has too: the tokenisation of the patches, and the refinement of the compressed tokens.
SHARED = re.compile(r"patch_embed\.|pos_embed$|blocks\.\d+\.(norm1|attn|norm2|mlp)\.")
POOLS = ("avg", "max", "avgmax", "")
# timm's other arguments change the tokens or reach only one of the two sets.
TIMM_ARGS = {
    *("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
    *("dynamic_img_size", "dynamic_img_pad"),
    *("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
}


@fx_leaf
def positions_for(patches: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position table (1, N', C) of ``grid`` for patches (B, H, W, C), (1, H * W, C), resampled as timm does it."""
    return resample_abs_pos_embed(table, patches.shape[1:3], grid, num_prefix_tokens=0)


class LookupBlock(Block):
    """timm's ``Block`` on the compressed tokens, between a gather from the patches and an infusion into them.

    ``p = p + cross(norm_p(p), norm_l(l))``, ``p = p + attn(norm1(p))``, ``p = p + mlp(norm2(p))``,
    ``l = l + infuse(norm_c(p))``, ``l = l + mlp_lookup(norm3(l))``. Stochastic depth acts on each of the five.

    Args:
        dim: Channels.
        num_heads: Heads of all attentions.
        infusion: See ``exchange_weights``.
        infuse_proj: Whether the infusion has an output projection.
        lookup_mlp_ratio: Hidden channels of the patches' MLP over ``dim``.
        kwargs: Further arguments of timm's ``Block``. ``attn_drop`` acts on the gather, not on the way back.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        infusion: str = "transpose",
        infuse_proj: bool = True,
        lookup_mlp_ratio: float = 0.5,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        dd: Factory = {"device": device, "dtype": dtype}
        shared: ProjectionSettings = {"qkv_bias": qkv_bias, "proj_drop": proj_drop, **dd}
        layers: dict[str, Callable[..., nn.Module]] = {"act_layer": act_layer, "norm_layer": norm_layer}
        super().__init__(dim, num_heads, attn_drop=attn_drop, drop_path=drop_path, **layers, **shared, **kwargs)
        if int(dim * lookup_mlp_ratio) < 1:
            raise ValueError(
                f"lookup_mlp_ratio must leave the patches' MLP at least one of {dim} channels, got {lookup_mlp_ratio}"
            )
        self.norm_p, self.norm_l = norm_layer(dim, **dd), norm_layer(dim, **dd)
        self.cross = GatherAttention(dim, num_heads, infusion, attn_drop=attn_drop, **shared)
        self.norm_c = norm_layer(dim, **dd)
        self.infuse = InfuseAttention(dim, num_heads, infuse_proj, **shared)
        self.norm3 = norm_layer(dim, **dd)
        self.mlp_lookup = Mlp(dim, int(dim * lookup_mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def gather(self, compressed: Tensor, lookup: Tensor, infuse: bool = True) -> tuple[Tensor, Tensor | None]:
        """What (B, M, C) gathers from (B, N, C), and the weights (B, heads, M, N) for the infusion if it follows."""
        return self.cross(self.norm_p(compressed), self.norm_l(lookup), infuse)

    def forward(self, compressed: Tensor, lookup: Tensor, infuse: bool = True) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, M, C) and (B, N, C) -> the same; without ``infuse`` the patches' half is skipped: None."""
        gathered, weights = self.gather(compressed, lookup, infuse)  # (B, M, C), (B, heads, M, N)
        y: Tensor
        compressed = super().forward(compressed + self.drop_path(gathered))
        if weights is None:
            return compressed, None
        y = self.drop_path(self.infuse(self.norm_c(compressed), weights))  # (B, N, C)
        lookup = lookup + y
        y = self.drop_path(self.mlp_lookup(self.norm3(lookup)))
        return compressed, lookup + y


class LookupLoss(nn.Module):
    """One criterion on the class scores of both token sets: ``weights[0] * compressed + weights[1] * lookup``.

    Takes what a ``LookupViT`` returns: a pair in train mode, the compressed tokens' scores alone in eval mode or
    without a second head, to which the plain criterion is applied. No source we know of names the weight of
    the second loss; 1:1 is ours.

    Args:
        criterion: Called with scores (B, classes) and the target; cross-entropy if None.
        weights: Weights of the two losses.

    Raises:
        ValueError: A weight is negative.
    """

    def __init__(self, criterion: nn.Module | None = None, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        if len(weights) != 2 or min(weights) < 0:
            raise ValueError(f"weights must be two numbers of at least 0, for compressed and lookup, got {weights}")
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.weights = tuple(weights)

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self.criterion(outputs, target)
        losses = [w * self.criterion(scores, target) for w, scores in zip(self.weights, outputs, strict=True)]
        return losses[0] + losses[1]


class LookupViT(SoftTokenViT):
    """LookupViT: ``forward_features`` gives the compressed tokens (B, M, C), feature maps are the lookup tokens.

    In train mode ``forward`` returns the class scores of both heads, for ``LookupLoss``; in eval mode those of the
    compressed tokens. What these do not need, the last block's infusion and MLP of the patches, is then not run.

    One model serves all compressed grids. To train it so, draw one for each step (all ranks the same, or their steps
    take different times)::

        loss_fn = LookupLoss()
        for step, (images, target) in enumerate(loader):
            model.set_compressed_grid(random.Random(step).choice((3, 5, 7, 10)))
            loss_fn(model(images), target).backward()

    Args:
        img_size: Image side, or (H, W).
        compressed_grid: m, or (rows, columns) of the compressed tokens.
        compressed_pos_grid: Grid of their stored position table, which is resized to ``compressed_grid``.
        infusion: "transpose", "transpose_normalized" or "softmax"; see ``exchange_weights``.
        infuse_proj: Output projection of the infusion.
        lookup_mlp_ratio: Hidden channels of the patches' MLP over ``embed_dim``.
        antialias: Antialiased bilinear resize to the compressed grid.
        lookup_head: Build the second classifier. Without it, for deployment, ``forward`` returns one tensor in either
            mode, and classification alone trains no parameter of the last block's patch half.
        global_pool: "avg", "max", "avgmax", or "" for none.
        kwargs: These arguments of timm's ``VisionTransformer``: patch_size, in_chans, num_classes, embed_dim, depth,
            num_heads, mlp_ratio, qkv_bias, dynamic_img_size, dynamic_img_pad, drop_rate, pos_drop_rate,
            proj_drop_rate, attn_drop_rate, drop_path_rate.

    Raises:
        ValueError: A grid below 1 x 1, an unknown infusion or pooling.
        TypeError: Another argument of timm's.
    """

    embed_dim: int
    num_classes: int
    grad_checkpointing: bool
    patch_embed: PatchEmbedding
    pos_drop: Layer
    head: nn.Module
    head_drop: Layer

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        compressed_grid: int | Sequence[int] = 5,
        compressed_pos_grid: int | Sequence[int] = 10,
        infusion: str = "transpose",
        infuse_proj: bool = True,
        lookup_mlp_ratio: float = 0.5,
        antialias: bool = True,
        lookup_head: bool = True,
        global_pool: str = "avg",
        weight_init: str = "",
        device: Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: Setting,
    ) -> None:
        foreign = sorted(kwargs.keys() - TIMM_ARGS)
        if foreign:
            raise TypeError(
                f"LookupViT takes no {', '.join(foreign)}, which would change the tokens or reach only one of its two "
                f"token sets; of timm's arguments it takes {', '.join(sorted(TIMM_ARGS))}"
            )
        super().__init__(
            img_size=img_size,
            global_pool=_check_pool(global_pool),
            class_token=False,
            fc_norm=False,  # norm, then mean
            block_fn=partial(
                LookupBlock, infusion=infusion, infuse_proj=infuse_proj, lookup_mlp_ratio=lookup_mlp_ratio
            ),
            weight_init="skip",
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.antialias = antialias
        self.compressed_grid = _check_grid("compressed_grid", compressed_grid)
        self.compressed_pos_grid = _check_grid("compressed_pos_grid", compressed_pos_grid)
        dd: Factory = {"device": device, "dtype": dtype}
        num_positions = self.compressed_pos_grid[0] * self.compressed_pos_grid[1]
        self.pos_embed_compressed = nn.Parameter(torch.empty(1, num_positions, self.embed_dim, **dd))
        self.norm_lookup = LayerNorm(self.embed_dim, **dd)
        self.head_lookup = self._new_head() if lookup_head else None
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity().train(self.training)
        return nn.Linear(self.embed_dim, self.num_classes, **get_device_dtype(self)).train(self.training)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation of a plain ViT, for both token sets."""
        trunc_normal_(self.pos_embed_compressed, std=0.02)
        super().init_weights(mode=mode or self.weight_init_mode, needs_reset=needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return super().no_weight_decay() | {"pos_embed_compressed"}

    def set_compressed_grid(self, compressed_grid: int | Sequence[int]) -> None:
        """Work on m x m compressed tokens from now on, or on a (rows, columns) grid; no weight changes."""
        self.compressed_grid = _check_grid("compressed_grid", compressed_grid)
        update_model_args(self, compressed_grid=self.compressed_grid)  # for a model that is saved and built again

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The classifiers of the compressed and of the lookup tokens; the first alone without ``lookup_head``."""
        return self.head if self.head_lookup is None else (self.head, self.head_lookup)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers, and the pooling if one is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.head = self._new_head()
        self.head_lookup = None if self.head_lookup is None else self._new_head()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what the maps of these blocks do not need; returns their numbers (timm's method).

        The maps are the lookup tokens, whose norm ``prune_norm`` cuts. That of the compressed tokens serves the
        classifier alone and goes with it.
        """
        if prune_norm:
            self.norm_lookup = nn.Identity()
        if prune_head:
            self.norm = nn.Identity()
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _tokenise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> compressed tokens (B, M, C) and lookup tokens (B, N, C), each with its positions."""
        patches: Tensor = self.patch_embed(x)  # (B, H, W, C) if dynamic_img_size, else (B, N, C)
        positions: Tensor = self.pos_embed
        if self.dynamic_img_size:
            positions = positions_for(patches, positions, self.patch_embed.grid_size)  # (1, N, C)
        else:
            patches = patches.unflatten(1, self.patch_embed.grid_size)  # (B, H, W, C)
        table = self.pos_embed_compressed.unflatten(1, self.compressed_pos_grid)  # (1, rows, columns, C)
        compressed = resize_map(patches, self.compressed_grid, self.antialias)  # (B, M, C)
        compressed = compressed + resize_map(table, self.compressed_grid, self.antialias)
        return self.pos_drop(compressed), self.pos_drop(patches.flatten(1, 2) + positions)

    def _run(
        self, x: Tensor, take: Sequence[int] = (), num_blocks: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        refuse_legacy_onnx("a LookupViT")
        compressed, lookup = self._tokenise(x)
        blocks = self.blocks[:num_blocks]
        taken = []
        for i, block in enumerate(blocks):
            infuse = i < len(blocks) - 1 or i in take  # nothing reads the patches that leave the last block
            if self.grad_checkpointing and not torch.jit.is_scripting():
                compressed, lookup = checkpoint(block, compressed, lookup, infuse)
            else:
                compressed, lookup = block(compressed, lookup, infuse)
            if i in take:
                taken.append((lookup, lookup[:, :0]))
        return compressed, taken

    def _norm_patches(self, x: Tensor) -> Tensor:
        return self.norm_lookup(x)

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores of the compressed and of the lookup tokens, both (B, num_classes), in either mode.

        Raises:
            ValueError: The model was built without ``lookup_head``.
        """
        if self.head_lookup is None:
            raise ValueError("this LookupViT has no classifier of its lookup tokens; create it with lookup_head=True")
        check_images(x, self)
        x = fix_traced_size(x, 2, 3)
        compressed, [(lookup, _)] = self._run(x, take=(len(self.blocks) - 1,))
        pooled = self.head_drop(self.pool(self.norm_lookup(lookup)))
        return self.forward_head(self.norm(compressed)), self.head_lookup(pooled)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Class scores (B, num_classes) of the compressed tokens; in train mode of both sets, as ``forward_heads``."""
        if self.training and self.head_lookup is not None:
            refuse_mask(self, attn_mask, is_causal)
            return self.forward_heads(x)
        return super().forward(x, attn_mask, is_causal)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: M compressed tokens gather from N patches and infuse into them."""
        terms, grid = embedding(self.patch_embed, size)
        patches, dim = grid[0] * grid[1], self.embed_dim
        rows, columns = self.compressed_grid
        compressed = rows * columns
        for height, width in (grid, self.compressed_pos_grid):  # a resize is a product by rows, then one by columns
            terms["embedding"] += rows * width * dim * (height + columns)
        blocks: Sequence[LookupBlock] = self.blocks
        for i, block in enumerate(blocks):
            cross = block.cross
            terms += norm(block.norm_p, compressed) + norm(block.norm_l, patches) + attention(compressed * patches, dim)
            for layer, tokens in (
                (cross.q, compressed),
                (cross.k, patches),
                (cross.v, patches),
                (cross.proj, compressed),
            ):
                terms += layers("projection", layer, tokens)
            terms += plain_block(block, compressed)
            if i < len(self.blocks) - 1:  # nothing reads the patches of the last block
                terms += norm(block.norm_c, compressed) + layers("projection", block.infuse.v, compressed)
                terms["attention"] += compressed * patches * dim
                terms += layers("projection", block.infuse.proj, patches)
                terms += norm(block.norm3, patches) + layers("mlp", block.mlp_lookup, patches)
        return terms + norm(self.norm, compressed) + layers("head", self.head, 1)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """Shares of each block's compressed tokens in the patches of an image (1, 3, H, W); for eval mode."""
        check_images(x, self)
        grid = patch_grid(x, self)
        compressed, lookup = self._tokenise(x)
        stages = []
        blocks: Sequence[LookupBlock] = self.blocks
        for i, block in enumerate(blocks):
            shares = block.gather(compressed, lookup)[1]  # (B, heads, M, N)
            assert shares is not None
            weights = shares[0].double().mean(0).T  # (N, M)
            weights = weights + torch.finfo(weights.dtype).tiny  # float32 weights of a patch may all have underflown
            stages.append(soft_stage(i, weights / weights.sum(-1, keepdim=True), grid))
            if i < len(self.blocks) - 1:
                compressed, lookup = block(compressed, lookup)
        return stages

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Weights for this model from those of a LookupViT of another size, and the names of what has no place.

        The patches' position table is resampled as timm does it, that of the compressed tokens by the resize that
        the model applies to it anyway. A second classifier is dropped for a model without one.

        Raises:
            ValueError: A table of another length that is not of a square grid.
        """
        dropped = [name for name in state if self.head_lookup is None and name.startswith("head_lookup.")]
        own = {name: value for name, value in state.items() if name not in dropped}
        grid = self.patch_embed.grid_size
        table = own.get("pos_embed")
        if table is not None and table.shape[1] != grid[0] * grid[1]:
            own["pos_embed"] = resample_abs_pos_embed(table, grid, _square("pos_embed", table), num_prefix_tokens=0)
        table = own.get("pos_embed_compressed")
        if table is not None and table.shape[1] != self.pos_embed_compressed.shape[1]:
            grid_map = table.unflatten(1, _square("pos_embed_compressed", table))  # (1, rows, columns, C)
            own["pos_embed_compressed"] = resize_map(grid_map, self.compressed_pos_grid, self.antialias)
        return own, dropped

    def start_from_vit(self, weights: Mapping[str, object]) -> list[str]:
        """Take what a plain ViT or DeiT shares with this model: patch embedding, positions, refinement, norm, head.

        The exchange, the patches' MLP and the compressed positions are new, so the model must be trained before it
        is of use. Class, distillation and register tokens go, and their positions. A head of other classes is new.

        Args:
            weights: Those of the ViT under timm's names, as a state_dict or a loaded file that contains one.

        Returns:
            Names of the parameters that keep their initialisation.

        Raises:
            ValueError: The checkpoint lacks a shared parameter, has it in another shape, or has more in its blocks.
        """
        state, _ = official_state_dict(weights)
        prefix = sum(state.pop(name).shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state)
        table = state.get("pos_embed")
        if table is not None and table.shape[1] != self.patch_embed.num_patches:
            num_positions = table.shape[1]
            if num_positions - prefix == self.patch_embed.num_patches or isqrt(num_positions) ** 2 != num_positions:
                state["pos_embed"] = table[:, prefix:]  # the table has the prefix tokens too
        state, _ = self.adapt_state_dict(state)
        own = self.state_dict()
        taken = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
        shared = {name for name in own if SHARED.match(name)}
        faults = sorted(shared - taken.keys()) + sorted(n for n in state if n.startswith("blocks.") and n not in own)
        if faults:
            raise ValueError(
                f"{len(faults)} parameters do not fit between the checkpoint and this LookupViT, first "
                f"{', '.join(faults[:4])}; start from a plain ViT of the same depth, width and patch size"
            )
        self.load_state_dict(taken, strict=False)
        return [name for name in own if name not in taken]


def _check_grid(name: str, grid: int | Sequence[int]) -> tuple[int, int]:
    sides = to_2tuple(grid)
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise ValueError(f"{name} must be a number of tokens a side, or (rows, columns), of at least 1; got {grid}")
    return sides[0], sides[1]


def _check_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}: LookupViT has no class "
            "token and no attention pooling"
        )
    return global_pool


def _square(name: str, table: Tensor) -> tuple[int, int]:
    """Grid of a position table (1, N, C), which must be square."""
    side = isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(
            f"{name} has {table.shape[1]} positions, which is neither the model's number nor a square grid; create "
            "the model for the size the checkpoint was saved at, load it, then call set_input_size"
        )
    return side, side
