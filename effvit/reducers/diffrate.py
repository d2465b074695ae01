"""DiffRate: prune the least attended tokens and merge the next ones, by numbers from a search (arXiv 2305.17997)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.attention import AttnState, class_attention
from effvit.protocols import Settings
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.bipartite import Matching
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.diffrate_presets import PRESETS
from effvit.schedule import check_choice, check_count
from effvit.tokens import TokenMap, fx_leaf, take_rows, wide_dtype, wide_product, widened

__all__ = ["Absorbed", "DiffRate", "absorb", "nearest_kept"]

EVERY = 2**31 - 1  # more tokens than there are
LEAST_WEIGHT = 1e-6  # of a key, whose logarithm must be finite
DEFAULTS = {12: "deit_small_2.9", 24: "mae_large_42.3", 32: "mae_huge_103.4"}  # blocks of the host -> preset


@fx_leaf
def nearest_kept(x: Tensor, ranked: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Most similar kept token of each one that is merged away, by the cosine of their features.

    Args:
        x: (B, N, C) patch tokens.
        ranked: (B, K) those that are not pruned, the most important ones first.
        kept: How many of them stay.

    Returns:
        Similarity (B, K - kept), and the place (B, K - kept) among the kept tokens.
    """
    rows = ranked + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    features = F.normalize(widened(take_rows(x, rows)), dim=-1)  # (B, K, C)
    similarity = wide_product(features[:, kept:], features[:, :kept].transpose(1, 2))  # (B, K - kept, kept)
    best, place = similarity.max(dim=-1)
    return best, place


class Absorbed(NamedTuple):
    """Tokens after others were merged into them.

    Attributes:
        x: (B, P+kept, C) plain means.
        size: (B, P+kept) patches that each stands for.
        weight: (B, P+kept) how much each counts as a key: officially called its size.
    """

    x: Tensor
    size: Tensor
    weight: Tensor


@fx_leaf
def absorb(x: Tensor, size: Tensor, weight: Tensor, matching: Matching, similarity: Tensor) -> Absorbed:
    """Merge tokens into those they match (merge.py@91ae3e3 ``get_merge_func``).

    A token becomes the plain mean of itself and of all that go into it, whatever their sizes; its weight grows by those
    of the others times their similarity. The official code gets NaN from a weight that negative similarities bring to 0
    or below; here it stays at ``LEAST_WEIGHT``.

    Args:
        x: (B, P+N, C).
        size: (B, P+N) patches that each token stands for.
        weight: (B, P+N) how much each counts as a key.
        matching: Which tokens go where.
        similarity: (B, r) of those that go to what they go into.
    """
    images = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    kept, merged = matching.kept + images * x.shape[1], matching.merged + images * x.shape[1]
    into = (matching.into + images * matching.kept.shape[1]).flatten()  # (B * r,) of the new sequence

    def summed(values: Tensor, gain: Tensor) -> Tensor:
        new = widened(take_rows(values, kept))  # a sum of hundreds of tokens leaves the range of float16
        return new.flatten(0, 1).index_add(0, into, widened(gain).flatten(0, 1)).view_as(new)

    number = summed(torch.ones_like(size), torch.ones_like(similarity, dtype=size.dtype))  # (B, P+kept)
    means = (summed(x, take_rows(x, merged)) / number.unsqueeze(-1)).to(x.dtype)
    weights = summed(weight, take_rows(weight, merged) * similarity.to(weight.dtype)).clamp(min=LEAST_WEIGHT)
    return Absorbed(means, summed(size, take_rows(size, merged)), weights)


