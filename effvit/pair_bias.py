"""Biases on the attention logits of pairs of tokens, as hosts with relative positions have them, for tokens that moved.

A bias belongs to two places of the full sequence. Tokens keep the place of their anchor, so the bias of any two of them
is an entry of the host's table; only those that somebody asks for are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from effvit.tokens import TokenMap, fx_leaf, take_rows

__all__ = ["PairBias", "biases_between"]


@fx_leaf
def biases_between(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Entries of a table for the queries and keys of each image.

    Args:
        table: (heads, F, F), or (1, heads, F, F), between the F places of the full sequence.
        queries: (B, Q) places of the queries.
        keys: (B, K) places of the keys.

    Returns:
        (B, heads, Q, K).
    """
    number = table.shape[-1]
    pairs = (queries * number).unsqueeze(2) + keys.unsqueeze(1)  # (B, Q, K)
    entries = table.reshape(-1, number * number).index_select(1, pairs.flatten())  # (heads, B * Q * K)
    return entries.unflatten(1, pairs.shape).transpose(0, 1)


class PairBias(NamedTuple):
    """The bias of each pair of query and key in one block.

    Attributes:
        table: (heads, F, F) between the F places of the full sequence, prefix tokens in front; or (1, heads, F, F).
            While nothing moved it is used as it is, since kernels are chosen by its dimensions and timm's shall run.
        places: (B, P+N) place of each token in the full sequence.
        moved: False while the tokens are the full sequence.
    """

    table: Tensor
    places: Tensor
    moved: bool

    @classmethod
    def of(cls, table: Tensor, tokens: TokenMap) -> PairBias:
        """The bias between the tokens of a map that is not packed."""
        ranges = tokens.layout.ranges
        places = ranges.behind_prefix(tokens.anchor) + tokens.num_prefix if tokens.moved else ranges.sequence
        return cls(table, places, tokens.moved)

    def whole(self) -> Tensor:
        """Between all tokens: (B, heads, P+N, P+N); the table itself, for all images, while nothing moved."""
        return biases_between(self.table, self.places, self.places) if self.moved else self.table

    def leading(self, number: int) -> Tensor:
        """Of the first ``number`` tokens as queries, which may be those of class: (B or 1, heads, number, P+N)."""
        if not self.moved:
            return self.table[..., :number, :]
        return biases_between(self.table, self.places[:, :number], self.places)

    def picked(self, rows: Tensor) -> Tensor:
        """Of the queries in the rows (B, Q) of the flattened sequence: (B, heads, Q, P+N)."""
        return biases_between(self.table, take_rows(self.places, rows), self.places)
