"""Records of costs: what they say of dense, reduced and foreign models; where time goes; how near outputs are."""

from __future__ import annotations

import csv
import itertools
import json

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit.measure.breakdown import time_by_block
from effvit.measure.costs import profile, tokens_by_block
from effvit.measure.fidelity import compare_outputs, fidelity, outputs
from effvit.measure.flops import count_flops
from effvit.measure.ideal import IdealViT, entering_counts, ideal_of
from effvit.measure.records import as_object
from effvit.measure.values import BlockTime
from effvit.show.tables import write_csv

SIZE = (3, 64, 64)


def tiny_vit(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=10, **kwargs
    ).eval()


class Foreign(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) + 1


class TestProfile:
    def test_record_is_json_and_holds_every_model(self, monkeypatch):
        # Speeds are those of the samples: seconds of a batch of 2 in two rounds, the ideal of ToMe included.
        samples = {"dense": (4.0, 8.0), "tome": (2.0, 4.0), "foreign": (1.0, 1.0), "ideal of tome": (1.5, 3.0)}
        monkeypatch.setattr(
            "effvit.measure.profiler.interleaved", lambda runs, *_: {name: samples[name] for name in runs}
        )
        model = tiny_vit()
        models = {"dense": model, "tome": effvit.sparsify(model, "tome", r=3), "foreign": Foreign()}
        record = as_object(profile(models, SIZE, 2, rounds=2, dtype=torch.float64))
        assert json.loads(json.dumps(record)) == record
        assert (record["schema"], record["kind"]) == (1, "profile")
        assert record["conditions"] == {
            "batch_size": 2,
            "input_size": [3, 64, 64],
            "compile": False,
            "cuda_graphs": False,
            "rounds": 2,
            "dtype": "float64",
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "clock": "wall",
            "images": "noise",
        }
        dense, tome, foreign = record["models"]
        assert (dense["host"], dense["method"], dense["tokens"]) == (None, None, [16, 16])
        assert (tome["host"], tome["method"], tome["tokens"]) == ("dense", "tome", [13, 10])
        assert tome["settings"] == {**effvit.method_settings("tome"), "r": 3}
        assert (foreign["host"], foreign["tokens"], foreign["ideal_speedup"]) == (None, None, None)
        assert dense["macs"] == count_flops(model, SIZE).total
        assert dense["parameters"] == sum(p.numel() for p in model.parameters())
        assert tome["mac_ratio"] == dense["macs"] / tome["macs"] > 1
        assert dense["speedup"] == 1
        assert not dense["resolved"]
        assert dense["ideal_speedup"] is None
        assert (tome["speedup"], tome["ideal_speedup"], tome["efficiency"]) == (2, 4 / 1.5, 0.75)
        assert (tome["interval"], tome["efficiency_interval"], tome["resolved"]) == ([2, 2], [0.75, 0.75], True)
        assert foreign["speedup"] == 6  # the median of 4 and 8
        assert [m["images_per_second"] for m in record["models"]] == [2 / 6, 2 / 3, 2]
        assert [m["seconds"] for m in record["models"]] == [[4, 8], [2, 4], [1, 1]]

    def test_ideal_can_be_left_out(self):
        model = tiny_vit()
        runs = []
        models = {"dense": model, "tome": effvit.sparsify(model, "tome", r=3)}
        record = profile(models, SIZE, 1, rounds=1, warmup=1, ideal=False, on_run=runs.append)
        assert set(runs) == {"dense", "tome"}
        assert record.models[1].efficiency is None

    def test_distances_are_given_on_images_for_the_reduced_dense_model_only(self):
        model, images = tiny_vit(), torch.randn(3, *SIZE)
        models = {"dense": model, "tome": effvit.sparsify(model, "tome", r=3), "other": tiny_vit()}
        record = profile(models, SIZE, 1, rounds=1, images=images, image_names=["a", "b", "c"])
        assert [cost.fidelity is None for cost in record.models] == [True, False, True]
        assert record.models[1].fidelity == fidelity(model, models["tome"], images)
        assert record.conditions.images == ["a", "b", "c"]

    def test_tokens_that_depend_on_the_image_are_a_mean_over_the_images(self):
        model = effvit.sparsify(tiny_vit(), "ats", reduce_at=[0, 1])
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.mul_(20)  # sharp attention, so that counts differ
        images = torch.randn(3, *SIZE)
        with torch.no_grad():
            counts = [int(model.eval().forward_tokens(image[None]).tokens.counts()) for image in images]
        assert tokens_by_block(model, images)[-1] == pytest.approx(sum(counts) / 3)
        record = profile({"ats": model}, SIZE, 1, rounds=1, images=images)
        assert record.models[0].macs == count_flops(model, SIZE, images=images).total

    def test_csv_has_a_row_for_every_model(self, tmp_path):
        record = profile({"dense": tiny_vit(), "foreign": Foreign()}, SIZE, 1, rounds=1)
        write_csv(tmp_path / "new" / "costs.csv", [record, record])
        with (tmp_path / "new" / "costs.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["dense", "foreign"] * 2
        assert rows[0]["input_size"] == "3x64x64"
        assert float(rows[0]["macs"]) == record.models[0].macs
        assert rows[1]["tokens_left"] == ""


class TestIdeal:
    def test_with_all_tokens_it_is_the_dense_model(self):
        model, x = tiny_vit(), torch.randn(2, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(IdealViT(model, [16, 16])(x), model(x))

    @pytest.mark.parametrize("mixed", [False, True])
    def test_with_all_tokens_it_is_the_dense_rotary_model(self, mixed):
        """Of DINOv3, and of a model with a rotary table for each block."""
        name = "vit_small_patch16_rope_mixed_224" if mixed else "vit_small_patch16_dinov3"
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=10).eval()
        x = torch.randn(2, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(ideal_of(model, [16, 16])(x), model(x))
            assert ideal_of(model, [13, 10])(x).isfinite().all()

    @pytest.mark.parametrize("host", ["vit", "eva"])
    def test_a_method_that_reduces_before_attention_is_held_against_that(self, host):
        """K-Medoids has no more to beat than random patches that leave at the same place."""
        torch.manual_seed(0)
        eva = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
        model = tiny_vit() if host == "vit" else timm.create_model("eva02_tiny_patch14_224", img_size=56, **eva)
        size, counts = SIZE if host == "vit" else (3, 56, 56), [16, 8]
        before = effvit.sparsify(model, "random", num_tokens=8, reduce_at=[1])
        behind = effvit.sparsify(model, "random", num_tokens=8, reduce_at=[1], place="mlp")
        assert entering_counts(before, counts) == [16, 8]
        assert entering_counts(behind, counts) == [16, 16]
        macs = {
            reduced: count_flops(ideal_of(model, counts, reduced), size).total for reduced in (before, behind, None)
        }
        assert macs[before] == count_flops(before, size).total < macs[behind] == macs[None]
        with torch.no_grad():
            assert ideal_of(model, counts, before)(torch.randn(2, *size)).isfinite().all()

    def test_a_class_without_one_has_none(self):
        assert ideal_of(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), [1] * 4) is None

    def test_it_costs_what_the_tokens_cost(self):
        model = tiny_vit()
        ideal, tome = IdealViT(model, [13, 10]), effvit.sparsify(model, "tome", r=3)
        assert count_flops(ideal, SIZE).total < count_flops(tome, SIZE).total < count_flops(model, SIZE).total


class TestBreakdown:
    @pytest.mark.parametrize("name", ["vit", "swin_tiny_patch4_window7_224", "tome"])
    def test_parts_of_every_block_are_timed(self, name, monkeypatch):
        if name.startswith("swin"):
            model = timm.create_model(name, img_size=56, window_size=7, depths=(1, 1, 1, 1), embed_dim=32).eval()
            size, blocks = (1, 3, 56, 56), 4
        else:
            model = tiny_vit() if name == "vit" else effvit.sparsify(tiny_vit(), "tome", r=3)
            size, blocks = (1, *SIZE), 2
        # The clock ticks at each look: a child takes 1, a block of n children 1 + 2n, n of it in and n + 1 beside them.
        ticks = itertools.count()
        monkeypatch.setattr("effvit.measure.breakdown.now", lambda: float(next(ticks)))
        rows = time_by_block(model, torch.randn(size), rounds=2)
        assert len(rows) == blocks + 1
        for row in rows[:-1]:
            parts = row.seconds
            assert set(parts) == {"attention", "mlp", "norm", "reduction"}
            assert (parts["attention"], parts["mlp"]) == (1, 1)
            assert parts["norm"] >= 2  # and LayerScale and DropPath, where there are any
            assert parts["reduction"] == parts["attention"] + parts["mlp"] + parts["norm"] + 1
        assert rows[-1] == BlockTime("rest", {"rest": blocks + 1})

    def test_model_without_blocks_is_refused(self):
        with pytest.raises(ValueError, match="Foreign has no blocks with children named attn and mlp to time apart"):
            time_by_block(Foreign(), torch.randn(1, *SIZE))


class TestFidelity:
    def test_the_same_model_is_at_no_distance(self):
        model, images = tiny_vit(), torch.randn(5, *SIZE)
        same = fidelity(model, model, images)
        assert same.divergence == pytest.approx(0, abs=1e-6)
        assert same.feature_distance == pytest.approx(0, abs=1e-6)
        assert (same.agreement, same.images) == (1, 5)

    def test_distances_are_those_of_the_definition(self):
        scores, features = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        other = torch.tensor([[0.0, 3.0]]).log(), torch.tensor([[1.0, 1.0]])
        other = (torch.tensor([[1.0, 3.0]]).log(), other[1])
        found = compare_outputs((scores, features), other)
        expected = 0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
        assert found.divergence == pytest.approx(float(expected))
        assert found.feature_distance == pytest.approx(1 - 0.5**0.5)

    @pytest.mark.parametrize("global_pool", ["token", "avg", "map"])
    def test_scores_are_those_of_the_model(self, global_pool):
        model, images = tiny_vit(global_pool=global_pool, class_token=global_pool == "token"), torch.randn(3, *SIZE)
        reduced = effvit.sparsify(model, "tome", r=3).eval()
        for own in (model, reduced):
            with torch.no_grad():
                torch.testing.assert_close(outputs(own, images, batch_size=2)[0], own(images))

    def test_models_without_head_are_refused(self):
        with pytest.raises(TypeError, match="Foreign has no forward_features and forward_head"):
            outputs(Foreign(), torch.randn(1, *SIZE))
        model = tiny_vit()
        model.reset_classifier(0)
        with pytest.raises(TypeError, match=r"VisionTransformer has no classifier \(num_classes=0\)"):
            outputs(model, torch.randn(1, *SIZE))
