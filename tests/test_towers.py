"""Towers of vision-language models as hosts. Expectations are timm's own towers, and sums and grids done by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts import SETTINGS
from pages import example
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.gemma4_vit import Gemma4VitEncoder
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.hosts.host import HOST_CLASSES
from effvit.hosts.towers import NAMES, TOWERS, mean_filled
from effvit.measure.breakdown import time_by_block
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.controls import control_of, resolution_control
from effvit.measure.costs import tokens_by_block
from effvit.measure.flops import count_flops
from effvit.measure.ladders import families
from effvit.recover import to_grid
from effvit.reducers import METHODS
from effvit.show.token_stages import trace_stages
from effvit.testing.laws import copies_through_files, double
from effvit.tokens import TokenMap

SMALL: dict[str, dict[str, Any]] = {
    "qwen3": {"pos_embed_grid_size": 6, "mlp_ratio": 2.0},
    "deepseek": {"mlp_ratio": 2.0},
    "gemma4": {"head_dim": 16, "intermediate_size": 48, "position_embedding_size": 32},
}
# 6 x 12 patches, which all projectors cut into whole cells but DeepSeek's, whose 5 x 7 is padded.
SIZES = {"qwen3": (96, 192), "deepseek": (70, 98), "gemma4": (96, 192)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 classifier": ("qwen3_vit_88m", {"num_classes": 5}),
    "qwen3 merge": ("qwen3_vit_88m_merge", {"num_classes": 5, "out_features": 24}),
    "qwen3 encoder": ("qwen3_vit_88m_enc", {"out_features": 24}),
    "qwen3 mean": ("qwen3_vit_88m_enc", {"out_features": 0, "global_pool": "avg"}),
    "deepseek classifier": ("deepseek_vit_412m", {"num_classes": 5}),
    "deepseek align": ("deepseek_vit_412m_align", {"num_classes": 5, "out_features": 24}),
    "deepseek encoder": ("deepseek_vit_412m_enc", {"out_features": 24}),
    "deepseek mean": ("deepseek_vit_412m_enc", {"out_features": 0, "global_pool": "avg"}),
    "gemma4 classifier": ("gemma4_vit_167m", {"num_classes": 5}),
    "gemma4 soft": ("gemma4_vit_167m", {"num_classes": 5, "encoder_pool": "soft"}),
    "gemma4 encoder": ("gemma4_vit_570m_enc", {}),
    "gemma4 patches": ("gemma4_vit_167m_enc", {"global_pool": ""}),
}
ENCODERS = ("qwen3 encoder", "deepseek encoder", "gemma4 encoder")
METHODS_OF_TOWERS = [name for name, method in METHODS.items() if not method.needs_class_token]


def build(case: str, prefix: str = "", **options: Any) -> nn.Module:
    """A narrow model of four blocks with the same weights at every call, in eval mode."""
    name, own = CASES[case]
    family = case.split()[0]
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": SIZES[family], **SMALL[family]}
    model = timm.create_model(prefix + name, **(small | own | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if "std_" in buffer_name:  # the standardisation of Gemma's larger tower, which is none at first
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def images(case: str, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or SIZES[case.split()[0]]), generator=generator)


def reduced(case: str, method: str = "tome", **settings: Any) -> Any:
    recover = settings.pop("recover", None)
    return effvit.sparsify(build(case), method, recover=recover, **(SETTINGS[method] | settings))


def projector_of(dense: nn.Module) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """timm's own projector of an encoder: patches (B, H*W, C) of a grid -> tokens of a language model."""
    if not isinstance(dense, Gemma4VitEncoder):
        projector = dense.merger if hasattr(dense, "merger") else dense.aligner
        return lambda patches, grid: projector(patches.unflatten(1, grid))

    def pooled(patches: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
        places = torch.stack([columns.flatten(), rows.flatten()], dim=-1).expand(len(patches), -1, -1)
        return (dense.pooler(patches, places, None)[0] - dense.std_bias) * dense.std_scale

    return pooled


# -- nothing reduced -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_nothing_reduced_is_bit_equal_to_timm_in_every_form(case: str) -> None:
    dense, x = build(case), images(case)
    model = effvit.sparsify(dense, "tome", r=0)
    assert torch.equal(model(x), dense(x))
    assert torch.equal(model.forward_features(x), dense.forward_features(x))
    for options in ({}, {"norm": True}, {"indices": 2, "stop_early": True}, {"output_fmt": "NLC", "indices": [0, -1]}):
        own, maps = model.forward_intermediates(x, **options)
        final, expected = dense.forward_intermediates(x, **options)
        assert torch.equal(own, final)
        assert len(maps) == len(expected)
        assert all(map(torch.equal, maps, expected))


@pytest.mark.parametrize("case", ["qwen3 merge", "deepseek encoder", "gemma4 encoder"])
def test_dict_of_intermediates_has_the_entries_of_timm(case: str) -> None:
    dense, x = build(case), images(case)
    model = effvit.sparsify(dense, "tome", r=0)
    own, expected = (each.forward_intermediates(x, output_dict=True) for each in (model, dense))
    assert own.keys() == expected.keys()
    assert torch.equal(own["image_features"], expected["image_features"])
    assert torch.equal(own.get("patch_valid", x), expected.get("patch_valid", x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ENCODERS)
def test_nothing_reduced_is_bit_equal_in_other_dtypes(case: str, dtype: torch.dtype) -> None:
    dense = build(case).to(dtype)
    x = images(case).to(dtype)
    assert torch.equal(effvit.sparsify(dense, "tome", r=0)(x), dense(x))


@pytest.mark.parametrize("case", ENCODERS)
def test_nothing_reduced_is_bit_equal_on_other_sizes_and_without_the_fused_kernel(case: str) -> None:
    dense = build(case)
    model = effvit.sparsify(dense, "tome", r=0)
    side = {"qwen3": 64, "deepseek": 56, "gemma4": 144}[case.split()[0]]
    x = images(case, size=(side, side))
    assert torch.equal(model(x), dense(x))
    for block in [*model.blocks, *dense.blocks]:
        block.attn.fused_attn = False
    assert torch.equal(model(x), dense(x))


def test_deepseek_pads_images_and_its_grid_as_timm_does() -> None:
    dense = build("deepseek encoder", dynamic_img_pad=True)
    model, x = effvit.sparsify(dense, "tome", r=0), images("deepseek", size=(60, 90))
    assert model(x).shape == (2, 2 * 3, 24)  # 5 x 7 patches, of which cells of 3 x 3 make 2 x 3
    assert torch.equal(model(x), dense(x))


def test_grouped_keys_and_finite_clamps_of_gemma_are_kept() -> None:
    dense = build("gemma4 patches", num_kv_heads=1, use_clipped_linears=True)
    with torch.no_grad():
        for name, buffer in dense.named_buffers():
            if name.endswith(("_min", "_max")):
                buffer.fill_(-0.5 if name.endswith("_min") else 0.5)
    x = images("gemma4")
    assert torch.equal(effvit.sparsify(dense, "tome", r=0)(x), dense(x))
    assert not torch.equal(dense(x), build("gemma4 patches", num_kv_heads=1)(x))


# -- what is read behind the blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS_OF_TOWERS)
@pytest.mark.parametrize("case", ENCODERS)
def test_projector_reads_the_full_grid_each_patch_in_its_place(case: str, method: str) -> None:
    """By hand: the tokens left, put back by ``to_grid``, normalised, through timm's own projector."""
    dense, x = build(case), images(case)
    model = effvit.sparsify(dense, method, **SETTINGS[method])
    out = model(x)
    assert out.shape == dense(x).shape
    tokens, (last, place) = model.trace_tokens(x, memory=True)[-1], model.forward_tokens(x, memory=True)
    assert last.shape[1] < place.num_patches or method == "expedite"
    patches = to_grid(tokens.x, tokens.tokens, model.recover)
    patches = dense.norm(patches) if hasattr(dense, "norm") else patches
    assert torch.allclose(out, projector_of(dense)(patches, place.grid), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recover", ["last", "nearest", "zero", "reconstruct", "attention"])
@pytest.mark.parametrize("case", ENCODERS)
def test_fill_says_what_the_projector_reads_of_dropped_patches(case: str, recover: str) -> None:
    dense, x = build(case), images(case)
    model = effvit.sparsify(dense, "uniform", recover=recover, keep_rate=0.5, reduce_at=(1,)).eval()
    (map_of_last,) = model.forward_intermediates(x, indices=[3], intermediates_only=True, norm=True, output_fmt="NLC")
    expected = projector_of(dense)(map_of_last, model.patch_embed.grid_size)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS_OF_TOWERS if not METHODS[name].soft])
@pytest.mark.parametrize("case", ["qwen3 mean", "deepseek classifier", "gemma4 classifier"])
def test_mean_is_that_of_the_tokens_by_the_patches_they_stand_for(case: str, method: str) -> None:
    """Law of a weighted mean; soft clusters (Expedite) stand for no patch alone and give way to all patches."""
    model = double(reduced(case, method))
    x = images(case).double()
    y, tokens = model.forward_tokens(x)
    members = (tokens.source.unsqueeze(-1) == torch.arange(y.shape[1])).sum(1, keepdim=True).double()  # (B, 1, N)
    expected = (members @ y).squeeze(1) / members.sum(-1)
    pooled = model(x) if case == "qwen3 mean" else model.forward_features(x).flatten(1, -2).mean(1)
    assert torch.allclose(pooled, expected, rtol=0, atol=1e-9)


def test_mean_filled_keeps_the_mean_of_what_is_carried() -> None:
    """By hand: patches 0 to 3 hold 1, 2, 3 and 6; 1 and 3 stay, whose mean is 4."""
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 4, 1)
    tokens = TokenMap.full(x, (2, 2), 0, 0)
    x, tokens = tokens.select(x, torch.tensor([[1, 3]]), 2)
    assert mean_filled(x, tokens).flatten().tolist() == [4.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize("case", ["qwen3 encoder", "deepseek align", "gemma4 soft", "gemma4 classifier"])
@pytest.mark.parametrize("method", ["tome", "hot", "dymu"])
def test_an_image_does_not_depend_on_its_batch(case: str, method: str) -> None:
    model = double(reduced(case, method))
    x = images(case, batch=3).double()
    assert torch.allclose(torch.cat([model(image[None]) for image in x]), model(x), rtol=0, atol=1e-9)


def test_packed_batch_of_gemma_equals_the_padded_one() -> None:
    """Its products have no scale, which packed kernels bring."""
    padded, packed = (double(reduced("gemma4 encoder", "dymu", ragged=ragged)) for ragged in ("padded", "packed"))
    x = images("gemma4", batch=3).double()
    assert torch.allclose(packed(x), padded(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ENCODERS)
def test_caller_takes_the_reduced_tokens_with_the_patch_of_each(case: str) -> None:
    """Uniform selection keeps patches as they are, so that those of a model of one more, unreduced block are found."""
    dense, x = build(case), images(case)
    model = effvit.sparsify(dense, "uniform", keep_rate=0.5, reduce_at=(3,), place="mlp")
    full = effvit.sparsify(dense, "tome", r=0).forward_tokens(x).x
    y, tokens = model.forward_tokens(x)
    assert y.shape[1] == tokens.anchor.shape[1] == tokens.num_patches // 2
    assert torch.allclose(y, full.gather(1, tokens.anchor.unsqueeze(-1).expand_as(y)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ENCODERS)
def test_dropped_patches_are_remembered_once_each_without_gradients(case: str) -> None:
    """The features are those that the sequences of all blocks hold, which gradients keep."""
    model = reduced(case, "uniform", keep_rate=0.8, reduce_at=(0, 1, 2, 3))
    x = images(case)
    kept, _ = model.forward_tokens(x, memory=True).tokens.memory, model(x)
    with torch.no_grad():
        compact = model.forward_tokens(x, memory=True).tokens.memory
    assert len(kept.sequences) == 4
    assert [tuple(sequence.shape[:2]) for sequence in compact.sequences] == [(2, kept.rows.shape[1])]
    assert torch.equal(compact.features(), kept.features())


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "grid", "rule"),
    [
        (
            "qwen3 encoder",
            (13, 7),
            r"cells of 2 x 2 patches, .* multiples of 2, got 13 x 7 .* multiples of 32 x 32 pixels",
        ),
        ("qwen3 merge", (13, 7), r"cells of 2 x 2 patches, .* multiples of 2, got 13 x 7"),
        (
            "gemma4 encoder",
            (12, 8),
            r"cells of 3 x 3 patches, .* multiples of 3, got 12 x 8 .* multiples of 48 x 48 pixels",
        ),
        ("gemma4 soft", (12, 8), r"cells of 3 x 3 patches, .* multiples of 3, got 12 x 8"),
    ],
)
def test_grid_that_the_projector_cannot_take_is_refused_before_the_first_block(
    case: str, grid: tuple[int, int], rule: str
) -> None:
    model = reduced(case)
    model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("a block has run"))
    x = torch.randn(1, 3, 16 * grid[0], 16 * grid[1])
    with pytest.raises(ValueError, match=rule):
        model(x)
    with pytest.raises(ValueError, match=rule):
        model.set_input_size((16 * grid[0], 16 * grid[1]))
    if "encoder" not in case:
        with pytest.raises(ValueError, match=rule):
            model.forward_features(x)


