"""Reduced models in transformers' own wrappers of timm, and under LoRA of peft: `make test-transformers` runs this.

Beside them, tests/test_transformers.py tests this package's own backbone for transformers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("peft", reason="make test-transformers installs it")

import peft
from architectures import SIZES
from architectures import SMALL as ARCHITECTURES
from hosts import HOSTS, SETTINGS, make_host, make_images, make_model
from hub_stub import put_up
from pages import example
from timm.models import push_to_hf_hub, save_for_hf
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, TimmBackbone, TimmWrapperConfig

import effvit

PAGE = "hub_and_clients.md"
NARROW: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 5}


def images(size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def named(name: str, **settings: Any) -> nn.Module:
    return timm.create_model(name, **(NARROW | settings)).eval()


def calibrated() -> nn.Module:
    model: Any = named("dymu_deit_tiny_patch16_224", r_total=6)
    effvit.calibrate(model, [images()])
    return model


def architecture() -> nn.Module:
    name, settings = ARCHITECTURES["supertoken"]
    return timm.create_model(name, **settings).eval()


MODELS = {
    "named": lambda: named("evit_deit_tiny_patch16_224", keep_rate=0.5, reduce_at=(1,)),
    "sparsified": lambda: effvit.sparsify(named("vit_medium_patch16_reg4_gap_256"), "tome", r=2).eval(),
    "learnt buffers": calibrated,
    "buffers of no file": lambda: named("tome_vit_small_patch16_dinov3", r=2),
    "architecture": architecture,
}


def size_of(kind: str) -> tuple[int, int]:
    return SIZES["supertoken"][0] if kind == "architecture" else (64, 64)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class TestTimmWrapper:
    def config(self, folder: Path) -> TimmWrapperConfig:
        """The config of a folder of timm, without what transformers passes to timm a second time."""
        config = AutoConfig.from_pretrained(folder)
        assert isinstance(config, TimmWrapperConfig)
        config.model_args.pop("num_classes")
        return config

    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "evit_deit_tiny_patch16_224"])
    def test_folder_of_timm_is_refused_by_transformers_even_of_a_dense_model(self, name: str, tmp_path: Path) -> None:
        """timm 1.0.31 records num_classes among the arguments of a model, which transformers gives too."""
        save_for_hf(named(name), str(tmp_path), safe_serialization=True)
        with pytest.raises(TypeError, match="multiple values for keyword argument 'num_classes'"):
            AutoModelForImageClassification.from_pretrained(tmp_path)

    @pytest.mark.parametrize("kind", MODELS)
    def test_classifier_of_a_folder_gives_the_same_scores_and_so_does_its_own_folder(
        self, kind: str, tmp_path: Path
    ) -> None:
        model, x = MODELS[kind](), images(size_of(kind))
        save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)
        config = self.config(tmp_path / "timm")
        wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "timm", config=config).eval()
        assert torch.equal(wrapped(x).logits, model(x))
        wrapped.save_pretrained(tmp_path / "transformers")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "transformers").eval()
        assert torch.equal(again(x).logits, model(x))

    @pytest.mark.parametrize("kind", MODELS)
    def test_features_are_those_of_the_model_and_hidden_states_its_full_maps(self, kind: str, tmp_path: Path) -> None:
        model: Any = MODELS[kind]()
        x = images(size_of(kind))
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        wrapped = AutoModel.from_pretrained(tmp_path, config=self.config(tmp_path)).eval()
        with torch.no_grad():
            found = wrapped(x, output_hidden_states=True)
            features, maps = model.forward_intermediates(x)
        assert torch.equal(found.last_hidden_state, features)
        assert torch.equal(found.pooler_output, model.forward_head(features, pre_logits=True))
        assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, maps, strict=True))

    def test_repository_that_timm_has_pushed_to_is_loaded_like_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub, model = put_up(tmp_path, monkeypatch), MODELS["named"]()
        push_to_hf_hub(model, "someone/cheap-vit")
        config = AutoConfig.from_pretrained("someone/cheap-vit", cache_dir=hub.cache)
        config.model_args.pop("num_classes")
        wrapped = AutoModelForImageClassification.from_pretrained(
            "someone/cheap-vit", config=config, cache_dir=hub.cache
        ).eval()
        assert torch.equal(wrapped(images()).logits, model(images()))

    def test_example_of_the_page_runs_and_its_folder_needs_no_help(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(example(PAGE, "AutoModelForImageClassification"), names)
        x = torch.rand(2, 1, 28, 28)
        assert [features.shape for features in names["backbone"](x).feature_maps] == [(2, 96, 7, 7)] * 2
        again = AutoModelForImageClassification.from_pretrained("cheaper").eval()
        assert torch.equal(again(x).logits, effvit.sparsify(names["vit"], "tome", r=3).eval()(x))


class TestTimmBackbone:
    @pytest.mark.parametrize("kind", MODELS)
    def test_folder_of_timm_is_a_backbone_of_full_maps(self, kind: str, tmp_path: Path) -> None:
        model: Any = MODELS[kind]()
        x = images(size_of(kind))
        save_for_hf(model, str(tmp_path))
        backbone = TimmBackbone.from_pretrained(f"local-dir:{tmp_path}", out_indices=(1, 3)).eval()
        with torch.no_grad():
            maps = backbone(x).feature_maps
            expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        assert backbone.channels == [features.shape[1] for features in maps]
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


class TestOwnHost:
    """The host of the page that is made of the modules of a Dinov2Model."""

    @pytest.fixture
    def names(self) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(example(PAGE, "class Dinov2Host"), names)
        for parameter in names["model"].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return names

    def test_features_are_those_of_transformers_if_nothing_is_reduced(self, names: dict[str, Any]) -> None:
        x = images((56, 56))
        with torch.no_grad():
            expected = names["model"](x).last_hidden_state
            dense = names["dense"].forward_features(x)
            same = effvit.sparsify(names["dense"], "tome", r=0).forward_features(x)
            reduced = names["cheap"].forward_features(x)
        assert (dense - expected).abs().max() < 1e-5
        assert torch.equal(same, dense)
        assert reduced.shape[1] < dense.shape[1]

    def test_parameters_are_those_of_the_model_of_transformers(self, names: dict[str, Any]) -> None:
        theirs = {id(parameter): name for name, parameter in names["model"].named_parameters()}
        for host in (names["dense"], names["cheap"]):
            own = {id(parameter) for parameter in host.parameters()}
            assert {theirs[one] for one in theirs.keys() - own} == {"embeddings.mask_token"}
            assert own <= theirs.keys()

    @pytest.mark.parametrize("method", ["evit", "ats", "expedite"])
    def test_a_step_of_a_reduced_model_trains_it(self, names: dict[str, Any], method: str, tmp_path: Path) -> None:
        model = copy.deepcopy(names["model"])
        cheap = effvit.sparsify(names["Dinov2Host"](model), method, **SETTINGS[method]).train()
        x = images((56, 56))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        cheap(x).square().sum().backward()
        torch.optim.SGD(cheap.parameters(), lr=0.1).step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed >= before.keys() - {"embeddings.mask_token"} - {name for name in before if "k_proj.bias" in name}
        model.save_pretrained(tmp_path)
        again = names["Dinov2Model"].from_pretrained(tmp_path)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


ATTENTION = r".*\.attn\.(qkv|q_proj|k_proj|v_proj|proj)"


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of products that another layer, or other memory, makes in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestLora:
    """In float64, so that no token changes its place by rounding."""

    def adapted(self, model: nn.Module) -> Any:
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["head"]))

    def trained(self, model: nn.Module, x: Tensor) -> Any:
        """The model with an adapter that has taken three steps."""
        adapted = self.adapted(model)
        weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(adapted(x), torch.arange(len(x))).backward()
            optimizer.step()
        assert all(weight.grad is not None and weight.grad.any() for weight in weights)
        return adapted.eval()

    @pytest.mark.parametrize("method", SETTINGS)
    def test_adapter_changes_the_outputs_trains_alone_and_can_be_merged(self, method: str, tmp_path: Path) -> None:
        model = make_model(method, "class_token").double().eval()
        plain, x = copy.deepcopy(model), make_images(model).double()
        with torch.no_grad():
            before = plain(x)
            assert_close(self.adapted(copy.deepcopy(model)).eval()(x), before)  # B of LoRA begins at zero
        adapted = self.trained(model, x)
        with torch.no_grad():
            after = adapted(x)
            assert not torch.allclose(after, before)
            with adapted.disable_adapter():
                assert_close(adapted(x), before)
            adapted.save_pretrained(tmp_path)
            assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(x), after)
            merged: Any = adapted.merge_and_unload()
            assert type(merged) is type(plain)
            assert merged.settings == plain.settings
            torch.testing.assert_close(merged(x), after, rtol=1e-9, atol=1e-9)
            plain.load_state_dict(merged.state_dict())  # under the names of the model without an adapter
            assert_close(plain(x), merged(x))

    @pytest.mark.parametrize("host", HOSTS)
    def test_adapter_on_every_host_gets_gradients_in_all_its_weights(self, host: str) -> None:
        model = make_model("tome", host).double().train()
        x = make_images(model).double()
        inner = r"\.linear" if host == "gemma4" else ""  # timm wraps these in a class that peft does not know
        layers = ATTENTION + inner
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
        outputs = adapted(x)
        (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)

    def test_timm_alone_leaves_out_the_adapter_of_the_projection_of_dinov3(self) -> None:
        """It reads the weight of qkv and adds a bias; a reduced model calls the layer, so that its adapter acts."""
        dense = make_host("dinov3").double()
        adapted = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
        adapted(make_images(dense).double()).sum().backward()
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in without_gradient(adapted)} == {"qkv"}
        off = effvit.sparsify(make_host("dinov3").double(), "tome", r=0)
        adapted = peft.get_peft_model(off, peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
        adapted(make_images(off).double()).sum().backward()
        assert not without_gradient(adapted)

    def test_example_of_the_page_adapts_attention_and_head_alone(self) -> None:
        """12 blocks with 8 (96 + 288) and 8 (96 + 96) weights beside qkv and proj; a head of 96 x 10 and its bias."""
        training, merge, rest = example(PAGE, "LoraConfig").partition("merged =")
        names: dict[str, Any] = {}
        exec(training, names)
        weights = sum(weight.numel() for weight in names["adapted"].parameters() if weight.requires_grad)
        assert weights == 12 * 8 * (96 + 288 + 96 + 96) + 970
        exec(merge + rest, names)
        assert names["merged"].settings == names["cheap"].settings
        assert names["merged"].state_dict().keys() == names["vit"].state_dict().keys()

    def test_bare_name_of_the_second_projection_is_that_of_the_patch_embedding_too(self) -> None:
        adapted = peft.get_peft_model(MODELS["named"](), peft.LoraConfig(r=2, target_modules=["proj"]))
        assert any("patch_embed.proj.lora_A" in name for name, _ in adapted.named_parameters())

    def test_merging_writes_into_weights_that_are_shared(self) -> None:
        """LoRA's layers are in the reduced model alone; its merge changes the weights in place."""
        for share in (True, False):
            dense = make_host("class_token").double().eval()
            x = make_images(dense).double()
            with torch.no_grad():
                before = dense(x)
            cheap = effvit.sparsify(dense, "tome", r=2, share=share).eval()
            adapted = self.trained(cheap, x)
            with torch.no_grad():
                assert torch.equal(dense(x), before)
                adapted.merge_and_unload()
                assert torch.equal(dense(x), before) == (not share)


def without_gradient(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
