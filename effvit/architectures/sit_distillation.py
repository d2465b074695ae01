"""Feature recalibration distillation (FRD): how a self-slimmed ViT learns from its dense teacher (SiT, 2111.12624).

After every block the student's reverse modules rebuild all patch tokens, which are compared with those of the teacher;
the class scores are compared too. Source: losses.py and exp/*/train.sh of Sense-X/SiT@f577808. Deviation: the further
CNN teacher is left out, since the official model for it does not run.

Official recipe: student and teacher start from the teacher's weights, 125 epochs without warm-up, batch 1024, learning
rate 2e-4 for 512 images::

    student.load_state_dict(teacher.state_dict(), strict=False)  # leaves slimming and reverse modules as they are
    task = SiTDistillation(student, teacher)
    task(images, targets)["loss"].backward()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effvit.architectures.sit import LayerTokens, SiT
from effvit.schedule import check_number

__all__ = ["FeatureRecalibrationLoss", "SiTDistillation", "check_pair", "score_loss", "token_loss"]


def score_loss(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """KL divergence of the student's class scores (B, classes) from the teacher's at a temperature, times its square.

    KL(teacher || student), the mean over the batch (DeiT's soft distillation, 2012.12877). No gradient goes to the
    teacher.
    """
    own, target = (F.log_softmax(scores / tau, dim=1) for scores in (student, teacher.detach()))
    return F.kl_div(own, target, reduction="batchmean", log_target=True) * tau**2


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the blocks of the mean squared error between their patch tokens, each (B, N, C).

    Raises:
        ValueError: Other numbers of blocks, or tokens of other shapes.
    """
    for i, (own, target) in enumerate(zip(student, teacher, strict=False)):
        if own.shape != target.shape:
            raise ValueError(
                f"after block {i} the student has tokens of shape {tuple(own.shape)} and the teacher of "
                f"{tuple(target.shape)}; take both from forward_distill, of models of the same size"
            )
    if len(student) != len(teacher):
        raise ValueError(
            f"the student has tokens of {len(student)} blocks and the teacher of {len(teacher)}; give both one depth"
        )
    return torch.stack([F.mse_loss(own, target) for own, target in zip(student, teacher, strict=True)]).mean()


class FeatureRecalibrationLoss(nn.Module):
    """``criterion + token_weight * token_loss + logit_weight * tau^2 * KL``, KL(teacher || student) of the scores.

    Args:
        criterion: Loss of class scores and targets; cross-entropy if None.
        token_weight: Weight of the rebuilt tokens (official ``lambda_token``).
        logit_weight: Weight of the class scores (official ``lambda_logits``).
        tau: Temperature of the class scores.
    """

    def __init__(
        self,
        criterion: nn.Module | None = None,
        *,
        token_weight: float = 2.0,
        logit_weight: float = 2.0,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.token_weight = check_number("token_weight", token_weight)
        self.logit_weight = check_number("logit_weight", logit_weight)
        self.tau = check_number("tau", tau, "positive")

    def forward(self, student: LayerTokens, teacher: LayerTokens, targets: Tensor) -> dict[str, Tensor]:
        """Losses from what both models' ``forward_distill`` returned.

        Args:
            student: The student's scores and rebuilt tokens.
            teacher: The teacher's; no gradient goes there.
            targets: What the criterion takes, such as class numbers (B,).

        Returns:
            Scalars: "loss", the weighted sum, and its unweighted parts "task_loss", "token_loss" and "logit_loss".
        """
        task = self.criterion(student.logits, targets)
        tokens = token_loss(student.tokens, [x.detach() for x in teacher.tokens])
        logits = score_loss(student.logits, teacher.logits, self.tau)
        loss = task + self.token_weight * tokens + self.logit_weight * logits
        return {"loss": loss, "task_loss": task, "token_loss": tokens, "logit_loss": logits}


class SiTDistillation(TrainingTask):
    """Student, frozen teacher and loss in one module, as timm's training tasks.

    The student returns its rebuilt tokens from ``forward`` in train mode from now on (``set_distilled_training``), so
    that DistributedDataParallel and torch.compile may wrap it; in eval mode it returns class scores as before.

    Args:
        student: A SiT created with ``reverse=True``.
        teacher: A dense SiT of the same depth, width, grid and classes; put into eval mode and frozen.
        loss: The loss; FeatureRecalibrationLoss with the published weights if None.

    Raises:
        ValueError: A student that cannot rebuild its tokens, or a teacher that is slimmed or of another size.
    """

    def __init__(self, student: SiT, teacher: SiT, loss: FeatureRecalibrationLoss | None = None) -> None:
        super().__init__(device=next(student.parameters()).device, dtype=next(student.parameters()).dtype)
        check_pair(student, teacher)
        student.set_distilled_training(True)
        self.trainable_module: Any = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.loss = FeatureRecalibrationLoss() if loss is None else loss
        self.compiled_teacher: Callable[[Tensor], LayerTokens] | None = None

    def train(self, mode: bool = True) -> SiTDistillation:
        """Train mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> SiTDistillation:
        """Wrap the student in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile student and teacher; returns the student for validation."""
        settings: dict[str, Any] = {"backend": backend, "mode": mode, **compile_kwargs}
        self.trainable_module = torch.compile(self.trainable_module, **settings)
        self.compiled_teacher = torch.compile(self.teacher.forward_distill, **settings)
        return self.trainable_module

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) and targets -> "loss", "output" (the student's scores) and the parts of the loss.

        Raises:
            RuntimeError: In eval mode, in which the student returns no tokens.
        """
        if not self.training:
            raise RuntimeError(
                "SiTDistillation computes a training loss; call train() first, or the student to validate"
            )
        student = self.trainable_module(input)
        with torch.no_grad():
            teacher = (self.compiled_teacher or self.teacher.forward_distill)(input)
        return self.loss(student, teacher, target) | {"output": student.logits}


def check_pair(student: SiT, teacher: SiT) -> None:
    """Raise a ValueError unless the student's rebuilt tokens can be compared with the teacher's."""
    if student.reverse is None:
        raise ValueError("the student has no reverse modules to rebuild its tokens with; create it with reverse=True")
    if teacher.slimming:
        raise ValueError("the teacher must keep all its tokens, but it is slimmed; create it with stage_blocks=None")
    sizes = [
        {
            "depth": len(model.blocks),
            "embed_dim": model.embed_dim,
            "grid": tuple(model.patch_embed.grid_size),
            "num_classes": model.num_classes,
        }
        for model in (student, teacher)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(f"student and teacher must agree in size, got {sizes[0]} and {sizes[1]}")
