"""ADL, the attention diversification loss: queries that all attend to the same tokens cost (2303.11126)."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from effvit.attention import AttnState
from effvit.hosts.host import ReducedHost
from effvit.schedule import check_number

__all__ = ["AttentionDiversity", "attention_similarity"]

SMALLEST = 1e-6  # what the official code adds to the number of blocks


def attention_similarity(weights: Tensor, threshold: float = 2.0, valid: Tensor | None = None) -> Tensor:
    """How alike the rows of a softmax map are: mean cosine of each with the mean row, a scalar with gradients.

    ADL of "Robustifying Token Attention" (2303.11126; TAPADL_RVT/engine.py@6e4dbff), where entries up to
    ``threshold`` times the mean attention are left out. For one image the official squeeze mixes up axes, so that its
    loss is wrong; here an image's loss is the same in any batch.

    Args:
        weights: (B, heads, N, N) softmax map.
        threshold: Entries count above ``threshold / N``.
        valid: (B, N) False for padding, which is no query and no key.
    """
    rows = weights.mean(1)  # (B, N, N)
    if valid is None:
        mean, level = rows.mean(1, keepdim=True), threshold / rows.shape[2]
        mean, rows = mean.where(mean > level, 0), rows.where(rows > level, 0)
        return F.cosine_similarity(mean, rows, dim=-1).mean()
    number = valid.sum(1)[:, None, None]  # (B, 1, 1)
    rows = rows * (valid[:, :, None] & valid[:, None])
    mean, bound = rows.sum(1, keepdim=True) / number, threshold / number
    mean, rows = mean.where(mean > bound, 0), rows.where(rows > bound, 0)
    return (F.cosine_similarity(mean, rows, dim=-1).sum(1) / number[:, 0, 0]).mean()


class AttentionDiversity:
    """The attention diversification loss of the forward passes inside a ``with`` block.

        with AttentionDiversity(model) as diversity:
            loss = criterion(model(images), targets) + diversity.loss()
        loss.backward()

    It reads the attention of every block from the state that reducers score tokens with, so it goes with any method,
    and attention itself stays in the fused kernel; attention dropout is not in the map. Prefix tokens are left out,
    as queries and as keys: the official hosts have none.

    Args:
        model: A model of ``effvit.sparsify``.
        threshold: As for ``attention_similarity``.

    Raises:
        TypeError: Another model.
        ValueError: A threshold out of range, or gradient checkpointing, which would run every block twice.
    """

    def __init__(self, model: nn.Module, threshold: float = 2.0) -> None:
        if not isinstance(model, ReducedHost):
            raise TypeError(
                f"expected a model made by effvit.sparsify, got {type(model).__name__}; "
                "effvit.sparsify(model, 'tome', r=0) computes the same as a plain ViT"
            )
        if model.grad_checkpointing:
            raise ValueError("with gradient checkpointing every block would count twice; switch it off for this loss")
        self.model = model
        self.threshold = check_number("threshold", threshold, "positive")
        self.similarities: list[Tensor] = []
        self.hooks: list[Any] = []

    def __enter__(self) -> AttentionDiversity:
        self.similarities.clear()
        self.hooks = [block.attn.register_forward_hook(self.take) for block in self.model.blocks]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self, attention: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        """Hook on a block's attention, whose last argument takes its state."""
        state: AttnState = given[-1].value
        if state.keys.packed:
            raise ValueError("the attention of a packed batch has no map; use ragged='padded'")
        prefix = state.keys.num_prefix
        weights = (state.softmax_map() if state.weights is None else state.weights)[:, :, prefix:, prefix:]
        self.similarities.append(attention_similarity(weights, self.threshold, state.keys.valid))

    def loss(self) -> Tensor:
        """Mean over the blocks that ran, the largest where all queries attend to the same tokens.

        Raises:
            ValueError: No forward pass has run in the ``with`` block.
        """
        if not self.similarities:
            raise ValueError("no attention was seen; run the model inside the with block, and ask for the loss there")
        total = sum(self.similarities[1:], self.similarities[0])
        return total / (len(self.similarities) + SMALLEST)
