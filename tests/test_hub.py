"""Models on the Hugging Face Hub: pushed by timm with a card of ours, and loaded from there, bit for bit.

No test asks the network: see hub_stub.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models._hub
import torch
import yaml
from architectures import SIZES, SMALL, make_architecture
from hosts import SETTINGS, make_host
from hub_stub import Hub, put_up
from pages import example
from timm.models import push_to_hf_hub
from torch import Tensor, nn
from torchvision.utils import save_image

import effvit
from effvit.reducers import METHODS
from effvit.show.model_card import families, model_card

ROOT = Path(__file__).resolve().parents[1]
REPO = "someone/cheap-vit"
SMALL_SWIN: dict[str, Any] = {"embed_dim": 24, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 3, 4)}
NARROW: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 5}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return put_up(tmp_path / "cache", monkeypatch)


def plain() -> nn.Module:
    return timm.create_model("evit_deit_tiny_patch16_224", keep_rate=0.5, reduce_at=(1,), **NARROW).eval()


def images(model: nn.Module, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def calibrated() -> nn.Module:
    """A model whose thresholds are buffers that no keyword makes again."""
    model: Any = timm.create_model("dymu_deit_tiny_patch16_224", r_total=6, **NARROW).eval()
    effvit.calibrate(model, [images(model)])
    return model


def without_a_name() -> nn.Module:
    """timm knows it as ``sparsified`` alone: no method has a name with this host."""
    host = timm.create_model("vit_medium_patch16_reg4_gap_256", **NARROW)
    return effvit.sparsify(host, "tome", r=2, recover="nearest").eval()


MODELS = {
    "plain": (plain, (64, 64)),
    "buffers": (calibrated, (64, 64)),
    "sparsified": (without_a_name, (64, 64)),
    "architecture": (lambda: make_architecture("supertoken").eval(), SIZES["supertoken"][0]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_pushed_model_comes_back_by_its_address_bit_for_bit(kind: str, hub: Hub) -> None:
    make, size = MODELS[kind]
    model: Any = make()
    push_to_hf_hub(model, REPO, model_card=model_card(model, REPO, license="apache-2.0"))
    assert {path.name for path in hub.files(REPO).iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "pytorch_model.bin")
    }
    again: Any = timm.create_model(f"hf-hub:{REPO}", pretrained=True, cache_dir=hub.cache).eval()
    x = images(model, size)
    assert torch.equal(again(x), model(x))
    assert getattr(again, "settings", None) == getattr(model, "settings", None)


def test_usage_on_the_card_runs_in_a_process_of_its_own(hub: Hub, tmp_path: Path) -> None:
    model: Any = plain()
    push_to_hf_hub(model, REPO, model_card=model_card(model, REPO, license="apache-2.0"))
    (usage,) = re.findall(r"```python\n(.*?)```", (hub.files(REPO) / "README.md").read_text(), re.DOTALL)
    save_image(torch.rand(3, 80, 80), tmp_path / "image.jpg")
    code = f"{usage}import torch; torch.save([images, scores, features], 'seen.pth')"
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub.cache)}
    own["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | own
    )
    assert run.returncode == 0, run.stderr
    x, scores, features = torch.load(tmp_path / "seen.pth")
    assert x.shape == (1, 3, 64, 64)
    assert torch.equal(scores, model(x))
    assert features.shape == (1, 48, 4, 4)


def test_example_of_the_page_runs_and_the_data_set_is_named(hub: Hub) -> None:
    code = example("hub_and_clients.md", "cheap-fashion")
    names: dict[str, Any] = {"cache": hub.cache}
    exec(code.replace('fashion", pretrained=True', 'fashion", pretrained=True, cache_dir=cache'), names)
    assert names["cheap"].settings == {"r": 3, "prop_attn": True}
    readme = (hub.files("someone/cheap-fashion") / "README.md").read_text()
    assert yaml.safe_load(readme.split("---\n")[1])["datasets"] == ["fashion_mnist"]


def test_card_of_a_repository_is_written_once(hub: Hub) -> None:
    model = plain()
    for license in ("mit", "apache-2.0"):
        push_to_hf_hub(model, REPO, model_card=model_card(model, REPO, license=license))
    assert "\nlicense: mit\n" in (hub.files(REPO) / "README.md").read_text()


class TestCard:
    def text(self, model: nn.Module, **kwargs: Any) -> str:
        card: Any = model_card(model, REPO, **({"license": "apache-2.0"} | kwargs))
        return timm.models._hub.generate_readme(card, REPO.split("/")[1])

    def test_says_what_the_model_is_and_whose(self) -> None:
        model: Any = plain()
        text = self.text(model, license="cc-by-nc-4.0")
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front) == {
            "tags": ["timm", "effvit", "evit"],
            "pipeline_tag": "image-classification",
            "library_name": "timm",
            "license": "cc-by-nc-4.0",
        }
        expected = (
            "`deit_tiny_patch16_224` that computes fewer tokens by EViT: keep the patches",
            "- Image size: 64 x 64",
            "- Patch tokens: 16 in an image, 9 behind the last block",
            "- keep_rate: 0.5",
            "- reduce_at: [1]",
            "https://arxiv.org/abs/2202.07800",
            "- weights: cc-by-nc-4.0",
            "- official code of EViT: Apache-2.0",
            'timm.create_model("hf-hub:someone/cheap-vit", pretrained=True)',
            "@inproceedings{liang2022evit,",
        )
        assert [line for line in expected if line not in body] == []

    @pytest.mark.parametrize("method", SETTINGS)
    def test_of_every_method_has_its_settings_and_its_paper_where_there_is_one(self, method: str) -> None:
        model: Any = effvit.sparsify(make_host("class_token"), method, **SETTINGS[method])
        text = self.text(model)
        assert METHODS[method].summary in text
        assert all(f"  - {name}: " in text for name in model.settings)
        paper = families()[method].paper
        assert ("## Citation" in text and "@" in text) == (paper is not None)

    @pytest.mark.parametrize("case", SMALL)
    def test_of_every_architecture_names_its_paper(self, case: str) -> None:
        text = self.text(make_architecture(case))
        assert text.count("https://arxiv.org/abs/") == 1
        assert f"`{SMALL[case][0]}`" in text

    def test_of_a_method_on_an_architecture_cites_both(self) -> None:
        model = timm.create_model("tome_lvvit_small_patch16_224", r=2, **(NARROW | {"img_size": 64}))
        text = self.text(model)
        assert "bolya2023tome" in text
        assert "jiang2021lvvit" in text
        assert "official code of ToMe: CC-BY-NC 4.0. The official checkpoints, trained with the method, are" in text

    def test_of_a_host_with_windows_says_no_number_of_tokens(self) -> None:
        """A TinyViT ends each stage with a full map."""
        host = timm.create_model("tiny_vit_5m_224", embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
        text = self.text(effvit.sparsify(host, "tome", r=3))
        assert "`tiny_vit_5m_224` that computes fewer tokens by ToMe" in text
        assert "Patch tokens" not in text

    def test_of_a_method_of_ones_own_has_what_its_class_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model: Any = effvit.sparsify(make_host("class_token"), "evit")
        monkeypatch.setattr(model, "method", "mine")
        monkeypatch.setitem(METHODS, "mine", METHODS["evit"])
        assert "fewer tokens by mine: keep the patches" in self.text(model)

    def test_of_another_licence_has_its_name_and_address_where_they_are_given(self) -> None:
        card: Any = model_card(plain(), REPO, license="other")
        own = {"license_name": "research", "license_link": "https://example.org/licence"}
        front = timm.models._hub.generate_readme(card | own, "cheap-vit").split("---\n")[1]
        assert own.items() <= yaml.safe_load(front).items()

    @pytest.mark.parametrize(
        ("repo_id", "license", "message"),
        [
            ("cheap-vit", "mit", "repo_id must be 'user/name', got 'cheap-vit'"),
            ("hf-hub:someone/cheap-vit", "mit", "repo_id must be 'user/name', got 'hf-hub:someone/cheap-vit'"),
            (REPO, " ", "license must name the licence of the weights, e.g. 'apache-2.0', got ' '"),
        ],
    )
    def test_wrong_address_or_no_licence_is_refused(self, repo_id: str, license: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            model_card(plain(), repo_id, license=license)

    def test_model_of_another_package_is_refused(self) -> None:
        dense = timm.create_model("deit_tiny_patch16_224", **NARROW)
        with pytest.raises(ValueError, match=r"got a VisionTransformer; reduce it by effvit\.sparsify"):
            model_card(dense, REPO, license="mit")


def released_stvit_r(model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names of changsn/STViT-R, which numbers the blocks of the third stage through."""
    units = ("block", "semantic.stgm1", "semantic.stgm2", "semantic.blocks.0", "semantic.blocks.1", "recover")

    def name(own: str) -> str:
        own = re.sub(
            r"^stem\.conv(\d)\.(conv|bn)\.", lambda m: f"patch_embed.proj.{2 * int(m[1]) - 2}.{m[2][:2]}.", own
        )
        own = own.replace("proj.0.co.", "proj.0.c.").replace("proj.2.co.", "proj.2.c.").replace("stem.", "patch_embed.")
        own = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", own)
        for i, unit in enumerate(units):
            own = re.sub(
                rf"^stages\.2\.blocks\.(\d+)\.{unit}\.", lambda m, i=i: f"layers.2.blocks.{6 * int(m[1]) + i}.", own
            )
        return own.replace("stages.", "layers.").replace("head.fc.", "head.")

    return {name(own): value for own, value in model.state_dict().items()}


