"""Parameter names of transformers, open_clip, CLIP, DINOv2, DINOv3, SAM and SAM 2 -> those that timm's filters take.

A family without rules is one whose names timm's own filters map: it is found here so that the report can name it, and
so that a tower is taken out of what it is saved with. The names of transformers are those that ``save_pretrained``
writes, of version 5.24 as of earlier ones; they differ from those of its ``state_dict``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from effvit.hosts._names import Rules, renamed
from effvit.messages import plain

__all__ = ["FAMILIES", "Family", "Tower", "find_tower", "unknown_names"]


class Family(NamedTuple):
    """How one house names the parameters of one kind of vision transformer.

    Attributes:
        name: The kind and the house.
        marks: Names that all its files have, and files of others do not.
        absent: Names that files with the same marks have if they are of another family.
        rules: Names of the tower -> timm's, one after another; empty if timm's own filter maps them.
        heads: Modules beside the tower -> timm's.
        unused: Pattern of names of the tower that serve only its training, or outputs that timm does not have.
    """

    name: str
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    rules: Rules = ()
    heads: Mapping[str, str] = {}
    unused: str = "(?!)"


class Tower(NamedTuple):
    """A family, and where in a file its tower is.

    Attributes:
        family: The family.
        prefix: What the names of the tower begin with in the file.
    """

    family: Family
    prefix: str

    def timm_names(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights of the tower and its heads under names that timm's filters take, and what was left out.

        Names of the tower that no rule knows stay as they are, so that they are refused.

        Raises:
            ValueError: Kernels of patches that no host of timm with a grid has, or two entries of one meaning.
        """
        translated: dict[str, Tensor] = {}
        left_out = []
        for name, value in state.items():
            ours = self._timm_name(name)
            if ours is None:
                left_out.append(name)
            elif ours in translated:
                raise ValueError(
                    f"the checkpoint holds {plain(ours)} of {self.family.name} twice, also as {plain(name)}"
                )
            else:
                translated[ours] = value
        if self.family.rules:
            _check_kernel(translated, self.family)
            translated = _with_tables(_with_heads(_with_joined_qkv(translated)))
        return translated, left_out

    def _timm_name(self, name: str) -> str | None:
        """timm's name of an entry of the file, None if it is left out."""
        if name.startswith(self.prefix):
            inner = name[len(self.prefix) :]
            return None if re.search(self.family.unused, inner) else renamed(inner, self.family.rules)
        around = re.sub(r"[^.]+\.$", "", self.prefix)
        module, _, parameter = name.removeprefix(around).rpartition(".")
        head = self.family.heads.get(module)
        return None if head is None else f"{head}.{parameter}"


