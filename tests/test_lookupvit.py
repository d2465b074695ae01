"""LookupViT: resize, infusion, heads and losses, any compressed grid, start from a plain ViT, cost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from architectures import SMALL, make_architecture, make_images
from hosts import released
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.architectures.lookupvit import LookupBlock, LookupLoss, LookupViT
from effvit.layers.bidirectional_attention import INFUSIONS, exchange_weights
from effvit.layers.resize import resize_map, resize_weights
from effvit.measure.flops import count_flops

LOOKUP = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def make(**kwargs: Any) -> LookupViT:
    torch.manual_seed(0)
    return LookupViT(**(LOOKUP | {"compressed_grid": 3} | kwargs)).eval()


@pytest.mark.parametrize("antialias", [True, False])
def test_compressed_tokens_are_the_resized_map_and_positions(antialias: bool) -> None:
    """By torch's bilinear resize of the embedded map and of the stored table, each with the setting ``antialias``."""
    model = make(antialias=antialias)
    x = torch.randn(2, 3, 48, 48)

    def resized(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        images = tokens.transpose(1, 2).unflatten(2, grid)
        return F.interpolate(images, (3, 3), mode="bilinear", antialias=antialias).flatten(2).transpose(1, 2)

    with torch.no_grad():
        compressed, _ = model._tokenise(x)
        expected = resized(model.patch_embed(x), (6, 6)) + resized(model.pos_embed_compressed, (10, 10))
        assert torch.allclose(compressed, expected, atol=1e-5)


# -- resize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("old", [(14, 14), (9, 16), (5, 7)])
@pytest.mark.parametrize("new", [(3, 3), (5, 5), (10, 10), (20, 20), (2, 11)])
def test_resize_is_torch_bilinear(old: tuple[int, int], new: tuple[int, int], antialias: bool) -> None:
    x = torch.randn(2, *old, 4)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        images = x.to(dtype).permute(0, 3, 1, 2)
        expected = F.interpolate(images, new, mode="bilinear", antialias=antialias).flatten(2).transpose(1, 2)
        assert torch.allclose(resize_map(x.to(dtype), new, antialias), expected, rtol=0, atol=tolerance)


def test_resize_weights_of_14_to_7_are_known() -> None:  # closed form: a triangle twice as wide
    weights = resize_weights(14, 7, True, torch.empty(0))[3, 5:9]
    assert torch.equal(weights, torch.tensor([1, 3, 3, 1]) / 8)
    assert torch.equal(resize_weights(14, 7, False, torch.empty(0))[3, 6:8], torch.tensor([0.5, 0.5]))


def test_resize_keeps_constants_and_its_own_grid() -> None:
    assert torch.allclose(resize_map(torch.ones(1, 13, 6, 2), (5, 4), True), torch.ones(1, 20, 2))
    x = torch.randn(1, 4, 5, 3)
    assert torch.equal(resize_map(x, (4, 5), True), x.flatten(1, 2))


# -- exchange --------------------------------------------------------------------------------------------------


def test_infusion_weights_sum_as_they_should() -> None:
    logits = 5 * torch.randn(2, 3, 4, 9, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for infusion in INFUSIONS:
        down, up = exchange_weights(logits, infusion)
        assert torch.allclose(down, logits.softmax(-1))
        assert torch.allclose(down.sum(-1), one)
        total = up.sum(-2)  # over the compressed tokens
        assert torch.allclose(total.mean(-1), 4 / 9 * one) if infusion == "transpose" else torch.allclose(total, one)
    down, up = exchange_weights(logits, "transpose_normalized")
    assert torch.allclose(up, down / down.sum(-2, keepdim=True))


def test_normalised_infusion_survives_weights_that_underflow() -> None:
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0]])[None, None]  # no compressed token looks at the second patch
    assert torch.equal(exchange_weights(logits, "transpose_normalized")[1], torch.full((1, 1, 2, 2), 0.5))


def test_dropout_and_drop_path_change_training_alone() -> None:
    model = make(drop_path_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.1, pos_drop_rate=0.1)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), make()(x))
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


