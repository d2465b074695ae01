"""DyMU: thresholds, calibration, ragged batches and virtual unmerging."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import HOSTS, make_host, make_images, make_model, packed_map
from safetensors.torch import save_file
from slow_merging import most_similar, slow_merge
from timm.models import save_for_hf
from torch import Tensor

import effvit
from effvit.attention import AttnState
from effvit.hosts.calibration import ranking
from effvit.hosts.host import ReducedHost
from effvit.reducers.dymu import PRESETS, DyMU
from effvit.reducers.merging import descending_rank, plan_merge, top_of_batch
from effvit.reducers.unmerge import remerge, virtual_unmerge, virtual_unmerged_attention
from effvit.schedule import R_SCHEDULES, dymu_r
from effvit.testing.reads import count_reads
from effvit.tokens import TokenMap


def uncalibrated(host: str = "class_token", **settings: object) -> ReducedHost:
    return effvit.sparsify(make_host(host), "dymu", **({"r_total": 20} | settings)).eval()


def counts(model: ReducedHost, x: Tensor) -> list[int]:
    return model.forward_tokens(x).tokens.counts().tolist()


def calibrate_in_group(rank: int, folder: Path) -> None:
    """One process of two, of which the first has one batch and the second two."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model = uncalibrated()
    scales = ((1,), (2, 3))[rank]
    thresholds = effvit.calibrate(model, [make_images(model) * scale for scale in scales])
    torch.save((thresholds, int(model.reducers[0].num_batches)), folder / str(rank))
    torch.distributed.destroy_process_group()


class TestSchedule:
    def test_every_schedule_ends_and_sums_to_the_total(self) -> None:
        # On few tokens the official linear schedules never end.
        for depth in (1, 2, 3, 4, 12, 27):
            for total in (*range(30), 96, 504):
                for schedule in R_SCHEDULES:
                    values = dymu_r(total, depth, schedule)
                    assert len(values) == depth
                    assert sum(values) == total
                    assert min(values) >= 0
                    assert values == sorted(values, reverse=schedule != "reverse_linear")

    def test_few_tokens_are_spread_from_the_front(self) -> None:
        assert dymu_r(3, 4, "linear") == [2, 1, 0, 0]
        assert dymu_r(3, 4, "reverse_linear") == [0, 0, 1, 2]

    def test_falling_schedule_stops_where_the_total_is_reached(self) -> None:
        """From 2 * 96 // 12 = 16 in steps of 16 / 12, rounded down; the tenth block gets the three that are left."""
        falling = [16, 14, 13, 12, 10, 9, 8, 6, 5, 3, 0, 0]
        assert dymu_r(96, 12, "linear") == falling
        assert dymu_r(96, 12, "reverse_linear") == falling[::-1]


