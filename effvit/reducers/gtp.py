"""GTP: hand the content of the tokens that leave to their neighbours on a graph (arXiv 2311.03035)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState, EditMap, MapSums, SumMap, map_sums
from effvit.protocols import Settings
from effvit.recording import is_recorded
from effvit.reducers.base import FEW_PATCHES, Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule, tokens_by_block
from effvit.reducers.cost import BlockSizes, Change
from effvit.schedule import (
    check_blocks,
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_switch,
    per_block,
    spread_ladder,
)
from effvit.tokens import Kept, TokenMap, fx_leaf, take_rows, wide_dtype, wide_product, without_autocast

__all__ = ["GRAPH_TYPES", "GTP", "PROPAGATIONS", "SELECTIONS", "Graph", "propagation_graph", "sparsify_map"]

GRAPH_TYPES = ("Spatial", "Semantic", "Mixed")
PROPAGATIONS = ("GraphProp", "Mean", "None")


def _dissimilarity(rows: Tensor) -> Tensor:
    """Minus the summed cosine of each row (B, N, P+N) to all rows: (B, N)."""
    rows = F.normalize(rows, dim=-1)
    return -wide_product(rows, rows.sum(dim=1).unsqueeze(-1)).squeeze(-1)


# Scores from the diagonal and the column sums (B, heads, P+N) of the softmax map for all P+N keys, GTP section 3.2 and
# models_v3.py@97a1178.
MAP_SCORES: dict[str, Callable[[MapSums], Tensor]] = {
    "IMGAttnMean": lambda sums: sums.received.mean(1),
    "IMGAttnMax": lambda sums: sums.received.amax(1),
    "DiagAttnMean": lambda sums: sums.diagonal.mean(1),
    "DiagAttnMax": lambda sums: sums.diagonal.amax(1),
    "MixedAttnMean": lambda sums: sums.diagonal.mean(1) * sums.received.mean(1),
    "MixedAttnMax": lambda sums: sums.diagonal.amax(1) * sums.received.amax(1),
    "SumAttnMax": lambda sums: sums.diagonal.amax(1) + sums.received.amax(1),
}
# Scores from the rows of the class token (B, heads, P+N): no map needed.
CLASS_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "CLSAttnMean": lambda rows: rows.mean(1),
    "CLSAttnMax": lambda rows: rows.amax(1),
}
# Scores from the patch rows of the map, reduced over heads.
ROW_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "CosSimMean": lambda rows: _dissimilarity(rows.mean(1)),
    "CosSimMax": lambda rows: _dissimilarity(rows.amax(1)),
}
SELECTIONS = (*MAP_SCORES, *CLASS_SCORES, *ROW_SCORES, "Random")


@fx_leaf
def sparsify_map(weights: Tensor, sparsity: float) -> Tensor:
    """The softmax map (B, heads, N, N) with all but about ``sparsity * N * N`` largest entries of each head zero.

    Entries below the int(N * N * (1 - sparsity))-th smallest of their head are zeroed and nothing is
    renormalised, as in models_v3.py@97a1178.
    """
    dropped = int(weights.shape[-1] ** 2 * (1 - sparsity))
    if dropped == 0:
        raise ValueError(
            f"sparsity {sparsity} keeps every entry of a {weights.shape[-1]} x {weights.shape[-1]} attention map; "
            "use sparsity=1 for images this small"
        )
    threshold = weights.detach().flatten(2).kthvalue(dropped, dim=-1).values  # (B, heads)
    return weights * (weights >= threshold[..., None, None])


class Graph(NamedTuple):
    """The graph of the embedded patches: 8 touching neighbours, ``num_neighbours`` similar ones or both of each patch.

    Attributes:
        neighbours: (B, N, K) patches that hand content to each patch; the patch itself where it has fewer than K.
        shares: (B, N, K) part of a neighbour's content that it hands over, D^-1/2 A D^-1/2.
    """

    neighbours: Tensor
    shares: Tensor


SIMILARITIES_AT_ONCE = 2**20  # 4 MiB


def similar_patches(patches: Tensor, number: int) -> Tensor:
    """(B, N, number) most similar other patches of each by cosine.

    Only some rows of the similarity are held, but where it is recorded, since other images may be larger.
    """
    batch, length = patches.shape[:2]
    unit = F.normalize(patches, dim=-1)
    place = torch.arange(length, device=patches.device)
    rows = length if is_recorded(patches) else max(1, SIMILARITIES_AT_ONCE // (batch * length))
    found = []
    for part, itself in zip(unit.split(rows, dim=1), place.split(rows), strict=True):
        similarity = wide_product(part, unit.transpose(1, 2))  # (B, rows, N)
        similarity = similarity.masked_fill(itself[:, None] == place, -2)
        found.append(similarity.topk(number, dim=-1).indices)
    return torch.cat(found, dim=1)


def touching_patches(like: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, 8) patches that touch each, diagonally too; the patch itself beyond the edges of the grid."""
    place = torch.arange(grid[0] * grid[1], device=like.device)[:, None]  # (N, 1)
    row, column = torch.div(place, grid[1], rounding_mode="floor"), place % grid[1]
    step = torch.arange(8, device=like.device)
    step = step + (step > 3)  # the fifth of the nine is the patch itself
    row, column = row + torch.div(step, 3, rounding_mode="floor") - 1, column + step % 3 - 1  # (N, 8)
    inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
    return torch.where(inside, row * grid[1] + column, place)


