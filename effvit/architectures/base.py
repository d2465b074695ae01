"""What architectures share: ViTs whose later blocks work on soft tokens, and backbones of four stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from timm.layers import ClassifierHead, ConvNormAct, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from effvit.block import with_gradients
from effvit.hosts.surface import (
    BlockFeatures,
    Intermediates,
    check_batch,
    check_images,
    check_output_fmt,
    patch_grid,
    refuse_mask,
)
from effvit.layers.macs import Terms, convolutions, layers
from effvit.protocols import Device, Factory, Settings, Size
from effvit.tokens import fix_traced_size, fx_leaf

__all__ = [
    "ChannelsLastStem",
    "PyramidBackbone",
    "PyramidStage",
    "SoftTokenViT",
    "check_per_stage",
    "conv_stage_terms",
    "conv_stages",
    "pooled_head",
]


class SoftTokenViT(Intermediates, VisionTransformer):
    """A plain ViT of an architecture whose later blocks work on other tokens than one a patch.

    A subclass supplies ``_run`` and, where the tokens it ends with need more than the final norm, ``_finish``.
    Everything timm asks of a vision transformer's features follows from these two.
    """

    blocks: Any  # of a class of each architecture's own
    norm: nn.Module

    def _run(
        self, x: Tensor, take: Sequence[int] = (), num_blocks: int | None = None
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The one loop over the blocks.

        Args:
            x: Images (B, 3, H, W).
            take: Blocks whose output is wanted on the full patch grid.
            num_blocks: Blocks to run, None for all.

        Returns:
            What ``_finish`` takes, and for each block in ``take`` the patch features (B, H*W, C) and the prefix
            tokens (B, P, C), neither normalised.
        """
        raise NotImplementedError

    def _finish(self, state: Any) -> Tensor:
        """Normalised final tokens (B, P+M, C), what ``forward_head`` takes."""
        y: Tensor = self.norm(state)
        return y

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised final tokens (B, P+M, C) of images (B, 3, H, W); a mask is refused."""
        refuse_mask(self, attn_mask, is_causal)
        check_images(x, self)
        x = fix_traced_size(x, 2, 3)
        return self._finish(self._run(x)[0])

    def _intermediates(self, x: Tensor, take: Sequence[int], num_blocks: int | None) -> BlockFeatures:
        check_images(x, self)
        x = fix_traced_size(x, 2, 3)
        state, taken = self._run(x, take, num_blocks)
        patches, prefixes = [y for y, _ in taken], [prefix for _, prefix in taken]
        return BlockFeatures(patches, prefixes, patch_grid(x, self), lambda: self._finish(state))


def reset_module(module: nn.Module) -> None:
    """Draw the module's own parameters and buffers anew, as its constructor does."""
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


class ChannelsLastStem(nn.Sequential):
    """The layers of a convolutional stem, run on images that lie channels last in memory.

    Convolutions keep that order, so every map behind the stem has it too: depthwise convolutions and those of
    size 1 then need no rearranged copy, and a norm over channels is a plain LayerNorm of a view.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_last(x))


@fx_leaf
def channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) with its channels last in memory; as it is inside ``torch.vmap``, which knows no such order."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)


class PyramidStage(nn.Module):
    """One stage of a pyramid: an optional downsampling, then blocks."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        y: Tensor = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return y


def check_per_stage(stages: int, **settings: Sequence[object]) -> None:
    """Raise a ValueError that names the setting unless each of them has one value a stage."""
    for name, values in settings.items():
        if len(values) != stages:
            raise ValueError(f"{name} needs one value for each of the {stages} stages, got {list(values)}")


