"""The zoo in OpenMMLab: backbone, neck, learning-rate decay by layer and keep-rate schedule for mmengine.

Everything is registered in the root registries of mmengine, so mmdet, mmseg and mmpretrain find it after
``custom_imports = dict(imports=["effvit.openmmlab"])``. Needs the ``mm`` extra; see the README for setting it up.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.checkpoint import get_torch_safe_globals
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import effvit
from effvit.models._checkpoint import adapt_state, check_state, read_checkpoint, read_file
from effvit.models.feature_pyramid import PyramidFeatures, SimpleFeaturePyramid
from effvit.models.host import ReducedHost, check_model_name
from effvit.schedule import check_fraction, cosine_keep_rate

__all__ = ["BFloat16OptimWrapper", "EffViT", "KeepRateHook", "LayerDecayOptimWrapperConstructor", "load_config"]

MODELS.register_module(name="SimpleFeaturePyramid", module=SimpleFeaturePyramid)


def load_config(path: str | Path) -> Config:
    """mmengine's ``Config.fromfile`` for configs that inherit from mmdet's and mmseg's own.

    The maintained fork of mmseg has another distribution name than mmengine looks ``mmseg::`` bases up by. Bases are
    read before anything a config imports, so it has to be told here.
    """
    MODULE2PACKAGE["mmseg"] = "mmseg"
    return Config.fromfile(str(path))


@MODELS.register_module()
class EffViT(BaseModule):
    """Any transformer of effvit or timm as the backbone of a detector or segmenter.

    Images of any size are taken: plain ViTs resample their position embedding and pad to whole patches, and the
    maps of dropped tokens are filled as the setting ``recover`` says.

    Args:
        model_name: A registered name, with a tag if timm's weights of that tag are wanted.
        out_indices: Blocks of a plain ViT or stages of a pyramid whose maps are given; None takes the default of
            ``features_only``. With the setting ``pyramid=True`` levels 0 to 3 (``effvit.models.feature_pyramid``).
        pretrained: True for timm's weights (asks the network), or the path of a checkpoint of timm, of an official
            repository or of this package. Its classifier is left out.
        out_norm: A LayerNorm for each map: the model's own where it has one, else a new one.
        frozen_stages: The stem and that many blocks or stages do not train; 0 freezes the stem, -1 nothing.
        norm_eval: Keep BatchNorm layers in eval mode while training.
        with_cp: Recompute the blocks in the backward pass.
        init_cfg: mmengine's; ``dict(type="Pretrained", checkpoint=..., prefix="backbone.")``, loaded strictly.
        sparsify: "method" and settings of ``effvit.sparsify``, for a host whose reduced form has no name.
        settings: Keywords of ``timm.create_model``: those of the method (``keep_rate``, ``r``, ``recover`` ...) and
            of the model (``img_size``, ``drop_path_rate`` ...).

    Raises:
        ValueError: An unknown name, ``out_indices`` the model does not have, too many frozen stages, a method that
            cannot serve the host, or a checkpoint of another model.
        TypeError: A setting the model does not have.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: int | Sequence[int] | None = None,
        pretrained: bool | str = False,
        out_norm: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        sparsify: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(init_cfg)
        check_model_name(model_name)
        whole, settings = _whole_model(model_name, out_norm, sparsify, settings)
        if out_indices is not None:
            out_indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
            _check_indices(out_indices, 4 if settings.get("pyramid") else len(whole.feature_info), model_name)
        settings["pretrained"] = pretrained is True
        self.features = _create_features(model_name, out_indices, sparsify, settings)
        if isinstance(pretrained, str):
            state, _ = adapt_state(whole, read_checkpoint(pretrained, get_torch_safe_globals())[0])
            check_state(state, self.model, pretrained, known=whole.state_dict().keys())
            self.model.load_state_dict(state, strict=False)
        self.channels: list[int] = self.features.feature_info.channels()
        new_norms = out_norm and "out_norm" not in settings
        self.out_norms = nn.ModuleList(LayerNorm2d(channels) for channels in self.channels) if new_norms else None
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self._freeze()

    @property
    def model(self) -> Any:
        """The timm model inside, cut behind the last map."""
        return self.features.model

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; without one, the weights made or loaded by the constructor stay."""
        for cfg in [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []:
            if cfg["type"] != "Pretrained":
                raise ValueError(
                    f"EffViT takes only an init_cfg of type 'Pretrained', got {cfg['type']!r}; its models initialise "
                    "themselves as published"
                )
            own = _weights_under(cfg["checkpoint"], cfg.get("prefix", "").rstrip("."))
            check_state(own, self, cfg["checkpoint"])
            self.load_state_dict(own)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> one map (B, C_i, H_i, W_i) for each of ``out_indices``."""
        maps = self.features(x)
        if self.out_norms is not None:
            maps = [norm(y) for norm, y in zip(self.out_norms, maps, strict=True)]
        return tuple(maps)

    def train(self, mode: bool = True) -> EffViT:
        """Training mode, except for frozen parts and, with ``norm_eval``, BatchNorm."""
        super().train(mode)
        if mode:
            self._freeze()
            for module in self.modules():
                if self.norm_eval and isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """(layer, number of layers) of a parameter, for layer-wise learning rates (mmpretrain's convention).

        Args:
            param_name: Name of the parameter, under ``prefix``.
            prefix: What the name starts with, e.g. "backbone.".
        """
        layers = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        number = max(layers.values()) + 1
        return layers.get(param_name.removeprefix(prefix).removeprefix("features.model."), number - 1), number

    def _freeze(self) -> None:
        """Stop the gradients of the frozen stages and keep what is frozen whole in eval mode."""
        if self.frozen_stages < 0:
            return
        layers = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        number = len(self.model.feature_info)
        if self.frozen_stages > number:
            raise ValueError(
                f"frozen_stages must be at most {number}, the blocks or stages left in this backbone, got "
                f"{self.frozen_stages}"
            )
        everything = self.frozen_stages == number
        for name, parameter in self.named_parameters():
            layer = layers.get(name.removeprefix("features.model."))
            if everything or (layer is not None and layer <= self.frozen_stages):
                parameter.requires_grad_(False)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


