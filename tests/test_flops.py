"""Multiply-add counts against published and independently measured ones (fvcore on the official modules)."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

import effvit
from effvit.measure.flops import HANDLES, IGNORED_OPERATORS, count_flops, eval_twin

IMAGE = (3, 224, 224)


@pytest.fixture(scope="module")
def deit_small() -> nn.Module:
    return timm.create_model("deit_small_patch16_224")


# Settings for the 16 patches and 2 blocks of tiny_vit.
SMALL = {"evit": {"reduce_at": [1]}, "tome": {"r": 3}, "gtp": {"num_prop": 3}}


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=10)


class TestAgainstOfficialModules:
    """GMACs of fvcore on the official code with materialised attention, 224 px, batch 1."""

    def test_dense_deit(self, deit_small):
        assert count_flops(deit_small, IMAGE).total / 1e9 == pytest.approx(4.6083, abs=1e-4)

    @pytest.mark.parametrize(
        ("keep_rate", "fuse_token", "gmacs"),
        [(0.7, True, 3.0355), (0.5, False, 2.287)],
    )
    def test_evit_plus_the_row_of_the_class_token(self, deit_small, keep_rate, fuse_token, gmacs):
        # The official code reads it off its materialised map; beside the fused kernel it costs 3 * (P+N) * C.
        model = effvit.sparsify(deit_small, "evit", keep_rate=keep_rate, fuse_token=fuse_token)
        total = count_flops(model, IMAGE).total / 1e9
        assert 0 < total - gmacs < 3 * 197 * 384 / 1e9 + 3e-4

    def test_tome(self, deit_small):
        model = effvit.sparsify(deit_small, "tome", r=16)
        assert count_flops(model, IMAGE).total / 1e9 == pytest.approx(2.2984, abs=3e-4)

    def test_gtp_without_the_official_products_that_scale_the_graph(self, deit_small):
        # The official code scales the rows and columns of the graph by two products with diagonal matrices; here
        # the token scales ride in one more feature of the keys, in each of the six heads and twelve blocks.
        official, diagonal_products = 3.4586, 2 * 196**3 / 1e9
        scale_feature = 6 * sum((197 - 8 * block) ** 2 for block in range(12)) / 1e9
        model = effvit.sparsify(deit_small, "gtp", num_prop=8)
        assert count_flops(model, IMAGE).total / 1e9 == pytest.approx(
            official - diagonal_products + scale_feature, abs=3e-4
        )


@pytest.mark.parametrize("method", [None, "tome", "gtp"])
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
    assert totals[0] == totals[1]


SMALL_TIMM = {
    "relative bias": lambda: Beit(use_rel_pos_bias=True, **TINY),
    "pooling by attention": lambda: VisionTransformer(global_pool="map", **TINY),
    "bias of an MLP": lambda: VisionTransformerRelPos(rel_pos_type="mlp", **TINY),
    "windows and decomposed bias": lambda: VisionTransformerSAM(use_rel_pos=True, window_size=3, neck_chans=8, **TINY),
    "class attention": lambda: Cait(depth_token_only=1, **TINY),
}
TINY = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


@pytest.mark.parametrize("name", SMALL_TIMM)
def test_other_attention_of_timm_costs_the_same_with_and_without_the_fused_kernel(name):
    model = SMALL_TIMM[name]()
    reports = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        reports.append(count_flops(model, (3, 64, 64), strict=True))
    assert "scaled_dot_product_attention" in reports[0].by_operator
    assert "scaled_dot_product_attention" not in reports[1].by_operator
    assert reports[0].total == reports[1].total


class Attention(nn.Module):
    def forward(self, x):
        q = x.reshape(1, 2, 6, 8)
        return F.scaled_dot_product_attention(q[:, :, :2], q[:, :, :5], q[:, :, :5, :3])


def test_attention_of_narrow_values_counts_both_widths():
    """2 heads of 2 queries and 5 keys, 8 wide, and values, 3 wide: by hand."""
    macs = 2 * 2 * 5 * (8 + 3)
    assert count_flops(Attention(), (1, 12, 8)).by_operator == {"scaled_dot_product_attention": macs}


class GroupedQueries(nn.Module):
    def forward(self, x):
        q = x.reshape(1, 4, 6, 4)
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)


def test_attention_of_grouped_queries_counts_every_query_head():
    assert count_flops(GroupedQueries(), (1, 12, 8)).by_operator == {"scaled_dot_product_attention": 4 * 6 * 6 * 2 * 4}


class TorchAttention(nn.Module):
    """torch's own layers, which run as one operator in eval mode."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        x = x.flatten(2)
        return self.layer(self.attn(x, x, x, need_weights=False)[0]), self.attn(x, x, x)[0]


