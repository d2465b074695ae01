"""Top-1 accuracy, and which models of records are worth showing."""

from __future__ import annotations

import pytest
import torch
from made_up import made_up_model, made_up_profile

from effvit.measure.accuracy import shown_models, top1, with_accuracies
from effvit.measure.records import profile_of
from effvit.measure.values import Accuracy, Record


def test_accuracy_is_the_share_of_right_answers() -> None:
    class Says(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 4).float()

    images = torch.tensor([0.0, 1, 2, 3, 1]).reshape(5, 1, 1, 1)
    batches = [(images[:3], torch.tensor([0, 1, 1])), (images[3:], torch.tensor([3, 2]))]
    assert top1({"a": Says()}, batches) == {"a": 60.0}


def test_accuracy_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no images to tell an accuracy from"):
        top1({"model": torch.nn.Identity()}, [])


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="the scores of model must be finite, but hold NaN or infinity; use --dtype"):
        top1({"model": torch.nn.Identity()}, [(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))])


def test_standard_error_is_that_of_a_share() -> None:
    """sqrt(p (1 - p) / n): 0.3 points at 90 % of 10,000 images."""
    assert Accuracy(90.0, "top-1", "a set", "made up", 10_000).standard_error == pytest.approx(0.3)
    assert Accuracy(100.0, "top-1", "a set", "made up", 10).standard_error == 0
    assert Accuracy(90.0, "top-1", "a set", "made up").standard_error is None


def test_record_gets_the_accuracies_of_its_models_with_their_origin() -> None:
    models = [made_up_model("host_a", None, 1.0), made_up_model("tome r=8", "tome", 1.2)]
    record = profile_of(made_up_profile(models=models))
    record = with_accuracies(record, {"tome r=8": 70.0, "host_a": 80.0}, "five pictures")
    said = "top-1", "five pictures", "measured here"
    assert [cost.accuracy for cost in record.models] == [Accuracy(80.0, *said), Accuracy(70.0, *said)]


def record_of(*names: str, weights: str | None = None) -> Record:
    record = made_up_profile(models=[made_up_model(name, "tome" if i else None, 1.0) for i, name in enumerate(names)])
    return profile_of(record).with_weights(weights)


class TestShown:
    def test_baseline_of_several_records_is_shown_once(self) -> None:
        shown = shown_models([record_of("host", "a"), record_of("host", "b"), record_of("other", "c")])
        assert [entry.model.name for entry in shown] == ["host", "a", "b", "other", "c"]

    def test_baseline_with_the_weights_of_a_variant_is_left_out(self) -> None:
        shown = shown_models([record_of("host", "a"), record_of("host, tuned", "a, tuned", weights="tuned")])
        assert [(entry.model.name, entry.weights) for entry in shown][2:] == [("a, tuned", "tuned")]

    def test_model_that_is_alone_in_its_record_is_shown(self) -> None:
        shown = shown_models([record_of("host", "a"), record_of("host, tuned", weights="tuned")])
        assert shown[-1].model.name == "host, tuned"

    def test_records_that_do_not_name_weights_have_those_of_the_first(self) -> None:
        assert [entry.weights for entry in shown_models([profile_of(made_up_profile())])] == [None] * 3

    def test_trainings_that_differ_in_their_seed_are_shown_as_one(self) -> None:
        records = [record_of("host", "a"), *(record_of("host", "a, tuned", weights="tuned") for _ in range(2))]
        records = [
            with_accuracies(record, {cost.name: value for cost in record.models}, "five pictures")
            for record, value in zip(records, (80.0, 70.0, 74.0), strict=True)
        ]
        tuned = shown_models(records)[-1]
        assert tuned.accuracies == [70.0, 74.0]
        assert tuned.model.accuracy == Accuracy(72.0, "top-1", "five pictures", "measured here")