def apart(place: Tensor, other: Tensor, grid: tuple[int, int]) -> Tensor:
    """True where two patches do not touch."""
    row = torch.div(place, grid[1], rounding_mode="floor") - torch.div(other, grid[1], rounding_mode="floor")
    return torch.maximum(row.abs(), (place % grid[1] - other % grid[1]).abs()) > 1


@fx_leaf
def propagation_graph(x: Tensor, grid: tuple[int, int], num_prefix: int, graph_type: str, num_neighbours: int) -> Graph:
    """The normalised graph D^-1/2 A D^-1/2 of the embedded patches (GTP section 3.3, models_v3.py@97a1178).

    D holds the row sums of the directed A on both sides. A patch without an edge has no share here, where
    the official code divides by zero. Without a prefix token the official threshold is one place lower, which
    gives every patch one neighbour more; that is followed. Of patches that are exactly as similar as the last
    neighbour, as in a blank image without position embedding, the official code takes all, and we only as many as
    were asked for.

    Args:
        x: (B, P+N, C) tokens before the first block.
        grid: (H, W) with H * W = N.
        num_prefix: P.
        graph_type: "Spatial" (the 8 neighbours), "Semantic" (most similar embeddings) or "Mixed" (either).
        num_neighbours: Neighbours in the semantic graph.
    """
    patches = x[:, num_prefix:].detach().to(wide_dtype(x.dtype))  # only compared: nothing for autograd to keep
    similar = num_neighbours if num_prefix else num_neighbours + 1
    if graph_type != "Spatial" and not 0 < similar < patches.shape[1]:
        raise ValueError(
            f"num_neighbours must be at least 1 and at most {patches.shape[1] - (1 if num_prefix else 2)}, "
            f"got {num_neighbours} for {patches.shape[1]} patches"
        )
    place = torch.arange(grid[0] * grid[1], device=x.device)[:, None]  # (N, 1)
    if graph_type == "Semantic":
        neighbours = similar_patches(patches, similar)  # (B, N, K)
    else:
        neighbours = touching_patches(patches, grid).expand(patches.shape[0], -1, -1)  # (B, N, 8)
    if graph_type == "Mixed":
        more = similar_patches(patches, similar)  # (B, N, similar)
        more = torch.where(apart(place, more, grid), more, place)  # those that touch are neighbours already
        neighbours = torch.cat([neighbours, more], dim=-1)  # (B, N, 8 + similar)
    edges = (neighbours != place).to(patches.dtype)
    degree = edges.sum(-1)  # (B, N)
    root = torch.where(degree > 0, degree, 1).rsqrt()
    others = root.gather(1, neighbours.flatten(1)).unflatten(1, neighbours.shape[1:])  # (B, N, K)
    return Graph(neighbours, edges * root.unsqueeze(-1) * others)


