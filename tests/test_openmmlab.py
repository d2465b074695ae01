"""The backbone, neck, optimizer constructor and hook for OpenMMLab, after mmdet's and mmseg's own backbone tests.

The patterns are those of mmdet's test_swin.py and test_pvt.py (3.5.1) and mmseg's test_vit.py: odd sizes, frozen
stages, recomputation, bad arguments.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("mmengine", reason="the mm extra is not installed")

from architectures import SMALL as ARCHITECTURES
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from safetensors.torch import save_file

import effvit
from effvit.dense.openmmlab import EffViT, load_config

PLAIN = "evit_deit_tiny_patch16_224"
SWIN: dict[str, Any] = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
SAM: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "global_attn_indexes": (1, 3),
    "neck_chans": 8,
    "out_indices": (1, 3),
}
WINDOWS: dict[str, dict[str, Any]] = {
    "tome_samvit_base_patch16": {"r": 60, **SAM},
    "expedite_samvit_base_patch16": {"cluster_at": 1, **SAM},
    "expedite_samvit_huge_patch16_at6_81": {"cluster_at": 2, **SAM},
    "tome_swin_tiny_patch4_window7_224": {"r": 20, **SWIN},
    "expedite_swinv2_tiny_window8_256": {"cluster_at": 0, **SWIN},
}
SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}


def backbone(name: str = PLAIN, **kwargs: Any) -> EffViT:
    torch.manual_seed(0)
    return MODELS.build({"type": "EffViT", "model_name": name, **SMALL, **kwargs})


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def whole_patches(x: Tensor) -> Tensor:
    """Images with zeros below and on the right, up to whole patches of 16."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % 16, 0, -height % 16))


