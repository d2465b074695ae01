"""PatchMerger: learned queries attend to all tokens, and what they see replaces them (arXiv 2202.12015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from effvit.protocols import Host
from effvit.reducers.base import Reducer
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.mixing import Mixing, drawn
from effvit.schedule import check_switch
from effvit.tokens import wide_product, widened

__all__ = ["PatchMerger"]


class PatchMerger(Mixing):
    """Replace the tokens before a block by K mixtures that learned queries make of them (PatchMerger, 2202.12015).

    Y = softmax(Q U^T) U, with U the layer norm of the tokens: no values, no residual. It follows patchmerger.py@88fe07e
    of TokenReduction (2308.04657), which does not scale the logits; the authors' own code was not compared.
    """

    name = "patchmerger"
    summary = "replace all tokens by mixtures that learned queries make of them (2202.12015)"

    def __init__(self, num_tokens: int | None, stage: int, scaled_attn: bool) -> None:
        super().__init__(num_tokens, stage)
        self.scaled_attn = scaled_attn

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        num_tokens: int | Sequence[int] | None = None,
        reduce_at: Sequence[int] | None = None,
        scaled_attn: bool = False,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            num_tokens: Queries of each block, one value or one for each; None: int(0.7 N), int(0.7^2 N) ... of N
                patches. The paper has one block in the middle with 8.
            reduce_at: 0-based blocks before which tokens are mixed; None means (3, 6, 9) of 12.
            scaled_attn: Divide the logits by the root of the channels.
        """
        check_switch("scaled_attn", scaled_attn)
        return cls.in_blocks(depth, num_tokens, reduce_at, scaled_attn)

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        assert self.num_tokens is not None
        self.queries = drawn(self.num_tokens, host, block)
        self.norm = nn.LayerNorm(host.embed_dim, device=self.queries.device, dtype=self.queries.dtype)

    def cost(self, at: BlockSizes) -> Change:
        assert self.num_tokens is not None
        number = self.num_tokens
        products = 2 * number * at.tokens * at.dim
        return Change(number, number, number, products + 5 * at.tokens * at.dim)  # and the layer norm

    def mix(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(patches)  # (B, N, C)
        queries = widened(self.queries)
        if self.scaled_attn:
            queries = queries * queries.shape[1] ** -0.5
        shares = wide_product(queries, normed.transpose(1, 2)).softmax(dim=-1)  # (B, K, N)
        return wide_product(shares, normed), shares
