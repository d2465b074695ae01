"""What timm expects of every backbone, written once: checks of the input, and intermediates in timm's forms."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import feature_take_indices
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from effvit.hosts.refusals import is_sharded
from effvit.protocols import Layer, PatchEmbedding, Settings, Size
from effvit.recording import is_recorded, refuse_fx
from effvit.reducers import METHODS
from effvit.tokens import autocast_enabled

__all__ = [
    "SPARSIFIED",
    "BlockFeatures",
    "Intermediates",
    "Reduced",
    "check_batch",
    "check_images",
    "check_output_fmt",
    "grid_of",
    "keep_own",
    "model_cfg",
    "patch_grid",
    "record_args",
    "record_name",
    "refuse_mask",
    "refuse_open_sizes",
]


BESIDE_HOST = (re.compile(r".+\.reducer\."), re.compile(r"recovery\."))  # kinds of weights, by their names
SPARSIFIED = "sparsified"  # timm's name of a model by its host, method and settings


class Reduced(nn.Module):
    """What a model with a reduction method says about itself, and how it stays whole beside one it shares weights with.

    Attributes:
        method: Name of the reduction method.
        recover: How dense maps are filled, one of ``effvit.recover.FILLS``.
        host_name: timm's name of the host; None if the host was built by its class, so that no name makes it again.
    """

    method: str
    recover: str
    host_name: str | None
    pretrained_cfg: dict[str, object]
    default_cfg: dict[str, object]
    patch_embed: PatchEmbedding
    in_chans: int
    num_classes: int
    _settings: Settings
    _traits: dict[str, object]
    _placement: tuple[torch.dtype, torch.device]

    @property
    def settings(self) -> Settings:
        """What the method does, as settings: JSON-plain, defaults included, a copy.

        ``effvit.sparsify(dense, model.method, recover=model.recover, **model.settings)`` does the same again.
        """
        return copy.deepcopy(self._settings)

    def check_keep_rate(self) -> None:
        """Raise a ValueError if the method has no setting ``keep_rate``."""
        if "keep_rate" not in self._settings:
            raise ValueError(f"{self.method} has no keep rate to set; its settings are {', '.join(self._settings)}")

    def _recorded_settings(self) -> Settings:
        """The settings that a file must tell beside the weights."""
        return self.settings

    @property
    def _model_args(self) -> dict[str, object]:
        """The keywords that make this model again; timm writes them into the folders of ``save_for_hf``.

        They are put together when they are asked for, since the method may have changed since the model was made.
        """
        own: dict[str, object] = {"recover": self.recover}
        if self.pretrained_cfg["architecture"] == SPARSIFIED:
            # A host without a name is given as its class, which timm refuses to write, and says how to replace it.
            host = self.host_name or type(self).__bases__[-1]
            own |= {"host": host, "method": self.method, "settings": self._recorded_settings()}
        else:
            own |= self._recorded_settings()
        given: dict[str, object] = self.__dict__.get("_model_args", {})
        return given | own

    @_model_args.setter
    def _model_args(self, args: dict[str, object]) -> None:
        own = {"host", "method", "recover", "settings"}
        if self.pretrained_cfg["architecture"] != SPARSIFIED:  # there, what is beside the settings is the host's
            own |= self._settings.keys()
        self.__dict__["_model_args"] = {name: value for name, value in args.items() if name not in own}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as any module; what the model has beside its host stays as it is if the weights are a plain host's."""
        own: dict[str, Tensor] = self.state_dict(keep_vars=True)
        keep_own(state_dict, {prefix + name: value for name, value in own.items()}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reduced:
        """Move or cast as any module, but buffers in place too, so that a model that shares them goes along whole.

        ``nn.Module`` changes parameters in place and replaces buffers: of two models that share both, the other one
        would be left with parameters and buffers of different kinds.
        """
        before = [(m, name, old) for m in self.modules() for name, old in m._buffers.items() if old is not None]
        super()._apply(fn, recurse)
        for module, name, old in before:
            new = module._buffers[name]
            if new is not None and new is not old and torch._has_compatible_shallow_copy_type(old, new):
                old.data = new
                module._buffers[name] = old
        self.note_placement()
        return self

    def note_placement(self) -> None:
        """Remember the dtype and device of the weights, of which ``check_whole`` finds a change from outside."""
        weight = next(self.parameters())
        self._placement = (weight.dtype, weight.device)

    def check_whole(self) -> None:
        """Warn if a model that shares the weights was moved or cast, which leaves the buffers of this one behind.

        Not while the model is recorded, where dtypes and devices may be those of a simulation, and not under FSDP,
        which gathers the weights for each forward pass in a dtype of its own and shares them with no other model.
        """
        weight = next(self.parameters())
        if (weight.dtype, weight.device) == self._placement or is_recorded(weight) or is_sharded(self):
            return
        left = [
            name
            for name, buffer in self.named_buffers()
            if buffer.device != weight.device or (buffer.is_floating_point() and buffer.dtype != weight.dtype)
        ]
        if left:
            warnings.warn(
                f"the weights were {self._placement[0]} on {self._placement[1]} and now are {weight.dtype} on "
                f"{weight.device}, since a model that shares them was moved or cast; this one's {', '.join(left[:3])} "
                "stayed: move or cast this model too, or make it by effvit.sparsify(..., share=False)",
                stacklevel=2,
            )

    @property
    def variable_length(self) -> bool:
        """Token counts depend on the image."""
        return False

    def extra_repr(self) -> str:
        return f"method={self.method!r}, settings={self.settings}, recover={self.recover!r}"


def keep_own(state: dict[str, Tensor], own: Mapping[str, Tensor], prefix: str = "") -> None:
    """Put into ``state`` what a model has beside its host, of each kind of which ``state`` has nothing.

    So the weights of a plain host leave all reducers as they are, while those of a reduced one must have all of them.

    Args:
        state: Weights to load.
        own: Those of the model.
        prefix: In front of the names of the model, in both.
    """
    for kind in BESIDE_HOST:
        if not any(kind.match(name.removeprefix(prefix)) for name in state if name.startswith(prefix)):
            state.update({name: value for name, value in own.items() if kind.match(name.removeprefix(prefix))})


def record_name(model: Reduced) -> None:
    """Let ``pretrained_cfg`` name what the model is, for timm's hub folders.

    The zoo's name, if its host has one under the method: keywords of ``timm.create_model`` cannot be None, so with a
    setting that is, with one that is named as a keyword the host was made with, and with any other host, the name is
    SPARSIFIED and ``_model_args`` tells the rest.
    """
    name, defaults = f"{model.method}_{model.host_name}", METHODS[model.method].defaults()
    unsaid = any(value is None and defaults[setting] is not None for setting, value in model._settings.items())
    unsaid = unsaid or bool(model.__dict__.get("_model_args", {}).keys() & defaults.keys())
    cfg: dict[str, object] | None = getattr(model, "pretrained_cfg", None)
    if cfg is None:  # of a host that was built by its class
        img_size = getattr(model.patch_embed, "img_size", getattr(model, "img_size", None))  # a Hiera's own
        model._traits = {"img_size": img_size}
        size = PretrainedCfg.input_size[1:] if img_size is None else img_size  # a TinyViT takes any
        cfg = PretrainedCfg(input_size=(model.in_chans, *size), num_classes=model.num_classes).to_dict()
    architecture = name if model.host_name and timm.is_model(name) and not unsaid else SPARSIFIED
    model.pretrained_cfg = model.default_cfg = cfg | {"architecture": architecture}


class HasParameters(Protocol):
    """A module, of which the first weight tells dtype and device."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters."""
        ...


def check_batch(x: Tensor, model: HasParameters, in_chans: int) -> bool:
    """Raise a named error unless x is a batch of images in the model's dtype; False for a placeholder of fx."""
    if isinstance(x, torch.fx.Proxy):
        return False
    if not isinstance(x, Tensor):
        raise TypeError(f"expected images (B, {in_chans}, H, W) as a tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images (B, {in_chans}, H, W), got a tensor of shape {tuple(x.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"the batch holds no image: shape {tuple(x.shape)}; leave empty batches out")
    weight = next(model.parameters())
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast_enabled(x)):
        raise TypeError(
            f"expected images of dtype {weight.dtype}, the model's, got {x.dtype}; "
            "convert the images or the model, or run under torch.autocast"
        )
    return True


class HasPatches(Protocol):
    """A model that cuts images into patches."""

    patch_embed: PatchEmbedding


def refuse_open_sizes(x: Tensor, model: nn.Module, extractors: bool = True) -> None:
    """Raise a TypeError where ``torch.fx`` traces a model that takes any size; ``extractors`` as in ``refuse_fx``."""
    if bool(getattr(model, "dynamic_img_size", False)):
        refuse_fx(
            x,
            "sizes in a model with dynamic_img_size=True are known only at run time",
            "create it with dynamic_img_size=False, or use torch.export",
            extractors,
        )


def patch_grid(x: Tensor, model: HasPatches) -> tuple[int, int]:
    """(H, W) patch grid of images x in a model with ``patch_embed``."""
    return grid_of((x.shape[-2], x.shape[-1]), model)


def grid_of(size: Size, model: HasPatches) -> Size:
    """(H, W) patch grid of images (H, W) in a model with ``patch_embed``: its own, if it takes no others."""
    if not bool(getattr(model, "dynamic_img_size", False)):
        height, width = model.patch_embed.grid_size
        return height, width
    return model.patch_embed.dynamic_feat_size(size)


def check_images(x: Tensor, model: HasPatches) -> None:
    """Raise a named error unless x is a batch of images that a plain ViT with ``patch_embed`` takes."""
    patch_embed = model.patch_embed
    if not check_batch(x, patch_embed, getattr(model, "in_chans", 3)):
        return
    height, width = x.shape[-2:]
    if not bool(getattr(model, "dynamic_img_size", False)):
        if (height, width) != tuple(patch_embed.img_size):
            dynamic = ", create the model with dynamic_img_size=True" if hasattr(model, "dynamic_img_size") else ""
            raise ValueError(
                f"expected images of {patch_embed.img_size[0]} x {patch_embed.img_size[1]} pixels, got "
                f"{height} x {width}; call model.set_input_size(({height}, {width})){dynamic}, or resize the images"
            )
    elif not bool(getattr(patch_embed, "dynamic_img_pad", False)) and (
        height % patch_embed.patch_size[0] or width % patch_embed.patch_size[1]
    ):
        raise ValueError(
            f"image size {height} x {width} is not a multiple of the patch size {patch_embed.patch_size[0]} x "
            f"{patch_embed.patch_size[1]}; resize the images or create the model with dynamic_img_pad=True"
        )


def model_cfg(**kwargs: object) -> dict[str, object]:
    """timm's pretrained configuration of a model for ImageNet at 224 pixels, with the entries given."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **kwargs,
    }


# Keywords of a builder that say where weights are from and where they go, and nothing about the model.
_LOADING = {"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "device", "dtype"}


def record_args(model: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Let a model tell the keywords that its builder got, for the folders of timm's ``save_for_hf``.

    ``timm.create_model`` does so by itself. Without a record, the folder of a model whose builder was called alone
    would give back one of the default sizes and options.
    """
    recorded = {name: value for name, value in kwargs.items() if name not in _LOADING}
    setattr(model, "_model_args", recorded)  # noqa: B010


def check_output_fmt(output_fmt: str, known: Sequence[str] = ("NCHW", "NLC")) -> None:
    """Raise a ValueError unless intermediates can be given in that form."""
    if output_fmt not in known:
        raise ValueError(f"output_fmt must be {' or '.join(map(repr, known))}, got {output_fmt!r}")


def refuse_mask(model: object, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a ValueError for an attention mask, which has no meaning once tokens are not those of the image."""
    if isinstance(attn_mask, torch.fx.Proxy):  # symbolic tracing passes a placeholder for every argument
        return
    if attn_mask is not None or is_causal:
        what = f"a model reduced by {model.method}" if hasattr(model, "method") else f"a {type(model).__name__}"
        raise ValueError(
            f"{what} takes no attn_mask or is_causal: both are defined on the full "
            "sequence, whose tokens move and leave; use the dense model for masked input"
        )


class BlockFeatures(NamedTuple):
    """What some blocks of a ViT made of a batch.

    Attributes:
        patches: (B, H*W, C) features of all patches behind each block asked for, not normalised.
        prefixes: (B, P, C) prefix tokens, likewise.
        grid: (H, W) of the patches.
        final: Computes what ``forward_features`` returns, which not every caller wants.
    """

    patches: list[Tensor]
    prefixes: list[Tensor]
    grid: Size
    final: Callable[[], Tensor]


class Intermediates:
    """timm's ``forward_intermediates`` of a plain ViT, for a class that supplies ``_intermediates``."""

    blocks: Sized
    norm: Layer
    num_prefix_tokens: int

    def _intermediates(self, x: Tensor, take: Sequence[int], num_blocks: int | None) -> BlockFeatures:
        """The blocks on images (B, 3, H, W).

        Args:
            x: The images.
            take: Blocks whose output is wanted.
            num_blocks: Blocks to run, None for all.
        """
        raise NotImplementedError

    def _norm_patches(self, x: Tensor) -> Tensor:
        """The norm of intermediate patch features (B, H*W, C), where it is asked for."""
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Features of several blocks on the full patch grid; arguments and returns as timm's method.

        Args:
            x: Images (B, 3, H, W).
            indices: The last n blocks if an int, all if None, or block numbers.
            return_prefix_tokens: Return (map, prefix tokens) pairs.
            norm: Apply the final norm to the intermediates.
            stop_early: Do not run the blocks behind the last one asked for.
            output_fmt: "NCHW" for maps (B, C, H/patch, W/patch), "NLC" for sequences (B, N, C) of all patches.
            intermediates_only: Return only the list of intermediates.
            output_dict: Return a dict with image_features and image_intermediates.
            attn_mask: Refused: a mask over the full sequence has no meaning once tokens have moved.
            is_causal: Refused.

        Returns:
            (final features, intermediates), the intermediates, or the dict. A reduced host fills dropped patches as
            ``self.recover`` says.
        """
        check_output_fmt(output_fmt)
        refuse_mask(self, attn_mask, is_causal)
        take: list[int]
        last: int
        take, last = feature_take_indices(len(self.blocks), indices)
        patches, prefixes, grid, final = self._intermediates(
            x, take, last + 1 if stop_early or intermediates_only else None
        )
        if norm:
            patches = [self._norm_patches(y) for y in patches]
        maps: list[Tensor]
        maps = patches if output_fmt == "NLC" else [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if with_prefix and norm:
            prefixes = [self.norm(y) for y in prefixes]
        if output_dict:
            result: dict[str, Tensor | list[Tensor]] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": final()}
        listed = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
        return listed if intermediates_only else (final(), listed)
