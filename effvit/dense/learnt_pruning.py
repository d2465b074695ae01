"""DynamicViT as a classifier of mmpretrain: its losses, with a dense teacher (arXiv 2106.02034).

Registered in the root registry of mmengine after ``custom_imports = dict(imports=["effvit.dense.learnt_pruning"])``.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmengine", "mm", "effvit.dense.learnt_pruning"):
    import mmengine  # noqa: F401

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from effvit.architectures.sit_distillation import score_loss
from effvit.dense.classifiers import EffViTClassifier
from effvit.hosts.learnt_pruning import check_learns_to_prune, dense_output, pruned_output
from effvit.reducers.dynamicvit import kept_token_loss, ratio_loss
from effvit.schedule import check_choice, check_count, check_number

__all__ = ["DynamicViTClassifier", "PredictorsFirstHook"]


@MODELS.register_module()
class DynamicViTClassifier(EffViTClassifier):
    """A ViT that learns which patches to drop, perhaps from its dense self (DynamicViT, 2106.02034, section 3.3).

    The loss is ``task_loss + ratio_weight * ratio_loss + distill_weight * KL + token_weight * token_loss``, the last
    two with a teacher alone. As officially, a student without ``pretrained`` weights starts from the teacher's; its
    predictors are new. The learning rates of the recipe (losses.py and optim_factory.py of
    raoyongming/DynamicViT@1322e62) are the config's.

    Args:
        model_name: A name of the zoo; or one of timm, with ``sparsify``.
        teacher: The dense host, as for ``EffViTClassifier``; None: the model learns from its labels alone.
        ratio_weight: Weight of the distance of the shares kept from their rates; officially 2, for DeiT-B 5.
        distill_weight: Weight of the class scores.
        token_weight: Weight of the patch tokens that are left.
        token_loss: "mse", as officially for DeiT, or "kl", as for LV-ViT.
        kwargs: Those of ``EffViTClassifier``.

    Raises:
        ValueError: As ``EffViTClassifier``; another method than dynamicvit, or a teacher of another width or grid.
        TypeError: A model that is no plain host, or a teacher that is none.
    """

    def __init__(
        self,
        model_name: str,
        *,
        teacher: dict[str, Any] | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        token_weight: float = 0.5,
        token_loss: str = "mse",
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, teacher=teacher, distill_weight=distill_weight, **kwargs)
        self.ratio_weight = check_number("ratio_weight", ratio_weight)
        self.token_weight = check_number("token_weight", token_weight)
        check_choice("token_loss", token_loss, ("mse", "kl"))
        self.token_kind = token_loss
        check_learns_to_prune(self.model)
        if self.teacher is not None:
            check_teacher(self.model, self.teacher)

    def init_weights(self) -> None:
        """As ``EffViTClassifier``; a student without ``pretrained`` weights takes those of its teacher."""
        starts = not self._is_init and not self.pretrained
        super().init_weights()
        if starts and self.teacher is not None:
            self.model.load_state_dict(self.teacher.state_dict())

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Scalars of images (B, 3, H, W): "task_loss", "ratio_loss", with a teacher "distill_loss" and "token_loss"."""
        student = pruned_output(self.model, inputs)
        losses = {
            "task_loss": self._task_loss((student.logits,), data_samples, **kwargs),
            "ratio_loss": self.ratio_weight * ratio_loss(student.decisions, student.rates),
        }
        if self.teacher is None:
            return losses
        with torch.no_grad():
            teacher = dense_output(self.teacher, inputs)
        tokens = kept_token_loss(student.tokens, teacher.tokens, student.decisions[-1], self.token_kind)
        return losses | {
            "distill_loss": self.distill_weight * score_loss(student.logits, teacher.logits, self.temperature),
            "token_loss": self.token_weight * tokens,
        }


def check_teacher(student: Any, teacher: Any) -> None:
    """Raise a ValueError unless the teacher's patch tokens can be compared with the student's."""
    sizes = [{"embed_dim": model.embed_dim, "grid": tuple(model.patch_embed.grid_size)} for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"student and teacher must have tokens of one width on one grid, got {sizes[0]} and {sizes[1]}; give the "
            "dense host of the student as its teacher"
        )


@HOOKS.register_module()
class PredictorsFirstHook(Hook):
    """All learning rates but those of the predictors are 0 in the first epochs (DynamicViT's fix_step).

    A rate is what its schedule makes of it again behind each step, since schedules go on from the rate that is there.
    The predictors need groups of parameters of their own, as ``paramwise_cfg`` makes them.

    Args:
        epochs: How many.
    """

    def __init__(self, epochs: int = 5) -> None:
        self.epochs = check_count("epochs", epochs)
        self.rates: list[tuple[dict[str, Any], float]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: object = None) -> None:
        """Set the rates to 0.

        Raises:
            ValueError: No predictors, or some in one group of parameters with others, which have one rate.
        """
        if runner.epoch >= self.epochs:
            return
        for group in groups_of_others(runner.model, runner.optim_wrapper.param_groups):
            self.rates.append((group, group["lr"]))
            group["lr"] = 0.0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: object = None, outputs: object = None) -> None:
        """Set them to what they were."""
        for group, rate in self.rates:
            group["lr"] = rate
        self.rates = []


def groups_of_others(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of an optimiser without predictors; errors as for ``PredictorsFirstHook.before_train_iter``."""
    named = model.named_parameters()
    predictors = {id(parameter) for name, parameter in named if ".reducer.predictor." in name}
    if not predictors:
        raise ValueError(
            f"there are no predictors, which alone learn in the first epochs, in {type(model).__name__}; leave the "
            "hook out, or train a model of the method 'dynamicvit'"
        )
    others = []
    for group in groups:
        members = {id(parameter) for parameter in group["params"]}
        if members.isdisjoint(predictors):
            others.append(group)
        elif not members <= predictors:
            raise ValueError(
                "predictors need parameter groups of their own, so that the rates of all else can be 0, but one group "
                f"has {len(members & predictors)} of their parameters and {len(members - predictors)} others; give "
                "optim_wrapper a paramwise_cfg, such as "
                'dict(custom_keys={"reducer.predictor": dict(lr_mult=1.0)})'
            )
    return others
