"""Transformers of effvit and timm as backbones of detectors and segmenters, whatever framework those are of.

The adapters (``openmmlab``, ``detectron2``, ``transformers``) only translate: names, weights, frozen stages, levels of
the learning rate and the keywords that make a backbone again are decided here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from typing import NamedTuple, Protocol, TypeAlias, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import effvit
from effvit.hosts._foreign_configs import check_config
from effvit.hosts.checkpoints import adapt_state, check_state, read_checkpoint
from effvit.hosts.feature_pyramid import PyramidFeatures
from effvit.hosts.foreign_names import find_tower
from effvit.hosts.host import HOST_CLASSES, check_model_name
from effvit.hosts.surface import Reduced
from effvit.protocols import Setting, Settings
from effvit.reducers import METHODS, Reducer

__all__ = ["DenseBackbone", "Features", "Recipe", "Trunk", "keep_statistics", "reduce_as"]

DROPS = re.compile(r"drop(_path)?_rate$")  # settings of timm's dropouts, by weight, token, path or whole patch

# What timm's `group_matcher` gives: rules by group, each a pattern or (pattern, suffix) pairs; or a function of names.
Rule: TypeAlias = "tuple[str, tuple[int, ...] | None]"
Rules: TypeAlias = "Mapping[str, str | Sequence[Rule] | None] | Callable[[str], object]"


class Trunk(Protocol):
    """What is asked of a timm model that gives maps."""

    feature_info: Sequence[Mapping[str, int | str]]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def group_matcher(self, coarse: bool = False) -> Rules: ...
    def no_weight_decay(self) -> AbstractSet[str]: ...
    def set_grad_checkpointing(self, enable: bool = True) -> None: ...
    def forward_intermediates(self, x: Tensor, /, **options: object) -> Sequence[tuple[Tensor, Tensor]]: ...


class FeatureInfo(Protocol):
    """timm's table of the maps that a backbone gives."""

    def channels(self) -> list[int]: ...
    def reduction(self) -> list[int]: ...
    def module_name(self) -> list[str]: ...


class Features(Protocol):
    """timm's ``features_only`` form of a model."""

    model: Trunk
    feature_info: FeatureInfo
    out_indices: Sequence[int]

    def __call__(self, x: Tensor, /) -> list[Tensor]: ...


class Recipe(NamedTuple):
    """What a backbone is made of.

    Attributes:
        model_name: timm's name.
        out_indices: Blocks, stages or levels whose maps are given; None takes the model's default.
        sparsify: "method" and its settings for a host without a reduced name, else None.
        final_norm: The model's final norm is applied to every map.
        settings: Keywords of ``timm.create_model``.
    """

    model_name: str
    out_indices: int | tuple[int, ...] | None
    sparsify: Mapping[str, Setting] | None
    final_norm: bool
    settings: Settings


