"""TinyViT: weights under the names of official files and of MobileSAM's; merging and clusters in its windows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from data.sources import default_root
from safetensors.torch import save_file
from timm.models._features_fx import create_feature_extractor
from timm.models._input import get_model_input_config
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

import effvit
from effvit.block import rehouse
from effvit.hosts.checkpoints import convert_checkpoint
from effvit.hosts.tiny_vit import MergedAttention, cluster_biases
from effvit.hosts.windows import Among, run_blocks
from effvit.measure.costs import profile
from effvit.reducers.expedite import cluster_centres

SMALL = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
MOBILE_SAM = default_root() / "mobile_sam" / "mobile_sam.pt"
needs_mobile_sam = pytest.mark.skipif(
    not MOBILE_SAM.is_file(), reason="tools/get_data.py mobile_sam has not been run, or EFFVIT_DATA is another folder"
)
# Entry of the released files (microsoft/Cream, ChaoningZhang/MobileSAM) -> timm's name.
NAMES = {
    "patch_embed.seq.0.c.weight": "patch_embed.conv1.conv.weight",
    "patch_embed.seq.2.bn.running_var": "patch_embed.conv2.bn.running_var",
    "layers.0.blocks.0.conv3.c.weight": "stages.0.blocks.0.conv3.conv.weight",
    "layers.0.downsample.conv1.c.weight": "stages.1.downsample.conv1.conv.weight",
    "layers.1.downsample.conv2.bn.bias": "stages.2.downsample.conv2.bn.bias",
    "layers.2.blocks.1.attn.attention_biases": "stages.2.blocks.1.attn.attention_biases",
    "layers.3.blocks.0.local_conv.c.weight": "stages.3.blocks.0.local_conv.conv.weight",
    "layers.3.blocks.0.mlp.norm.weight": "stages.3.blocks.0.mlp.norm.weight",
    "norm_head.bias": "head.norm.bias",
}


def small(**settings: object) -> nn.Module:
    """A narrow TinyViT with weights, biases and statistics that all matter."""
    model = timm.create_model("tiny_vit_5m_224", **({"num_classes": 0} | SMALL | settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the released files."""
    names = {}
    for name in state:
        old = re.sub(r"\.conv\.weight$", ".c.weight", name)
        old = re.sub(r"^patch_embed\.conv(\d)", lambda m: f"patch_embed.seq.{2 * int(m[1]) - 2}", old)
        old = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", old)
        old = old.replace("stages.", "layers.").replace("head.norm.", "norm_head.").replace("head.fc.", "head.")
        names[old] = name
    assert NAMES.items() <= names.items()
    return {old: state[name] for old, name in names.items()}


class TestWeights:
    def test_file_loads_into_a_model_that_has_run(self, tmp_path: Path) -> None:
        """timm keeps the position biases of the first pass, in eval mode."""
        model, x = small(), torch.randn(1, 3, 224, 224)
        expected = model(x)
        save_file(model.state_dict(), tmp_path / "file.safetensors")
        other = timm.create_model("tiny_vit_5m_224", **SMALL, num_classes=0).eval()
        other(x)
        effvit.load_checkpoint(other, tmp_path / "file.safetensors")
        assert torch.equal(other(x), expected)

    def test_official_file_loads_with_its_classifier(self, tmp_path: Path) -> None:
        model, other = small(num_classes=3), small(num_classes=3)
        torch.nn.init.zeros_(other.head.fc.weight)
        file = released(model.state_dict()) | {"layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(49, 49)}
        torch.save({"model": file}, tmp_path / "official.pth")
        assert effvit.load_checkpoint(other, tmp_path / "official.pth") == [
            "layers.1.blocks.0.attn.attention_bias_idxs"
        ]
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(other(x), model(x))

    def test_encoder_of_mobile_sam_loads_without_its_stale_classifier(self, tmp_path: Path) -> None:
        model = small()
        file = {f"image_encoder.{name}": value for name, value in released(model.state_dict()).items()}
        rest = ("image_encoder.head.weight", "image_encoder.neck.0.weight", "prompt_encoder.x", "mask_decoder.x")
        torch.save(file | dict.fromkeys(rest, torch.zeros(3)), tmp_path / "sam.pt")
        conversion = convert_checkpoint(small(), tmp_path / "sam.pt")
        assert conversion.dropped == ["head.weight", "neck.0.weight", "prompt_encoder.x", "mask_decoder.x"]
        assert conversion.state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, conversion.state[name]) for name, value in model.state_dict().items())
        with pytest.raises(ValueError, match=r"head\.fc\.weight is missing.*num_classes"):
            convert_checkpoint(small(num_classes=3), tmp_path / "sam.pt")

    def test_biases_are_resampled_for_other_windows(self, tmp_path: Path) -> None:
        torch.save(released(small().state_dict()), tmp_path / "sam.pt")
        wide = small(window_sizes=(7, 7, 8, 7))
        effvit.load_checkpoint(wide, tmp_path / "sam.pt")
        assert wide.stages[2].blocks[0].attn.attention_biases.shape == (3, 64)

    def test_file_of_another_size_is_refused(self, tmp_path: Path) -> None:
        torch.save(released(small(num_heads=(1, 2, 6, 4)).state_dict()), tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"attention_biases has shape \(6, 196\), the model's \(3, 196\)"):
            effvit.load_checkpoint(small(), tmp_path / "other.pt")

    @needs_mobile_sam
    def test_real_file_fits_timms_model(self) -> None:
        model = timm.create_model("tiny_vit_5m_224", num_classes=0)
        conversion = convert_checkpoint(model, MOBILE_SAM)
        assert len(conversion.state) == 294
        assert conversion.dropped[:2] == ["head.weight", "head.bias"]
        assert {name.split(".")[0] for name in conversion.dropped[2:]} == {"neck", "prompt_encoder", "mask_decoder"}