class TestBackbone:
    @pytest.mark.parametrize("size", [(32, 32), (31, 33), (112, 137), (64, 64), (16, 200)])
    @pytest.mark.parametrize("name", [PLAIN, "ats_vit_small_patch16_dinov3", "tome_vit_base_patch16_siglip_224"])
    def test_any_image_size_gives_full_maps(self, name: str, size: tuple[int, int]) -> None:
        """Those of the image with zeros below and on the right, up to whole patches, as timm's dynamic_img_pad."""
        model, x = backbone(name, out_indices=(1, 3)).eval(), images(*size)
        maps = model(x)
        assert isinstance(maps, tuple)
        expected = (2, 48, math.ceil(size[0] / 16), math.ceil(size[1] / 16))
        assert [m.shape for m in maps] == [expected] * 2
        assert all(torch.equal(own, padded) for own, padded in zip(maps, model(whole_patches(x)), strict=True))

    @pytest.mark.parametrize("size", [(33, 170), (8, 8), (97, 65)])
    @pytest.mark.parametrize("case", [*ARCHITECTURES, "swin", "swinv2"])
    def test_architectures_and_swin_take_odd_sizes(self, case: str, size: tuple[int, int]) -> None:
        """Maps of ceil(side / stride), as those of mmseg's Swin, which pads to whole patches."""
        name, args = ARCHITECTURES.get(case, (f"{case}_tiny_window8_256", SWIN))
        settings = {key: value for key, value in args.items() if key != "num_classes"}
        model = EffViT(name.replace("swin_tiny_window8_256", "swin_tiny_patch4_window7_224"), **settings).eval()
        x = torch.randn(2, args.get("in_chans", 3), *size)
        tables = args.get("use_global") or args.get("relative_pos")  # documented to fix the image size
        if tables or (name.startswith("stvit_deit") and size == (8, 8)):
            with pytest.raises(ValueError, match="semantic tokens"):
                model(x)
            return
        maps = model(x)
        for features, stride in zip(maps, model.features.feature_info.reduction(), strict=True):
            assert list(features.shape[-2:]) == [math.ceil(side / stride) for side in size]
            assert features.isfinite().all()

    @pytest.mark.parametrize("size", [(33, 170), (8, 8), (97, 65)])
    @pytest.mark.parametrize("name", WINDOWS)
    def test_hosts_with_windows_give_full_maps_at_odd_sizes(self, name: str, size: tuple[int, int]) -> None:
        """Of SAM those of the blocks asked for, of Swin those of all stages; both are also given for whole patches."""
        model = EffViT(name, **WINDOWS[name]).eval()
        x = images(*size)
        maps = model(x)
        assert model.channels == [y.shape[1] for y in maps]
        for features, padded, stride in zip(maps, model(whole_patches(x)), model.strides, strict=True):
            assert list(features.shape[-2:]) == [math.ceil(side / stride) for side in size]
            assert features.isfinite().all()
            if name.startswith(("tome_sam", "expedite_sam")):
                assert torch.equal(features, padded)

    @pytest.mark.parametrize("size", [(33, 170), (8, 8), (97, 65)])
    @pytest.mark.parametrize("method", effvit.list_methods())
    def test_methods_take_odd_sizes(self, method: str, size: tuple[int, int]) -> None:
        absolute = {"gtp": {"num_prop": 30}, "tome": {"r": 30}, "dymu": {"thresholds": (0.5,) * 4}, "hot": {"k": 9}}
        settings: dict[str, Any] = absolute.get(method, {})
        x = images(*size)
        if method in ("sinkhorn", "patchmerger") and size == (8, 8):  # documented to need as many patches as they make
            with pytest.raises(ValueError, match=f"{method} in block 1 makes 11 tokens, but only 1 enter it"):
                backbone(f"{method}_deit_tiny_patch16_224").train()(x)
            settings = {"num_tokens": 1}
        model = backbone(f"{method}_deit_tiny_patch16_224", **settings).train()
        torch.manual_seed(2)  # DynamicViT samples which patches to drop
        maps = model(x)
        torch.manual_seed(2)
        for features, padded in zip(maps, model(whole_patches(x)), strict=True):
            assert list(features.shape[-2:]) == [math.ceil(side / 16) for side in size]
            assert torch.equal(features, padded)

    def test_numbers_of_tokens_may_be_for_larger_images_than_the_models_own(self) -> None:
        model = backbone("gtp_deit_tiny_patch16_224", num_prop=128)
        assert model.model.token_counts((50, 84)) == [4200 - 128 * (block + 1) for block in range(4)]
        assert model.model.token_counts((2, 84)) == [40, 1, 1, 1]

    @pytest.mark.parametrize("size", [(31, 33), (112, 137)])
    def test_pyramid_levels_fit_each_other_at_odd_sizes(self, size: tuple[int, int]) -> None:
        maps = backbone(pyramid=True).eval()(images(*size))
        grid = [math.ceil(side / 16) for side in size]
        for level, scale in zip(maps, (4, 2, 1, 0.5), strict=True):
            assert list(level.shape[-2:]) == [math.ceil(side * scale) for side in grid]

    def test_sparsify_gives_what_a_registered_name_gives(self) -> None:
        settings = {"keep_rate": 0.5, "reduce_at": (1, 2)}
        named = backbone(out_indices=(1, 2), **settings).eval()
        made = backbone("deit_tiny_patch16_224", out_indices=(1, 2), sparsify={"method": "evit", **settings}).eval()
        assert made.channels == named.channels
        for own, expected in zip(made(images(64, 64)), named(images(64, 64)), strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("settings", [{}, {"pyramid": True}, {"out_indices": 2}])
    def test_sparsify_keeps_the_maps_of_features_only(self, settings: dict[str, Any]) -> None:
        sparse = backbone("deit_tiny_patch16_224", sparsify={"method": "tome", "r": 2}, **settings).eval()
        named = backbone("tome_deit_tiny_patch16_224", r=2, **settings).eval()
        for own, expected in zip(sparse(images(64, 64)), named(images(64, 64)), strict=True):
            assert torch.equal(own, expected)

    def test_recover_beside_sparsify_is_sent_into_it(self) -> None:
        message = r"recover belongs to the method, .* give sparsify=dict\(\.\.\., recover='zero'\)"
        with pytest.raises(TypeError, match=message):
            backbone("deit_tiny_patch16_224", sparsify={"method": "evit"}, recover="zero")

    def test_sparsify_reduces_a_host_without_a_registered_name(self) -> None:
        grey = images(64, 64)[:, :1]

        def first_map(**settings: Any) -> Tensor:
            own = {"model_name": "vit_nano_patch4_28", "pretrained": True, "img_size": 64, "out_indices": (7,)}
            model = MODELS.build({"type": "EffViT", **own, **settings})
            model.init_weights()
            return model.eval()(grey)[0]

        dense = first_map()
        halved = first_map(sparsify={"method": "evit", "keep_rate": 0.5})
        torch.testing.assert_close(first_map(sparsify={"method": "evit", "keep_rate": 1.0}), dense)
        assert halved.shape == dense.shape
        assert not torch.allclose(halved, dense, atol=1e-3)
        with pytest.raises(ValueError, match="evit has no setting 'r'"):
            first_map(sparsify={"method": "evit", "r": 4})

    def test_maps_are_those_of_timm(self) -> None:
        model = backbone(out_indices=(1, 3)).eval()
        x = images(64, 64)
        expected = model.model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))

    def test_any_timm_transformer_serves_as_dense_baseline(self) -> None:
        assert backbone("deit_tiny_patch16_224", out_indices=(3,))(images(40, 56))[0].shape == (2, 48, 3, 4)
        swin = MODELS.build(
            {"type": "EffViT", "model_name": "swin_tiny_patch4_window7_224", "out_indices": (0, 1, 2, 3)}
        )
        assert [m.shape[1] for m in swin(images(64, 96))] == [96, 192, 384, 768]

    def test_settings_of_the_method_reach_the_model(self) -> None:
        model = backbone(keep_rate=0.5, reduce_at=(1,), recover="zero")
        assert model.model.settings["keep_rate"] == 0.5
        assert model.model.recover == "zero"

    def test_channels_are_those_of_the_maps(self) -> None:
        assert backbone(out_indices=(1, 3)).channels == [48, 48]
        assert backbone(pyramid=True).channels == [12, 24, 48, 48]

    def test_new_norms_give_each_map_zero_mean_over_channels(self) -> None:
        model = backbone(out_indices=(1, 3), out_norm=True).eval()
        for features in model(images(64, 64)):
            assert features.mean(1).abs().max() < 1e-5

    def test_frozen_stages_stop_gradients_and_stay_in_eval_mode(self) -> None:
        model = backbone(frozen_stages=2, drop_path_rate=0.5, out_indices=(3,)).train()
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any(f".{part}" in name for name in trains for part in ("patch_embed", "pos_embed", "cls_token"))
        assert not any(f"blocks.{i}." in name for name in trains for i in (0, 1))
        assert all(any(f"blocks.{i}." in name for name in trains) for i in (2, 3))
        assert not model.model.blocks[1].training
        assert model.model.blocks[2].training

    def test_all_stages_frozen_leave_nothing_to_train(self) -> None:
        model = backbone(frozen_stages=4, out_norm=True).train()
        assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def test_norm_eval_keeps_batch_norm_in_eval_mode(self) -> None:
        model = MODELS.build({"type": "EffViT", "model_name": "evit_lvvit_small_patch16_224", "norm_eval": True})
        model.train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert not any(norm.training for norm in norms)

    def test_recomputation_changes_no_map_and_no_gradient(self) -> None:
        plain, recomputed = backbone(), backbone(with_cp=True)
        recomputed.load_state_dict(plain.state_dict())
        x = images(64, 64)
        for model in (plain, recomputed):
            sum(m.square().sum() for m in model.train()(x)).backward()
        for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)

    def test_every_trained_parameter_gets_a_gradient(self) -> None:
        model = backbone(out_indices=(1, 2), out_norm=True).train()
        sum(m.square().sum() for m in model(images(64, 64))).backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


