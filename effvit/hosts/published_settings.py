"""Settings that authors published for a host, as names of their own in the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from effvit.protocols import Setting

__all__ = ["PUBLISHED", "NamedSettings"]


class NamedSettings(NamedTuple):
    """A method on a host with settings.

    Attributes:
        method: Name of the method.
        host: timm's name of the host.
        settings: What differs from the defaults of the method.
    """

    method: str
    host: str
    settings: Mapping[str, Setting]


# Expedite on SAM ViT-H: block and clusters of a 14 x 14 window in the table of the README of Expedit-SAM@75a1c30. All
# else are the defaults of its scripts/amg.py: those of the method here, but for the norm of the reconstruction.
EXPEDITE_SAM = ((18, 121), (14, 100), (8, 100), (8, 81), (6, 81))

# Expedite on Swin-L in Mask2Former: block, iterations, temperature, window and k in the configs of
# Expedit-Mask2Former@5d47cbe for ADE20K (semantic, 7), COCO (panoptic, 10; instances, 12), ADE20K (panoptic) and
# YouTube-VIS 2019 (14). All have 8 x 8 clusters of a 12 x 12 window, restored at the end of the third stage.
EXPEDITE_SWIN = ((7, 5, 0.01, 5, 10), (10, 5, 0.05, 7, 10), (12, 5, 0.01, 11, 60), (14, 4, 0.01, 7, 49))

PUBLISHED: dict[str, NamedSettings] = {
    f"expedite_samvit_huge_patch16_at{block}_{clusters}": NamedSettings(
        "expedite",
        "samvit_huge_patch16",
        {"cluster_at": block, "num_clusters": clusters, "norm": "official"},
    )
    for block, clusters in EXPEDITE_SAM
} | {
    f"expedite_swin_large_patch4_window12_384_at{block}_64": NamedSettings(
        "expedite",
        "swin_large_patch4_window12_384",
        {
            "cluster_at": block,
            "restore_at": 22,
            "num_clusters": 64,
            "num_iters": num_iters,
            "temperature": temperature,
            "window_size": window_size,
            "k": k,
            "norm": "official",
        },
    )
    for block, num_iters, temperature, window_size, k in EXPEDITE_SWIN
}
"""Name -> what it makes."""