def keep_statistics(model: nn.Module) -> None:
    """Put the BatchNorm layers of a model in training mode into eval mode (``norm_eval``)."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def reduce_as(sparsify: object, model: nn.Module) -> nn.Module:
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


class DenseBackbone(nn.Module):
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
            repository or of this package. Its classifier is left out. Loaded by ``load_pretrained``, not here.
        pretrained_key: The entry of that file with the weights, where it has those of two networks, e.g. "teacher".
        out_norm: A LayerNorm for each map: the model's own where it has one, else a new one.
        final_norm: The pretrained final norm of a plain ViT on each map, as DINOv2 (2304.07193) and DINOv3 (2508.10104)
            read theirs.
        frozen: The whole backbone stays as it is, for heads on pretrained weights: it runs without gradients, not even
            for the images, and in eval mode whatever the rest of the model does.
        frozen_stages: The stem and that many blocks or stages do not train; 0 freezes the stem, -1 nothing.
        norm_eval: Keep BatchNorm layers in eval mode while training.
        with_cp: Recompute the blocks in the backward pass.
        centre_padding: Pad images to whole patches with the same on opposite sides, an odd pixel more below and on the
            right, as DINOv2's dense evaluations do (``CenterPadding`` of dinov2/hub/utils.py@b8931f7), in place of all
            of it below and on the right. Not for detectors, whose boxes are measured from the corner of the image.
        sparsify: "method" and settings of ``effvit.sparsify``, for a host whose reduced form has no name.
        settings: Keywords of ``timm.create_model``: those of the method (``keep_rate``, ``r``, ``recover`` ...) and
            of the model (``img_size``, ``drop_path_rate`` ...).

    Attributes:
        channels: Channels of each map.
        strides: Pixels of an image for each position of each map.
        map_names: timm's names of the blocks or stages that the maps are of.
        pretrained: As given.

    Raises:
        ValueError: An unknown name, ``out_indices`` the model does not have, too many frozen stages, a method that
            cannot serve the host, ``frozen`` beside what only training uses or makes good, ``final_norm`` or
            ``centre_padding`` on a model without such a norm or patches; from ``load_pretrained``, a checkpoint of
            another model.
        TypeError: A setting the model does not have.
        FileNotFoundError: From ``load_pretrained``, no checkpoint where ``pretrained`` says.
    """

    features: Features
    out_norms: nn.ModuleList | None

    def __init__(
        self,
        model_name: str,
        out_indices: int | Sequence[int] | None = None,
        *,
        pretrained: bool | str = False,
        pretrained_key: str | None = None,
        out_norm: bool = False,
        final_norm: bool = False,
        frozen: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        centre_padding: bool = False,
        sparsify: Mapping[str, Setting] | None = None,
        **settings: Setting,
    ) -> None:
        super().__init__()
        check_model_name(model_name)
        whole, settings = _whole_model(model_name, out_norm, sparsify, settings)
        if out_indices is not None:
            out_indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
            number = 4 if settings.get("pyramid") else len(cast(Trunk, whole).feature_info)
            _check_indices(out_indices, number, model_name)
        if final_norm:
            _check_final_norm(whole, out_norm, model_name)
        self.pretrained, self.pretrained_key = pretrained, pretrained_key
        self._recipe = Recipe(model_name, out_indices, sparsify, final_norm, settings)
        self.features = _create_features(self._recipe)
        info = self.features.feature_info
        self.channels, self.strides, self.map_names = info.channels(), info.reduction(), info.module_name()
        new_norms = out_norm and "out_norm" not in settings
        self.out_norms = nn.ModuleList(LayerNorm2d(channels) for channels in self.channels) if new_norms else None
        self.out_norm, self.frozen_stages, self.norm_eval, self.with_cp = out_norm, frozen_stages, norm_eval, with_cp
        self.frozen = frozen
        self.padded_patch = _patch_size(self.model, model_name) if centre_padding else None
        if frozen:
            _refuse_training(self, settings)
        if with_cp:
            self.features.model.set_grad_checkpointing(True)
        self._freeze()

    @property
    def model(self) -> nn.Module:
        """The timm model inside, cut behind the last map."""
        return self.get_submodule("features.model")

    def load_pretrained(self, allowed: Sequence[type] = ()) -> None:
        """Load the weights that ``pretrained`` names, if any, into the model inside.

        Args:
            allowed: Types that a file may hold besides weights and plain values.
        """
        if not self.pretrained:
            return
        if self.pretrained is True:
            state = _create_features(self._recipe, pretrained=True).model.state_dict()
        else:
            name, _, sparsify, _, settings = self._recipe
            whole, _ = _whole_model(name, False, sparsify, settings)
            plain, _ = read_checkpoint(self.pretrained, allowed, self.pretrained_key)
            if find_tower(plain) is not None:
                check_config(self.pretrained, whole)
            state, _ = adapt_state(whole, plain)
            check_state(state, self.model, self.pretrained, known=whole.state_dict().keys())
        self.model.load_state_dict(state, strict=False)

    def options(self) -> Settings:
        """Keywords that make this backbone again, without its weights: JSON-plain, those of the method as they now are.

        Schedules and ``effvit.calibrate`` change a method after it was made; what is saved beside the weights must say
        so.
        """
        name, out_indices, sparsify, final_norm, settings = self._recipe
        model = self.model
        if isinstance(model, Reduced):
            now: Settings = {"recover": model.recover, **model.settings}
            if sparsify is None:
                settings = settings | now
            else:
                sparsify = {"method": model.method, **now}
        own: Settings = {"out_norm": self.out_norm, "final_norm": final_norm, "frozen": self.frozen}
        own |= {"frozen_stages": self.frozen_stages, "norm_eval": self.norm_eval, "with_cp": self.with_cp}
        own |= {"centre_padding": self.padded_patch is not None, "sparsify": sparsify}
        return {"model_name": name, "out_indices": out_indices, **own, **settings}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> one map (B, C_i, H_i, W_i) for each of ``out_indices``."""
        with torch.no_grad() if self.frozen else nullcontext():
            maps = self.features(self._pad(x))
            if self.out_norms is not None:
                maps = [norm(y) for norm, y in zip(self.out_norms, maps, strict=True)]
            return tuple(maps)

    def check_class_token(self) -> None:
        """Raise a ValueError unless ``forward_with_class_token`` has a class token for each map."""
        shaped = self.out_norms is not None or self._recipe.settings.get("pyramid")
        if getattr(self.model, "cls_token", None) is None or shaped:
            raise ValueError(
                f"a class token beside each map needs a plain ViT that has one, without out_norm or pyramid, which "
                f"{self._recipe.model_name} with these settings is not; use a head that takes maps alone"
            )

    def forward_with_class_token(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Images (B, 3, H, W) -> (map as from ``forward``, class token (B, C)) for each of ``out_indices``.

        The readout of DPT (2103.13413, section 3) takes both.
        """
        take = {"indices": self.features.out_indices, "norm": self._recipe.final_norm}
        with torch.no_grad() if self.frozen else nullcontext():
            pairs = self.features.model.forward_intermediates(
                self._pad(x), **take, return_prefix_tokens=True, intermediates_only=True
            )
            return tuple((y, prefix[:, 0]) for y, prefix in pairs)

    def _pad(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) with ``centre_padding``; without it the model itself pads below and on the right."""
        if self.padded_patch is None:
            return x
        height, width = (-side % patch for side, patch in zip(x.shape[-2:], self.padded_patch, strict=True))
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))

    def train(self, mode: bool = True) -> DenseBackbone:
        """Training mode, except for frozen parts and, with ``norm_eval``, BatchNorm."""
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                keep_statistics(self)
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
        layers, last = _layers(self.features.model)
        name = param_name.removeprefix(prefix).removeprefix("features.model.")
        return layers.get(name, last) if param_name.startswith(prefix) else last, last + 1

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model inside exempts from weight decay."""
        return {f"features.model.{name}" for name in self.features.model.no_weight_decay()}

    def _freeze(self) -> None:
        """Stop the gradients of the frozen stages and keep what is frozen whole in eval mode."""
        if self.frozen:
            self.requires_grad_(False).eval()
        if self.frozen_stages < 0:
            return
        trunk = self.features.model
        stages: dict[str, int] = group_parameters(trunk, trunk.group_matcher(coarse=True), reverse=True)
        number = len(trunk.feature_info)
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