CONSTRUCTOR = "TrainedOptimWrapperConstructor"


class TestFrozen:
    def test_nothing_has_a_gradient_or_leaves_eval_mode(self) -> None:
        """Maps in training are those of eval mode: no dropout, no statistics, not even a gradient of the images."""
        model = backbone(out_indices=(1, 3), frozen=True)
        x = images(64, 64).requires_grad_()
        expected = model.eval()(x)
        maps = model.train()(x)
        assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert not [name for name, module in model.named_modules() if module.training]
        for features, own in zip(maps, expected, strict=True):
            assert not features.requires_grad
            assert torch.equal(features, own)

    def test_weights_of_a_file_stay_through_a_step_of_the_head(self, tmp_path: Path) -> None:
        """The optimizer holds the head alone: its weights change, those of the file do not."""
        save_file(timm.create_model("deit_tiny_patch16_224", **SMALL).state_dict(), tmp_path / "dense.safetensors")
        model = Detector(frozen=True, pretrained=str(tmp_path / "dense.safetensors"))
        model.backbone.init_weights()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        cfg = {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}, "constructor": CONSTRUCTOR}
        wrapper = build_optim_wrapper(model.train(), cfg)
        held = {id(p) for group in wrapper.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.head.parameters()}
        (features,) = model.backbone(images(64, 64))
        wrapper.update_params(model.head(features.mean((2, 3))).square().sum())
        same = {name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])}
        assert same == {name for name in before if name.startswith("backbone.")}

    def test_what_trains_is_treated_as_by_mmengine(self) -> None:
        """Of a half-frozen model too, where mmengine sorts out the rest."""
        model = Detector(frozen_stages=2)
        cfg: dict[str, Any] = {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}}
        cfg["paramwise_cfg"] = {"norm_decay_mult": 0.0, "custom_keys": {"backbone": {"lr_mult": 0.1}}}
        ours, theirs = (
            build_optim_wrapper(model, {**cfg, "constructor": name}).optimizer.param_groups
            for name in (CONSTRUCTOR, "DefaultOptimWrapperConstructor")
        )
        assert [(id(g["params"][0]), g["lr"], g["weight_decay"]) for g in ours] == [
            (id(g["params"][0]), g["lr"], g["weight_decay"]) for g in theirs
        ]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"frozen_stages": 2}, r"frozen=True freezes all stages, and frozen_stages=2 the first; give one of them"),
            (
                {"drop_path_rate": 0.1},
                r"drop_path_rate=0\.1 acts in training alone, and frozen=True keeps the backbone",
            ),
            ({"patch_drop_rate": 0.5}, r"patch_drop_rate=0\.5 acts in training alone"),
            ({"with_cp": True}, r"with_cp=True acts in training alone"),
            (
                {"out_norm": True},
                r"out_norm=True adds parameters that must be trained, and frozen=True would keep them",
            ),
            ({"pyramid": True}, r"pyramid=True adds parameters .* train a neck behind the backbone in its place"),
            ({"recover": "attention"}, r"recover='attention' adds parameters that must be trained"),
        ],
    )
    def test_settings_that_contradict_it_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            backbone(frozen=True, **settings)

    def test_example_of_the_page_runs(self) -> None:
        page = (Path(__file__).resolve().parents[1] / "docs" / "dense.md").read_text()
        (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "frozen=True" in block]
        names: dict[str, Any] = {}
        exec(code, names)
        assert [features.shape for features in names["backbone"](images(64, 64))] == [(2, 384, 4, 4)] * 4

    def test_rates_of_zero_contradict_nothing(self) -> None:
        assert backbone(frozen=True, drop_path_rate=0.0, frozen_stages=-1).frozen


