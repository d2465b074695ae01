"""Hosts with relative positions: BEiT (2106.08254), BEiT v2 (2208.06366) and timm's ``VisionTransformerRelPos``.

Their attention adds a bias to the logits of each pair of tokens, which depends on the offset between the two: from a
table or from an MLP of log-spaced offsets (Swin v2, 2111.09883), of each block or shared by all. timm's own modules
make it for the full grid, and resize it; a token has the bias of its anchor (``effvit.attention.PairBias``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models import beit
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from effvit.attention import ATTENTION_CLASSES, EvaTokenAttention, PlainTokenAttention, TokenAttention
from effvit.block import BLOCK_CLASSES, EvaTokenBlock, ReducibleBlock, TokenBlock
from effvit.hosts.host import HOST_CLASSES, ReducedHost
from effvit.protocols import Layer
from effvit.tokens import fix_traced_size

__all__ = ["CLASS_TOKEN_HOSTS", "NO_CLASS_TOKEN_HOSTS", "ReducedBeit", "ReducedRelPos"]

CLASS_TOKEN_HOSTS = (
    *(f"beit_{size}_patch16_{pixels}" for size in ("base", "large") for pixels in (224, 384)),
    "beit_large_patch16_512",
    *(f"beitv2_{size}_patch16_224" for size in ("base", "large")),
    *(f"vit_relpos_{kind}_224" for kind in ("medium_patch16_cls", "base_patch16_cls", "base_patch16_clsgap")),
)
NO_CLASS_TOKEN_HOSTS = (
    *(f"vit_relpos_{size}_patch16_224" for size in ("small", "medium", "base")),
    *(f"vit_relpos_{size}_patch16_rpn_224" for size in ("small", "medium", "base")),
    *(f"vit_srelpos_{size}_patch16_224" for size in ("small", "medium")),
    "vit_relpos_base_patch16_plus_240",
    "vit_relpos_base_patch32_plus_rpn_256",
)


def unchanged(x: Tensor) -> Tensor:
    """x itself, in place of a layer that an attention class of timm does not have."""
    return x


class BeitTokenAttention(TokenAttention, beit.Attention):
    """timm's attention of BEiT (no key bias) for token maps."""

    qkv: Layer
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    qkv_bias_separate: bool
    relative_position_bias_table: Tensor | None
    proj: nn.Linear
    gate = None
    q_norm: Layer = staticmethod(unchanged)
    k_norm: Layer = staticmethod(unchanged)
    norm: Layer = staticmethod(unchanged)

    if TYPE_CHECKING:

        def _get_rel_pos_bias(self) -> Tensor: ...

    _project = EvaTokenAttention._project
    _bias = EvaTokenAttention._bias
    _score = EvaTokenAttention._score
    _values = EvaTokenAttention._values

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        """Channels of a head, which timm keeps in the shape of the projection alone."""
        return self.proj.in_features // self.num_heads

    def _pair_table(self, shared: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return shared
        own = self._get_rel_pos_bias()  # (1, heads, 1+H*W, 1+H*W)
        return own if shared is None else own + shared


class RelPosTokenAttention(TokenAttention, RelPosAttention):
    """timm's ``RelPosAttention`` for token maps."""

    qkv: Layer
    rel_pos: RelPosBias | RelPosMlp | None
    gate = None
    norm: Layer = staticmethod(unchanged)

    _project = PlainTokenAttention._project
    _score = PlainTokenAttention._score
    _values = PlainTokenAttention._values

    def _pair_table(self, shared: Tensor | None) -> Tensor | None:
        return shared if self.rel_pos is None else self.rel_pos.get_bias()  # (1, heads, P+H*W, P+H*W)


class BeitTokenBlock(ReducibleBlock, beit.Block):
    """timm's block of BEiT (LayerScale as plain parameters) for token maps."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None
    drop_path2: Layer

    _attention_branch = EvaTokenBlock._attention_branch
    _mlp_branch = EvaTokenBlock._mlp_branch


class RelPosTokenBlock(ReducibleBlock, RelPosBlock):
    """timm's ``RelPosBlock`` for token maps."""

    ls1: Layer
    ls2: Layer
    drop_path2: Layer

    _attention_branch = TokenBlock._attention_branch
    _mlp_branch = TokenBlock._mlp_branch


class ResPostRelPosTokenBlock(ReducibleBlock, ResPostRelPosBlock):
    """timm's ``ResPostRelPosBlock``, whose norms stand behind attention and MLP, for token maps."""

    drop_path2: Layer
    post_norm = True

    def _attention_input(self, x: Tensor) -> Tensor:
        return x

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(y))

    def feedforward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducedBeit(ReducedHost, Beit):
    """timm's ``Beit`` (BEiT, BEiT v2) with a reduction method."""

    attn_pool = None
    biases_pairs = True
    cls_token: Tensor
    pos_embed: Tensor | None
    pos_drop: Layer
    rel_pos_bias: nn.Module | None

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, 1+N, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()  # (heads, 1+N, 1+N)
        return fix_traced_size(self.pos_drop(x), 1), shared  # a trace holds the bias of one grid


class ReducedRelPos(ReducedHost, VisionTransformerRelPos):
    """timm's ``VisionTransformerRelPos`` with a reduction method."""

    attn_pool = None
    biases_pairs = True
    shared_rel_pos: RelPosBias | RelPosMlp | None

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, 1+N, C)
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()  # (1, heads, P+N, P+N)
        return fix_traced_size(x, 1), shared


ATTENTION_CLASSES[beit.Attention] = BeitTokenAttention
ATTENTION_CLASSES[RelPosAttention] = RelPosTokenAttention
BLOCK_CLASSES[beit.Block] = BeitTokenBlock
BLOCK_CLASSES[RelPosBlock] = RelPosTokenBlock
BLOCK_CLASSES[ResPostRelPosBlock] = ResPostRelPosTokenBlock
HOST_CLASSES[Beit] = ReducedBeit
HOST_CLASSES[VisionTransformerRelPos] = ReducedRelPos
