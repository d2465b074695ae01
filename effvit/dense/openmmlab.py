"""The zoo in OpenMMLab: backbone, neck, learning-rate decay by layer and keep-rate schedule for mmengine.

Everything is registered in the root registries of mmengine, so mmdet, mmseg and mmpretrain find it after
``custom_imports = dict(imports=["effvit.dense.openmmlab"])``. Needs the ``mm`` extra; see the README for setting it up.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmengine", "mm", "effvit.dense.openmmlab"):
    import mmengine  # noqa: F401
with optional("mmcv", "mm", "effvit.dense.openmmlab"):
    import mmcv  # noqa: F401

import copy
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.checkpoint import get_torch_safe_globals
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

import effvit.dense.loading  # noqa: F401  (registers the transforms that data_checks puts into pipelines)
from effvit.dense.backbone import DenseBackbone
from effvit.dense.shipped_configs import PREFIX, find_config
from effvit.hosts.checkpoints import check_state, read_file
from effvit.hosts.feature_pyramid import SimpleFeaturePyramid
from effvit.hosts.host import ReducedHost
from effvit.messages import plain
from effvit.schedule import check_fraction, cosine_keep_rate

__all__ = [
    "BFloat16OptimWrapper",
    "EffViT",
    "KeepRateHook",
    "LayerDecayOptimWrapperConstructor",
    "StartsPretrained",
    "TrainedOptimWrapperConstructor",
    "load_config",
]

MODELS.register_module(name="SimpleFeaturePyramid", module=SimpleFeaturePyramid)

InitCfg: TypeAlias = dict[str, str]


class ParamGroup(TypedDict, total=False):
    """Parameters that an optimizer treats alike, as torch has it."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


class TrainingRunner(Protocol):
    """What is asked of mmengine's Runner while it trains."""

    model: nn.Module
    train_dataloader: Sized
    iter: int


def load_config(path: str | Path) -> Config:
    """mmengine's ``Config.fromfile`` for configs that inherit from mmdet's and mmseg's own.

    The maintained fork of mmseg has another distribution name than mmengine looks ``mmseg::`` bases up by. Bases are
    read before anything a config imports, so it has to be told here.

    Args:
        path: A file, or ``effvit::NAME`` for a config of this package (``effvit configs list``).

    Raises:
        FileNotFoundError: No such file, or no config of that name here or among the bases.
        ImportError: A module of the config's ``custom_imports`` that is missing.
    """
    MODULE2PACKAGE["mmseg"] = "mmseg"
    file = find_config(str(path).removeprefix(PREFIX)) if str(path).startswith(PREFIX) else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no config at {plain(path)}; those of the package are written {PREFIX}NAME, and `effvit configs list` "
            "prints their names"
        )
    try:
        return Config.fromfile(str(file))
    except ImportError as error:
        missing = _missing_module(error)
        if missing.split(".")[0] != "data":  # tools/data: what the package's own configs import from outside of it
            raise
        raise ImportError(
            f"{path} imports a module of {missing!r}, a folder that only tools/ of a checkout of effvit holds; run "
            "tools/train.py or tools/test.py of the checkout, or put its tools/ on PYTHONPATH"
        ) from error