class TestFinalNorm:
    @pytest.mark.parametrize("settings", [{}, {"sparsify": {"method": "tome", "r": 2}}, {"keep_rate": 0.5}])
    def test_maps_are_those_of_timm_under_its_norm(self, settings: dict[str, Any]) -> None:
        """The weights of the norm are drawn anew, so that it is told from a norm without any."""
        model = backbone(PLAIN if "keep_rate" in settings else "deit_tiny_patch16_224", final_norm=True, **settings)
        torch.nn.init.normal_(model.model.norm.weight)
        torch.nn.init.normal_(model.model.norm.bias)
        x = images(64, 64)
        plain = model.eval().model.forward_intermediates(x, indices=[3], intermediates_only=True, output_fmt="NLC")
        expected = model.model.norm(plain[0]).transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(model(x)[-1], expected, rtol=0, atol=0)

    def test_norm_of_a_file_is_loaded(self, tmp_path: Path) -> None:
        dense = timm.create_model("vit_small_patch16_dinov3", **SMALL)
        torch.nn.init.normal_(dense.norm.weight)
        save_file(dense.state_dict(), tmp_path / "dense.safetensors")
        file = str(tmp_path / "dense.safetensors")
        model = backbone("vit_small_patch16_dinov3", final_norm=True, out_indices=(1,), pretrained=file)
        model.init_weights()
        assert torch.equal(model.model.norm.weight, dense.norm.weight)

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("swin_tiny_patch4_window7_224", SWIN, "final_norm=True takes a plain ViT .* which swin_tiny_.* is not"),
            ("vit_base_patch16_gap_224", SMALL | {"fc_norm": True}, "final_norm=True takes a plain ViT with a norm"),
            ("deit_tiny_patch16_224", SMALL | {"out_norm": True}, "final_norm=True and out_norm=True both normalise"),
        ],
    )
    def test_models_without_such_a_norm_are_refused(self, name: str, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EffViT(name, final_norm=True, **settings)


class TestCentrePadding:
    """Against ``CenterPadding`` of dinov2/hub/utils.py@b8931f7: half of what is missing in front, the rest behind."""

    @pytest.mark.parametrize(
        ("size", "pad"), [((512, 512), (3, 3, 3, 3)), ((31, 57), (6, 7, 5, 6)), ((28, 42), (0, 0, 0, 0))]
    )
    def test_images_have_the_same_on_opposite_sides(self, size: tuple[int, int], pad: tuple[int, ...]) -> None:
        """``pad`` is what those lines give for patches of 14: on the left, on the right, above, below."""
        small = SMALL | {"depth": 1, "img_size": 56, "out_indices": (0,)}
        model = backbone("vit_small_patch14_dinov2", **small, centre_padding=True).eval()
        plain = backbone("vit_small_patch14_dinov2", **small).eval()
        x = images(*size)
        (features,) = model(x)
        assert features.shape[-2:] == (math.ceil(size[0] / 14), math.ceil(size[1] / 14))
        assert torch.equal(features, plain(F.pad(x, pad))[0])

    def test_models_without_patches_are_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"centre_padding=True pads to whole patches, and tiny_vit_5m_224 cuts none"
        ):
            EffViT("tiny_vit_5m_224", centre_padding=True)


class TestClassToken:
    @pytest.mark.parametrize("settings", [{}, {"final_norm": True, "frozen": True}])
    def test_each_map_comes_with_the_class_token_of_its_block(self, settings: dict[str, Any]) -> None:
        name = "tome_vit_small_patch16_dinov3"  # whose class token has four registers behind it
        model = backbone(name, r=2, out_indices=(1, 3), output_cls_token=True, **settings).eval()
        x = images(64, 64)
        take = {"indices": [1, 3], "norm": "final_norm" in settings, "intermediates_only": True}
        expected = model.model.forward_intermediates(x, **take, return_prefix_tokens=True)
        for (features, token), (own, prefix) in zip(model.train()(x), expected, strict=True):
            assert torch.equal(features, own)
            assert prefix.shape[1] == 5
            assert torch.equal(token, prefix[:, 0])
            assert token.requires_grad == ("frozen" not in settings)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [("vit_base_patch16_siglip_224", {}), (PLAIN, {"pyramid": True}), (PLAIN, {"out_norm": True})],
    )
    def test_backbones_without_one_beside_their_maps_are_refused(self, name: str, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=rf"needs a plain ViT that has one, .* which {name} with these settings"):
            backbone(name, output_cls_token=True, **settings)


