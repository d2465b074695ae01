"""Native resolution: ``NaFlexVit`` on images and on patches of images with grids of their own.

Where nothing is reduced the oracle is timm's ``NaFlexVit`` on the same batch, else the image alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from hosts import released
from pages import example
from safetensors.torch import save_file
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import patchify_image
from timm.models import save_for_hf
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

import effvit
from effvit.hosts.naflex import BATCHING, ReducedNaFlex
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers import METHODS
from effvit.testing import assert_law, make_host
from effvit.testing.laws import copies_through_files
from effvit.testing.models import perturb
from effvit.testing.reads import assert_reads

Batch = dict[str, Tensor]

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
TOKEN: dict[str, Any] = {"class_token": True, "global_pool": "token"}
KINDS: dict[str, dict[str, Any]] = {
    "token": TOKEN | {"reg_tokens": 2, "final_norm": False, "pos_embed_interp_mode": "bilinear"},
    "average": {"reg_tokens": 4, "global_pool": "avg", "fc_norm": True, "init_values": 0.1},
    "largest": {"reg_tokens": 1, "global_pool": "avgmax"},
    "attention": {"global_pool": "map"},
    "factorized": {
        "global_pool": "avg",
        "fc_norm": True,
        "pos_embed": "factorized",
        "pos_embed_ar_preserving": True,
    },
    "sampled": TOKEN | {"pos_embed_use_grid_sample": True},
    "axial": TOKEN | {"pos_embed": "none", "rope_type": "axial"},
    "mixed": TOKEN | {"pos_embed": "none", "rope_type": "mixed"},
    "dinov3": TOKEN | {"pos_embed": "none", "rope_type": "dinov3", "rope_rotate_half": True, "reg_tokens": 1},
    "grouped_keys": TOKEN | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
}
GRIDS = ((5, 6), (3, 4), (5, 6), (7, 2))  # two images of one grid among others
PADDED = [name for name in METHODS if name in ("evit", "tome", "ats", "dymu", "algm")]


def make(kind: str) -> NaFlexVit:
    torch.manual_seed(0)
    model = NaFlexVit(pos_embed_grid_size=(4, 5), **(SMALL | KINDS[kind])).eval()
    perturb(model)
    return model


def fits(method: str, kind: str) -> bool:
    return KINDS[kind].get("class_token", False) or not METHODS[method].needs_class_token


def reduce(method: str, kind: str) -> ReducedNaFlex:
    """The small host under the method, in float64, where no decision is a matter of rounding."""
    model = effvit.sparsify(make(kind).double(), method, **METHODS[method].example())
    assert isinstance(model, ReducedNaFlex)
    return model


def pixels(*grids: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4 * rows, 4 * columns, generator=generator) for rows, columns in grids]


def collated(images: list[Tensor], slots: int | None = None) -> Batch:
    """What timm's collator makes of images, padded to so many patches, or to those of the largest."""
    cut = [dict(zip(("patches", "patch_coord", "patch_valid"), patchify_image(i, (4, 4)), strict=True)) for i in images]
    longest = slots or max(len(image["patches"]) for image in cut)
    batch, _ = NaFlexCollator(max_seq_len=longest)([(image, 0) for image in cut])
    return {name: batch[name] for name in ("patches", "patch_coord", "patch_valid")}


def double(batch: Batch) -> Batch:
    return batch | {"patches": batch["patches"].double()}


def own(batch: Batch, image: int) -> Batch:
    """One image of the batch without its padding."""
    valid = batch["patch_valid"][image]
    return {name: part[image : image + 1, valid] for name, part in batch.items()}


PAIRS = [(method, kind) for method in METHODS for kind in KINDS if fits(method, kind)]
FEW = {(method, kind) for method, kind in PAIRS if kind == ("token", "average")[METHODS[method].keeps_every_patch]}
FEW |= {("tome", kind) for kind in KINDS} | {("ats", "mixed"), ("evit", "dinov3"), ("dymu", "attention")}