# -- heads and losses ------------------------------------------------------------------------------------------


def test_train_mode_returns_the_scores_of_both_heads_and_eval_the_first() -> None:
    model, x = make(), torch.randn(2, 3, 48, 48)
    compressed, lookup = model.train()(x)
    assert compressed.shape == lookup.shape == (2, 7)
    assert not torch.allclose(compressed, lookup, atol=1e-4)
    assert torch.allclose(model.eval()(x), compressed, atol=1e-5)
    assert torch.allclose(model.forward_heads(x)[1], lookup, atol=1e-5)


def test_lookup_scores_are_the_head_of_the_mean_of_the_normalised_map() -> None:
    model, x = make(), torch.randn(2, 3, 48, 48)
    (features,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert torch.allclose(model.head_lookup(features.mean((2, 3))), model.forward_heads(x)[1], atol=1e-5)  # type: ignore[misc]


def test_eval_runs_neither_the_last_infusion_nor_the_last_small_mlp() -> None:
    model, x = make(), torch.randn(1, 3, 48, 48)
    calls: list[nn.Module] = []
    for block in model.blocks:
        for part in (block.infuse, block.mlp_lookup):
            part.register_forward_hook(lambda module, _a, _o: calls.append(module))
    model(x)
    assert calls == [model.blocks[0].infuse, model.blocks[0].mlp_lookup]
    calls.clear()
    model.forward_intermediates(x, [0], intermediates_only=True, stop_early=True)
    assert len(calls) == 2
    calls.clear()
    model.forward_heads(x)
    assert len(calls) == 4


def test_loss_is_the_weighted_sum_over_both_heads() -> None:
    scores, target = (torch.randn(4, 7), torch.randn(4, 7)), torch.tensor([0, 3, 6, 1])
    first, second = (F.cross_entropy(s, target) for s in scores)
    assert torch.allclose(LookupLoss()(scores, target), first + second)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = smooth(scores[0], target) + 0.5 * smooth(scores[1], target)
    assert torch.allclose(LookupLoss(smooth, weights=(1.0, 0.5))(scores, target), expected)
    assert torch.allclose(LookupLoss()(scores[0], target), first)
    with pytest.raises(ValueError, match="weights must be two numbers of at least 0"):
        LookupLoss(weights=(1.0, -1.0))


def test_one_step_of_training_lowers_the_loss() -> None:
    model, loss_fn = make().train(), LookupLoss()
    x, target = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = loss_fn(model(x), target)
    before.backward()
    optimizer.step()
    assert loss_fn(model(x), target) < before


def test_without_second_head_train_mode_returns_one_tensor_and_its_weights_are_dropped(tmp_path: Path) -> None:
    full, x = make(), torch.randn(2, 3, 48, 48)
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    deployed = make(lookup_head=False)
    dropped = effvit.load_checkpoint(deployed, tmp_path / "full.safetensors")
    assert set(dropped) == {"head_lookup.weight", "head_lookup.bias"}
    assert torch.equal(deployed(x), full(x))
    assert torch.allclose(deployed.train()(x), full(x), atol=1e-5)
    assert deployed.get_classifier() is deployed.head
    deployed.reset_classifier(3)
    assert deployed.head_lookup is None
    with pytest.raises(ValueError, match="create it with lookup_head=True"):
        deployed.forward_heads(x)


def test_both_classifiers_are_handed_out_and_replaced() -> None:
    model, x = make(), torch.randn(2, 3, 48, 48)
    assert model.get_classifier() == (model.head, model.head_lookup)
    model.reset_classifier(3, "max")
    assert [out.shape for out in model.train()(x)] == [(2, 3), (2, 3)]
    model.reset_classifier(0)
    assert [out.shape for out in model(x)] == [(2, 48), (2, 48)]
    model.reset_classifier(0, "")
    assert [out.shape for out in model(x)] == [(2, 9, 48), (2, 36, 48)]


# -- grids and sizes -------------------------------------------------------------------------------------------


def test_compressed_grid_changes_between_steps_and_no_weight_with_it() -> None:
    model, x = make(compressed_pos_grid=5), torch.randn(2, 3, 48, 48)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for grid, tokens in ((2, 4), ((2, 3), 6), (5, 25), (3, 9)):
        model.set_compressed_grid(grid)
        assert model.forward_features(x).shape == (2, tokens, 48)
        built = make(compressed_pos_grid=5, compressed_grid=grid)
        built.load_state_dict(state)
        assert torch.equal(model(x), built(x))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_compressed_grid_is_saved_with_the_model(tmp_path: Path) -> None:
    name, small = SMALL["lookupvit"]
    model, x = timm.create_model(name, **small, num_classes=7).eval(), make_images("lookupvit")
    model.set_compressed_grid(4)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.compressed_grid == (4, 4)
    assert torch.equal(loaded(x), model(x))


def test_compiled_model_follows_the_compressed_grid() -> None:
    model, x = make(), torch.randn(2, 3, 48, 48)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid in (3, 4):
        model.set_compressed_grid(grid)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_dynamic_sizes_equal_a_model_of_that_size() -> None:
    dynamic, x = make_architecture("lookupvit_dynamic"), torch.randn(2, 3, 40, 72)
    fixed = make_architecture("lookupvit_dynamic", dynamic_img_size=False)
    fixed.set_input_size((40, 72))
    assert torch.allclose(dynamic(x), fixed(x), atol=1e-5)
    assert dynamic.compressed_grid == fixed.compressed_grid == (3, 3)
    assert dynamic.forward_intermediates(x, 1, intermediates_only=True)[0].shape == (2, 48, 5, 9)


def test_checkpoint_of_another_size_is_resampled(tmp_path: Path) -> None:
    large, small = make(compressed_pos_grid=6, compressed_grid=2), make(compressed_pos_grid=2, compressed_grid=2)
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    effvit.load_checkpoint(small, tmp_path / "large.safetensors")
    x = torch.randn(1, 3, 48, 48)
    assert torch.allclose(small(x), large(x), atol=1e-5)  # the table was resized to 2 x 2 on the way in, not in forward
    other = make(img_size=(64, 32))
    effvit.load_checkpoint(other, tmp_path / "large.safetensors")
    large.set_input_size((64, 32))
    assert torch.equal(other.pos_embed, large.pos_embed)


def test_position_table_that_is_not_square_is_refused() -> None:
    state = make(img_size=(64, 32)).state_dict() | {"pos_embed": torch.zeros(1, 30, 48)}
    with pytest.raises(ValueError, match="pos_embed has 30 positions, which is neither the model's number nor"):
        make().adapt_state_dict(state)


# -- start from a plain ViT ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "size"), [({}, 48), ({"reg_tokens": 2}, 64), ({"no_embed_class": True}, 32)])
def test_start_from_vit_takes_what_is_shared_and_names_what_is_new(host: dict[str, Any], size: int) -> None:
    vit = VisionTransformer(**(LOOKUP | {"img_size": size} | host))
    model = make()
    new = model.start_from_vit({"model": vit.state_dict()})
    parts = {name.split(".")[2] if name.startswith("blocks") else name.split(".")[0] for name in new}
    exchange = {"norm_p", "norm_l", "cross", "norm_c", "infuse", "norm3", "mlp_lookup"}
    assert parts == exchange | {"pos_embed_compressed", "norm_lookup", "head_lookup"}
    assert torch.equal(model.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    if size == LOOKUP["img_size"]:
        assert torch.equal(model.pos_embed, vit.pos_embed[:, 1:])


def test_start_from_another_kind_of_vit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters do not fit .* first blocks\.0\.ls1\.gamma"):
        make().start_from_vit(VisionTransformer(**LOOKUP, init_values=1e-5).state_dict())
    with pytest.raises(ValueError, match=r"parameters do not fit .* first blocks\.1\.attn\.proj\.bias"):
        make().start_from_vit(VisionTransformer(**(LOOKUP | {"depth": 1})).state_dict())


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"compressed_grid": 0}, ValueError, "compressed_grid must be a number of tokens a side"),
        ({"compressed_grid": (2, 3, 4)}, ValueError, "compressed_grid must be a number of tokens a side"),
        ({"compressed_pos_grid": 2.5}, ValueError, "compressed_pos_grid must be a number of tokens a side"),
        ({"infusion": "mean"}, ValueError, "infusion must be one of transpose, .*got 'mean'"),
        ({"lookup_mlp_ratio": 0.01}, ValueError, "at least one of 48 channels, got 0.01"),
        ({"global_pool": "token"}, ValueError, "global_pool must be one of .*got 'token': LookupViT has no class"),
        ({"reg_tokens": 4}, TypeError, "LookupViT takes no reg_tokens, .*it takes attn_drop_rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


def test_unknown_grids_pools_infusions_and_masks_are_refused_later_too() -> None:
    model, x = make(), torch.randn(1, 3, 48, 48)
    with pytest.raises(ValueError, match="compressed_grid must be"):
        model.set_compressed_grid(-1)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="infusion must be one of"):
        exchange_weights(torch.zeros(1, 1, 2, 2), "mean")
    for mode in (True, False):
        with pytest.raises(ValueError, match="takes no attn_mask"):
            model.train(mode)(x, is_causal=True)


