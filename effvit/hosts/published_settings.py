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

PUBLISHED: dict[str, NamedSettings] = {
    f"expedite_samvit_huge_patch16_at{block}_{clusters}": NamedSettings(
        "expedite",
        "samvit_huge_patch16",
        {"cluster_at": block, "num_clusters": clusters, "norm": "official"},
    )
    for block, clusters in EXPEDITE_SAM
}
"""Name -> what it makes."""
