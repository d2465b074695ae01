"""SiT: sizes, slimming and its ways back, other input sizes, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from architectures import SIZES, make_architecture
from timm.models import group_parameters, save_for_hf

import effvit
from effvit.architectures.sit import SiT
from effvit.architectures.token_slimming import TokenSlimming, unpooling
from effvit.measure.closed_form import closed_form_macs

TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 7}


def make(name: str = "sit_lvvit_tiny_224", **kwargs: Any) -> SiT:
    """A small model, 4 x 4 patches and then 8, 4 and 2 tokens, whose slimming is far from a plain mean."""
    slimmed = {"stage_blocks": [1, 2, 1, 1]} if name.startswith("sit") else {}
    torch.manual_seed(0)
    model = timm.create_model(name, **(TINY | slimmed | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# Parameters without aux_head and reverse modules, and MACs counted on the official code; README@f577808 has the
# parameters with aux_head and the MACs rounded.
@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("sit_lvvit_tiny_224", 15.552, 0.9919),
        ("sit_lvvit_xsmall_224", 25.241, 1.4871),
        ("sit_lvvit_small_224", 25.241, 4.0272),
        ("sit_lvvit_medium_224", 55.129, 8.0366),
        ("sit_lvvit_large_288", 147.399, 34.366),
    ],
)
def test_parameters_and_macs_are_those_of_the_official_model(name: str, parameters: float, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)
    macs = sum(closed_form_macs(model, model.pretrained_cfg["input_size"]).values())
    assert macs / 1e9 == pytest.approx(gmacs, rel=1e-4)


# README@f577808, rounded there; its parameters hold aux_head, embed_dim * 1000 + 1000 more.
@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("lvvit_tiny_4c_224", 15.7, 3.5),
        ("lvvit_small_4c_224", 25.4, 5.5),
        ("lvvit_medium_4c_224", 55.2, 11.9),
        ("lvvit_large_6c_288", 147, 56.1),
    ],
)
def test_dense_teachers_have_the_published_size(name: str, parameters: float, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    total = sum(p.numel() for p in model.parameters()) + 1000 * (model.embed_dim + 1)
    assert total / 1e6 == pytest.approx(parameters, rel=3e-3)
    macs = sum(closed_form_macs(model, model.pretrained_cfg["input_size"]).values())
    assert macs / 1e9 == pytest.approx(gmacs, rel=1e-2)


def test_reverse_modules_have_the_published_size() -> None:
    """36.7 M with aux_head: the official checkpoint of SiT-S, counted on the official code."""
    with torch.device("meta"):
        model = timm.create_model("sit_lvvit_small_224", reverse=True)
    assert (sum(p.numel() for p in model.parameters()) + 385_000) / 1e6 == pytest.approx(36.6915, abs=1e-4)


# -- slimming ------------------------------------------------------------------------------------------------------


def test_new_tokens_are_convex_combinations_of_the_old_ones() -> None:
    """Law: weights sum to 1, so equal tokens stay equal, and every channel stays within the range it had."""
    module = TokenSlimming(8, 3)
    torch.nn.init.normal_(module.mlp.fc2.weight)
    x = torch.randn(2, 10, 8)
    out, scores = module(x)
    assert out.shape == (2, 3, 8)
    assert scores.shape == (2, 10, 3)
    assert (out >= x.amin(1, keepdim=True)).all()
    assert (out <= x.amax(1, keepdim=True)).all()
    same = x[:, :1].expand(-1, 10, -1)
    assert torch.allclose(module(same)[0], same[:, :3], atol=1e-6)


def test_slimming_does_not_depend_on_the_order_of_the_tokens() -> None:
    module, x = TokenSlimming(8, 3).double(), torch.randn(2, 10, 8).double()
    assert torch.allclose(module(x)[0], module(x.flip(1))[0], rtol=0, atol=1e-12)


def test_unpooling_takes_means_and_undoes_a_permutation() -> None:
    """Laws: rows sum to 1; if every new token is one old token, un-pooling brings each back to its place."""
    scores = 5 * torch.randn(2, 10, 4)
    assert torch.allclose(unpooling(scores).sum(-1), torch.ones(2, 10))
    order = torch.randperm(6)
    permutation = torch.eye(6)[:, order]  # (N, K): new token k is old token order[k]
    x = torch.randn(1, 6, 8)
    scores = 100 * permutation[None]
    mixed = scores.softmax(1).transpose(1, 2) @ x
    assert torch.allclose(mixed, x[:, order], atol=1e-6)
    assert torch.allclose(unpooling(scores) @ mixed, x, atol=1e-6)


def test_unpooling_normalises_the_slimming_weights_over_the_new_tokens() -> None:
    """Closed form, where nothing underflows."""
    scores = torch.randn(2, 10, 4)
    weights = scores.softmax(1)
    assert torch.allclose(unpooling(scores), weights / weights.sum(-1, keepdim=True), atol=1e-6)


def test_unpooling_is_defined_for_a_token_that_nothing_was_taken_from() -> None:
    scores = torch.zeros(1, 5, 2)
    scores[:, 2] = -1e4  # its shares are 0 in float32
    assert torch.allclose(unpooling(scores).sum(-1), torch.ones(1, 5))


def test_maps_in_front_of_the_first_slimming_are_those_of_the_dense_model() -> None:
    model, dense = make(), make("lvvit_tiny_4c_224")
    dense.load_state_dict(model.state_dict(), strict=False)
    ours, theirs = (m.forward_intermediates(images(), intermediates_only=True) for m in (model, dense))
    assert torch.equal(ours[0], theirs[0])
    assert not torch.allclose(ours[1], theirs[1], atol=1e-3)


def test_maps_are_composed_over_the_stages() -> None:
    """By hand: the tokens of the last block through the un-pooling of every slimming, last one first."""
    model = make()
    scores: list[torch.Tensor] = []
    for module in model.slimming:
        module.register_forward_hook(lambda _module, _args, out: scores.append(out[1]))
    x = model.forward_layers(images()).tokens[-1]
    for matrix in map(unpooling, reversed(scores)):
        x = matrix @ x
    (last,) = model.forward_intermediates(images(), 1, output_fmt="NLC", intermediates_only=True)
    assert torch.allclose(last, x, atol=1e-5)


def test_class_token_passes_by_every_slimming() -> None:
    model = make()
    for block in model.slim_before:
        x = torch.randn(2, 17, model.embed_dim)
        slimmed, _ = model._slim(block, x)
        assert slimmed.shape[1] < 17
        assert torch.equal(slimmed[:, 0], x[:, 0])


def test_layer_tokens_are_those_after_the_slimming_behind_each_block() -> None:
    assert [x.shape[1] for x in make().forward_layers(images()).tokens] == [8, 8, 4, 2, 2]


def test_autocast_keeps_the_dtype_of_the_residual_stream() -> None:
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {x.dtype for x in model.forward_layers(images()).tokens} == {torch.float32}


def test_features_of_early_blocks_hold_no_slimming_module_behind_them() -> None:
    model = timm.create_model("sit_lvvit_tiny_224", features_only=True, out_indices=(0, 2), **TINY, stage_blocks=[2, 3])
    sum(m.square().sum() for m in model(images())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    early = timm.create_model("sit_lvvit_tiny_224", features_only=True, out_indices=(0,), **TINY, stage_blocks=[2, 3])
    assert not [name for name, _ in early.named_parameters() if "slimming" in name]


def test_slimming_modules_learn_at_the_rate_of_the_block_they_feed() -> None:
    model = make(reverse=True)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    for stage, block in enumerate((1, 3, 4)):
        assert layer[f"slimming.{stage}.scale"] == layer[f"blocks.{block}.norm1.weight"]
    assert layer["reverse.2.norm1.weight"] == layer["blocks.2.norm1.weight"]


def test_weights_can_be_drawn_anew_after_the_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("sit_lvvit_tiny_224", **TINY, stage_blocks=[2, 3])
    model.to_empty(device="cpu")
    model.init_weights(needs_reset=True)
    assert torch.equal(model.slimming[0].scale, torch.ones(1, 1, 1))
    assert 0.01 < model.cls_token.std() < 0.03  # 0.02 as officially
    assert model.eval()(images()).isfinite().all()


# -- other input sizes ---------------------------------------------------------------------------------------------


def test_another_input_size_keeps_the_numbers_of_tokens() -> None:
    model = make()
    before = {name: value.shape for name, value in model.state_dict().items() if name != "pos_embed"}
    model.set_input_size((100, 70))
    assert model.patch_embed.grid_size == (7, 5)
    assert [x.shape[1] for x in model.forward_layers(images(100, 70)).tokens] == [8, 8, 4, 2, 2]
    assert {name: value.shape for name, value in model.state_dict().items() if name != "pos_embed"} == before


def test_a_resized_model_survives_the_round_trip_through_a_hub_folder(tmp_path: Path) -> None:
    model = make()
    model.set_input_size((96, 64))
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images(96, 64)), model(images(96, 64)))


def test_dynamic_sizes_are_those_of_set_input_size() -> None:
    dynamic, fixed = make(dynamic_img_size=True), make()
    dynamic.load_state_dict(fixed.state_dict())
    assert torch.equal(dynamic(images()), fixed(images()))
    fixed.set_input_size((96, 48))
    x = images(96, 48)
    assert torch.allclose(dynamic(x), fixed(x), atol=1e-6)
    for ours, theirs in zip(dynamic.forward_intermediates(x)[1], fixed.forward_intermediates(x)[1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_padded_dynamic_sizes_are_those_of_the_padded_image() -> None:
    model = make(dynamic_img_size=True, dynamic_img_pad=True)
    x = images(90, 41)
    assert torch.allclose(model(x), model(torch.nn.functional.pad(x, (0, 7, 0, 6))), atol=1e-6)


def test_a_dynamic_model_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="image size 90 x 64 is not a multiple of the patch size 16 x 16"):
        make(dynamic_img_size=True)(images(90))


def test_reverse_modules_fix_the_input_size() -> None:
    model = make(reverse=True)
    model.set_input_size((32, 128))  # as many patches
    with pytest.raises(ValueError, match="the reverse modules rebuild 16 patches, so the input size is fixed; create"):
        model.set_input_size((96, 96))
    with pytest.raises(ValueError, match="but this is a model with dynamic_img_size=True"):
        make(reverse=True, dynamic_img_size=True)
    with pytest.raises(ValueError, match="but this is a dense model"):
        make("lvvit_tiny_4c_224", reverse=True)


def test_the_stem_has_a_fixed_stride() -> None:
    with pytest.raises(ValueError, match="a stem of 4 convolutions has a stride of 16, got patch_size=8"):
        make(patch_size=8)
    with pytest.raises(ValueError, match="the convolutional stem has a fixed patch size of 16, got 8"):
        make().set_input_size(patch_size=8)
    assert make(stem="patch", patch_size=8, num_tokens=[8, 4, 2])(images()).shape == (2, 7)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_training_checkpoints_load_without_their_reverse_modules(tmp_path: Path) -> None:
    trained, deployed = make(reverse=True), make()
    torch.save(trained.state_dict() | {"aux_head.weight": torch.zeros(7, 32)}, tmp_path / "sit.pth")
    dropped = effvit.load_checkpoint(deployed, tmp_path / "sit.pth")
    assert "aux_head.weight" in dropped
    assert {name.partition(".")[0] for name in dropped} == {"aux_head", "reverse"}
    assert torch.equal(trained(images()), deployed(images()))


def test_checkpoints_of_another_size_say_what_to_do() -> None:
    state = make().state_dict()
    with pytest.raises(
        ValueError, match=r"slims to \[8, 4, 2\] tokens, this model to \[18, 9, 4\]; create the model with"
    ):
        make(img_size=96).adapt_state_dict(state)
    larger = make(img_size=96, num_tokens=[8, 4, 2])
    adapted, _ = larger.adapt_state_dict(state)
    larger.load_state_dict(adapted)
    resized = make()
    resized.set_input_size((96, 96))
    assert torch.allclose(larger(images(96, 96)), resized(images(96, 96)), atol=1e-5)
    with pytest.raises(ValueError, match="has 24 positions, which is no square grid to resize from"):
        make("lvvit_tiny_4c_224").adapt_state_dict({"pos_embed": torch.zeros(1, 25, 32)})


def test_the_teacher_leaves_only_slimming_and_reverse_modules_to_learn() -> None:
    student, teacher = make(reverse=True), make("lvvit_tiny_4c_224")
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in missing} == {"slimming", "reverse"}
    assert not unexpected


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"stage_blocks": [1, 1]}, ValueError, r"must add up to the depth of 5 blocks, got \[1, 1\]"),
        ({"stage_blocks": [5, 0]}, ValueError, "a stage of stage_blocks must be at least 1, got 0"),
        ({"stage_blocks": [1.5, 3.5]}, TypeError, "a stage of stage_blocks must be a whole number, got 1.5"),
        ({"keep_rate": 0}, ValueError, r"keep_rate must be in \(0, 1\], got 0"),
        ({"keep_rate": 0.1}, ValueError, "keep_rate 0.1 leaves no token of 16 patches in stage 2; raise it"),
        ({"num_tokens": [8]}, ValueError, r"one value for each stage after the first, got \[8\] for 4 stages"),
        ({"num_tokens": [8, 4, 0]}, ValueError, "a value of num_tokens must be at least 1, got 0"),
        ({"stem": "4cg"}, ValueError, "stem must be one of 4c, 6c, patch, got '4cg'"),
        ({"patch_drop_rate": 0.5}, ValueError, "takes no patch_drop_rate"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


def test_keep_rate_1_slims_to_as_many_tokens() -> None:
    model = make(keep_rate=1, reverse=True)
    assert model.num_tokens == [16, 16, 16]
    assert not list(model.reverse.parameters())  # officially too, nothing is rebuilt while no token was dropped


@pytest.mark.parametrize("case", ["sit", "sit_6c", "sit_dense"])
def test_gradients_of_one_image_are_those_of_it_twice_over_two(case: str) -> None:
    """By linearity; torch's own BatchNorm in eval mode gets them wrong for one image behind a transposition."""
    model = make_architecture(case).double().eval()
    image = torch.randn(1, 3, *SIZES[case][0], generator=torch.Generator().manual_seed(0)).double()
    found = []
    for batch in (1, 2):
        model.zero_grad()
        (model(image.repeat(batch, 1, 1, 1)).square().sum() / batch).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-10)
