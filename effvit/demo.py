"""What ``effvit demo`` compares, and the pictures whose tokens it shows."""

from __future__ import annotations

from typing import Any

__all__ = ["SEEING", "SEEING_VARIANTS", "SHOWN", "VARIANTS"]

Variants = tuple[tuple[str, dict[str, Any]], ...]

SEEING = "vit_nano_patch4_28"  # its weights come with the package
# Of methods whose defaults are meant for 196 patches, the settings that suit 49 (docs/accuracy.md).
SEEING_VARIANTS: Variants = (
    ("evit", {"keep_rate": 0.9}),
    ("evit", {"keep_rate": 0.7}),
    ("tome", {"r": 2}),
    ("tome", {"r": 4}),
    ("gtp", {"num_prop": 2}),
    ("ats", {"keep_rate": 0.8}),
    ("zero_tprune", {"keep_rate": 0.98}),
    ("dymu", {"r_total": 28}),
    ("expedite", {"keep_rate": 0.8}),
    ("hot", {"keep_rate": 0.8}),
)
SHOWN = ("pullover-0", "sandal-1", "sneaker-0", "bag-1")  # clothes of four shapes

# For costs alone: a host of the usual size, on photographs.
VARIANTS: Variants = (
    ("evit", {"keep_rate": 0.5}),
    ("tome", {"r": 13}),
    ("gtp", {"num_prop": 8}),
    ("ats", {}),
    ("zero_tprune", {}),
    ("dymu", {"r_total": 96}),
    ("expedite", {}),
    ("hot", {}),
)