class TestMatching:
    def test_rank_breaks_ties_by_position(self) -> None:
        values = torch.tensor([[1.0, 3.0, 1.0, float("-inf"), 3.0]])
        assert descending_rank(values).tolist() == [[2, 0, 3, 4, 1]]
        assert descending_rank(torch.zeros(2, 0)).shape == (2, 0)

    def test_threshold_of_a_batch_merges_the_same_rows(self) -> None:
        best = torch.rand(3, 8)
        merged, threshold = top_of_batch(best, 2, num_prefix=0)
        assert int(merged.sum()) == 6
        assert torch.equal(best > threshold, merged)

    def test_rows_that_are_not_finite_are_never_merged(self) -> None:
        best = torch.full((2, 4), float("-inf"))
        merged, threshold = top_of_batch(best, 3, num_prefix=1)
        assert not merged.any()
        assert threshold == 0

    @pytest.mark.parametrize("prefix", [0, 1, 2])
    def test_a_lower_threshold_never_merges_fewer(self, prefix: int) -> None:
        metric = torch.randn(4, 13, 8, dtype=torch.float64)
        number = [
            plan_merge(metric, None, prefix, torch.tensor(t)).merged.sum(1) for t in (1.0, 0.5, 0.2, 0.0, -0.5, -1.0)
        ]
        assert (torch.stack(number).diff(dim=0) >= 0).all()
        assert number[0].eq(0).all()
        assert (number[-1] <= 6).all()

    def test_ties_with_the_threshold_do_not_depend_on_the_batch(self) -> None:
        # Equal tokens have a similarity of 1 up to the last digits, which differ with the shape of a product.
        for host in ("class_token", "average_pool"):
            model = uncalibrated(host, thresholds=[1.0] * 4)
            with torch.no_grad():
                model.pos_embed.zero_()
            x = make_images(model, 5)
            x[1:3, :, :, 32:] = x[1:3, :, :, :32]
            assert counts(model, x) == [counts(model, image[None])[0] for image in x] == [48] * 5

    @pytest.mark.parametrize(("above", "compat", "merged"), [(5e-7, False, 0), (5e-7, True, 2), (2e-6, False, 2)])
    def test_similarity_within_a_millionth_of_the_threshold_is_not_above_it(
        self, above: float, compat: bool, merged: int
    ) -> None:
        """The deviation that the class names, and tome.py@c57d75a, which merges all that is larger; cosine 3/5."""
        metric = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]] * 2, dtype=torch.float64)
        threshold = torch.tensor(0.6 - above, dtype=torch.float64)
        assert int(plan_merge(metric, None, 0, threshold, compat=compat).merged.sum()) == merged

    def test_limit_for_each_image_is_a_multiple_of_r(self) -> None:
        model = uncalibrated(thresholds=[-1.0] * 4, r_total=[5, 0, 0, 0], max_r_per_instance_ratio=1.5)
        assert counts(model, make_images(model)) == [48 - 7, 48 - 7]

    def test_block_with_r_zero_is_left_alone(self) -> None:
        model = uncalibrated(thresholds=[-1.0] * 4, r_total=[0, 1, 0, 0])
        assert sorted(model.reducers) == [1]
        assert [f.x.shape[1] for f in model.trace_tokens(make_images(model))] == [49, 25, 25, 25]


