"""Parameter names of the released STViT-R on Swin -> ours.

Both repositories (changsn/STViT-R@b4a27a0, changsn/STViT-R-Object-Detection@8b8eb1e) number the blocks of the third
stage through and merge patches at the end of a stage, where timm and we do it at the start of the next.
"""

from __future__ import annotations

from effvit.hosts._names import Rules, renamed

__all__ = ["UNIT", "official_name"]

# What the six blocks of a unit are called here, in the order of the released code.
UNIT = ("block", "semantic.stgm1", "semantic.stgm2", "semantic.blocks.0", "semantic.blocks.1", "recover")
CONV = {"c": "conv", "bn": "bn"}
RENAMED: Rules = (
    (r"^patch_embed\.proj\.([02])\.(c|bn)\.", lambda m: f"stem.conv{1 + int(m[1]) // 2}.{CONV[m[2]]}."),
    (r"^patch_embed\.", "stem."),
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^layers\.2\.semantic_token2$", "stages.2.blocks.0.semantic.stgm2.global_centres"),
    (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.2\.blocks\.(\d+)\.", lambda m: f"stages.2.blocks.{int(m[1]) // 6}.{UNIT[int(m[1]) % 6]}."),
    (r"^layers\.", "stages."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"\.conv_pos\.proj\.0\.", ".conv_pos."),
    (r"(semantic\.blocks\.\d+)\.attn\.(relative_position_bias_table)$", r"\1.rel_pos.\2"),
)


def official_name(name: str) -> str | None:
    """Our name of an entry of an official file, or of our own; None for tables that are computed."""
    if name.endswith(("attn_mask", "relative_position_index")):
        return None
    return renamed(name, RENAMED)