def _missing_module(error: BaseException | None) -> str:
    """Name of the module that was not found, somewhere among the causes of an error; "" for any other error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name or ""
        error = error.__cause__ or error.__context__
    return ""


_find_theirs = Config._get_cfg_path


def _find_base(base: str, filename: str) -> tuple[str, str | None]:
    """Path and scope of a base, also of one written ``effvit::NAME``.

    It takes the place of ``Config._get_cfg_path`` of mmengine (0.10), a static method that turns each entry of
    ``_base_`` into a path and a scope. There is no other way in: what it does for ``mmdet::`` needs a folder ``.mim``
    inside the package, which a checkout does not have, and gives parts of the base the package's name as a scope, in
    which mmengine would look for registries of effvit's. Scope None means, as for a file beside the config, that the
    base's own ``default_scope`` holds.
    """
    if base.startswith(PREFIX):
        return str(find_config(base.removeprefix(PREFIX))), None
    path: tuple[str, str | None] = _find_theirs(base, filename)
    return path


Config._get_cfg_path = staticmethod(_find_base)


class StartsPretrained:
    """Mixin of mmengine's ``BaseModule``: weights that a config names are loaded by ``init_weights``, once.

    mmengine's Runner calls ``init_weights`` before it trains. What rebuilds a trained model from its config and loads
    its checkpoint (``init_detector``, ``init_model``, ``effvit test``) does not, so that neither the network nor the
    file is asked for weights that would be overwritten. A model that got neither refuses to run.

    Attributes:
        pretrained: True for timm's weights, the path of a checkpoint, or False.
    """

    pretrained: bool | str
    _is_init: bool

    if TYPE_CHECKING:  # what mmengine's class brings along

        def init_weights(self) -> None: ...

    def check_weights(self) -> None:
        """Raise a ValueError while the weights that ``pretrained`` names are not there, nor others in their place."""
        if self.pretrained and not self._is_init:
            raise ValueError(
                f"this {type(self).__name__} has random weights: pretrained={self.pretrained!r} is loaded by "
                "init_weights(), which mmengine's Runner calls before it trains; call it, or load a checkpoint"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Load as any module; whatever has weights now does not start from others."""
        if any(name.startswith(prefix) for name in state_dict):
            self._is_init = True
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


