"""Batches whose images keep different numbers of tokens: padded or packed, whichever is faster for the batch."""

from __future__ import annotations

import pytest
import torch
from hosts import make_images, make_model
from torch import Tensor

from effvit import attention
from effvit.hosts.host import ReducedHost
from effvit.reducers import METHODS, ragged
from effvit.reducers.ragged import packs

RAGGED_METHODS = sorted(name for name, method in METHODS.items() if "ragged" in method.defaults())


def uneven(model: ReducedHost) -> Tensor:
    """Images (3, 3, H, W) of different content, so that they keep different numbers of tokens."""
    x = make_images(model, 3)
    x[1] *= 0.2
    x[2, :, :24] = 0
    return x


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every call of the attention of packed batches."""
    calls: list[None] = []
    attend = attention.variable_length_attention

    def counting(*args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(None)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "variable_length_attention", counting)
    return calls


@pytest.mark.parametrize("method", RAGGED_METHODS)
class TestAuto:
    def test_it_is_the_default(self, method: str) -> None:
        assert METHODS[method].defaults()["ragged"] == "auto"

    def test_a_batch_that_is_packed_scores_as_padded(
        self, method: str, packed_calls: list[None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        padded, auto = (make_model(method, "class_token", ragged=way) for way in ("padded", "auto"))
        x = uneven(padded)
        monkeypatch.setattr(ragged, "MACS_PER_IMAGE", 0)
        monkeypatch.setattr(ragged, "MACS_PER_FEATURE", 0)
        with torch.no_grad():
            expected, maps = padded(x), padded.forward_intermediates(x, intermediates_only=True)
            assert not packed_calls
            assert torch.allclose(auto(x), expected, atol=1e-5)
            assert packed_calls
            for own, other in zip(auto.forward_intermediates(x, intermediates_only=True), maps, strict=True):
                assert torch.allclose(own, other, atol=1e-5)

    def test_small_models_are_padded(self, method: str, packed_calls: list[None]) -> None:
        model = make_model(method, "class_token")
        with torch.no_grad():
            model(uneven(model))
        assert not packed_calls

    def test_training_pads_even_behind_frozen_blocks(
        self, method: str, packed_calls: list[None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stochastic depth of a block that trains drops single images, which a packed batch does not let it."""
        monkeypatch.setattr(ragged, "MACS_PER_IMAGE", 0)
        monkeypatch.setattr(ragged, "MACS_PER_FEATURE", 0)
        model = make_model(method, "class_token")
        model.train()
        for block in model.blocks[:3]:
            block.eval().requires_grad_(False)
        model(uneven(model)).sum().backward()
        assert not packed_calls


class TestPadsOrPacks:
    """``ragged="auto"`` is a matter of speed alone: what it takes follows from the counts, and results are equal."""

    LENGTHS = (196, 120, 60, 100)

    @staticmethod
    def queries(dim: int) -> Tensor:
        return torch.empty(4, dim // 64, 197, 64)

    def test_padding_that_costs_more_than_packing_is_packed_away(self) -> None:
        with torch.no_grad():
            assert packs("auto", self.LENGTHS, 1, self.queries(384))
            assert not packs("auto", (196, 194, 195, 196), 1, self.queries(384))
            assert not packs("auto", (196,), 1, self.queries(768)[:1])

    def test_narrow_models_are_padded_where_wide_ones_are_packed(self) -> None:
        slightly = (196, 190, 188, 186)
        with torch.no_grad():
            assert packs("auto", slightly, 1, self.queries(768))
            assert not packs("auto", slightly, 1, self.queries(192))

    def test_what_may_train_is_padded(self) -> None:
        assert not packs("auto", self.LENGTHS, 1, self.queries(384))

    def test_unread_counts_and_other_devices_are_padded(self) -> None:
        with torch.no_grad():
            assert not packs("auto", None, 1, self.queries(384))
            assert not packs("auto", self.LENGTHS, 1, self.queries(384).to("meta"))

    def test_the_setting_rules(self) -> None:
        assert packs("packed", None, 1, self.queries(64))
        with torch.no_grad():
            assert not packs("padded", self.LENGTHS, 1, self.queries(768))