class TestWeights:
    def test_pretrained_file_of_a_classifier_loads_without_its_head(self, tmp_path: Path) -> None:
        dense = timm.create_model("deit_tiny_patch16_224", **(SMALL | {"num_classes": 11}))
        save_file(dense.state_dict(), tmp_path / "dense.safetensors")
        model = backbone(out_indices=(1, 2), pretrained=str(tmp_path / "dense.safetensors"))
        model.init_weights()
        assert len(model.model.blocks) == 3
        for name, weight in model.model.state_dict().items():
            assert torch.equal(weight, dense.state_dict()[name]), name

    def test_position_embedding_of_another_size_is_resampled(self, tmp_path: Path) -> None:
        dense = timm.create_model("deit_tiny_patch16_224", **(SMALL | {"img_size": 96}))
        torch.save({"model": dense.state_dict()}, tmp_path / "dense.pth")
        model = backbone(pretrained=str(tmp_path / "dense.pth"))
        model.init_weights()
        assert model.model.pos_embed.shape == (1, 17, 48)

    def test_weights_of_timm_are_those_of_the_host(self) -> None:
        dense = timm.create_model("vit_nano_patch4_28", pretrained=True)
        model = MODELS.build({"type": "EffViT", "model_name": "vit_nano_patch4_28", "pretrained": True})
        model.init_weights()
        assert torch.equal(model.model.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight)

    @pytest.mark.parametrize("load", [lambda m, s: m.load_state_dict(s), lambda m, s: load_state_dict(m, s)])
    def test_a_trained_model_asks_for_no_weights(self, load: Any) -> None:
        """torch's way to load and mmengine's, which does not call ``load_state_dict``."""
        model = backbone(pretrained="no/such/file.pth")
        trained = {name: weight + 1 for name, weight in backbone().state_dict().items()}
        load(model, trained)
        model.init_weights()
        assert torch.equal(model.model.pos_embed, trained["features.model.pos_embed"])
        plain = backbone()
        plain.load_state_dict(trained)
        x = images(64, 64)
        assert torch.equal(model.eval()(x)[0], plain.eval()(x)[0])

    def test_a_second_start_keeps_what_was_trained(self, tmp_path: Path) -> None:
        save_file(timm.create_model("deit_tiny_patch16_224", **SMALL).state_dict(), tmp_path / "dense.safetensors")
        model = backbone(pretrained=str(tmp_path / "dense.safetensors"))
        model.init_weights()
        torch.nn.init.ones_(model.model.pos_embed)
        model.init_weights()
        assert torch.equal(model.model.pos_embed, torch.ones(1, 17, 48))

    def test_weights_that_were_never_loaded_are_missed(self) -> None:
        model = backbone(pretrained="some.pth")
        with pytest.raises(
            ValueError, match=r"has random weights: pretrained='some.pth' is loaded by init_weights\(\)"
        ):
            model(images(64, 64))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at some\.pth"):
            model.init_weights()

    def test_init_cfg_takes_the_backbone_out_of_a_detector(self, tmp_path: Path) -> None:
        trained = backbone()
        state = {f"backbone.{name}": weight + 1 for name, weight in trained.state_dict().items()}
        torch.save({"state_dict": state | {"head.weight": torch.ones(1)}, "meta": {}}, tmp_path / "epoch_1.pth")
        cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "epoch_1.pth"), "prefix": "backbone."}
        model = backbone(init_cfg=cfg)
        model.init_weights()
        assert torch.equal(model.model.pos_embed, trained.model.pos_embed + 1)

    @pytest.mark.parametrize(
        "reduction",
        [
            {"model_name": "hot_deit_tiny_patch16_224", "keep_rate": 0.4},
            {"sparsify": {"method": "hot", "keep_rate": 0.4, "reduce_at": (1,)}},
            {"sparsify": {"method": "evit", "keep_rate": 0.4, "reduce_at": (1,), "recover": "attention"}},
            {"sparsify": {"method": "dymu", "r_total": 6}},
        ],
        ids=["named", "live", "trained recovery", "dymu"],
    )
    def test_backbone_comes_back_from_its_config_and_a_checkpoint_of_mmengine(
        self, reduction: dict[str, Any], tmp_path: Path
    ) -> None:
        model = backbone(**({"model_name": "deit_tiny_patch16_224"} | reduction), out_indices=(2, 3))
        reduced = model.features.model
        if reduced.method == "dymu":
            effvit.calibrate(reduced, [images(64, 64)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_checkpoint({"state_dict": model.state_dict()}, str(tmp_path / "epoch_1.pth"))
        other = backbone(**({"model_name": "deit_tiny_patch16_224"} | reduction), out_indices=(2, 3))
        load_checkpoint(other, str(tmp_path / "epoch_1.pth"), strict=True)
        assert other.features.model.settings == reduced.settings
        x = images(64, 64)
        for a, b in zip(other.eval()(x), model.eval()(x), strict=True):
            assert torch.equal(a, b)

    def test_checkpoint_of_another_model_is_refused(self, tmp_path: Path) -> None:
        other = timm.create_model("deit_tiny_patch16_224", **(SMALL | {"embed_dim": 24}))
        save_file(other.state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"is a checkpoint of another model than this ReducedViT"):
            backbone(pretrained=str(tmp_path / "other.safetensors")).init_weights()
        torch.save({"state_dict": {"neck.weight": torch.ones(1)}}, tmp_path / "neck.pth")
        cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "neck.pth"), "prefix": "backbone."}
        model = backbone(init_cfg=cfg)
        with pytest.raises(ValueError, match=r"holds no weights under the prefix 'backbone'; its names start 'neck"):
            model.init_weights()

    def test_other_kinds_of_init_cfg_are_refused(self) -> None:
        model = backbone(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
        with pytest.raises(ValueError, match="takes only an init_cfg of type 'Pretrained', got 'Kaiming'"):
            model.init_weights()


class TestBadArguments:
    def test_unknown_name_names_the_nearest(self) -> None:
        with pytest.raises(ValueError, match="unknown model 'evit_deit_tiny_patch16_225'; did you mean evit_deit_tiny"):
            backbone("evit_deit_tiny_patch16_225")

    @pytest.mark.parametrize("indices", [(0, 4), (-5,), 5])
    def test_blocks_beyond_the_model(self, indices: Any) -> None:
        with pytest.raises(ValueError, match=r"goes beyond the 4 blocks, stages or levels of evit_deit_tiny"):
            backbone(out_indices=indices)

    def test_too_many_frozen_stages(self) -> None:
        with pytest.raises(ValueError, match=r"frozen_stages must be at most 4, the blocks or stages left .*, got 5"):
            backbone(frozen_stages=5)

    def test_method_that_cannot_serve_the_host(self) -> None:
        with pytest.raises(ValueError, match="evit scores patches by the class token"):
            backbone(PLAIN, class_token=False, global_pool="avg")

    @pytest.mark.parametrize(
        ("entry", "error", "message"),
        [
            ("tome", TypeError, "sparsify must be None or a dict .*, got 'tome'"),
            ({"r": 2}, ValueError, r"sparsify must be None or a dict .*, got \{'r': 2\}; add the method"),
            ({"method": "tom"}, ValueError, r"unknown method 'tom'; did you mean tome"),
        ],
    )
    def test_wrong_entry_sparsify(self, entry: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            backbone(PLAIN, sparsify=entry)

    def test_unknown_setting(self) -> None:
        with pytest.raises(ValueError, match="evit has no setting 'r'; it belongs to tome"):
            backbone(r=8)


class Detector(nn.Module):
    """A backbone and a head, as the optimizer constructor meets them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.backbone = backbone(out_indices=(3,), **settings)
        self.head = nn.Linear(48, 4)


def groups_by_name(rate: float = 0.5, **options: Any) -> dict[str, dict[str, Any]]:
    model = Detector()
    cfg = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
        "constructor": "LayerDecayOptimWrapperConstructor",
        "paramwise_cfg": {"layer_decay_rate": rate, **options},
    }
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


class TestLayerDecay:
    def test_rates_fall_from_the_head_to_the_stem(self) -> None:
        groups = groups_by_name()
        rates = [groups[f"backbone.features.model.blocks.{i}.mlp.fc1.weight"]["lr"] for i in range(4)]
        assert rates == [0.5 ** (4 - i) for i in range(4)]
        assert groups["backbone.features.model.patch_embed.proj.weight"]["lr"] == 0.5**5
        assert groups["head.weight"]["lr"] == 1.0

    @pytest.mark.parametrize("settings", [{"out_indices": (1, 3)}, {"out_indices": (0, 1)}, {"out_norm": True}])
    def test_levels_of_a_vit_are_mmpretrains(self, settings: dict[str, Any]) -> None:
        vits = pytest.importorskip("mmpretrain.models.backbones.vision_transformer")
        model = backbone(**settings)
        like = SimpleNamespace(num_layers=len(model.model.blocks))
        for name, _ in model.named_parameters():
            theirs = name.removeprefix("features.model.").replace("blocks.", "layers.")
            expected = vits.VisionTransformer.get_layer_depth(like, theirs)
            assert model.get_layer_depth(f"backbone.{name}", "backbone.") == expected, name
        assert model.get_layer_depth("neck.weight", "backbone.") == (expected[1] - 1, expected[1])

    @pytest.mark.parametrize(
        "name", ["swin_tiny_patch4_window7_224", "stvit_r_swin_tiny_patch4_window7_dense", "supertoken_small_224"]
    )
    def test_levels_of_a_pyramid_are_mmpretrains(self, name: str) -> None:
        """The six blocks of a dumbbell unit, which are not in ``blocks`` of the stage, count as those of Swin."""
        swins = pytest.importorskip("mmpretrain.models.backbones.swin_transformer")
        depths = (3, 5, 9, 3) if name.startswith("supertoken") else (2, 2, 6, 2)
        like, parts = SimpleNamespace(depths=depths), ("stgm1", "stgm2", "blocks.0", "blocks.1", "recover")
        with torch.device("meta"):
            model = EffViT(name, out_norm=True)
        for own, _ in model.named_parameters():
            theirs = own.removeprefix("features.model.").replace("layers.", "stages.").replace("stem.", "patch_embed.")
            for i, part in enumerate(parts, 1):
                theirs = theirs.replace(f"blocks.0.semantic.{part}.", f"blocks.{i}.").replace(
                    f"blocks.0.{part}.", f"blocks.{i}."
                )
            if ".downsample." in theirs:  # Swin's of mmpretrain end a stage
                stage = int(theirs.split(".")[1])
                theirs = f"stages.{stage - 1}.downsample.norm.weight"
            assert model.get_layer_depth(own) == swins.SwinTransformer.get_layer_depth(like, theirs), own

    def test_rates_of_the_recipe_are_detectron2s(self) -> None:
        """get_vit_lr_decay_rate(0.7, num_layers=12) of detectron2/modeling/backbone/vit.py."""
        config = load_config(Path(__file__).parents[1] / "configs/mmdet/mask-rcnn_vit-b_fpn_1x_coco.py")
        with torch.device("meta"):
            model = nn.ModuleDict({"backbone": MODELS.build(config.model.backbone), "neck": nn.Linear(2, 2)})
        groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        rates = {names[id(p)]: group["lr"] / 1e-4 for group in groups for p in group["params"]}
        prefix = "backbone.features.model."
        assert rates[f"{prefix}pos_embed"] == rates[f"{prefix}patch_embed.proj.bias"] == pytest.approx(0.7**13)
        for block in range(12):
            assert rates[f"{prefix}blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.7 ** (12 - block))
        assert rates["neck.weight"] == 1

    def test_decay_multipliers_of_the_config_hold(self) -> None:
        groups = groups_by_name(
            bias_decay_mult=0.5, custom_keys={"norm1": {"decay_mult": 2.0}, "head": {"lr_mult": 3.0}}
        )
        assert groups["backbone.features.model.blocks.0.mlp.fc1.bias"]["weight_decay"] == 0.025
        assert groups["backbone.features.model.blocks.0.norm1.weight"]["weight_decay"] == 0.1
        assert groups["backbone.features.model.blocks.0.norm2.bias"]["weight_decay"] == 0
        assert groups["head.bias"]["weight_decay"] == 0.025

    def test_vectors_and_position_embeddings_do_not_decay(self) -> None:
        groups = groups_by_name()
        assert groups["backbone.features.model.pos_embed"]["weight_decay"] == 0
        assert groups["backbone.features.model.blocks.0.norm1.weight"]["weight_decay"] == 0
        assert groups["backbone.features.model.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.05
        assert groups["head.bias"]["weight_decay"] == 0

    def test_keys_of_mmengine_still_hold(self) -> None:
        groups = groups_by_name(custom_keys={"head": {"lr_mult": 10.0}})
        assert groups["head.weight"]["lr"] == 10.0

    def test_bad_rates_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"layer_decay_rate must be in \(0, 1\], got 1.5"):
            groups_by_name(1.5)

    def test_a_model_without_our_backbone_is_refused(self) -> None:
        constructor = OPTIM_WRAPPER_CONSTRUCTORS.get("LayerDecayOptimWrapperConstructor")(
            {"optimizer": {"type": "SGD", "lr": 1.0}}, {"layer_decay_rate": 0.5}
        )
        with pytest.raises(ValueError, match="need a backbone of type EffViT, and this model has none"):
            constructor(nn.Linear(2, 2))


class TestKeepRateHook:
    def test_rate_follows_the_schedule(self) -> None:
        model = Detector()
        hook = HOOKS.build({"type": "KeepRateHook", "keep_rate": 0.5, "start_epoch": 1, "epochs": 2})
        rates = []
        for step in (0, 9, 10, 20, 40):
            hook.before_train_iter(SimpleNamespace(iter=step, train_dataloader=range(10), model=model), step)
            rates.append(next(iter(model.backbone.model.reducers.values())).keep_rate)
        assert rates[:2] == [1.0, 1.0]
        assert rates[2] > rates[3] > rates[4] == 0.5
        assert rates[3] == effvit.cosine_keep_rate(20, 10, 0.5, 1, 2)

    def test_classifiers_follow_the_schedule_too(self) -> None:
        dense = timm.create_model("deit_tiny_patch16_224", **SMALL)
        model = nn.Sequential(effvit.sparsify(dense, "evit", keep_rate=0.7))
        hook = HOOKS.build({"type": "KeepRateHook", "keep_rate": 0.5})
        hook.before_train_iter(SimpleNamespace(iter=0, train_dataloader=range(10), model=model), 0)
        assert {reducer.keep_rate for reducer in model[0].reducers.values()} == {0.5}

    def test_bad_rate_is_refused_when_the_hook_is_built(self) -> None:
        with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 0"):
            HOOKS.build({"type": "KeepRateHook", "keep_rate": 0})


def test_neck_is_found_by_its_name() -> None:
    neck = MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": 32, "out_channels": 8})
    assert [level.shape[-1] for level in neck((torch.randn(1, 32, 8, 8),))] == [32, 16, 8, 4, 2]


def test_configs_may_inherit_from_mmseg_and_mmdet(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("_base_ = ['mmseg::_base_/schedules/schedule_20k.py', 'mmdet::_base_/models/retinanet_r50_fpn.py']")
    config = load_config(path)
    assert config.train_cfg.max_iters == 20000
    assert config.model.type == "RetinaNet"


class TestNamesOfConfigs:
    """``effvit::NAME`` among the bases of a config, and in place of a file; mmengine is the one installed."""

    NAME = "mmdet/garments/mask-rcnn_evit-nano.py"

    @pytest.fixture
    def heir(self, tmp_path: Path) -> Path:
        """A config of a user that changes one of the package's."""
        path = tmp_path / "mine.py"
        path.write_text(f"_base_ = 'effvit::{self.NAME}'\ndetector = _base_.model\nclasses = ('bag',)\n")
        return path

    def test_config_inherits_from_one_of_the_package(self, heir: Path) -> None:
        """By mmengine's own function, and as from the file, its own variables aside."""
        pytest.importorskip("mmdet")
        config, original = Config.fromfile(heir).to_dict(), load_config(f"effvit::{self.NAME}").to_dict()
        assert config.pop("classes") == ("bag",)
        original.pop("classes")
        assert config.pop("detector") == original["model"]  # without a _scope_, as from a file beside it
        assert config == original

    def test_name_in_place_of_a_file_is_that_file(self) -> None:
        pytest.importorskip("mmdet")
        file = Path(__file__).resolve().parents[1] / "configs" / self.NAME
        assert load_config(f"effvit::{self.NAME}").to_dict() == load_config(file).to_dict()

    def test_names_of_other_packages_mean_what_they_did(self, tmp_path: Path) -> None:
        """A base of mmdet's has its scope, also beside one of this package."""
        pytest.importorskip("mmdet")
        path = tmp_path / "mine.py"
        bases = ["effvit::mmdet/_base_/vitdet_recipe.py", "mmdet::_base_/models/retinanet_r50_fpn.py"]
        path.write_text(f"_base_ = {bases}\ndetector = _base_.model\n")
        config = Config.fromfile(path)
        assert config.detector["_scope_"] == "mmdet"
        assert config.optim_wrapper.paramwise_cfg == load_config(bases[0]).optim_wrapper.paramwise_cfg

    def test_unknown_name_is_refused_with_near_ones(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.py"
        path.write_text("_base_ = 'effvit::garments/mask-rcnn_evit-nano.py'\n")
        with pytest.raises(FileNotFoundError, match=rf"did you mean {self.NAME}"):
            load_config(path)

    def test_config_that_needs_a_checkout_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("mmpretrain")
        without_tools = [folder for folder in sys.path if not (Path(folder) / "data" / "mmpretrain_sets.py").is_file()]
        monkeypatch.setattr(sys, "path", without_tools)
        for name in [name for name in sys.modules if name.split(".")[0] == "data"]:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(ImportError, match=r"cutouts\.py imports a module of 'data'.* only tools/ of a checkout"):
            load_config("effvit::mmpretrain/cutouts/vit-nano_cutouts.py")

    def test_other_missing_modules_are_named_as_mmengine_does(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.py"
        path.write_text("custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)\n")
        with pytest.raises(ImportError, match=r"Failed to import custom modules from .*no_such_module"):
            load_config(path)


class TestBFloat16:
    def test_forward_runs_in_bfloat16_and_weights_stay_float32(self) -> None:
        model = nn.Linear(4, 4)
        wrapper = OPTIM_WRAPPERS.build(
            {"type": "BFloat16OptimWrapper", "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
        )
        before = model.weight.detach().clone()
        with wrapper.optim_context(model):
            y = model(torch.ones(2, 4))
        wrapper.update_params(y.float().sum())
        assert y.dtype == torch.bfloat16
        assert model.weight.dtype == torch.float32
        assert not torch.equal(model.weight, before)
