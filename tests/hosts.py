"""Small hosts of every kind, and which methods make sense on them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.models.host import ReducedHost
from effvit.models.lvvit import LVViT
from effvit.reducers import METHODS

SIZE = {"img_size": (48, 64), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_heads": 2}


def _gated(**kwargs: Any) -> Eva:
    """A host whose attention has gates, which timm's blocks take as an argument and its models do not hand on."""
    host = Eva(**kwargs)
    for block in host.blocks:
        block.attn.gate = nn.Linear(host.embed_dim, block.attn.attn_dim)
    host.init_weights()
    return host


HOSTS: dict[str, Callable[..., nn.Module]] = {
    "class_token": partial(VisionTransformer, **SIZE),
    "distilled": partial(VisionTransformerDistilled, **SIZE),
    "registers": partial(
        VisionTransformer,
        **SIZE,
        reg_tokens=4,
        init_values=0.1,
        qk_norm=True,
        no_embed_class=True,
        pre_norm=True,
    ),
    "average_pool": partial(VisionTransformer, **SIZE, class_token=False, global_pool="avg"),
    "register_no_class": partial(VisionTransformer, **SIZE, class_token=False, reg_tokens=1, global_pool="avg"),
    "attention_pool": partial(VisionTransformer, **SIZE, class_token=False, global_pool="map"),
    "eva02": partial(Eva, **(SIZE | ROPE), swiglu_mlp=True, scale_mlp=True, qkv_fused=False, init_values=0.1),
    "dinov3": partial(Eva, **(SIZE | ROPE), rope_type="dinov3", num_reg_tokens=4, init_values=0.1, global_pool="token"),
    "rope_mixed": partial(Eva, **(SIZE | ROPE), rope_type="mixed", attn_type="rope", global_pool="token"),
    "gated_grouped": partial(
        _gated,
        **(SIZE | ROPE),
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
        class_token=True,
        global_pool="avg",
    ),
    "lvvit": partial(LVViT, **(SIZE | {"patch_size": 16, "img_size": (64, 80)})),
}
MERGE = {name for name, method in METHODS.items() if method.keeps_every_patch}  # no patch is without a token
SETTINGS = {name: method.example() for name, method in METHODS.items()}
OFF = {name: method.off() for name, method in METHODS.items()}
NO_CLASS_TOKEN = {"average_pool", "register_no_class", "attention_pool"}
PAIRS = [(m, h) for m in SETTINGS for h in HOSTS if not (METHODS[m].needs_class_token and h in NO_CLASS_TOKEN)]


Pair = tuple[str, str]


def covering(pairs: Sequence[Pair]) -> set[Pair]:
    """A third of the pairs in which every first and every second member is, for tests of which some are enough."""
    firsts, seconds = (list(dict.fromkeys(members)) for members in zip(*pairs, strict=True))
    kept = {(a, b) for a, b in pairs if (firsts.index(a) + seconds.index(b)) % 3 == 1}
    for a, b in pairs:
        if a not in {first for first, _ in kept} or b not in {second for _, second in kept}:
            kept.add((a, b))
    return kept


def released(items: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The items as parameters of a test, of which those that are not kept run for a release alone."""
    rows = [(item, item if isinstance(item, tuple) else (item,)) for item in items]
    return [pytest.param(*row, marks=[] if item in kept else pytest.mark.release) for item, row in rows]


def covered(pairs: Sequence[Pair]) -> list[Any]:
    """The pairs as parameters of a test, of which those that are not ``covering`` run for a release alone."""
    return released(pairs, covering(pairs))


def make_host(name: str, **kwargs: Any) -> nn.Module:
    """A host with weights far enough from their initialisation that attention differs between tokens."""
    torch.manual_seed(0)
    host = HOSTS[name](**kwargs).eval()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter.ndim) ** 0.5)
    return host


def make_model(method: str, host: str, **settings: Any) -> ReducedHost:
    return effvit.sparsify(make_host(host), method, **(SETTINGS[method] | settings)).eval()


def make_images(model: nn.Module, batch: int = 2) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