SETTINGS = [
    ("tome", {"r": 12}),
    ("tome", {"r": [0, 90]}),
    ("pitome", {"keep_rate": 0.6}),
    ("expedite", {"cluster_at": 0}),
    ("expedite", {"cluster_at": 2}),
]
NOTHING = [
    ("tome", {"r": 0}),
    ("expedite", {"keep_rate": 1.0}),
    ("expedite", {"num_clusters": 196, "cluster_at": 1, "restore_at": 3}),
]


def images(batch: int = 1, height: int = 256, width: int = 192) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


class TestHost:
    """Stages of 16, 24 and 32 channels with 1, 2 and 1 blocks; windows of 7, 14 and 7."""

    @pytest.mark.parametrize(("method", "settings"), NOTHING)
    def test_nothing_reduced_is_the_host_bit_for_bit(self, method: str, settings: dict[str, Any]) -> None:
        model = small()
        assert torch.equal(effvit.sparsify(model, method, **settings)(images()), model(images()))

    @pytest.mark.parametrize(("method", "settings"), SETTINGS)
    def test_reduced_model_shares_the_weights_and_leaves_the_host_alone(
        self, method: str, settings: dict[str, Any]
    ) -> None:
        model = small()
        before = model(images())
        reduced = effvit.sparsify(model, method, **settings)
        assert reduced.state_dict().keys() == model.state_dict().keys()
        assert all(a is b for a, b in zip(reduced.parameters(), model.parameters(), strict=True))
        assert not torch.equal(reduced(images()), before)
        assert torch.equal(model(images()), before)
        again = effvit.sparsify(reduced, "tome", r=0)
        assert (again.method, again.settings["r"]) == ("tome", 0)
        assert torch.equal(again(images()), before)

    @pytest.mark.parametrize(("method", "settings"), SETTINGS)
    def test_image_alone_is_the_image_in_a_batch(self, method: str, settings: dict[str, Any]) -> None:
        model, x = effvit.sparsify(small(), method, **settings), images(2, 96, 96)
        torch.testing.assert_close(model(x)[:1], model(x[:1]))

    @pytest.mark.parametrize(("method", "settings"), SETTINGS)
    def test_maps_are_full_at_every_stage(self, method: str, settings: dict[str, Any]) -> None:
        model = effvit.sparsify(small(), method, **settings)
        maps = model.forward_intermediates(images(height=72, width=100), intermediates_only=True)
        assert [tuple(y.shape[1:]) for y in maps] == [(8, 18, 25), (16, 9, 13), (24, 5, 7), (32, 3, 4)]

    @pytest.mark.parametrize(("method", "settings"), SETTINGS)
    def test_every_parameter_learns(self, method: str, settings: dict[str, Any]) -> None:
        model = effvit.sparsify(small(num_classes=2), method, **settings).train()
        model(images(2, 224, 224)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_name_makes_a_host(self) -> None:
        with torch.device("meta"):
            assert effvit.sparsify("tiny_vit_5m_224", "tome").settings == {"r": 8, "prop_attn": True}

    def test_method_that_drops_tokens_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"evit does not work inside windows.*use method 'tome' or 'expedite'"):
            effvit.sparsify(small(), "evit")

    def test_fill_is_refused(self) -> None:
        with pytest.raises(ValueError, match="nothing to fill by recover 'zero'; leave recover out"):
            effvit.sparsify(small(), "tome", recover="zero")

    def test_costs_are_those_of_a_reduced_model(self) -> None:
        model = small(num_classes=3)
        models = {"dense": model, "tome": effvit.sparsify(model, "tome", r=[0, 98, 98])}
        record = profile(models, (3, 224, 224), 1, images=images(1, 224, 224), rounds=1)
        dense, reduced = record.models
        assert (reduced.host, reduced.method) == ("dense", "tome")
        assert reduced.settings == {"r": [0, 98, 98], "prop_attn": True}
        assert reduced.macs < dense.macs
        assert reduced.fidelity is not None
        assert reduced.fidelity.images == 1