class TestOfficialWeights:
    """Of architectures whose official weights are public, timm's tags fetch them; here a stand-in has small ones."""

    @pytest.mark.parametrize(("size", "file"), [("small", "STViT-R-Swin-S.pth"), ("base", "STViT-R-Swin-B.pth")])
    def test_stvit_r_is_fetched_from_its_repository(self, size: str, file: str, hub: Hub, tmp_path: Path) -> None:
        name = f"stvit_r_swin_{size}_patch4_window7_224"
        source = timm.create_model(name, **SMALL_SWIN).eval()
        torch.nn.init.normal_(source.get_submodule("head.fc").weight)
        torch.save({"model": released_stvit_r(source), "epoch": 300}, tmp_path / file)
        (tmp_path / "uploaded").mkdir()
        (tmp_path / file).rename(tmp_path / "uploaded" / file)
        hub.upload_folder("csncsn/STViT-R", str(tmp_path / "uploaded"))
        for tagged in (f"{name}.in1k", name):
            model = timm.create_model(tagged, pretrained=True, cache_dir=hub.cache, **SMALL_SWIN).eval()
            assert model.pretrained_cfg["tag"] == "in1k"
            assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("method", ["", "evit_"])
    def test_lv_vit_is_fetched_from_its_release(self, method: str, tmp_path: Path) -> None:
        small = {"embed_dim": 48, "depth": 4, "num_heads": 3}
        source = timm.create_model("lvvit_small_patch16_224", **small)
        torch.save(source.state_dict(), tmp_path / "lvvit_s-26M-224-83.3.pth.tar")
        name = f"{method}lvvit_small_patch16_224.in1k"
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path, **small)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())

    def test_tags_are_listed_and_sizes_without_weights_have_none(self) -> None:
        listed = timm.list_pretrained("stvit_*")
        assert listed == [f"stvit_r_swin_{size}_patch4_window7_224.in1k" for size in ("base", "small")]
        assert "tome_lvvit_medium_patch16_224.in1k" in timm.list_pretrained("tome_lvvit_*")