class GTP(Reducer):
    """Drop the tokens that matter least and propagate them to graph neighbours (GTP-ViT, 2311.03035, section 3).

    Each block ranks the patches by ``selection``, removes the last ``num_prop`` and adds
    ``alpha * G[kept, removed] @ removed`` to those that stay, which leave in descending order of score. The
    graph is built once from the embedded image, as at most ``8 + num_neighbours`` (without a prefix token one more)
    neighbours of a patch. The official sub-matrices of G are never made: a kept token finds its node by its anchor.

    No softmax map is held but for a ``sparsity`` below 1 and the CosSim selections: their memory grows with the square
    of the number of tokens.

    On a host that takes images of any size, a block with no more than ``num_prop`` patches keeps the best of them
    (the official code would keep none), patches have as many neighbours as there are, and a map too small for
    ``sparsity`` to drop an entry is left alone.
    """

    name = "gtp"
    summary = "propagate the least informative tokens to their graph neighbours (2311.03035)"
    open_sides = 1

    def __init__(
        self,
        num_prop: int,
        selection: str,
        propagation: str,
        graph_type: str,
        num_neighbours: int,
        alpha: float,
        sparsity: float,
        token_scale: bool,
    ) -> None:
        super().__init__()
        self.num_prop = num_prop
        self.selection = selection
        self.propagation = propagation
        self.graph_type = graph_type
        self.num_neighbours = num_neighbours
        self.alpha = alpha
        self.sparsity = sparsity
        self.token_scale = token_scale
        self.needs_class_token = selection in CLASS_SCORES

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        num_prop: int | Sequence[int] = 8,
        selection: str = "MixedAttnMax",
        propagation: str = "GraphProp",
        graph_type: str = "Mixed",
        num_neighbours: int = 8,
        alpha: float = 0.1,
        sparsity: float = 1.0,
        token_scale: bool | None = None,
        reduce_at: Sequence[int] | None = None,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        The defaults of ``selection``, ``propagation``, ``graph_type``, ``num_neighbours`` and ``num_prop`` are ours to
        be usable at once: the official main.py@97a1178 has none (no selection, nothing propagated). Its README
        recommends a sparsity of 0.6 with num_prop 8, and an alpha of 0.4 with num_prop 4; ``sparsity`` is 1 here, which
        needs no whole attention map.

        Args:
            depth: Blocks of the host.
            num_prop: Tokens removed in each block; one value, or one for each block of ``reduce_at``. At least one
                patch stays on a host that takes images of any size; a host of one size refuses numbers that leave
                none.
            selection: Score that ranks the tokens, one of SELECTIONS ("Random" differs at every call).
            propagation: "GraphProp", "Mean" (append the mean of what is removed) or "None" (drop).
            graph_type: "Spatial", "Semantic" or "Mixed".
            num_neighbours: Neighbours of a patch in the semantic graph.
            alpha: Share of a removed token that is propagated.
            sparsity: Fraction of the attention entries kept, in (0, 1]. Below 1 the map is thresholded, which
                costs time and saves none; 1 leaves attention alone.
            token_scale: Weight keys by what was propagated to them; None means with GraphProp.
            reduce_at: 0-based blocks that reduce; None means all.
        """
        blocks = check_blocks("reduce_at", range(depth) if reduce_at is None else reduce_at, depth)
        counts = {b: check_count("num_prop", n) for b, n in per_block("num_prop", num_prop, blocks).items()}
        for name, value, known in (
            ("selection", selection, SELECTIONS),
            ("propagation", propagation, PROPAGATIONS),
            ("graph_type", graph_type, GRAPH_TYPES),
        ):
            check_choice(name, value, known)
        check_fraction("sparsity", sparsity)
        check_number("alpha", alpha)
        if token_scale is not None:
            check_switch("token_scale", token_scale)
        check_count("num_neighbours", num_neighbours, 1)
        if token_scale and propagation != "GraphProp":
            raise ValueError(
                f"token_scale needs propagation='GraphProp', got {propagation!r}: nothing else changes a scale"
            )
        scale = propagation == "GraphProp" if token_scale is None else token_scale
        options = (selection, propagation, graph_type, num_neighbours, alpha, sparsity, scale)
        return {b: cls(n, *options) for b, n in counts.items() if n > 0}

    @classmethod
    def off(cls) -> Settings:
        return {"num_prop": 0}

    @classmethod
    def example(cls) -> Settings:
        return {"num_prop": 2, "num_neighbours": 3}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return [{"num_prop": 2 if num_patches < FEW_PATCHES else num_patches // 24}]

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return [[{"num_prop": number} for number in spread_ladder(depth, num_patches)]]

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        return tokens_by_block(cls, "num_prop", settings, depth)

    def num_removed(self, num_tokens: int) -> int:
        """Patch tokens that leave of ``num_tokens``."""
        return min(self.num_prop, num_tokens - 1) if self.any_size else self.num_prop

    def count(self, num_tokens: int, num_patches: int) -> int:
        removed = self.num_removed(num_tokens)
        return num_tokens - removed + int(self.propagation == "Mean" and removed > 0)

    def start_cost(self, num_patches: int, dim: int) -> int:
        if self.propagation != "GraphProp" or self.graph_type == "Spatial" or num_patches == 1:
            return 0
        return num_patches**2 * dim  # cosines of all pairs, for the semantic graph

    def cost(self, at: BlockSizes) -> Change:
        removed = self.num_removed(at.tokens)
        kept = at.tokens - removed
        macs = 0
        if self.selection.startswith("CLS"):
            macs += at.class_rows
        elif self.selection.startswith("CosSim"):
            macs += at.tokens * (at.prefix + at.tokens)  # each row times the sum of all
        as_products = self.sparsity < 1 or not self.selection.startswith(("CLS", "Random"))
        if self.token_scale and as_products and at.grid != (1, 1):  # one patch has neither neighbours nor scales
            macs += at.map_entries  # the bias of the keys is one more feature of q k^T
        if self.propagation == "GraphProp":
            macs += (at.prefix + kept) * removed * at.dim  # G times the removed tokens
            macs += (at.prefix + kept) * removed if self.token_scale and not at.last else 0  # scales for the next block
        return Change(at.tokens, at.tokens, kept + (self.propagation == "Mean" and removed > 0), macs)

    def start(self, x: Tensor, tokens: TokenMap) -> TokenMap:
        if self.propagation != "GraphProp":
            return tokens
        neighbours = self.num_neighbours
        if self.any_size:
            if tokens.num_patches == 1:  # it has no neighbour, and it stays
                return tokens
            neighbours = min(neighbours, tokens.num_patches - (1 if tokens.num_prefix else 2))
        graph = propagation_graph(x, tokens.grid, tokens.num_prefix, self.graph_type, neighbours)
        scale = torch.ones_like(x[..., 0], dtype=wide_dtype(x.dtype)) if self.token_scale else None
        return replace(tokens, carry=graph, key_weight=scale)

    def map_edit(self) -> EditMap | None:
        if self.sparsity < 1:
            return self.sparsify
        if self.selection in MAP_SCORES:
            return SumMap()
        return (lambda weights: weights) if self.selection in ROW_SCORES else None

    def sparsify(self, weights: Tensor) -> Tensor:
        """``sparsify_map``, where the map (B, heads, N, N) is large enough for it."""
        if self.any_size and int(weights.shape[-1] ** 2 * (1 - self.sparsity)) == 0:
            return weights
        return sparsify_map(weights, self.sparsity)

    def scores(self, state: AttnState) -> Tensor:
        """(B, N) importance of the patch tokens under ``selection``."""
        if state.sums is not None:  # they have no gradients
            return MAP_SCORES[self.selection](state.sums)[:, state.keys.num_prefix :]
        with torch.no_grad():
            return self.scores_of_map(state)

    def scores_of_map(self, state: AttnState) -> Tensor:
        """``scores`` where attention did not sum up its map."""
        num_prefix = state.keys.num_prefix
        if self.selection in CLASS_SCORES:
            return CLASS_SCORES[self.selection](state.class_rows().mean(2))[:, num_prefix:]
        if self.selection == "Random":
            keys = state.k[:, 0, num_prefix:, 0]
            return torch.rand_like(keys, dtype=wide_dtype(keys.dtype))
        if self.selection in ROW_SCORES:
            assert state.weights is not None
            return ROW_SCORES[self.selection](state.weights[:, :, num_prefix:])
        assert state.weights is not None
        return MAP_SCORES[self.selection](map_sums(state.weights))[:, num_prefix:]

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        kept = tokens.num_tokens - self.num_removed(tokens.num_tokens)
        if kept == tokens.num_tokens:
            return x, tokens
        scores = check_finite(self.scores(state), self.origin(f"{self.selection} scores"), state.x)
        ranked = scores.argsort(dim=-1, descending=True)  # (B, N)
        if self.propagation == "None":
            return tokens.select(x, ranked[:, :kept], kept)
        num_prefix, rows = tokens.num_prefix, tokens.rows(ranked)
        x = take_rows(x, rows)
        stays, removed = x[:, : num_prefix + kept], x[:, num_prefix + kept :]  # (B, P+kept, C), (B, removed, C)
        if self.propagation == "Mean":
            return torch.cat([stays, removed.mean(dim=1, keepdim=True)], dim=1), tokens.fuse(
                ranked[:, : kept + 1], kept
            )

        assert tokens.carry is not None
        anchor = tokens.anchor.gather(1, ranked)  # (B, N)
        share = kept_shares(
            tokens.carry, anchor, kept, num_prefix, tokens.layout.ranges.sequence
        )  # (B, P+kept, removed)
        x = propagate(stays, removed, share, self.alpha)
        key_weight = None
        if tokens.key_weight is not None:
            scales = take_rows(tokens.key_weight, rows).unsqueeze(-1)  # (B, P+N, 1); to prefix tokens nothing is handed
            stays, removed = scales[:, : num_prefix + kept], scales[:, num_prefix + kept :]
            key_weight = propagate(stays, removed, share, self.alpha).squeeze(-1)  # (B, P+kept)
        step = Kept(ranked[:, :kept])
        return x, tokens.relabel(step, kept, key_weight=key_weight, anchor=anchor[:, :kept])


@fx_leaf
def propagate(x: Tensor, removed: Tensor, share: Tensor, alpha: float) -> Tensor:
    """x (B, K, C) plus alpha times the share (B, K, R) of the removed tokens (B, R, C) that goes to each.

    Not in half precision under autocast: the result is the residual stream, which later blocks rank tokens by.
    """
    with without_autocast(x):
        return torch.baddbmm(x, share.to(x.dtype), removed, alpha=alpha)


@fx_leaf
def kept_shares(
    graph: Tensor | tuple[Tensor, ...], ranked: Tensor, kept: int, num_prefix: int, sequence: Tensor
) -> Tensor:
    """What each token that stays gets of each that is removed: (B, P+kept, removed).

    Args:
        graph: The Graph of the full grid.
        ranked: (B, N) patches of the tokens, those that stay in front.
        kept: How many stay.
        num_prefix: P tokens in front, which get nothing.
        sequence: (B, L) whole numbers from 0 on, N or more of them.
    """
    neighbours, shares = graph
    number = ranked.shape[1] - kept
    column = torch.full_like(neighbours[:, :, 0], number)  # (B, H*W): where it is among the removed, or behind
    column = column.scatter(1, ranked[:, kept:], sequence[:, :number])
    nodes = ranked[:, :kept].unsqueeze(-1).expand(-1, -1, neighbours.shape[-1])  # (B, kept, K)
    neighbours, shares = neighbours.gather(1, nodes), shares.gather(1, nodes)  # (B, kept, K)
    columns = column.gather(1, neighbours.flatten(1)).unflatten(1, neighbours.shape[1:])  # (B, kept, K)
    share = shares.new_zeros(ranked.shape[0], num_prefix + kept, number + 1)
    share[:, num_prefix:].scatter_(2, columns, shares)
    return share[..., :number]
