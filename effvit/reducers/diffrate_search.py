"""DiffRate's search: how many tokens each block prunes and merges, learnt by gradients (arXiv 2305.17997)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from effvit.attention import AttnState, class_attention
from effvit.protocols import Host, Size
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.diffrate import nearest_kept
from effvit.tokens import TokenMap, wide_dtype, widened

__all__ = ["KeptNumber", "RateSearch", "merge_in_place", "take_numbers"]


def rounded_up(mean: Tensor) -> Tensor:
    """The next whole number, with the gradient of the number itself."""
    return mean + (mean.ceil() - mean).detach()


class KeptNumber(nn.Module):
    """A number of patches that stay, as the mean of candidates under learnt probabilities (ddp.py@91ae3e3).

    All candidates are equally likely at first.

    Args:
        patches: N0, the largest candidate; the others are smaller by ``step`` each, down to the least above 0.
        step: The official code's granularity.
        device: Of the logits.
    """

    candidates: Tensor

    def __init__(self, patches: int, step: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("candidates", torch.arange(patches, 0, -step, device=device).float())
        self.logits = nn.Parameter(torch.zeros_like(self.candidates))

    def forward(self) -> Tensor:
        """() how many stay, a whole number with the gradient of the mean."""
        return rounded_up((self.logits.softmax(0) * self.candidates).sum())

    def stays(self, place: Tensor) -> Tensor:
        """Probability that the token at a place of a ranking stays, for int64 places of any shape, 0 the first."""
        beyond = self.candidates > torch.arange(int(self.candidates[0]), device=place.device).unsqueeze(1)  # (N0, K)
        return (beyond.float() @ self.logits.softmax(0))[place]


def take_numbers(searches: Sequence[RateSearch]) -> None:
    """Let the searches of a model take the numbers of their logits for the next pass, in one read of the device."""
    means = [number() for search in searches for number in (search.prune, search.merge)]
    values = [int(value) for value in torch.stack(means).tolist()]
    left = searches[0].patches if searches else 0
    for i, search in enumerate(searches):
        search.entering = left
        search.pruned, search.merged = values[2 * i], values[2 * i + 1]
        left = min(left, search.pruned, search.merged)


def merge_in_place(x: Tensor, size: Tensor, ranked: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Add ranked tokens to those they are most similar to, and leave them where they are (merge.py@91ae3e3).

    Args:
        x: (B, N, C) patch tokens.
        size: (B, N) how much each counts as a key.
        ranked: (B, K) tokens that are left, the most important ones first; those behind ``kept`` go into the others.
        kept: How many stay.

    Returns:
        Tokens (B, N, C), of which the kept ones are plain means, and their sizes (B, N): those of merged tokens times
        their similarity, all of the ranked ones at least 1, and those of kept tokens with what went into them.
    """
    similarity, place = nearest_kept(x, ranked, kept)  # (B, K - kept)
    stay, leave = ranked[:, :kept], ranked[:, kept:]
    into = stay.gather(1, place)  # (B, K - kept)
    leaving = widened(x.gather(1, leave.unsqueeze(-1).expand(-1, -1, x.shape[-1])))
    total = widened(x).scatter_add(1, into.unsqueeze(-1).expand_as(leaving), leaving)
    number = torch.ones_like(size).scatter_add(1, into, torch.ones_like(similarity, dtype=size.dtype))
    scaled = size.scatter(1, leave, size.gather(1, leave) * similarity.to(size.dtype))
    least = torch.zeros_like(size).scatter(1, ranked, 1.0)  # of tokens that are not left nothing is asked
    scaled = torch.maximum(scaled, least)
    return (total / number.unsqueeze(-1)).to(x.dtype), scaled.scatter_add(1, into, scaled.gather(1, leave))


class RateSearch(Reducer):
    """Prune and merge by numbers that have a gradient, while all tokens stay (patch/deit.py@91ae3e3, training).

    Attention multiplies in which tokens are left (``TokenMap.policy``): by the numbers of now, with the gradient of the
    probability that a token at that place of the ranking stays.

    Deviations: attention before the first token is gone is the plain softmax, without the 1e-6 of the one with a
    policy; tokens keep the order of the image.

    Attributes:
        step: Between candidates.
        patches: N0 of the host's grid.
        prune: The number that pruning leaves.
        merge: The number that merging leaves of these.
        entering, pruned, merged: Numbers of the next pass, which ``take_numbers`` sets.
    """

    name = "diffrate"
    summary = "the search for DiffRate's numbers (2305.17997)"
    needs_class_token = True
    learns = True

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.patches = self.entering = self.pruned = self.merged = 0

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        self.device = next(host.parameters()).device

    def resize(self, grid: Size) -> None:
        self.patches = grid[0] * grid[1]
        self.prune = KeptNumber(self.patches, self.step, self.device)
        self.merge = KeptNumber(self.patches, self.step, self.device)

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        if min(self.pruned, self.merged) >= self.entering:
            return x, tokens
        prefix, patches = tokens.split(x)
        scores = check_finite(class_attention(state), self.origin("class-token scores"), state.x)  # (B, N)
        ranked = scores.argsort(dim=1, descending=True)
        place = ranked.argsort(dim=1)
        ones = torch.ones_like(x[..., 0], dtype=wide_dtype(x.dtype))
        before, left = tokens.split(ones if tokens.policy is None else tokens.policy)
        weight = ones if tokens.key_weight is None else tokens.key_weight
        if self.pruned < self.entering:
            left = left * leaves(self.prune, place, self.pruned, self.entering)
        remaining = min(self.entering, self.pruned)
        if self.merged < remaining:
            patches, size = merge_in_place(patches, tokens.split(weight)[1], ranked[:, :remaining], self.merged)
            weight = torch.cat([tokens.split(weight)[0], size], dim=1)
            left = left * leaves(self.merge, place, self.merged, remaining)
            x = torch.cat([prefix, patches], dim=1)
        return x, replace(tokens, policy=torch.cat([before, left], dim=1), key_weight=weight)


def leaves(number: KeptNumber, place: Tensor, kept: int, entering: int) -> Tensor:
    """(B, N) 0 for the tokens at places (B, N) from ``kept`` to ``entering``, else 1, with the number's gradient."""
    hard = ((place < kept) | (place >= entering)).to(number.logits.dtype)
    stays = number.stays(place)
    return hard + (stays - stays.detach())