# -- cost ------------------------------------------------------------------------------------------------------


class WholeModel(nn.Module):
    """Both heads in eval mode, so that the last block is run completely."""

    def __init__(self, model: LookupViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.model.forward_heads(x))


# Operation count of the equations (MACs, 224 px, both heads, no norms), not measured; parameters in millions.
ANALYTIC = {
    "small": (34.93, {3: 1.709, 5: 2.183, 7: 2.901, 10: 4.463}),
    "base": (137.10, {3: 6.671, 5: 8.467, 7: 11.177, 10: 17.008}),
    "large": (482.00, {5: 29.714}),
}


@pytest.mark.parametrize("size", released(ANALYTIC, ["small"]))
def test_parameters_and_macs_are_those_of_the_operation_count(size: str) -> None:
    parameters, macs = ANALYTIC[size]
    model = timm.create_model(f"lookupvit_{size}_patch16_224").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)
    for grid, expected in macs.items():
        model.set_compressed_grid(grid)
        report = count_flops(WholeModel(model), (3, 224, 224))
        assert not report.uncounted
        assert report.total / 1e9 == pytest.approx(expected, rel=0.01)
    # Eval alone leaves out the patches' half of the last block, with N = 196 and M = 25 (2M + 3N) C^2 and more.
    model.set_compressed_grid(5)
    saved = count_flops(WholeModel(model), (3, 224, 224)).total - count_flops(model, (3, 224, 224)).total
    n, m, c = 196, 25, model.embed_dim
    norms = 5 * c * (m + 2 * n)
    assert saved == (m + 2 * n) * c * c + n * m * c + norms + 1000 * c  # v, proj, MLP; A^T u; norms; head


def test_initialisation_is_that_of_timm() -> None:
    model = LookupViT(**(LOOKUP | {"embed_dim": 384, "num_heads": 6}))
    for name in ("blocks.0.cross.q", "blocks.1.infuse.proj", "blocks.0.mlp_lookup.fc1", "blocks.0.attn.qkv"):
        layer = model.get_submodule(name)
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)  # truncated normal
        assert not layer.bias.any()
    assert float(model.pos_embed_compressed.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert "pos_embed_compressed" in model.no_weight_decay()


def test_block_without_infusion_gives_the_same_compressed_tokens() -> None:
    block = LookupBlock(32, 4).eval()
    compressed, lookup = torch.randn(2, 9, 32), torch.randn(2, 36, 32)
    alone, none = block(compressed, lookup, infuse=False)
    assert none is None
    assert torch.allclose(alone, block(compressed, lookup)[0], atol=1e-5)


def test_model_is_saved_by_torch_after_its_grid_changed() -> None:
    model, x = make(), torch.randn(1, 3, 48, 48)
    model.set_compressed_grid(2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))
