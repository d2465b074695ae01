"""STViT on DeiT (arXiv 2303.08685): a plain ViT whose later layers run on a few semantic tokens.

"STViT" and "SViT" each name more than one paper; this is the one of semantic tokens ("Making Vision Transformers
Efficient from A Token Sparsification View", CVPR 2023).

The authors released no source and no weights of STViT on DeiT. What is built here is the paper's layout (supplement
A.1: 4 base layers, 2 of the semantic token generation module and 6 on 4 x 4 semantic tokens, no class token) with the
block of the released STViT-R. It has the paper's cost: 1.91 GMACs for DeiT-S, 1.56 and 3.30 with 3 and 8 base layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm, get_norm_layer, to_2tuple
from timm.models import checkpoint
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn

from effvit.architectures.base import SoftTokenViT
from effvit.architectures.semantic_tokens import SeedBlock, SemanticBlock, check_seed_grid, seed_terms
from effvit.block import set_child
from effvit.hosts.closed_form import classifier, embedding
from effvit.hosts.stages import Stage, soft_stage
from effvit.hosts.surface import check_images, patch_grid, refuse_open_sizes
from effvit.layers.cross_attention import SharedSettings
from effvit.layers.macs import Terms, cross_block, plain_block
from effvit.protocols import Device, PatchEmbedding, Settings, Size
from effvit.recording import refuse_legacy_onnx
from effvit.recover import TokenRecovery
from effvit.schedule import check_count, check_switch

__all__ = ["STViT"]

# Arguments timm gives to every block that CrossBlock has too.
BLOCK_ARGS = (
    *("dim", "num_heads", "mlp_ratio", "qkv_bias", "init_values", "proj_drop", "attn_drop", "drop_path"),
    *("norm_layer", "device", "dtype"),
)
# What a DeiT has and a model without class token has not.
CLASS_TOKEN_PARTS = ("cls_token", "dist_token", "head_dist.weight", "head_dist.bias")


def check_layers(depth: int, num_base: int, num_stgm: int, use_global: bool) -> None:
    """Raise an error that names the setting unless the layers fit into ``depth`` and G has a layer to enter."""
    check_count("num_base", num_base)
    check_count("num_stgm", num_stgm, minimum=1)
    if num_base + num_stgm > depth:
        raise ValueError(
            f"{num_base} base and {num_stgm} STGM layers do not fit into a depth of {depth}; "
            "lower num_base or num_stgm, or raise depth"
        )
    if use_global and num_stgm == 1:
        raise ValueError(
            "the global centres enter in the second STGM layer, but num_stgm is 1; use num_stgm=2 or use_global=False"
        )


class LayerMaker(NamedTuple):
    """Makes the layers of an STViT, as timm's ``block_fn``.

    Attributes:
        num_base: Layers in front of the STGM.
        num_stgm: Layers of the STGM.
        grid: (h, w) semantic tokens.
        seed_pool: Pooling of the seeds.
        use_global: Whether the second layer of the STGM has global centres.
    """

    num_base: int
    num_stgm: int
    grid: Size
    seed_pool: str
    use_global: bool

    def __call__(self, depth: int, **kwargs: Any) -> nn.Module:
        """Layer number ``depth``, made with the arguments timm gives to every block."""
        layer = depth - self.num_base
        if not 0 <= layer < self.num_stgm:
            return Block(depth=depth, **kwargs)
        args = {name: kwargs[name] for name in BLOCK_ARGS}
        if layer == 0:
            return SeedBlock(out=self.grid, seed_pool=self.seed_pool, **args)
        centres = self.grid[0] * self.grid[1] if self.use_global and layer == 1 else 0
        return SemanticBlock(num_centres=centres, **args)


class STViT(SoftTokenViT):
    """A DeiT with semantic tokens: base layers on all patches, the STGM, then layers on the semantic tokens only.

    ``blocks`` numbers all layers as DeiT does. Base and semantic layers are timm's ``Block``. The classifier reads the
    mean of the normalised semantic tokens.

    A semantic token has no place in the image. Where maps of the STGM or a later layer are asked for
    (``forward_intermediates``, ``features_only``), each patch gets the mean of the semantic tokens weighted by the
    attention that they paid to it when they were made (``soft_assignment``; ours, no parameters); nothing of it is
    computed otherwise. With ``recovery=True`` the trained recovery of STViT-R does it instead.

    To start from a DeiT, leave LayerScale out, which DeiT does not have, and load what there is::

        model = timm.create_model("stvit_deit_small_patch16_224", init_values=0)
        model.load_state_dict(model.adapt_state_dict(deit.state_dict())[0], strict=False)  # all but the centres G

    Args:
        img_size: Image size, int or (H, W).
        patch_size: Patch size.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: timm's pooling of the final tokens: "avg", "avgmax", "max", or "" for none.
        embed_dim: Channels.
        depth: All layers.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLPs over ``embed_dim``.
        qkv_bias: Biases of the projections.
        init_values: Initial LayerScale, 1e-5 as released; 0 or None for none (``timm.create_model`` drops a None).
        num_base: Layers on all patches.
        num_stgm: Layers of the STGM behind them, at least 1; from the second on S and X are the keys.
        semantic_grid: (h, w) semantic tokens, or an int for both; at most the patch grid.
        seed_pool: "max", adaptive max pooling as in the released code, or "learned" as the paper describes.
        use_global: Add learned global cluster centres G to the queries of the second STGM layer (and no other, as
            in the released code).
        recovery: Give the image tokens back by attention to the semantic tokens, as STViT-R does at the end of a
            dumbbell unit: ``X' = MHA(X, S) + X`` and an MLP, with weights of its own. The final features, which the
            classifier averages, and the maps are then recovered tokens (B, H*W, C).
        drop_rate: Dropout in front of the classifier.
        pos_drop_rate: Dropout of the embedded tokens.
        proj_drop_rate: Dropout in the projections and MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last layer, rising linearly from 0.
        weight_init: timm's scheme.
        norm_layer: Norm; LayerNorm with eps 1e-6 if None.
        dynamic_img_size: Take images of any multiple of the patch size, with resampled position embeddings.
        dynamic_img_pad: Pad images to a multiple of the patch size.

    Raises:
        TypeError, ValueError: A setting out of range, named with its value.
    """

    num_prefix_tokens: int
    grad_checkpointing: bool
    patch_embed: PatchEmbedding

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 1e-5,
        *,
        num_base: int = 4,
        num_stgm: int = 2,
        semantic_grid: int | tuple[int, int] = 4,
        seed_pool: str = "max",
        use_global: bool = True,
        recovery: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        norm_layer: Callable[..., nn.Module] | str | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_switch("recovery", recovery)
        check_layers(depth, num_base, num_stgm, check_switch("use_global", use_global))
        height, width = to_2tuple(semantic_grid)
        grid = check_count("semantic_grid", height, 1), check_count("semantic_grid", width, 1)
        shared: SharedSettings = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "init_values": init_values}
        shared |= {"norm_layer": get_norm_layer(norm_layer) or LayerNorm, "device": device, "dtype": dtype}
        images: Settings = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans}
        images |= {"dynamic_img_size": dynamic_img_size, "dynamic_img_pad": dynamic_img_pad}
        dropout: Settings = {"drop_rate": drop_rate, "pos_drop_rate": pos_drop_rate, "drop_path_rate": drop_path_rate}
        dropout |= {"proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate}
        form: Settings = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        head: Settings = {"num_classes": num_classes, "global_pool": global_pool}
        super().__init__(
            class_token=False,
            fc_norm=False,
            weight_init=weight_init,
            block_fn=LayerMaker(num_base, num_stgm, grid, seed_pool, use_global),
            **(images | form | head | dropout),
            **shared,
        )
        self.num_base, self.num_stgm, self.semantic_grid = num_base, num_stgm, grid
        check_seed_grid(self.patch_embed.grid_size, grid)
        self.recovery: TokenRecovery | None = None
        if recovery:
            shared |= {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate}
            self.recovery = TokenRecovery(embed_dim, num_heads, drop_path=drop_path_rate, **shared)
            if weight_init != "skip":
                self.init_weights(needs_reset=False)

    def _run(
        self,
        x: Tensor,
        take: Sequence[int] = (),
        num_blocks: int | None = None,
        assignments: dict[int, Tensor] | None = None,
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """As the base class says; ``assignments`` takes {block: (B, H*W, Ns)} of all layers of the STGM."""
        refuse_legacy_onnx("an STViT")
        refuse_open_sizes(x, self, extractors=False)
        grid = patch_grid(x, self)
        x = self._pos_embed(self.patch_embed(x))  # (B, H*W, C)
        s = assignment = None
        first, last = self.num_base, self.num_base + self.num_stgm - 1
        blocks, taken = self.blocks[:num_blocks], []
        for i, block in enumerate(blocks):
            # Only the assignments that a map needs: a layer's own, and the last layer's for all behind it.
            assign = assignments is not None or (
                self.recovery is None and (i in take or (i == last and any(t > last for t in take)))
            )
            if i < first:
                x = self._call(block, x)
            elif i == first:
                s, assignment = self._call(block, x, grid, assign)  # (B, Ns, C), (B, H*W, Ns)
            elif i <= last:
                s, assignment = self._call(block, s, x, assign)
            else:
                s = self._call(block, s)
            if assignments is not None and assignment is not None and i <= last:
                assignments[i] = assignment
            if i in take:
                taken.append((self._to_patches(x, s, assignment), x[:, :0]))
        recovered = taken[-1][0] if self.recovery is not None and len(blocks) - 1 in take else None
        return (x, s, recovered), taken

    def _call(self, block: nn.Module, *args: object) -> Any:
        return checkpoint(block, *args) if self.grad_checkpointing else block(*args)

    def _to_patches(self, x: Tensor, s: Tensor | None, assignment: Tensor | None) -> Tensor:
        """Features of all patches (B, H*W, C): x itself before there are semantic tokens s (B, Ns, C)."""
        if s is None:
            return x
        if self.recovery is not None:
            recovered: Tensor = self._call(self.recovery, x, s)
            return recovered
        assert assignment is not None
        return assignment.to(s.dtype) @ s

    def _finish(self, state: Any) -> Tensor:
        x, s, recovered = state
        if s is None or self.recovery is None:
            return self.norm(x if s is None else s)
        return self.norm(self._call(self.recovery, x, s) if recovered is None else recovered)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut the layers that the maps of these blocks do not need; returns their numbers (timm's method)."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.blocks) <= self.num_base:
            set_child(self, "recovery", None)
        return take

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Build the model for another image or patch size; the semantic tokens stay as many (timm's method)."""
        size = to_2tuple(img_size or self.patch_embed.img_size)
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        check_seed_grid((size[0] // patch[0], size[1] // patch[1]), self.semantic_grid)
        super().set_input_size(img_size, patch_size)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: semantic tokens generated from all patches, then alone."""
        terms, (height, width) = embedding(self.patch_embed, size)
        patches, semantic = height * width, self.semantic_grid[0] * self.semantic_grid[1]
        for i, block in enumerate(self.blocks):
            layer = i - self.num_base
            if layer == 0:
                terms += seed_terms(block.pool, (height, width), block.out) + cross_block(block, semantic, patches)
            elif 0 < layer < self.num_stgm:
                terms += cross_block(block, semantic, semantic + patches, normed=2 * semantic + patches)
            else:
                terms += plain_block(block, patches if layer < 0 else semantic)
        if self.recovery is not None:
            terms += cross_block(self.recovery, patches, semantic)
        return terms + classifier(self, semantic if self.recovery is None else patches, patches)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """Shares of the semantic tokens of each STGM layer in the patches of an image (1, 3, H, W); for eval mode."""
        check_images(x, self)
        assignments: dict[int, Tensor] = {}
        self._run(x, assignments=assignments)
        grid = patch_grid(x, self)
        return [soft_stage(block, assignment[0], grid) for block, assignment in assignments.items()]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of our own file or of a DeiT under our names.

        A DeiT's class and distillation tokens are dropped, with their rows of the position table, and the ``qkv`` of
        the STGM layers is split into ``q`` and ``kv``. Patch and position embeddings of another size are resampled
        as timm does it. Nothing is filled in: a DeiT has no G, no recovery and, but for DeiT-III, no LayerScale.

        Returns:
            The weights, and the names of what was dropped.
        """
        dropped = [name for name in state if name in CLASS_TOKEN_PARTS]
        state = {name: value for name, value in state.items() if name not in CLASS_TOKEN_PARTS}
        if dropped and "pos_embed" in state:
            rows = state["pos_embed"].shape[1]
            state["pos_embed"] = state["pos_embed"][:, rows - math.isqrt(rows) ** 2 :]  # DeiT's grid is a square
        state = checkpoint_filter_fn(state, self, adapt_layer_scale=True)
        for i in range(self.num_base, self.num_base + self.num_stgm):
            for kind in ("weight", "bias"):
                qkv = state.pop(f"blocks.{i}.attn.qkv.{kind}", None)
                if qkv is not None:
                    q, kv = qkv.tensor_split([qkv.shape[0] // 3])
                    state |= {f"blocks.{i}.attn.q.{kind}": q, f"blocks.{i}.attn.kv.{kind}": kv}
        return state, dropped
