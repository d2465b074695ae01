"""What becomes of each patch of an image, stage by stage, as arrays: what pictures of tokens are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effvit.architectures.dumbbell import SemanticLayers
from effvit.architectures.lookupvit import LookupViT
from effvit.architectures.semantic_tokens import SeedBlock, SemanticBlock
from effvit.architectures.sit import SiT
from effvit.architectures.stvit import STViT
from effvit.architectures.stvit_swin import STViTSwin
from effvit.architectures.supertoken import SuperTokens, SuperTokenViT
from effvit.architectures.token_slimming import unpooling
from effvit.hosts.host import ReducedHost
from effvit.hosts.surface import patch_grid
from effvit.layers.bidirectional_attention import GatherAttention
from effvit.layers.super_tokens import from_cells, neighbours
from effvit.measure.flops import eval_twin
from effvit.tokens import TokenMap, wide_product

__all__ = ["ALONE", "DROPPED", "FUSED", "MERGED", "SOFT", "Stage", "map_stage", "trace_stages"]

DROPPED, ALONE, MERGED, FUSED, SOFT = range(5)


@dataclass(frozen=True, eq=False)
class Stage:
    """The patches of one image as the tokens of a block have them.

    Attributes:
        block: Number of the block that makes these tokens; in pyramids counted through all stages.
        tokens: N, their number without prefix tokens.
        labels: (H, W) int64, the token that carries each patch, -1 where it was dropped; of soft tokens the one with
            the largest share. Pyramids have the map of their stage in place of the patches.
        fused: (N,) True for tokens that sum up patches without standing for them; None: there are none.
        assignment: (H, W, N) share that each soft token has in each patch; None where a patch has one token at most.
            What super tokens outside the map hold of a pixel is lost, all other shares sum to 1.
    """

    block: int
    tokens: int
    labels: np.ndarray
    fused: np.ndarray | None = None
    assignment: np.ndarray | None = None

    @property
    def soft(self) -> bool:
        """Whether every patch is a mixture of several tokens."""
        return self.assignment is not None

    @property
    def states(self) -> np.ndarray:
        """(H, W) what became of each patch: DROPPED, ALONE, MERGED, FUSED, or SOFT for all of them."""
        if self.soft:
            return np.full(self.labels.shape, SOFT)
        carried = self.labels >= 0
        members = np.bincount(self.labels[carried], minlength=1)
        states = np.full(self.labels.shape, DROPPED)
        states[carried] = np.where(members[self.labels[carried]] > 1, MERGED, ALONE)
        if self.fused is not None:
            states[carried & self.fused[self.labels]] = FUSED
        return states


def map_stage(tokens: TokenMap, block: int = 0) -> Stage:
    """The first image of a TokenMap."""
    fused = None if tokens.fused is None else tokens.fused[0].cpu().numpy()
    return Stage(block, int(tokens.counts()[0]), tokens.labels()[0].cpu().numpy(), fused)


@torch.no_grad()
def trace_stages(model: nn.Module, x: Tensor) -> list[Stage]:
    """What each reducing block makes of the patches of an image.

    Args:
        model: A plain ViT made by ``effvit.sparsify``, or one of the architectures with soft tokens: STViT, STViT-R,
            super-token ViT, LookupViT and SiT. It is run in eval mode and left as it is.
        x: The image as the model takes it (1, 3, H, W).

    Returns:
        The stages in the order of the blocks; none where no block reduces.

    Raises:
        TypeError: A model whose tokens cannot be traced.
        ValueError: An STViT-R whose key windows do not give every patch its shares.
    """
    for kind, trace in TRACES.items():
        if isinstance(model, kind):
            like = next(model.parameters())
            return trace(eval_twin(model), x.to(like.device, like.dtype))
    soft = ", ".join(kind.__name__ for kind in TRACES if kind is not ReducedHost)
    raise TypeError(
        f"tokens can be traced in a plain ViT made by effvit.sparsify and in {soft}, got a {type(model).__name__}; "
        "reduce it by a method first"
    )


def _reduced(model: ReducedHost, x: Tensor) -> list[Stage]:
    trace = model.trace_tokens(x)
    return [map_stage(trace[block].tokens, block) for block in model.reducers]


def _soft(block: int, assignment: Tensor, grid: tuple[int, int]) -> Stage:
    """The stage of shares (H*W, N)."""
    shares = assignment.unflatten(0, grid).float().cpu().numpy()
    return Stage(block, shares.shape[-1], shares.argmax(-1), assignment=shares)


def _calls(modules: Iterable[nn.Module]) -> dict[nn.Module, tuple[tuple[Any, ...], Any]]:
    """A dict that will hold the arguments and the result of each module's next call."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        calls[module] = (arguments, result)

    for module in modules:
        module.register_forward_hook(note)
    return calls