def test_torchs_transformer_layers_are_counted_inside():
    report = count_flops(TorchAttention(), (5, 2, 4), strict=True)
    n, c = 5, 8
    attention = 4 * n * c**2 + 2 * n**2 * c
    assert report.by_module["attn"] == 2 * attention
    assert report.by_module["layer"] == attention + 2 * n * c * 16 + 2 * 5 * n * c


@pytest.mark.parametrize("enabled", [True, False])
def test_fast_path_of_torchs_transformer_layers_is_put_back(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(enabled)
        count_flops(TorchAttention(), (5, 2, 4))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Products(nn.Module):
    """(3, 4, 5) input; each product contracts 5 or 4 elements, the first broadcasts its left factor."""

    def forward(self, x):
        x = x[0]
        broadcast = x[0] @ x.transpose(-2, -1)
        vector = x[0] @ x[0, 0], torch.mv(x[0], x[0, 0]), torch.dot(x[0, 0], x[0, 1])
        flat = torch.mm(x[0], x[1].T), torch.addmm(x[0, :4, :4], x[0], x[1].T), torch.addmv(x[0, :, 0], x[0], x[0, 0])
        added = torch.baddbmm(torch.zeros(3, 4, 4), x, x.transpose(1, 2)), torch.bmm(x, x.transpose(1, 2))
        return broadcast, *vector, *flat, *added, torch.cdist(x[0], x[1])


def test_products_count_one_mac_for_each_output_and_contracted_element():
    report = count_flops(Products(), (3, 4, 5), strict=True)
    assert report.by_operator == {
        "matmul": 3 * 4 * 4 * 5 + 4 * 5,
        "mv": 4 * 5,
        "dot": 5,
        "mm": 4 * 4 * 5,
        "addmm": 4 * 4 * 5,
        "addmv": 4 * 5,
        "baddbmm": 3 * 4 * 4 * 5,
        "bmm": 3 * 4 * 4 * 5,
        "cdist": 4 * 4 * 5,
    }


class Einsum(nn.Module):
    def __init__(self, equation, *shapes):
        super().__init__()
        self.equation = equation
        self.factors = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x):
        return torch.einsum(self.equation, *self.factors) * x.mean()


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 6 * 5),
        ("...d, ed -> ...e", [(2, 3, 5), (4, 5)], 2 * 3 * 4 * 5),
        ("b...,b...c", [(2, 3, 1), (2, 3, 7, 4)], 2 * 3 * 7 * 4),  # the ellipsis broadcasts and stays, b is summed
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        ("ij,k->k", [(2, 3), (4,)], 4),  # i and j are summed first
        ("ij,j", [(2, 3), (3,)], 2 * 3),
        ("ii,j", [(3, 3), (4,)], 4),
        ("ii->i", [(3, 3)], 0),
    ],
)
def test_einsum_counts_every_combination_of_the_indices_of_a_pair(equation, shapes, macs):
    report = count_flops(Einsum(equation, *shapes), (1, 2, 2), strict=True)
    assert report.total == macs


