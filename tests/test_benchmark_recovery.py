"""The benchmark of dense recovery: what it takes for recovery, and that it leaves the package as it was."""

from __future__ import annotations

import itertools

import timm
import torch
from scripts import load_tool

from effvit.hosts import host
from effvit.recover import to_grid
from effvit.tokens import TokenMap

TOOL = load_tool("benchmark_recovery")
SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}


def test_every_call_that_recovers_is_timed_and_nothing_stays_patched(monkeypatch) -> None:
    model = timm.create_model("evit_deit_tiny_patch16_224", recover="last", reduce_at=(1, 2), **SMALL).eval()
    batch, remember = torch.rand(2, 3, 64, 64), TokenMap.remember
    ticks = itertools.count()
    monkeypatch.setattr(TOOL, "now", lambda: float(next(ticks)))
    with TOOL.timed_recovery() as seconds, torch.inference_mode():
        model.forward_intermediates(batch, indices=1, intermediates_only=True)
    assert seconds == [1.0] * 4  # remembers at first and before both blocks that drop, then fills
    assert host.to_grid is to_grid
    assert TokenMap.remember is remember


def test_shares_are_of_the_rest_of_a_pass(monkeypatch) -> None:
    model = timm.create_model("evit_deit_tiny_patch16_224", recover="zero", reduce_at=(1,), **SMALL).eval()
    ticks = iter(range(1000))
    monkeypatch.setattr(TOOL, "now", lambda: float(next(ticks)))
    shares = TOOL.recovery_shares(model, torch.rand(1, 3, 64, 64), rounds=3)
    assert shares.tolist() == [0.5] * 3  # the fill takes one of the three ticks of a pass


def test_table_has_a_cell_for_each_fill() -> None:
    row = {"host": "h", "method": "evit", "share": 0.0123, "interval": [0.011, 0.014]}
    lines = TOOL.table({"results": [row | {"fill": "last"}, row | {"fill": "attention"}]})
    assert lines[-1].count("1.23 (1.10 to 1.40)") == 2
