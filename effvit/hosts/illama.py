"""iLLaMA (arXiv 2404.06773): a ViT of LLaMA's blocks, with a causal mask behind the softmax.

Blocks have RMSNorm, a SwiGLU MLP and rotary positions along the sequence of patches in rows, beside learnt positions.
The class token stands last, so that it reads all patches. Read from models/illama.py of
techmonsterwang/iLLaMA@dfc93b9, which timm does not have.

The mask is a factor on the softmax map, and rows are not renormalised: a later token is left out of the sum over values
but stays in the denominator. So features of a patch do depend on later patches, and no fused kernel computes them.

In memory the class token stands in front, as in all models of timm; only its place is the last. Sums over tokens are
thereby in another order than officially, and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import RmsNorm, SwiGLU, apply_rot_embed_cat, trunc_normal_
from timm.layers.attention import Attention
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from effvit.attention import ATTENTION_CLASSES, CausalMask, PlainTokenAttention, masked_attention
from effvit.block import BLOCK_CLASSES, TokenBlock
from effvit.hosts._builder import build_model
from effvit.hosts.checkpoints import host_state_dict, official_state_dict
from effvit.hosts.host import HOST_CLASSES, ReducedHost
from effvit.hosts.surface import BlockFeatures, Intermediates, check_images, model_cfg, patch_grid, refuse_mask
from effvit.protocols import Device, Layer, PatchEmbedding
from effvit.tokens import TokenMap, fix_traced_size, fx_leaf, take_rows, wide_dtype

__all__ = ["ILLaMA"]

THETA = 10000.0  # of LLaMA's rotary positions


@fx_leaf
def sequence_places(x: Tensor) -> Tensor:
    """(1, 1+N) places of the tokens x (B, 1+N, C): N for the class token in front, then 0 to N-1."""
    return torch.arange(x.shape[1], device=x.device).roll(1).unsqueeze(0)


@fx_leaf
def rotary_table(x: Tensor, head_dim: int) -> Tensor:
    """(1+N, 2D) sines and cosines for the tokens x (B, 1+N, C), class token first, in fp32 (fp64 for fp64).

    Channels 2i and 2i+1 of a head turn by place * THETA^(-2i/D).
    """
    dtype = wide_dtype(x.dtype)
    channels = torch.arange(0, head_dim, 2, device=x.device, dtype=dtype)  # (D/2,)
    angles = sequence_places(x).transpose(0, 1).to(dtype) * (1.0 / THETA ** (channels / head_dim))  # (1+N, D/2)
    angles = angles.repeat_interleave(2, dim=1)  # (1+N, D)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class LlamaMlp(SwiGLU):
    """SwiGLU without biases on two thirds of the hidden channels asked for, rounded up to a multiple of 256."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[..., nn.Module] = nn.SiLU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = False,
        drop: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            int(2 * hidden_features / 3),
            act_layer=act_layer,
            norm_layer=norm_layer,
            bias=False,  # whatever timm's block asks for, which has one switch for this and for attention
            drop=drop,
            align_to=256,
            device=device,
            dtype=dtype,
        )

    def init_weights(self) -> None:
        """Leave the weights as all linear layers have them; timm's SwiGLU would close its gates."""


