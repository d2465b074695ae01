"""What a selector is: a method that chooses or merges the tokens that leave a vision tower."""

from __future__ import annotations

import inspect
import math
import operator
from numbers import Integral, Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effvit.protocols import Setting, Settings, Size
from effvit.tokens import flat_rows, take_rows

__all__ = [
    "Choice",
    "Features",
    "Keep",
    "SelectionSizes",
    "Selector",
    "add_rows",
    "count_members",
    "left_over",
    "required_scores",
    "rows_of",
    "unit_rows",
]

Keep = int | float | None
"""How many tokens stay: a number, a share of the cells in (0, 1], or what the method does by itself."""


class Features(NamedTuple):
    """What leaves a tower, and what a selector may choose by. N is the number of cells, or of the tokens left of them.

    Attributes:
        x: (B, N, C) tokens, in image order, without prefix tokens.
        grid: (H, W) cells of the dense grid.
        scores: (B, N) how much each token matters, in float32 (float64 for float64); None where nobody said.
        keys: (B, N, D) keys of the attention that the scores are from, likewise.
        relevance: (B, N) how much each token has to do with a text, from the caller.
        early: (B, N) scores of the first block, for a method that asks for them.
        outliers: (B, N) True for tokens of a norm above ``max_norm``, whose scores are the lowest; None without it.
    """

    x: Tensor
    grid: Size
    scores: Tensor | None = None
    keys: Tensor | None = None
    relevance: Tensor | None = None
    early: Tensor | None = None
    outliers: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.x.shape[1]


class Choice(NamedTuple):
    """What a selector chose, in any order.

    Attributes:
        ids: (B, K) places of the tokens in ``Features.x``, each at most once; those of merged tokens are that of one
            of their members.
        tokens: (B, K, C) what leaves in their place; None: the tokens as they are.
        group: (B, N) for each token of ``Features.x`` its place in ``ids``, -1 for what is dropped; None: tokens go
            into nothing but themselves.
        valid: (B, K) False where ``ids`` is padding; None: nowhere.
        mixed: Every token is a mixture of all, so that there are no groups.
    """

    ids: Tensor
    tokens: Tensor | None = None
    group: Tensor | None = None
    valid: Tensor | None = None
    mixed: bool = False


class SelectionSizes(NamedTuple):
    """What a selector meets, for its closed form.

    Attributes:
        tokens: N it chooses from.
        kept: K that leave.
        dim: C channels of a token: those of all patches of a cell, or those that the tower's own projector makes.
        key_dim: D channels of a key, 0 for a method that asks for none.
        grid: (H, W) cells.
    """

    tokens: int
    kept: int
    dim: int
    key_dim: int
    grid: Size


