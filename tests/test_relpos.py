"""Hosts with relative positions: exact where nothing is reduced, biases that follow the tokens where something is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts import make_host, make_images, make_model
from timm.layers import PatchDropout
from timm.models import save_for_hf
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

import effvit
from effvit.attention import AttnState, Beside, PairBias, Picked
from effvit.hosts.relpos import CLASS_TOKEN_HOSTS, NO_CLASS_TOKEN_HOSTS
from effvit.layers.macs import position_bias
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers import METHODS, ragged
from effvit.testing import SIZE
from effvit.testing.models import perturb
from effvit.tokens import TokenMap, flat_rows, take_rows

BEITS: dict[str, dict[str, Any]] = {
    "bias of each block": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1},
    "shared bias": {"use_shared_rel_pos_bias": True, "qkv_bias": True},
    "table of positions and no bias": {"global_pool": "token"},
    "SwiGLU, pooled class token": {
        "use_rel_pos_bias": True,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "use_fc_norm": False,
    },
}
RELPOS: dict[str, dict[str, Any]] = {
    "MLP of each block": {},
    "MLP as in Swin v2": {"rel_pos_type": "mlp_swin", "rel_pos_dim": 16},
    "shared MLP and a class token": {"shared_rel_pos": True, "class_token": True, "global_pool": "token"},
    "table and a class token, averaged": {"rel_pos_type": "bias", "class_token": True, "fc_norm": True},
    "post-norm": {"block_fn": ResPostRelPosBlock},
    "post-norm, shared table": {"block_fn": ResPostRelPosBlock, "rel_pos_type": "bias", "shared_rel_pos": True},
}
KINDS = {
    **{name: (Beit, kind) for name, kind in BEITS.items()},
    **{n: (VisionTransformerRelPos, k) for n, k in RELPOS.items()},
}


def make(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    cls, own = KINDS[kind]
    host = cls(**(SIZE | own | settings)).eval()
    perturb(host)
    return host


def fused(model: nn.Module, enabled: bool) -> nn.Module:
    for block in model.blocks:
        block.attn.fused_attn = enabled
    return model


def bias_of_offsets(host: nn.Module, grid: tuple[int, int]) -> Tensor:
    """(heads, 1+H*W, 1+H*W) of the table of a BEiT's first block, written as loops over pairs of tokens.

    The three last rows of the table are those of class to patch, patch to class and class to class (official BEiT,
    modeling_finetune.py).
    """
    table = host.blocks[0].attn.relative_position_bias_table
    (height, width), last = grid, len(table)
    number = 1 + height * width
    bias = torch.empty(table.shape[1], number, number)
    for query in range(number):
        for key in range(number):
            if query and key:
                (y, x), (v, u) = divmod(query - 1, width), divmod(key - 1, width)
                row = (y - v + height - 1) * (2 * width - 1) + x - u + width - 1
            else:
                row = last - (3 if key else 2 if query else 1)
            bias[:, query, key] = table[row]
    return bias


@pytest.mark.parametrize("kind", KINDS)
class TestNothingReduced:
    """The expectation is timm, bit for bit."""

    @pytest.mark.parametrize("enabled", [True, False])
    @torch.no_grad()
    def test_scores_features_and_maps_are_those_of_timm(self, kind: str, enabled: bool) -> None:
        dense = fused(make(kind), enabled)
        model = effvit.sparsify(dense, "tome", **METHODS["tome"].off())
        x = make_images(dense)
        assert torch.equal(model(x), dense(x))
        (final, maps), (expected, expected_maps) = model.forward_intermediates(x), dense.forward_intermediates(x)
        assert torch.equal(final, expected)
        assert torch.equal(model.forward_features(x), expected)
        assert all(torch.equal(own, theirs) for own, theirs in zip(maps, expected_maps, strict=True))

    def test_gradients_are_those_of_timm(self, kind: str) -> None:
        """In training, where the MLPs of biases have a dropout of their own."""
        dense = make(kind).train()
        model = effvit.sparsify(dense, "tome", share=False, **METHODS["tome"].off())
        x = make_images(dense)
        for net in (dense, model):
            torch.manual_seed(0)
            net(x).square().sum().backward()
        gradients = dict(dense.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name].grad), name

    def test_under_autocast(self, kind: str) -> None:
        dense = make(kind)
        model = effvit.sparsify(dense, "tome", **METHODS["tome"].off())
        x = make_images(dense)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(x), dense(x))


def test_own_and_shared_biases_of_beit_add_up() -> None:
    """Equal to timm bit for bit in its fused kernel; without it timm adds them to the logits one after the other."""
    dense = make("bias of each block", use_shared_rel_pos_bias=True)
    model = effvit.sparsify(dense, "tome", r=0)
    x = make_images(dense)
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))
        assert torch.allclose(fused(model, False)(x), fused(dense, False)(x), rtol=0, atol=1e-5)


class TestMovedTokens:
    @torch.no_grad()
    def test_kept_tokens_attend_with_the_biases_of_their_offsets(self) -> None:
        """The expectation is attention over the full sequence in which the tokens that left are masked."""
        host = make("bias of each block").double()
        attn = effvit.sparsify(host, "tome", r=0).blocks[0].attn
        x = torch.randn(2, 49, 32, dtype=torch.double)
        full = TokenMap.full(x, (6, 8), 1, 1)
        index = torch.stack([torch.randperm(48)[:20] for _ in range(2)])  # out of order, another one in each image
        kept, tokens = full.select(x, index, 20)
        q, k, v = attn._project(x)
        mask = bias_of_offsets(host, (6, 8)).double().repeat(2, 1, 1, 1)  # (B, heads, 49, 49)
        left = torch.zeros(2, 49, dtype=torch.bool).scatter(1, index + 1, True)
        left[:, 0] = True
        mask = mask.masked_fill(~left[:, None, None], float("-inf"))
        weights = (attn.scale * q @ k.transpose(-2, -1) + mask).softmax(-1)
        expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        rows = flat_rows(index, 49, 1)
        for enabled in (True, False):
            attn.fused_attn = enabled
            assert torch.allclose(attn(kept, tokens), take_rows(expected, rows), rtol=0, atol=1e-12)

        beside: Beside[AttnState] = Beside()
        attn(kept, tokens, beside=beside)
        of_kept = weights.transpose(1, 2).flatten(0, 1)[rows]  # (B, 21, heads, 49)
        of_kept = of_kept.gather(
            3, torch.cat([torch.zeros(2, 1).long(), index + 1], 1)[:, None, None].expand(-1, 21, 2, -1)
        )
        state = beside.value
        assert torch.allclose(state.softmax_map(), of_kept.transpose(1, 2), rtol=0, atol=1e-12)
        assert torch.allclose(state.class_rows(), of_kept.transpose(1, 2)[:, :, :1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("moved", [False, True])
    @pytest.mark.parametrize("host", ["beit", "relpos", "shared_relpos"])
    @torch.no_grad()
    def test_picked_queries_have_the_rows_of_the_whole_attention(self, host: str, moved: bool) -> None:
        model = make_model("tome", host, r=0)
        attn, prefix = model.blocks[0].attn, model.num_prefix_tokens
        x, shared, tokens = model._start(make_images(model), memory=False)
        if moved:
            x, tokens = tokens.select(x, torch.stack([torch.randperm(48)[:30] for _ in range(2)]), 30)
        index = torch.stack([torch.randperm(x.shape[1] - prefix)[:5] for _ in range(2)])

        def pick(state: AttnState) -> Picked:
            return Picked(state.keys.rows(index), state.keys.keep(index, 5))

        whole = take_rows(attn(x, tokens, shared), tokens.rows(index))
        for enabled in (True, False):
            attn.fused_attn = enabled
            assert torch.allclose(attn(x, tokens, shared, pick=pick), whole, atol=1e-5)

    def test_key_weights_add_to_the_bias(self) -> None:
        """A token that stands for two patches receives twice the attention: as if it stood there twice."""
        host = make("table and a class token, averaged").double()
        attn = effvit.sparsify(host, "tome", r=0).blocks[0].attn
        x = torch.randn(1, 49, 32, dtype=torch.double)
        full = TokenMap.full(x, (6, 8), 1, 1)
        twice = torch.cat([torch.arange(48), torch.tensor([7])])[None]
        doubled, tokens = full.select(x, twice, 49)
        weights = torch.ones(1, 49, dtype=torch.double).index_fill(1, torch.tensor([8]), 2)
        once = full.relabel(full.keep(full.source, 48).trail.step, 48, key_weight=weights, keeps_every_patch=True)
        assert torch.allclose(attn(x, once)[:, :49], attn(doubled, tokens)[:, :49], rtol=0, atol=1e-12)

    def test_nothing_is_gathered_while_nothing_moved(self) -> None:
        x = torch.zeros(3, 13, 8)
        tokens = TokenMap.full(x, (3, 4), 1, 1)
        table = torch.randn(1, 2, 13, 13)
        assert PairBias.of(table, tokens).whole() is table
        kept = tokens.keep(tokens.source[:, :5], 5)
        assert PairBias.of(table, kept).whole().shape == (3, 2, 6, 6)
        assert PairBias.of(table, kept).leading(1).shape == (3, 2, 1, 6)


class TestWhatFits:
    @pytest.mark.parametrize("method", ["ats", "dymu", "algm"])
    @pytest.mark.parametrize("host", ["beit", "relpos"])
    def test_packed_batches_are_refused(self, method: str, host: str) -> None:
        message = rf"{method} with ragged='packed' runs on kernels .* take no bias of pairs .*; use ragged='padded'"
        with pytest.raises(ValueError, match=message):
            make_model(method, host, ragged="packed")

    @pytest.mark.parametrize("method", ["ats", "dymu", "algm"])
    def test_batches_stay_padded_where_packing_would_be_faster(
        self, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ragged, "MACS_PER_IMAGE", 0)
        monkeypatch.setattr(ragged, "MACS_PER_FEATURE", 0)
        for host, packed in (("class_token", True), ("beit", False)):
            model = make_model(method, host, ragged="auto")
            with torch.no_grad():
                (_, tokens), _ = model._forward_blocks(make_images(model, batch=4))
            assert tokens.packed == packed

    @pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_class_token])
    def test_method_that_needs_a_class_token(self, method: str) -> None:
        message = "scores patches by the class token, but this VisionTransformerRelPos has none"
        with pytest.raises(ValueError, match=message):
            make_model(method, "shared_relpos")

    def test_image_of_another_size_is_told_the_way_there_is(self) -> None:
        model = make_model("tome", "beit")
        with pytest.raises(
            ValueError, match=r"call model\.set_input_size\(\(32, 32\)\), or resize the images"
        ) as error:
            model(torch.zeros(1, 3, 32, 32))
        assert "dynamic_img_size" not in str(error.value)

    def test_state_has_no_part_of_hosts_with_patch_dropout(self) -> None:
        model = make_model("tome", "relpos")
        assert not [module for module in model.modules() if isinstance(module, PatchDropout)]
        assert not hasattr(model, "patch_drop")


class TestClosedForm:
    def test_bias_of_an_mlp_costs_its_layers_at_every_offset(self) -> None:
        """(2 * 6 - 1) (2 * 8 - 1) offsets of two coordinates, 16 hidden features and 2 heads, in each of 4 blocks."""
        host = make_host("relpos")
        assert closed_form_macs(host, (3, 48, 64))["positions"] == 4 * 11 * 15 * (2 * 16 + 16 * 2)
        shared = make("shared MLP and a class token", rel_pos_dim=16)
        assert closed_form_macs(shared, (3, 48, 64))["positions"] == 11 * 15 * (2 * 16 + 16 * 2)

    def test_bias_of_a_table_costs_nothing(self) -> None:
        assert "positions" not in closed_form_macs(make_host("beit"), (3, 48, 64))
        assert not position_bias(make_host("shared_relpos").shared_rel_pos, (6, 8))


def test_set_input_size_resizes_tables_as_timm_does() -> None:
    dense, model = make("bias of each block"), effvit.sparsify(make("bias of each block"), "evit", keep_rate=1.0)
    for net in (dense, model):
        net.set_input_size((64, 40))
    x = make_images(model)
    assert torch.equal(model(x), dense(x))
    assert model.blocks[0].attn.relative_position_bias_table.shape == (15 * 9 + 3, 2)


class TestNames:
    def test_every_name_of_timm_is_a_host(self) -> None:
        names = {*timm.list_models(module="beit"), *timm.list_models(module="vision_transformer_relpos")}
        own = {*CLASS_TOKEN_HOSTS, *NO_CLASS_TOKEN_HOSTS}
        assert own == {name for name in names if not name.startswith("test_")}
        assert {f"tome_{name}" for name in own} <= {*effvit.list_models("tome_*")}
        assert {f"evit_{name}" for name in CLASS_TOKEN_HOSTS} <= {*effvit.list_models("evit_*")}
        assert not [name for name in NO_CLASS_TOKEN_HOSTS if timm.is_model(f"evit_{name}")]

    def test_tags_carry_the_weights_of_the_host(self) -> None:
        own = timm.get_pretrained_cfg("gtp_beitv2_base_patch16_224.in1k_ft_in22k_in1k")
        assert own.hf_hub_id == "timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k"

    @pytest.mark.parametrize("host", ["beit_base_patch16_224", "vit_relpos_medium_patch16_cls_224"])
    def test_weights_of_another_size_are_resized_as_timm_does(self, host: str, tmp_path: Path) -> None:
        small = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
        file = tmp_path / "weights.pth"
        torch.save(timm.create_model(host, img_size=64, **small).state_dict(), file)
        overlay = {"file": str(file), "num_classes": 5}
        dense, model = (
            timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=96, **small, **settings
            ).eval()
            for name, settings in ((host, {}), (f"evit_{host}", {"keep_rate": 1.0}))
        )
        x = make_images(dense)
        assert torch.equal(model(x), dense(x))
        again = effvit.sparsify(timm.create_model(host, img_size=96, **small), "evit", keep_rate=1.0).eval()
        effvit.load_checkpoint(again, file)
        assert torch.equal(again(x), dense(x))

    def test_hub_folder_gives_the_model_back(self, tmp_path: Path) -> None:
        small = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64, "num_classes": 5}
        model = timm.create_model("ats_vit_relpos_base_patch16_clsgap_224", keep_rate=0.5, **small).eval()
        save_for_hf(model, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = make_images(model)
        assert torch.equal(again(x), model(x))
        assert again.settings == model.settings


def test_block_of_a_subclass_is_refused_by_name() -> None:
    class Twice(RelPosBlock):
        pass

    with pytest.raises(TypeError, match=re.escape("blocks.0 is a Twice, which token reduction does not know")):
        effvit.sparsify(make("MLP of each block", block_fn=Twice), "tome")
