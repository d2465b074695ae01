"""GTP: hand the content of the tokens that leave to their neighbours on a graph (arXiv 2311.03035)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState, EditMap
from effvit.protocols import Settings
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
from effvit.tokens import TokenMap, flat_rows, fx_leaf, take_rows, wide_dtype, wide_product, without_autocast

__all__ = ["GRAPH_TYPES", "GTP", "PROPAGATIONS", "SELECTIONS", "propagation_graph", "sparsify_map"]

GRAPH_TYPES = ("Spatial", "Semantic", "Mixed")
PROPAGATIONS = ("GraphProp", "Mean", "None")


def _diagonal(weights: Tensor) -> Tensor:
    return weights.diagonal(dim1=-2, dim2=-1)  # (B, heads, P+N)


def _received(weights: Tensor) -> Tensor:
    return weights.sum(dim=-2)  # (B, heads, P+N)


def _dissimilarity(rows: Tensor) -> Tensor:
    """Minus the summed cosine of each row (B, N, P+N) to all rows: (B, N)."""
    rows = F.normalize(rows, dim=-1)
    return -wide_product(rows, rows.sum(dim=1).unsqueeze(-1)).squeeze(-1)


# Scores from the softmax map (B, heads, P+N, P+N) for all P+N keys, GTP section 3.2 and models_v3.py@97a1178.
MAP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "IMGAttnMean": lambda w: _received(w).mean(1),
    "IMGAttnMax": lambda w: _received(w).amax(1),
    "DiagAttnMean": lambda w: _diagonal(w).mean(1),
    "DiagAttnMax": lambda w: _diagonal(w).amax(1),
    "MixedAttnMean": lambda w: _diagonal(w).mean(1) * _received(w).mean(1),
    "MixedAttnMax": lambda w: _diagonal(w).amax(1) * _received(w).amax(1),
    "SumAttnMax": lambda w: _diagonal(w).amax(1) + _received(w).amax(1),
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


def semantic_edges(patches: Tensor, num_neighbours: int) -> Tensor:
    """(B, N, N) bool: edge from each patch to its ``num_neighbours`` most similar others by cosine; directed."""
    similarity = F.normalize(patches, dim=-1)
    similarity = wide_product(similarity, similarity.transpose(1, 2))  # (B, N, N)
    threshold = similarity.topk(num_neighbours + 1, dim=-1).values[..., -1:]  # the patch itself is one of them
    return similarity >= threshold


def spatial_edges(like: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, N) bool: edge between patches that touch, diagonally too."""
    place = torch.arange(grid[0] * grid[1], device=like.device)
    row, column = torch.div(place, grid[1], rounding_mode="floor"), place % grid[1]
    apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return apart <= 1


@fx_leaf
def propagation_graph(
    x: Tensor, grid: tuple[int, int], num_prefix: int, graph_type: str, num_neighbours: int
) -> Tensor:
    """The normalised graph D^-1/2 A D^-1/2 of the embedded patches (GTP section 3.3, models_v3.py@97a1178).

    D holds the row sums of the directed A on both sides. A patch without an edge keeps a zero row here, where
    the official code divides by zero. Without a prefix token the official threshold is one place lower, which
    gives every patch one neighbour more; that is followed.

    Args:
        x: (B, P+N, C) tokens before the first block.
        grid: (H, W) with H * W = N.
        num_prefix: P.
        graph_type: "Spatial" (the 8 neighbours), "Semantic" (most similar embeddings) or "Mixed" (either).
        num_neighbours: Neighbours in the semantic graph.

    Returns:
        (B, N, N), entry [b, r, i] the share of r that goes to i, i.e. the transpose of the paper's G.
    """
    patches = x[:, num_prefix:].detach().to(wide_dtype(x.dtype))  # only compared: nothing for autograd to keep
    neighbours = num_neighbours if num_prefix else num_neighbours + 1
    if graph_type != "Spatial" and not 0 < neighbours < patches.shape[1]:
        raise ValueError(
            f"num_neighbours must be at least 1 and at most {patches.shape[1] - (1 if num_prefix else 2)}, "
            f"got {num_neighbours} for {patches.shape[1]} patches"
        )
    if graph_type == "Spatial":
        edges = spatial_edges(patches, grid).expand(patches.shape[0], -1, -1)
    elif graph_type == "Semantic":
        edges = semantic_edges(patches, neighbours)
    else:
        edges = spatial_edges(patches, grid) | semantic_edges(patches, neighbours)
    itself = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
    adjacency = (edges & ~itself).to(patches.dtype)
    degree = adjacency.sum(-1)  # (B, N)
    root = torch.where(degree > 0, degree, 1).rsqrt()
    return adjacency.transpose(1, 2) * root.unsqueeze(1) * root.unsqueeze(2)


