"""Multiply-adds of a model from its sizes alone: a second opinion on what ``effvit.measure.flops`` counts on a trace.

Nothing is run, so a model on the meta device will do, of any size. What a method leaves of the tokens, and every
product it makes, is written down from the papers' equations a second time. The two counts agree exactly, but for what
a trace does not see because no output depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard, cast

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from effvit.block import BLOCK_CLASSES
from effvit.hosts.closed_form import PlainViT, plain_vit
from effvit.hosts.host import HOST_CLASSES, ReducedHost, patch_embedding, sparsify
from effvit.hosts.illama import ILLaMA
from effvit.hosts.lvvit import LVViT
from effvit.hosts.sam import sam
from effvit.hosts.swin import swin
from effvit.hosts.tower_costs import tower_form
from effvit.hosts.towers import TOWERS
from effvit.layers.macs import Terms
from effvit.protocols import Size
from effvit.reducers import METHODS, Reducer

__all__ = ["closed_form_macs"]

PLAIN = (VisionTransformer, VisionTransformerDistilled, Eva, Beit, VisionTransformerRelPos, NaFlexVit, LVViT, ILLaMA)


def form_of_host(model: nn.Module, size: Size) -> Terms:
    """The form of a reduced model that reduces nothing, which is the model."""
    reduced = sparsify(model, "tome", recover=None, share=True, **METHODS["tome"].off())
    assert knows_its_form(reduced)
    return reduced.closed_form(size)


WITH_WINDOWS: dict[type[nn.Module], Callable[[nn.Module, Size], Terms]] = {
    SwinTransformer: swin,
    SwinTransformerV2: swin,
    VisionTransformerSAM: sam,
    Hiera: form_of_host,
    HieraDet: form_of_host,
}


class HasClosedForm(Protocol):
    """A model that knows its own closed form."""

    def closed_form(self, size: Size) -> Terms:
        """MACs by term of one image (H, W)."""


def knows_its_form(model: object) -> TypeGuard[HasClosedForm]:
    """Whether the class of the model defines ``closed_form`` itself: what it inherits may not tell of all it adds."""
    return "closed_form" in vars(type(model))


def closed_form_macs(
    model: nn.Module, input_size: tuple[int, int, int], *, token_counts: Sequence[int] | None = None
) -> dict[str, int]:
    """Multiply-accumulates (MACs) of one image in eval mode, term by term; the sum of the values is the total.

    Of a ``CropSelector`` they are those of all parts of one image, of a ``VideoSelector`` of all frames of one video.

    Args:
        model: A model of this package, or a plain ViT, Eva, Swin, SAM, Hiera or vision-language tower of timm; on any
            device, also meta.
        input_size: (channels, H, W) of an image.
        token_counts: Patch tokens that leave each block. Needed for ATS, DyMU and ALGM, whose numbers depend on the
            image, and refused for all others.

    Returns:
        MACs of "embedding", "norm", "projection", "attention", "mlp", "reduction", "head" and what else there is.

    Raises:
        TypeError: A class of model, block or norm, or a method, without a closed form.
        ValueError: ``token_counts`` missing, not needed or not one for each block.
    """
    size = (input_size[1], input_size[2])
    adaptive = isinstance(model, ReducedHost) and model.variable_length
    if adaptive != (token_counts is not None):
        raise ValueError(
            f"{model.method} keeps as many tokens as the image needs; give token_counts, the patch tokens that leave "
            "each block, for instance from model.trace_tokens"
            if adaptive
            else "token_counts follow from the sizes of this model; leave them out"
        )
    if type(model) in (*PLAIN, *(HOST_CLASSES[cls] for cls in PLAIN)):
        check_plain(model, token_counts)
        if isinstance(model, ReducedHost):
            return dict(+model.closed_form(size, token_counts))
        patch_embed = patch_embedding(model)
        assert patch_embed is not None, "every plain ViT has one"
        return dict(+plain_vit(cast(PlainViT, model), patch_embed, size, None))
    if type(model) in (*TOWERS, *(HOST_CLASSES[cls] for cls in TOWERS)):
        check_plain(model, token_counts)
        return dict(+tower_form(model, size, token_counts))
    if type(model) in WITH_WINDOWS:
        return dict(+WITH_WINDOWS[type(model)](model, size))
    if knows_its_form(model):
        return dict(+model.closed_form(size))
    known = ", ".join(cls.__name__ for cls in (*PLAIN, *TOWERS, *WITH_WINDOWS))
    raise TypeError(
        f"a {type(model).__name__} has no closed form, only {known} and classes that define closed_form themselves "
        "have; use effvit.count_flops instead"
    )


def check_plain(model: Any, token_counts: Sequence[int] | None) -> None:
    """Raise an error unless the blocks and the method of a plain ViT have a closed form."""
    blocks = getattr(model, "encoder", model).blocks
    foreign = {type(block).__name__ for block in blocks if not isinstance(block, tuple(BLOCK_CLASSES))}
    if foreign:
        raise TypeError(f"blocks of the class {', '.join(foreign)} have no closed form; use effvit.count_flops")
    if isinstance(model, ReducedHost) and METHODS[model.method].cost is Reducer.cost:
        known = ", ".join(name for name, method in METHODS.items() if method.cost is not Reducer.cost)
        raise TypeError(
            f"the method {model.method!r} has no closed form, only {known} have; give it a cost, or use "
            "effvit.count_flops instead"
        )
    if token_counts is not None and len(token_counts) != len(blocks):
        raise ValueError(f"token_counts needs one value for each of {len(blocks)} blocks, got {len(token_counts)}")
