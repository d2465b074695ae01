"""The cells that the class token attends to most: what every other score has to beat."""

from __future__ import annotations

from effvit.selectors.base import Choice, Features, SelectionSizes, Selector, required_scores

__all__ = ["ClassAttention"]


class ClassAttention(Selector):
    """Keep the K cells with the largest scores, by default attention of the class token in the block they leave.

    The common part of VisionZip (2412.04467), HiRED (2408.10945) and EViT (2202.07800): the mean over the heads, the
    class token's own column left out.
    """

    name = "class_attention"
    summary = "keep the cells that the class token attends to most"
    row = "attention"

    def cost(self, at: SelectionSizes) -> int:
        return 0

    def choose(self, features: Features, kept: int) -> Choice:
        return Choice(required_scores(self, features).topk(kept, dim=1).indices)
