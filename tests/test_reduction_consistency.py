"""Token reduction consistency: the teacher that is drawn, the loss by hand, and a classifier that learns with both."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from garment_classifiers import NANO, build_classifier, garments, train

import effvit
from effvit.hosts.reduction_consistency import LighterTeacher, class_probability, consistency

MCTF = {"method": "mctf", "r": 4}


def reduced(method: str = "mctf", **settings: Any) -> Any:
    torch.manual_seed(0)
    return effvit.sparsify(timm.create_model(NANO), method, **settings).eval()


class TestTeacher:
    @pytest.mark.parametrize(("limit", "found"), [(3, {0, 1, 2}), (0.04, {0, 0.01, 0.02, 0.03}), (1, {0})])
    def test_r_below_the_limit_is_drawn(self, limit: float, found: set[float]) -> None:
        teacher = LighterTeacher(reduced(r=4), limit)
        draws = torch.Generator().manual_seed(0)
        models: list[Any] = [teacher.draw(draws) for _ in range(60)]
        assert {model.settings["r"] for model in models} == found

    def test_it_is_the_model_with_another_r_on_the_same_parameters(self) -> None:
        model = reduced(r=4)
        teacher: Any = LighterTeacher(model, 8).with_r(2)
        assert teacher.token_counts() == reduced(r=2).token_counts()
        assert all(a is b for a, b in zip(model.parameters(), teacher.parameters(), strict=True))
        assert not teacher.training
        assert LighterTeacher(model.train(), 8).with_r(2).training

    @pytest.mark.parametrize("method", ["tome", "vid_tldr"])
    def test_other_methods_with_r_have_one(self, method: str) -> None:
        model = reduced(method, r=2)
        images = torch.randn(2, 1, 28, 28)
        plain = timm.create_model(NANO).eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(LighterTeacher(model, 1).draw()(images), plain(images))

    def test_what_has_no_lighter_form_is_refused(self) -> None:
        with pytest.raises(ValueError, match="evit has no r that could be lower in a teacher"):
            LighterTeacher(reduced("evit"), 4)
        with pytest.raises(TypeError, match=r"made of a model that effvit\.sparsify gave, got VisionTransformer"):
            LighterTeacher(timm.create_model(NANO), 4)
        with pytest.raises(ValueError, match="limit must be above 0"):
            LighterTeacher(reduced(), 0)


class TestConsistency:
    def test_confident_images_alone_count(self) -> None:
        student, teacher = torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        assert consistency(student, teacher, torch.tensor([0.5, 0.3])).item() == (1 + 4) / 2
        assert consistency(student, teacher, torch.tensor([0.5, 0.5])).item() == (2.5 + 25) / 2
        assert consistency(student, teacher, torch.tensor([0.1, 0.4])).item() == 0

    def test_the_student_alone_gets_a_gradient(self) -> None:
        student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
        consistency(student, teacher, torch.ones(2)).backward()
        assert teacher.grad is None
        assert student.grad is not None
        torch.testing.assert_close(student.grad, (student - teacher).detach() * 2 / 3 / 2)

    def test_both_classes_of_a_mixed_image_count(self) -> None:
        scores = torch.tensor([[0.2, 0.5, 0.3]]).log()
        assert class_probability(scores, torch.tensor([[0.7, 0.0, 0.3]])).item() == pytest.approx(0.5)


def build(**options: Any) -> Any:
    return build_classifier("consistency_classifier", "ConsistencyClassifier", **{"sparsify": MCTF, **options})


class TestClassifier:
    @pytest.mark.parametrize("sparsify", [{"method": "mctf", "r": 6}, {"method": "tome", "r": 4}])
    def test_losses_fall_on_garments(self, sparsify: Any) -> None:
        model = build(pretrained=True, sparsify=sparsify, teacher_limit=1)  # r 0 at every draw
        seen = train(model, garments(), lr=1e-4)
        assert seen[0].keys() == {"task_loss", "teacher_loss", "consistency_loss"}
        first, last = ({name: sum(step[name] for step in part) for name in seen[0]} for part in (seen[:3], seen[-3:]))
        assert max(last[name] / first[name] for name in ("task_loss", "teacher_loss")) < 0.8
        assert last["consistency_loss"] < first["consistency_loss"]

    def test_mixed_images_count_by_all_their_classes(self) -> None:
        pytest.importorskip("mmpretrain", reason="the mm extra is not installed")
        from effvit.dense.consistency_classifier import classes_of

        images, samples = garments()
        score = torch.zeros(10)
        score[2], score[7] = 0.25, 0.75
        samples[0].set_gt_score(score)
        assert classes_of(samples[:1], images.new_zeros(1, 10)).nonzero()[:, 1].tolist() == [2, 7]
        assert classes_of(samples[1:2], images.new_zeros(1, 10)).argmax().item() == samples[1].gt_label.item()

    def test_checkpoints_hold_the_model_once(self) -> None:
        model = build()
        model.lighter.draw()
        assert len(model.state_dict()) == len(timm.create_model(NANO).state_dict())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsify": {"method": "evit"}}, "evit has no r that could be lower"),
            ({"teacher_weight": -1.0}, r"must be at least 0, got -1\.0 and 3\.0"),
            ({"confidence": 1.5}, "confidence must be"),
            ({"teacher_limit": 0}, "limit must be above 0"),
        ],
    )
    def test_bad_settings_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build(**options)
