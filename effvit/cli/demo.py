"""What ``effvit demo`` compares, and the pictures whose tokens it shows."""

from __future__ import annotations

from typing import Any

from effvit.reducers import METHODS

__all__ = ["SEEING", "SHOWN", "demo_variants"]

SEEING = "vit_nano_patch4_28"  # its weights come with the package
SHOWN = ("pullover-0", "sandal-1", "sneaker-0", "bag-1")  # clothes of four shapes


def demo_variants(host: Any) -> list[tuple[str, dict[str, Any]]]:
    """(method, settings) of every method that has something to show on that host."""
    num_patches = host.patch_embed.num_patches
    return [(name, settings) for name, method in METHODS.items() for settings in method.demo(num_patches)]