@pytest.mark.parametrize(("method", "kind"), released(PAIRS, FEW))
class TestNothingReduced:
    @torch.no_grad()
    def test_images_give_what_timm_gives_bit_for_bit(self, method: str, kind: str) -> None:
        dense = make(kind)
        model = effvit.sparsify(dense, method, **METHODS[method].off())
        for x in (torch.randn(2, 3, 20, 24), torch.randn(2, 3, 16, 20)):
            assert torch.equal(model(x), dense(x))
            final, maps = model.forward_intermediates(x)
            expected, of_timm = dense.forward_intermediates(x)
            assert torch.equal(final, expected)
            assert all(torch.equal(a, b) for a, b in zip(maps, of_timm, strict=True))

    @torch.no_grad()
    def test_patches_of_images_of_several_sizes_give_what_timm_gives_bit_for_bit(self, method: str, kind: str) -> None:
        """Padding apart, which timm computes and nobody reads."""
        dense = make(kind)
        model = effvit.sparsify(dense, method, **METHODS[method].off())
        for batch in (collated(pixels(*GRIDS), 33), collated(pixels((5, 6), (5, 6))), collated(pixels((4, 5)))):
            valid = batch["patch_valid"]
            prefix = model.num_prefix_tokens
            assert torch.equal(model(batch), dense(batch))
            features, expected = model.forward_features(**batch), dense.forward_features(**batch)
            assert torch.equal(features["patch_valid"], valid)
            assert torch.equal(features["patches"][:, prefix:][valid], expected["patches"][:, prefix:][valid])
            assert torch.equal(features["patches"][:, :prefix], expected["patches"][:, :prefix])
            listed = model.forward_intermediates(batch, output_fmt="NLC", return_prefix_tokens=True, output_dict=True)
            of_timm = dense.forward_intermediates(batch, output_fmt="NLC", return_prefix_tokens=True, output_dict=True)
            assert listed.keys() == of_timm.keys()
            assert torch.equal(listed["patch_valid"], valid)
            for a, b in zip(listed["image_intermediates"], of_timm["image_intermediates"], strict=True):
                assert torch.equal(a[valid], b[valid])
            prefixes = zip(
                listed.get("image_intermediates_prefix", []),
                of_timm.get("image_intermediates_prefix", []),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in prefixes)