@pytest.mark.parametrize(("case", "grid"), [("qwen3 encoder", (13, 7)), ("gemma4 soft", (12, 8))])
def test_patches_of_such_a_grid_are_there_for_who_does_not_project(case: str, grid: tuple[int, int]) -> None:
    model = reduced(case)
    x = torch.randn(1, 3, 16 * grid[0], 16 * grid[1])
    assert model.forward_tokens(x).tokens.grid == grid
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (1, 32, *grid)


def test_other_bad_input_is_refused_with_a_remedy() -> None:
    qwen, deepseek, gemma = (reduced(case) for case in ENCODERS)
    with pytest.raises(ValueError, match=r"100 x 64 is not a multiple of the patch size 16 x 16; resize the images$"):
        qwen(torch.randn(1, 3, 100, 64))
    with pytest.raises(ValueError, match=r"patch size 14 x 14; resize the images or create .* dynamic_img_pad=True"):
        deepseek(torch.randn(1, 3, 100, 64))
    with pytest.raises(TypeError, match=r"takes images .*, got 'patches', 'patch_coord': patches with coordinates"):
        gemma({"patches": torch.randn(1, 9, 768), "patch_coord": torch.zeros(1, 9, 2)})
    with pytest.raises(ValueError, match="takes no attn_mask or is_causal"):
        qwen(images("qwen3"), attn_mask=torch.ones(72, 72))
    with pytest.raises(ValueError, match="a tower has a fixed patch size of 16 x 16, got 14; leave it out"):
        qwen.set_input_size(patch_size=14)
    with pytest.raises(TypeError, match="a Qwen3VitEncoder has no classifier; create the model without '_enc'"):
        qwen.reset_classifier(10)


