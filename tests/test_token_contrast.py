"""Patch token contrast (2303.01267): its pairs and labels, and a classifier that trains with it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from garment_classifiers import NANO, build_classifier, garments, train
from torch import Tensor

from effvit.hosts.token_contrast import UNKNOWN, activation_labels, class_activations, patch_contrast


def by_loops(patches: Tensor, labels: Tensor) -> float:
    """The loss, pair by pair."""
    sums, counts = [0.0, 0.0], [0, 0]
    for own, kinds in zip(patches.double(), labels, strict=True):
        for i, j in product(range(len(own)), repeat=2):
            if i != j and UNKNOWN not in (kinds[i], kinds[j]):
                kind = int(kinds[i] == kinds[j])
                sums[kind] += abs(float(F.cosine_similarity(own[i], own[j], dim=0)))
                counts[kind] += 1
    unlike, alike = (total / (count + 1) for total, count in zip(sums, counts, strict=True))
    return 0.5 * (1 - alike) + 0.5 * unlike


class TestLoss:
    def test_it_is_that_of_every_pair_of_known_patches(self) -> None:
        patches, labels = torch.randn(3, 7, 5), torch.randint(-1, 3, (3, 7))
        assert patch_contrast(patches, labels).item() == pytest.approx(by_loops(patches, labels), abs=1e-6)

    def test_patches_that_agree_with_their_labels_cost_nearly_nothing(self) -> None:
        patches = torch.eye(2).repeat_interleave(20, 0)[None]
        labels = torch.tensor([[0] * 20 + [1] * 20])
        assert patch_contrast(patches, labels).item() == pytest.approx(0.5 / (2 * 20 * 19 + 1), abs=1e-7)
        assert patch_contrast(patches, torch.zeros(1, 40, dtype=torch.int64)).item() > 0.2
        assert patch_contrast(patches, labels.fill_(UNKNOWN)).item() == 0.5

    def test_half_precision_and_gradients(self) -> None:
        patches = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(-1, 2, (2, 9))
        assert torch.autograd.gradcheck(lambda x: patch_contrast(x, labels), (patches,))
        assert patch_contrast(patches.bfloat16(), labels).isfinite()

    def test_shapes_that_do_not_belong_together(self) -> None:
        with pytest.raises(
            ValueError, match=r"patches must be \(B, N, C\) and labels \(B, N\), got \(2, 9, 6\) and \(2"
        ):
            patch_contrast(torch.zeros(2, 9, 6), torch.zeros(2, 8, dtype=torch.int64))


class TestLabels:
    def test_activations_begin_at_0_and_end_near_1(self) -> None:
        found = class_activations(torch.randn(2, 9, 6), torch.randn(4, 6))
        assert found.shape == (2, 4, 9)
        assert not found.amin(-1).any()
        assert ((found.amax(-1) > 0.999) | (found.amax(-1) == 0)).all()

    def test_thresholds_divide_class_unknown_and_background(self) -> None:
        activations = torch.tensor(
            [[[0.1, 0.25, 0.5, 0.7, 0.8, 0.0], [0.9, 0.9, 0.9, 0.9, 0.9, 0.9], [0.0] * 5 + [0.75]]]
        )
        labels = activation_labels(activations, torch.tensor([[1, 0, 1]]))
        assert labels.tolist() == [[0, 0, -1, -1, 1, 3]]

    @pytest.mark.parametrize(("low", "high"), [(0.8, 0.7), (-0.1, 0.7), (0.1, float("nan"))])
    def test_thresholds_out_of_order(self, low: float, high: float) -> None:
        with pytest.raises(ValueError, match=r"high|low"):
            activation_labels(torch.zeros(1, 2, 3), torch.ones(1, 2), low, high)


def build(**options: Any) -> Any:
    return build_classifier("token_contrast_classifier", "TokenContrastClassifier", **options)


class TestClassifier:
    @pytest.mark.parametrize("sparsify", [None, {"method": "tome", "r": 2}, {"method": "evit", "keep_rate": 0.7}])
    def test_losses_fall_on_garments(self, sparsify: Any) -> None:
        seen = train(build(pretrained=True, sparsify=sparsify), garments(), lr=3e-4)
        assert seen[0].keys() == {"task_loss", "aux_loss", "contrast_loss"}
        assert seen[-1]["aux_loss"] < 0.8 * seen[0]["aux_loss"]
        assert seen[-1]["contrast_loss"] < seen[0]["contrast_loss"]

    def test_scores_and_task_loss_are_those_of_the_model(self) -> None:
        model, plain = build(pretrained=True), timm.create_model(NANO, pretrained=True)
        images, samples = garments()
        assert torch.allclose(model.eval()(images), plain.eval()(images), atol=1e-5)
        expected = F.cross_entropy(plain(images), torch.cat([sample.gt_label for sample in samples]))
        assert model.loss(images, samples)["task_loss"].item() == pytest.approx(expected.item(), rel=1e-4)

    def test_checkpoints_hold_the_auxiliary_head(self) -> None:
        model, other = build(), build()
        torch.nn.init.ones_(model.model.aux_head.weight)
        state = model.state_dict()
        assert "aux_head.weight" in state
        other.load_state_dict(state)
        assert torch.equal(other.model.aux_head.weight, model.model.aux_head.weight)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"global_pool": "avg"}, "token contrast is for heads that read the class token, but that of vit_nano"),
            ({"aux_block": 11}, "aux_block must be in front of the last block, 11, got 11"),
            ({"aux_block": 2.5}, "aux_block must be"),
            ({"contrast_weight": -3.0}, r"must be at least 0, got 1\.0 and -3\.0"),
            ({"low": 0.9}, "thresholds must be 0 <= low <= high, got 0.9 and 0.7"),
            ({"train_cfg": {"augments": {"type": "CutMix", "alpha": 1.0}}}, r"takes no train_cfg\.augments"),
        ],
    )
    def test_what_it_cannot_train_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            build(**options)

    def test_a_file_that_is_not_there_leaves_the_model_whole(self) -> None:
        model = build()
        model.pretrained, model._recipe["pretrained"], model._is_init = "nowhere.pth", "nowhere.pth", False
        with pytest.raises(FileNotFoundError, match="nowhere"):
            model.init_weights()
        assert hasattr(model.model, "aux_head")