@pytest.mark.parametrize(("method", "kind"), released(PAIRS, FEW))
class TestOneImageAmongOthers:
    @torch.no_grad()
    def test_scores_and_features_are_those_of_the_image_alone(self, method: str, kind: str) -> None:
        """In every way to run a batch, those of the same tokens."""
        model = reduce(method, kind)
        batch = double(collated(pixels(*GRIDS), 33))
        each = [own(batch, image) for image in range(len(GRIDS))]
        alone = torch.cat([model(image) for image in each])
        counts = [int(model.forward_tokens(image).tokens.counts()) for image in each]
        assert METHODS[method].soft or any(
            count < rows * columns for count, (rows, columns) in zip(counts, GRIDS, strict=True)
        )
        for way in BATCHING:
            model.batching = way
            if way in ("padded", "packed") and method not in PADDED:
                with pytest.raises(ValueError, match=rf"{method} takes no padding, .* cannot be {way} .* 'grouped'"):
                    model(batch)
                continue
            assert torch.allclose(model(batch), alone, rtol=0, atol=1e-11)
            assert torch.allclose(model.forward_head(**model.forward_features(batch)), alone, rtol=0, atol=1e-11)
            assert model.forward_tokens(batch).tokens.counts().tolist() == counts

    @torch.no_grad()
    def test_maps_are_those_of_the_image_alone(self, method: str, kind: str) -> None:
        model = reduce(method, kind)
        batch = double(collated(pixels(*GRIDS), 33))
        for way in ("grouped", "auto", "packed")[: 3 if method in PADDED else 2]:
            model.batching = way
            _, together = model.forward_intermediates(batch, indices=2, output_fmt="NLC")
            for image, grid in enumerate(GRIDS):
                _, maps = model.forward_intermediates(own(batch, image), indices=2)
                valid = batch["patch_valid"][image]
                for rows, of_one in zip(together, maps, strict=True):
                    assert of_one.shape[2:] == grid
                    assert torch.allclose(rows[image][valid], of_one[0].flatten(1).T, rtol=0, atol=1e-11)

    @torch.no_grad()
    def test_traced_tokens_carry_the_patches_that_they_carry_alone(self, method: str, kind: str) -> None:
        model = reduce(method, kind)
        batch = double(collated(pixels(*GRIDS), 33))
        traced = model.trace_tokens(batch)
        assert len(traced) == len(model.blocks)
        x, tokens = model.forward_tokens(batch)
        assert tokens.grid == (7, 6)
        assert x.shape[1] == model.num_prefix_tokens + tokens.width
        if not METHODS[method].soft:
            assert_law(tokens)
        for image, (rows, columns) in enumerate(GRIDS):
            of_one = model.forward_tokens(own(batch, image)).tokens
            labels = tokens.labels()[image, :rows, :columns]
            assert (labels >= 0).sum() == (of_one.labels() >= 0).sum()
            groups = {int(a): int(b) for a, b in zip(labels.flatten(), of_one.labels().flatten(), strict=True)}
            renamed = torch.tensor([groups[int(label)] for label in labels.flatten()])
            assert torch.equal(renamed, of_one.labels().flatten())

    @torch.no_grad()
    def test_what_is_in_the_padding_changes_nothing(self, method: str, kind: str) -> None:
        """Not even NaN and coordinates of no patch, in which timm's own scores would be NaN."""
        model = reduce(method, kind)
        batch = double(collated(pixels(*GRIDS), 33))
        expected = model(batch)
        padding = ~batch["patch_valid"]
        batch["patches"][padding] = float("nan")
        batch["patch_coord"][padding] = 99
        assert torch.equal(model(batch), expected)

    @torch.no_grad()
    def test_slots_may_be_in_any_order_since_positions_go_by_coordinate(self, method: str, kind: str) -> None:
        model = reduce(method, kind)
        batch = double(collated(pixels(*GRIDS), 33))
        order = torch.stack([torch.randperm(33, generator=torch.Generator().manual_seed(i)) for i in range(4)])
        mixed = {name: part[torch.arange(4).unsqueeze(1), order] for name, part in batch.items()}
        assert torch.equal(model(mixed), model(batch))
        expected = model.forward_intermediates(batch, indices=1, output_fmt="NLC", output_dict=True)
        found = model.forward_intermediates(mixed, indices=1, output_fmt="NLC", output_dict=True)
        assert torch.equal(found["patch_valid"], mixed["patch_valid"])
        rows = expected["image_intermediates"][0][torch.arange(4).unsqueeze(1), order]
        valid = mixed["patch_valid"]
        assert torch.equal(found["image_intermediates"][0][valid], rows[valid])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_an_image_gives_what_its_patches_give(method: str) -> None:
    model = reduce(method, "token")
    images = torch.stack(pixels((4, 6), (4, 6))).double()
    batch = double(collated(list(images.float())))
    assert torch.allclose(model(images), model(batch), rtol=0, atol=1e-11)
    for of_image, of_patches in zip(
        model.forward_intermediates(images, intermediates_only=True),
        model.forward_intermediates(batch, intermediates_only=True),
        strict=True,
    ):
        assert of_image.shape == (2, 16, 4, 6)
        assert torch.allclose(of_image, of_patches, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("way", BATCHING)
def test_windows_of_wide_and_of_tall_images_share_a_batch(way: str) -> None:
    """Their common canvas has 42 x 42 cells, more windows than an image has tokens: each is merged as if alone."""
    model = effvit.sparsify(make("token").double(), "algm", threshold=0.1)
    assert isinstance(model, ReducedNaFlex)
    model.batching = way
    batch = double(collated(pixels((6, 42), (42, 6))))
    alone = torch.cat([model(own(batch, image)) for image in range(2)])
    assert torch.allclose(model(batch), alone, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.variable_length])
def test_counts_follow_from_the_patches_of_each_image(method: str) -> None:
    """From the settings on its own grid, as for a batch of such images; ToMe takes r of it, at most half."""
    model = reduce(method, "token")
    batch = double(collated(pixels(*GRIDS), 33))
    for way in BATCHING if method in PADDED else ("grouped", "auto"):
        model.batching = way
        counts = torch.stack([tokens.counts() for _, tokens in model.trace_tokens(batch)], dim=1)
        assert counts.tolist() == [model.token_counts(grid) for grid in GRIDS]


@torch.no_grad()
def test_sampling_points_of_ats_are_a_share_of_the_patches_of_each_image() -> None:
    model = effvit.sparsify(make("token").double(), "ats", keep_rate=0.25, reduce_at=(1,))
    batch = double(collated(pixels((6, 8), (2, 4)), 48))
    for way in BATCHING:
        model.batching = way
        counts = model.forward_tokens(batch).tokens.counts()
        assert (counts <= torch.tensor([12, 2])).all()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"fuse_token": False}, {"num_tokens": 13}])
