"""Segmenter's decoder on merged tokens, restored to the grid behind it: as ALGM is published (2406.09936)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from effvit.hosts.host import TokenFeatures
from effvit.protocols import Layer
from effvit.recover import to_map
from effvit.tokens import TokenMap

__all__ = ["MaskTransformer", "restore_scores"]


def restore_scores(scores: Tensor, tokens: TokenMap) -> Tensor:
    """Scores of tokens (B, N, classes) -> maps (B, classes, H, W), in which each patch has those of its token.

    Raises:
        ValueError: Patches were dropped or fused, so that no token stands for them.
    """
    if not tokens.complete:
        raise ValueError(
            "scores are restored from the token that stands for each patch, but some patches were dropped or fused; "
            "reduce by a method that merges (algm, tome, dymu), or decode the maps of forward_intermediates"
        )
    return to_map(F.pad(scores, (0, 0, tokens.num_prefix, 0)), tokens)


class MaskTransformer(nn.Module):
    """Class scores of every patch, from the tokens that are left: blocks on tokens and classes, products of both.

    Segmenter (2105.05633), whose parameters have these names, so that ALGM's checkpoints
    (segm/model/decoder.py@674eaa2) load. Tokens are decoded as they are, merged, and restored behind
    (2406.09936). Before the decoder they are restored by ``model.forward_intermediates``, whose maps any
    head takes: there a merged token is attended to once for each of its patches, here once.

    Args:
        in_channels: Channels of the tokens.
        num_classes: Classes.
        depth: Blocks.
        num_heads: Attention heads; None: one for 64 channels.
        embed_dim: Channels of the blocks; None: those of the tokens.
        drop_path_rate: Stochastic depth of the last block, from 0 in the first.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        depth: int = 2,
        num_heads: int | None = None,
        embed_dim: int | None = None,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        dim = in_channels if embed_dim is None else embed_dim
        num_heads = max(1, dim // 64) if num_heads is None else num_heads
        norm = partial(nn.LayerNorm, eps=1e-5)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.num_classes = num_classes
        self.proj_dec: Layer = nn.Linear(in_channels, dim)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
        )
        self.decoder_norm: Layer = norm(dim)
        self.proj_patch = nn.Parameter(torch.empty(dim, dim))
        self.proj_classes = nn.Parameter(torch.empty(dim, dim))
        self.mask_norm: Layer = norm(num_classes)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)
        for projection in (self.proj_patch, self.proj_classes):
            nn.init.normal_(projection, std=dim**-0.5)

    def forward(self, features: TokenFeatures) -> Tensor:
        """What ``model.forward_tokens(images)`` gives -> class scores (B, num_classes, H, W) of the patches.

        Raises:
            ValueError: As ``restore_scores``.
        """
        x, tokens = features
        patches = self.proj_dec(x[:, tokens.num_prefix :])  # (B, N, dim)
        x = torch.cat([patches, self.cls_emb.expand(len(patches), -1, -1)], dim=1)  # (B, N + num_classes, dim)
        mask = None
        if tokens.valid is not None:  # the padding of images with fewer tokens is no key
            mask = F.pad(tokens.valid, (0, self.num_classes), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.num_classes] @ self.proj_patch, x[:, -self.num_classes :] @ self.proj_classes
        scores = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)  # (B, N, num_classes)
        return restore_scores(self.mask_norm(scores), tokens)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
