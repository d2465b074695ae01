"""STViT on DeiT: published costs, what each option changes, maps, starting from a DeiT, and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from architectures import STVIT
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.architectures import semantic_tokens
from effvit.architectures.semantic_tokens import soft_assignment
from effvit.architectures.stvit import STViT
from effvit.measure.flops import count_flops
from effvit.recover import TokenRecovery

NAME = "stvit_deit_{}_patch16_224"


def small(**kwargs: Any) -> STViT:
    """A small model whose LayerScale does not hide its layers."""
    torch.manual_seed(0)
    return timm.create_model(
        NAME.format("tiny"), num_classes=5, **(STVIT | {"img_size": 64, "init_values": 1.0} | kwargs)
    ).eval()


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width)


class TestCost:
    # Parameters and multiply-adds of the reconstruction from released blocks, counted by fvcore; the paper gives
    # 1.91 G for DeiT-S, and 1.56 and 3.30 G with the STGM after 3 and 8 base layers.
    @pytest.mark.parametrize(
        ("size", "settings", "params", "gmacs"),
        [
            ("tiny", {}, 5.7247, 0.5254),
            ("small", {}, 22.0653, 1.913),
            ("base", {}, 86.5968, 7.2754),
            ("small", {"num_base": 3}, 22.0653, 1.5642),
            ("small", {"num_base": 8}, 22.0653, 3.3084),
        ],
    )
    def test_parameters_and_macs_are_those_of_the_reconstruction(
        self, size: str, settings: dict[str, Any], params: float, gmacs: float
    ) -> None:
        model = timm.create_model(NAME.format(size), **settings)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=1e-4)
        assert count_flops(model, (3, 224, 224)).total / 1e9 == pytest.approx(gmacs, rel=0.01)

    @pytest.mark.parametrize(("layers", "gmacs"), [(3, 1.97), (4, 2.03)])
    def test_more_stgm_layers_cost_what_the_paper_says(self, layers: int, gmacs: float) -> None:
        model = timm.create_model(NAME.format("small"), num_stgm=layers)
        assert count_flops(model, (3, 224, 224)).total / 1e9 == pytest.approx(gmacs, abs=0.005)

    def test_assignments_are_computed_only_for_maps_that_need_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def counted(*args: Any) -> Tensor:
            calls.append(1)
            return soft_assignment(*args)

        monkeypatch.setattr(semantic_tokens, "soft_assignment", counted)
        model = small(num_base=1)
        model(images())
        assert not calls
        # Blocks 1 and 2 are the STGM: nothing for block 0; the last layer's for all behind it; block 1 its own.
        for taken, number in (([0], 0), ([0, 3, 4, 5], 1), ([1, 2, 5], 2)):
            calls.clear()
            model.forward_intermediates(images(), indices=taken)
            assert len(calls) == number, taken
        calls.clear()
        small(recovery=True).forward_intermediates(images())
        assert not calls


class TestOptions:
    def test_features_are_the_semantic_tokens(self) -> None:
        assert small(semantic_grid=(2, 3)).forward_features(images()).shape == (2, 6, 48)

    def test_recovered_features_are_those_of_all_patches_and_reach_the_classifier(self) -> None:
        model = small(recovery=True)
        assert isinstance(model.recovery, TokenRecovery)
        features = model.forward_features(images())
        assert features.shape == (2, 16, 48)
        assert torch.allclose(model.forward_head(features), model.head(features.mean(1)), atol=1e-6)

    def test_recovery_runs_once_for_the_last_map_and_the_final_features(self) -> None:
        model, calls = small(recovery=True), []
        assert model.recovery is not None
        model.recovery.register_forward_hook(lambda *_: calls.append(1))
        model.forward_intermediates(images(), indices=[0, 5])
        assert len(calls) == 1
        model.forward_intermediates(images(), indices=[0, 4])
        assert len(calls) == 3

    def test_recovery_is_cut_with_the_layers_it_recovers(self) -> None:
        assert small(recovery=True, features_only=True, out_indices=[0, 1]).model.recovery is None
        assert small(recovery=True, features_only=True, out_indices=[0, 2]).model.recovery is not None

    def test_centres_enter_the_second_stgm_layer_alone(self) -> None:
        names = [name for name, _ in small(num_stgm=3).named_parameters() if "centres" in name]
        assert names == ["blocks.3.global_centres"]
        assert not [name for name, _ in small(use_global=False).named_parameters() if "centres" in name]

    def test_init_weights_draws_the_centres_and_zeroes_the_learned_pooling_again(self) -> None:
        model = small(seed_pool="learned", device="meta").to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, float("nan"))
        model.init_weights()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert 0.01 < model.get_parameter("blocks.3.global_centres").std() < 0.03
        assert not model.get_parameter("blocks.2.pool.proj.weight").any()


class TestMaps:
    def test_base_maps_are_exact(self) -> None:
        model, x = small(num_base=2), images()
        maps = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, output_fmt="NLC")
        y = model._pos_embed(model.patch_embed(x))
        for block, features in zip(model.blocks, maps, strict=False):
            y = block(y)
            assert torch.equal(features, y)

    def test_later_maps_are_means_of_the_semantic_tokens(self) -> None:
        model, x = small(), images()
        final, maps = model.forward_intermediates(x, norm=False, output_fmt="NLC")
        tokens = model._run(x)[0][1]  # (B, Ns, C)
        assert torch.equal(final, model.norm(tokens))
        assert (maps[-1] <= tokens.amax(1, keepdim=True) + 1e-5).all()
        assert (maps[-1] >= tokens.amin(1, keepdim=True) - 1e-5).all()
        assert not torch.allclose(maps[-1][:, 0], maps[-1][:, 1])

    def test_last_map_alone_is_that_beside_the_others(self) -> None:
        model, x = small(), images()
        *_, last = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], last)

    def test_norm_of_maps_is_that_of_the_final_tokens(self) -> None:
        model, x = small(), images()
        plain = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt="NLC")
        for before, after in zip(plain, normed, strict=True):
            assert torch.equal(after, model.norm(before))

    def test_dynamic_sizes_agree_with_a_model_built_for_them(self) -> None:
        model, x = small(dynamic_img_size=True), images(80, 112)
        fixed = small()
        fixed.load_state_dict(model.state_dict())
        fixed.set_input_size((80, 112))
        assert torch.allclose(model(x), fixed(x), atol=1e-5)
        for own, expected in zip(model.forward_intermediates(x)[1], fixed.forward_intermediates(x)[1], strict=True):
            assert torch.allclose(own, expected, atol=1e-4)


class TestStartingFromDeiT:
    @pytest.mark.parametrize(("host", "dropped"), [("deit_tiny", 1), ("deit_tiny_distilled", 4)])
    def test_every_weight_of_a_deit_is_used_but_its_class_token(self, host: str, dropped: int) -> None:
        deit = timm.create_model(f"{host}_patch16_224", embed_dim=48, num_heads=3, depth=6, img_size=64, num_classes=5)
        model = small(init_values=0)
        state, unused = model.adapt_state_dict(deit.state_dict())
        assert len(unused) == dropped
        result = model.load_state_dict(state, strict=False)
        assert result.missing_keys == ["blocks.3.global_centres"]
        assert not result.unexpected_keys

    @pytest.mark.parametrize(("host", "prefix"), [("deit_tiny", 1), ("deit_tiny_distilled", 2)])
    def test_patches_keep_the_positions_they_had(self, host: str, prefix: int) -> None:
        deit = timm.create_model(f"{host}_patch16_224", embed_dim=48, num_heads=3, depth=6, img_size=64)
        state, _ = small(init_values=0).adapt_state_dict(deit.state_dict())
        assert torch.equal(state["pos_embed"], deit.pos_embed[:, prefix:])

    def test_base_layers_are_then_those_of_the_deit_without_class_token(self) -> None:
        deit = VisionTransformer(
            img_size=64, embed_dim=48, num_heads=3, depth=6, num_classes=5, class_token=False, global_pool="avg"
        ).eval()
        model = small(init_values=0)
        model.load_state_dict(model.adapt_state_dict(deit.state_dict())[0], strict=False)
        x = images()
        own = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        expected = deit.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own, expected, strict=True))
        x, s = torch.randn(2, 16, 48), torch.randn(2, 16, 48)
        cross, dense = model.blocks[2], deit.blocks[2]
        own = cross.attn(cross.norm1(x), cross.norm1(x))
        assert torch.allclose(own, dense.attn(dense.norm1(x)), atol=1e-6)
        assert torch.allclose(model.blocks[4](s), deit.blocks[4](s), atol=1e-6)

    def test_checkpoint_of_a_deit_does_not_pass_for_one_of_stvit(self, tmp_path: Path) -> None:
        deit = timm.create_model(
            "deit_tiny_patch16_224", embed_dim=48, num_heads=3, depth=6, img_size=64, num_classes=5
        )
        save_file(deit.state_dict(), tmp_path / "deit.safetensors")
        with pytest.raises(
            ValueError, match=r"checkpoint of another model than this STViT: blocks\.3\.global_centres is missing;"
        ):
            effvit.load_checkpoint(small(init_values=0), tmp_path / "deit.safetensors")

    def test_own_checkpoint_of_another_image_size_is_resampled(self, tmp_path: Path) -> None:
        model, other = small(), small(img_size=96)
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        assert effvit.load_checkpoint(other, tmp_path / "own.safetensors") == []
        model.set_input_size(96)
        x = images(96, 96)
        assert torch.allclose(other(x), model(x), atol=1e-6)


class TestMessages:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"num_base": 5}, ValueError, "5 base and 2 STGM layers do not fit into a depth of 6; lower num_base"),
            ({"num_stgm": 0}, ValueError, "num_stgm must be at least 1, got 0"),
            ({"num_base": 1.5}, TypeError, "num_base must be a whole number, got 1.5"),
            ({"num_stgm": 1}, ValueError, "num_stgm is 1; use num_stgm=2 or use_global=False"),
            ({"semantic_grid": 0}, ValueError, "semantic_grid must be at least 1, got 0"),
            ({"semantic_grid": 5}, ValueError, "5 x 5 semantic tokens need .* got 4 x 4; use larger images or"),
            ({"use_global": 1}, TypeError, "use_global must be True or False, got 1"),
            ({"recovery": "yes"}, TypeError, "recovery must be True or False, got 'yes'"),
            ({"seed_pool": "mean"}, ValueError, "seed_pool must be 'max' or 'learned', got 'mean'"),
        ],
    )
    def test_setting_out_of_range_is_named(
        self, settings: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            small(**settings)

    def test_input_smaller_than_the_semantic_grid_is_refused(self) -> None:
        model = small()
        with pytest.raises(ValueError, match=r"3 x 3 semantic tokens need a grid of at least .* got 2 x 4"):
            model.set_input_size((32, 64))
        assert model(images()).shape == (2, 5)  # and the model is as it was
        with pytest.raises(ValueError, match=r"3 x 3 semantic tokens need a grid of at least .* got 4 x 2"):
            small(dynamic_img_size=True)(images(64, 32))
