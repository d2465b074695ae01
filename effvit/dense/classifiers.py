"""Names of the zoo as classifiers of mmpretrain: a loss for each of their heads, and a dense teacher.

Registered in the root registry of mmengine after ``custom_imports = dict(imports=["effvit.dense.classifiers"])``.
mmpretrain itself has students with a distillation token, but no teacher.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmengine", "mm", "effvit.dense.classifiers"):
    import mmengine  # noqa: F401

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_torch_safe_globals
from mmpretrain.models import TimmClassifier
from torch import Tensor, nn

from effvit.architectures.sit import SiT
from effvit.architectures.sit_distillation import check_pair, score_loss, token_loss
from effvit.dense.backbone import keep_statistics, reduce_as
from effvit.dense.openmmlab import StartsPretrained
from effvit.hosts.checkpoints import load_checkpoint
from effvit.hosts.host import check_model_name
from effvit.protocols import Setting
from effvit.schedule import check_number, check_switch

__all__ = ["EffViTClassifier", "SiTClassifier"]


@MODELS.register_module()
class EffViTClassifier(StartsPretrained, TimmClassifier):
    """mmpretrain's ``TimmClassifier`` for models with several heads, for local weights, and with a dense teacher.

    The loss is ``task_loss + distill_weight * KL`` (``score_loss``), each the sum over the heads that the model returns
    in training: one, or two of LookupViT and CAS-ViT. The teacher stays in eval mode, and is no submodule: neither
    optimizer nor checkpoints nor hooks such as ``KeepRateHook`` see it. Unlike with ``TimmClassifier``, pretrained
    weights outlast the start of a training, and ``EMAHook`` works.

    Weights of model and teacher are loaded by ``init_weights``, which the Runner calls before it trains; without a
    Runner call it yourself.

    Args:
        model_name: A name of the zoo or of timm.
        pretrained: True for timm's weights (asks the network), or the path of a checkpoint of timm, of an official
            repository or of this package, which must fit the model.
        pretrained_key: The entry of that file with the weights, where it has those of two networks, e.g. "teacher".
        sparsify: "method" and settings of ``effvit.sparsify``, for a host whose reduced form has no name.
        teacher: ``model_name``, ``pretrained``, perhaps ``pretrained_key``, and keywords of ``timm.create_model`` of
            the teacher; it needs the student's classes, and to take the student's images.
        distill_weight: Weight of the divergence; DynamicViT (2106.02034) has 0.5.
        temperature: What both scores are divided by; DynamicViT has 1. DeiT's soft distillation (2012.12877) has 3, and
            weights of 0.1 for the divergence and 0.9 for the task.
        norm_eval: Keep BatchNorm layers in eval mode while training.
        kwargs: ``loss``, ``train_cfg``, ``with_cp``, ``data_preprocessor`` and ``init_cfg`` of ``TimmClassifier``, and
            keywords of ``timm.create_model``.

    Raises:
        ValueError: An unknown name, a weight or temperature out of range, a teacher without ``pretrained`` or with
            other classes; from ``init_weights``, a checkpoint of another model; from ``forward``, weights that were
            never loaded.
        FileNotFoundError: From ``init_weights``, no checkpoint where ``pretrained`` says.
    """

    model: Any
    teacher: Any = None
    _teacher_recipe: dict[str, Any] | None = None  # until it has its weights

    def __init__(
        self,
        model_name: str,
        pretrained: bool | str = False,
        *,
        pretrained_key: str | None = None,
        sparsify: Mapping[str, Setting] | None = None,
        teacher: dict[str, Any] | None = None,
        distill_weight: float = 0.5,
        temperature: float = 1.0,
        norm_eval: bool = False,
        **kwargs: Any,
    ) -> None:
        check_model_name(model_name)
        super().__init__(model_name, **kwargs)
        self.norm_eval = check_switch("norm_eval", norm_eval)
        own = inspect.signature(TimmClassifier.__init__).parameters
        settings = {name: value for name, value in kwargs.items() if name not in own}
        weights = {"pretrained": pretrained, "pretrained_key": pretrained_key}
        self._recipe: dict[str, Any] = {"model_name": model_name, **weights, "sparsify": sparsify, **settings}
        self.pretrained = pretrained
        self.model = reduce_as(sparsify, self.model)
        self.model.is_init = True  # or mmengine's Runner would call timm's `init_weights` before it trains
        self.distill_weight = check_number("distill_weight", distill_weight)
        self.temperature = check_number("temperature", temperature, "positive")
        if teacher is not None:
            object.__setattr__(self, "teacher", _create_teacher(teacher, self.model))  # not as a submodule
            self._teacher_recipe = teacher if teacher["pretrained"] else None

    def train(self, mode: bool = True) -> EffViTClassifier:
        """Training mode, except for BatchNorm with ``norm_eval``."""
        super().train(mode)
        if self.norm_eval:
            keep_statistics(self)
        return self

    def init_weights(self) -> None:
        """Load the teacher's weights, and those ``pretrained`` and ``init_cfg`` name unless others were loaded."""
        if self._teacher_recipe is not None:
            self.teacher.load_state_dict(_create(**self._teacher_recipe).state_dict())
            self._teacher_recipe = None
        if self._is_init:
            return
        if self.pretrained:
            self.model.load_state_dict(_create(**self._recipe).state_dict())
        super().init_weights()

    def forward(self, inputs: Tensor, data_samples: object = None, mode: str = "tensor") -> object:
        """Scores of images (B, C, H, W), losses or predictions, as the mode of ``TimmClassifier`` says."""
        self.check_weights()
        if mode == "loss" and self._teacher_recipe is not None:
            raise ValueError(
                f"the teacher has random weights: {self._teacher_recipe['pretrained']!r} is loaded by init_weights(), "
                "which mmengine's Runner calls before it trains; call it"
            )
        return super().forward(inputs, data_samples, mode)

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Scalars of images (B, C, H, W): "task_loss", and with a teacher "distill_loss"; mmengine adds them up."""
        return self.losses_of(self.model(inputs), inputs, data_samples, **kwargs)

    def losses_of(
        self, scores: Tensor | tuple[Tensor, ...], inputs: Tensor, data_samples: Sequence[object], **kwargs: object
    ) -> dict[str, Tensor]:
        """``loss`` of scores (B, classes), those of one head or of each, that the model has given to the images."""
        heads = scores if isinstance(scores, tuple) else (scores,)
        losses = {"task_loss": self._task_loss(heads, data_samples, **kwargs)}
        if self.teacher is not None:
            with torch.no_grad():
                target: Tensor = self.teacher(inputs)
            divergence = torch.stack([score_loss(own, target, self.temperature) for own in heads]).sum()
            losses["distill_loss"] = self.distill_weight * divergence
        return losses

    def _task_loss(self, heads: Sequence[Tensor], data_samples: Sequence[object], **kwargs: object) -> Tensor:
        """Sum of the config's loss over scores (B, classes)."""
        losses: list[Tensor] = [self._get_loss(scores, data_samples, **kwargs)["loss"] for scores in heads]
        return torch.stack(losses).sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EffViTClassifier:
        """Change of device or dtype, of the teacher too."""
        if self.teacher is not None:
            self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    # mmpretrain's two hooks take "model." off the names in files. Its own return a new dict, which torch ignores for a
    # module inside another (`EMAHook`), and lose the names of other modules while loading.

    @staticmethod
    def _remove_state_dict_prefix(
        self: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object
    ) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}model.")]:
            state_dict[prefix + name.removeprefix(f"{prefix}model.")] = state_dict.pop(name)

    @staticmethod
    def _add_state_dict_prefix(state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)