class Selector(nn.Module):
    """A method that says which tokens leave a tower, and what becomes of the others.

    A method is a subclass with ``choose``, or with ``adapt`` if it finds by itself how many tokens an image needs, or
    with both; keyword arguments of its constructor are its settings. It decides for each image alone. Whoever calls it
    puts the tokens in image order, and asks for no choice where all tokens stay.

    Attributes:
        name: The method's name, as in ``effvit.list_selectors()``.
        summary: One line on the method with its source.
        row: What ``Features.scores`` is made of, one of ``effvit.hosts.tower_exit.ROWS``; None for no scores.
        keys: What ``Features.keys`` is made of, one of ``effvit.hosts.tower_exit.KEYS``; None for no keys.
        weighs_scores: Scores are weights too, so that infinite ones are refused; else their order alone counts.
        reads_last: Scores and keys are those of the tower's last block, whichever block the tokens leave.
        reads_first: ``Features.early`` is asked for.
        reads_relevance: ``Features.relevance`` is used where the caller gives it.
        reads_padding: The size of the image, by which the padding of its crops is known, is used where it is given.
        whole_grid: The method needs all cells in place, so that no method may have reduced them in the tower.
        takes: Which function takes it: "select_tokens" for images one by one, "select_parts" or "select_video".
        learns: It has weights, without which its name means nothing, and changes tokens even where all of them stay.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    row: ClassVar[str | None] = None
    keys: ClassVar[str | None] = None
    weighs_scores: ClassVar[bool] = False
    reads_last: ClassVar[bool] = False
    reads_first: ClassVar[bool] = False
    reads_relevance: ClassVar[bool] = False
    reads_padding: ClassVar[bool] = False
    whole_grid: ClassVar[bool] = False
    takes: ClassVar[str] = "select_tokens"
    learns: ClassVar[bool] = False

    @classmethod
    def defaults(cls) -> Settings:
        """The method's settings and their defaults, read from the signature of its constructor."""
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @classmethod
    def untrained(cls, dim: int, **settings: Setting) -> Selector:
        """One with weights made anew, if it has any, for tokens of ``dim`` channels: good for what it costs alone."""
        return cls(**settings)

    @classmethod
    def needs(cls) -> list[str]:
        """What the method reads beside the tokens, in words."""
        block = "the last block" if cls.reads_last else "the block they leave"
        read = {"received": "attention received", "logits": "the class token's logits"}
        row = None if cls.row is None else f"{read.get(cls.row, 'attention of the class token')} in {block}"
        found = [row, "its keys" if cls.keys else None, "the first block's attention" if cls.reads_first else None]
        found += ["a relevance to a text, if given" if cls.reads_relevance else None]
        found += ["weights of its own" if cls.learns else None]
        found += ["all cells in place" if cls.whole_grid else None]
        where = {"select_parts": "the crops of an image", "select_video": "the frames of a video"}
        return [text for text in [where.get(cls.takes), *found] if text]

    def settle(self, grid: Size) -> None:
        """Take note of the grid of cells (H, W) that will be met, before anything is recorded."""

    def rounded(self, share: float, cells: int) -> int:
        """A share of the cells as a number, by the rule of the method's official code; rounded down if it has none.

        A share such as 1 / 49 of 49 cells is one cell, though their product is less than 1.
        """
        return int(share * cells + 1e-6)

    def count(self, keep: Keep, grid: Size) -> int | None:
        """How many tokens leave for a grid of cells (H, W); None if that depends on the image.

        Raises:
            ValueError: More tokens than cells, none, or a number that the method cannot give.
        """
        return None if keep is None and self.adapts else self.number(keep, math.prod(grid))

    def count_all(self, keep: Keep, grid: Size, images: int) -> int | None:
        """How many tokens leave that many images of a grid together; ``count`` of each, but for a shared budget."""
        kept = self.count(keep, grid)
        return None if kept is None else kept * images

    @property
    def adapts(self) -> bool:
        """Whether the method finds by itself how many tokens an image needs, where nobody says."""
        return type(self).adapt is not Selector.adapt

    def number(self, keep: Keep, cells: int) -> int:
        """``keep`` as a number of cells."""
        if keep is None:
            raise ValueError(f"{self.name} needs keep: a number of tokens, 1 to {cells} here, or a share in (0, 1]")
        if self.adapts and type(self).choose is Selector.choose:
            raise ValueError(
                f"{self.name} finds by itself how many tokens an image needs, got keep={keep!r}; leave it out"
            )
        if isinstance(keep, Integral) and not isinstance(keep, bool):  # NumPy's too
            if not 1 <= keep <= cells:
                raise ValueError(f"keep must be in 1 to {cells}, the cells of the grid, got {keep}; 1.0 keeps all")
            return int(keep)
        if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
            raise ValueError(f"keep must be a whole number of tokens or a share in (0, 1], got {keep!r}")
        cells = operator.index(cells)  # a number, not the symbol of a trace, which cannot be rounded
        kept = self.rounded(float(keep), cells)
        if kept < 1:
            raise ValueError(f"keep={keep} of {cells} cells leaves no token; keep at least {1 / cells:.2g}")
        return kept

    def share(self, keep: Keep) -> float:
        """``keep`` as a share of all cells, for a method that takes nothing else; a ValueError for anything else."""
        if keep is None or isinstance(keep, Integral) or not isinstance(keep, Real) or not 0 < keep <= 1:
            raise ValueError(f"{self.name} shares out a ratio, got keep={keep!r}; give a share in (0, 1], such as 0.25")
        return float(keep)

    def check(self, kept: int, features: Features) -> None:
        """Raise a ValueError if the method cannot choose ``kept`` of these tokens; asked where some must leave."""

    def cost(self, at: SelectionSizes) -> int:
        """MACs of ``choose`` for one image in closed form, beside what is read of the tower's attention.

        It restates the arithmetic of the paper; ``effvit.measure.closed_form`` sums it up.

        Raises:
            NotImplementedError: The method has no closed form.
        """
        raise NotImplementedError

    def choose(self, features: Features, kept: int) -> Choice:
        """The tokens that leave, ``kept`` of them for every image."""
        raise NotImplementedError

    def adapt(self, features: Features) -> Choice:
        """The tokens that leave, as many as each image needs."""
        raise NotImplementedError


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (B, N, C) with norm 1; a row of zeros stays, so that it is orthogonal to all."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def required_scores(selector: Selector, features: Features) -> Tensor:
    """The scores, or an error for a caller of ``choose`` who has none."""
    if features.scores is None:
        raise ValueError(f"{selector.name} chooses by scores, but got features alone; give scores (B, N)")
    return features.scores


def left_over(kept: Tensor, number: int) -> Tensor:
    """Places (B, N - K) that are not in ``kept`` (B, K), ascending, of ``number`` places."""
    place = torch.arange(number, device=kept.device).expand(kept.shape[0], -1)  # (B, N)
    behind = place.scatter_add(1, kept, torch.full_like(kept, number))  # chosen ones go behind all others
    return behind.sort(dim=1).values[:, : number - kept.shape[1]]


def add_rows(x: Tensor, place: Tensor, members: Tensor) -> Tensor:
    """x (B, M, C) plus each of ``members`` (B, n, C) at its ``place`` (B, n)."""
    rows = flat_rows(place, x.shape[1]).flatten()
    return x.flatten(0, 1).index_add(0, rows, members.flatten(0, 1)).view_as(x)


def count_members(place: Tensor, number: int) -> Tensor:
    """(B, number) how many of ``place`` (B, n) are each of 0 to number - 1."""
    none = torch.zeros(place.shape[0], number, dtype=torch.int64, device=place.device)
    return none.scatter_add(1, place, torch.ones_like(place))


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, K) of x (B, N, C): (B, K, C)."""
    return take_rows(x, flat_rows(index, x.shape[1]))