class TestMerging:
    def test_attention_and_mlp_see_r_tokens_less_in_each_window(self) -> None:
        model = effvit.sparsify(small(), "tome", r=[0, 50, 98, 200])
        shapes: dict[str, list[int]] = {}
        for name, module in model.named_modules():
            if name.endswith(("attn.qkv", "mlp.fc1")):
                module.register_forward_hook(lambda m, args, y, name=name: shapes.update({name: list(args[0].shape)}))
        model(images())  # maps of 32 x 24, 16 x 12 and 8 x 6
        assert shapes == {
            "stages.1.blocks.0.attn.qkv": [20, 49, 16],
            "stages.1.blocks.0.mlp.fc1": [1, 768, 16],
            "stages.2.blocks.0.attn.qkv": [2, 146, 24],
            "stages.2.blocks.0.mlp.fc1": [1, 16, 12, 24],  # fewer than 2 x 146 of the padded windows
            "stages.2.blocks.1.attn.qkv": [2, 98, 24],
            "stages.2.blocks.1.mlp.fc1": [1, 16, 12, 24],
            "stages.3.blocks.0.attn.qkv": [2, 25, 32],  # half of them at most
            "stages.3.blocks.0.mlp.fc1": [1, 8, 6, 32],
        }
        model(images(height=224, width=224))  # maps of 28 x 28, 14 x 14 and 7 x 7
        assert shapes["stages.2.blocks.0.mlp.fc1"] == [1, 146, 24]
        assert shapes["stages.2.blocks.1.mlp.fc1"] == [1, 98, 24]
        assert shapes["stages.3.blocks.0.mlp.fc1"] == [1, 25, 32]

    def test_attention_to_all_tokens_in_another_order_is_timms(self) -> None:
        attention = small().stages[2].blocks[0].attn
        x, order = torch.randn(2, 196, 24), torch.stack([torch.randperm(196), torch.randperm(196)])
        shuffled = torch.stack([row[index] for row, index in zip(x, order, strict=True)])
        y = rehouse(attention, MergedAttention)(shuffled, Among(order, torch.ones(2, 196), (14, 14)))
        expected = torch.stack([row[index] for row, index in zip(attention(x), order, strict=True)])
        torch.testing.assert_close(y, expected)

    def test_merging_equal_tokens_changes_nothing(self) -> None:
        # Without position biases, pairs of equal neighbours are one key of size 2 each.
        model = small()
        block = model.stages[2].blocks[0]
        torch.nn.init.zeros_(block.attn.attention_biases)
        merging = effvit.sparsify(model, "tome", r=98).stages[2].blocks[0]
        x = torch.randn(1, 14, 7, 24).repeat_interleave(2, dim=2)
        with torch.no_grad():
            block.local_conv.conv.weight.zero_()
            block.local_conv.conv.weight[:, :, 1, 1] = 1  # which would tell neighbours apart
            torch.testing.assert_close(merging(x), block(x), rtol=1e-4, atol=1e-5)

    def test_size_of_a_token_counts_only_if_asked(self) -> None:
        model, x = small(), images()
        a, b = (effvit.sparsify(model, "tome", r=24, prop_attn=choice)(x) for choice in (True, False))
        assert not torch.equal(a, b)

    def test_token_of_size_two_is_a_key_like_two_equal_ones(self) -> None:
        attention = rehouse(small().stages[2].blocks[0].attn, MergedAttention)
        x, anchor = torch.randn(1, 3, 24), torch.tensor([[30, 0, 7]])
        twice = torch.tensor([0, 0, 1, 2])
        y = attention(x, Among(anchor, torch.tensor([[2.0, 1.0, 1.0]]), (14, 14)))
        torch.testing.assert_close(y, attention(x[:, twice], Among(anchor[:, twice], None, (14, 14)))[:, 1:])

    @pytest.mark.parametrize(("method", "scores"), [("tome", "tokens"), ("expedite", "cluster centres")])
    def test_nan_names_the_image_and_not_its_window(self, method: str, scores: str) -> None:
        model, x = effvit.sparsify(small(), method), images(3)
        x[1, :, -1, -1] = torch.nan
        with pytest.raises(ValueError, match=f"{scores} are NaN for image 1 of the batch; the tokens that entered"):
            model(x)

    @pytest.mark.parametrize("method", ["tome", "expedite"])
    def test_model_built_by_its_class_has_no_size_of_its_own(self, method: str) -> None:
        dense = TinyVit(**SMALL, num_classes=3, in_chans=1).eval()
        model = effvit.sparsify(dense, method)
        assert model(torch.randn(1, 1, 96, 64)).shape == (1, 3)
        assert model.pretrained_cfg["architecture"] == "sparsified"
        assert model.pretrained_cfg["input_size"] == (1, 224, 224)  # timm's default
        assert get_model_input_config(model)["input_size"] == (1, 224, 224)

    @pytest.mark.parametrize("method", ["expedite", "pitome"])
    def test_rate_is_fixed_with_the_windows(self, method: str) -> None:
        model = effvit.sparsify(small(), method)
        message = (
            rf"rate of a TinyVit is fixed with its windows, got 0.5; make .*sparsify\(model, '{method}', keep_rate="
        )
        with pytest.raises(ValueError, match=message):
            model.set_keep_rate(0.5)
        with pytest.raises(ValueError, match="tome has no keep rate to set; its settings are r, "):
            effvit.sparsify(small(), "tome").set_keep_rate(0.5)

    def test_what_windows_have_not_is_refused_by_name(self) -> None:
        model = effvit.sparsify(small(), "expedite")
        for call in (model.forward_tokens, model.trace_tokens):
            with pytest.raises(
                TypeError, match=r"a TinyVit gives its tokens back .*call forward_features .*trace_stages"
            ):
                call(images())

    def test_nan_names_the_block(self) -> None:
        model = effvit.sparsify(small(), "tome")
        with torch.no_grad():
            model.stages[2].blocks[1].attn.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="tome in block 2: tokens are NaN"):
            model(images())


