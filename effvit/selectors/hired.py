"""HiRED: a budget of tokens shared out over the crops of an image by what the thumbnail attends to (2408.10945)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effvit.protocols import Size
from effvit.schedule import check_fraction, check_switch
from effvit.selectors.base import Features, Keep, SelectionSizes, count_members, required_scores
from effvit.selectors.parts import Parts, PartSelector, highest_each

__all__ = ["HiRED", "share_budget"]


def share_budget(early: Tensor, grid: Size, crops: Size, total: int, alpha: float, exact: bool = False) -> Tensor:
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

    Returns:
        (1 + rows * columns,) int64.
    """
    cells, parts = grid[0] * grid[1], crops[0] * crops[1]
    whole = min(int(total * alpha), cells)
    rest = min(total - whole, parts * cells)
    number = int(cells * (1 - alpha))
    salient = early.topk(number).indices
    crop = salient // grid[1] * crops[0] // grid[0] * crops[1] + salient % grid[1] * crops[1] // grid[1]
    found = count_members(crop.unsqueeze(0), parts)[0]  # (parts,)
    if number == 0:  # nothing to share by: evenly, for which the release divides by zero
        found, number = torch.ones_like(found), parts
    shares = (found * rest // number).clamp(max=cells)
    if exact:
        whole += min(total - whole - rest, cells - whole)
        shares = give_rest(shares, found * rest % number, found, rest, cells)
    return torch.cat([shares.new_full((1,), whole), shares])


def give_rest(shares: Tensor, remainders: Tensor, found: Tensor, total: int, cells: int) -> Tensor:
    """Shares (P,) raised to ``total``: one more by the largest remainders, then all by most ``found``, up to ``cells``.

    Of equals the larger ``found`` comes first, then the earlier crop.
    """
    by_remainder = (remainders * (found.max() + 1) + found).argsort(descending=True, stable=True)
    by_found = found.argsort(descending=True, stable=True)
    for order, most in ((by_remainder, 1), (by_found, cells)):
        space = (cells - shares[order]).clamp(max=most)
        given = torch.minimum(space, (total - shares.sum() - (space.cumsum(0) - space)).clamp(min=0))
        shares = shares.index_add(0, order, given)
    return shares


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

    def rounded(self, share: float, cells: int) -> int:
        return int(share * cells)  # as the release has it, to the last bit

    def count_all(self, keep: Keep, grid: Size, images: int) -> int | None:
        cells = images * math.prod(grid)
        total = self.number(keep, cells)
        return total if self.exact or total == cells else None

    def cost_parts(self, at: SelectionSizes, parts: Parts, keep: Keep) -> int:
        return 0

    def choose_parts(self, features: Features, parts: Parts, keep: Keep) -> Tensor:
        scores, early = required_scores(self, features), features.early
        assert early is not None
        total = self.number(keep, scores.numel())
        if total == scores.numel():  # more than the thumbnail's share of them may hold
            return torch.ones_like(scores, dtype=torch.bool)
        numbers = share_budget(parts.split(early)[0], features.grid, parts.crops, total, self.alpha, self.exact)
        return highest_each(scores, parts.join(numbers[0], numbers[1:]))
