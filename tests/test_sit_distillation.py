"""Feature recalibration distillation: the loss in closed form, and who learns from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from test_sit import images, make
from torch import nn

from effvit.architectures.sit import LayerTokens
from effvit.architectures.sit_distillation import FeatureRecalibrationLoss, SiTDistillation, token_loss

TEACHER = "lvvit_tiny_4c_224"
TARGETS = torch.tensor([3, 5])


def make_task(**kwargs: float) -> SiTDistillation:
    return SiTDistillation(make(reverse=True), make(TEACHER), FeatureRecalibrationLoss(**kwargs)).train()


def test_loss_is_its_closed_form() -> None:
    """losses.py@f577808: cross-entropy + 2 * mean MSE of the blocks + 2 * KL(teacher || student)."""
    student = LayerTokens(torch.randn(2, 7), [torch.randn(2, 16, 4) for _ in range(3)])
    teacher = LayerTokens(torch.randn(2, 7), [torch.randn(2, 16, 4) for _ in range(3)])
    losses = FeatureRecalibrationLoss()(student, teacher, TARGETS)
    p, q = student.logits.softmax(1), teacher.logits.softmax(1)
    task = -p.log()[torch.arange(2), TARGETS].mean()
    tokens = sum((s - t).square().mean() for s, t in zip(student.tokens, teacher.tokens, strict=True)) / 3
    logits = (q * (q / p).log()).sum(1).mean()
    assert losses["task_loss"] == pytest.approx(task.item())
    assert losses["token_loss"] == pytest.approx(tokens.item())
    assert losses["logit_loss"] == pytest.approx(logits.item())
    assert losses["loss"] == pytest.approx((task + 2 * tokens + 2 * logits).item())


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """tau^2 * KL of scores over tau is the same for scores times tau, but for tau^2."""
    tokens = [torch.zeros(2, 4, 3)]
    own, target = torch.randn(2, 7), torch.randn(2, 7)
    hot = FeatureRecalibrationLoss(tau=3.0)(LayerTokens(3 * own, tokens), LayerTokens(3 * target, tokens), TARGETS)
    cold = FeatureRecalibrationLoss()(LayerTokens(own, tokens), LayerTokens(target, tokens), TARGETS)
    assert hot["logit_loss"] == pytest.approx(9 * cold["logit_loss"].item(), rel=1e-5)


def test_a_student_like_its_teacher_has_only_the_task_loss() -> None:
    out = make(TEACHER).forward_distill(images())
    losses = FeatureRecalibrationLoss()(out, out, TARGETS)
    assert losses["token_loss"] == 0
    assert losses["logit_loss"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss"].item() == pytest.approx(losses["task_loss"].item(), abs=1e-6)


def test_gradients_reach_every_parameter_of_the_student_and_none_of_the_teacher() -> None:
    task = make_task()
    before = copy.deepcopy(task.teacher.state_dict())
    result = task(images(), TARGETS)
    assert result["output"].shape == (2, 7)
    result["loss"].backward()
    student = task.trainable_module
    assert not [n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert any(name.startswith("reverse.") for name, _ in student.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert not task.teacher.training
    for name, value in task.teacher.state_dict().items():  # with the statistics of its BatchNorm
        assert torch.equal(value, before[name]), name


def test_plain_training_of_a_student_returns_scores_alone() -> None:
    """Those of the model without the reverse modules, which only distillation reads."""
    model, plain = make(reverse=True), make()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("reverse.")}
    plain.load_state_dict(own)
    assert torch.equal(model.train()(images()), plain.train()(images()))
    task = make_task()
    assert isinstance(task.trainable_module(images()), LayerTokens)
    assert task.trainable_module.eval()(images()).shape == (2, 7)


def test_rebuilt_tokens_are_one_for_each_patch_after_every_block() -> None:
    out = make(reverse=True).forward_distill(images())
    assert [x.shape for x in out.tokens] == [(2, 16, 32)] * 5


def test_learning_lowers_the_loss() -> None:
    task = make_task()
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task(images(), TARGETS)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_checkpointing_and_soft_targets_and_other_criteria_work() -> None:
    task = make_task()
    plain = task(images(), TARGETS)["loss"]
    task.trainable_module.set_grad_checkpointing()
    soft = task(images(), torch.nn.functional.one_hot(TARGETS, 7).float())["loss"]
    assert soft.item() == pytest.approx(plain.item(), rel=1e-5)
    smoothed = FeatureRecalibrationLoss(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert SiTDistillation(make(reverse=True), make(TEACHER), smoothed).train()(images(), TARGETS)["loss"] != plain


def test_weights_of_zero_leave_the_task_loss() -> None:
    result = make_task(token_weight=0.0, logit_weight=0.0)(images(), TARGETS)
    assert result["loss"] == result["task_loss"]


def test_the_task_compiles_and_pickles() -> None:
    task = make_task()
    expected = task(images(), TARGETS)["loss"]
    assert pickle.loads(pickle.dumps(task))(images(), TARGETS)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    task.compile(backend="eager")
    assert task(images(), TARGETS)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_task_runs_under_distributed_data_parallel() -> None:
    task = make_task()
    expected = task(images(), TARGETS)["loss"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        task.prepare_distributed()
        loss = task(images(), TARGETS)["loss"]
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not [name for name, p in task.trainable_module.named_parameters() if p.grad is None]
    assert not [name for name in task.get_checkpoint_state()["state_dict"] if name.startswith(("module.", "teacher."))]


def test_pairs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the student has no reverse modules to rebuild its tokens with; create it with"
    ):
        SiTDistillation(make(), make(TEACHER))
    with pytest.raises(ValueError, match="the teacher must keep all its tokens, but it is slimmed"):
        SiTDistillation(make(reverse=True), make())
    with pytest.raises(ValueError, match="student and teacher must agree in size"):
        SiTDistillation(make(reverse=True), make(TEACHER, num_classes=5))
    with pytest.raises(ValueError, match="this SiT has no reverse modules to rebuild tokens with; create it with"):
        make().forward_distill(images())
    with pytest.raises(RuntimeError, match="SiTDistillation computes a training loss; call train"):
        make_task().eval()(images(), TARGETS)


def test_tokens_that_do_not_fit_are_refused() -> None:
    tokens = [torch.zeros(2, 4, 3)] * 2
    with pytest.raises(
        ValueError, match=r"after block 0 the student has tokens of shape \(2, 4, 3\) and the teacher of"
    ):
        token_loss(tokens, [torch.zeros(2, 5, 3)] * 2)
    with pytest.raises(ValueError, match="the student has tokens of 2 blocks and the teacher of 3"):
        token_loss(tokens, [*tokens, tokens[0]])
    with pytest.raises(ValueError, match="tau must be a positive number, got 0"):
        FeatureRecalibrationLoss(tau=0)