def _assignment(block: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    """(Np, Ns) shares of the semantic tokens, from another call of the layer that made them."""
    return block(*arguments[:2], True)[1][0]


def _stvit(model: STViT, x: Tensor) -> list[Stage]:
    calls = _calls(block for block in model.blocks if isinstance(block, (SeedBlock, SemanticBlock)))
    model.forward_features(x)
    numbers = {block: i for i, block in enumerate(model.blocks)}
    grid = patch_grid(x, model)
    return [_soft(numbers[block], _assignment(block, given), grid) for block, (given, _) in list(calls.items())]


def _stvit_swin(model: STViTSwin, x: Tensor) -> list[Stage]:
    blocks = [block for stage in model.stages for block in stage.blocks]
    layers = {layer: i for i, block in enumerate(blocks) for layer in block.modules() if type(layer) is SemanticLayers}
    if any(not isinstance(layer.stgm2, SemanticBlock) for layer in layers):
        raise ValueError(
            "the semantic tokens of key_windows='dense' attend inside of windows and have no share in most patches; "
            "create the model with key_windows='inside'"
        )
    calls = _calls([*layers, *(layer.stgm2 for layer in layers)])
    model.forward_features(x)
    stages = []
    for layer, number in layers.items():
        _, height, width, _ = calls[layer][0][0].shape  # of the image tokens
        stages.append(_soft(number, _assignment(layer.stgm2, calls[layer.stgm2][0]), (height, width)))
    return stages


def _supertoken(model: SuperTokenViT, x: Tensor) -> list[Stage]:
    stages, last = [], -1
    for i, stage in enumerate(model.stages):
        last += len(stage.blocks)
        if stage.blocks[-1].attn.cell != (1, 1):
            tokens = model.super_tokens(x, stage=i)
            shares = _all_shares(tokens)
            stages.append(_soft(last, shares.flatten(0, 1), (shares.shape[0], shares.shape[1])))
    return stages


def _all_shares(tokens: SuperTokens) -> Tensor:
    """(H, W, n) shares of all super tokens of the first image: zero but for the nine around each pixel."""
    association, (rows, columns) = tokens.association[0], tokens.grid  # (n, p, 9)
    numbers = torch.arange(1, rows * columns + 1, device=association.device).view(1, rows, columns, 1)
    table = neighbours(numbers).view(rows * columns, 1, 9).expand_as(association)  # 0 outside the grid
    shares = association.new_zeros(*association.shape[:2], rows * columns + 1).scatter_add(-1, table, association)
    cells = shares[..., 1:].unflatten(0, (1, rows, columns))  # (1, rows, columns, p, n)
    return from_cells(cells, tokens.cell, like=tokens.labels.unsqueeze(-1))[0]


def _lookupvit(model: LookupViT, x: Tensor) -> list[Stage]:
    calls = _calls(module for module in model.modules() if isinstance(module, GatherAttention))
    model.forward_features(x)
    stages = []
    for i, (gather, (given, _)) in enumerate(list(calls.items())):
        weights = gather(*given[:2], True)[1][0].double().mean(0).T  # (N, M); the last block has none without infusion
        weights = weights + torch.finfo(weights.dtype).tiny  # float32 weights of a patch may all have underflown
        stages.append(_soft(i, weights / weights.sum(-1, keepdim=True), patch_grid(x, model)))
    return stages


def _sit(model: SiT, x: Tensor) -> list[Stage]:
    calls = _calls(model.slimming)
    model.forward_features(x)
    stages, way_up = [], None
    for block, number in model.slim_before.items():
        step = unpooling(calls[model.slimming[number]][1][1])[0]
        way_up = step if way_up is None else wide_product(way_up, step)  # (H*W, K)
        stages.append(_soft(block, way_up, patch_grid(x, model)))
    return stages


TRACES: dict[type[nn.Module], Callable[[Any, Tensor], list[Stage]]] = {
    ReducedHost: _reduced,
    STViT: _stvit,
    STViTSwin: _stvit_swin,
    SuperTokenViT: _supertoken,
    LookupViT: _lookupvit,
    SiT: _sit,
}
