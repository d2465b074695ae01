"""LV-ViT (arXiv 2104.10858): a plain ViT with a convolutional stem, damped residuals and a head on every token.

GTP's code runs on it, Zero-TPrune's project page reports on it, and timm does not have it. Parameter names are those
of GTP's copy (models/lvvit.py of Ackesnal/GTP-ViT@97a1178), so its checkpoints load unchanged. SiT's variant, with
another stem and without the head on every token, is in ``sit.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import PatchEmbed, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from effvit.block import BLOCK_CLASSES, TokenBlock
from effvit.hosts._builder import build_model
from effvit.hosts.checkpoints import host_state_dict, official_state_dict
from effvit.hosts.host import HOST_CLASSES, ReducedViT
from effvit.hosts.surface import model_cfg
from effvit.protocols import Device, Factory, Layer, Size

__all__ = ["LVViT"]


class FixedPatchEmbed(PatchEmbed):
    """timm's ``PatchEmbed`` for a stem of several convolutions, whose patch size cannot change."""

    patch_size: Size

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"the convolutional stem has a fixed patch size of {self.patch_size[0]}, got {patch_size}")
        super().set_input_size(img_size=img_size)


class ConvStemEmbed(FixedPatchEmbed):
    """Patch embedding behind three convolutions of which the first halves the resolution."""

    flatten: bool

    def __init__(
        self,
        *args: object,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        dd: Factory = {"device": device, "dtype": dtype}
        super().__init__(*args, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs, **dd)
        width = 64
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 64, H*P/2, W*P/2)
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)  # (B, C, H, W)
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)  # (B, N, C) or (B, H, W, C)


class DampedBlock(Block):
    """timm's ``Block`` with both residual branches divided by ``skip_lam``."""

    norm1: Layer
    norm2: Layer
    ls1: Layer
    ls2: Layer
    mlp: Layer
    drop_path1: Layer
    drop_path2: Layer

    def __init__(self, *args: object, skip_lam: float = 1.0, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.skip_lam = skip_lam

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        y: Tensor = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(y)) / self.skip_lam
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) / self.skip_lam


class DampedTokenBlock(TokenBlock):
    """DampedBlock for token maps."""

    skip_lam: float

    def _attention_branch(self, y: Tensor) -> Tensor:
        return super()._attention_branch(y) / self.skip_lam

    def _mlp_branch(self, y: Tensor) -> Tensor:
        return super()._mlp_branch(y) / self.skip_lam


class LVViT(VisionTransformer):
    """LV-ViT. Scores are those of the class token plus half the largest of all patch tokens, for each class."""

    num_classes: int
    embed_dim: int
    global_pool: str
    head: nn.Module
    head_drop: Layer

    def __init__(
        self,
        *args: object,
        skip_lam: float = 2.0,
        norm_layer: Callable[..., nn.Module] | str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(
            *args,
            embed_layer=ConvStemEmbed,
            block_fn=partial(DampedBlock, skip_lam=skip_lam),
            norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-5),
            **kwargs,
        )
        self.aux_head = self._new_head()
        self.init_weights(needs_reset=False)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity().train(self.training)
        return nn.Linear(self.embed_dim, self.num_classes, **get_device_dtype(self)).train(self.training)

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_head()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1+N, C) -> (B, num_classes); the pooled features if asked for, or without a head."""
        if pre_logits or self.num_classes == 0 or not self.global_pool:
            return super().forward_head(x, pre_logits)
        of_class: Tensor = self.head(self.head_drop(x[:, 0]))  # (B, num_classes)
        of_patches: Tensor = self.aux_head(x[:, 1:])  # (B, N, num_classes)
        return of_class + 0.5 * of_patches.amax(1)


class ReducedLVViT(ReducedViT, LVViT):
    """LV-ViT with a reduction method; the token head reads the tokens that are left."""

    head_reads_patches = True


BLOCK_CLASSES[DampedBlock] = DampedTokenBlock
HOST_CLASSES[LVViT] = ReducedLVViT


_CFG = model_cfg(
    fixed_input_size=True,
    first_conv="patch_embed.conv1",
    classifier=("head", "aux_head"),
    paper_ids="arXiv:2104.10858",
    origin_url="https://github.com/zihangJiang/TokenLabeling",
)
_RELEASE = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0"  # linked in README.md@9dbfd59
default_cfgs = generate_default_cfgs(
    {
        "lvvit_small_patch16_224.in1k": _CFG | {"url": f"{_RELEASE}/lvvit_s-26M-224-83.3.pth.tar"},
        "lvvit_medium_patch16_224.in1k": _CFG | {"url": f"{_RELEASE}/lvvit_m-56M-224-84.0.pth.tar"},
    }
)


def _own_names(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of an official or own file under the model's names; timm calls this while it loads a checkpoint."""
    return host_state_dict(official_state_dict(state_dict)[0], model)


def _create(name: str, pretrained: bool, args: dict[str, object]) -> nn.Module:
    return build_model(LVViT, name, pretrained, args, pretrained_filter_fn=_own_names)


@register_model
def lvvit_small_patch16_224(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """LV-ViT-S: 26 M parameters (2104.10858, table 1)."""
    args = {"embed_dim": 384, "depth": 16, "num_heads": 6, "mlp_ratio": 3.0, "qkv_bias": False}
    return _create("lvvit_small_patch16_224", pretrained, {**args, **kwargs})


@register_model
def lvvit_medium_patch16_224(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """LV-ViT-M: 56 M parameters (2104.10858, table 1)."""
    args = {"embed_dim": 512, "depth": 20, "num_heads": 8, "mlp_ratio": 3.0, "qkv_bias": False}
    return _create("lvvit_medium_patch16_224", pretrained, {**args, **kwargs})