def test_evit_keeps_its_number_of_an_image_that_has_as_many(settings: dict[str, Any]) -> None:
    model = effvit.sparsify(make("token").double(), "evit", reduce_at=(1, 2), **settings)
    batch = double(collated(pixels(*GRIDS), 33))
    expected = torch.cat([model(own(batch, image)) for image in range(4)])
    for way in BATCHING:
        model.batching = way
        assert torch.allclose(model(batch), expected, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tome", {"r": 4, "prop_attn": False}),
        ("dymu", {"thresholds": (0.5,) * 4, "ragged": "packed"}),
        ("algm", {"threshold": 0.3, "ragged": "packed"}),
        ("ats", {"drop_tokens": False, "reduce_at": (1, 2)}),
        ("ats", {"grid": "midpoint", "keep_rate": 0.4, "ragged": "packed"}),
        ("ats", {"compat": True, "keep_rate": 0.4}),
    ],
)
def test_settings_of_methods_hold_in_every_way_that_they_can_run(method: str, settings: dict[str, Any]) -> None:
    model = effvit.sparsify(make("token").double(), method, **settings)
    if "compat" in settings:  # an image depends on those of its own grid then, so each has one of its own
        batch = double(collated(pixels((5, 6), (3, 4), (7, 2)), 33))
        assert torch.allclose(model(batch)[:1], model(own(batch, 0)), rtol=0, atol=1e-11)
        model.batching = "padded"
        with pytest.raises(ValueError, match="ats takes no padding"):
            model(batch)
        return
    batch = double(collated(pixels(*GRIDS), 33))
    expected = torch.cat([model(own(batch, image)) for image in range(4)])
    for way in BATCHING:
        model.batching = way
        assert torch.allclose(model(batch), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", ["grouped", "padded", "packed"])
@pytest.mark.parametrize("method", PADDED)
def test_gradients_are_those_of_the_images_alone_with_checkpointing_too(method: str, way: str) -> None:
    model = reduce(method, "axial").train()  # timm resamples learned positions in float32, in float64 models too
    batch = double(collated(pixels(*GRIDS), 33))

    def gradients(run: Callable[[], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        run().square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(lambda: torch.cat([model(own(batch, image)) for image in range(4)]))
    model.batching = way
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        found = gradients(lambda: model(batch))
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-8, atol=1e-10), name


@torch.no_grad()
def test_device_is_read_once_for_the_batch() -> None:
    """Where it has no learned positions, for which timm reads the grids again."""
    batch = collated(pixels(*GRIDS), 33)
    for method in ("evit", "tome", "hot", "gtp"):
        model = effvit.sparsify(make("axial"), method, **METHODS[method].example())
        for way in BATCHING if method in PADDED else ("grouped",):
            model.batching = way
            assert_reads(lambda model=model: model(batch), 1)


@torch.no_grad()
def test_a_training_model_drops_patches_of_each_image() -> None:
    """timm's patch dropout would drop padding too, and leave an image more of its patches or fewer."""
    model = NaFlexVit(pos_embed_grid_size=(4, 5), patch_drop_rate=0.5, **(SMALL | TOKEN)).train()
    model = effvit.sparsify(model, "evit", keep_rate=1.0)
    counts = model.forward_tokens(collated(pixels(*GRIDS), 33)).tokens.counts()
    assert counts.tolist() == [15, 6, 15, 7]


class TestBadBatch:
    """Each is refused before the first block."""

    @pytest.fixture
    def model(self) -> ReducedNaFlex:
        model = effvit.sparsify(make("token"), "tome", r=2)
        assert isinstance(model, ReducedNaFlex)

        def stop(*_: object) -> None:
            raise AssertionError("the first block ran")

        model.blocks[0].register_forward_pre_hook(stop)
        return model

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("patches", lambda y: None, r"needs patches, patch_coord, patch_valid, got no patches; take what"),
            ("patch_coord", lambda y: None, r"got no patch_coord; take"),
            ("patch_valid", lambda y: None, r"got no patch_valid; take"),
            ("patches", lambda y: y[..., :-1], r"must be \(B, N, 48\), 4 x 4 pixels of 3 channels .* cut the images"),
            ("patches", lambda y: y[:0], r"at least one image and slot, got \(0, 33, 48\); give images"),
            ("patches", lambda y: y[0], r"patches must be \(B, N, 48\) or .* got \(33, 48\); give images"),
            ("patches", lambda y: y.unflatten(2, (2, 8, 3)), r"of 4 x 4 pixels, got 2 x 8; cut them so"),
            ("patches", lambda y: y.unflatten(2, (4, 6, 2)), r"must have 3 channels, got \(4, 33, 4, 6, 2\); check"),
            (
                "patch_coord",
                lambda y: y[:, :-1],
                r"whole numbers \(4, 33, 2\), .* got \(4, 32, 2\) of torch.int64; take",
            ),
            ("patch_coord", lambda y: y.float(), r"must hold whole numbers .* of torch.float32; take"),
            ("patch_valid", lambda y: y[:, :-1], r"a mask \(4, 33\) of torch.bool.* got \(4, 32\) of torch.bool; take"),
            ("patch_valid", lambda y: y.long(), r"False for padding, got \(4, 33\) of torch.int64; take"),
            (
                "patch_valid",
                lambda y: y & (torch.arange(4) != 1)[:, None],
                r"image 1 has no valid patch .* leave images",
            ),
            ("patch_coord", lambda y: y - 1, r"rows and columns from 0, got -1 in image 0: it lies outside .* count"),
            (
                "patch_coord",
                lambda y: y.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor([9, 0])),
                r"the 12 valid patches of image 1 span 10 x 4 cells: one lies outside of the grid, .* give all patches",
            ),
            (
                "patch_valid",
                lambda y: y & (torch.arange(33) != 2),
                r"the 29 valid patches of image 0 span 5 x 6 cells: .* is missing",
            ),
        ],
    )
    def test_message_names_rule_value_and_remedy(
        self, model: ReducedNaFlex, part: str, change: Callable[[Tensor], Tensor | None], message: str
    ) -> None:
        batch: dict[str, Any] = collated(pixels(*GRIDS), 33)
        batch[part] = change(batch[part])
        with pytest.raises(ValueError, match=message):
            model(batch)

    def test_parts_that_are_no_tensors_or_of_another_dtype(self, model: ReducedNaFlex) -> None:
        batch: dict[str, Any] = collated(pixels(*GRIDS), 33)
        with pytest.raises(TypeError, match=r"patch_coord must be a tensor, got list; take what"):
            model(batch | {"patch_coord": batch["patch_coord"].tolist()})
        with pytest.raises(TypeError, match=r"expected patches of dtype torch.float32, .* got torch.float64; convert"):
            model(double(batch))

    def test_attention_masks(self, model: ReducedNaFlex) -> None:
        batch = collated(pixels((2, 3)))
        mask = torch.zeros(1, 1, 7, 7)
        with pytest.raises(ValueError, match=r"takes no attn_mask.* leave it out: padding is masked by patch_valid"):
            model(batch | {"attn_mask": mask})
        with pytest.raises(ValueError, match=r"reduced by tome takes no attn_mask"):
            model(**{"x": batch, "attn_mask": mask})

    def test_images_of_another_kind(self, model: ReducedNaFlex) -> None:
        with pytest.raises(ValueError, match=r"image size 18 x 20 is not a multiple of the patch size 4 x 4"):
            model(torch.zeros(1, 3, 18, 20))

    def test_an_embedding_that_convolves_images(self) -> None:
        dense = NaFlexVit(pos_embed_grid_size=(4, 5), embed_proj_type="conv", **(SMALL | TOKEN)).eval()
        model = effvit.sparsify(dense, "tome", r=0)
        x = torch.randn(1, 3, 16, 20)
        assert torch.equal(model(x), dense(x))
        with pytest.raises(ValueError, match=r"takes no batch of patches; create it with embed_proj_type='linear'"):
            model(collated(pixels((4, 5))))

    def test_maps_of_images_with_grids_of_their_own(self, model: ReducedNaFlex) -> None:
        batch = collated(pixels(*GRIDS), 33)
        with pytest.raises(ValueError, match=r"3 different grids, 5 x 6, 3 x 4, 7 x 2, .* use output_fmt='NLC'"):
            model.forward_intermediates(batch)
        model.blocks[0]._forward_pre_hooks.clear()
        with pytest.raises(ValueError, match=r"memory is for full maps, .* 3 different grids .* leave memory out"):
            model.forward_tokens(batch, memory=True)
        with pytest.raises(ValueError, match=r"grids of their own, of 30, 12, 30, 14 patches, .* give images of one"):
            effvit.to_map(*model.forward_tokens(batch), "nearest")
        with pytest.raises(ValueError, match=r"memory is for full maps"):
            model.trace_tokens(batch, memory=True)

    def test_images_that_are_no_tensor(self, model: ReducedNaFlex) -> None:
        with pytest.raises(TypeError, match=r"expected images \(B, 3, H, W\) as a tensor, got list"):
            model([torch.zeros(3, 16, 20)])

    def test_a_way_to_run_a_batch_that_there_is_not(self) -> None:
        model = effvit.sparsify(make("token"), "tome", r=1)
        model.batching = "fast"
        with pytest.raises(ValueError, match="batching must be one of auto, grouped, padded, packed, got 'fast'"):
            model(collated(pixels(*GRIDS)))

    def test_sizes_of_patches_and_images(self, model: ReducedNaFlex) -> None:
        with pytest.raises(ValueError, match=r"stay 4 x 4, got patch_size 8 x 8; create it with enable_patch_interp"):
            model.set_input_size(patch_size=8)
        model.set_input_size((12, 20))
        assert model.patch_embed.grid_size == (3, 5)
        assert model.token_counts()[0] == 13