def _weights_under(path: str, prefix: str) -> dict[str, Tensor]:
    """Weights of a checkpoint of mmengine whose names start with the prefix, without it."""
    content = read_file(path, get_torch_safe_globals())
    state = content.get("state_dict", content)
    start = f"{prefix}." if prefix else ""
    own = {name.removeprefix(start): weight for name, weight in state.items() if name.startswith(start)}
    if not own:
        raise ValueError(f"{path} holds no weights under the prefix {prefix!r}; its names start {next(iter(state))!r}")
    return own


def _create_features(
    name: str, out_indices: int | Sequence[int] | None, sparsify: dict[str, Any] | None, settings: dict[str, Any]
) -> Any:
    """timm's ``features_only`` of the model, reduced if asked while it is whole: schedules count all its blocks."""
    getter: Any = PyramidFeatures if settings.get("pyramid") else FeatureGetterNet
    indices: dict[str, Any] = {} if out_indices is None else {"out_indices": out_indices}
    features: dict[str, Any] = {"features_only": True, **indices}
    if getter is FeatureGetterNet:
        features["feature_cls"] = "getter"  # timm's Swin would give NHWC maps by its default
    if sparsify is None:
        return timm.create_model(name, **features, **settings)
    if getter is FeatureGetterNet and out_indices is None:
        with torch.device("meta"):
            indices["out_indices"] = timm.create_model(
                name, **features, **(settings | {"pretrained": False})
            ).out_indices
    own = {key: value for key, value in settings.items() if key != "pyramid"}
    return getter(effvit.sparsify(timm.create_model(name, **own), **sparsify), **indices)


