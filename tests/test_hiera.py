"""Hiera and SAM 2's HieraDet: methods in their windows and global blocks, against timm's and in closed form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from timm.models.hiera import Hiera, Reroll, Unroll
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor

import effvit
from effvit.block import rehouse
from effvit.hosts.hiera import GroupedMaskUnitAttention, map_of, sequence_of
from effvit.hosts.hieradet import GroupedMultiScaleAttention
from effvit.hosts.windows import Among
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops
from effvit.show.visualize import token_figure
from effvit.testing import assert_reads, assert_runs_on_fakes
from effvit.testing.windows import (
    assert_checkpointing_changes_nothing,
    assert_closed_form_is_the_count,
    assert_half_precision_runs,
)

# Maps of 16 x 24, 8 x 12, 4 x 6 and 2 x 3 tokens. Blocks 2, 4 and 7 begin a stage.
SIZE = (64, 96)
COMMON: dict[str, Any] = {
    "embed_dim": 8,
    "num_heads": 1,
    "stages": (2, 2, 3, 2),
    "num_classes": 5,
    "init_values": 0.5,
}
# Mask units of 8 x 8 and 4 x 4 tokens, then global stages; windows of 8, 4, 3 (in maps of 4 x 6, padded) and 2.
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "hiera": (Hiera, {"img_size": SIZE}),
    "hieradet": (HieraDet, {"global_att_blocks": (5,), "window_spec": (8, 4, 4, 2)}),
}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 3}),
    ("tome", {"r": [20, 0, 0, 8, 0, 5, 0, 0, 1], "prop_attn": False}),
    ("expedite", {"cluster_at": 0}),
    ("expedite", {"cluster_at": 4, "restore_at": 6, "num_clusters": (3, 2)}),
    ("cubistmerge", {"r_h": 1, "r_w": 1}),
]
NOTHING: list[tuple[str, dict[str, Any]]] = [("tome", {"r": 0}), ("expedite", {"keep_rate": 1.0})]


def small(kind: str = "hiera", **settings: Any) -> Any:
    """A narrow model with weights that all matter, in eval mode."""
    torch.manual_seed(0)
    cls, own = KINDS[kind]
    model = cls(**(COMMON | own | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(batch: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("hiera", {}),
    ("hiera", {"abs_win_pos_embed": True, "use_expand_proj": False}),
    ("hiera", {"q_pool": 2, "mask_unit_attn": (True, False, True, True)}),
    ("hieradet", {}),
    ("hieradet", {"patch_size": (4, 4), "q_pool": 2, "global_att_blocks": (0, 8)}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize(("method", "settings"), NOTHING)
def test_nothing_reduced_is_timm_bit_for_bit(
    kind: str, options: dict[str, Any], method: str, settings: dict[str, Any]
) -> None:
    model, x = small(kind, **options), images()
    own = effvit.sparsify(model, method, **settings)
    assert torch.equal(own(x), model(x))
    assert torch.equal(own.forward_features(x), model.forward_features(x))
    for form in ({}, {"coarse": False, "output_fmt": "NHWC"}, {"indices": [1], "stop_early": False}, {"indices": [1]}):
        (final, maps), (own_final, own_maps) = (
            model.forward_intermediates(x, **form),
            own.forward_intermediates(x, **form),
        )
        assert torch.equal(own_final, final)
        assert len(maps) == len(own_maps)
        assert all(torch.equal(a, b) for a, b in zip(own_maps, maps, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "settings"), SETTINGS)
class TestReduced:
    def test_weights_are_shared_and_the_host_is_left_alone(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        model, x = small(kind), images()
        before = model(x)
        reduced = effvit.sparsify(model, method, **settings)
        assert reduced.state_dict().keys() == model.state_dict().keys()
        assert all(a is b for a, b in zip(reduced.parameters(), model.parameters(), strict=True))
        assert not torch.equal(reduced(x), before)
        assert torch.equal(model(x), before)
        assert torch.equal(effvit.sparsify(reduced, "tome", r=0)(x), before)
        assert torch.equal(effvit.sparsify(effvit.sparsify(model, "tome"), method, **settings)(x), reduced(x))
        assert torch.equal(pickle.loads(pickle.dumps(reduced))(x), reduced(x))

    def test_image_alone_is_the_image_in_a_batch(self, kind: str, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings).double(), images(3).double()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-10)

    def test_maps_are_full_at_every_stage_and_block(self, kind: str, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings), images()
        final, maps = model.forward_intermediates(x)
        assert [tuple(y.shape) for y in maps] == [
            (1, 8, 16, 24),
            (1, 16, 8, 12),
            (1, 32, 4, 6),
            (1, 64, 2, 3),
        ]
        assert torch.equal(final, model.forward_features(x))
        of_blocks = model.forward_intermediates(x, coarse=False, intermediates_only=True)
        assert [y.shape[1] for y in of_blocks] == [8, 8, 16, 16, 32, 32, 32, 64, 64]
        assert all(torch.equal(of_blocks[i], y) for i, y in zip((1, 3, 6, 8), maps, strict=True))
        early = model.forward_intermediates(x, indices=[2], intermediates_only=True)
        assert torch.equal(early[0], maps[2])
        assert all(y.isfinite().all() for y in of_blocks)

    def test_checkpointing_changes_nothing_and_every_parameter_learns(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings).train(), images(2)
        assert_checkpointing_changes_nothing(model, x)

    def test_closed_form_agrees_with_the_count(self, kind: str, method: str, settings: dict[str, Any]) -> None:
        assert_closed_form_is_the_count(effvit.sparsify(small(kind), method, **settings), SIZE)

    def test_nothing_is_read_from_the_device_nor_made_on_another(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings), images(2)
        assert_reads(lambda: model(x), 0)
        assert_runs_on_fakes(model, model, x)
        assert_runs_on_fakes(model.train(), model, x)

    def test_half_precision_and_autocast_run(self, kind: str, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings), images()
        assert_half_precision_runs(model, x)

    def test_stages_of_an_image_label_every_token_of_the_map(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        stages = effvit.sparsify(small(kind), method, **settings).trace_stages(images())
        reducing = {"tome": [0, 3, 5, 8], "expedite": [0, 3, 5, 8], "cubistmerge": [0, 3, 5, 8]}[method]
        if settings.get("r") == 3:
            reducing = [0, 1, 3, 5, 6, 8]
        if "restore_at" in settings:
            reducing = [5]
        assert [stage.block for stage in stages] == reducing
        for stage in stages:
            sizes = {(16, 24): range(2), (8, 12): range(2, 4), (4, 6): range(4, 7), (2, 3): range(7, 9)}
            assert stage.block in sizes[stage.labels.shape]
            assert 0 <= stage.labels.min() <= stage.labels.max() < stage.tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "settings"), [SETTINGS[0], SETTINGS[3]])
def test_exported_program_gives_the_scores_of_a_plain_run(kind: str, method: str, settings: dict[str, Any]) -> None:
    model, x = effvit.sparsify(small(kind), method, **settings), images(2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_is_compiled(kind: str) -> None:
    model, x = effvit.sparsify(small(kind), "tome", r=3), images(2)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_dense_closed_form_agrees_with_the_count(kind: str, options: dict[str, Any]) -> None:
    model = small(kind, **options)
    assert sum(closed_form_macs(model, (3, *SIZE)).values()) == count_flops(model, (3, *SIZE), strict=True).total


class TestOrder:
    """Of a 16 x 24 map that three strides of 2 shrink, and of one of them alone."""

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_sequence_is_that_of_timm(self, number: int) -> None:
        x, strides = torch.randn(2, 16, 24, 3), [(2, 2)] * number
        expected = Unroll((16, 24), (1, 1), strides)(x.flatten(1, 2))
        assert torch.equal(sequence_of(x, strides), expected)
        assert torch.equal(map_of(expected, strides, (16, 24)), x)
        assert torch.equal(map_of(expected, strides, (16, 24)), Reroll((16, 24), (1, 1), strides, [0], 0)(expected, 0))

    def test_strides_of_rows_and_columns_may_differ(self) -> None:
        x, strides = torch.randn(2, 12, 10, 3), [(3, 5), (2, 1)]
        expected = Unroll((12, 10), (1, 1), strides)(x.flatten(1, 2))
        assert torch.equal(sequence_of(x, strides), expected)
        assert torch.equal(map_of(expected, strides, (12, 10)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_to_all_tokens_in_another_order_is_timms(kind: str) -> None:
    """In the last block, which attends to the whole map of a Hiera and to windows of a HieraDet."""
    attn, x = small(kind).blocks[8].attn, torch.randn(2, 4, 64)
    order = torch.tensor([2, 0, 3, 1])
    expected = attn(x.unflatten(1, (2, 2)) if kind == "hieradet" else x).reshape(2, 4, 64)
    grouped: type[Any] = {"hiera": GroupedMaskUnitAttention, "hieradet": GroupedMultiScaleAttention}[kind]
    own = rehouse(attn, grouped)(x[:, order], Among(order.expand(2, 4), torch.ones(2, 4), (2, 2)))
    torch.testing.assert_close(own, expected[:, order])


def test_mask_units_and_global_stages_of_a_hiera_lose_r_tokens_and_blocks_that_pool_none() -> None:
    model = effvit.sparsify(small(), "tome", r=3)
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda m, args, y: shapes.append(tuple(args[0].shape[:2])))
    model(images())
    # 6 mask units of 64 and of 16 tokens, the sequences of the blocks that pool, and maps of 24 and of 6 tokens.
    assert shapes == [(6, 61), (6, 61), (1, 384), (6, 13), (1, 96), (1, 21), (1, 21), (1, 24), (1, 3)]


def test_windows_of_a_hieradet_lose_r_tokens_and_global_blocks_in_proportion() -> None:
    model = effvit.sparsify(small("hieradet"), "tome", r=3)
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda m, args, y: shapes.append(tuple(args[0].shape[:2])))
    model(images())
    # The global block 5 loses 3 * 24 // 16 of the 24 tokens of its map; a window of 2 x 2 cannot lose more than half.
    assert shapes == [(6, 61), (6, 61), (6, 8), (6, 13), (6, 4), (1, 20), (2, 13), (2, 4), (2, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_reach_the_blocks_behind_the_one_that_pools_as_a_smaller_map(kind: str) -> None:
    model = effvit.sparsify(small(kind), "expedite", cluster_at=2, restore_at=6)
    sizes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: sizes.append(tuple(args[0].shape[1:3])))
    model(images())
    # Windows of 4 x 4 have 3 x 3 cells, the map of 4 x 6 of a Hiera has 3 x 4, in windows of 4 x 4 it has two of 3 x 3.
    small_map = (3, 4) if kind == "hiera" else (3, 6)
    assert sizes == [(16, 24), (16, 24), (16, 24), (6, 9), (8, 12), small_map, (4, 6), (4, 6), (2, 3)]


@pytest.mark.parametrize(("method", "settings"), SETTINGS[::2])
def test_hieradet_takes_images_of_any_size_of_whole_windows(method: str, settings: dict[str, Any]) -> None:
    model = effvit.sparsify(small("hieradet"), method, **settings)
    for height, width in ((32, 32), (128, 64), (30, 93)):  # the last one is 8 x 24 patches too
        rows, columns = -(-height // 32) * 8, -(-width // 32) * 8
        final, maps = model.forward_intermediates(images(1, (height, width)))
        assert [tuple(y.shape[2:]) for y in maps] == [(rows // n, columns // n) for n in (1, 2, 4, 8)]
        assert final.shape == (1, rows // 8, columns // 8, 64)
        assert_closed_form_is_the_count(model, (height, width))


class TestNames:
    @pytest.mark.parametrize(
        ("name", "narrow"),
        [
            ("hiera_small_abswin_256", {"img_size": 64, "mask_unit_attn": (True, True, True, False)}),
            ("sam2_hiera_tiny", {"global_att_blocks": (4,), "window_spec": (8, 4, 4, 2)}),
        ],
    )
    def test_names_have_the_tags_of_the_host_and_folders_give_the_model_back(
        self, name: str, narrow: dict[str, Any], tmp_path: Path
    ) -> None:
        narrow = narrow | {"embed_dim": 8, "stages": (1, 2, 2, 1)}
        variant = f"tome_{name}"
        assert {tag.removeprefix("tome_") for tag in timm.models.get_arch_pretrained_cfgs(variant)} == {
            *timm.models.get_arch_pretrained_cfgs(name)
        }
        model, x = timm.create_model(variant, r=2, num_classes=5, **narrow).eval(), images(1, (64, 64))
        assert model.pretrained_cfg["architecture"] == variant
        save_for_hf(model, str(tmp_path))
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(x), model(x))
        assert again.settings == model.settings
        features = timm.create_model(variant, r=2, features_only=True, **narrow).eval()
        assert [tuple(y.shape) for y in features(x)] == [
            (1, 8, 16, 16),
            (1, 16, 8, 8),
            (1, 32, 4, 4),
            (1, 64, 2, 2),
        ]
        first = timm.create_model(variant, r=2, features_only=True, out_indices=(0, 1), **narrow)
        assert len(first.model.blocks) == 3
        assert [tuple(y.shape) for y in first(x)] == [(1, 8, 16, 16), (1, 16, 8, 8)]

    def test_every_name_of_both_modules_has_both_methods(self) -> None:
        for name in (*timm.list_models(module="hiera"), *timm.list_models(module="hieradet_sam2")):
            assert timm.is_model(f"tome_{name}")
            assert timm.is_model(f"expedite_{name}")

    @pytest.mark.parametrize("host", [*timm.list_models(module="hiera"), *timm.list_models(module="hieradet_sam2")])
    def test_expedite_of_every_name_clusters_at_its_defaults(self, host: str) -> None:
        """With few channels, and the blocks, windows and size of the images that the name has."""
        model = timm.create_model(f"expedite_{host}", embed_dim=8, num_heads=1, num_classes=5).eval()
        assert any(span is not None for span in model.spans.values())
        _, *size = model.pretrained_cfg["input_size"]
        assert_closed_form_is_the_count(model, (size[0], size[1]))

    def test_host_built_by_its_class_tells_the_size_of_its_images(self) -> None:
        assert effvit.sparsify(small(), "tome").pretrained_cfg["input_size"] == (3, *SIZE)
        assert effvit.sparsify(small("hieradet"), "tome").pretrained_cfg["input_size"] == (3, 224, 224)


def test_official_file_of_a_hiera_loads(tmp_path: Path) -> None:
    """Under the names of the released files: a projection as head, a norm in front of it."""
    model, other = effvit.sparsify(small(), "tome"), small()
    renamed = {
        name.replace("head.fc", "head.projection").replace("head.norm", "norm"): value
        for name, value in model.state_dict().items()
    }
    torch.save({"model_state": renamed}, tmp_path / "hiera.pth")
    torch.nn.init.zeros_(other.pos_embed)
    assert effvit.load_checkpoint(other, tmp_path / "hiera.pth") == []
    assert torch.equal(effvit.sparsify(other, "tome")(images()), model(images()))


class TestRefusals:
    @pytest.mark.parametrize("kind", KINDS)
    def test_method_that_drops_tokens(self, kind: str) -> None:
        with pytest.raises(
            ValueError, match=r"evit does not work inside windows.*pool full maps.*use method 'tome' or"
        ):
            effvit.sparsify(small(kind), "evit")

    @pytest.mark.parametrize("kind", KINDS)
    def test_values_of_blocks_that_pool(self, kind: str) -> None:
        with pytest.raises(
            ValueError,
            match=r"r has values for block 2, block 4: blocks that begin a stage of a Hiera.*give 0 for them, or one r",
        ):
            effvit.sparsify(small(kind), "tome", r=[1, 1, 1, 0, 1])

    def test_rule_for_all_blocks_passes_over_those_that_pool(self) -> None:
        model = effvit.sparsify(small(), "tome", r=(2, -0.5))
        assert [stage.block for stage in model.trace_stages(images())] == [0, 1, 3, 5, 6, 8]

    def test_clusters_that_do_not_fit_the_windows_of_every_stage(self) -> None:
        with pytest.raises(ValueError, match=r"at most one for each token, got 5 x 5 for a grid of 4 x 4"):
            effvit.sparsify(small(), "expedite", cluster_at=0, num_clusters=25)

    @pytest.mark.parametrize(
        ("whole", "cluster_at", "message"),
        [
            (
                (8,),
                0,
                r"the stage that ends with block 8 .* begin behind block 8, or before block 8 with .*restore_at=8",
            ),
            (
                (5, 6),
                3,
                r"the stage that ends with block 6 .* begin behind block 6, or before block 5 with .*restore_at=5",
            ),
            (
                (5, 6),
                6,
                r"the stage that ends with block 6 .* begin behind block 6, or before block 5 with .*restore_at=5",
            ),
        ],
    )
    def test_clusters_in_a_stage_without_windows(self, whole: tuple[int, ...], cluster_at: int, message: str) -> None:
        """The stages beside it have windows, and what the message says is taken."""
        model = small("hieradet", global_att_blocks=whole)
        with pytest.raises(ValueError, match=message):
            effvit.sparsify(model, "expedite", cluster_at=cluster_at)
        effvit.sparsify(model, "expedite", cluster_at=min(cluster_at, 3), restore_at=whole[0])(images())

    def test_clusters_in_a_first_stage_without_windows(self) -> None:
        model = small("hieradet", global_att_blocks=(0, 1))
        with pytest.raises(ValueError, match=r"the stage that ends with block 1 .*; let it begin behind block 1"):
            effvit.sparsify(model, "expedite", cluster_at=1)
        effvit.sparsify(model, "expedite", cluster_at=2)(images())

    def test_clusters_without_any_windows(self) -> None:
        model = small("hieradet", global_att_blocks=tuple(range(9)))
        for cluster_at in (0, 4, 8):
            with pytest.raises(
                ValueError, match=r"the blocks of this HieraDet attend to whole maps; use method 'tome'"
            ):
                effvit.sparsify(model, "expedite", cluster_at=cluster_at)

    def test_norm_of_the_maps(self) -> None:
        with pytest.raises(ValueError, match="the maps of a Hiera differ in width, so no norm fits them; leave norm="):
            effvit.sparsify(small(), "tome").forward_intermediates(images(), norm=True)

    def test_mask_of_mask_units(self) -> None:
        model, mask = effvit.sparsify(small(), "tome"), torch.ones(1, 6, dtype=torch.bool)
        for run in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=r"a Hiera reduced by tome takes no mask.*use the dense model"):
                run(images(), mask=mask)

    def test_mask_units_dropped_in_training(self) -> None:
        model = effvit.sparsify(small(patch_drop_rate=0.5), "tome")
        model(images())
        with pytest.raises(ValueError, match=r"patch_drop_rate=0.5 leaves mask units out.*with patch_drop_rate=0"):
            model.train()(images())

    def test_videos(self) -> None:
        strides = {"patch_stride": (2, 4, 4), "patch_kernel": (3, 7, 7), "patch_padding": (1, 3, 3)}
        units = {"q_stride": (1, 2, 2), "mask_unit_size": (1, 8, 8), "sep_pos_embed": True}
        with pytest.raises(TypeError, match=r"lie in a grid of 3 dimensions, as those of videos do.*img_size=\(H, W\)"):
            effvit.sparsify(small(img_size=(4, 32, 32), **strides, **units), "tome")

    def test_sizes_that_stages_do_not_pool(self) -> None:
        with pytest.raises(
            ValueError, match=r"16 x 20 patches are no whole multiple of the 8 x 8 .* of 32 x 32 pixels"
        ):
            effvit.sparsify(small(img_size=(64, 80)), "tome")

    def test_mask_units_of_other_sides(self) -> None:
        with pytest.raises(
            ValueError, match=r"mask units of 32 tokens are not made of whole strides \(2, 2\), .*power"
        ):
            effvit.sparsify(small(mask_unit_size=(4, 8)), "expedite", cluster_at=0)

    def test_image_of_another_size(self) -> None:
        """Of 96 x 64 pixels there are as many patches, which timm takes for those of 64 x 96."""
        with pytest.raises(ValueError, match=r"expected images of 64 x 96 pixels, got 96 x 64; .*img_size=\(96, 64\)"):
            effvit.sparsify(small(), "tome")(images(1, (96, 64)))

    def test_image_that_positions_do_not_cover(self) -> None:
        with pytest.raises(
            ValueError, match=r"64 x 80 pixels are 16 x 20 patches.*repeat every 8 patches; resize or pad"
        ):
            effvit.sparsify(small("hieradet"), "tome")(images(1, (64, 80)))

    def test_subclass_and_part_of_another_class(self) -> None:
        class Mine(HieraDet):
            pass

        with pytest.raises(TypeError, match=r"Mine is a subclass of timm.*HieraDet and .*cannot be registered"):
            effvit.sparsify(Mine(**COMMON), "tome")
        model = small()
        model.blocks[4].attn = torch.nn.Identity()
        with pytest.raises(TypeError, match=r"blocks\.4\.attn is a Identity, which token reduction does not know"):
            effvit.sparsify(model, "tome")

    @pytest.mark.parametrize("kind", KINDS)
    def test_recorder_that_does_not_follow_the_stages(self, kind: str) -> None:
        with pytest.raises(TypeError, match=r"so torch.fx cannot trace it; use torch.export"):
            torch.fx.symbolic_trace(effvit.sparsify(small(kind), "tome"))


@pytest.mark.parametrize("kind", KINDS)
def test_image_of_tokens_is_drawn(kind: str) -> None:
    figure = token_figure(effvit.sparsify(small(kind), "expedite", cluster_at=5), Image.new("RGB", SIZE[::-1], "red"))
    assert figure.width > SIZE[1]