@pytest.mark.parametrize("method", ["evit", "ats"])
def test_methods_that_need_a_class_token_are_refused(method: str) -> None:
    with pytest.raises(
        ValueError, match=f"{method} scores patches by the class token, but this Qwen3VitEncoder has none"
    ):
        effvit.sparsify(build("qwen3 encoder"), method)


# -- what timm expects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_names_inherit_options_tags_and_configuration(case: str) -> None:
    name, _ = CASES[case]
    model = build(case, prefix="tome_", r=3)
    assert model.pretrained_cfg["architecture"] == f"tome_{name}"
    assert {r.r for r in model.reducers.values()} == {3}
    own, host = timm.get_pretrained_cfg(f"tome_{name}"), timm.get_pretrained_cfg(name)
    assert (own.tag, own.hf_hub_id, own.input_size) == (host.tag, host.hf_hub_id, host.input_size)


def test_every_tower_of_timm_has_a_name_with_every_method_it_can_have() -> None:
    patterns = ("qwen3_vit*", "deepseek_vit*", "gemma4_vit*")
    assert set(NAMES) == {name for pattern in patterns for name in timm.list_models(pattern)}
    assert {f"{method}_{name}" for method in METHODS_OF_TOWERS for name in NAMES} <= set(effvit.list_models())
    assert not effvit.list_models("evit_qwen3*")


