"""DPC-KNN: tokens merge into the peak of density nearest to them (TokenReduction, arXiv 2308.04657)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effvit.protocols import Host
from effvit.recover import closeness
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.clusters import merge_patches
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.density import peak_scores
from effvit.reducers.keep_rate import ImageShare
from effvit.schedule import check_count, check_switch
from effvit.tokens import Moved, TokenMap, flat_rows, fx_leaf, take_rows, widened

__all__ = ["DPCKNN", "peak_clusters"]

# What the released code adds to the weights of a cluster before it divides by their sum.
EPS = 1e-6


@fx_leaf
@torch.no_grad()
def peak_clusters(scores: Tensor, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Clusters around the tokens that are most a peak of density (dpcknn.py@88fe07e ``cluster_dpc_knn``).

    Args:
        scores: (B, N) of ``effvit.reducers.density.peak_scores``.
        x: (B, N, C) tokens.
        number: K, clusters of each image.

    Returns:
        Centres (B, K), tokens by falling score, and the cluster (B, N) of each token: that of the nearest centre, of
        equally near ones the first; a centre is in its own.
    """
    centres = scores.topk(number, dim=1).indices  # (B, K)
    places = take_rows(x, flat_rows(centres, x.shape[1]))  # (B, K, C)
    own = torch.arange(number, device=x.device).expand_as(centres)
    return centres, closeness(x, places, 1.0).argmax(-1).scatter(1, centres, own)


class DPCKNN(ImageShare):
    """Merge each token into the nearest of K peaks of density, before a block (DPC-KNN as in 2308.04657).

    The peaks are those of HoT (``effvit.reducers.density.peak_scores``); a merged token is the mean of its members,
    weighted by the exponential of a linear score that is trained, or equally. It follows models/dpcknn.py@88fe07e,
    whose clusters come from TCFormer (2204.08680), but for the noise of 1e-6 that parts equal densities there, in
    evaluation too: here the first token counts as the denser. Tokens come in falling order of the score of their peak.

    The score starts at zero here, which weights equally, so that a model without training is one with ``equal_weight``.
    A merged token keeps the position of its peak and the number of its patches, by which average pooling weights;
    attention does not.
    """

    name = "dpcknn"
    summary = "merge each token into the nearest peak of density (2308.04657)"
    keeps_every_patch = True
    learns = True

    def __init__(
        self,
        keep_rate: float,
        num_tokens: int | None,
        block: int,
        earlier: tuple[DPCKNN, ...],
        k: int,
        equal_weight: bool,
    ) -> None:
        super().__init__(keep_rate, num_tokens, block, earlier)
        self.k = k
        self.equal_weight = equal_weight
        self.score: nn.Linear | None = None

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        k: int = 5,
        equal_weight: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method; ``keep_rate``, ``reduce_at`` and ``num_tokens`` as in ``ImageShare.in_blocks``.

        Args:
            depth: Blocks of the host.
            keep_rate: Fraction r of the patches that stays: int(N r), int(N r^2) ... clusters of N patches.
            reduce_at: 0-based blocks before which tokens merge; None means (3, 6, 9) of 12.
            num_tokens: Absolute numbers of clusters in place of a rate.
            k: Neighbours in the density, the token itself included, at least 2.
            equal_weight: Merge by plain means, without a score to train.
        """
        check_count("k", k, 2)
        check_switch("equal_weight", equal_weight)
        return cls.in_blocks(depth, keep_rate, reduce_at, num_tokens, k, equal_weight)

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        if self.equal_weight:
            return
        like = next(host.blocks[block].parameters())
        self.score = nn.Linear(host.embed_dim, 1, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def cost(self, at: BlockSizes) -> Change:
        kept = self.num_left(at)
        if kept == at.tokens:
            return Change(kept, kept, kept, 0)
        macs = at.tokens**2 * at.dim + at.tokens * kept * at.dim  # distances of all pairs, and to the centres
        return Change(kept, kept, kept, macs + (0 if self.equal_weight else at.tokens * at.dim))

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        kept = self.count(tokens.num_tokens, tokens.num_patches)
        return (x, tokens) if kept == tokens.num_tokens else self.merge(x, tokens, kept)

    def merge(self, x: Tensor, tokens: TokenMap, kept: int) -> tuple[Tensor, TokenMap]:
        """x (B, P+N, C) -> (B, P+kept, C) and the map of the merged tokens."""
        patches = tokens.split(x)[1]
        k = min(self.k, tokens.num_tokens) if self.any_size else self.k
        scores = check_finite(peak_scores(patches, k), self.origin("peak scores"), x)  # (B, N)
        centres, cluster = peak_clusters(scores, patches, kept)
        weight = torch.ones_like(scores) if self.score is None else widened(self.score(patches).squeeze(-1)).exp()
        merged, size = merge_patches(x, weight, tokens.sizes(x), cluster, kept, tokens.num_prefix, EPS)
        return merged, tokens.relabel(Moved(cluster, centres), kept, size, keeps_every_patch=True)