def conv_stages(
    dims: Sequence[int],
    make_blocks: Callable[[int], Sequence[nn.Module]],
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Stages of that many channels, all but the first opened by a convolution of size 3 and stride 2.

    Args:
        dims: Channels of the stages.
        make_blocks: Makes the blocks of a stage, given its number.
        device: As in torch.
        dtype: As in torch.
    """
    stages, dd = [], Factory(device=device, dtype=dtype)
    for i, dim in enumerate(dims):
        blocks = make_blocks(i)
        down = ConvNormAct(dims[i - 1], dim, 3, stride=2, bias=True, apply_act=False, **dd) if i else None
        stages.append(PyramidStage(down, blocks))
    return nn.Sequential(*stages)


class CountedBlock(Protocol):
    """A block that tells its closed form."""

    def closed_form(self, size: Size) -> Terms:
        """MACs by term on a map (H, W)."""
        ...


def conv_stage_terms(stem: nn.Module, stages: Iterable[PyramidStage], size: Size) -> tuple[Terms, Size]:
    """MACs by term of stem and stages, as ``conv_stages`` makes them, on an image (H, W), and the last map's size."""
    terms, size = convolutions("embedding", stem, size)
    for stage in stages:
        more, size = convolutions("embedding", stage.downsample, size)
        terms += more
        for block in cast(Iterable[CountedBlock], stage.blocks):
            terms += block.closed_form(size)
    return terms, size


class PyramidBackbone(nn.Module):
    """A backbone of four stages at strides 4, 8, 16 and 32 that takes images of any size.

    A subclass sets ``stem`` (stride 4), ``stages`` (``nn.Sequential`` of PyramidStage) and, if it has one, the
    final projection and norm, which ``_finish`` applies.

    Args:
        dims: Channels of the stages.
        num_classes: Classes; 0 for none.
        global_pool: timm's pooling in front of the classifier, "" for none.
        in_chans: Channels of the images.
        num_features: Channels of ``forward_features``, those of the last stage if None.
        drop_rate: Dropout in front of the classifier.
        out_norm: Makes the norm of one stage's output given its channels; used for the maps of
            ``forward_intermediates`` only, so ask for it in a dense model alone. None: plain maps.
        output_fmt: Layout in which the stages pass features, "NCHW" or "NHWC"; maps are NCHW in any case.
    """

    stem: nn.Module
    stages: Any  # nn.Sequential of PyramidStage

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        global_pool: str,
        in_chans: int,
        num_features: int | None = None,
        drop_rate: float = 0.0,
        out_norm: Callable[[int], nn.Module] | None = None,
        output_fmt: str = "NCHW",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_output_fmt(output_fmt, ("NCHW", "NHWC"))
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = num_features or dims[-1]
        self.embed_dim = list(dims)
        self.stage_fmt = output_fmt
        self.feature_info: list[Settings] = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.out_norms = None if out_norm is None else nn.ModuleList(out_norm(dim) for dim in dims)
        self.head: Any = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as a new model: also after ``to_empty``, for a model created on the meta device (timm's method).

        Args:
            needs_reset: Reset all modules first; False where they have just been constructed.
        """
        if needs_reset:
            self.apply(reset_module)
            reinit_non_persistent_buffers(self)
        for linear in self._narrow_linears():
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _narrow_linears(self) -> list[nn.Linear]:
        """Linear layers drawn from N(0, 0.02) truncated, with zero biases; all else starts as its class does it."""
        return [module for module in self.head.modules() if isinstance(module, nn.Linear)]

    def _check_input(self, x: Tensor) -> None:
        """Raise a named error unless x is a batch of images (B, in_chans, H, W) that can be run, or recorded, here."""
        check_batch(x, self, self.in_chans)

    def _finish(self, x: Tensor) -> Tensor:
        """Output of the last stage -> final features, both (B, C, H, W)."""
        return x

    def _stage_map(self, i: int, x: Tensor, images: Tensor) -> Tensor:
        """Output x of stage i as the map (B, C_i, H/4/2^i, W/4/2^i), rounded up, of images (B, in_chans, H, W)."""
        return self._to_maps(x)

    def _to_maps(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.stage_fmt == "NHWC" else x  # (B, C, H, W)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the blocks are recomputed in the backward pass."""
        stages: Iterable[PyramidStage] = self.stages
        return any(stage.grad_checkpointing for stage in stages)

    def forward_features(self, x: Tensor) -> Tensor:
        """Final features (B, num_features, ceil(H/32), ceil(W/32)) of images (B, in_chans, H, W)."""
        self._check_input(x)
        return self._finish(self._to_maps(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Final features -> class scores (B, num_classes), or pooled features (B, num_features)."""
        y: Tensor = self.head(x, pre_logits=pre_logits)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of images (B, in_chans, H, W)."""
        x = self.forward_features(x)
        return self.forward_head(with_gradients(x, self.out_norms) if self.training else x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of several stages; arguments and returns as timm's method.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last n stages if an int, all if None, or stage numbers.
            norm: Without ``out_norm``: refused, since the stages have no norm of their own. With it: no effect,
                maps are normalised.
            stop_early: Do not run the stages behind the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: Return only the list of maps.

        Returns:
            (final features, maps), or the maps: (B, C_i, H/4/2^i, W/4/2^i), rounded up.
        """
        check_output_fmt(output_fmt, ("NCHW",))
        if norm and self.out_norms is None:
            raise ValueError(
                f"the stages of this {type(self).__name__} have no norm of their own to apply; "
                "create the model with out_norm=True, or use norm=False"
            )
        self._check_input(x)
        take, last = feature_take_indices(len(self.stages), indices)
        images, x = x, self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            if i > last and (stop_early or intermediates_only):
                break
            x = stage(x)
            if i in take:
                y = self._stage_map(i, x, images)
                maps.append(y.contiguous() if self.out_norms is None else self.out_norms[i](y).contiguous())
        if intermediates_only:
            return maps
        x = self._to_maps(x)
        return (self._finish(x) if i == len(self.stages) - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what the maps of these stages do not need; returns their numbers (timm's method)."""
        take, last = feature_take_indices(len(self.stages), indices)
        prune_norm = prune_norm or last < len(self.stages) - 1  # the final norm has the channels of the last stage
        self.stages = self.stages[: last + 1]
        if self.out_norms is not None:
            self.out_norms = nn.ModuleList(
                norm if i in take else nn.Identity() for i, norm in enumerate(self.out_norms)
            )
        if prune_norm:
            self._prune_final()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _prune_final(self) -> None:
        """Remove the modules that only ``_finish`` uses."""

    def pruned_names(self, names: Iterable[str]) -> list[str]:
        """Those names of weights behind the stages that this model has been built or cut without."""
        own = {name.partition(".")[0] for name, _ in self.named_parameters()}
        return [name for name in names if name.partition(".")[0] in {"head", "norm", "proj"} - own]

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Accepts any image size, since nothing here depends on one; the stride is fixed."""
        if patch_size is not None:
            raise ValueError(f"{type(self).__name__} has a fixed stride of 4 and no patch_size, got {patch_size}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what they computed."""
        stages: Iterable[PyramidStage] = self.stages
        for stage in stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay although they have several dimensions."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from stem to head, for layer-wise learning rates (timm's form)."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^(?!stem|stages)", (99999,)),
            ],
        }

    def get_classifier(self) -> nn.Module:
        """The classifier, a linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, **get_device_dtype(self))


def pooled_head(head: Any, size: Size) -> Terms:
    """timm's ClassifierHead on a map: the mean over all positions, then its linear layers."""
    terms = layers("head", head, 1)
    if head.global_pool.pool_type == "avg":
        terms["pooling"] += size[0] * size[1] * head.in_features
    return terms