class GTP(Reducer):
    """Drop the tokens that matter least and propagate them to graph neighbours (GTP-ViT, 2311.03035, section 3).

    Each block ranks the patches by ``selection``, removes the last ``num_prop`` and adds
    ``alpha * G[kept, removed] @ removed`` to those that stay, which leave in descending order of score. The
    graph is built once from the embedded image. The official sub-matrices of G are never made: a kept token
    finds its node by its anchor.

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
        leaves the fused attention kernel in place.

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
        return [{"num_prop": 2 if num_patches < FEW_PATCHES else 8}]

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
        if self.propagation != "GraphProp" or self.graph_type == "Spatial":
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
        if self.token_scale and (self.sparsity < 1 or not self.selection.startswith(("CLS", "Random"))):
            macs += at.map_entries  # the bias of the keys is one more feature of q k^T
        if self.propagation == "GraphProp":
            macs += (at.prefix + kept) * removed * at.dim  # G times the removed tokens
            macs += kept * removed if self.token_scale and not at.last else 0  # scales for the next block
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
        scale = torch.ones_like(x[..., 0], dtype=graph.dtype) if self.token_scale else None
        return replace(tokens, carry=graph, key_weight=scale)

    def map_edit(self) -> EditMap | None:
        if self.sparsity < 1:
            return self.sparsify
        if self.selection in MAP_SCORES or self.selection in ROW_SCORES:
            return lambda weights: weights
        return None

    def sparsify(self, weights: Tensor) -> Tensor:
        """``sparsify_map``, where the map (B, heads, N, N) is large enough for it."""
        if self.any_size and int(weights.shape[-1] ** 2 * (1 - self.sparsity)) == 0:
            return weights
        return sparsify_map(weights, self.sparsity)

    @torch.no_grad()
    def scores(self, state: AttnState) -> Tensor:
        """(B, N) importance of the patch tokens under ``selection``."""
        num_prefix = state.keys.num_prefix
        if self.selection in CLASS_SCORES:
            return CLASS_SCORES[self.selection](state.class_rows().mean(2))[:, num_prefix:]
        if self.selection == "Random":
            keys = state.k[:, 0, num_prefix:, 0]
            return torch.rand_like(keys, dtype=wide_dtype(keys.dtype))
        assert state.weights is not None
        if self.selection in ROW_SCORES:
            return ROW_SCORES[self.selection](state.weights[:, :, num_prefix:])
        return MAP_SCORES[self.selection](state.weights)[:, num_prefix:]

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        kept = tokens.num_tokens - self.num_removed(tokens.num_tokens)
        if kept == tokens.num_tokens:
            return x, tokens
        scores = check_finite(self.scores(state), self.origin(f"{self.selection} scores"), state.x)
        ranked = scores.argsort(dim=-1, descending=True)  # (B, N)
        index, removed = ranked[:, :kept], ranked[:, kept:]
        if self.propagation == "None":
            return tokens.select(x, index, kept)
        length = tokens.num_prefix + tokens.num_tokens
        x_removed = take_rows(x, flat_rows(removed + tokens.num_prefix, length))  # (B, num_prop, C)
        if self.propagation == "Mean":
            x_kept = take_rows(x, flat_rows(index, length, tokens.num_prefix))
            mean = x_removed.mean(dim=1, keepdim=True)
            return torch.cat([x_kept, mean], dim=1), tokens.fuse(ranked[:, : kept + 1], kept)

        assert tokens.carry is not None
        share = kept_shares(tokens.carry, tokens.anchor, index, removed)  # (B, num_prop, kept)
        x_kept, left = tokens.select(x, index, kept)
        x = propagate(x_kept, x_removed, F.pad(share, (tokens.num_prefix, 0)), self.alpha)
        if tokens.key_weight is not None and left.key_weight is not None:
            removed_weight = tokens.key_weight[:, tokens.num_prefix :].gather(1, removed)
            given = wide_product(share.transpose(1, 2), removed_weight.unsqueeze(-1)).squeeze(-1)  # (B, kept)
            left = replace(left, key_weight=left.key_weight + self.alpha * F.pad(given, (tokens.num_prefix, 0)))
        return x, left


@fx_leaf
def propagate(x: Tensor, removed: Tensor, share: Tensor, alpha: float) -> Tensor:
    """x (B, P+K, C) plus alpha times the share (B, R, P+K) of the removed tokens (B, R, C) that goes to each.

    Not in half precision under autocast: the result is the residual stream, which later blocks rank tokens by.
    """
    with without_autocast(x):
        return torch.baddbmm(x, share.to(x.dtype).transpose(1, 2), removed, alpha=alpha)


@fx_leaf
def kept_shares(graph: Tensor, anchor: Tensor, index: Tensor, removed: Tensor) -> Tensor:
    """The part of the graph (B, M, M) that leads from the removed to the kept tokens: (B, removed, kept)."""
    rows = take_rows(graph, flat_rows(anchor.gather(1, removed), graph.shape[1]))  # (B, removed, M)
    columns = anchor.gather(1, index).unsqueeze(1).expand(-1, rows.shape[1], -1)
    return rows.gather(2, columns)
