"""Selected tokens in a LLaVA of transformers: `make test-transformers` runs this."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the transformers extra is not installed")

from pages import run_page


def test_fewer_tokens_for_llava(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page compares with LLaVA itself; that it would notice other positions, the last lines here show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    values = run_page("tutorials/fewer_tokens_for_llava.md", capsys)
    with torch.no_grad():
        renumbered = values["llava"](inputs_embeds=values["vectors"]).logits
    assert (renumbered - values["scores"])[:, -4:].abs().max() > 1e-3
    with pytest.raises(AssertionError, match="as many placeholders as tokens"):
        values["embedded"](values["whole"], values["chosen"])
