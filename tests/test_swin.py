"""Swin and Swin V2: methods in their shifted windows, against timm's and in closed form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models._features_fx import create_feature_extractor
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn, window_partition
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

import effvit
from effvit.block import rehouse
from effvit.hosts.swin import (
    CellAttention,
    CellAttentionV2,
    GroupedWindowAttention,
    GroupedWindowAttentionV2,
    cell_bias_table,
)
from effvit.hosts.windows import Among, Cut, attending_parts, compared_in_parts
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops
from effvit.testing import assert_reads, assert_runs_on_fakes
from effvit.testing.windows import (
    assert_checkpointing_changes_nothing,
    assert_closed_form_is_the_count,
    assert_half_precision_runs,
)

# Maps of 12 x 10 and 6 x 5 tokens, in windows of 4 that are shifted by 2 in every second block, padded.
SMALL: dict[str, Any] = {
    "img_size": (48, 40),
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 3),
    "num_heads": (1, 2),
    "num_classes": 5,
    "window_size": 4,
}
NARROW_NAME: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "num_classes": 5,
}
KINDS: dict[str, type[Any]] = {"swin": SwinTransformer, "swinv2": SwinTransformerV2}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 5}),
    ("tome", {"r": [8, 8, 0, 3, 8], "prop_attn": False}),
    ("pitome", {"keep_rate": 0.7}),
    ("expedite", {"cluster_at": 0}),
    ("expedite", {"cluster_at": 1, "restore_at": 4, "num_clusters": (3, 2)}),
    ("cubistmerge", {"r_h": 1, "r_w": 2}),
]
NOTHING: list[tuple[str, dict[str, Any]]] = [("tome", {"r": 0}), ("expedite", {"num_clusters": 16, "cluster_at": 1})]


def small(kind: str = "swin", **settings: Any) -> Any:
    """A narrow Swin with weights that all matter, in eval mode."""
    torch.manual_seed(0)
    model = KINDS[kind](**(SMALL | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(batch: int = 1, size: tuple[int, int] = (48, 40)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


# GFLOPs of the backbone in the README of Expedit-Mask2Former@5d47cbe; the other two are not those of their configs.
@pytest.mark.parametrize(("block", "k", "published"), [(7, 10, 620.0), (10, 10, None), (12, 60, None), (14, 49, 769.0)])
def test_published_settings_of_expedite_are_names(block: int, k: int, published: float | None) -> None:
    name = f"expedite_swin_large_patch4_window12_384_at{block}_64"
    with torch.device("meta"):
        model = timm.create_model(name, img_size=1152)
    expected = {"cluster_at": block, "restore_at": 22, "num_clusters": 64, "k": k, "norm": "official"}
    assert expected.items() <= model.settings.items()
    macs = sum(closed_form_macs(model, (3, 1152, 1152)).values())
    assert published is None or macs / 1e9 == pytest.approx(published, abs=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "settings"), NOTHING)
def test_nothing_reduced_is_timm_bit_for_bit(kind: str, method: str, settings: dict[str, Any]) -> None:
    model, x = small(kind), images()
    own = effvit.sparsify(model, method, **settings)
    assert torch.equal(own(x), model(x))
    (final, maps), (own_final, own_maps) = model.forward_intermediates(x), own.forward_intermediates(x)
    assert torch.equal(own_final, final)
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
        assert torch.equal(pickle.loads(pickle.dumps(reduced))(x), reduced(x))

    def test_image_alone_is_the_image_in_a_batch(self, kind: str, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings).double(), images(3).double()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-10)

    def test_maps_are_full_at_every_stage_for_images_of_any_size(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        model = effvit.sparsify(small(kind, strict_img_size=False), method, **settings)
        for height, width in ((48, 40), (32, 64), (60, 28)):
            final, maps = model.forward_intermediates(images(1, (height, width)))
            small_map = (-(-height // 8), -(-width // 8))
            assert [tuple(y.shape) for y in maps] == [(1, 16, height // 4, width // 4), (1, 32, *small_map)]
            assert final.shape == (1, *small_map, 32)
            assert all(y.isfinite().all() for y in maps)

    def test_other_input_size_is_that_of_a_model_made_so(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        dense, x = small(kind), images(1, (56, 64))
        model = effvit.sparsify(dense, method, share=False, **settings)
        model.set_input_size((56, 64), window_size=4)
        dense.set_input_size((56, 64), window_size=4)
        assert torch.equal(model(x), effvit.sparsify(dense, method, **settings)(x))

    def test_checkpointing_changes_nothing_and_every_parameter_learns(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        model, x = effvit.sparsify(small(kind, drop_path_rate=0.0), method, **settings).train(), images(2)
        assert_checkpointing_changes_nothing(model, x)

    @pytest.mark.parametrize("size", [(48, 40), (28, 60)])
    def test_closed_form_agrees_with_the_count(
        self, kind: str, method: str, settings: dict[str, Any], size: tuple[int, int]
    ) -> None:
        model = effvit.sparsify(small(kind, img_size=size), method, **settings)
        assert_closed_form_is_the_count(model, size)

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
        model = effvit.sparsify(small(kind), method, **settings)
        for stage in model.trace_stages(images()):
            assert stage.labels.shape == ((12, 10) if stage.block < 2 else (6, 5))
            assert 0 <= stage.labels.min() <= stage.labels.max() < stage.tokens

    def test_timms_feature_extractor_gives_the_maps_of_a_plain_run(
        self, kind: str, method: str, settings: dict[str, Any]
    ) -> None:
        model, x = effvit.sparsify(small(kind), method, **settings), images()
        extracted = create_feature_extractor(model, {"layers.0": "0", "layers.1": "1"})(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        for taken, expected in zip(extracted.values(), maps, strict=True):
            torch.testing.assert_close(taken.permute(0, 3, 1, 2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "settings"), [SETTINGS[0], SETTINGS[3]])
def test_exported_program_gives_the_scores_of_a_plain_run(kind: str, method: str, settings: dict[str, Any]) -> None:
    model, x = effvit.sparsify(small(kind), method, **settings), images(2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 40), (28, 60)])
def test_dense_closed_form_of_v2_agrees_with_the_count(size: tuple[int, int]) -> None:
    model = small("swinv2", img_size=size)
    assert sum(closed_form_macs(model, (3, *size)).values()) == count_flops(model, (3, *size), strict=True).total


class TestParts:
    """Parts of a window of 4 on a map of 12 x 10, shifted by 2 and padded."""

    CUT = Cut((4, 4), (12, 10), (2, 2))

    def test_parts_that_attend_to_each_other_are_those_of_timms_mask(self) -> None:
        block = small().layers[0].blocks[1]
        assert block.shift_size == (2, 2)
        parts = self.CUT.parts(torch.zeros(1)) % 4  # without the bit of the padding
        mask = block.get_attn_mask(torch.zeros(1, 12, 12, 1))
        assert torch.equal(mask == 0, parts[:, :, None] == parts[:, None, :])

    def test_padding_is_told_apart(self) -> None:
        inside = self.CUT.windows(torch.ones(1, 12, 10, 1)).squeeze(-1)
        assert torch.equal(self.CUT.parts(inside) >= 4, inside == 0)

    def test_tokens_of_two_parts_are_never_merged_while_there_are_partners(self) -> None:
        model = effvit.sparsify(small(), "tome", r=8)
        block, x = model.layers[0].blocks[1], torch.randn(1, 12, 10, 16)
        cut, windows, features = block.compared(x)
        groups = block.reducer.group(features, windows, cut.area)
        parts = cut.parts(x)
        merged = parts.gather(1, groups.matching.source)
        assert torch.equal(merged, parts.gather(1, groups.matching.destination))

    def test_codes_order_all_pairs_of_one_part_before_those_of_two(self) -> None:
        features = compared_in_parts(self.CUT.windows(torch.randn(1, 12, 10, 16)), self.CUT)
        features = torch.nn.functional.normalize(features, dim=-1)
        parts = self.CUT.parts(features)
        same = parts[:, :, None] == parts[:, None, :]
        cosine = features @ features.transpose(1, 2)
        assert cosine[same].min() > cosine[~same].max()


@pytest.mark.parametrize(("kind", "grouped"), [("swin", GroupedWindowAttention), ("swinv2", GroupedWindowAttentionV2)])
def test_attention_to_all_tokens_in_another_order_is_timms(kind: str, grouped: type[Any]) -> None:
    block = small(kind).layers[0].blocks[1]
    cut = Cut((4, 4), (12, 12), (2, 2))
    x = cut.windows(torch.randn(1, 12, 12, 16))
    order = torch.stack([torch.randperm(16) for _ in range(9)])

    def taken(y: Tensor) -> Tensor:
        return y.gather(1, order.unsqueeze(-1).expand_as(y))

    class Order:
        anchor = order

    among = Among(order, torch.ones(9, 16), (4, 4), attending_parts(Order, cut))  # type: ignore[arg-type]
    own = rehouse(block.attn, grouped)(taken(x), among)
    torch.testing.assert_close(own, taken(block.attn(x, mask=block.get_attn_mask(torch.zeros(1, 12, 12, 1)))))


def test_cells_of_one_token_have_the_biases_of_the_window() -> None:
    attn = small().layers[0].blocks[0].attn
    cells = rehouse(attn, CellAttention)
    cells.cells = (4, 4)
    torch.testing.assert_close(cells._get_rel_pos_bias(), attn._get_rel_pos_bias())


def test_biases_of_cells_of_two_tokens_are_every_second_one() -> None:
    table = torch.randn(7 * 7, 3)
    biases = cell_bias_table(table, (4, 4), (2, 2)).unflatten(0, (3, 3))
    torch.testing.assert_close(biases, table.unflatten(0, (7, 7))[1:6:2, 1:6:2])


def test_cells_of_two_tokens_have_the_coordinates_of_every_second_one_in_v2() -> None:
    attn = small("swinv2").layers[0].blocks[0].attn
    cells = rehouse(attn, CellAttentionV2)
    cells.shrink((2, 2))
    torch.testing.assert_close(cells.relative_coords_table, attn.relative_coords_table[:, 1:6:2, 1:6:2])
    assert attn.window_size == (4, 4)


def test_blocks_between_see_the_map_of_the_cells_with_its_own_shift() -> None:
    model = effvit.sparsify(small(), "expedite", cluster_at=1, restore_at=4, num_clusters=(3, 2))
    seen = []
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_hook(
                lambda m, args, y: seen.append((tuple(args[0].shape[1:3]), m.window_size, m.shift_size))
            )
    model(images())
    assert seen == [
        ((12, 10), (4, 4), (0, 0)),
        ((9, 6), (3, 2), (1, 1)),
        ((6, 4), (3, 2), (0, 0)),
        ((6, 4), (3, 2), (1, 1)),
        ((6, 5), (4, 4), (0, 0)),
    ]


def test_size_that_does_not_fit_leaves_the_model_as_it_is() -> None:
    # On Swin V2: timm resizes the table of Swin's biases in a way that torch warns of.
    model, x = effvit.sparsify(small("swinv2"), "expedite", num_clusters=9, cluster_at=0), images()
    before = model(x)
    with pytest.raises(ValueError, match="got 3 x 3 for a grid of 2 x 2"):
        model.set_input_size((48, 40), window_size=2)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_reduced_model_casts_the_dense_one_whole(kind: str) -> None:
    """Weights are shared, and so are the tables of whole windows that smaller grids have their own in place of."""
    dense, x = small(kind), images().double()
    expected = small(kind).double()(x)
    model = effvit.sparsify(dense, "expedite", cluster_at=0)
    model.double()
    assert torch.equal(dense(x), expected)
    again = effvit.sparsify(model, "tome", r=0)
    assert torch.equal(again(x), expected)
    assert not [name for name, _ in again.named_buffers() if "full_" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_model_restored_behind_to_empty_is_whole_under_another_method_too(
    kind: str, method: str, settings: dict[str, Any]
) -> None:
    """Memory of ``to_empty`` holds anything, and no file holds masks and tables: those of whole windows as well."""
    dense, x = small(kind), images()
    with torch.device("meta"):
        model = effvit.sparsify(KINDS[kind](**SMALL).eval(), method, **settings)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(float("nan") if buffer.is_floating_point() else 0)
    model.init_weights()
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(x), effvit.sparsify(dense, method, **settings)(x))
    assert torch.equal(effvit.sparsify(model, "tome", r=0)(x), dense(x))
    assert torch.equal(effvit.sparsify(model, "tome", r=3)(x), effvit.sparsify(dense, "tome", r=3)(x))


@pytest.mark.parametrize(("method", "settings"), [SETTINGS[0], SETTINGS[2]])
def test_tables_of_v2_are_no_views_that_a_cast_would_tear(method: str, settings: dict[str, Any]) -> None:
    """torch.export meets the tensor behind a view, which a cast in place leaves in its old dtype."""
    model = effvit.sparsify(small("swinv2"), method, **settings)
    assert not [name for name, buffer in model.named_buffers() if buffer._is_view()]
    model.set_input_size((56, 64), window_size=3)
    assert not [name for name, buffer in model.named_buffers() if buffer._is_view()]
    assert model.double()(images(1, (56, 64)).double()).isfinite().all()


def test_windows_are_those_of_timm_on_a_map_that_they_cover() -> None:
    x = torch.randn(2, 14, 14, 3)
    assert torch.equal(Cut((7, 7), (14, 14)).windows(x), window_partition(x, (7, 7)).flatten(1, 2))


@pytest.mark.parametrize("host", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_names_have_the_tags_of_the_host(host: str) -> None:
    narrow = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 64}
    model = timm.create_model(f"tome_{host}", r=6, **narrow).eval()
    tags = {name.partition(".")[2] for name in timm.models.get_arch_pretrained_cfgs(f"tome_{host}")}
    assert tags == {name.partition(".")[2] for name in timm.models.get_arch_pretrained_cfgs(host)}
    maps = timm.create_model(f"tome_{host}", r=6, features_only=True, **narrow).eval()(images(1, (64, 64)))
    assert [tuple(y.shape[1:]) for y in maps] == [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]
    assert model.settings == {"r": 6, "prop_attn": True}
    assert "expedite_" + host in effvit.list_models("expedite_swin*")


@pytest.mark.parametrize(("method", "settings"), [("tome", {"r": 5}), ("expedite", {"cluster_at": 0})])
def test_folder_of_a_resized_model_holds_its_windows(tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    """timm's record of a resize has ``window_size``, as Expedite's settings have: the host's is told beside them."""
    dense = timm.create_model("swinv2_tiny_window8_256", **NARROW_NAME)
    model = effvit.sparsify(dense, method, **settings).eval()
    name = model.pretrained_cfg["architecture"]
    model.set_input_size((128, 128))
    windows = [stage.blocks[0].window_size for stage in effvit.sparsify(model, "tome").layers]
    assert windows == [(16, 16), (16, 16)]
    save_for_hf(model, str(tmp_path))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.settings == model.settings
    assert again.pretrained_cfg["architecture"] == (name if method == "tome" else "sparsified")
    x = images(1, (128, 128))
    assert torch.equal(again(x), model(x))


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of microsoft/Swin-Transformer: stages end with their downsampling, tables lie beside."""
    names = {name: name.replace("layers.1.downsample", "layers.0.downsample") for name in state}
    file = {names[name].replace("head.fc.", "head."): value for name, value in state.items()}
    return file | {
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_official_file_loads(kind: str, reduced: bool, tmp_path: Path) -> None:
    settings = {"window_size": (4, 2)} if kind == "swin" else {}
    model, other = small(kind, **settings), KINDS[kind](**(SMALL | settings)).eval()
    torch.save({"model": published(model.state_dict())}, tmp_path / "official.pth")
    target = effvit.sparsify(other, "expedite", cluster_at=0, num_clusters=(2, 1)) if reduced else other
    dropped = effvit.load_checkpoint(target, tmp_path / "official.pth")
    assert sorted(dropped) == ["layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask"]
    assert torch.equal(other(images()), model(images()))


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # in timm's resize
def test_tables_of_other_windows_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    model, other = small(), small(window_size=3)
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    effvit.load_checkpoint(other, tmp_path / "file.safetensors")
    expected = checkpoint_filter_fn(model.state_dict(), other)
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    assert other.layers[0].blocks[0].attn.relative_position_bias_table.shape == (25, 1)


class TestRefusals:
    @pytest.mark.parametrize("kind", KINDS)
    def test_method_that_drops_tokens(self, kind: str) -> None:
        with pytest.raises(ValueError, match=r"hot does not work inside windows.*use method 'tome' or 'expedite'"):
            effvit.sparsify(small(kind), "hot")

    def test_subclass_is_not_told_to_register(self) -> None:
        """``register_host`` takes classes whose blocks lie in a row."""

        class Mine(SwinTransformer):
            pass

        message = r"Mine is a subclass of timm.*SwinTransformer and .*cannot be registered: create a timm.*SwinTransf"
        with pytest.raises(TypeError, match=message):
            effvit.sparsify(Mine(**SMALL), "tome")
        with pytest.raises(TypeError, match=message):
            effvit.register_host(Mine)
        with pytest.raises(TypeError, match="SwinTransformer has windows and needs no registration: give its models"):
            effvit.register_host(SwinTransformer)

    def test_image_of_another_size(self) -> None:
        with pytest.raises(ValueError, match=r"expected images of 48 x 40 pixels.*set_input_size"):
            effvit.sparsify(small(), "tome")(images(1, (40, 48)))

    def test_variant_of_v2(self) -> None:
        model = timm.create_model(
            "swinv2_cr_tiny_224", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), img_size=32
        )
        with pytest.raises(
            TypeError,
            match=r"V2Cr: a network with dropout inside makes its position biases.*create a swinv2_ model without",
        ):
            effvit.sparsify(model, "tome")
