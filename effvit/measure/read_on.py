"""How much of an image is left in the tokens that a tower hands over: its own last blocks and head read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effvit.block import call_block
from effvit.hosts.host import as_host
from effvit.hosts.towers import ReducedTower, TowerClassifier
from effvit.selectors import TokenSelector
from effvit.selectors.select import choose_tokens
from effvit.tokens import Moved, TokenMap

__all__ = ["ReadOn"]


class ReadOn(nn.Module):
    """A classifier whose blocks behind the one the tokens leave read what a selector hands over, and no other patch.

    A stand-in for a language model: what it no longer recognises, the tokens do not hold. The prefix tokens come along
    as they leave that block. Tokens keep the positions of their cells, and a merged one counts once. With all tokens
    handed over it is the model.

    Args:
        dense: A timm model that ``sparsify`` takes, with a classifier.
        selector: It, or a reduced form of it, as a tower with a selector of single patches (``merge`` 1).

    Raises:
        ValueError: A merger, an encoder without a classifier, or tokens that leave behind the last block, where a head
            of the class token reads none.
    """

    def __init__(self, dense: nn.Module, selector: TokenSelector) -> None:
        super().__init__()
        self.host = as_host(dense)
        self.selector = selector
        self.num_classes: int = getattr(dense, "num_classes", 0)
        if selector.merge > 1:
            raise ValueError(f"blocks of a tower read patches, got a merger of {selector.merge} x {selector.merge}")
        if isinstance(self.host, ReducedTower) and not (
            isinstance(self.host, TowerClassifier) and self.host._pools_patches
        ):
            raise ValueError(
                f"this {type(dense).__name__} has no head that reads a mean of the patches that are left; give a "
                "classifier of timm with global_pool='avg' and without a projector, such as qwen3_vit_88m"
            )
        if selector.tower.block == len(self.host.blocks) - 1 and self.host.global_pool == "token":
            raise ValueError(
                "the head reads the class token alone, on which tokens that leave behind the last block have no "
                "influence; let them leave at an earlier block, such as -2"
            )

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, P+K, C) of images (B, 3, H, W)."""
        host, selector = self.host, self.selector
        features, inside, prefix = selector.read(images)
        selection = choose_tokens(selector.selector, features, selector.keep, inside, prefix)
        assert selection.group is not None
        assert prefix is not None
        full, rope, tokens = host._start(images, memory=False)  # for what the blocks share, such as rotary tables
        tokens = TokenMap.full(full, tokens.grid, host.num_prefix_tokens, host.num_class_tokens)
        step = Moved(representatives(selection.group, selection.ids), selection.ids)
        tokens = tokens.relabel(step, selection.ids.shape[1], valid=selection.valid)
        x = torch.cat([prefix, selection.tokens], dim=1)  # (B, P+K, C)
        for i in range(selector.tower.block + 1, len(host.blocks)):
            x, tokens = call_block(host.blocks[i], x, tokens, host._block_positions(rope, i))
        return host._finished(x, tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores of ``forward_features``, or with ``pre_logits`` what they are made of."""
        return self.host.forward_head(x, pre_logits=pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, num_classes)."""
        return self.forward_head(self.forward_features(images))


def representatives(group: Tensor, ids: Tensor) -> Tensor:
    """``group`` (B, cells) of a selection with -1 for all cells but the one whose position each token has, ``ids``.

    So a merged token stands for one cell, and a mean over cells counts it once.
    """
    cell = torch.arange(group.shape[1], device=group.device)
    own = (group >= 0) & (ids.gather(1, group.clamp(min=0)) == cell)
    return torch.where(own, group, -1)