def _whole_model(
    name: str, out_norm: bool, sparsify: dict[str, Any] | None, settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The uncut model without memory, and the settings completed by what lets it take images of any size."""
    own = {key: value for key, value in settings.items() if key != "pyramid"}
    with torch.device("meta"):
        model = timm.create_model(name, **own)
        accepted = {arg for cls in type(model).__mro__ for arg in inspect.signature(cls).parameters}
        extra: dict[str, Any] = {arg: True for arg in ("dynamic_img_size", "dynamic_img_pad") if arg in accepted}
        if out_norm and "out_norm" in accepted:
            extra["out_norm"] = True
        whole = timm.create_model(name, **(extra | own))
        return whole if sparsify is None else effvit.sparsify(whole, **sparsify), extra | settings


def _check_indices(out_indices: int | Sequence[int], number: int, name: str) -> None:
    """Raise a ValueError unless the model has the blocks or stages asked for."""
    indices = [out_indices - 1] if isinstance(out_indices, int) else out_indices
    for index in indices:
        if not -number <= index < number:
            raise ValueError(
                f"out_indices={out_indices} goes beyond the {number} blocks, stages or levels of {name}, "
                f"which are 0 to {number - 1}"
            )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rates for EffViT backbones (BEiT, 2106.08254, as ViTDet uses it).

    ``paramwise_cfg`` takes ``layer_decay_rate`` beside mmengine's own keys: layer l of L of a backbone learns at
    ``rate ** (L - 1 - l)`` of the learning rate, the rest of the model at all of it. Weights of one dimension and those
    the backbone names in ``no_weight_decay`` take no weight decay.

    Raises:
        ValueError: No rate, one outside (0, 1], or a model without EffViT backbone.
    """

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:  # mmengine recurses through this method; the root comes back last
            return
        if "layer_decay_rate" not in self.paramwise_cfg:
            raise ValueError("LayerDecayOptimWrapperConstructor needs paramwise_cfg=dict(layer_decay_rate=...)")
        rate = check_fraction("layer_decay_rate", self.paramwise_cfg["layer_decay_rate"])
        base_lr: Any = self.base_lr
        if base_lr is None:
            raise ValueError("layer-wise learning rates scale the optimizer's lr, which is not set")
        scales, undecayed = _backbone_options(module, rate)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group["params"]
            name = names[id(parameter)]
            group["lr"] = group.get("lr", base_lr) * scales.get(name, 1.0)
            if parameter.ndim <= 1 or name in undecayed:
                group["weight_decay"] = 0.0


def _backbone_options(module: nn.Module, rate: float) -> tuple[dict[str, float], set[str]]:
    """Factors on the learning rate by parameter name, and the names without weight decay."""
    scales: dict[str, float] = {}
    undecayed: set[str] = set()
    backbones = {name: m for name, m in module.named_modules() if isinstance(m, EffViT)}
    if not backbones:
        raise ValueError("layer-wise learning rates need a backbone of type EffViT, and this model has none")
    for path, backbone in backbones.items():
        prefix = f"{path}." if path else ""
        for name, _ in backbone.named_parameters():
            layer, number = backbone.get_layer_depth(name)
            scales[prefix + name] = rate ** (number - 1 - layer)
        undecayed |= {f"{prefix}features.model.{name}" for name in backbone.model.no_weight_decay()}
    return scales, undecayed


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward passes in bfloat16 where that is exact enough, on any device; mmengine's ``AmpOptimWrapper`` has no CPU.

    The range of bfloat16 is that of float32, so the loss needs no scale. Arguments are those of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a step's forward pass."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield


@HOOKS.register_module()
class KeepRateHook(Hook):
    """Lowers the keep rate of reduced models over training (EViT, 2202.07800; see ``cosine_keep_rate``).

    Args:
        keep_rate: Rate to end at, in (0, 1].
        start_epoch: Epochs without reduction at first.
        epochs: Epochs the decrease takes.
    """

    def __init__(self, keep_rate: float, start_epoch: int = 0, epochs: int = 0) -> None:
        self.keep_rate = check_fraction("keep_rate", keep_rate)
        self.start_epoch, self.epochs = start_epoch, epochs

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Set the rate of this iteration."""
        steps = len(runner.train_dataloader)
        rate = cosine_keep_rate(runner.iter, steps, self.keep_rate, self.start_epoch, self.epochs)
        for module in runner.model.modules():
            if isinstance(module, ReducedHost):
                module.set_keep_rate(rate)
