"""ToDRE: diverse tokens, beginning with the one the class token attends to most (arXiv 2505.18757)."""

from __future__ import annotations

from effvit.schedule import check_choice
from effvit.selectors.base import Choice, Features, SelectionSizes, Selector, required_scores
from effvit.selectors.spread import cosine_macs, cosines_of, spread

__all__ = ["ToDRE"]


class ToDRE(Selector):
    """Keep K diverse tokens, the most attended one first (ToDRE, 2505.18757); its first stage, behind the encoder.

    A reading of the abstracts, since no code was found: that the greedy choice begins with the largest class attention,
    and that distances are 1 - cosine of the tokens, is ours.

    Args:
        version: Of the paper. "v1" picks the token with the largest distance to the nearest of those picked (k-centre),
            "v2" that with the largest sum of distances to all of them (max-sum diversification).
    """

    name = "todre"
    summary = "keep diverse tokens, beginning with the most attended one (2505.18757)"
    row = "attention"

    def __init__(self, *, version: str = "v2") -> None:
        super().__init__()
        check_choice("version", version, ("v1", "v2"))
        self.version = version

    def cost(self, at: SelectionSizes) -> int:
        return cosine_macs(at)

    def choose(self, features: Features, kept: int) -> Choice:
        first = required_scores(self, features).argmax(dim=1, keepdim=True)
        return Choice(spread(cosines_of(features.x, kept), first, kept, total=self.version == "v2")[0])
