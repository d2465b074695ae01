"""DivPrune: the tokens that are farthest from each other (arXiv 2503.02175)."""

from __future__ import annotations

from effvit.selectors.base import Choice, Features, SelectionSizes, Selector
from effvit.selectors.spread import cosine_macs, cosines_of, holds_table, isolated, spread

__all__ = ["DivPrune"]


class DivPrune(Selector):
    """Keep K tokens such that the smallest distance between two of them is large (DivPrune, 2503.02175, CVPR 2025).

    The greedy 2-approximation of max-min dispersion by 1 - cosine, begun with the token whose nearest other one is
    farthest; llava_arch.py@799e2d9, of which no line is used here (CC-BY-NC). No text, no attention, no class token.
    Deviations: the release runs on the language model's input embeddings, behind the projector: give those as
    ``tokens`` for its results. Of duplicates it picks one twice, here none. A share of the cells is rounded as there,
    halves to even.
    """

    name = "divprune"
    summary = "keep the tokens that are farthest from each other (2503.02175)"

    def rounded(self, share: float, cells: int) -> int:
        return round(share * cells)

    def cost(self, at: SelectionSizes) -> int:
        of_first = 0 if holds_table(at.tokens, at.kept) else at.tokens**2 * at.dim
        return of_first + cosine_macs(at)

    def choose(self, features: Features, kept: int) -> Choice:
        cosines = cosines_of(features.x, kept)
        return Choice(spread(cosines, isolated(cosines), kept)[0])
