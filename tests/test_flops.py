"""Multiply-add counts against published and independently measured ones (fvcore on the official modules)."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit.flops import IGNORED_OPERATORS, count_flops, eval_twin

IMAGE = (3, 224, 224)


@pytest.fixture(scope="module")
def deit_small() -> nn.Module:
    return timm.create_model("deit_small_patch16_224")


# Settings for the 16 patches and 2 blocks of tiny_vit.
SMALL = {
    "evit": {"reduce_at": [1]},
    "tome": {"r": 3},
    "gtp": {"num_prop": 3},
    "ats": {},
    "zero_tprune": {"keep_rate": 0.7, "r": 2, "reduce_at": [0]},
    "dymu": {"thresholds": [0.1, 0.1]},
    "expedite": {"keep_rate": 0.6},
    "hot": {"reduce_at": [1]},
}


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=10)


class TestAgainstOfficialModules:
    """GMACs of fvcore on the official code with materialised attention, 224 px, batch 1."""

    @pytest.mark.parametrize(("name", "gmacs"), [("deit_tiny_patch16_224", 1.2584), ("deit_small_patch16_224", 4.6083)])
    def test_dense_deit(self, name, gmacs):
        assert count_flops(timm.create_model(name), IMAGE).total / 1e9 == pytest.approx(gmacs, abs=1e-4)

    @pytest.mark.parametrize(
        ("keep_rate", "fuse_token", "gmacs"),
        [(0.9, True, 4.0302), (0.7, True, 3.0355), (0.7, False, 3.0032), (0.5, True, 2.3136)],
    )
    def test_evit_plus_the_row_of_the_class_token(self, deit_small, keep_rate, fuse_token, gmacs):
        # The official code reads it off its materialised map; beside the fused kernel it costs 3 * (P+N) * C.
        model = effvit.sparsify(deit_small, "evit", keep_rate=keep_rate, fuse_token=fuse_token)
        total = count_flops(model, IMAGE).total / 1e9
        assert 0 < total - gmacs < 3 * 197 * 384 / 1e9 + 3e-4

    @pytest.mark.parametrize(("r", "gmacs"), [(8, 3.4282), (16, 2.2984)])
    def test_tome(self, deit_small, r, gmacs):
        model = effvit.sparsify(deit_small, "tome", r=r)
        assert count_flops(model, IMAGE).total / 1e9 == pytest.approx(gmacs, abs=3e-4)

    def test_gtp_without_the_official_products_that_scale_the_graph(self, deit_small):
        # The official code scales the rows and columns of the graph by two products with diagonal matrices; here
        # the token scales ride in one more feature of the keys, in each of the six heads and twelve blocks.
        official, diagonal_products = 3.4586, 2 * 196**3 / 1e9
        scale_feature = 6 * sum((197 - 8 * block) ** 2 for block in range(12)) / 1e9
        model = effvit.sparsify(deit_small, "gtp", num_prop=8)
        assert count_flops(model, IMAGE).total / 1e9 == pytest.approx(
            official - diagonal_products + scale_feature, abs=3e-4
        )


@pytest.mark.parametrize("method", [None, *SMALL])
def test_count_is_complete_and_the_same_with_and_without_fused_attention(method):
    fused_was = use_fused_attn() > 0
    totals = []
    try:
        for fused in (True, False):
            set_fused_attn(fused)
            torch.manual_seed(0)
            model = tiny_vit()
            report = count_flops(effvit.sparsify(model, method, **SMALL[method]) if method else model, (3, 64, 64))
            totals.append(report.total)
            assert report.uncounted == {}
            has_kernel = "scaled_dot_product_attention" in report.by_operator
            assert has_kernel == (fused and method != "gtp")  # GTP reads the softmax map in every block
    finally:
        set_fused_attn(fused_was)
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)


class Attention(nn.Module):
    def forward(self, x):
        q = x.reshape(1, 2, 6, 8)
        return F.scaled_dot_product_attention(q[:, :, :2], q[:, :, :5], q[:, :, :5, :3])


class Products(nn.Module):
    """(1, 3, 4, 5) input; each product contracts 5 or 4 elements, the first broadcasts its left factor."""

    def forward(self, x):
        broadcast = x[0, 0] @ x.transpose(-2, -1)
        vector = x[0, 0] @ x[0, 0, 0]
        added = torch.baddbmm(torch.zeros(3, 4, 4), x[0], x[0].transpose(1, 2))
        return broadcast, vector, added, torch.cdist(x[0, 0], x[0, 1])


def test_attention_counts_its_queries_keys_and_both_widths():
    report = count_flops(Attention(), (1, 12, 8))
    assert report.by_operator == {"scaled_dot_product_attention": 2 * 2 * 5 * (8 + 3)}


def test_products_count_one_mac_for_each_output_and_contracted_element():
    report = count_flops(Products(), (3, 4, 5))
    assert report.by_operator == {
        "matmul": 3 * 4 * 4 * 5 + 4 * 5,
        "baddbmm": 3 * 4 * 4 * 5,
        "cdist": 4 * 4 * 5,
    }


class Unknown(nn.Module):
    def forward(self, x):
        return torch.erfinv(x).cumprod(0).cumprod(1)


def test_operators_without_a_rule_are_reported_and_not_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        report = count_flops(Unknown(), (1, 4, 4))
    assert report.uncounted == {"aten::erfinv": 1, "aten::cumprod": 2}
    assert report.total == 0
    assert not caplog.records
    assert not {"aten::matmul", "aten::baddbmm", "aten::linear"} & IGNORED_OPERATORS


def test_modules_own_the_multiply_adds_inside_them():
    model = effvit.sparsify(tiny_vit(), "evit", **SMALL["evit"])
    report = count_flops(model, (3, 64, 64))
    parts = ("patch_embed", "blocks", "norm", "head")
    assert sum(report.by_module[part] for part in parts) == report.total == sum(report.by_operator.values())
    qkv = report.by_module["blocks.1.attn.qkv"]
    assert qkv == 17 * 48 * 3 * 48
    fused_token = report.by_module["blocks.1.reducer"]  # only what the method itself computes, not the block it runs
    assert 0 < fused_token < qkv < report.by_module["blocks.1"]


def test_model_is_left_as_it_was():
    model = effvit.sparsify(tiny_vit(), "tome", **SMALL["tome"]).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    count_flops(model, (3, 64, 64))
    with pytest.raises(ValueError, match="expected images of 64 x 64 pixels"):
        count_flops(model, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_twin_shares_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin = eval_twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert model.training
    assert not twin.training


def test_count_that_depends_on_the_image_is_the_mean_over_the_images():
    model = effvit.sparsify(tiny_vit(), "ats", reduce_at=[0, 1])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)  # sharp attention, so that counts differ
    images = torch.randn(3, 3, 64, 64)
    alone = [count_flops(model, (3, 64, 64), images=image[None]).total for image in images]
    assert len(set(alone)) > 1
    assert count_flops(model, (3, 64, 64), images=images).total == round(sum(alone) / 3)


def test_count_is_taken_in_the_dtype_of_the_model():
    assert count_flops(tiny_vit().double(), (3, 64, 64)) == count_flops(tiny_vit(), (3, 64, 64))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"one image of 3 x 64 x 64, got a tensor of shape \(2, 3, 32, 32\)"):
        count_flops(tiny_vit(), (3, 64, 64), images=torch.zeros(2, 3, 32, 32))
