"""The zoo's names under what timm's own model tests assert (its tests/test_models.py, timm 1.0.31).

Scripting by ``torch.jit.script`` is left out: a TokenMap is a dataclass, which TorchScript cannot type.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from hosts import released
from safetensors.torch import save_file
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import effvit
from effvit.hosts.host import ReducedHost
from effvit.zoo import default_cfgs

METHODS = effvit.list_methods()
# One small name of every kind of host; the other sizes differ in numbers only.
KINDS = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
    "eva02_tiny_patch14_336",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "vit_relpos_medium_patch16_cls_224",
    "vit_srelpos_small_patch16_224",
    "vit_relpos_small_patch16_rpn_224",
    "lvvit_small_patch16_224",
    "illama_tiny_patch16_224",
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_radio_v3",
)
NAMES = [f"{method}_{host}" for method in METHODS for host in KINDS if f"{method}_{host}" in default_cfgs]
FX_NAMES = [f"{method}_deit_tiny_patch16_224" for method in METHODS] + [
    "tome_vit_base_patch16_siglip_224",
    "evit_eva02_tiny_patch14_336",
    "ats_vit_small_patch16_dinov3",
    "gtp_beit_base_patch16_224",
    "ats_vit_relpos_medium_patch16_cls_224",
]


def build(name: str, **kwargs: object) -> nn.Module:
    """The model narrow, three blocks deep and for a small input, so that every name is quick."""
    size = 8 * int(name.rpartition("patch")[2][:2])
    small = {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": size, **kwargs}
    if name.startswith("dymu_"):  # random weights have no learnt thresholds
        small = {"thresholds": (0.5, 0.5, 0.5)} | small
    return timm.create_model(name, **small)


def build_for_one_size(name: str, **kwargs: object) -> nn.Module:
    """``build`` for images of one size; classes with relative positions take no others, and no keyword that says so."""
    return build(name, **kwargs, **({} if "beit" in name or "relpos" in name else {"dynamic_img_size": False}))


def images(model: nn.Module, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def tracer_kwargs() -> dict[str, list]:
    return {
        "leaf_modules": list(get_notrace_modules()),
        "autowrap_functions": list(get_notrace_functions()),
    }


def node_names(model: nn.Module, name: str) -> tuple[list[str], list[str]]:
    """Nodes of the graphs in train and eval mode; a warning, which is an error here, if they differ unexpectedly."""
    differ = name.startswith("dynamicvit_")
    return get_graph_node_names(model, tracer_kwargs=tracer_kwargs(), suppress_diff_warning=differ)


@pytest.mark.parametrize("name", NAMES)
class TestTimmName:
    def test_forward_has_the_right_shape_and_is_repeatable_under_checkpointing(self, name: str) -> None:
        model = build(name).eval()
        x = images(model)
        out = model(x)
        assert out.shape[0] == 1
        assert not out.isnan().any()
        model.set_grad_checkpointing()
        assert torch.allclose(model(x), out, rtol=1e-4, atol=1e-5)

    def test_backward_gives_every_parameter_a_gradient(self, name: str) -> None:
        model = build(name, num_classes=42).train()
        out = model(images(model, batch=2))
        out = sum(out) if isinstance(out, tuple) else out
        out.mean().backward()
        assert out.shape[-1] == 42
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.isnan().any(), parameter_name

    def test_configuration_and_classifier_follow_timm(self, name: str) -> None:
        model = build(name).eval()
        cfg = model.default_cfg
        x = images(model)
        assert cfg["num_classes"] >= 0
        assert model.num_features > 0
        assert model.head_hidden_size > 0
        features = model.forward_features(x)
        assert features.shape[-1] == model.num_features
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape[-1] == model.head_hidden_size
        model.reset_classifier(0)
        assert model(x).shape == pooled.shape
        assert build(name, num_classes=0).eval()(x).shape == pooled.shape
        keys = set(build(name).state_dict())
        classifier = cfg["classifier"] or ()
        if model.pretrained_cfg["num_classes"]:
            for part in (classifier,) if isinstance(classifier, str) else classifier:
                assert f"{part}.weight" in keys
        assert f"{cfg['first_conv']}.weight" in keys

    def test_forward_intermediates_has_a_map_for_every_block(self, name: str) -> None:
        model = build(name).eval()
        x = images(model)
        assert len(model.feature_info) >= 3
        final, maps = model.forward_intermediates(x)
        assert len(maps) == len(model.blocks)
        for features in maps:
            assert features.shape == (1, model.embed_dim, *model.patch_embed.grid_size)
            assert not features.isnan().any()
        assert torch.allclose(final, model.forward_features(x), rtol=1e-4, atol=1e-5)
        model.set_grad_checkpointing()
        assert torch.allclose(model.forward_intermediates(x)[0], final, rtol=1e-4, atol=1e-5)

    def test_features_only_gives_maps_as_feature_info_says(self, name: str) -> None:
        model = build(name, features_only=True).eval()
        assert model.feature_info.channels() == [model.model.embed_dim] * 3
        maps = model(images(model.model))
        for features, reduction in zip(maps, model.feature_info.reduction(), strict=True):
            size = model.model.patch_embed.img_size
            assert features.shape[-2:] == (size[0] // reduction, size[1] // reduction)


@pytest.mark.parametrize("name", FX_NAMES)
class TestFxTracing:
    """Torchvision warns if the graphs of train and eval mode differ, which only those of DynamicViT may.

    It samples a policy in training and drops patches in evaluation.
    """

    def test_traced_model_is_bit_equal(self, name: str) -> None:
        model = build_for_one_size(name).eval()
        x = images(model)
        nodes, _ = node_names(model, name)
        traced = create_feature_extractor(
            model, return_nodes={nodes[-1]: "out"}, tracer_kwargs=tracer_kwargs(), suppress_diff_warning=True
        )
        with torch.no_grad():  # with gradients a plain run takes sums of a map beside the fused kernel
            assert torch.equal(traced(x)["out"], model(x))

    def test_traced_model_gives_every_parameter_a_gradient(self, name: str) -> None:
        model = build_for_one_size(name, num_classes=42).train()
        nodes, _ = node_names(model, name)
        traced = create_feature_extractor(
            model,
            train_return_nodes=[nodes[0][-1]] if isinstance(nodes[0], list) else [nodes[-1]],
            eval_return_nodes=[nodes[-1]],
            tracer_kwargs=tracer_kwargs(),
            suppress_diff_warning=True,
        )
        (out,) = traced(images(model, batch=2)).values()
        out.mean().backward()
        assert all(p.grad is not None for p in traced.parameters())


def test_symbolic_tracing_of_dynamic_sizes_is_refused() -> None:
    model = build("evit_vit_small_patch16_dinov3").eval()
    assert model.dynamic_img_size
    with pytest.raises(TypeError, match=r"create it with dynamic_img_size=False, or use torch.export"):
        get_graph_node_names(model, tracer_kwargs=tracer_kwargs())


@pytest.mark.parametrize("name", released(effvit.list_models(), set(effvit.list_models()[::5])))
def test_every_name_builds_on_the_meta_device_with_the_settings_of_its_method(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    if isinstance(model, ReducedHost):
        assert name.startswith(f"{model.method}_")
        assert model.reducers


def test_tags_carry_the_weights_of_the_host() -> None:
    own = timm.get_pretrained_cfg("evit_deit_small_patch16_224.fb_in1k")
    host = timm.get_pretrained_cfg("deit_small_patch16_224.fb_in1k")
    assert own.hf_hub_id == host.hf_hub_id == "timm/deit_small_patch16_224.fb_in1k"
    assert own.architecture == "evit_deit_small_patch16_224"
    assert "evit_deit_small_patch16_224.fb_in1k" in timm.list_pretrained("evit_*")


def test_pretrained_weights_load_from_a_local_file(tmp_path: Path) -> None:
    dense = timm.create_model("deit_tiny_patch16_224").eval()
    save_file(dense.state_dict(), tmp_path / "weights.safetensors")
    model = timm.create_model(
        "evit_deit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")},
        keep_rate=1.0,
    ).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(x), dense(x))


def test_settings_survive_the_round_trip_through_a_hub_folder(tmp_path: Path) -> None:
    model = timm.create_model(
        "tome_deit_tiny_patch16_224", r=(5, -1.0), prop_attn=False, recover="nearest", num_classes=5
    ).eval()
    save_for_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "tome_deit_tiny_patch16_224"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded(x), model(x))
    assert loaded.settings == model.settings
    assert loaded.recover == "nearest"


def test_settings_are_json_plain() -> None:
    for method in METHODS:
        model = build(f"{method}_deit_tiny_patch16_224")
        assert json.loads(json.dumps(model.settings)) == model.settings
        again = effvit.sparsify(model, method, **model.settings)
        assert again.token_counts() == model.token_counts()


def test_features_only_prunes_blocks_and_keeps_the_reduction() -> None:
    model = timm.create_model("evit_deit_tiny_patch16_224", features_only=True, out_indices=(3, 6)).eval()
    assert len(model.model.blocks) == 7
    maps = model(torch.randn(1, 3, 224, 224))
    assert [m.shape for m in maps] == [(1, 192, 14, 14)] * 2
    assert model.model.token_counts()[-1] == 99


def test_lvvit_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6
            for name in ("lvvit_small_patch16_224", "lvvit_medium_patch16_224")
        }
    assert sizes == pytest.approx({"lvvit_small_patch16_224": 26.2, "lvvit_medium_patch16_224": 55.8}, rel=0.01)
