"""What timm expects of every backbone, written once: checks of the input, and intermediates in timm's forms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from effvit.recording import is_recorded, refuse_fx
from effvit.tokens import autocast_enabled

__all__ = [
    "SPARSIFIED",
    "Reduced",
    "check_batch",
    "check_images",
    "check_output_fmt",
    "hand_out",
    "model_cfg",
    "patch_grid",
    "record_args",
    "refuse_mask",
    "refuse_open_sizes",
    "with_gradients",
]


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
    pretrained_cfg: dict[str, Any]
    _settings: dict[str, Any]
    _placement: tuple[torch.dtype, torch.device]

    @property
    def settings(self) -> dict[str, Any]:
        """What the method does, as settings: JSON-plain, defaults included, a copy.

        ``effvit.sparsify(dense, model.method, recover=model.recover, **model.settings)`` does the same again.
        """
        return copy.deepcopy(self._settings)

    def _recorded_settings(self) -> dict[str, Any]:
        """The settings that a file must tell beside the weights."""
        return self.settings

    @property
    def _model_args(self) -> dict[str, Any]:
        """The keywords that make this model again; timm writes them into the folders of ``save_for_hf``.

        They are put together when they are asked for, since the method may have changed since the model was made.
        """
        own: dict[str, Any] = {"recover": self.recover}
        if self.pretrained_cfg["architecture"] == SPARSIFIED:
            # A host without a name is given as its class, which timm refuses to write, and says how to replace it.
            host = self.host_name or type(self).__bases__[-1]
            own |= {"host": host, "method": self.method, "settings": self._recorded_settings()}
        else:
            own |= self._recorded_settings()
        return self.__dict__.get("_model_args", {}) | own

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        own = {"host", "method", "recover", "settings", *self._settings}
        self.__dict__["_model_args"] = {name: value for name, value in args.items() if name not in own}

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

        Not while the model is recorded, where dtypes and devices may be those of a simulation.
        """
        weight = next(self.parameters())
        if (weight.dtype, weight.device) == self._placement or is_recorded(weight):
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


def check_batch(x: Tensor, model: nn.Module, in_chans: int) -> bool:
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


def refuse_open_sizes(x: Tensor, model: Any, extractors: bool = True) -> None:
    """Raise a TypeError where ``torch.fx`` traces a model that takes any size; ``extractors`` as in ``refuse_fx``."""
    if getattr(model, "dynamic_img_size", False):
        refuse_fx(
            x,
            "sizes in a model with dynamic_img_size=True are known only at run time",
            "create it with dynamic_img_size=False, or use torch.export",
            extractors,
        )


def patch_grid(x: Tensor, model: Any) -> tuple[int, int]:
    """(H, W) patch grid of images x in a model with ``patch_embed``."""
    if not getattr(model, "dynamic_img_size", False):
        return tuple(model.patch_embed.grid_size)
    return model.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))


def check_images(x: Tensor, model: Any) -> None:
    """Raise a named error unless x is a batch of images that a plain ViT with ``patch_embed`` takes."""
    patch_embed = model.patch_embed
    if not check_batch(x, patch_embed, getattr(model, "in_chans", 3)):
        return
    height, width = x.shape[-2:]
    if not getattr(model, "dynamic_img_size", False):
        if (height, width) != tuple(patch_embed.img_size):
            raise ValueError(
                f"expected images of {patch_embed.img_size[0]} x {patch_embed.img_size[1]} pixels, got "
                f"{height} x {width}; call model.set_input_size(({height}, {width})), create the model with "
                "dynamic_img_size=True, or resize the images"
            )
    elif not getattr(patch_embed, "dynamic_img_pad", False) and (
        height % patch_embed.patch_size[0] or width % patch_embed.patch_size[1]
    ):
        raise ValueError(
            f"image size {height} x {width} is not a multiple of the patch size {patch_embed.patch_size[0]} x "
            f"{patch_embed.patch_size[1]}; resize the images or create the model with dynamic_img_pad=True"
        )


def model_cfg(**kwargs: Any) -> dict[str, Any]:
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


def record_args(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Let a model tell the keywords that its builder got, for the folders of timm's ``save_for_hf``.

    ``timm.create_model`` does so by itself. Without a record, the folder of a model whose builder was called alone
    would give back one of the default sizes and options.
    """
    model._model_args = {name: value for name, value in kwargs.items() if name not in _LOADING}


def check_output_fmt(output_fmt: str, known: Sequence[str] = ("NCHW", "NLC")) -> None:
    """Raise a ValueError unless intermediates can be given in that form."""
    if output_fmt not in known:
        raise ValueError(f"output_fmt must be {' or '.join(map(repr, known))}, got {output_fmt!r}")


def refuse_mask(model: Any, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a ValueError for an attention mask, which has no meaning once tokens are not those of the image."""
    if isinstance(attn_mask, torch.fx.Proxy):  # symbolic tracing passes a placeholder for every argument
        return
    if attn_mask is not None or is_causal:
        what = f"a model reduced by {model.method}" if hasattr(model, "method") else f"a {type(model).__name__}"
        raise ValueError(
            f"{what} takes no attn_mask or is_causal: both are defined on the full "
            "sequence, whose tokens move and leave; use the dense model for masked input"
        )


def hand_out(
    patches: list[Tensor],
    prefixes: list[Tensor] | None,
    grid: tuple[int, int],
    final: Callable[[], Tensor],
    output_fmt: str,
    intermediates_only: bool,
    output_dict: bool,
) -> Any:
    """What timm's ``forward_intermediates`` of a plain ViT returns.

    Args:
        patches: Features (B, H*W, C) of all patches, for each block asked for.
        prefixes: Their prefix tokens (B, P, C), None where they were not asked for.
        grid: (H, W) of the patches.
        final: Computes the final features, called only if they are returned.
        output_fmt: "NCHW" for maps (B, C, H, W), "NLC" for the sequences as they are.
        intermediates_only: Return the intermediates alone.
        output_dict: Return a dict.
    """
    maps = patches if output_fmt == "NLC" else [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": maps}
        if prefixes is not None:
            result["image_intermediates_prefix"] = prefixes
        if not intermediates_only:
            result["image_features"] = final()
        return result
    intermediates = maps if prefixes is None else list(zip(maps, prefixes, strict=True))
    return intermediates if intermediates_only else (final(), intermediates)


def with_gradients(x: Tensor, module: nn.Module | None) -> Tensor:
    """``x`` as it is, through which the parameters of a module that had no part in it get a gradient of zero.

    For modules that only serve maps, in a model that trains as a classifier: DistributedDataParallel stops at the
    second step of a model with parameters that get no gradient. No value of a parameter is read.
    """
    for parameter in () if module is None else module.parameters():
        if parameter.requires_grad:
            x = x + parameter[:0].sum()
    return x