class TestCalibration:
    @pytest.mark.parametrize("host", HOSTS)
    def test_average_image_of_the_batch_loses_the_tokens_asked_for(self, host: str) -> None:
        model = uncalibrated(host, r_total=8).double()
        x = make_images(model, 4).double()
        thresholds = effvit.calibrate(model, [x])
        assert sum(counts(model, x)) == 4 * (model.patch_embed.num_patches - 8)
        assert all(0 <= t <= 1 for t in thresholds)
        again = effvit.sparsify(make_host(host), "dymu", r_total=8, thresholds=thresholds).eval()
        again.double().load_state_dict(copy.deepcopy(model.state_dict()))  # Eva's weights depend on the order
        assert torch.allclose(again(x), model(x), atol=1e-6)

    def test_threshold_is_the_plain_mean_over_all_batches_in_any_number_of_calls(self) -> None:
        model = uncalibrated()
        batches = [make_images(model, number) + number for number in (1, 4, 2)]
        alone = []
        for batch in batches:
            with ranking(model) as found:
                model(batch)
            alone.append(torch.stack(found))
        effvit.calibrate(model, batches[:1])
        effvit.calibrate(model, iter(batches[1:]))
        expected = torch.stack(alone).double().mean(0)
        actual = torch.stack([reducer.threshold for reducer in model.reducers.values()]).double()
        assert torch.allclose(actual, expected, rtol=0, atol=1e-6)
        assert [int(reducer.num_batches) for reducer in model.reducers.values()] == [3] * 4

    @pytest.mark.parametrize(("preset", "depth"), [("siglip_base_384_72out", 12), ("clip_large_336_72out", 24)])
    def test_preset_needs_no_calibration(self, preset: str, depth: int) -> None:
        """504 tokens over all blocks, of which a block of the 24 has 21, and the thresholds that the authors print."""
        dense = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=depth, embed_dim=12, num_heads=2)
        model = effvit.sparsify(dense, "dymu", preset=preset).eval()
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
        assert [reducer.r for reducer in model.reducers.values()] == [504 // depth] * depth
        learnt = [float(reducer.threshold) for reducer in model.reducers.values()]
        assert tuple(learnt) == PRESETS[preset].thresholds
        assert len(learnt) == depth
        assert torch.tensor(learnt, dtype=torch.bfloat16).tolist() == learnt
        with pytest.raises(ValueError, match=rf"'{preset}' has thresholds of {depth} blocks, and the host has 4; give"):
            uncalibrated(preset=preset, r_total=None)

    def test_preset_refuses_another_number_of_tokens_than_its_thresholds_were_learnt_for(self) -> None:
        """It would change no result but the limits of each image and the blocks that merge."""
        preset = "siglip_base_384_72out"
        message = rf"'{preset}' has thresholds that were learnt for r_total 504, got 12; leave r_total out, or leave "
        with pytest.raises(ValueError, match=message):
            DyMU.plan(12, preset=preset, r_total=12)
        assert list(DyMU.plan(12, preset=preset, r_total=504)) == list(range(12))

    def test_calibration_changes_nothing_but_thresholds(self) -> None:
        model = uncalibrated()
        model.train()
        model.blocks[1].eval()
        modes = [module.training for module in model.modules()]
        before = copy.deepcopy(model.state_dict())
        effvit.calibrate(model, [make_images(model)])
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert len(changed) == 8
        assert all(".reducer." in name for name in changed)

    def test_failing_batch_leaves_the_model_as_it_was(self) -> None:
        model = uncalibrated()
        with pytest.raises(ValueError, match="expected images of 48 x 64 pixels, got 32 x 32"):
            effvit.calibrate(model, [torch.randn(1, 3, 32, 32)])
        with pytest.raises(ValueError, match="has no threshold yet"):
            model(make_images(model))

    def test_dropout_does_not_disturb_the_thresholds(self) -> None:
        dropping = effvit.sparsify(make_host("class_token", drop_path_rate=0.5), "dymu", r_total=20).train()
        assert effvit.calibrate(dropping, [make_images(dropping)]) == pytest.approx(
            effvit.calibrate(uncalibrated(), [make_images(dropping)])
        )

    def test_packed_and_padded_find_the_same(self) -> None:
        for host in ("registers", "attention_pool"):
            x = make_images(uncalibrated(host), 4).double()
            found = [effvit.calibrate(uncalibrated(host, ragged=r).double(), [x]) for r in ("padded", "packed")]
            assert found[0] == pytest.approx(found[1], abs=1e-12)

    @pytest.mark.slow
    def test_two_processes_end_with_the_mean_over_the_batches_of_both(self, tmp_path: Path) -> None:
        torch.multiprocessing.spawn(calibrate_in_group, (tmp_path,), nprocs=2)
        model = uncalibrated()
        expected = effvit.calibrate(model, [make_images(model) * scale for scale in (1, 2, 3)])
        for rank in range(2):
            thresholds, number = torch.load(tmp_path / str(rank))
            assert thresholds == pytest.approx(expected, abs=1e-6)
            assert number == 3


class TestStoredThresholds:
    def calibrated(self) -> ReducedHost:
        model = uncalibrated()
        effvit.calibrate(model, [make_images(model, 4)])
        return model

    def test_half_precision_weights_leave_them_in_float32(self) -> None:
        model = self.calibrated()
        before = model.reducers[0].threshold.clone()
        model.bfloat16()
        assert model.reducers[0].threshold.dtype == torch.float32
        assert torch.equal(model.reducers[0].threshold, before)
        assert model.double().reducers[0].threshold.dtype == torch.float64

    def test_memory_that_replaces_the_meta_device_holds_no_threshold(self) -> None:
        with torch.device("meta"):
            model = effvit.sparsify(HOSTS["class_token"](), "dymu", r_total=20).eval()
        model.to_empty(device="cpu")
        model.load_state_dict(make_host("class_token").state_dict())
        assert float(model.reducers[0].threshold) == 1
        with pytest.raises(ValueError, match="has no threshold yet"):
            model(make_images(model))

    def test_state_dict_carries_them(self) -> None:
        model, other = self.calibrated(), uncalibrated()
        other.load_state_dict(model.state_dict())
        x = make_images(model)
        assert torch.equal(other(x), model(x))

    def test_checkpoint_of_the_plain_host_leaves_them(self) -> None:
        model = self.calibrated()
        before = copy.deepcopy(model.state_dict())
        model.load_state_dict(make_host("class_token").state_dict())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_those_of_the_settings_win_over_a_checkpoint(self) -> None:
        model = make_model("dymu", "class_token")
        model.load_state_dict(uncalibrated().state_dict())
        assert float(model.reducers[0].threshold) == pytest.approx(0.9)
        assert model(make_images(model)).isfinite().all()

    def test_official_names_load_and_those_of_blocks_that_do_not_reduce_are_dropped(self, tmp_path: Path) -> None:
        state = make_host("class_token").state_dict()
        state |= {f"blocks.{i}.threshold": torch.tensor(t) for i, t in enumerate((0.9, 0.8, 1.0, 0.7))}
        torch.save(state, tmp_path / "official.pth")
        model = uncalibrated(r_total=[4, 0, 4, 4])
        assert effvit.load_checkpoint(model, tmp_path / "official.pth") == ["blocks.1.threshold"]
        assert [float(r.threshold) for r in model.reducers.values()] == pytest.approx([0.9, 1.0, 0.7])
        assert [int(r.num_batches) for r in model.reducers.values()] == [1, 0, 1]
        torch.save(make_host("class_token").state_dict(), tmp_path / "plain.pth")
        assert effvit.load_checkpoint(model, tmp_path / "plain.pth") == []
        assert float(model.reducers[0].threshold) == pytest.approx(0.9)

    def test_hub_folder_carries_them(self, tmp_path: Path) -> None:
        model = timm.create_model("dymu_deit_tiny_patch16_224", num_classes=5, r_total=60).eval()
        x = torch.randn(2, 3, 224, 224)
        effvit.calibrate(model, [x])
        save_for_hf(model, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))
        other = {"num_classes": 3, "img_size": 192}
        resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **other).eval()
        assert resized(torch.randn(2, 3, 192, 192)).shape == (2, 3)
        assert torch.equal(resized.reducers[3].threshold, model.reducers[3].threshold)

    @pytest.mark.parametrize(
        "host", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
    )
    def test_pretrained_weights_of_the_host_load(self, host: str, tmp_path: Path) -> None:
        small = {"depth": 2, "embed_dim": 96, "num_heads": 3}
        dense = timm.create_model(host, **small).eval()
        save_file(dense.state_dict(), tmp_path / "weights.safetensors")
        overlay = {"file": str(tmp_path / "weights.safetensors")}
        model = timm.create_model(
            f"dymu_{host}", pretrained=True, pretrained_cfg_overlay=overlay, thresholds=[1.0, 1.0], **small
        ).eval()
        x = torch.randn(1, 3, *dense.patch_embed.img_size)
        assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("host", [host for host in HOSTS if make_model("tome", host).packable])
