"""K-Medoids: keep the tokens in the middle of clusters, weighed by attention (TokenReduction, arXiv 2308.04657)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from effvit.attention import AttnState, EditMap, SumMap
from effvit.protocols import Settings
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.density import squared_distances
from effvit.reducers.keep_rate import ImageShare
from effvit.schedule import check_count, check_switch, spread_blocks
from effvit.tokens import Moved, TokenMap, flat_rows, fx_leaf, take_rows

__all__ = ["KMedoids", "Weigh", "farthest_tokens", "fit_medoids", "nearest_medoid", "received_attention"]


def received_attention(state: AttnState) -> Tensor:
    """(B, N) attention that each patch token gets from all tokens in all heads, without gradient."""
    assert state.sums is not None
    return state.sums.received.detach().sum(1)[:, state.keys.num_prefix :]


def nearest_medoid(distance: Tensor, medoids: Tensor) -> Tensor:
    """(B, N) which of the medoids (B, K) is nearest to each token, of equally near ones the first; its own to a medoid.

    Args:
        distance: (B, N, N) of all pairs of tokens.
        medoids: (B, K) tokens.
    """
    near = distance.gather(2, medoids.unsqueeze(1).expand(-1, distance.shape[1], -1))  # (B, N, K)
    own = torch.arange(medoids.shape[1], device=medoids.device).expand_as(medoids)
    return near.argmin(-1).scatter(1, medoids, own)


def farthest_tokens(distance: Tensor, first: Tensor, number: int) -> Tensor:
    """(B, number) tokens, each the one whose largest distance to those before it is the largest (kmedoids.py@88fe07e).

    Usual farthest-point sampling looks at the smallest distance; the release does not, and that is followed. No token
    comes twice: of equal ones, however near, the first that is still free is taken.

    Args:
        distance: (B, N, N) of all pairs of tokens.
        first: (B, 1) the first token.
        number: How many.
    """
    chosen = [first]
    largest = torch.zeros_like(distance[:, 0])  # (B, N)
    free = torch.ones_like(largest, dtype=torch.bool)
    for _ in range(number - 1):
        rows = distance.gather(1, chosen[-1].unsqueeze(-1).expand(-1, 1, distance.shape[2])).squeeze(1)  # (B, N)
        largest = torch.maximum(largest, rows)
        free = free & (torch.arange(free.shape[1], device=free.device) != chosen[-1])
        chosen.append(torch.where(free, largest, -1).argmax(1, keepdim=True))
    return torch.cat(chosen, dim=1)


def central_token(distance: Tensor) -> Tensor:
    """(B, 1) the token that is nearest to all others of its image."""
    return distance.sum(-1).argmin(1, keepdim=True)


@fx_leaf
@torch.no_grad()
def fit_medoids(distance: Tensor, cost: Tensor, start: Tensor, num_iters: int) -> tuple[Tensor, Tensor]:
    """The medoids that a fit ends with, and the cluster of each token (kmedoids.py@88fe07e ``k_medoids_fit``).

    In each iteration a token joins the nearest medoid, and of each cluster the token of the least cost, the first of
    equals, becomes its medoid. A medoid is in its own cluster; the release gives it to an equal one before it, so that
    its own cluster may be empty.

    Args:
        distance: (B, N, N) of all pairs of tokens.
        cost: (B, N) of each as a medoid.
        start: (B, K) the medoids to begin with, all different.
        num_iters: Iterations; 0 leaves the start.

    Returns:
        Medoids (B, K) in the order of the start, and clusters (B, N).
    """
    number = torch.arange(start.shape[1], device=start.device)
    medoids, cluster = start, nearest_medoid(distance, start)
    for _ in range(num_iters):
        members = cluster.unsqueeze(-1) == number  # (B, N, K)
        medoids = torch.where(members, cost.unsqueeze(-1), math.inf).argmin(1)  # (B, K)
        cluster = nearest_medoid(distance, medoids)
    return medoids, cluster


class Weigh(Reducer):
    """Tell the next block how much attention each token gets in this one."""

    name = "kmedoids"
    keeps_every_patch = True

    def __init__(self, serves: Reducer) -> None:
        super().__init__()
        self.serves = (serves,)

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens

    def cost(self, at: BlockSizes) -> Change:
        return Change(at.tokens, at.tokens, at.tokens, 0)

    def map_edit(self) -> EditMap | None:
        return SumMap()

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        return x, replace(tokens, carry=received_attention(state))


class KMedoids(ImageShare):
    """Keep K medoids of the tokens before a block, clusters around them as their patches (K-Medoids as in 2308.04657).

    Tokens are weighed by the attention they got in the block before, which a ``Weigh`` in that block hands on. It
    follows models/kmedoids.py@88fe07e, after the weighted k-medoids of Token Pooling (2110.03860): the first medoids
    are the tokens of the largest weight, and the cost of a token is its weight times the sum of its distances to all
    tokens of the image, not to those of its cluster alone. So a large weight makes a token a medoid at first, and less
    likely to stay one.

    With ``equal_weight`` the first medoids are far from each other. The very first is the token nearest to all others,
    so that a result can be repeated; officially it is drawn at random, one place for all images of the batch.

    Medoids keep their features and their positions. Each patch counts as one of its medoid's, in dense maps and, on a
    host that pools patches, in the mean; attention does not weight by that.
    """

    name = "kmedoids"
    summary = "keep the medoids of clusters weighed by the attention of the block before (2308.04657)"
    keeps_every_patch = True
    place = "block"

    def __init__(
        self,
        keep_rate: float,
        num_tokens: int | None,
        block: int,
        earlier: tuple[KMedoids, ...],
        num_iters: int,
        equal_weight: bool,
    ) -> None:
        super().__init__(keep_rate, num_tokens, block, earlier)
        self.num_iters = num_iters
        self.equal_weight = equal_weight
        self.weighs = False  # whether the next block reduces too

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        num_iters: int = 3,
        equal_weight: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method; ``keep_rate``, ``reduce_at`` and ``num_tokens`` as in ``ImageShare.in_blocks``.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction r of the patches that stays: int(N r), int(N r^2) ... of N patches.
            reduce_at: 0-based blocks before which tokens are reduced, from 1 on; None means (3, 6, 9) of 12, in
                proportion for another depth.
            num_tokens: Absolute numbers of medoids in place of a rate.
            num_iters: Iterations of the fit.
            equal_weight: Weigh all tokens equally, and not by attention; block 0 can reduce then.
        """
        check_count("num_iters", num_iters)
        check_switch("equal_weight", equal_weight)
        if reduce_at is None and not equal_weight:
            reduce_at = [block for block in spread_blocks((3, 6, 9), depth) if block > 0]
        plan = cls.in_blocks(depth, keep_rate, reduce_at, num_tokens, num_iters, equal_weight)
        if equal_weight:
            return plan
        if 0 in plan:
            raise ValueError(
                "kmedoids weighs tokens by the attention of the block before, and block 0 has none before it; "
                "begin reduce_at with 1 or later, or use equal_weight=True"
            )
        for block, reducer in [*plan.items()]:
            former = plan.get(block - 1)
            if isinstance(former, KMedoids):
                former.weighs = True
            else:
                plan[block - 1] = Weigh(reducer)
        return dict(sorted(plan.items()))

    @classmethod
    def example(cls) -> Settings:
        return super().example() | {"keep_rate": 0.8}  # of fewer patches each medoid counts, and bfloat16 takes others

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        return None  # blocks that only weigh have no rate

    def cost(self, at: BlockSizes) -> Change:
        kept = self.num_left(at)
        return Change(kept, kept, kept, 0 if kept == at.tokens else at.tokens**2 * at.dim)  # distances of all pairs

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        kept = self.count(tokens.num_tokens, tokens.num_patches)
        return (x, tokens) if kept == tokens.num_tokens else self.keep(x, tokens, kept)

    def keep(self, x: Tensor, tokens: TokenMap, kept: int) -> tuple[Tensor, TokenMap]:
        """x (B, P+N, C) -> (B, P+kept, C) and the map of the medoids."""
        distance = squared_distances(tokens.split(x)[1].detach()).sqrt()  # (B, N, N)
        cost = distance.sum(-1)  # (B, N)
        if self.equal_weight:
            start = farthest_tokens(distance, central_token(distance), kept)
        else:
            weight = tokens.carry
            if weight is None or isinstance(weight, tuple):  # torch.fx has neither these nor tensors there
                raise ValueError(
                    f"{self.origin('weights')} are those of the attention of block {self.block - 1}, whose reducer was "
                    "taken out; make the model by effvit.sparsify"
                )
            cost = cost * weight
            start = weight.topk(kept, dim=1).indices
        check_finite(cost, self.origin("medoid costs"), x)
        medoids, cluster = fit_medoids(distance, cost, start, self.num_iters)
        size = cluster_sizes(x, tokens, cluster, kept)
        left = tokens.relabel(Moved(cluster, medoids), kept, size, keeps_every_patch=True)
        return take_rows(x, tokens.rows(medoids)), left

    def map_edit(self) -> EditMap | None:
        return SumMap() if self.weighs else None

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        return (x, replace(tokens, carry=received_attention(state))) if self.weighs else (x, tokens)


@fx_leaf
def cluster_sizes(x: Tensor, tokens: TokenMap, cluster: Tensor, number: int) -> Tensor:
    """(B, P+K) patches of each of K clusters of the tokens x (B, P+N, C), 1 for prefix tokens."""
    size = tokens.sizes(x)  # (B, P+N)
    rows = flat_rows(cluster + tokens.num_prefix, tokens.num_prefix + number)  # (B, N)
    sums = torch.cat([size[:, : tokens.num_prefix], size.new_zeros(x.shape[0], number)], dim=1)  # (B, P+K)
    return sums.flatten().index_add(0, rows.flatten(), size[:, tokens.num_prefix :].flatten()).view_as(sums)