# The layers of ViT, DeiT, BEiT and DINOv2 in transformers are BERT's.
LAYERS: Rules = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attn.{m[1][0]}."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
# Those of CLIP and SigLIP are fairseq's.
TOWER_LAYERS: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
)
DINOV3_LAYERS: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
VIT_MARK, DINOV3_MARKS = (
    "encoder.layer.0.layernorm_before.weight",
    ("embeddings.register_tokens", "layer.0.norm1.weight"),
)
FAMILIES = (
    Family(
        "ViT of transformers",
        marks=(VIT_MARK,),
        absent=("embeddings.distillation_token", "encoder.layer.0.lambda_1"),
        rules=LAYERS,
        heads={"classifier": "head"},
        unused=r"^pooler\.dense\.|^embeddings\.mask_token$",
    ),
    Family(
        "DeiT of transformers",
        marks=(VIT_MARK, "embeddings.distillation_token"),
        rules=(*LAYERS, (r"^embeddings\.distillation_token$", "dist_token")),
        heads={"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"},
        unused=r"^pooler\.dense\.|^embeddings\.mask_token$",
    ),
    Family(
        "BEiT of transformers",
        marks=(VIT_MARK, "encoder.layer.0.lambda_1"),
        rules=(
            (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
            (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
            *LAYERS,
            (r"\.attention\.relative_position_bias\.", ".attn."),
            (r"\.lambda_([12])$", r".gamma_\1"),
            (r"^pooler\.layernorm\.", "fc_norm."),
        ),
        heads={"classifier": "head"},
        unused=r"^embeddings\.mask_token$|\.relative_position_index$",
    ),
    Family(
        "DINOv2 of transformers",
        marks=("encoder.layer.0.layer_scale1.lambda1", "embeddings.position_embeddings"),
        rules=(
            *LAYERS,
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.weights_in\.", ".mlp.w12."),
            (r"\.mlp\.weights_out\.", ".mlp.w3."),
        ),
    ),
    Family(
        "DINOv3 of transformers",
        marks=DINOV3_MARKS,
        absent=("layer.0.mlp.gate_proj.weight",),
        rules=(*DINOV3_LAYERS, (r"\.mlp\.up_proj\.", ".mlp.fc1.")),
        unused=r"^embeddings\.mask_token$",
    ),
    Family(
        "DINOv3 with a gated MLP of transformers",
        marks=(*DINOV3_MARKS, "layer.0.mlp.gate_proj.weight"),
        rules=(*DINOV3_LAYERS, (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.", ".mlp.fc1_x.")),
        unused=r"^embeddings\.mask_token$",
    ),
    Family(
        "CLIP of transformers",
        marks=("embeddings.class_embedding", "pre_layrnorm.weight"),
        rules=TOWER_LAYERS,
        heads={"visual_projection": "head"},
        unused=r"^embeddings\.position_ids$",
    ),
    Family(
        "SigLIP of transformers",
        marks=("embeddings.position_embedding.weight", "embeddings.patch_embedding.weight", "post_layernorm.weight"),
        absent=("embeddings.class_embedding",),
        rules=(
            *TOWER_LAYERS,
            (r"^head\.probe$", "attn_pool.latent"),
            (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
            (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
            (r"^head\.layernorm\.", "attn_pool.norm."),
            (r"^head\.", "attn_pool."),
        ),
        unused=r"^embeddings\.position_ids$",
    ),
    Family(
        "SAM of transformers",
        marks=("vision_encoder.patch_embed.projection.weight", "vision_encoder.layers.0.attn.rel_pos_h"),
        rules=(
            (r"^vision_encoder\.", ""),
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"^layers\.", "blocks."),
            (r"^neck\.conv([12])\.", lambda m: f"neck.{2 * int(m[1]) - 2}."),
            (r"^neck\.layer_norm([12])\.", lambda m: f"neck.{2 * int(m[1]) - 1}."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"\.mlp\.lin", ".mlp.fc"),
        ),
        unused=r"^(?!vision_encoder\.)",
    ),
    Family("SAM", marks=("image_encoder.blocks.0.attn.rel_pos_h", "image_encoder.neck.0.weight")),
    Family(
        "SAM 2",
        marks=("image_encoder.trunk.blocks.0.attn.qkv.weight", "image_encoder.trunk.pos_embed_window"),
        rules=((r"^image_encoder\.trunk\.", ""),),  # timm's filter maps the rest
        unused=r"^(?!image_encoder\.trunk\.)",
    ),
    Family("CLIP, original or of open_clip", marks=("visual.class_embedding", "visual.conv1.weight")),
    Family("a tower of timm in open_clip", marks=("visual.trunk.patch_embed.proj.weight",)),
    Family("DINOv2", marks=("mask_token", "pos_embed", "blocks.0.ls1.gamma")),
    Family("DINOv3", marks=("storage_tokens", "blocks.0.ls1.gamma")),
)


def find_tower(names: Collection[str]) -> Tower | None:
    """The family of a file's names and where its tower is; None for any other file, such as one of timm.

    Raises:
        ValueError: The file has several towers.
    """
    found = [Tower(family, prefix) for family in FAMILIES for prefix in _prefixes(names, family)]
    if len(found) > 1:
        listed = "; ".join(f"{tower.family.name} under {plain(tower.prefix) or 'no prefix'}" for tower in found[:4])
        raise ValueError(
            f"the checkpoint holds {len(found)} vision towers ({listed}); save the state_dict of one of them alone"
        )
    return found[0] if found else None


def _prefixes(names: Collection[str], family: Family) -> list[str]:
    """What stands before the marks of a family, once for each of its towers."""
    first = family.marks[0]
    prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
    return [
        prefix
        for prefix in prefixes
        if all(prefix + mark in names for mark in family.marks)
        and not any(prefix + mark in names for mark in family.absent)
    ]


def unknown_names(names: Collection[str]) -> str:
    """A sentence on names that are neither timm's nor of a family: what they begin with, and what is known."""
    starts = list(dict.fromkeys(name.split(".")[0] for name in names))
    listed = ", ".join(plain(start) for start in starts[:6]) + (" ..." if len(starts) > 6 else "")
    return (
        f"none of its {len(names)} entries is named as in timm, in an official repository that this model has weights "
        f"of, or in: {', '.join(family.name for family in FAMILIES)}. They begin with {listed or 'nothing'}; save the "
        "model's own state_dict, of a model of transformers by its save_pretrained"
    )


def _check_kernel(state: Mapping[str, Tensor], family: Family) -> None:
    """Raise a ValueError for SigLIP 2 with NaFlex under names of transformers, which fit no host."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 2:
        raise ValueError(
            f"the patches of this {family.name} are flattened (kernel {tuple(kernel.shape)}), as those of SigLIP 2 "
            "with NaFlex are; create a naflexvit_ host, naflexvit_base_patch16_siglip say, and load timm's file, or "
            "take a checkpoint of one image size, whose kernel has shape (C, 3, P, P)"
        )


def _with_joined_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with one ``qkv`` for queries, keys and values; without a bias of keys, the other two stay apart."""
    joined: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", name)
        if match is None:
            joined[name] = value
        else:
            parts.setdefault(f"{match[1]}qkv.{match[3]}", {})[match[2]] = value
    for name, values in parts.items():
        attn, _, kind = name.rpartition("qkv.")
        if values.keys() == {"q", "k", "v"}:
            joined[name] = torch.cat([values["q"], values["k"], values["v"]])  # (3 C, C) or (3 C)
        else:
            joined |= {f"{attn}{part}_{kind}": value for part, value in values.items()}
    return joined


def _with_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the query of SigLIP's pooling apart, and a zero bias for a projection that has none."""
    for kind in ("weight", "bias"):
        rows = state.pop(f"attn_pool.qkv.{kind}", None)
        if rows is not None:
            width = rows.shape[0] // 3
            state |= {f"attn_pool.q.{kind}": rows[:width], f"attn_pool.kv.{kind}": rows[width:]}
    if "head.weight" in state:
        state.setdefault("head.bias", state["head.weight"].new_zeros(state["head.weight"].shape[0]))
    return state


def _with_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with class token and position table as timm has them; register tokens go through timm's DINOv2 map."""
    for name in ("cls_token", "pos_embed"):
        if name in state and 0 < state[name].ndim < 3:
            state[name] = state[name].reshape(1, -1, state[name].shape[-1])  # (1, N, C)
    if "register_tokens" in state:
        state.setdefault("mask_token", state["register_tokens"])  # by which timm knows the family; it is left out
    return state