def test_projected_width_follows_the_tag_of_a_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("tome_qwen3_vit_306m_enc.qwen3_vl_4b")
    assert model.merger.out_features == 2560


@pytest.mark.parametrize("case", CASES)
def test_features_only_gives_full_maps_and_prunes_the_rest(case: str) -> None:
    model = build(case, prefix="tome_", features_only=True, out_indices=(0, 2), r=3).eval()
    family = case.split()[0]
    patch = 14 if family == "deepseek" else 16
    maps = model(images(case))
    grid = tuple(side // patch for side in SIZES[family])
    assert [m.shape for m in maps] == [(2, 32, *grid)] * 2
    assert len(model.model.blocks) == 3
    assert model.feature_info.reduction() == [patch] * 2


@pytest.mark.parametrize("case", ["qwen3 encoder", "deepseek align", "gemma4 encoder", "gemma4 classifier"])
def test_model_survives_files_and_a_change_of_method(case: str, tmp_path: Path) -> None:
    x = images(case)
    model = build(case, prefix="tome_", r=3)
    for again in copies_through_files(model):
        assert torch.equal(again(x), model(x))
    save_for_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == f"tome_{CASES[case][0]}"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert loaded.patch_embed.img_size == model.patch_embed.img_size
    other = effvit.sparsify(model, "hot", **SETTINGS["hot"])
    assert other.method == "hot"
    assert torch.equal(other(x), effvit.sparsify(build(case), "hot", **SETTINGS["hot"])(x))


@pytest.mark.parametrize("case", ["qwen3 merge", "deepseek align", "deepseek encoder", "gemma4 soft", "gemma4 encoder"])
@pytest.mark.parametrize("method", ["tome", "dymu"])
def test_weights_load_from_a_file_of_the_dense_tower(case: str, method: str, tmp_path: Path) -> None:
    dense, x = build(case), images(case)
    path = tmp_path / "weights.safetensors"
    save_file(dense.state_dict(), path)
    fresh = build(case, prefix=f"{method}_", pretrained=False, **METHODS[method].off())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    effvit.load_checkpoint(fresh, path)
    assert torch.equal(fresh(x), dense(x))


@pytest.mark.parametrize("case", ["qwen3 encoder", "deepseek align", "gemma4 encoder"])
def test_checkpointing_changes_no_output_and_gradients_reach_every_parameter(case: str) -> None:
    model = reduced(case, "uniform", keep_rate=0.5, recover="attention").train()
    x = images(case)
    out = model(x)
    out.square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    again = model(x)
    again.square().sum().backward()
    assert torch.equal(again, out)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("case", ENCODERS)
def test_other_sizes_need_no_new_model(case: str) -> None:
    model = reduced(case)
    resized = copy.deepcopy(model)
    side = {"qwen3": 64, "deepseek": 84, "gemma4": 144}[case.split()[0]]
    resized.set_input_size((side, side))
    assert resized.patch_embed.img_size == (side, side)
    x = images(case, size=(side, side))
    assert torch.equal(model(x), resized(x))


def test_register_host_takes_what_adds_to_a_tower() -> None:
    mine = type("Mine", (Gemma4VitEncoder,), {})
    try:
        effvit.register_host(mine)
        tower = mine(img_size=96, embed_dim=32, depth=2, num_heads=2, head_dim=16, position_embedding_size=64).eval()
        model = effvit.sparsify(tower, "tome", r=0)
        assert model.patch_embed.img_size == (768, 768)  # timm's towers of Gemma forget what they were made for
        assert torch.equal(model(images("gemma4")), tower(images("gemma4")))
    finally:
        HOST_CLASSES.pop(mine, None)


# -- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_counts_of_every_form_agree(case: str) -> None:
    size = (3, *SIZES[case.split()[0]])
    for model in (build(case), reduced(case, "uniform", keep_rate=0.5)):
        assert sum(closed_form_macs(model, size).values()) == count_flops(model, size, strict=True).total


@pytest.mark.parametrize("recover", ["reconstruct", "attention"])
def test_counts_of_fills_before_a_projector_agree(recover: str) -> None:
    model = reduced("qwen3 encoder", "uniform", keep_rate=0.5, recover=recover)
    assert sum(closed_form_macs(model, (3, 96, 192)).values()) == count_flops(model, (3, 96, 192), strict=True).total


@pytest.mark.parametrize("case", ["deepseek classifier", "gemma4 encoder"])
def test_counts_of_soft_clusters_agree(case: str) -> None:
    model, size = reduced(case, "expedite"), (3, *SIZES[case.split()[0]])
    assert sum(closed_form_macs(model, size).values()) == count_flops(model, size, strict=True).total


def test_costs_schedules_and_controls_find_the_parts_of_a_classifier() -> None:
    dense, x = build("gemma4 classifier"), images("gemma4")
    model = effvit.sparsify(dense, "tome", r=10)
    assert tokens_by_block(dense, x) == [72.0] * 4
    assert tokens_by_block(model, x) == [62.0, 52.0, 42.0, 32.0]
    assert {family.method for family in families(dense)} >= {"tome", "gtp", "expedite"}
    assert [stage.tokens for stage in trace_stages(model, x[:1])] == [62, 52, 42, 32]
    assert control_of(model).token_counts() == model.token_counts()
    assert {time.block.rpartition(".")[2] for time in time_by_block(model, x, rounds=1)} >= {"0", "3"}


def test_smaller_images_of_a_tower_are_cut_into_whole_cells() -> None:
    dense = build("gemma4 soft")
    least = sum(closed_form_macs(dense, (3, 48, 96)).values())
    control = resolution_control(dense, least)
    assert control.size == (48, 96)
    assert control.model(torch.randn(1, 3, 48, 96)).shape == (1, 5)
    with pytest.raises(ValueError, match="which this model takes for one cell of 3 x 3 patches"):
        resolution_control(dense, 1)


def test_plain_vits_whose_blocks_are_refused_still_tell_their_tokens() -> None:
    """Only parts that the model itself does not hold are found by way of a reduced model."""
    dense = VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=3, block_fn=ParallelScalingBlock).eval()
    assert tokens_by_block(dense, torch.zeros(1, 3, 32, 32)) == [4.0, 4.0]


