"""Classifiers for mmpretrain: what their loss is, who learns, and what checkpoints hold."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

pytest.importorskip("mmpretrain", reason="the mm extra is not installed")

from mmengine.hooks import EMAHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

from effvit.architectures.sit_distillation import SiTDistillation
from effvit.dense.classifiers import EffViTClassifier, SiTClassifier
from effvit.dense.learnt_pruning import PredictorsFirstHook
from effvit.dense.openmmlab import KeepRateHook

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 7}
HOST = "deit_tiny_patch16_224"
TEACHER = {"model_name": HOST, "pretrained": False, **SMALL}
LVVIT = {"embed_dim": 48, "num_heads": 3, "depth": 4, "img_size": 64, "num_classes": 7}


def build(name: str = f"evit_{HOST}", **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = SMALL if HOST in name else {}
    kind = {"type": "EffViTClassifier", "data_preprocessor": {"num_classes": 7}}
    return MODELS.build({**kind, "model_name": name, **sizes, **settings})


def batch() -> tuple[torch.Tensor, list[Any]]:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return images, [DataSample().set_gt_label(label) for label in (3, 5)]


def step(model: Any) -> None:
    """One step of training on random pictures."""
    wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 0.1}})
    model.train().train_step({"inputs": list(batch()[0]), "data_samples": batch()[1]}, wrapper)


def sit(**settings: Any) -> SiTClassifier:
    torch.manual_seed(0)
    teacher = {"model_name": "lvvit_tiny_4c_224", "pretrained": False, **LVVIT}
    student = {"type": "SiTClassifier", "model_name": "sit_lvvit_tiny_224", "stage_blocks": [1, 3], **LVVIT}
    return MODELS.build({**student, "teacher": teacher, "data_preprocessor": {"num_classes": 7}, **settings})


class TestTeacher:
    def test_loss_is_its_closed_form(self) -> None:
        """task + weight * T^2 * KL(teacher || student) of softmax(scores / T), the mean over the batch."""
        model = build(teacher=TEACHER, distill_weight=0.3, temperature=2.0)
        images, samples = batch()
        losses = model.train().loss(images, samples)
        p, q = ((scores / 2).softmax(1) for scores in (model.model(images), model.teacher(images)))
        assert losses["distill_loss"].item() == pytest.approx(
            0.3 * 4 * (q * (q / p).log()).sum(1).mean().item(), rel=1e-4
        )
        labels = torch.tensor([3, 5])
        assert losses["task_loss"].item() == pytest.approx(
            F.cross_entropy(model.model(images), labels).item(), rel=1e-5
        )
        assert model.parse_losses(losses)[0].item() == pytest.approx(sum(losses.values()).item())

    def test_a_student_like_its_teacher_has_only_the_task_loss(self) -> None:
        model = build(HOST, teacher=TEACHER)
        model.teacher.load_state_dict(model.model.state_dict())
        assert model.loss(*batch())["distill_loss"].item() == pytest.approx(0, abs=1e-6)

    def test_the_student_learns_and_the_teacher_does_not(self) -> None:
        model = build(teacher=TEACHER)
        own, teacher = copy.deepcopy(model.model.state_dict()), copy.deepcopy(model.teacher.state_dict())
        step(model)
        assert not any(torch.equal(own[name], p) for name, p in model.model.named_parameters())
        assert all(torch.equal(teacher[name], p) for name, p in model.teacher.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
        assert not any(module.training for module in model.teacher.modules())

    def test_student_and_teacher_share_no_weight(self) -> None:
        method = {"method": "evit", "keep_rate": 0.5}
        for model in (build(teacher=TEACHER), build(HOST, sparsify=method, teacher=TEACHER), sit()):
            model.init_weights()
            own, taught = ({t.data_ptr() for t in m.state_dict().values()} for m in (model.model, model.teacher))
            assert not own & taught

    def test_neither_checkpoints_nor_optimizers_see_the_teacher(self) -> None:
        plain, taught = build(), build(teacher=TEACHER)
        assert taught.state_dict().keys() == plain.state_dict().keys() == plain.model.state_dict().keys()
        assert len(list(taught.parameters())) == len(list(plain.parameters()))

    def test_the_teacher_follows_a_change_of_dtype(self) -> None:
        model = build(teacher=TEACHER).to(torch.float64)
        assert model.teacher.head.weight.dtype == torch.float64

    def test_keep_rate_hook_reaches_the_student_alone(self) -> None:
        model = build(teacher={**TEACHER, "model_name": f"evit_{HOST}"})
        hook = KeepRateHook(keep_rate=0.5)
        hook.before_train_iter(SimpleNamespace(iter=0, train_dataloader=range(10), model=model), 0)
        rates = [{reducer.keep_rate for reducer in m.reducers.values()} for m in (model.model, model.teacher)]
        assert rates == [{0.5}, {0.7}]

    def test_a_host_may_be_sparsified_after_its_weights_are_loaded(self) -> None:
        model = build("vit_nano_patch4_28", pretrained=True, sparsify={"method": "evit", "keep_rate": 0.5})
        model.init_weights()
        dense = timm.create_model("vit_nano_patch4_28", pretrained=True)
        assert model.model.settings["keep_rate"] == 0.5
        assert torch.equal(model.model.head.weight, dense.head.weight)

    def test_pretrained_weights_are_loaded_once(self) -> None:
        model = build("vit_nano_patch4_28", pretrained=True)
        model.init_weights()
        dense = timm.create_model("vit_nano_patch4_28", pretrained=True)
        assert all(torch.equal(dense.state_dict()[name], value) for name, value in model.state_dict().items())
        torch.nn.init.ones_(model.model.head.bias)
        model.init_weights()
        assert torch.equal(model.model.head.bias, torch.ones(10))

    def test_a_trained_model_asks_for_no_weights_but_its_teacher_does(self, tmp_path: Path) -> None:
        dense = timm.create_model(HOST, **SMALL)
        torch.save(dense.state_dict(), tmp_path / "teacher.pth")
        teacher = {**TEACHER, "pretrained": str(tmp_path / "teacher.pth")}
        trained = build()
        model = build(pretrained="no/such/file.pth", teacher=teacher)
        model.load_state_dict(trained.state_dict())
        scores = [m.eval().predict(batch()[0])[0].pred_score for m in (model, trained)]
        assert torch.equal(*scores)
        with pytest.raises(
            ValueError, match=r"the teacher has random weights: .*teacher.pth' is loaded by init_weights"
        ):
            model(*batch(), mode="loss")
        model.init_weights()
        assert torch.equal(model.model.head.weight, trained.model.head.weight)
        assert torch.equal(model.teacher.head.weight, dense.head.weight)

    def test_weights_that_were_never_loaded_are_missed(self) -> None:
        with pytest.raises(ValueError, match=r"this EffViTClassifier has random weights: pretrained=True is loaded by"):
            build("vit_nano_patch4_28", pretrained=True)(torch.rand(1, 1, 28, 28))

    def test_local_weights_are_loaded(self, tmp_path: Path) -> None:
        dense = timm.create_model(HOST, **SMALL)
        path = str(tmp_path / "dense.pth")
        torch.save({"model": dense.state_dict()}, path)
        model = build(pretrained=path, teacher={**TEACHER, "pretrained": path})
        model.init_weights()
        for loaded in (model.model, model.teacher):
            assert torch.equal(loaded.head.weight, dense.head.weight)

    @pytest.mark.parametrize("missing", ["model_name", "pretrained"])
    def test_teacher_without_name_or_weights_is_refused(self, missing: str) -> None:
        given = {key: value for key, value in TEACHER.items() if key != missing}
        with pytest.raises(ValueError, match=rf"teacher needs '{missing}', got .*the path of a checkpoint"):
            build(teacher=given)

    def test_teacher_of_other_classes_is_refused(self) -> None:
        message = "has 5 classes and the student 7; give both the same 'num_classes'"
        with pytest.raises(ValueError, match=message):
            build(teacher={**TEACHER, "num_classes": 5})

    @pytest.mark.parametrize("part", ["student", "teacher"])
    def test_unknown_name_is_answered_with_the_nearest(self, part: str) -> None:
        misspelt = {**TEACHER, "model_name": "deit_tinny_patch16_224"}
        with pytest.raises(ValueError, match=r"unknown model 'deit_tinny_patch16_224'; .*deit_tiny_patch16_224"):
            build(teacher=misspelt) if part == "teacher" else build(misspelt["model_name"])

    def test_temperature_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
            build(teacher=TEACHER, temperature=0)


class TestHeads:
    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("lookupvit_small_patch16_224", SMALL | {"compressed_grid": 2, "compressed_pos_grid": 2}),
            ("casvit_xs_224", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_classes": 7}),
        ],
    )
    def test_every_head_has_its_loss(self, name: str, settings: dict[str, Any]) -> None:
        model = build(name, **settings).train()
        images, samples = batch()
        heads = model.model(images)
        expected = sum(F.cross_entropy(scores, torch.tensor([3, 5])) for scores in heads)
        assert len(heads) == 2
        assert model.loss(images, samples)["task_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


class TestNorm:
    @pytest.mark.parametrize("norm_eval", [False, True])
    def test_statistics_stay_with_norm_eval_alone(self, norm_eval: bool) -> None:
        small = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_classes": 7}
        model = build("casvit_xs_224", **small, norm_eval=norm_eval)
        before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
        step(model)
        assert before
        assert model.training
        assert all(torch.equal(value, model.get_buffer(name)) == norm_eval for name, value in before.items())

    def test_anything_but_a_switch_is_refused(self) -> None:
        with pytest.raises(TypeError, match="norm_eval must be True or False, got 'yes'"):
            build(norm_eval="yes")


class TestCheckpoints:
    def test_names_are_those_of_the_model_and_load_again(self) -> None:
        model, other = build(), build()
        torch.nn.init.ones_(model.model.head.bias)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.model.head.bias, torch.ones(7))

    @pytest.mark.parametrize("update_buffers", [False, True])
    def test_moving_averages_are_saved_and_resumed(self, update_buffers: bool) -> None:
        model = build()
        hook = EMAHook(momentum=0.5, update_buffers=update_buffers)
        runner: Any = SimpleNamespace(model=model, epoch=0, iter=0, _resume=True)
        hook.before_run(runner)
        step(model)
        hook.after_train_iter(runner, 0)
        step(model)
        hook.after_train_iter(runner, 1)
        trained = model.model.head.weight.detach().clone()
        averaged = hook.ema_model.module.model.head.weight.detach().clone()
        assert not torch.equal(trained, averaged)
        checkpoint = {"state_dict": copy.deepcopy(model.state_dict())}
        hook.before_save_checkpoint(runner, checkpoint)
        assert torch.equal(checkpoint["state_dict"]["head.weight"], averaged)
        resumed: Any = SimpleNamespace(model=build(), epoch=0, iter=0, _resume=True)
        again = EMAHook(momentum=0.5, update_buffers=update_buffers)
        again.before_run(resumed)
        again.after_load_checkpoint(resumed, checkpoint)
        assert torch.equal(again.ema_model.module.model.head.weight, averaged)
        assert torch.equal(checkpoint["state_dict"]["head.weight"], trained)
        assert again.ema_model.steps == 2


class TestSiT:
    def test_student_starts_from_its_teacher_and_learns(self) -> None:
        model = sit()
        model.init_weights()
        assert torch.equal(model.model.head.weight, model.teacher.head.weight)
        before = copy.deepcopy(model.model.state_dict())
        losses = model.train().loss(*batch())
        assert losses.keys() == {"task_loss", "token_loss", "distill_loss"}
        step(model)
        assert all(not torch.equal(before[name], p) for name, p in model.model.named_parameters())

    def test_loss_is_that_of_the_task_for_timm(self) -> None:
        """``SiTDistillation``, which is compared with the official losses.py."""
        model = sit().train()
        task = SiTDistillation(model.model, model.teacher).train()
        images, samples = batch()
        expected = task(images, torch.tensor([3, 5]))["loss"]
        assert model.parse_losses(model.loss(images, samples))[0].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_without_teacher_it_predicts(self) -> None:
        model = sit(teacher=None).eval()
        x = batch()[0]
        assert torch.allclose(model.predict(x)[0].pred_score, model.model(x)[0].softmax(0), atol=1e-6)

    def test_teacher_that_is_no_sit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the teacher is a VisionTransformer and no SiT"):
            sit(teacher=TEACHER)


def test_effvit_classifier_is_mmpretrains() -> None:
    model, x = build().eval(), batch()[0]
    assert isinstance(model, EffViTClassifier)
    assert [sample.pred_label.item() for sample in model.predict(x)] == model.model(x).argmax(1).tolist()


LOST_IN_ROUNDING = "predictor.in_conv.0.weight"  # 1 at first, behind layers near 0 that leave it almost no gradient


class TestDynamicViT:
    """The loss itself is compared with both official codes in golden_dynamicvit.py."""

    def build(self, **settings: Any) -> Any:
        kind = {"type": "DynamicViTClassifier", "reduce_at": (1, 2), "keep_rate": 0.6, "teacher": TEACHER}
        return build(f"dynamicvit_{HOST}", **(kind | settings))

    def test_student_starts_from_its_teacher_and_every_part_learns(self) -> None:
        model = self.build()
        model.init_weights()
        assert torch.equal(model.model.head.weight, model.teacher.head.weight)
        before = copy.deepcopy(model.model.state_dict())
        losses = model.train().loss(*batch())
        assert losses.keys() == {"task_loss", "ratio_loss", "distill_loss", "token_loss"}
        step(model)
        still = [name for name, p in model.model.named_parameters() if torch.equal(before[name], p)]
        assert all(name.endswith(LOST_IN_ROUNDING) for name in still)

    def test_loss_falls(self) -> None:
        """That of two images with given labels, over steps that draw other samples each time."""
        model = self.build()
        model.init_weights()
        wrapper = build_optim_wrapper(model, {"optimizer": {"type": "AdamW", "lr": 2e-3}})
        torch.manual_seed(1)
        totals = []
        for _ in range(30):
            parts = model.train().train_step({"inputs": list(batch()[0]), "data_samples": batch()[1]}, wrapper)
            totals.append(parts["loss"].detach().item())
        assert sum(totals[-5:]) < 0.7 * sum(totals[:5])

    def test_without_teacher_two_losses_are_left(self) -> None:
        losses = self.build(teacher=None).train().loss(*batch())
        assert losses.keys() == {"task_loss", "ratio_loss"}

    def test_other_methods_teachers_and_modes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="evit with these settings learns no decisions"):
            build(type="DynamicViTClassifier")
        with pytest.raises(ValueError, match=r"tokens of one width on one grid, got \{'embed_dim': 48"):
            self.build(teacher={**TEACHER, "embed_dim": 96})
        with pytest.raises(ValueError, match="token_loss must be one of mse, kl, got 'l1'"):
            self.build(token_loss="l1")
        with pytest.raises(ValueError, match=r"in training mode alone; call train\(\)"):
            self.build().eval().loss(*batch())

    def test_predictors_that_share_their_group_are_refused_in_the_first_epochs(self) -> None:
        """Without paramwise_cfg an optimiser has one group of all parameters, whose rate would stay as it is."""
        model = self.build()
        wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 0.1}})
        runner: Any = SimpleNamespace(model=model, epoch=0, optim_wrapper=wrapper)
        hook = PredictorsFirstHook(epochs=1)
        with pytest.raises(
            ValueError, match=r"one group has 20 of their .* others; give optim_wrapper a paramwise_cfg"
        ):
            hook.before_train_iter(runner, 0)
        assert {group["lr"] for group in wrapper.param_groups} == {0.1}
        runner.epoch = 1
        hook.before_train_iter(runner, 0)

    def test_model_without_predictors_is_refused_in_the_first_epochs(self) -> None:
        """All of its rates would be 0."""
        model = build(type="EffViTClassifier")
        wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 0.1}})
        runner: Any = SimpleNamespace(model=model, epoch=0, optim_wrapper=wrapper)
        with pytest.raises(ValueError, match=r"no predictors, .* in EffViTClassifier; leave the hook out"):
            PredictorsFirstHook(epochs=1).before_train_iter(runner, 0)

    def test_predictors_alone_learn_in_the_first_epochs(self) -> None:
        model = self.build()
        paramwise = {"custom_keys": {"model.": {"lr_mult": 0.5}, "reducer.predictor": {"lr_mult": 1.0}}}
        wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 0.1}, "paramwise_cfg": paramwise})
        before = copy.deepcopy(model.model.state_dict())
        runner: Any = SimpleNamespace(model=model, epoch=0, optim_wrapper=wrapper)
        hook = PredictorsFirstHook(epochs=1)
        hook.before_train_iter(runner, 0)
        model.train().train_step({"inputs": list(batch()[0]), "data_samples": batch()[1]}, wrapper)
        hook.after_train_iter(runner, 0)
        moved = {name for name, p in model.model.named_parameters() if not torch.equal(before[name], p)}
        assert all(".reducer.predictor." in name for name in moved)
        assert len(moved) == 2 * 9  # of ten, see LOST_IN_ROUNDING
        assert {group["lr"] for group in wrapper.param_groups} == {0.1, 0.05}
        runner.epoch = 1
        hook.before_train_iter(runner, 1)
        assert {group["lr"] for group in wrapper.param_groups} == {0.1, 0.05}
