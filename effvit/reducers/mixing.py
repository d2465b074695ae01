"""Learned mixing: a fixed number of new tokens, each a mixture of all old ones; what PatchMerger and Sinkhorn share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effvit.protocols import Host, Settings
from effvit.reducers.base import Reducer, check_finite
from effvit.schedule import check_blocks, check_count, per_block, spread_blocks
from effvit.tokens import TokenMap, fx_leaf

__all__ = ["Mixing", "Mixture", "drawn", "mixture_places"]

DEFAULT_RATE = 0.7  # of the patches, once more in each block: the counts of TokenReduction


class Mixture(NamedTuple):
    """A step of a token map whose new tokens are mixtures of all old ones; places are worked out if maps ask for them.

    Attributes:
        shares: (B, K, N) weight of each old token in each new one, at least 0.
    """

    shares: Tensor
    fuses: bool = False

    @property
    def order(self) -> Tensor:
        """(B, K) old token whose position each new one keeps."""
        return mixture_places(self.shares)[0]

    def target(self, like: Tensor) -> Tensor:
        """(B, N) new token that stands for each old one."""
        return mixture_places(self.shares)[1]


@fx_leaf
@torch.no_grad()
def mixture_places(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Where mixtures are: the old token that each stands on, and the mixture that stands for each old token.

    An old token belongs to the mixture in which it weighs most, of equals the first, as patchmerger.py and
    sinkhorn.py@88fe07e report it; a mixture stands on the one of its own that weighs most. One without any gets the
    token that weighs least in its mixture, so that all stand on different tokens.

    Args:
        shares: (B, K, N) weight of each old token in each mixture, at least 0; K is at most N.

    Returns:
        (B, K) old tokens and (B, N) mixtures.
    """
    batch, number, length = shares.shape
    weight, mixture = shares.max(1)  # (B, N)
    places = torch.arange(number, device=shares.device)
    members = mixture.unsqueeze(1) == places.unsqueeze(1)  # (B, K, N)
    best, anchor = torch.where(members, shares, -1).max(-1)  # (B, K)
    empty = best < 0
    taken = torch.zeros(batch, length + 1, dtype=torch.int64, device=shares.device)
    taken = taken.scatter(1, torch.where(empty, length, anchor), 1)[:, :length]
    free = torch.where(taken > 0, torch.inf, weight).argsort(dim=1)  # (B, N): those that weigh least in front
    anchor = torch.where(empty, free.gather(1, (empty.cumsum(1) - 1).clamp(min=0)), anchor)
    return anchor, mixture.scatter(1, anchor, places.expand(batch, -1))


def drawn(number: int, host: Host, block: int) -> nn.Parameter:
    """(number, C) of a standard normal distribution, the same for a block whenever a model is made."""
    like = next(host.blocks[block].parameters())
    generator = torch.Generator("cpu").manual_seed(block)
    values = torch.randn(number, host.embed_dim, generator=generator, device="cpu")
    return nn.Parameter(values.to(like.device, like.dtype))


class Mixing(Reducer):
    """One block's share of a method that makes K mixtures of the patch tokens by weights that are learned.

    K is the number of rows of the weights, so a model runs with the number that it was made and trained with, on images
    of any size that have at least as many patches.

    Args:
        num_tokens: K; None: int(N 0.7^(j+1)) of the N patches of the host's images for the j-th block, from 0.
        stage: j.
    """

    keeps_every_patch = True
    learns = True
    has_sizes = False

    def __init__(self, num_tokens: int | None, stage: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.stage = stage

    @classmethod
    def in_blocks(
        cls, depth: int, num_tokens: int | Sequence[int] | None, reduce_at: Sequence[int] | None, *options: Any
    ) -> dict[int, Reducer]:
        """{block: reducer} of the settings that all such methods share, and of what else a reducer takes.

        Args:
            depth: Blocks of the host.
            num_tokens: As for the class; one value, or one for each block.
            reduce_at: 0-based blocks before which tokens are mixed; None means (3, 6, 9) of 12, in proportion for
                another depth.
            options: Arguments of the class behind ``stage``.
        """
        blocks = check_blocks("reduce_at", spread_blocks((3, 6, 9), depth) if reduce_at is None else reduce_at, depth)
        numbers = per_block("num_tokens", num_tokens, blocks)
        checked = {b: None if n is None else check_count("num_tokens", n, 1) for b, n in numbers.items()}
        return {b: cls(n, stage, *options) for stage, (b, n) in enumerate(checked.items())}

    @classmethod
    def off(cls) -> Settings:
        return {"reduce_at": ()}

    @classmethod
    def example(cls) -> Settings:
        return {"num_tokens": (9, 5), "reduce_at": (1, 2)}

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return []  # nothing to choose by before it is trained

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        if self.num_tokens is None:
            height, width = host.patch_embed.grid_size
            self.num_tokens = int(height * width * DEFAULT_RATE ** (self.stage + 1))

    def begin_anew(self) -> None:
        if self.stage == 0:
            warnings.warn(
                f"{self.name} is made with random weights, which mix tokens to no purpose: load a checkpoint of a "
                "model that was trained with it, or train this one",
                stacklevel=4,  # of who calls sparsify
            )

    def count(self, num_tokens: int, num_patches: int) -> int:
        assert self.num_tokens is not None
        if self.num_tokens > num_tokens:
            raise ValueError(
                f"{self.name} in block {self.block} makes {self.num_tokens} tokens, but only {num_tokens} enter it; "
                "use larger images or a smaller num_tokens"
            )
        return self.num_tokens

    def mix(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, N, C) -> mixtures (B, K, C), and the weights (B, K, N) of the tokens in them."""
        raise NotImplementedError

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        number = self.count(tokens.num_tokens, tokens.num_patches)
        prefix, patches = tokens.split(x)
        mixed, shares = self.mix(patches)
        check_finite(shares, self.origin("weights"), x)
        left = tokens.relabel(Mixture(shares.detach()), number, keeps_every_patch=True)
        return torch.cat([prefix, mixed.to(x.dtype)], dim=1), left