@torch.no_grad()
@pytest.mark.parametrize("method", [None, "tome"])
def test_file_of_a_plain_vit_loads_into_the_host_that_computes_the_same(method: str | None, tmp_path: Path) -> None:
    """timm makes the same model as a NaFlexVit where ``use_naflex`` is given, and reads its weights by its filter."""
    small: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    plain = timm.create_model("vit_base_patch16_gap_224", **small).eval()
    perturb(plain)
    save_file(plain.state_dict(), tmp_path / "file.safetensors")
    host = timm.create_model("vit_base_patch16_gap_224", use_naflex=True, **small).eval()
    assert isinstance(host, NaFlexVit)
    target = host if method is None else effvit.sparsify(host, method, r=3)
    assert effvit.load_checkpoint(target, tmp_path / "file.safetensors") == []
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(host(x), plain(x))


def test_patches_of_another_size_are_embedded_as_timm_does() -> None:
    dense = NaFlexVit(pos_embed_grid_size=(4, 5), enable_patch_interpolator=True, **(SMALL | TOKEN)).eval()
    batch = collated(pixels((4, 6), (2, 3)))
    batch["patches"] = torch.randn(2, 24, 6, 6, 3)
    assert torch.equal(effvit.sparsify(dense, "tome", r=0)(batch), dense(batch))
    assert effvit.sparsify(dense, "tome", r=2)(batch).isfinite().all()


