"""Blocks and attention of the towers of vision-language models for token maps (``effvit.hosts.towers``).

Qwen's towers are built of timm's ``EvaBlock``, which other hosts have too.
"""

from __future__ import annotations

from timm.layers.pos_embed_sincos import rope_rotate_half
from timm.models.deepseek_vit import DeepseekVitBlock
from timm.models.gemma4_vit import Gemma4Attention, Gemma4Block
from torch import Tensor

from effvit.attention import ATTENTION_CLASSES, TokenAttention
from effvit.block import BLOCK_CLASSES, ReducibleBlock
from effvit.protocols import Layer

__all__ = ["DeepseekTokenBlock", "Gemma4TokenAttention", "Gemma4TokenBlock"]


class DeepseekTokenBlock(ReducibleBlock, DeepseekVitBlock):
    """timm's ``DeepseekVitBlock`` (RMSNorm, SwiGLU) for token maps."""

    drop_path2: Layer

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path1(y)

    def _mlp_branch(self, y: Tensor) -> Tensor:
        return self.drop_path2(y)


class Gemma4TokenBlock(ReducibleBlock, Gemma4Block):
    """timm's ``Gemma4Block`` for token maps: norms before and behind both branches."""

    norm3: Layer
    norm4: Layer
    drop_path: Layer

    @property
    def drop_path1(self) -> Layer:  # type: ignore[override]  # timm's block has one for both branches
        return self.drop_path

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path(self.norm2(y))

    def feedforward(self, x: Tensor) -> Tensor:
        """Second half of the block: x plus its MLP branch, (B, P+N, C) -> (B, P+N, C)."""
        return x + self.drop_path(self.norm4(self.mlp(self.norm3(x))))


class Gemma4TokenAttention(TokenAttention, Gemma4Attention):
    """timm's ``Gemma4Attention`` for token maps: normalised q, k and v, products without a scale, RoPE of two axes."""

    gate = None
    scale = 1.0
    own_scale = 1.0
    q_proj: Layer
    k_proj: Layer
    v_proj: Layer
    o_proj: Layer
    v_norm: Layer

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._apart(self.q_proj, x), self._apart(self.k_proj, x)

    def _values(self, x: Tensor) -> Tensor:
        return self.v_norm(self._apart(self.v_proj, x))

    def _turn(self, x: Tensor, table: Tensor) -> Tensor:
        """The first half of the channels is turned by the column of the patch, the second by its row."""
        sin, cos = (y.unflatten(-1, (2, -1)) for y in table.chunk(2, dim=-1))  # (..., N, 2, D/2)
        x = x.unflatten(-1, (2, -1))  # (B, heads, N, 2, D/2)
        return (x * cos + rope_rotate_half(x) * sin).flatten(-2)

    def norm(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a module of timm's other classes
        """x: there is no norm in front of the output projection."""
        return x

    @property
    def proj(self) -> Layer:  # type: ignore[override]
        """The output projection, by the name of timm's other classes."""
        return self.o_proj


BLOCK_CLASSES[DeepseekVitBlock] = DeepseekTokenBlock
BLOCK_CLASSES[Gemma4Block] = Gemma4TokenBlock
ATTENTION_CLASSES[Gemma4Attention] = Gemma4TokenAttention