def test_packed_and_padded_batches_agree(host: str) -> None:
    padded = make_model("dymu", host).double()
    packed = make_model("dymu", host, ragged="packed").double()
    x = make_images(padded, batch=4).double()
    assert len(set(counts(padded, x))) > 1
    assert counts(packed, x) == counts(padded, x)
    assert torch.allclose(packed(x), padded(x), rtol=0, atol=1e-10)
    for own, other in zip(
        packed.forward_intermediates(x, intermediates_only=True),
        padded.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert torch.allclose(own, other, rtol=0, atol=1e-10)


def test_packed_batches_run_in_bfloat16() -> None:
    for host in ("attention_pool", "dinov3"):
        model = make_model("dymu", host, ragged="packed")
        x = make_images(model, batch=3)
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.cosine_similarity(model(x).float(), expected).min() > 0.9
        assert F.cosine_similarity(model.bfloat16()(x.bfloat16()).float(), expected).min() > 0.9


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_attention_is_told_the_lengths_that_it_would_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels ask each factor for its shortest and longest image, and read them from the offsets if it has none."""
    from effvit import attention

    factors: list[Any] = []

    def attend(q: Any, k: Any, v: Any, **_: object) -> Any:
        factors.extend((q, k, v))
        return q

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    queries, keys = (replace(packed_map(*lengths), lengths=lengths) for lengths in ((3, 4), (5, 3)))
    q, k, v = (torch.randn(1, 2, number, 8) for number in (7, 8, 8))
    of_queries, of_keys = attention.Images.of(queries), attention.Images.of(keys)
    assert not count_reads(lambda: attention.jagged_attention(q, k, v, of_queries, of_keys, 0.0))
    assert [(y._maybe_min_seqlen, y._maybe_max_seqlen) for y in factors] == [(3, 4), (3, 5), (3, 5)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_bias_of_jagged_attention_agrees_with_a_mask() -> None:
    from effvit.attention import Images, bias_as_features, jagged_attention, variable_length_attention

    tokens = packed_map(5, 3)
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    bias = torch.randint(1, 9, (1, 8)).float().log()
    expected = variable_length_attention(q, k, v, tokens, tokens, 0.0, bias)
    wider = bias_as_features(q, k, v, bias, 0.25)
    out = jagged_attention(*wider, Images.of(tokens), Images.of(tokens), 0.0, 0.25)[..., :16]
    assert torch.allclose(out, expected, atol=1e-6)
    half = bias_as_features(*(y.bfloat16() for y in (q, k, v)), bias, 0.25)
    exact = half[1][..., 16:18].float().sum(-1) * 0.25
    assert torch.allclose(exact, bias[:, None].expand(-1, 2, -1), atol=1e-4)


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_merging_of_one_image_is_that_of_the_slow_search(num_prefix: int) -> None:
    """What is more similar than the threshold merges, half of the tokens at most; the second block meets sizes.

    Without a prefix token what is left of set A comes by falling similarity.
    """
    x = torch.randn(1, num_prefix + 24, 5)
    tokens, size = TokenMap.full(x, (4, 6), num_prefix, 0), torch.ones(24)
    reducer = DyMU.plan(1, r_total=4, thresholds=(0.8,))[0]
    for _ in range(2):
        k = torch.randn(1, 2, x.shape[1], 4)
        metric = k[0].mean(0)[num_prefix:]
        merged = sum(cosine > 0.8 for cosine in most_similar(metric, num_prefix)[1].values())
        assert 0 < merged < len(metric) // 2
        expected, size = slow_merge(x[0], size, metric, merged, num_prefix)
        x, tokens = reducer.reduce(x, tokens, AttnState.of(k, k, k, 0.5, tokens))
        assert torch.allclose(x[0], expected, atol=1e-6)
        assert torch.equal(tokens.size[0], F.pad(size, (num_prefix, 0), value=1))
    assert size.max() > 2


def test_sizes_of_every_image_sum_to_its_patches() -> None:
    """Padding stands for none, wherever an image has fewer tokens than its neighbour."""
    model = make_model("dymu", "class_token")
    with torch.no_grad():
        _, tokens = model.forward_tokens(make_images(model))
    assert tokens.valid is not None
    assert not tokens.valid.all()
    assert tokens.size[:, tokens.num_prefix :].sum(1).tolist() == [48, 48]


def test_merging_equal_tokens_changes_nothing() -> None:
    for host in ("attention_pool", "average_pool", "class_token", "register_no_class"):
        dense = make_host(host).double()
        model = effvit.sparsify(dense, "dymu", r_total=[1, 0, 0, 0], thresholds=[0.999999] + [1.0] * 3)
        with torch.no_grad():
            if dense.pos_embed is not None:
                dense.pos_embed.zero_()
        x = make_images(model, 3).double()
        x[1, :, :8, 8:16] = x[1, :, :8, :8]  # so that images differ in length
        assert counts(model, x) == [48, 47, 48]
        assert torch.allclose(model(x), dense(x), rtol=0, atol=1e-10)


def test_official_batches_depend_on_the_batch_and_the_default_does_not() -> None:
    x = make_images(make_model("dymu", "attention_pool"), 3).double()
    for compat in (False, True):
        model = make_model("dymu", "attention_pool", compat=compat).double()
        same = torch.allclose(model(x)[:1], model(x[:1]), rtol=0, atol=1e-10)
        assert same is not compat
    own, official = (make_model("dymu", "attention_pool", compat=c).double() for c in (False, True))
    assert torch.allclose(own(x[:1]), official(x[:1]), rtol=0, atol=1e-12)


class TestVirtualUnmerging:
    def table(self, number: int, width: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(number, dtype=torch.float64)[:, None] / 10 ** (torch.arange(width // 2) / 3)
        angle = torch.cat([angle, angle], dim=1)
        return angle.cos(), angle.sin()

    def test_remerge_inverts_virtual_unmerge(self) -> None:
        group = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 1, 0]])
        x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
        assert torch.allclose(remerge(virtual_unmerge(x, group), group, 3), x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mean_of_hundreds_of_positions_is_theirs_in_half_precision(self, dtype: torch.dtype) -> None:
        """Their sum is beyond float16, and bfloat16 stops counting at 256."""
        x = torch.full((1, 2, 576, 4), 130, dtype=dtype)
        assert torch.equal(remerge(x, torch.zeros(576, dtype=torch.int64), 1), x[:, :, :1])

    @pytest.mark.parametrize("causal", [False, True])
    def test_factorised_scores_of_the_paper_give_the_same(self, causal: bool) -> None:
        # a cos((i-j)w) + b sin((i-j)w) for every frequency pair, from products of the n tokens alone.
        group = torch.tensor([0, 1, 1, 2, 3, 0, 4])
        q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
        cos, sin = self.table(7, 8)
        (q1, q2), (k1, k2) = (y.chunk(2, -1) for y in (q, k))
        dot = torch.einsum("bhuf,bhvf->bhuvf", q1, k1) + torch.einsum("bhuf,bhvf->bhuvf", q2, k2)
        cross = torch.einsum("bhuf,bhvf->bhuvf", q2, k1) - torch.einsum("bhuf,bhvf->bhuvf", q1, k2)
        c, s = cos[:, :4], sin[:, :4]
        same = c[:, None] * c + s[:, None] * s
        turned = c[:, None] * s - s[:, None] * c
        pairs = (slice(None), slice(None), group[:, None], group)
        scores = (dot[pairs] * same + cross[pairs] * turned).sum(-1) / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
        expected = remerge(scores.softmax(-1) @ virtual_unmerge(v, group), group, 5)
        assert torch.allclose(virtual_unmerged_attention(q, k, v, group, cos, sin, causal), expected, atol=1e-12)

    def test_source_of_a_token_map_is_the_group(self) -> None:
        model = make_model("dymu", "average_pool")
        x, tokens = model.forward_tokens(make_images(model))
        dense = virtual_unmerge(x.unsqueeze(1), tokens.source).squeeze(1)
        assert torch.equal(dense.transpose(1, 2).unflatten(2, tokens.grid), effvit.to_map(x, tokens, "zero"))