class TestTimmNames:
    SHORT: ClassVar[dict[str, Any]] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}

    @torch.no_grad()
    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
    )
    def test_use_naflex_gives_timms_naflex_model_of_the_name(self, name: str) -> None:
        torch.manual_seed(0)
        dense = timm.create_model(name, use_naflex=True, img_size=64, **self.SHORT).eval()
        model = timm.create_model(f"tome_{name}", use_naflex=True, img_size=64, r=0, **self.SHORT).eval()
        model.load_state_dict(dense.state_dict())
        x = torch.randn(1, 3, 64, 80)
        assert isinstance(model, ReducedNaFlex)
        assert torch.equal(model(x), dense(x))
        assert model.patch_embed.img_size == (64, 64)

    @torch.no_grad()
    def test_a_name_with_settings_comes_back_from_a_folder(self, tmp_path: Path) -> None:
        model = timm.create_model("tome_naflexvit_base_patch16_gap", r=3, **self.SHORT).eval()
        save_for_hf(model, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = torch.randn(1, 3, 48, 80)
        assert torch.equal(again(x), model(x))
        assert again.settings == model.settings

    def test_tags_carry_the_weights_of_the_host(self) -> None:
        cfg = timm.get_pretrained_cfg("tome_naflexvit_base_patch16_gap.e300_s576_in1k")
        assert cfg.hf_hub_id == "timm/naflexvit_base_patch16_gap.e300_s576_in1k"
        assert timm.is_model("evit_naflexvit_base_patch16_radio_v3")
        assert not timm.is_model("evit_naflexvit_base_patch16_gap")  # it has no class token

    @torch.no_grad()
    def test_features_only_gives_maps_of_any_size(self) -> None:
        model = timm.create_model(
            "tome_naflexvit_base_patch16_gap", features_only=True, out_indices=(0, 1), r=3, **self.SHORT
        ).eval()
        assert [y.shape for y in model(torch.randn(1, 3, 48, 80))] == [(1, 32, 3, 5)] * 2

    def test_nominal_size_is_that_of_the_pretrained_configuration(self) -> None:
        model = timm.create_model("tome_naflexvit_base_patch16_radio_v3", **self.SHORT)
        assert model.patch_embed.img_size == (512, 512)


@torch.no_grad()
def test_replacing_the_method_and_files_keep_the_way_to_run_a_batch() -> None:
    model = effvit.sparsify(make("token"), "evit", keep_rate=0.5)
    model.batching = "packed"
    batch = collated(pixels(*GRIDS), 33)
    again = effvit.sparsify(model, "tome", r=2)
    assert again.batching == "packed"
    assert torch.equal(again(batch), effvit.sparsify(model, "tome", r=2)(batch))
    for copy in copies_through_files(model):
        assert copy.batching == "packed"
        assert torch.equal(copy(batch), model(batch))


@torch.no_grad()
@pytest.mark.parametrize("way", ["grouped", "padded", "packed"])
def test_half_precision_is_near_float32(way: str) -> None:
    model = effvit.sparsify(make("average"), "tome", r=2)
    model.batching = way
    batch = collated(pixels(*GRIDS), 33)
    expected = model(batch)
    half = effvit.sparsify(make("average"), "tome", r=2).bfloat16()
    half.batching = way
    found = half(batch | {"patches": batch["patches"].bfloat16()})
    assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.95
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.cosine_similarity(model(batch).float(), expected).min() > 0.95


@pytest.mark.parametrize("size", [(3, 16, 20), (3, 28, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_is_the_counted_macs(kind: str, size: tuple[int, int, int]) -> None:
    """Of the dense host and of a reduced one; at the second size every table of positions is resampled."""
    for model in (make(kind), effvit.sparsify(make(kind), "tome", r=3)):
        report = effvit.count_flops(model, size)
        assert sum(closed_form_macs(model, size).values()) == report.total


def test_plain_images_are_exported_and_batches_of_patches_refused() -> None:
    model = effvit.sparsify(make("axial"), "tome", r=3)
    x = torch.randn(1, 3, 16, 20)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    with pytest.raises(Exception, match="the grids of a batch of patches are read from its coordinates"):
        torch.export.export(model, (collated(pixels(*GRIDS)),))


def test_a_foreign_block_is_refused_by_name() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    dense = NaFlexVit(pos_embed_grid_size=(4, 5), block_fn=ParallelScalingBlock, **(SMALL | TOKEN))
    with pytest.raises(TypeError, match=r"blocks.0 is a ParallelScalingBlock, which token reduction does not know"):
        effvit.sparsify(dense, "tome")


def test_the_host_of_the_contract_takes_images_of_any_size() -> None:
    assert make_host("naflex")(torch.zeros(1, 3, 24, 40)).shape == (1, 7)


def test_example_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    exec(example("native_resolution.md", "NaFlexCollator"), names)
    assert names["scores"].shape == (2, 10)
    assert [y.shape for y in names["maps"]] == [(2, 768, 14, 10)] * 2
    assert [y.shape for y in names["rows"]] == [(2, 96, 768)] * 4
    assert names["tokens"].counts().tolist() == [52, 28]


@torch.no_grad()
def test_without_pooling_every_token_goes_through_the_head() -> None:
    """As in timm, so that a model without pooling and classes gives its features."""
    dense = make("token")
    dense.reset_classifier(0, "")
    batch = collated(pixels(*GRIDS), 33)
    valid = torch.nn.functional.pad(batch["patch_valid"], (2 + 1, 0), value=True)
    off = effvit.sparsify(dense, "tome", r=0)
    assert torch.equal(off(batch)[valid], dense(batch)[valid])
    reduced = effvit.sparsify(dense, "hot", keep_rate=0.5, reduce_at=(1,))
    assert reduced(batch).shape == (4, 3 + 15, 16)


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_stochastic_depth_trains_in_every_way_but_packed(way: str) -> None:
    dense = NaFlexVit(pos_embed_grid_size=(4, 5), drop_path_rate=0.2, **(SMALL | TOKEN))
    model = effvit.sparsify(dense, "tome", r=1).train()
    model.batching = way
    batch = collated(pixels(*GRIDS), 33)
    if way == "packed":
        with pytest.raises(ValueError, match=r"cannot drop single images .*batching='padded' of a NaFlexVit"):
            model(batch)
    else:
        assert model(batch).isfinite().all()