class CausalAttention(Attention):
    """timm's ``Attention`` with rotary positions and the soft causal mask behind the softmax.

    Attributes:
        soft_mask: What attention to later tokens is multiplied by.
    """

    num_heads: int
    head_dim: int
    scale: float
    qkv: Layer
    q_norm: Layer
    k_norm: Layer
    norm: Layer
    proj: Layer
    attn_drop: nn.Dropout
    proj_drop: Layer

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.soft_mask = 0.0

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Tokens (B, 1+N, C), class token first, and their ``rotary_table`` -> (B, 1+N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, 1+N, 3, heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (apply_rot_embed_cat(y, rope).type_as(v) for y in (self.q_norm(q), self.k_norm(k)))
        mask = CausalMask(sequence_places(x), self.soft_mask)
        out = masked_attention(q, k, v, self.scale, None, mask, self.attn_drop)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class CausalTokenAttention(PlainTokenAttention):
    """CausalAttention for token maps: a token stands at the place of its anchor, the class token last."""

    soft_mask: float

    def _causal_mask(self, tokens: TokenMap) -> CausalMask:
        return CausalMask.of(tokens, self.soft_mask)

    def _rotate(self, x: Tensor, tokens: TokenMap, positions: Tensor) -> Tensor:
        if tokens.moved:
            rows = (
                tokens.layout.ranges.behind_prefix(tokens.anchor) + tokens.num_prefix
            )  # (B, 1+N) in the full sequence
            positions = take_rows(positions.unsqueeze(0), rows).unsqueeze(1)  # (B, 1, 1+N, 2D)
        return self._turn(x, positions)


class LlamaBlock(Block):
    """timm's ``Block`` that hands the rotary table to its attention."""

    norm1: Layer
    norm2: Layer
    ls1: Layer
    ls2: Layer
    mlp: Layer
    drop_path1: Layer
    drop_path2: Layer

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Tokens (B, 1+N, C) and their ``rotary_table`` -> (B, 1+N, C)."""
        y: Tensor = self.attn(self.norm1(x), rope)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ILLaMA(Intermediates, VisionTransformer):
    """iLLaMA with timm's arguments of a ``VisionTransformer``; it always has one class token and no register.

    Raises:
        ValueError: Arguments under which a token's place would be lost or unknown.
    """

    blocks: Any  # LlamaBlock, or TokenBlock where tokens are reduced
    patch_embed: PatchEmbedding
    norm_pre: Layer
    grad_checkpointing: bool

    if TYPE_CHECKING:

        def _pos_embed(self, x: Tensor) -> Tensor: ...

    def __init__(
        self,
        *args: object,
        class_token: bool = True,
        reg_tokens: int = 0,
        patch_drop_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | str | None = None,
        act_layer: Callable[..., nn.Module] | str | None = None,
        **kwargs: object,
    ) -> None:
        if not class_token or reg_tokens:
            raise ValueError(
                f"iLLaMA has one class token, which stands last, and no registers, got class_token={class_token} and "
                f"reg_tokens={reg_tokens}; leave both out, and give global_pool='avg' to pool patches"
            )
        if patch_drop_rate:
            raise ValueError(
                f"patch_drop_rate must be 0 for iLLaMA, whose tokens keep their places, got {patch_drop_rate}; reduce "
                "the model by effvit.sparsify(model, 'random', keep_rate=...)"
            )
        super().__init__(
            *args,
            block_fn=LlamaBlock,
            attn_layer=CausalAttention,
            mlp_layer=LlamaMlp,
            norm_layer=norm_layer or RmsNorm,
            act_layer=act_layer or nn.SiLU,
            **kwargs,
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as a new model (timm's method); the class token from N(0, 0.02) truncated, as officially."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.get_parameter("cls_token"), std=0.02)

    @property
    def soft_mask(self) -> float:
        """What attention to later tokens is multiplied by: 0 for a causal model, 1 for one in which all read all."""
        soft_mask: float = self.blocks[0].attn.soft_mask
        return soft_mask

    def set_soft_mask(self, soft_mask: float) -> None:
        """Multiply attention to later tokens by a factor in [0, 1], e.g. by a schedule over training (2404.06773).

        Officially it is 1 for the first epochs, or falls linearly from 1 to 0 in them, and 0 from then on. A new model
        has 0. It is no weight: ``state_dict`` does not hold it.

        Raises:
            ValueError: A value that is not in [0, 1].
        """
        is_number = isinstance(soft_mask, (int, float)) and not isinstance(soft_mask, bool)
        if not is_number or not 0 <= soft_mask <= 1:
            raise ValueError(
                f"soft_mask must be in [0, 1], got {soft_mask!r}; 0 is the causal mask, 1 lets all tokens attend to all"
            )
        for block in self.blocks:
            block.attn.soft_mask = float(soft_mask)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> tokens (B, 1+N, C), class token first, and their rotary table."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        x = fix_traced_size(x, 1)  # a trace holds the rotary table of one grid
        return x, rotary_table(x, self.blocks[0].attn.head_dim)

    def _run(self, x: Tensor, take: Sequence[int] = (), num_blocks: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Output (B, 1+N, C) of the last block, and of those in ``take``; arguments as for ``_intermediates``."""
        check_images(x, self)
        x, rope = self._embed(x)
        taken = []
        for i, block in enumerate(islice(self.blocks, num_blocks)):
            x = checkpoint(block, x, rope) if self.grad_checkpointing else block(x, rope)
            if i in take:
                taken.append(x)
        return x, taken

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised tokens (B, 1+N, C) of images (B, 3, H, W), class token first; a mask is refused."""
        refuse_mask(self, attn_mask, is_causal)
        return self.norm(self._run(x)[0])

    def _intermediates(self, x: Tensor, take: Sequence[int], num_blocks: int | None) -> BlockFeatures:
        final, taken = self._run(x, take, num_blocks)
        patches, prefixes = [y[:, 1:] for y in taken], [y[:, :1] for y in taken]
        return BlockFeatures(patches, prefixes, patch_grid(x, self), lambda: self.norm(final))


class ReducedILLaMA(ReducedHost, ILLaMA):
    """iLLaMA with a reduction method."""

    masks_pairs = True

    _embed = ILLaMA._embed


ATTENTION_CLASSES[CausalAttention] = CausalTokenAttention
BLOCK_CLASSES[LlamaBlock] = TokenBlock
HOST_CLASSES[ILLaMA] = ReducedILLaMA


def _cfg(file: str, pixels: int = 224) -> dict[str, object]:
    """timm's configuration of weights that the official README links; at 384 pixels images are warped, not cropped."""
    own = model_cfg(
        first_conv="patch_embed.proj",
        paper_ids="arXiv:2404.06773",
        origin_url="https://github.com/techmonsterwang/iLLaMA",
        url=f"https://huggingface.co/techmonsterwang/iLLaMA/resolve/main/{file}",
        input_size=(3, pixels, pixels),
        crop_pct=0.875,
    )
    return own | ({"crop_pct": 1.0, "crop_mode": "squash"} if pixels == 384 else {})


default_cfgs = generate_default_cfgs(
    {
        "illama_tiny_patch16_224.in1k": _cfg("illama-tiny-in1k-75.0.pth"),
        "illama_small_patch16_224.in1k": _cfg("illama-small-in1k-79.9.pth"),
        "illama_base_patch16_224.in1k": _cfg("illama-base-in1k-81.6.pth"),
        "illama_base_patch16_224.in21k_ft_in1k": _cfg("illama-base-in21kin1k-224-83.6.pth"),
        "illama_base_patch16_384.in1k": _cfg("illama-base-in1k-384-83.0.pth", 384),
        "illama_base_patch16_384.in21k_ft_in1k": _cfg("illama-base-in21kin1k-384-85.0.pth", 384),
        "illama_large_patch16_224.in21k_ft_in1k": _cfg("illama-large-in21kin1k-224-84.8.pth"),
        "illama_large_patch16_384.in21k_ft_in1k": _cfg("illama-large-in21kin1k-384-86.0.pth", 384),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of an official or own file under the model's names; timm calls this while it loads a checkpoint."""
    return host_state_dict(official_state_dict(state_dict)[0], model)


SIZES: dict[str, dict[str, object]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _create(size: str, pixels: int, pretrained: bool, given: Mapping[str, object]) -> nn.Module:
    """The model of a size for images of so many pixels a side."""
    name, sizes = f"illama_{size}_patch16_{pixels}", {**SIZES[size], "img_size": pixels}
    return build_model(ILLaMA, name, pretrained, given, sizes, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def illama_tiny_patch16_224(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """iLLaMA-T: 5.7 M parameters (README of techmonsterwang/iLLaMA@dfc93b9, as those of all sizes)."""
    return _create("tiny", 224, pretrained, kwargs)


@register_model
def illama_small_patch16_224(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """iLLaMA-S: 21.9 M parameters."""
    return _create("small", 224, pretrained, kwargs)


@register_model
def illama_base_patch16_224(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """iLLaMA-B: 86.3 M parameters."""
    return _create("base", 224, pretrained, kwargs)


@register_model
def illama_base_patch16_384(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """iLLaMA-B on 576 patches."""
    return _create("base", 384, pretrained, kwargs)


@register_model
def illama_large_patch16_224(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """iLLaMA-L: 310.2 M parameters."""
    return _create("large", 224, pretrained, kwargs)


@register_model
def illama_large_patch16_384(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """iLLaMA-L on 576 patches."""
    return _create("large", 384, pretrained, kwargs)
