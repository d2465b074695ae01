"""Super-token SViT: its steps as laws and closed forms, its options, and its published costs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from architectures import SUPERTOKEN, make_architecture, make_images
from scripts import load_tool

from effvit.architectures.supertoken import SuperTokenViT
from effvit.layers.super_tokens import (
    SuperTokenAttention,
    associate,
    from_cells,
    nearest_super_token,
    neighbours,
    sum_from_neighbours,
    to_cells,
    to_pixels,
    to_super_tokens,
)
from effvit.measure.closed_form import closed_form_macs


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("benchmark_architectures")


# hhb072/STViT@c9ed9a4 with fvcore, which also counts its identity kernels as convolutions; parameters without the
# two constant 9 x 1 x 3 x 3 kernels that every block of the official code holds (25 498 864 with them for S).
OFFICIAL = {
    "supertoken_small_224": (4.3665, 25_498_864 - 162 * 20),
    "supertoken_base_224": (9.872, 51_696_148 - 162 * 30),
    "supertoken_large_224": (15.5971, 94_977_252 - 162 * 38),
    "supertoken_small_384": (14.1559, 25_498_864 - 162 * 20),
    "supertoken_base_384": (31.4891, 51_696_148 - 162 * 30),
    "supertoken_large_384": (49.7479, 94_977_252 - 162 * 38),
}


def macs(model: SuperTokenViT, size: tuple[int, int, int]) -> int:
    return sum(closed_form_macs(model, size).values())


@pytest.mark.parametrize("name", OFFICIAL)
def test_cost_is_that_of_the_official_code(name: str) -> None:
    gmacs, parameters = OFFICIAL[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs(model, model.pretrained_cfg["input_size"]) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_larger_cells_save_what_the_official_code_saves_at_512() -> None:
    with torch.device("meta"):
        model = timm.create_model("supertoken_small_224")
    assert macs(model, (3, 512, 512)) / 1e9 == pytest.approx(27.9434, rel=0.01)
    model.set_stoken_size((16, 8, 2, 1))
    # The official count holds 1 % of identity kernels here, on the larger grid of stage 3.
    assert macs(model, (3, 512, 512)) / 1e9 == pytest.approx(19.4983, rel=0.015)


@pytest.mark.parametrize(("size", "cell"), [((8, 12), (4, 4)), ((7, 5), (2, 3)), ((3, 3), (8, 8))])
def test_from_cells_undoes_to_cells(size: tuple[int, int], cell: tuple[int, int]) -> None:
    x = torch.randn(2, *size, 3)
    pixels = to_cells(x, cell)
    assert pixels.shape == (2, -(-size[0] // cell[0]), -(-size[1] // cell[1]), cell[0] * cell[1], 3)
    assert torch.equal(from_cells(pixels, cell, like=x), x)
    assert pixels.sum() == pytest.approx(float(x.sum()), abs=1e-4)  # the rest is zeros


def test_first_pixels_of_a_cell_are_its_first_row() -> None:
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert to_cells(x, (2, 2))[0, 1, 0, :, 0].tolist() == [8.0, 9.0, 12.0, 13.0]


def test_summing_from_neighbours_is_the_transpose_of_taking_them() -> None:
    grid, values = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 9, 5).double()
    assert (neighbours(grid) * values).sum() == pytest.approx(float((grid * sum_from_neighbours(values)).sum()))


def test_pixels_belong_wholly_to_nine_neighbours_whether_these_exist_or_not() -> None:
    pixels = to_cells(torch.randn(2, 7, 9, 4), (4, 4))
    association = associate(pixels, 2)
    assert association.shape == (2, 2, 3, 9, 16)
    assert torch.allclose(association.sum(3), torch.ones(2, 2, 3, 16))
    # Logits of zeros are equal everywhere, outside the grid too: one ninth each (closed form).
    assert torch.allclose(associate(torch.zeros(1, 1, 1, 16, 4)), torch.full((1, 1, 1, 9, 16), 1 / 9))


def test_a_constant_map_has_constant_super_tokens_and_loses_at_the_border_what_lies_outside() -> None:
    pixels = torch.full((1, 3, 3, 4, 8), 0.5)
    association = associate(pixels)
    tokens = to_super_tokens(pixels, association)
    assert torch.allclose(tokens, torch.full_like(tokens, 0.5))
    inside = neighbours(torch.ones(1, 3, 3, 1))  # (1, 3, 3, 9, 1)
    share = (association * inside).sum(3)  # (1, 3, 3, p)
    assert torch.allclose(to_pixels(tokens, association), 0.5 * share.unsqueeze(-1).expand(-1, -1, -1, -1, 8))
    assert torch.allclose(share[0, 1, 1], torch.ones(4))
    assert (share[0, 0, 0] < 0.9).all()


def test_association_passes_no_gradient() -> None:
    x = torch.randn(1, 6, 6, 4, requires_grad=True)
    assert not associate(to_cells(x, (3, 3)), 2).requires_grad


@pytest.mark.parametrize(
    ("shape", "num_heads", "cell", "n_iter"),
    [
        ((64, 56, 56), 8, (8, 8), 1),
        ((128, 28, 28), 4, (4, 4), 1),
        ((64, 50, 61), 1, (8, 8), 2),
        ((16, 9, 4), 2, (2, 3), 3),
    ],
)
def test_slices_give_what_unfold_and_fold_give(
    tool: ModuleType, shape: tuple[int, int, int], num_heads: int, cell: tuple[int, int], n_iter: int
) -> None:
    attn = SuperTokenAttention(shape[0], num_heads, cell, n_iter, qk_scale=0.3).eval().double()
    x = torch.randn(2, *shape).double()
    expected = tool.unfold_super_tokens(attn, x)
    assert torch.allclose(attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-12)


def test_default_scale_of_the_attention_is_the_root_of_the_head_width() -> None:
    x = torch.randn(2, 5, 7, 16)
    plain = SuperTokenAttention(16, 2, (1, 1))
    scaled = SuperTokenAttention(16, 2, (1, 1), qk_scale=8**-0.5)
    scaled.load_state_dict(plain.state_dict())
    assert torch.allclose(plain(x), scaled(x), atol=1e-6)
    other = SuperTokenAttention(16, 2, (1, 1), qk_scale=1.0)
    other.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(x), other(x), atol=1e-4)


def test_labels_are_the_largest_weight_among_super_tokens_that_exist() -> None:
    association = torch.rand(2, 2, 3, 9, 4)
    labels = nearest_super_token(association)
    for b, row, column, pixel in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 4))).tolist():
        weights = {
            (row + k // 3 - 1) * 3 + column + k % 3 - 1: float(association[b, row, column, k, pixel])
            for k in range(9)
            if 0 <= row + k // 3 - 1 < 2 and 0 <= column + k % 3 - 1 < 3
        }
        assert int(labels[b, row, column, pixel]) == max(weights, key=weights.__getitem__)


def test_super_tokens_are_those_the_block_itself_forms() -> None:
    model, x = make_architecture("supertoken"), make_images("supertoken", resized=True)
    seen: list[Any] = []
    attn = model.stages[1].blocks[0].attn
    hook = attn.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    found = model.super_tokens(x, stage=1, block=0)
    expected = associate(to_cells(seen[0], (4, 4)))
    assert torch.allclose(found.association, expected.flatten(1, 2).transpose(2, 3), atol=1e-6)
    assert (found.grid, found.cell) == ((3, 4), (4, 4))  # 75 x 101 pixels: a map of 10 x 13
    assert found.labels.shape == (2, 10, 13)
    assert 0 <= int(found.labels.min()) <= int(found.labels.max()) < 12


def test_a_stage_that_attends_to_all_pixels_has_no_super_tokens() -> None:
    model, x = make_architecture("supertoken"), make_images("supertoken")
    with pytest.raises(ValueError, match="stage 3 has no super tokens, its stoken_size is 1; ask for another stage"):
        model.super_tokens(x, stage=3)
    model.set_stoken_size((8, 4, 2, 2))
    assert model.super_tokens(x, stage=3).grid == (2, 1)


def test_other_cells_change_the_result_and_no_weight() -> None:
    model, x = make_architecture("supertoken"), make_images("supertoken")
    before, names = model(x), list(model.state_dict())
    model.set_stoken_size((16, 8, 2, 1))
    assert not torch.allclose(model(x), before, atol=1e-4)
    assert list(model.state_dict()) == names
    model.set_stoken_size((8, 4, 1, 1))
    assert torch.equal(model(x), before)


def test_maps_stay_channels_last_so_that_no_step_rearranges_them() -> None:
    model, x = make_architecture("supertoken"), make_images("supertoken")
    layouts: list[bool] = []
    for stage in model.stages:
        for module in stage.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d):
                module.register_forward_pre_hook(
                    lambda _module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
                )
    model(x)
    assert all(layouts)
    assert len(layouts) > 20


def test_maps_for_dense_prediction_are_normalised_only_when_asked() -> None:
    x = make_images("supertoken", resized=True)
    plain = make_architecture("supertoken")
    normed = timm.create_model("supertoken_small_224", num_classes=7, out_norm=True, **SUPERTOKEN).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    pairs = zip(plain.forward_intermediates(x)[1], normed.forward_intermediates(x)[1], strict=True)
    for plain_map, map_out in pairs:
        channels = plain_map.permute(0, 2, 3, 1)
        expected = torch.nn.functional.layer_norm(channels, channels.shape[-1:], eps=1e-6)  # closed form
        assert torch.allclose(map_out, expected.permute(0, 3, 1, 2), atol=1e-5)
    assert torch.equal(plain(x), normed(x))
    with pytest.raises(ValueError, match="create the model with out_norm=True"):
        plain.forward_intermediates(x, norm=True)


def test_official_weights_fit_a_model_without_classifier() -> None:
    model = make_architecture("supertoken", num_classes=0)
    weights = make_architecture("supertoken").state_dict()
    state, dropped = model.adapt_state_dict(weights | {"layers.0.blocks.0.attn.unfold.weights": torch.eye(9)})
    assert sorted(dropped) == ["head.fc.bias", "head.fc.weight", "layers.0.blocks.0.attn.unfold.weights"]
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, r"depths needs one value for each of the 4 stages, got \[1, 1\]"),
        ({"num_heads": (3, 2, 5, 8)}, r"num_heads must divide the channels of its stage, got \[3, 2, 5, 8\]"),
        ({"n_iter": (1, 0, 1, 1)}, "n_iter must be at least 1 in every stage"),
        ({"stoken_size": (8, 4, 0, 1)}, "stoken_size needs a positive whole number"),
        ({"stoken_size": (8, 4, 1)}, "for each of the 4 stages, got"),
        ({"stoken_size": (8, 4, 1.5, 1)}, "stoken_size needs a positive whole number"),
        ({"stoken_size": (8, (4, 4, 4), 1, 1)}, "one for rows and one for columns"),
    ],
)
def test_impossible_settings_are_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        SuperTokenViT(**arguments)
