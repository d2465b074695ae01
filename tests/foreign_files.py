"""Files of other houses, made of the weights of a timm model.

Names and shapes are those that ``save_pretrained`` of transformers 5.24 and the official repositories write, put down
here so that neither is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

Names = dict[str, Tensor]
Writer = Callable[[nn.Module], Names]
HALVES = ("weight", "bias")


def dinov3_of_transformers(model: nn.Module) -> Names:
    """DINOv3ViTModel: an ``Eva`` with ``q_bias`` and ``v_bias``, or without, whose biases are then zero."""
    own: Names = model.state_dict()
    file = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.mask_token": own["cls_token"] * 0,
        "embeddings.register_tokens": own["reg_token"],
        **{f"embeddings.patch_embeddings.{half}": own[f"patch_embed.proj.{half}"] for half in HALVES},
        **{f"norm.{half}": own[f"norm.{half}"] for half in HALVES},
    }
    for block in range(len(model.get_submodule("blocks"))):
        ours, theirs = f"blocks.{block}.", f"layer.{block}."
        queries, keys, values = own[f"{ours}attn.qkv.weight"].chunk(3)
        zeros = queries.new_zeros(len(queries))
        file |= {
            f"{theirs}attention.q_proj.weight": queries.clone(),
            f"{theirs}attention.q_proj.bias": own.get(f"{ours}attn.q_bias", zeros).clone(),
            f"{theirs}attention.k_proj.weight": keys.clone(),
            f"{theirs}attention.v_proj.weight": values.clone(),
            f"{theirs}attention.v_proj.bias": own.get(f"{ours}attn.v_bias", zeros).clone(),
            **{f"{theirs}layer_scale{i}.lambda1": own[f"{ours}gamma_{i}"] for i in (1, 2)},
        }
        modules = {"attention.o_proj": "attn.proj", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
        modules |= {"norm1": "norm1", "norm2": "norm2"}
        file |= {f"{theirs}{a}.{half}": own[f"{ours}{b}.{half}"] for a, b in modules.items() for half in HALVES}
    return file


def dinov3(model: nn.Module) -> Names:
    """facebookresearch/dinov3: biases of keys that a mask takes away, and the periods of RoPE."""
    file: Names = {
        "storage_tokens": model.state_dict()["reg_token"],
        "mask_token": model.state_dict()["cls_token"][0] * 0,
    }
    for name, value in model.state_dict().items():
        if name.endswith("attn.q_bias"):
            third = value.new_ones(len(value))
            whole = [value, third, model.state_dict()[name.replace("q_bias", "v_bias")]]
            file[name.replace("q_bias", "qkv.bias")] = third.new_tensor([v for part in whole for v in part.tolist()])
            file[name.replace("q_bias", "qkv.bias_mask")] = third.repeat(3)
        elif not name.endswith(("v_bias", "reg_token")):
            file[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
    file["rope_embed.periods"] = file["storage_tokens"].new_ones(4)
    return file


def dinov2(model: nn.Module) -> Names:
    """facebookresearch/dinov2, with registers if the model has any: then the table has a row for the class token."""
    own: Names = model.state_dict()
    file = {**own, "mask_token": own["cls_token"][0] * 0}
    if "reg_token" in own:
        file["register_tokens"] = file.pop("reg_token")
        row = own["cls_token"] * 0 + 0.5
        file["pos_embed"] = row.new_tensor([[*row[0].tolist(), *own["pos_embed"][0].tolist()]])
        file["cls_token"] = own["cls_token"] - row
    return file


def vit_of_transformers(model: nn.Module) -> Names:
    """ViTForImageClassification."""
    own: Names = model.state_dict()
    file = {"vit.embeddings.cls_token": own["cls_token"], "vit.embeddings.position_embeddings": own["pos_embed"]}
    tops = {"vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm"}
    tops |= {"classifier": "head"}
    file |= {f"{a}.{half}": own[f"{b}.{half}"] for a, b in tops.items() for half in HALVES}
    for block in range(len(model.get_submodule("blocks"))):
        ours, theirs = f"blocks.{block}.", f"vit.encoder.layer.{block}."
        for half in HALVES:
            parts = own[f"{ours}attn.qkv.{half}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                file[f"{theirs}attention.attention.{name}.{half}"] = part.clone()
        modules = {"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
        modules |= {"layernorm_before": "norm1", "layernorm_after": "norm2"}
        file |= {f"{theirs}{a}.{half}": own[f"{ours}{b}.{half}"] for a, b in modules.items() for half in HALVES}
    return file


def clip(model: nn.Module) -> Names:
    """openai/CLIP and open_clip: the tower for images beside the one for texts, with a projection for a head."""
    own: Names = model.state_dict()
    file = {
        "visual.class_embedding": own["cls_token"][0, 0],
        "visual.positional_embedding": own["pos_embed"][0],
        "visual.conv1.weight": own["patch_embed.proj.weight"],
        "visual.proj": own["head.weight"].T.contiguous(),
        "logit_scale": own["head.weight"].sum(),
        "transformer.resblocks.0.ln_1.weight": own["norm.weight"] * 2,
        "token_embedding.weight": own["head.weight"] * 3,
    }
    swaps = {"norm_pre.": "ln_pre.", "norm.": "ln_post.", "blocks.": "transformer.resblocks.", ".norm1.": ".ln_1."}
    swaps |= {".norm2.": ".ln_2.", "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.", "fc1": "c_fc"}
    swaps |= {"fc2": "c_proj"}
    for name, value in own.items():
        if name.startswith(("norm", "blocks")):
            theirs = name
            for ours, other in swaps.items():
                theirs = theirs.replace(ours, other) if not ours.startswith("norm") or name.startswith(ours) else theirs
            file[f"visual.{theirs}"] = value
    return file


def open_clip_with_timm(model: nn.Module) -> Names:
    """open_clip with a tower of timm."""
    own: Names = model.state_dict()
    return {
        **{f"visual.trunk.{name}": value for name, value in own.items()},
        "text.token_embedding.weight": own["pos_embed"] * 2,
        "logit_bias": own["pos_embed"].sum(),
    }


def sam(model: nn.Module) -> Names:
    """facebookresearch/segment-anything: the encoder for images beside the parts behind it."""
    own: Names = model.state_dict()
    return {
        **{f"image_encoder.{name.replace('mlp.fc', 'mlp.lin')}": value for name, value in own.items()},
        "prompt_encoder.no_mask_embed.weight": own["pos_embed"].flatten(),
        "mask_decoder.iou_token.weight": own["pos_embed"].flatten() * 2,
    }


def sam2(model: nn.Module) -> Names:
    """facebookresearch/sam2: the trunk of the encoder for images beside its neck and the parts behind it.

    Names of sam2/modeling at 2b90b9f; its MLP is a list of layers.
    """
    own: Names = model.state_dict()
    names = {name: re.sub(r"mlp\.fc([12])", lambda m: f"mlp.layers.{int(m[1]) - 1}", name) for name in own}
    return {
        **{f"image_encoder.trunk.{names[name]}": value for name, value in own.items()},
        "image_encoder.neck.convs.0.conv.weight": own["patch_embed.proj.weight"] + 1,
        "memory_attention.layers.0.norm1.weight": own["blocks.0.norm1.weight"] + 1,
        "no_mem_embed": own["blocks.0.norm1.weight"][None, None] + 2,
        "sam_mask_decoder.iou_token.weight": own["blocks.0.norm1.weight"][None] + 3,
    }