def _layers(model: Trunk) -> tuple[dict[str, int], int]:
    """Levels of a model's parameters, 0 for the stem and from 1 for the blocks, and the level behind the blocks.

    They are read off timm's ``group_matcher``, which differs in two points: it puts the final norm to the last block,
    and a downsampling to the block behind it.
    """
    rules = model.group_matcher(coarse=False)
    downsampling: list[str] = []
    if isinstance(rules, Mapping):
        own = {
            group: [rule for rule in listed if rule[1] != MATCH_PREV_GROUP]
            for group, listed in rules.items()
            if isinstance(listed, list)
        }
        downsampling = [rule[0] for listed in own.values() for rule in listed if "downsample" in rule[0]]
        rules = {**rules, **own}
    behind = "behind the blocks"  # a name that no rule knows
    layers: dict[str, int] = group_with_matcher([*model.named_parameters(), (behind, None)], rules, reverse=True)
    last = layers.pop(behind)
    return {name: layer - any(re.match(rule, name) for rule in downsampling) for name, layer in layers.items()}, last


def _create_features(recipe: Recipe, pretrained: bool = False) -> Features:
    """timm's ``features_only`` of the model, for images of any size where the model can take them.

    Reduced if asked while it is whole: schedules count all its blocks.
    """
    features = _timm_features(recipe._replace(settings=recipe.settings | {"pretrained": pretrained}))
    embed: object = getattr(features.model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and not embed.strict_img_size:  # Swin's windows and merging pad, but it does not
        embed.dynamic_img_pad = True
    return features


def _timm_features(recipe: Recipe) -> Features:
    name, out_indices, sparsify, final_norm, settings = recipe
    getter: Callable[..., Features] = PyramidFeatures if settings.get("pyramid") else FeatureGetterNet
    indices: dict[str, int | Sequence[int]] = {} if out_indices is None else {"out_indices": out_indices}
    form: dict[str, object] = {"features_only": True, **indices}
    if getter is FeatureGetterNet:
        form["feature_cls"] = "getter"  # timm's Swin would give NHWC maps by its default
    if sparsify is None and not final_norm:
        named: Features = timm.create_model(name, **form, **settings)
        return named
    if getter is FeatureGetterNet and out_indices is None:
        with torch.device("meta"):
            dense: Features = timm.create_model(name, **form, **(settings | {"pretrained": False}))
        indices["out_indices"] = dense.out_indices
    own = {key: value for key, value in settings.items() if key != "pyramid"}
    return getter(reduce_as(sparsify, timm.create_model(name, **own)), norm=final_norm, **indices)


def _whole_model(
    name: str, out_norm: bool, sparsify: Mapping[str, Setting] | None, settings: Settings
) -> tuple[nn.Module, Settings]:
    """The uncut model without memory, and the settings completed by what lets it take images of any size."""
    own = {key: value for key, value in settings.items() if key != "pyramid"}
    if sparsify is not None and "recover" in own:
        raise TypeError(
            "recover belongs to the method, got it beside sparsify; give "
            f"sparsify=dict(..., recover={own['recover']!r})"
        )
    with torch.device("meta"):
        host, host_settings = _host(name, own)
        model: nn.Module = timm.create_model(host, **host_settings)
        accepted = {arg for cls in type(model).__mro__ for arg in inspect.signature(cls).parameters}
        extra: Settings = {arg: True for arg in ("dynamic_img_size", "dynamic_img_pad") if arg in accepted}
        if out_norm and "out_norm" in accepted:
            extra["out_norm"] = True
        whole = timm.create_model(name, **(extra | own))
        return reduce_as(sparsify, whole), extra | settings


def _host(name: str, settings: Settings) -> tuple[str, Settings]:
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


def _check_final_norm(whole: nn.Module, out_norm: bool, name: str) -> None:
    """Raise a ValueError unless the model has one norm behind all its blocks, which fits the map of each."""
    if not isinstance(whole, tuple(HOST_CLASSES)) or isinstance(whole.norm, nn.Identity):
        raise ValueError(
            f"final_norm=True takes a plain ViT with a norm behind its last block, which {name} is not; use "
            "out_norm=True for a norm of each map"
        )
    if out_norm:
        raise ValueError("final_norm=True and out_norm=True both normalise every map; give one of them")


def _patch_size(model: nn.Module, name: str) -> tuple[int, int]:
    """(height, width) of the patches, of whole numbers of which images are padded to."""
    embed: object = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed):
        raise ValueError(f"centre_padding=True pads to whole patches, and {name} cuts none; leave it out")
    height, width = embed.patch_size
    return height, width


def _refuse_training(backbone: DenseBackbone, settings: Settings) -> None:
    """Raise a ValueError for settings of a frozen backbone that act in training alone, or whose weights need it."""
    if backbone.frozen_stages >= 0:
        raise ValueError(
            f"frozen=True freezes all stages, and frozen_stages={backbone.frozen_stages} the first; give one of them"
        )
    acting = [f"{name}={value}" for name, value in settings.items() if DROPS.search(name) and value]
    acting += ["with_cp=True"] * backbone.with_cp
    if acting:
        raise ValueError(f"{acting[0]} acts in training alone, and frozen=True keeps the backbone out of it; give one")
    model = backbone.model
    reducers: Mapping[int, Reducer] = getattr(model, "reducers", {})
    random = ["out_norm=True"] * (backbone.out_norms is not None) + ["pyramid=True"] * bool(settings.get("pyramid"))
    random += ["recover='attention'"] * (getattr(model, "recover", None) == "attention")
    random += [f"method {reducer.name!r}" for reducer in reducers.values() if list(reducer.parameters())]
    if random:
        raise ValueError(
            f"{random[0]} adds parameters that must be trained, and frozen=True would keep them random; train a neck "
            "behind the backbone in its place, or leave frozen=True out"
        )
