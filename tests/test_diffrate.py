"""DiffRate: what is dropped, what is merged into what, and what a schedule of numbers means.

Agreement with the official code is in test_golden.py, the laws of every method in test_contract.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hosts import make_host, make_images, make_model

import effvit
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops
from effvit.reducers.bipartite import Matching
from effvit.reducers.diffrate import LEAST_WEIGHT, DiffRate, absorb, nearest_kept
from effvit.reducers.diffrate_presets import PRESETS

NOTHING: list[int] = []


class TestMerging:
    def matching(self) -> Matching:
        """A class token and three patches, of which the last goes into the first."""
        return Matching(torch.tensor([[3]]), torch.tensor([[0, 1, 2]]), torch.tensor([[1]]), 1)

    def test_token_becomes_the_plain_mean_whatever_the_sizes(self) -> None:
        x, size = torch.randn(1, 4, 5), torch.tensor([[1.0, 3, 1, 1]])
        new = absorb(x, size, size, self.matching(), torch.tensor([[0.5]]))
        assert torch.allclose(new.x[:, 1], (x[:, 1] + x[:, 3]) / 2)
        assert torch.equal(new.x[:, [0, 2]], x[:, [0, 2]])

    def test_sizes_count_patches_and_weights_of_keys_count_similarity(self) -> None:
        x, size, weight = torch.randn(1, 4, 5), torch.tensor([[1.0, 3, 1, 2]]), torch.tensor([[1.0, 2.5, 1, 1.5]])
        new = absorb(x, size, weight, self.matching(), torch.tensor([[0.4]]))
        assert new.size.tolist() == [[1, 5, 1]]
        assert torch.allclose(new.weight, torch.tensor([[1, 2.5 + 0.4 * 1.5, 1]]))

    def test_weight_stays_positive_where_the_official_one_does_not(self) -> None:
        """A negative cosine of a large token: the official logarithm is NaN in the next block."""
        ones = torch.ones(1, 4)
        new = absorb(
            torch.randn(1, 4, 5), ones, torch.tensor([[1.0, 1, 1, 4]]), self.matching(), torch.tensor([[-0.9]])
        )
        assert new.weight[0, 1] == torch.tensor(LEAST_WEIGHT)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mean_of_hundreds_of_tokens_is_theirs_in_half_precision(self, dtype: torch.dtype) -> None:
        """Their sum is beyond float16, and bfloat16 stops counting at 256."""
        x, places, ones = torch.full((1, 578, 4), 130, dtype=dtype), torch.arange(578)[None], torch.ones(1, 578)
        matching = Matching(places[:, 2:], places[:, :2], torch.ones(1, 576, dtype=torch.int64), 1)
        assert torch.equal(absorb(x, ones, ones, matching, ones[:, 2:]).x, x[:, :2])

    def test_nearest_kept_is_that_of_the_largest_cosine(self) -> None:
        x = torch.tensor([[[1.0, 0], [0, 1], [5, 1], [-1, 9]]])
        similarity, place = nearest_kept(x, torch.tensor([[1, 0, 3, 2]]), 2)
        assert place.tolist() == [[0, 1]]  # token 3 goes to token 1, token 2 to token 0
        assert torch.allclose(similarity, torch.tensor([[9 / 82**0.5, 5 / 26**0.5]]))


class TestSchedule:
    def test_numbers_of_a_preset_are_those_that_leave_each_block(self) -> None:
        """The official row of DeiT-S for 2.9 GMACs, without the class token."""
        with torch.device("meta"):
            model = timm.create_model("diffrate_deit_small_patch16_224", preset="deit_small_2.9")
        chosen = PRESETS["deit_small_2.9"]
        left = [min(pair) for pair in zip(chosen.prune_to, chosen.merge_to, strict=True)]
        assert model.token_counts() == left
        assert len(model.reducers) == sum(number < 196 for number in left)

    @pytest.mark.parametrize(
        ("host", "preset", "gmacs"),
        [
            ("deit_small_patch16_224", "deit_small_2.9", 2.905),
            ("deit_base_patch16_224", "deit_base_11.5", 11.517),
        ],
    )
    def test_presets_cost_what_is_published(self, host: str, preset: str, gmacs: float) -> None:
        """README of the authors, who count no norms and not the method itself."""
        with torch.device("meta"):
            model = timm.create_model(f"diffrate_{host}", preset=preset)
        terms = closed_form_macs(model, (3, 224, 224))
        counted = sum(terms[name] for name in ("embedding", "projection", "attention", "mlp", "head"))
        assert counted / 1e9 == pytest.approx(gmacs, rel=2e-3)

    def test_default_follows_the_depth(self) -> None:
        with torch.device("meta"):
            large = timm.create_model("diffrate_vit_large_patch16_224")
        chosen = PRESETS["mae_large_42.3"]
        assert large.token_counts() == [min(p) for p in zip(chosen.prune_to, chosen.merge_to, strict=True)]

    def test_preset_on_another_grid_keeps_shares_of_its_patches(self) -> None:
        with torch.device("meta"):
            model = timm.create_model("diffrate_deit_base_patch16_384", preset="deit_base_11.5")
        chosen = PRESETS["deit_base_11.5"]
        shares = [min(p) / 196 for p in zip(chosen.prune_to, chosen.merge_to, strict=True)]
        assert model.token_counts() == [round(share * 576) for share in shares]

    def test_of_two_nearest_numbers_of_tokens_the_larger_stays(self) -> None:
        """147 and 49 of 196 patches are 73.5 and 24.5 of 98."""
        assert DiffRate(147, 49, 196).numbers(98, 98) == (74, 25)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # numbers of tokens become constants of a trace
    @pytest.mark.parametrize("size", [(8, 8), (24, 40), (56, 112)])
    def test_a_preset_is_traced_and_counted_on_a_host_of_any_size(self, size: tuple[int, int]) -> None:
        """A trace hands the number of patches as a tensor. What the method saves of its host is compared."""
        host = make_host("class_token", dynamic_img_size=True)
        model = effvit.sparsify(host, "diffrate")
        x = torch.randn(2, 3, *size)
        assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), model(x))
        form, dense_form = (sum(closed_form_macs(m, (3, *size)).values()) for m in (model, host))
        total, dense_total = (count_flops(m, (3, *size), strict=True).total for m in (model, host))
        assert dense_form - form == dense_total - total

    def test_only_pruning_is_a_choice_by_class_attention(self) -> None:
        model = make_model("diffrate", "class_token", prune_to=[48, 20, 20, 20], merge_to=NOTHING)
        other = effvit.sparsify(
            make_host("class_token"), "evit", num_tokens=20, reduce_at=(1,), fuse_token=False
        ).eval()
        x = make_images(model)
        assert torch.equal(model(x), other(x))

    def test_pruned_patches_are_in_no_token_and_merged_ones_are(self) -> None:
        model = make_model("diffrate", "class_token", prune_to=[30, 30, 30, 30], merge_to=[20, 20, 20, 20])
        tokens = model.forward_tokens(make_images(model)).tokens
        assert ((tokens.source >= 0).sum(1) == 30).all()
        assert tokens.size is not None
        assert torch.equal(tokens.size[:, 1:].sum(1), torch.full((2,), 30.0))

    def test_average_pooling_weights_tokens_by_the_patches_they_stand_for(self) -> None:
        model = make_model("diffrate", "gated_grouped").double()
        x = make_images(model).double()
        features, tokens = model.forward_tokens(x)
        assert tokens.size is not None
        weight = tokens.size[:, 1:].unsqueeze(-1)
        mean = (features[:, 1:] * weight).sum(1) / weight.sum(1)
        assert torch.allclose(model.forward_head(model.forward_features(x), pre_logits=True), model.fc_norm(mean))


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"preset": "deit_small_3.0"}, "preset must be one of deit_tiny_0.6, "),
            (
                {"preset": "deit_small_2.9", "merge_to": [9] * 12},
                "preset 'deit_small_2.9' and numbers of your own exclude",
            ),
            ({"prune_to": [9] * 11}, "prune_to must have one number for each of 12 blocks, got 11"),
            ({"merge_to": [9] * 11 + [0]}, "merge_to must be at least 1, got 0"),
            ({"merge_to": [9.5] * 12}, "merge_to must be a whole number, got 9.5"),
            ({"prune_to": 9}, "prune_to must be a list with one number for each of 12 blocks, got 9"),
        ],
    )
    def test_settings_out_of_range_are_named(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            DiffRate.plan(12, **settings)

    def test_host_without_class_token_is_refused(self) -> None:
        with pytest.raises(ValueError, match="diffrate scores patches by the class token, but this"):
            effvit.sparsify(make_host("average_pool"), "diffrate")

    def test_nan_names_the_image_and_the_block(self) -> None:
        model = make_model("diffrate", "class_token")
        x = make_images(model)
        x[1] = float("nan")
        with pytest.raises(ValueError, match="diffrate in block 0: class-token scores are NaN for image 1"):
            model(x)
