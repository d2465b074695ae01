"""The small models that contracts run on: a host of every kind, with or without a method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from timm.models.beit import Beit
from timm.models.deepseek_vit import DeepseekVitClassifier
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.gemma4_vit import Gemma4VitClassifier
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

import effvit
from effvit.hosts.host import ReducedHost, patch_embedding
from effvit.hosts.illama import ILLaMA
from effvit.hosts.lvvit import LVViT
from effvit.hosts.surface import record_args
from effvit.protocols import Setting, Settings, Size
from effvit.reducers import METHODS
from effvit.testing.surface import Backbone, MakeModel

__all__ = ["HOSTS", "SIZE", "example", "make_host", "make_images", "make_model", "noise", "perturb", "reduce"]

SIZE: Settings = {
    "img_size": (48, 64),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 7,
}
ROPE: Settings = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_heads": 2}


def _small(make: Callable[..., nn.Module], **settings: Setting) -> MakeModel:
    return partial(make, **(SIZE | settings))


def _gated(**settings: Setting) -> nn.Module:
    """A host whose attention has gates, which timm's blocks take as an argument and its models do not hand on."""
    host = Eva(**settings)
    for block in host.blocks:
        block.attn.gate = nn.Linear(host.embed_dim, block.attn.attn_dim)
    host.init_weights()
    return host


def _naflex(*, img_size: Size, dynamic_img_size: bool = True, **settings: Setting) -> nn.Module:
    """A ``NaFlexVit``, which takes images of any size, without a word for it; positions are those of a 6 x 8 grid."""
    return NaFlexVit(pos_embed_grid_size=(6, 8), **settings)


def _tower(cls: Callable[..., nn.Module], dynamic_img_size: bool = True, **settings: Setting) -> nn.Module:
    """A classifier around a tower, which takes images of any size, so that there is no keyword to ask for it."""
    tower = cls(**settings)
    record_args(tower, settings)  # as timm.create_model does: Gemma's towers do not keep the size of their images
    return tower


HOSTS: dict[str, MakeModel] = {
    "class_token": _small(VisionTransformer),
    "distilled": _small(VisionTransformerDistilled),
    "registers": _small(
        VisionTransformer,
        reg_tokens=4,
        init_values=0.1,
        qk_norm=True,
        no_embed_class=True,
        pre_norm=True,
    ),
    "average_pool": _small(VisionTransformer, class_token=False, global_pool="avg"),
    "register_no_class": _small(VisionTransformer, class_token=False, reg_tokens=1, global_pool="avg"),
    "attention_pool": _small(VisionTransformer, class_token=False, global_pool="map"),
    "eva02": _small(Eva, **ROPE, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, init_values=0.1),
    "dinov3": _small(Eva, **ROPE, rope_type="dinov3", num_reg_tokens=4, init_values=0.1, global_pool="token"),
    "rope_mixed": _small(Eva, **ROPE, rope_type="mixed", attn_type="rope", global_pool="token"),
    "gated_grouped": _small(
        _gated,
        **ROPE,
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
        class_token=True,
        global_pool="avg",
    ),
    "beit": _small(Beit, use_abs_pos_emb=False, use_rel_pos_bias=True, qkv_bias=True, init_values=0.1),
    "relpos": _small(VisionTransformerRelPos, class_token=True, global_pool="token", rel_pos_dim=16, init_values=0.1),
    "shared_relpos": _small(
        VisionTransformerRelPos,
        block_fn=ResPostRelPosBlock,
        rel_pos_type="bias",
        shared_rel_pos=True,
        qk_norm=True,
        init_values=None,
    ),
    "lvvit": _small(LVViT, patch_size=16, img_size=(64, 80)),
    "illama": _small(ILLaMA),
    "qwen3": _small(partial(_tower, Qwen3VitClassifier), pos_embed_grid_size=6, mlp_ratio=2.0),
    "deepseek": _small(partial(_tower, DeepseekVitClassifier)),
    "gemma4": _small(
        partial(_tower, Gemma4VitClassifier),
        head_dim=16,
        num_kv_heads=1,
        intermediate_size=64,
        position_embedding_size=10,
        use_clipped_linears=True,
    ),
    "naflex": _small(_naflex, class_token=True, reg_tokens=1, init_values=0.1, global_pool="avg"),
}


def perturb(model: nn.Module) -> None:
    """Move the weights far enough from their initialisation that attention differs between tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter.ndim) ** 0.5)


def make_host(name: str, **settings: Setting) -> Backbone:
    """A host with the same weights at every call, in eval mode."""
    torch.manual_seed(0)
    host = HOSTS[name](**settings).eval()
    perturb(host)
    return cast(Backbone, host)


def example(method: str) -> Settings:
    """The settings of the method's ``example``, a copy."""
    return {**METHODS[method].example()}


def make_model(method: str, host: str, recover: str | None = None, **settings: Setting) -> ReducedHost:
    """The host under the method with the settings of its ``example``, some of them changed."""
    return reduce(make_host(host), method, example(method) | settings, recover).eval()


def reduce(host: Backbone, method: str, settings: Settings, recover: str | None = None) -> ReducedHost:
    """The host under the method, sharing its weights."""
    model = effvit.sparsify(host, method, recover=recover, share=True, **settings)
    assert isinstance(model, ReducedHost)
    return model


def make_images(model: Backbone | ReducedHost, batch: int = 2) -> Tensor:
    """Images (B, 3, H, W) of the model's size, the same ones at every call."""
    embedding = patch_embedding(model)
    size = None if embedding is None else embedding.img_size
    assert size is not None, "the model was not made for images of one size"
    return noise(batch, size)


def noise(batch: int, size: Size) -> Tensor:
    """Random images (batch, 3, H, W), the same ones at every call."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