class Conventions(nn.Module):
    """What fvcore has no rule for and counts by analogy: (3, 6, 8) input."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.norm = nn.RMSNorm(8)

    def forward(self, x):
        sizes = {"size": (3, 4), "mode": "bicubic"}
        resized = F.interpolate(x, **sizes), F.interpolate(x, **sizes, antialias=True)
        return (
            self.lstm(x[0])[0],
            self.pool(x),
            F.avg_pool2d(x, (2,)),
            F.avg_pool1d(x[0], 2),
            F.interpolate(x[0], size=5, mode="linear"),
            *resized,
            self.norm(x),
            F.rms_norm(x, (8,)),
        )


def test_other_layers_are_counted_in_fvcores_manner():
    steps, elements = 3 * 6, 3 * 6 * 8
    assert count_flops(Conventions(), (3, 6, 8), strict=True).by_operator == {
        "lstm": steps * 2 * 4 * (5 * 8 + 5 * 5 + 5 * 10 + 5 * 5),
        "avg_pool2d": 3 * 3 * 4 * 9 + 3 * 3 * 4 * 4,
        "avg_pool1d": 3 * 6 * 4 * 2,
        "upsample_linear1d": 3 * 6 * 5 * 2,
        "upsample_bicubic2d": 3 * 3 * 4 * 16,
        "_upsample_bicubic2d_aa": 3 * 3 * 4 * 16 * 2 * 2,  # both sides shrink by two
        "rms_norm": elements * 3 + elements * 2,
    }


class Resized(nn.Module):
    def forward(self, x):
        return F.interpolate(x, size=(12, 4), mode="bilinear", antialias=True)


def test_antialiased_kernel_is_no_narrower_where_a_side_grows():
    """From 6 x 8 to 12 x 4 pixels: two taps along the side that doubles, twice two along the side that halves."""
    assert count_flops(Resized(), (3, 6, 8), strict=True).by_operator == {"_upsample_bilinear2d_aa": 3 * 12 * 4 * 2 * 4}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.transpose(-2, -1)


@torch.jit.script
def square_if_positive(x: torch.Tensor) -> torch.Tensor:
    return x @ x.transpose(-2, -1) if bool(x.sum() > 0) else x


class Opaque(nn.Module):
    def forward(self, x):
        return Square.apply(x), square_if_positive(x)


def test_functions_a_trace_does_not_look_into_are_reported():
    assert count_flops(Opaque(), (1, 4, 4)).uncounted == {"prim::PythonOp.Square": 1, "prim::CallFunction": 1}


class Unknown(nn.Module):
    def forward(self, x):
        return torch.erfinv(x).cumprod(0).cumprod(1)


def test_operators_without_a_rule_are_reported_and_not_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        report = count_flops(Unknown(), (1, 4, 4))
    assert report.uncounted == {"aten::erfinv": 1, "aten::cumprod": 2}
    assert report.total == 0
    assert not caplog.records
    assert not HANDLES.keys() & IGNORED_OPERATORS


def test_strict_count_is_refused_if_it_is_not_complete():
    with pytest.raises(ValueError, match=r"no rule counts the operators aten::cumprod, aten::erfinv, so .*HANDLES"):
        count_flops(Unknown(), (1, 4, 4), strict=True)


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
    report = count_flops(model, (3, 64, 64), images=images)
    assert report.per_image == tuple(alone)
    assert report.total == round(sum(alone) / 3)
    low, middle, high = sorted(alone)
    assert report.spread == (sum(alone) / 3, low, (low + middle) / 2, middle, (middle + high) / 2, high)
    assert f"3 images, GMACs: mean {sum(alone) / 3e9:.4g}, minimum {low / 1e9:.4g}, lower quartile" in str(report)


def test_report_reads_as_tables_of_macs():
    report = count_flops(timm.create_model("deit_tiny_patch16_224"), IMAGE)
    assert report.flops == 2 * report.total
    lines = str(report).splitlines()
    assert lines[0] == "1.258 GMACs (2.517 GFLOPs of two to the MAC)"
    assert lines[3].split() == ["linear", "1.0459", "83.1%"]
    assert ["blocks", "1.2291", "97.7%"] in [line.split() for line in lines]
    assert lines[-1] == "operators without a rule, and their calls: none"
    assert str(count_flops(Unknown(), (1, 4, 4))).endswith("their calls: aten::cumprod (2), aten::erfinv (1)")


def test_recomputation_in_the_backward_pass_costs_nothing_forward():
    model = tiny_vit()
    before = count_flops(model, (3, 64, 64))
    model.set_grad_checkpointing(True)
    assert count_flops(model, (3, 64, 64)) == before


def test_count_is_offered_by_the_package():
    assert effvit.count_flops is count_flops
    with pytest.raises(AttributeError, match="module 'effvit' has no attribute 'count_macs'"):
        effvit.count_macs  # noqa: B018


def test_count_is_taken_in_the_dtype_of_the_model():
    assert count_flops(tiny_vit().double(), (3, 64, 64)) == count_flops(tiny_vit(), (3, 64, 64))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"one image of 3 x 64 x 64, got a tensor of shape \(2, 3, 32, 32\)"):
        count_flops(tiny_vit(), (3, 64, 64), images=torch.zeros(2, 3, 32, 32))
