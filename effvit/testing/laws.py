"""Laws that contracts share: of token maps, and of two ways to run a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import RmsNormFp32
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost, TokenFeatures
from effvit.protocols import Layer
from effvit.recover import FILLS, to_map
from effvit.testing.surface import Backbone
from effvit.tokens import TokenMap

__all__ = [
    "assert_equal_scores_and_gradients",
    "assert_law",
    "copies_through_files",
    "double",
    "maps_and_scores",
    "maps_of_every_fill",
    "scores_and_gradients",
    "scores_and_intermediates",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


class DoubleRmsNorm(RmsNormFp32):
    """timm's ``RmsNormFp32`` without its cast to float32."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def double(model: ModelT) -> ModelT:
    """The model in float64, where no decision is a matter of rounding, in norms that timm computes in float32 too."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if type(module) is RmsNormFp32:
            module.__class__ = DoubleRmsNorm
    return twin


def assert_law(tokens: TokenMap) -> None:
    """source is a right inverse of anchor, and points to existing tokens."""
    number = tokens.anchor.shape[1]
    valid = torch.ones_like(tokens.anchor, dtype=torch.bool) if tokens.valid is None else tokens.valid
    place = torch.arange(number).expand_as(tokens.anchor)
    assert torch.equal(tokens.source.gather(1, tokens.anchor)[valid], place[valid])
    assert tokens.source.min() >= -1
    assert (tokens.source < tokens.counts().unsqueeze(1)).all()


def maps_and_scores(model: ReducedHost, x: Tensor) -> list[Tensor]:
    """The maps of all blocks and the scores."""
    return [*model.forward_intermediates(x, intermediates_only=True), model(x)]


def scores_and_intermediates(model: Backbone | ReducedHost, x: Tensor) -> list[object]:
    """What ``forward`` makes of the images, and ``forward_intermediates``."""
    return [model(x), model.forward_intermediates(x)]


def maps_of_every_fill(model: ReducedHost, features: TokenFeatures) -> list[Tensor]:
    """The tokens left as full maps by every fill that the model has what it needs for."""
    fills = [fill for fill in FILLS if fill != "attention" or model.recovery is not None]
    return [to_map(*features, fill, model.recovery) for fill in fills]


def scores_and_gradients(run: Layer, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``run`` makes of the images, and the gradients of the model's parameters that have one, by name."""
    model.zero_grad()
    scores = run(x)
    scores.square().sum().backward()
    return scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_scores_and_gradients(other: Layer, model: nn.Module, x: Tensor) -> None:
    """``other`` runs ``model`` in another way: it gives the same scores, and the parameters the same gradients."""
    expected, own = scores_and_gradients(model, model, x)
    scores, recorded = scores_and_gradients(other, model, x)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert recorded.keys() == own.keys()
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in own.values())  # all there is where the true one is 0
    for name, gradient in own.items():
        slack = max(noise, 1e-4 * gradient.abs().max().item())
        assert torch.allclose(recorded[name], gradient, rtol=1e-3, atol=slack), name


def copies_through_files(model: ModelT) -> Iterator[ModelT]:
    """The model as it comes back from pickle, and from torch.save."""
    yield pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
