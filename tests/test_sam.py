"""SAM's image encoder: methods in its windows and global blocks, against timm's and in closed form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from timm.models.vision_transformer_sam import VisionTransformerSAM, get_decomposed_rel_pos_bias
from torch import Tensor, nn

import effvit
from effvit.hosts.sam import decomposed_bias
from effvit.hosts.windows import Among, Cut, compared_in_parts
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops
from effvit.show.visualize import token_figure
from effvit.testing import assert_reads, assert_runs_on_fakes
from effvit.testing.windows import (
    assert_checkpointing_changes_nothing,
    assert_closed_form_is_the_count,
    assert_half_precision_runs,
)

# Maps of 6 x 7 tokens in windows of 4, padded to 8 x 8; blocks 1 and 3 are global.
SMALL: dict[str, Any] = {
    "img_size": (48, 56),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
    "window_size": 4,
    "use_rel_pos": True,
    "global_attn_indexes": (1, 3),
    "neck_chans": 10,
}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 5}),
    ("tome", {"r": [8, 0, 3, 8], "prop_attn": False}),
    ("pitome", {"keep_rate": 0.7}),
    ("expedite", {"cluster_at": 0}),
    ("expedite", {"cluster_at": 1, "restore_at": 3, "num_clusters": 4}),
    ("cubistmerge", {"r_h": 1, "r_w": 1}),
    ("cubistmerge", {"r_h": 2, "r_w": 2, "reduce_at": (0,), "compat": True}),
]
NOTHING: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 0}),
    ("expedite", {"keep_rate": 1.0}),
    ("expedite", {"num_clusters": 16, "cluster_at": 1}),
]


def small(**settings: Any) -> Any:
    """A narrow encoder with weights that all matter, in eval mode."""
    torch.manual_seed(0)
    model = VisionTransformerSAM(**(SMALL | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(batch: int = 1, size: tuple[int, int] = (48, 56)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("method", "settings"), NOTHING)
def test_nothing_reduced_is_timm_bit_for_bit(method: str, settings: dict[str, Any]) -> None:
    model, x = small(), images()
    own = effvit.sparsify(model, method, **settings)
    assert torch.equal(own(x), model(x))
    (final, maps), (own_final, own_maps) = model.forward_intermediates(x), own.forward_intermediates(x)
    assert torch.equal(own_final, final)
    assert all(torch.equal(a, b) for a, b in zip(own_maps, maps, strict=True))


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
class TestReduced:
    def test_weights_are_shared_and_the_host_is_left_alone(self, method: str, settings: dict[str, Any]) -> None:
        model, x = small(), images()
        before = model(x)
        reduced = effvit.sparsify(model, method, **settings)
        assert reduced.state_dict().keys() == model.state_dict().keys()
        assert all(a is b for a, b in zip(reduced.parameters(), model.parameters(), strict=True))
        assert not torch.equal(reduced(x), before)
        assert torch.equal(model(x), before)
        assert torch.equal(effvit.sparsify(reduced, "tome", r=0)(x), before)
        assert torch.equal(pickle.loads(pickle.dumps(reduced))(x), reduced(x))

    def test_image_alone_is_the_image_in_a_batch(self, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(), method, **settings).double(), images(3).double()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("size", [(48, 56), (32, 32), (80, 24), (8, 8)])
    def test_maps_are_full_for_images_of_any_size(
        self, method: str, settings: dict[str, Any], size: tuple[int, int]
    ) -> None:
        model, x = effvit.sparsify(small(), method, **settings), images(1, size)
        grid = (size[0] // 8, size[1] // 8)
        final, maps = model.forward_intermediates(x)
        assert [tuple(y.shape) for y in maps] == [(1, 24, *grid)] * 4
        assert final.shape == (1, 10, *grid)
        assert torch.equal(final, model.forward_features(x))
        assert all(y.isfinite().all() for y in maps)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], maps[1])

    def test_checkpointing_changes_nothing_and_every_parameter_learns(
        self, method: str, settings: dict[str, Any]
    ) -> None:
        model, x = effvit.sparsify(small(), method, **settings).train(), images(2)
        assert_checkpointing_changes_nothing(model, x)

    @pytest.mark.parametrize("size", [(48, 56), (64, 40), (8, 8)])
    def test_closed_form_agrees_with_the_count(
        self, method: str, settings: dict[str, Any], size: tuple[int, int]
    ) -> None:
        model = effvit.sparsify(small(), method, **settings)
        assert_closed_form_is_the_count(model, size)

    def test_nothing_is_read_from_the_device_nor_made_on_another(self, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(), method, **settings), images(2)
        assert_reads(lambda: model(x), 0)
        if settings.get("r") == 5:  # in all blocks: timm's own take indices of relative positions from the CPU
            assert_runs_on_fakes(model, model, x)
            assert_runs_on_fakes(model.train(), model, x)

    def test_half_precision_and_autocast_run(self, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(), method, **settings), images()
        assert_half_precision_runs(model, x)

    def test_stages_of_an_image_label_every_patch(self, method: str, settings: dict[str, Any]) -> None:
        model = effvit.sparsify(small(), method, **settings)
        stages = model.trace_stages(images())
        merging = {"pitome": [0, 1, 2, 3], "tome": [0, 1, 2, 3] if settings.get("r") == 5 else [0, 2, 3]}
        merging["cubistmerge"] = list(settings.get("reduce_at", [0]))
        assert [stage.block for stage in stages] == merging.get(method, [settings.get("cluster_at")])
        for stage in stages:
            assert stage.labels.shape == (6, 7)
            assert 0 <= stage.labels.min() <= stage.labels.max() < stage.tokens


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [SETTINGS[0], SETTINGS[3]])
def test_exported_program_gives_the_scores_of_a_plain_run(method: str, settings: dict[str, Any]) -> None:
    model, x = effvit.sparsify(small(), method, **settings), images(2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


def test_dense_closed_form_agrees_with_the_count() -> None:
    model = small()
    assert sum(closed_form_macs(model, (3, 48, 56)).values()) == count_flops(model, (3, 48, 56), strict=True).total


def test_blocks_see_fewer_tokens_in_each_window_and_in_proportion_in_global_blocks() -> None:
    model = effvit.sparsify(small(), "tome", r=4)
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda m, args, y: shapes.append(tuple(args[0].shape[:2])))
    model(images())
    # Of 16 tokens of four windows 4 are merged, of the 42 of the map 4 * 42 // 16.
    assert shapes == [(4, 12), (1, 32), (4, 12), (1, 32)]


def test_clusters_reach_global_blocks_as_a_smaller_map() -> None:
    model = effvit.sparsify(small(), "expedite", cluster_at=1, restore_at=3, num_clusters=4)
    sizes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: sizes.append(tuple(args[0].shape[1:3])))
    model(images())
    assert sizes == [(6, 7), (4, 4), (4, 4), (6, 7)]


def test_position_biases_of_all_places_in_another_order_are_timms() -> None:
    q, h, w = torch.randn(3, 2, 12, 8), torch.randn(5, 8), torch.randn(9, 8)  # tables for 3 x 5, resized to 3 x 4
    expected = get_decomposed_rel_pos_bias(q.flatten(0, 1), h, w, (3, 4), (3, 4)).unflatten(0, (3, 2))
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    shuffled = torch.stack([q[i][:, order[i]] for i in range(3)])
    own = decomposed_bias(shuffled, h, w, Among(order, None, (3, 4)))
    wanted = torch.stack([expected[i][:, order[i]][:, :, order[i]] for i in range(3)])
    torch.testing.assert_close(own, wanted)


def test_padding_is_merged_with_padding_first() -> None:
    """Of the windows of 4 on a 6 x 7 map the last has 6 tokens and 10 of padding, 4 of them at even places."""
    cut = Cut((4, 4), (6, 7))
    model = effvit.sparsify(small(), "tome", r=4)
    x = torch.randn(1, 6, 7, 24)
    groups = model.blocks[0].reducer.group(compared_in_parts(cut.windows(x), cut), cut.windows(x), 16)
    padding = cut.parts(x)[3] == 1
    assert padding.sum() == 10
    assert padding[groups.matching.source[3]].all()
    assert padding[groups.matching.destination[3]].all()


def test_official_file_loads_and_tells_what_has_no_place(tmp_path: Path) -> None:
    """Under the names of the released files, which hold a prompt encoder and a mask decoder too."""
    model, other = effvit.sparsify(small(num_classes=0), "tome", r=5), small(num_classes=0)
    file = {f"image_encoder.{name.replace('mlp.fc', 'mlp.lin')}": value for name, value in model.state_dict().items()}
    torch.save(file | {"prompt_encoder.x": torch.zeros(3)}, tmp_path / "sam.pth")
    torch.nn.init.zeros_(other.pos_embed)
    assert effvit.load_checkpoint(other, tmp_path / "sam.pth") == ["prompt_encoder.x"]
    assert torch.equal(effvit.sparsify(other, "tome", r=5)(images()), model(images()))


def test_names_have_the_tags_of_the_host() -> None:
    name = "tome_samvit_base_patch16"
    assert timm.is_model(name)
    narrow = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}
    model = timm.create_model(name, r=40, **narrow)
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["input_size"] == (3, 1024, 1024)
    assert timm.models.get_arch_pretrained_cfgs(name).keys() == {f"{name}.sa1b"}
    features = timm.create_model(name, r=40, features_only=True, out_indices=(0, 1), **narrow)
    assert [tuple(y.shape) for y in features(images(1, (64, 64)))] == [(1, 24, 4, 4)] * 2
    assert timm.create_model("expedite_samvit_huge_patch16", **narrow).settings["cluster_at"] is None


# Multiply-adds of the official encoder (hourglass_image_encoder.py@75a1c30) at 1024 x 1024, counted when it was read.
@pytest.mark.parametrize(
    ("setting", "official"),
    [("at18_121", 2574), ("at14_100", 2234), ("at8_100", 2003), ("at8_81", 1755), ("at6_81", 1633)],
)
def test_published_settings_are_names_with_the_multiply_adds_of_the_official_encoder(
    setting: str, official: float
) -> None:
    name = f"expedite_samvit_huge_patch16_{setting}"
    with torch.device("meta"):
        model = timm.create_model(name)
    block, clusters = map(int, setting.removeprefix("at").split("_"))
    assert {"cluster_at": block, "num_clusters": clusters, "norm": "official"}.items() <= model.settings.items()
    macs = sum(closed_form_macs(model, (3, 1024, 1024)).values())
    assert macs / 1e9 == pytest.approx(official, rel=2e-3)
    assert f"{name}.sa1b" in timm.list_pretrained("expedite_samvit_huge_patch16_at*")


def test_keywords_change_published_settings(tmp_path: Path) -> None:
    narrow = {"img_size": 64, "embed_dim": 24, "depth": 8, "num_heads": 2, "global_attn_indexes": (1,)}
    model = timm.create_model("expedite_samvit_huge_patch16_at6_81", cluster_at=2, **narrow).eval()
    assert (model.settings["cluster_at"], model.settings["num_clusters"]) == (2, 81)
    save_for_hf(model, str(tmp_path))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.settings == model.settings
    assert torch.equal(again(images(1, (64, 64))), model(images(1, (64, 64))))


class TestRefusals:
    def test_method_that_drops_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"evit does not work inside windows.*use method 'tome' or 'expedite'"):
            effvit.sparsify(small(), "evit")

    def test_rotary_tables(self) -> None:
        with pytest.raises(TypeError, match=r"blocks\.0\.attn rotates.*create the host with use_rope=False"):
            effvit.sparsify(small(use_rel_pos=False, use_rope=True), "tome")

    def test_clusters_without_windows(self) -> None:
        with pytest.raises(
            ValueError, match=r"blocks of this VisionTransformerSAM attend to whole maps; use method 'tome'"
        ):
            effvit.sparsify(small(window_size=0, global_attn_indexes=()), "expedite")

    def test_image_that_patches_do_not_cover(self) -> None:
        with pytest.raises(ValueError, match="image size 50 x 56 is not a multiple of the patch size 8 x 8"):
            effvit.sparsify(small(), "tome")(images(1, (50, 56)))

    def test_clusters_that_are_not_square(self) -> None:
        with pytest.raises(
            ValueError, match="must be square in the square windows of a VisionTransformerSAM, got 2 x 3"
        ):
            effvit.sparsify(small(), "expedite", num_clusters=(2, 3))

    def test_unknown_block(self) -> None:
        model = small()
        model.blocks[2] = nn.Identity()
        model.blocks[2].attn = nn.Identity()
        with pytest.raises(TypeError, match=r"blocks\.2 is a Identity, which token reduction does not know"):
            effvit.sparsify(model, "tome")


def test_image_of_tokens_is_drawn() -> None:
    figure = token_figure(effvit.sparsify(small(), "tome", r=5), Image.new("RGB", (56, 48), "red"))
    assert figure.width > 56