class DiffRate(Reducer):
    """Prune to so many tokens, then merge to so many, in each block as searched or given (DiffRate, 2305.17997).

    Between attention and MLP the tokens that the class token attends to least are dropped, and the least attended of
    the others are merged into the one of the rest that is most similar to each, by the cosine of their features.
    Follows patch/deit.py and merge.py of OpenGVLab/DiffRate@91ae3e3, which has no licence: all code is our own.

    Deviations: numbers are without the class token; sequences are sorted in blocks alone that reduce; weights of keys
    stay positive; average pooling counts patches, officially weights; with a distillation token the attention of both
    is averaged. Elsewhere the numbers of a preset are shares of the patches of its host, and its blocks are spread in
    proportion over another depth. The search that trains the numbers is ``effvit.search_rates``.

    Attributes:
        prune_number: Tokens that pruning leaves.
        merge_number: Tokens that merging leaves of them.
        of_patches: Patches that both are meant for; None: they are absolute.
    """

    name = "diffrate"
    summary = "prune the least attended tokens and merge the next ones, by numbers from a search (2305.17997)"
    needs_class_token = True

    def __init__(self, prune_number: int, merge_number: int, of_patches: int | None) -> None:
        super().__init__()
        self.prune_number = prune_number
        self.merge_number = merge_number
        self.of_patches = of_patches

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        preset: str | None = None,
        prune_to: Sequence[int] | None = None,
        merge_to: Sequence[int] | None = None,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            preset: A published schedule, one of ``diffrate_presets.PRESETS``, named after its host and its GMACs; its
                numbers become those nearest to the same shares of other numbers of patches, of two the larger. None,
                without numbers: that of DeiT-S at 2.9, of MAE's ViT-L at 42.3 for 24 blocks and of its ViT-H at 103.4
                for 32.
            prune_to: Patch tokens that pruning leaves in each block, a list with one number for each; an empty one
                prunes nothing. A number that is not below that of the tokens leaves all.
            merge_to: Patch tokens that merging leaves of them, likewise.
        """
        if prune_to is None and merge_to is None:
            name = DEFAULTS.get(depth, "deit_small_2.9") if preset is None else preset
            check_choice("preset", name, PRESETS)
            chosen = PRESETS[name]
            at = [block * len(chosen.prune_to) // depth for block in range(depth)]
            pairs = [(chosen.prune_to[i], chosen.merge_to[i]) for i in at]
            return {
                b: cls(prune, merge, chosen.patches)
                for b, (prune, merge) in enumerate(pairs)
                if min(prune, merge) < chosen.patches
            }
        if preset is not None:
            raise ValueError(f"preset {preset!r} and numbers of your own exclude each other; leave one of them out")
        numbers = {"prune_to": () if prune_to is None else prune_to, "merge_to": () if merge_to is None else merge_to}
        given: dict[str, dict[int, int]] = {}
        for name, values in numbers.items():
            if not isinstance(values, (list, tuple)):
                raise TypeError(f"{name} must be a list with one number for each of {depth} blocks, got {values!r}")
            if len(values) not in (0, depth):
                raise ValueError(f"{name} must have one number for each of {depth} blocks, got {len(values)}")
            given[name] = dict(enumerate(check_count(name, value, 1) for value in values))
        blocks = sorted({*given["prune_to"], *given["merge_to"]})
        prunes, merges = (dict.fromkeys(blocks, EVERY) | given[name] for name in numbers)
        return {b: cls(prunes[b], merges[b], None) for b in blocks}

    @classmethod
    def off(cls) -> Settings:
        return {"prune_to": [], "merge_to": []}

    @classmethod
    def example(cls) -> Settings:
        return {"prune_to": [40, 16, 16, 16], "merge_to": [18, 14, 10, 10]}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return [{}]

    def numbers(self, num_tokens: int, num_patches: int) -> tuple[int, int]:
        """Patch tokens left of ``num_tokens`` behind pruning, and behind merging."""
        prune, merge = self.prune_number, self.merge_number
        if self.of_patches is not None:
            # Not by round, which the number of patches of a trace does not have.
            shares = (number * num_patches / self.of_patches for number in (prune, merge))
            prune, merge = (max(1, math.floor(share + 0.5)) for share in shares)
        pruned = min(prune, num_tokens)
        return pruned, min(merge, pruned)

    def count(self, num_tokens: int, num_patches: int) -> int:
        return self.numbers(num_tokens, num_patches)[1]

    def cost(self, at: BlockSizes) -> Change:
        patches = at.grid[0] * at.grid[1]
        of_patches = self.of_patches or patches  # absolute numbers are meant for those that there are
        pruned = min(at.tokens, int(self.prune_number * patches / of_patches + 0.5) or 1)
        kept = min(pruned, int(self.merge_number * patches / of_patches + 0.5) or 1)
        rows = at.class_rows if kept < at.tokens else 0
        return Change(at.tokens, at.tokens, kept, rows + (pruned - kept) * kept * at.dim, merges=kept < pruned)

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        pruned, kept = self.numbers(tokens.num_tokens, tokens.num_patches)
        if kept == tokens.num_tokens:
            return x, tokens
        scores = check_finite(class_attention(state), self.origin("class-token scores"), state.x)  # (B, N)
        ranked = scores.topk(pruned, dim=1).indices  # (B, pruned)
        if kept == pruned:
            return tokens.select(x, ranked, pruned)
        prefix, ranges = tokens.num_prefix, tokens.layout.ranges
        similarity, place = nearest_kept(x[:, prefix:], ranked, kept)
        places = torch.cat([ranges.sequence[:, :prefix], ranked + prefix], dim=1)  # (B, P+pruned)
        matching = Matching(places[:, prefix + kept :], places[:, : prefix + kept], place + prefix, prefix)
        ones = torch.ones_like(x[..., 0], dtype=wide_dtype(x.dtype))
        size = ones if tokens.size is None else tokens.size
        weight = ones if tokens.key_weight is None else tokens.key_weight
        new = absorb(x, size, weight, matching, similarity)
        keeps = pruned == tokens.num_tokens
        return new.x, tokens.relabel(matching, kept, new.size, new.weight, keeps_every_patch=keeps)