class TestClusters:
    @pytest.mark.parametrize(
        ("settings", "grids"),
        [
            ({"cluster_at": 0}, {1: [(25, 20)], 2: [(20, 10), (20, 10)], 3: [(10, 5)]}),
            ({"cluster_at": 2}, {1: [(32, 24)], 2: [(16, 12), (20, 10)], 3: [(10, 5)]}),
            ({"cluster_at": 1, "restore_at": 2}, {1: [(32, 24)], 2: [(20, 10), (16, 12)], 3: [(8, 6)]}),
            ({"cluster_at": 1, "num_clusters": 9}, {1: [(32, 24)], 2: [(6, 3), (6, 3)], 3: [(6, 3)]}),
        ],
    )
    def test_blocks_between_see_the_map_of_the_clusters(
        self, settings: dict[str, Any], grids: dict[int, list[tuple[int, int]]]
    ) -> None:
        model = effvit.sparsify(small(), "expedite", **settings)
        seen: dict[int, list[tuple[int, int]]] = {1: [], 2: [], 3: []}
        for stage, sizes in seen.items():
            for block in model.stages[stage].blocks:
                block.register_forward_hook(lambda m, args, y, sizes=sizes: sizes.append(tuple(args[0].shape[1:3])))
        model(images())  # 5 x 4, 2 x 1 and 2 x 1 windows
        assert seen == grids

    def test_biases_of_one_cell_a_token_are_those_of_the_window(self) -> None:
        attention = small().stages[3].blocks[0].attn
        biases = cluster_biases(attention.attention_biases, 7, 7)
        assert torch.equal(biases, attention.get_attention_biases(torch.device("cpu")))

    @pytest.mark.parametrize("method", ["tome", "expedite"])
    def test_training_the_dense_model_trains_the_reduced_one(self, method: str) -> None:
        """The reduced model is made anew on the same parameters; timm keeps position biases between passes in eval."""
        dense, x = small(), images()
        settings: dict[str, Any] = {"r": [0, 5, 5, 5]} if method == "tome" else {"cluster_at": 3}
        model = effvit.sparsify(dense, method, **settings).eval()
        before = model(x)
        with torch.no_grad():
            for stage in dense.stages[1:]:
                stage.blocks[0].attn.attention_biases.add_(1 + torch.rand(1))
                stage.blocks[0].attn.attention_biases[:, 0] -= 3
        again = effvit.sparsify(dense, method, **settings).eval()(x)
        assert not torch.equal(again, before)
        assert torch.equal(model(x), again)
        assert torch.equal(effvit.sparsify(model, method, **settings).eval()(x), again)

    def test_biases_of_cells_of_two_tokens_are_every_second_one(self) -> None:
        table = torch.randn(3, 14, 14)
        biases = cluster_biases(table.flatten(1), 14, 7).unflatten(1, (7, 7)).unflatten(3, (7, 7))
        torch.testing.assert_close(biases[:, 1, 6, 4, 2], table[:, 6, 8])

    def test_biases_between_two_places_are_interpolated(self) -> None:
        biases = cluster_biases(torch.arange(49.0).unsqueeze(0), 7, 5)  # 7 * rows + columns: linear
        torch.testing.assert_close(biases[0, 0, 13], torch.tensor(1.4 * (7 * 2 + 3)))

    def test_untouched_clusters_come_back_as_the_patches(self) -> None:
        # Pairs of rows and columns of equal tokens are 7 x 7 clusters; hard assignment gives them back.
        stage = effvit.sparsify(small(), "expedite", cluster_at=1, num_clusters=49, temperature=1e4, k=1).stages[2]
        for block in stage.blocks:
            block.forward = lambda x: x
        x = torch.randn(1, 7, 7, 24).repeat_interleave(2, 1).repeat_interleave(2, 2)
        torch.testing.assert_close(run_blocks(stage.blocks, x, stage.span)[0], x)

    def test_patches_are_reconstructed_from_as_many_clusters_as_asked_for(self) -> None:
        """From one each, however soft the clusters are: what comes back are centres of the 7 x 7."""
        stage = effvit.sparsify(small(), "expedite", cluster_at=1, num_clusters=49, temperature=1e-3, k=1).stages[2]
        for block in stage.blocks:
            block.forward = lambda x: x
        x = torch.randn(1, 14, 14, 24)
        centres = cluster_centres(x, (7, 7), 5, 1e-3, 5).flatten(1, 2)
        assert (
            torch.cdist(run_blocks(stage.blocks, x, stage.span)[0].flatten(1, 2), centres).amin(-1).max() < 1e-2
        )  # they are 0.3 apart

    def test_clusters_that_are_not_square_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must be square in the square windows of a TinyVit, got 5 x 4"):
            effvit.sparsify(small(), "expedite", num_clusters=(5, 4))

    def test_too_many_clusters_for_a_window_are_refused(self) -> None:
        with pytest.raises(ValueError, match="got 9 x 9 for a grid of 7 x 7"):
            effvit.sparsify(small(), "expedite", num_clusters=81, cluster_at=1)


@pytest.mark.parametrize(("method", "settings"), [("tome", {"r": 3}), ("expedite", {"keep_rate": 0.5})])
def test_timms_feature_extractor_by_fx_gives_the_maps_of_a_plain_run(method: str, settings: dict[str, object]) -> None:
    """timm traces around the blocks of a TinyViT; its own ``forward_intermediates`` is the expectation."""
    model = effvit.sparsify(small(), method, **settings).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        extracted = create_feature_extractor(model, {f"stages.{i}": str(i) for i in (1, 2, 3)})(x)
        maps = model.forward_intermediates(x, indices=[1, 2, 3], intermediates_only=True)
    for taken, expected in zip(extracted.values(), maps, strict=True):
        assert torch.allclose(taken, expected, rtol=1e-4, atol=1e-5)