@MODELS.register_module()
class EffViT(StartsPretrained, DenseBackbone, BaseModule):
    """``effvit.dense.backbone.DenseBackbone`` as a backbone of mmdet and mmseg.

    Args:
        model_name: As ``DenseBackbone``.
        out_indices: As ``DenseBackbone``.
        output_cls_token: Give (map, class token (B, C)) for each of ``out_indices``, as mmseg's ``DPTHead`` takes them.
        init_cfg: mmengine's; ``dict(type="Pretrained", checkpoint=..., prefix="backbone.")``, loaded strictly.
        options: Further keywords of ``DenseBackbone``. ``pretrained`` is loaded by ``init_weights``, which the Runner
            calls before it trains; without a Runner call it yourself.

    Raises:
        ValueError: As ``DenseBackbone``; ``output_cls_token`` where there is none, or beside what changes the maps
            alone; from ``forward``, ``pretrained`` weights that were never loaded.
        TypeError: As ``DenseBackbone``.
        FileNotFoundError: From ``init_weights``, no checkpoint where ``pretrained`` says.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: int | Sequence[int] | None = None,
        *,
        output_cls_token: bool = False,
        init_cfg: InitCfg | list[InitCfg] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name, out_indices, **options)
        self.output_cls_token = output_cls_token
        if output_cls_token:
            self.check_class_token()
        self.init_cfg = copy.deepcopy(init_cfg)  # as BaseModule, which is built without it

    def init_weights(self) -> None:
        """Load what ``pretrained`` and then ``init_cfg`` name, unless weights were loaded already.

        Without either, the weights drawn by the constructor stay.
        """
        if self._is_init:
            return
        self.load_pretrained(get_torch_safe_globals())
        for cfg in [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []:
            if cfg["type"] != "Pretrained":
                raise ValueError(
                    f"EffViT takes only an init_cfg of type 'Pretrained', got {cfg['type']!r}; its models "
                    "initialise themselves"
                )
            own = _weights_under(cfg["checkpoint"], cfg.get("prefix", "").rstrip("."))
            check_state(own, self, cfg["checkpoint"])
            self.load_state_dict(own)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:  # type: ignore[override]
        """Images (B, 3, H, W) -> one map (B, C_i, H_i, W_i), or a pair, for each of ``out_indices``."""
        self.check_weights()
        return self.forward_with_class_token(x) if self.output_cls_token else super().forward(x)


def _weights_under(path: str, prefix: str) -> dict[str, Tensor]:
    """Weights of a checkpoint of mmengine whose names start with the prefix, without it."""
    content = read_file(path, get_torch_safe_globals())
    state: Mapping[str, Tensor] = content.get("state_dict", content)
    start = f"{prefix}." if prefix else ""
    own = {name.removeprefix(start): weight for name, weight in state.items() if name.startswith(start)}
    if not own:
        raise ValueError(f"{path} holds no weights under the prefix {prefix!r}; its names start {next(iter(state))!r}")
    return own


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TrainedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor for what trains: modules that are frozen whole never reach the optimizer.

    Without a ``paramwise_cfg`` mmengine hands it every parameter, and with one it warns of each frozen one by a line in
    the log.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        # An empty paramwise_cfg would be none, and mmengine would not look at single parameters.
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"custom_keys": {}})

    def add_params(
        self, params: list[ParamGroup], module: nn.Module, prefix: str = "", is_dcn_module: int | float | None = None
    ) -> None:
        if any(parameter.requires_grad for parameter in module.parameters()):
            super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rates for EffViT backbones (BEiT, 2106.08254, as ViTDet uses it).

    ``paramwise_cfg`` takes ``layer_decay_rate`` beside mmengine's own keys: layer l of L of a backbone
    (``EffViT.get_layer_depth``) learns at ``rate ** (L - 1 - l)`` of the learning rate, so that the last block has
    ``rate`` and the stem ``rate ** (blocks + 1)`` of it; the rest of the model learns at all of it.

    Weights of one dimension and those the backbone names in ``no_weight_decay`` take no weight decay, as in BEiT,
    unless ``norm_decay_mult``, ``bias_decay_mult`` or, for what is neither, ``flat_decay_mult`` says otherwise, or the
    ``decay_mult`` of a custom key.

    Raises:
        ValueError: No rate, one outside (0, 1], or a model without EffViT backbone.
    """

    def add_params(
        self, params: list[ParamGroup], module: nn.Module, prefix: str = "", is_dcn_module: int | float | None = None
    ) -> None:
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:  # mmengine recurses through this method; the root comes back last
            return
        if "layer_decay_rate" not in self.paramwise_cfg:
            raise ValueError("LayerDecayOptimWrapperConstructor needs paramwise_cfg=dict(layer_decay_rate=...)")
        rate = check_fraction("layer_decay_rate", self.paramwise_cfg["layer_decay_rate"])
        base_lr: float | None = self.base_lr
        if base_lr is None:
            raise ValueError("layer-wise learning rates scale the optimizer's lr, which is not set")
        scales, undecayed = _backbone_options(module, rate)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group["params"]
            name = names[id(parameter)]
            group["lr"] = group.get("lr", base_lr) * scales.get(name, 1.0)
            if (parameter.ndim <= 1 or name in undecayed) and not self._names_decay(name):
                group["weight_decay"] = (self.base_wd or 0.0) * self._decay_mult(module, name, name in undecayed)

    def _names_decay(self, name: str) -> bool:
        """Whether the custom key that holds for a parameter, the longest in its name, sets its weight decay."""
        keys = [key for key in self.paramwise_cfg.get("custom_keys", {}) if key in name]
        return bool(keys) and "decay_mult" in self.paramwise_cfg["custom_keys"][max(sorted(keys), key=len)]

    def _decay_mult(self, module: nn.Module, name: str, table: bool) -> float:
        """Factor on the weight decay of a vector of the model, or of a table that its backbone exempts."""
        owner, _, own_name = name.rpartition(".")
        key = "flat_decay_mult"
        if isinstance(module.get_submodule(owner), (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)):
            key = "norm_decay_mult"
        elif own_name == "bias":
            key = "bias_decay_mult"
        return 0.0 if table else self.paramwise_cfg.get(key, 0.0)


def _backbone_options(module: nn.Module, rate: float) -> tuple[dict[str, float], set[str]]:
    """Factors on the learning rate by parameter name, and the names without weight decay."""
    scales: dict[str, float] = {}
    undecayed: set[str] = set()
    backbones = {name: m for name, m in module.named_modules() if isinstance(m, DenseBackbone)}
    if not backbones:
        raise ValueError("layer-wise learning rates need a backbone of type EffViT, and this model has none")
    for path, backbone in backbones.items():
        prefix = f"{path}." if path else ""
        for name, _ in backbone.named_parameters():
            layer, number = backbone.get_layer_depth(name)
            scales[prefix + name] = rate ** (number - 1 - layer)
        undecayed |= {prefix + name for name in backbone.no_weight_decay()}
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

    def before_train_iter(self, runner: TrainingRunner, batch_idx: int, data_batch: object = None) -> None:
        """Set the rate of this iteration."""
        steps = len(runner.train_dataloader)
        rate = cosine_keep_rate(runner.iter, steps, self.keep_rate, self.start_epoch, self.epochs)
        for module in runner.model.modules():
            if isinstance(module, ReducedHost):
                module.set_keep_rate(rate)
