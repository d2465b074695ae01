"""Sinkhorn: tokens are assigned to learned codes by optimal transport (TokenReduction, arXiv 2308.04657)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effvit.protocols import Host
from effvit.reducers.base import Reducer
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.mixing import Mixing, drawn
from effvit.schedule import check_count, check_number
from effvit.tokens import wide_product, widened

__all__ = ["Sinkhorn", "transport_plan", "unit_codes"]


def transport_plan(scores: Tensor, eps: float, num_iters: int) -> Tensor:
    """Share of each token in each code: scaled in turn so that codes, then tokens, add up to 1.

    sinkhorn.py@88fe07e ``log_optimal_transport``, in log space. Its marginals are constants, which cancel from the
    first iteration on: they demand masses K and N that differ, so after the last step the shares of each token add up
    to 1 and those of a code to about N / K.

    Args:
        scores: (B, K, N) similarity of codes and tokens.
        eps: Entropy of the plan, above 0: the smaller, the harder the assignment.
        num_iters: Iterations, at least 1.

    Returns:
        (B, K, N).
    """
    plan = scores / eps
    for _ in range(num_iters):
        plan = plan - plan.logsumexp(2, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan.exp()


def unit_codes(codes: Tensor) -> Tensor:
    """The codes (K, C) divided by their norms, with the gradient as if nobody had divided them.

    sinkhorn.py@88fe07e writes the unit codes into its parameter at every forward pass, outside the graph.
    """
    return codes + (F.normalize(codes, dim=-1) - codes).detach()


class Sinkhorn(Mixing):
    """Assign the tokens before a block to K learned codes by optimal transport, and sum them up (2308.04657).

    A new token is the sum of the unit vectors of all tokens, each by its share of the code: about N / K long, whatever
    the length of the tokens. It follows models/sinkhorn.py@88fe07e, which writes unit codes into its parameter at every
    forward pass; here they are made on the fly, with equal outputs and gradients. The stored codes differ by their
    length then, which weight decay and the next step of an optimiser see.
    """

    name = "sinkhorn"
    summary = "sum tokens up by their optimal transport to learned codes (2308.04657)"

    def __init__(self, num_tokens: int | None, stage: int, eps: float, num_iters: int) -> None:
        super().__init__(num_tokens, stage)
        self.eps = eps
        self.num_iters = num_iters

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        num_tokens: int | Sequence[int] | None = None,
        reduce_at: Sequence[int] | None = None,
        eps: float = 1.0,
        num_iters: int = 3,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            num_tokens: Codes of each block, one value or one for each; None: int(0.7 N), int(0.7^2 N) ... of N patches.
            reduce_at: 0-based blocks before which tokens are assigned; None means (3, 6, 9) of 12.
            eps: Entropy of the transport plan, above 0; at 1, the published default, shares are nearly equal until they
                are trained.
            num_iters: Iterations, at least 1.
        """
        check_number("eps", eps, "positive")
        check_count("num_iters", num_iters, 1)
        return cls.in_blocks(depth, num_tokens, reduce_at, float(eps), num_iters)

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        assert self.num_tokens is not None
        self.v = drawn(self.num_tokens, host, block)

    def cost(self, at: BlockSizes) -> Change:
        assert self.num_tokens is not None
        number = self.num_tokens
        return Change(number, number, number, 2 * number * at.tokens * at.dim)  # similarities and sums

    def mix(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(widened(patches), dim=-1)  # (B, N, C)
        scores = wide_product(unit_codes(widened(self.v)), unit.transpose(1, 2))  # (B, K, N)
        shares = transport_plan(scores, self.eps, self.num_iters)
        return wide_product(shares, unit), shares
