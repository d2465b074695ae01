"""HiRED: a budget of tokens shared out over the crops of an image by what the thumbnail attends to (2408.10945)."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_fraction, check_switch
from effvit.selectors.base import Features, Keep, required_scores
from effvit.selectors.parts import Parts, PartSelector, highest_each

__all__ = ["HiRED", "share_budget"]


def share_budget(early: Tensor, grid: Size, crops: Size, total: int, alpha: float, exact: bool = False) -> list[int]:
    """How many tokens the thumbnail and each crop, row by row, may keep of ``total`` (HiRED, 2408.10945, section 3.2).

    The thumbnail gets int(T alpha); the crops share the rest by how many of the int(N (1 - alpha)) most attended
    patches of the thumbnail lie in the part that each crop shows. modeling_llava_next.py@502d6dd counts them in strips
    of the thumbnail instead, which is the same for one column of crops alone.

    Args:
        early: (N,) class attention of the thumbnail in the first block.
        grid: (H, W) its cells.
        crops: (rows, columns).
        total: T, for all parts.
        alpha: Share of the thumbnail.
        exact: Give what rounding down leaves over to the largest remainders, so that the parts sum to ``total``; the
            release loses it.
    """
    cells, parts = grid[0] * grid[1], crops[0] * crops[1]
    whole = min(int(total * alpha), cells)
    rest = min(total - whole, parts * cells)
    salient = early.topk(int(cells * (1 - alpha))).indices
    crop = salient // grid[1] * crops[0] // grid[0] * crops[1] + salient % grid[1] * crops[1] // grid[1]
    found = torch.bincount(crop, minlength=parts).tolist()
    found = found if len(salient) else [1] * parts  # nothing to share by: evenly, for which the release divides by zero
    shares = [min(count * rest // sum(found), cells) for count in found]
    if exact:
        whole += min(total - whole - rest, cells - whole)
        remainders = [count * rest % sum(found) for count in found]
        while sum(shares) < rest:
            open_ones = [i for i in range(parts) if shares[i] < cells]
            best = max(open_ones, key=lambda i: (remainders[i], found[i], -i))
            shares[best], remainders[best] = shares[best] + 1, -1
    return [whole, *shares]


class HiRED(PartSelector):
    """Keep the most attended tokens of a thumbnail and of its crops, within one budget (HiRED, 2408.10945).

    ``share_budget`` by the class attention of the first block, the choice in each part by that of the block the tokens
    leave. The released code lays the tokens of non-square crops out wrongly and cuts the thumbnail in strips; here they
    stand where they are.

    Args:
        alpha: Share of the budget that the thumbnail gets, in (0, 1].
        exact: Keep exactly the budget, see ``share_budget``.
    """

    name = "hired"
    summary = "share a budget over crops by what the thumbnail attends to (2408.10945)"
    row = "attention"
    reads_first = True

    def __init__(self, *, alpha: float = 0.5, exact: bool = False) -> None:
        super().__init__()
        self.alpha = check_fraction("alpha", alpha)
        self.exact = check_switch("exact", exact)

    def choose_parts(self, features: Features, parts: Parts, keep: Keep) -> Tensor:
        scores, early = required_scores(self, features), features.early
        assert early is not None
        total = self.number(keep, scores.numel())
        counts = share_budget(parts.split(early)[0], features.grid, parts.crops, total, self.alpha, self.exact)
        numbers = torch.tensor(counts, device=scores.device)
        return highest_each(scores, parts.join(numbers[0], numbers[1:]))
