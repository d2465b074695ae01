"""The tool that checks all methods on all of timm's plain vision transformers, on the smallest of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from scripts import load_tool
from timm.models.vision_transformer import VisionTransformer

from effvit.hosts.towers import NAMES


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("check_hosts")


def test_hosts_are_plain_vision_transformers_of_every_kind(tool: ModuleType) -> None:
    hosts = tool.find_hosts("*tiny*")
    assert {"deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224"} <= set(hosts)
    assert {"swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224"} <= set(hosts)
    assert not [name for name in hosts if name.startswith(("swinv2_cr", "cait", "evit"))]
    assert hosts["eva02_tiny_patch14_224"] == {"depth": 2, "img_size": (70, 84)}


def test_towers_are_found_in_every_form_with_grids_of_whole_cells(tool: ModuleType) -> None:
    hosts = {
        name: small for form in ("qwen3", "deepseek", "gemma4") for name, small in tool.find_hosts(f"{form}*").items()
    }
    assert set(hosts) == set(NAMES)
    assert hosts["deepseek_vit_412m"] == {"depth": 2, "img_size": (6 * 14, 12 * 14)}
    assert hosts["gemma4_vit_167m_enc"] == {"depth": 2, "img_size": (6 * 16, 12 * 16)}


def test_grouped_key_heads_are_narrowed_to_the_depth(tool: ModuleType) -> None:
    assert tool.small_arguments("vit_large_patch16_sapiens2")["num_kv_heads"] == (16, 8)


def test_small_hosts_are_exact_or_refused_for_a_reason(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts.json"
    assert tool.main(["--pattern", "test_vit*", "--json", str(path)]) == 0
    table = capsys.readouterr().out
    assert "wrong:\n  none" in table
    written = json.loads(path.read_text())
    assert written["versions"] == {"timm": timm.__version__, "torch": torch.__version__}
    modules = ("vision_transformer", "vision_transformer_relpos")
    assert set(written["hosts"]) == {
        name for module in modules for name in timm.list_models("test_vit*", module=module)
    }
    for host in written["hosts"].values():
        assert {by_check["off"] for by_check in host.values()} == {"good"}
    assert written["hosts"]["test_vit2"]["tome"]["default"] == "good"
    assert written["hosts"]["test_vit2"]["evit"]["default"] == "refused: no class token"


def test_hosts_with_windows_are_exact_reduced_or_refused(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--pattern", "samvit_base_patch16_224", "--methods", "evit", "tome", "expedite"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[3:] == [
        "evit                0        1        0        0        1        0",
        "tome                1        0        0        1        0        0",
        "expedite            1        0        0        1        0        0",
        "refused:",
        "  evit, off: 1 windows",
        "  evit, default: 1 windows",
        "wrong:",
        "  none",
    ]


@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "eva02_large_patch14_448"])
def test_wide_names_with_native_resolution_are_exact(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """At the width of the name, two blocks deep."""
    assert tool.main(["--naflex", "--pattern", name, "--methods", "evit", "tome", "expedite"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[3:] == [
        "evit                1        0        0        1        0        0",
        "tome                1        0        0        1        0        0",
        "expedite            1        0        0        1        0        0",
        "refused:",
        "  none",
        "wrong:",
        "  none",
    ]


def test_refusals_are_counted_by_reason(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--pattern", "vit_little_patch16_reg4_gap_256", "--methods", "evit", "tome"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[3:] == [
        "evit                1        0        0        0        1        0",
        "tome                1        0        0        1        0        0",
        "refused:",
        "  evit, default: 1 no class token",
        "wrong:",
        "  none",
    ]


def test_difference_from_timm_is_found(tool: ModuleType) -> None:
    class Shifted(VisionTransformer):
        """Stands for a host whose own forward does something that the reduced one leaves out."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    dense = VisionTransformer(img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = tool.everything(dense, x)
        assert tool.check_off(dense, "tome", x, expected).result == "good"
        expected[0] = expected[0] + 1e-6
        assert tool.check_off(dense, "tome", x, expected).reason == "differs from timm although nothing is reduced"
    dense.__class__ = Shifted
    with torch.no_grad():
        outcome = tool.check(dense, ["tome"], x)["tome"]["off"]
    assert outcome.result == "wrong"  # an unknown class is no documented reason
    assert "Shifted is a subclass of timm.models.vision_transformer.VisionTransformer" in outcome.reason


def test_pattern_that_matches_nothing_is_an_error(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--pattern", "resnet*"])
    assert "no vision transformer of timm that methods know matches 'resnet*'" in capsys.readouterr().err
