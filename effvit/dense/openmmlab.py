"""The zoo in OpenMMLab: backbone, neck, learning-rate decay by layer and keep-rate schedule for mmengine.

Everything is registered in the root registries of mmengine, so mmdet, mmseg and mmpretrain find it after
``custom_imports = dict(imports=["effvit.dense.openmmlab"])``. Needs the ``mm`` extra; see the README for setting it up.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmengine", "mm", "effvit.dense.openmmlab"):
    import mmengine  # noqa: F401

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.checkpoint import get_torch_safe_globals
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

import effvit
import effvit.dense.loading  # registers the transforms that data_checks puts into pipelines
from effvit.hosts.checkpoints import adapt_state, check_state, read_checkpoint, read_file
from effvit.hosts.feature_pyramid import PyramidFeatures, SimpleFeaturePyramid
from effvit.hosts.host import ReducedHost, check_model_name
from effvit.reducers import METHODS
from effvit.schedule import check_fraction, cosine_keep_rate

__all__ = [
    "BFloat16OptimWrapper",
    "EffViT",
    "KeepRateHook",
    "LayerDecayOptimWrapperConstructor",
    "StartsPretrained",
    "load_config",
    "reduce_as",
]

MODELS.register_module(name="SimpleFeaturePyramid", module=SimpleFeaturePyramid)


def load_config(path: str | Path) -> Config:
    """mmengine's ``Config.fromfile`` for configs that inherit from mmdet's and mmseg's own.

    The maintained fork of mmseg has another distribution name than mmengine looks ``mmseg::`` bases up by. Bases are
    read before anything a config imports, so it has to be told here.
    """
    MODULE2PACKAGE["mmseg"] = "mmseg"
    return Config.fromfile(str(path))


def reduce_as(sparsify: Any, model: nn.Module) -> nn.Module:
    """The model reduced as the entry ``sparsify`` of a config says: "method" and its settings, or None for not at all.

    Raises:
        TypeError: Another kind of entry.
        ValueError: An entry without "method", or as ``effvit.sparsify``.
    """
    if sparsify is None:
        return model
    form = 'sparsify must be None or a dict of "method" and its settings, e.g. dict(method="evit", keep_rate=0.5)'
    if not isinstance(sparsify, Mapping):
        raise TypeError(f"{form}, got {sparsify!r}")
    if "method" not in sparsify:
        raise ValueError(f"{form}, got {dict(sparsify)}; add the method")
    return effvit.sparsify(model, **sparsify)


class StartsPretrained:
    """Mixin of mmengine's ``BaseModule``: weights that a config names are loaded by ``init_weights``, once.

    mmengine's Runner calls ``init_weights`` before it trains. What rebuilds a trained model from its config and loads
    its checkpoint (``init_detector``, ``init_model``, ``tools/test.py``) does not, so that neither the network nor the
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as any module; whatever has weights now does not start from others."""
        if any(name.startswith(prefix) for name in state_dict):
            self._is_init = True
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


@MODELS.register_module()
class EffViT(StartsPretrained, BaseModule):
    """Any transformer of effvit or timm as the backbone of a detector or segmenter.

    Images of any size are taken by the models of this package, timm's plain ViTs and timm's Swin: they resample their
    position embedding and pad to whole patches, absolute numbers of tokens bend to the grid, and the maps of dropped
    tokens are filled as the setting ``recover`` says. Two limits: STViT on DeiT needs a patch for each of its semantic
    tokens, 4 x 4 by default, and tables of STViT-Swin (``use_global``, ``relative_pos``) fix the size. Other models of
    timm take the sizes that timm takes.

    Args:
        model_name: A registered name, with a tag if timm's weights of that tag are wanted.
        out_indices: Blocks of a plain ViT or stages of a pyramid whose maps are given; None takes the default of
            ``features_only``. With the setting ``pyramid=True`` levels 0 to 3 (``effvit.hosts.feature_pyramid``).
        pretrained: True for timm's weights (asks the network), or the path of a checkpoint of timm, of an official
            repository or of this package. Its classifier is left out. Loaded by ``init_weights``, which the Runner
            calls before it trains; without a Runner call it yourself.
        out_norm: A LayerNorm for each map: the model's own where it has one, else a new one.
        frozen_stages: The stem and that many blocks or stages do not train; 0 freezes the stem, -1 nothing.
        norm_eval: Keep BatchNorm layers in eval mode while training.
        with_cp: Recompute the blocks in the backward pass.
        init_cfg: mmengine's; ``dict(type="Pretrained", checkpoint=..., prefix="backbone.")``, loaded strictly.
        sparsify: "method" and settings of ``effvit.sparsify``, for a host whose reduced form has no name.
        pretrained_key: The entry of that file with the weights, where it has those of two networks, e.g. "teacher".
        settings: Keywords of ``timm.create_model``: those of the method (``keep_rate``, ``r``, ``recover`` ...) and
            of the model (``img_size``, ``drop_path_rate`` ...).

    Raises:
        ValueError: An unknown name, ``out_indices`` the model does not have, too many frozen stages, a method that
            cannot serve the host; from ``init_weights``, a checkpoint of another model; from ``forward``,
            ``pretrained`` weights that were never loaded.
        TypeError: A setting the model does not have.
        FileNotFoundError: From ``init_weights``, no checkpoint where ``pretrained`` says.
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
        pretrained_key: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(init_cfg)
        check_model_name(model_name)
        whole, settings = _whole_model(model_name, out_norm, sparsify, settings)
        if out_indices is not None:
            out_indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
            _check_indices(out_indices, 4 if settings.get("pyramid") else len(whole.feature_info), model_name)
        self.pretrained, self.pretrained_key = pretrained, pretrained_key
        self._recipe = (model_name, out_indices, sparsify, settings)
        self.features = _create_features(*self._recipe)
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
        """Load what ``pretrained`` and then ``init_cfg`` name, unless weights were loaded already.

        Without either, the weights drawn by the constructor stay.
        """
        if self._is_init:
            return
        if self.pretrained:
            self._load_pretrained(self.pretrained)
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

    def _load_pretrained(self, source: bool | str) -> None:
        """Weights of timm (True) or of a checkpoint for the model inside."""
        name, _, sparsify, settings = self._recipe
        if source is True:
            state = _create_features(*self._recipe, pretrained=True).model.state_dict()
        else:
            whole, _ = _whole_model(name, False, sparsify, settings)
            plain, _ = read_checkpoint(str(source), get_torch_safe_globals(), self.pretrained_key)
            state, _ = adapt_state(whole, plain)
            check_state(state, self.model, str(source), known=whole.state_dict().keys())
        self.model.load_state_dict(state, strict=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> one map (B, C_i, H_i, W_i) for each of ``out_indices``."""
        self.check_weights()
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

        Levels are those of mmpretrain's ViT and Swin, which mmseg and detectron2 share: 0 for the stem and the
        position embeddings, 1 to n for the n blocks this backbone has, n + 1 for what lies behind them, norms of the
        maps and the final norm included. What leads from a stage to the next belongs to the last block of the former.

        Args:
            param_name: Name of the parameter, under ``prefix``.
            prefix: What the name starts with, e.g. "backbone."; parameters of other modules are at the last level.
        """
        layers, last = _layers(self.model)
        name = param_name.removeprefix(prefix).removeprefix("features.model.")
        return layers.get(name, last) if param_name.startswith(prefix) else last, last + 1

    def _freeze(self) -> None:
        """Stop the gradients of the frozen stages and keep what is frozen whole in eval mode."""
        if self.frozen_stages < 0:
            return
        stages = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        number = len(self.model.feature_info)
        if self.frozen_stages > number:
            raise ValueError(
                f"frozen_stages must be at most {number}, the blocks or stages left in this backbone, got "
                f"{self.frozen_stages}"
            )
        everything = self.frozen_stages == number
        for name, parameter in self.named_parameters():
            stage = stages.get(name.removeprefix("features.model."))
            if everything or (stage is not None and stage <= self.frozen_stages):
                parameter.requires_grad_(False)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


def _layers(model: Any) -> tuple[dict[str, int], int]:
    """Levels of a model's parameters, 0 for the stem and from 1 for the blocks, and the level behind the blocks.

    They are read off timm's ``group_matcher``, which differs in two points: it puts the final norm to the last block,
    and a downsampling to the block behind it.
    """
    rules = model.group_matcher(coarse=False)
    downsampling: list[str] = []
    if isinstance(rules, dict):
        own = {
            group: [rule for rule in listed if rule[1] != MATCH_PREV_GROUP]
            for group, listed in rules.items()
            if isinstance(listed, list)
        }
        downsampling = [rule[0] for listed in own.values() for rule in listed if "downsample" in rule[0]]
        rules = rules | own
    behind = "behind the blocks"  # a name that no rule knows
    layers: dict[str, int] = group_with_matcher([*model.named_parameters(), (behind, None)], rules, reverse=True)
    last = layers.pop(behind)
    return {name: layer - any(re.match(rule, name) for rule in downsampling) for name, layer in layers.items()}, last


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
    name: str,
    out_indices: int | Sequence[int] | None,
    sparsify: dict[str, Any] | None,
    settings: dict[str, Any],
    pretrained: bool = False,
) -> Any:
    """timm's ``features_only`` of the model, for images of any size where the model can take them.

    Reduced if asked while it is whole: schedules count all its blocks.
    """
    features = _timm_features(name, out_indices, sparsify, {**settings, "pretrained": pretrained})
    embed = getattr(features.model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and not embed.strict_img_size:  # Swin's windows and merging pad, but it does not
        embed.dynamic_img_pad = True
    return features


def _timm_features(
    name: str, out_indices: int | Sequence[int] | None, sparsify: dict[str, Any] | None, settings: dict[str, Any]
) -> Any:
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
    return getter(reduce_as(sparsify, timm.create_model(name, **own)), **indices)


def _whole_model(
    name: str, out_norm: bool, sparsify: dict[str, Any] | None, settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The uncut model without memory, and the settings completed by what lets it take images of any size."""
    own = {key: value for key, value in settings.items() if key != "pyramid"}
    with torch.device("meta"):
        host, host_settings = _host(name, own)
        model = timm.create_model(host, **host_settings)
        accepted = {arg for cls in type(model).__mro__ for arg in inspect.signature(cls).parameters}
        extra: dict[str, Any] = {arg: True for arg in ("dynamic_img_size", "dynamic_img_pad") if arg in accepted}
        if out_norm and "out_norm" in accepted:
            extra["out_norm"] = True
        whole = timm.create_model(name, **(extra | own))
        return reduce_as(sparsify, whole), extra | settings


def _host(name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model that a reduced one of the zoo is made of, and its settings; of any other name what is given.

    The host can be built whatever its image size, while numbers of tokens may be for another.
    """
    known = {setting for reducer in METHODS.values() for setting in reducer.defaults()} | {"recover"}
    for method in METHODS:
        host = name.removeprefix(f"{method}_")
        if host != name and timm.is_model(host.partition(".")[0]):
            return host, {key: value for key, value in settings.items() if key not in known}
    return name, settings


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
