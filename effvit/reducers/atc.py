"""ATC: agglomerative clustering of tokens by their keys, and their means (arXiv 2409.11923)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effvit.attention import AttnState
from effvit.protocols import Size
from effvit.recording import compile_each_size
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.clusters import merge_patches
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import ImageShare
from effvit.reducers.matching import SMALLEST_NORM, mean_keys
from effvit.schedule import check_choice, check_switch
from effvit.tokens import Moved, TokenMap, fx_leaf, wide_product

__all__ = ["ATC", "LINKAGES", "agglomerate", "cosine_distances", "number_clusters"]

# Distance of a cluster to the union of two: of its distances to both, (B, N) each, and of their sizes, (B, 1) each.
Linkage = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LINKAGES: dict[str, Linkage] = {
    "average": lambda a, b, size_a, size_b: (size_a * a + size_b * b) / (size_a + size_b),
    "complete": lambda a, b, size_a, size_b: torch.maximum(a, b),
    "single": lambda a, b, size_a, size_b: torch.minimum(a, b),
}


def cosine_distances(metric: Tensor) -> Tensor:
    """(B, N, N) 1 - cosine of all pairs of tokens (B, N, D)."""
    unit = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    return 1 - wide_product(unit, unit.transpose(1, 2))


@fx_leaf
@torch.no_grad()
def agglomerate(distance: Tensor, number: int, linkage: str) -> Tensor:
    """The cluster of each token, (B, N), named by its first member, once the nearest two were joined until K are left.

    Agglomerative clustering, as sklearn makes it of one image after another (atc.py@227c94b). The distances between
    clusters follow from those before by the formulas of Lance and Williams. All images of the batch join a pair in each
    of N - K steps, each of which looks for the least of N^2 distances; nothing is read from the device. Of equal
    distances the first in the order of the tokens counts.

    Args:
        distance: (B, N, N) of all pairs of tokens, of which those above the diagonal count.
        number: K, clusters that are left.
        linkage: One of LINKAGES, over the members of clusters.
    """
    batch, length = distance.shape[:2]
    join = LINKAGES[linkage]
    image = torch.arange(batch, device=distance.device)
    place = torch.arange(length, device=distance.device)
    # In float64, as sklearn has them. A cluster has the row and column of its first member; all others are infinite.
    upper = distance.double().triu(1)  # products of a matrix with itself are symmetric but for rounding
    between = (upper + upper.transpose(1, 2)).masked_fill(place.unsqueeze(1) == place, torch.inf)  # (B, N, N)
    size = torch.ones_like(between[..., 0])
    cluster = place.expand(batch, -1)
    for _ in range(length - number):
        pair = between.flatten(1).argmin(1)  # (B,): the first of them is in the row of the smaller number
        first, second = torch.div(pair, length, rounding_mode="floor"), pair % length
        row = join(between[image, first], between[image, second], size[image, first, None], size[image, second, None])
        row = row.masked_fill((place == first.unsqueeze(1)) | (place == second.unsqueeze(1)), torch.inf)  # (B, N)
        between[image, first] = between[image, :, first] = row
        between[image, second] = between[image, :, second] = torch.inf
        size[image, first] += size[image, second]
        cluster = torch.where(cluster == second.unsqueeze(1), first.unsqueeze(1), cluster)
    return cluster


@fx_leaf
def number_clusters(cluster: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Clusters (B, N), named by their first members -> these members (B, K), and clusters (B, N) from 0 to K - 1."""
    place = torch.arange(cluster.shape[1], device=cluster.device)
    leads = cluster == place  # (B, N)
    first = torch.where(leads, place, cluster.shape[1]).sort(dim=1).values[:, :number]
    return first, (leads.cumsum(1) - 1).gather(1, cluster)


class ATC(ImageShare):
    """Merge the patch tokens of a block into K clusters by their keys (ATC, 2409.11923).

    Clusters are agglomerated, bottom up, by cosine distances of the keys averaged over heads, as they enter attention
    (atc.py@227c94b). A merged token is the mean of its members, weighted by the patches they stand for, and counts that
    often as a key; without ``prop_attn`` neither, as officially. Merged tokens come in the order of their first
    members, whose positions they keep; officially their order is arbitrary.
    """

    name = "atc"
    summary = "merge the clusters of an agglomeration of the keys (2409.11923)"
    keeps_every_patch = True
    open_sides = 0  # as many steps as tokens go

    def __init__(
        self,
        keep_rate: float,
        num_tokens: int | None,
        block: int,
        earlier: tuple[ATC, ...],
        linkage: str,
        prop_attn: bool,
    ) -> None:
        super().__init__(keep_rate, num_tokens, block, earlier)
        self.linkage = linkage
        self.prop_attn = prop_attn

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        linkage: str = "average",
        prop_attn: bool = True,
    ) -> dict[int, Reducer]:
        """Settings of the method; ``keep_rate``, ``reduce_at`` and ``num_tokens`` as in ``ImageShare.in_blocks``.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction r of the patches that stays: int(N r), int(N r^2) ... clusters of N patches.
            reduce_at: 0-based blocks between whose attention and MLP tokens merge; None means (3, 6, 9) of 12.
            num_tokens: Absolute numbers of clusters in place of a rate.
            linkage: What the distance of two clusters is of those of their members: "average", "complete" (the largest)
                or "single" (the smallest).
            prop_attn: Proportional attention: a token of size s receives attention like s equal tokens, and weighs as
                much in later means.
        """
        check_choice("linkage", linkage, LINKAGES)
        check_switch("prop_attn", prop_attn)
        return cls.in_blocks(depth, keep_rate, reduce_at, num_tokens, linkage, prop_attn)

    def cost(self, at: BlockSizes) -> Change:
        kept = self.num_left(at)
        macs = 0 if kept == at.tokens else at.tokens**2 * at.head_dim  # cosines of all pairs
        return Change(at.tokens, at.tokens, kept, macs)

    def check_size(self, grid: Size) -> None:
        super().check_size(grid)
        compile_each_size(grid)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        kept = self.count(tokens.num_tokens, tokens.num_patches)
        if kept == tokens.num_tokens:
            return x, tokens
        distance = cosine_distances(mean_keys(state.k)[:, tokens.num_prefix :])  # (B, N, N)
        check_finite(distance, self.origin("distances of the keys"), state.x)
        first, cluster = number_clusters(agglomerate(distance, kept, self.linkage), kept)
        old = tokens.sizes(x)
        weight = old if self.prop_attn else torch.ones_like(old)  # (B, P+N)
        merged, size = merge_patches(x, weight[:, tokens.num_prefix :], old, cluster, kept, tokens.num_prefix)
        key_weight = size if self.prop_attn else None
        return merged, tokens.relabel(Moved(cluster, first), kept, size, key_weight, keeps_every_patch=True)