def test_all_classes_of_towers_are_registered() -> None:
    assert TOWERS.items() <= HOST_CLASSES.items()


# -- recorders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["gemma4 encoder", *(pytest.param(case, marks=pytest.mark.release) for case in ENCODERS[:2])]
)
def test_exported_tower_equals_the_plain_run(case: str) -> None:
    model = reduced(case, "tome", r=5)
    exported = torch.export.export(model, (images(case),)).module()
    other = images(case).flip(-1)
    assert torch.allclose(exported(other), model(other), rtol=1e-5, atol=1e-5)


def test_examples_of_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow tower of the same name, without weights and on smaller images."""
    create = timm.create_model
    narrow = {"embed_dim": 32, "num_heads": 2, "out_features": 24}
    monkeypatch.setattr(
        timm, "create_model", lambda name, **given: create(name, **(given | narrow | {"pretrained": False}))
    )
    code = "\n".join(example("towers.md", word) for word in ("create_model", "forward_tokens"))
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(code.replace("2, 3, 768, 768", "2, 3, 256, 256").replace("r=80", "r=8"), names)
    assert names["read"].shape == (2, 64, 24)
    assert names["features"].shape == (2, 64, 32)  # of 256 patches, 24 blocks have merged 8 each
    assert names["members"].sum(1).tolist() == [256.0, 256.0]
    assert torch.equal(names["source"].gather(1, names["patch"])[0], torch.arange(64))
    assert int(names["rows"].max()) < 16
    assert int(names["columns"].max()) < 16