@MODELS.register_module()
class SiTClassifier(EffViTClassifier):
    """A self-slimmed ViT that learns from its dense teacher (SiT, 2111.12624).

    See ``effvit.architectures.sit_distillation``.

    The loss is ``task_loss + token_weight * token_loss + distill_weight * KL``. As officially, the student starts from
    the teacher's weights; its slimming and reverse modules are new.

    Args:
        model_name: A SiT; it gets its reverse modules.
        teacher: Its dense teacher, as for ``EffViTClassifier``; None for a model that only predicts.
        token_weight: Weight of the rebuilt tokens (official ``lambda_token``).
        distill_weight: Weight of the class scores (official ``lambda_logits``).
        temperature: Official ``distillation_tau``.
        kwargs: Those of ``EffViTClassifier``.

    Raises:
        ValueError: As ``EffViTClassifier``; a teacher that is no SiT; student and teacher of other sizes.
        TypeError: A model that is no SiT.
    """

    def __init__(
        self,
        model_name: str,
        *,
        teacher: dict[str, Any] | None,
        token_weight: float = 2.0,
        distill_weight: float = 2.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        kwargs |= {"distill_weight": distill_weight, "temperature": temperature, "reverse": True}
        super().__init__(model_name, teacher=teacher, **kwargs)
        self.token_weight = check_number("token_weight", token_weight)
        if self.teacher is not None:
            if not isinstance(self.teacher, SiT):
                raise ValueError(
                    f"the teacher is a {type(self.teacher).__name__} and no SiT, so its tokens cannot be compared; "
                    "take a dense one (lvvit_*_4c_224), or type='EffViTClassifier'"
                )
            check_pair(self.model, self.teacher)

    def init_weights(self) -> None:
        """As ``EffViTClassifier``; a student without ``pretrained`` weights takes those of its teacher."""
        starts = not self._is_init and not self.pretrained
        super().init_weights()
        if starts and self.teacher is not None:
            self.model.load_state_dict(self.teacher.state_dict(), strict=False)

    def loss(self, inputs: Tensor, data_samples: Sequence[object], **kwargs: object) -> dict[str, Tensor]:
        """Scalars of images (B, 3, H, W): "task_loss", and with a teacher "token_loss" and "distill_loss"."""
        if self.teacher is None:
            return super().loss(inputs, data_samples, **kwargs)
        student = self.model.forward_distill(inputs)
        with torch.no_grad():
            teacher = self.teacher.forward_distill(inputs)
        return {
            "task_loss": self._task_loss((student.logits,), data_samples, **kwargs),
            "token_loss": self.token_weight * token_loss(student.tokens, teacher.tokens),
            "distill_loss": self.distill_weight * score_loss(student.logits, teacher.logits, self.temperature),
        }


def _create(
    model_name: str,
    pretrained: bool | str,
    pretrained_key: str | None = None,
    sparsify: Mapping[str, Setting] | None = None,
    **settings: Setting,
) -> nn.Module:
    """A timm model with the weights of a config, reduced if asked."""
    model: nn.Module = timm.create_model(model_name, pretrained=pretrained is True, **settings)
    if isinstance(pretrained, str):
        load_checkpoint(model, pretrained, get_torch_safe_globals(), pretrained_key)
    return reduce_as(sparsify, model)


def _create_teacher(settings: dict[str, Any], student: nn.Module) -> nn.Module:
    """The frozen teacher of a config, of the student's classes; its weights come with ``init_weights``."""
    for key in ("model_name", "pretrained"):
        if key not in settings:
            raise ValueError(
                f"teacher needs {key!r}, got {sorted(settings)}; give a name of the zoo or of timm as 'model_name', "
                "and as 'pretrained' True for its weights or the path of a checkpoint"
            )
    name = settings["model_name"]
    check_model_name(name)
    teacher = _create(**{**settings, "pretrained": False})
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            f"the teacher {name} has {teacher.num_classes} classes and the student {student.num_classes}; give both "
            "the same 'num_classes', and the teacher weights trained for them"
        )
    return teacher.requires_grad_(False).eval()
