"""Parameter names of the released TinyViT, also inside MobileSAM -> timm's.

microsoft/Cream and ChaoningZhang/MobileSAM merge patches at the end of a stage, where timm does it at the start of the
next.
"""

from __future__ import annotations

from effvit.hosts._names import Rules, renamed

__all__ = ["timm_name"]

RENAMED: Rules = (
    (r"^patch_embed\.seq\.([02])\.", lambda m: f"patch_embed.conv{1 + int(m[1]) // 2}."),
    (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"^norm_head\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def timm_name(name: str) -> str:
    """timm's name of an entry of an official file; timm's own names stay."""
    return renamed(name, RENAMED)
