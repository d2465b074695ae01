"""Multiply-adds of a model on one image, counted operator by operator on a trace (fvcore).

The unit is the multiply-accumulate (MAC), which most papers on vision transformers print as "FLOPs". To keep
the numbers comparable the conventions are fvcore's: products of matrices and convolutions count one MAC for
each multiply-add, an affine LayerNorm counts 5 for each element, and element-wise arithmetic, softmax,
activations, sorting and moving of tokens count nothing. What is neither counted nor in that list of
exceptions is reported.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # fvcore scripts its focal loss while it is imported
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

__all__ = ["IGNORED_OPERATORS", "FlopReport", "count_flops", "eval_twin"]

ModelT = TypeVar("ModelT", bound=nn.Module)
Handle = Callable[[list[Any], list[Any]], int]

# Not counted by fvcore's convention; fvcore itself ignores a few dozen more (views, copies, integers).
# fmt: off
IGNORED_OPERATORS = frozenset(f"aten::{name}" for name in (
    # element-wise arithmetic and activations, softmax, pooling
    "abs", "add", "add_", "ceil", "clamp_min", "cos", "div", "exp", "feature_dropout", "gelu", "hardswish",
    "hardswish_", "linalg_vector_norm", "log", "log2", "log_softmax", "logsumexp", "max_pool2d", "mul", "neg", "pow",
    "rsqrt", "rsub", "sigmoid", "silu", "sin", "softmax", "sqrt", "square", "sub", "tanh",
    # sums, extremes and order
    "amax", "amin", "any", "argmax", "argsort", "cumsum", "kthvalue", "maximum", "mean", "sort", "sum", "topk",
    # comparisons
    "__or__", "isfinite", "isnan", "le", "lt", "ne",
    # making and moving tokens, adding one to another
    "clone", "diagonal", "expand_as", "eye", "fill_", "index_add", "index_copy", "index_select", "meshgrid", "new_ones",
    "numel", "ones_like", "pad", "rand_like", "repeat", "repeat_interleave", "reshape_as", "scatter", "scatter_add",
    "unflatten", "view_as", "where",
))
# fmt: on


def product_flops(position: int = 0) -> Handle:
    """Handle for a product of matrices whose left factor is the operator's input at ``position``.

    One MAC for each element of the result and of the contracted dimension; unlike fvcore's own handle this
    also holds for vectors and for batch dimensions that are broadcast.
    """
    return lambda inputs, outputs: prod(get_shape(outputs[0])) * get_shape(inputs[position])[-1]


def attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of q k^T and of the attention map times v: B * heads * Nq * Nk * (Dk + Dv)."""
    key, value = get_shape(inputs[1]), get_shape(inputs[2])
    queries = prod(get_shape(outputs[0])[:-1])  # B * heads * Nq, also if k and v have fewer heads
    return queries * key[-2] * (key[-1] + value[-1])


def resampling_flops(taps: int, antialias: bool = False) -> Handle:
    """Handle for resizing a map: a product for each element of the result and each of taps * taps neighbours.

    With antialiasing the neighbourhood grows with the factor a side is reduced by.
    """

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        before, after = get_shape(inputs[0])[-2:], get_shape(outputs[0])
        factors = [max(1.0, a / b) if antialias else 1.0 for a, b in zip(before, after[-2:], strict=True)]
        return round(prod(after) * prod(taps * factor for factor in factors))

    return count


HANDLES: dict[str, Handle] = {
    "aten::matmul": product_flops(),
    "aten::baddbmm": product_flops(1),
    "aten::cdist": product_flops(),  # one difference is squared and accumulated where a product has one MAC
    "aten::upsample_bicubic2d": resampling_flops(4),
    "aten::_upsample_bicubic2d_aa": resampling_flops(4, antialias=True),
    "aten::_upsample_bilinear2d_aa": resampling_flops(2, antialias=True),
    "aten::scaled_dot_product_attention": attention_flops,
    "aten::_scaled_dot_product_attention_math": attention_flops,
    "aten::_scaled_dot_product_flash_attention": attention_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "aten::_scaled_dot_product_efficient_attention": attention_flops,
    "aten::_scaled_dot_product_cudnn_attention": attention_flops,
    "aten::_scaled_dot_product_fused_attention_overrideable": attention_flops,
}


@dataclass(frozen=True)
class FlopReport:
    """Multiply-accumulates (MACs, not FLOPs of two to the MAC) of one image.

    Attributes:
        total: All counted MACs.
        by_operator: Operator, as fvcore names it -> MACs.
        by_module: Path of a module -> MACs of it and the modules inside it; those without any are left out.
        uncounted: Operator without a rule -> its calls for one image; empty for a complete count.
    """

    total: int
    by_operator: dict[str, int]
    by_module: dict[str, int]
    uncounted: dict[str, int]


def eval_twin(model: ModelT) -> ModelT:
    """A copy of the model in eval mode that shares all parameters and buffers, but no hooks or flags."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def count_flops(model: nn.Module, input_size: tuple[int, int, int], *, images: Tensor | None = None) -> FlopReport:
    """Multiply-accumulates (MACs) of one image in eval mode. The model is left as it is.

    Args:
        model: Takes images (1, 3, H, W) and returns a tensor.
        input_size: (channels, H, W) of an image, filled with seeded noise.
        images: (B, channels, H, W) images to count instead, one at a time: the mean of a method whose
            number of tokens depends on the image, such as ATS. Each number of the report is rounded.

    Raises:
        ValueError: Images of another size than ``input_size``.
    """
    like = next(model.parameters(), torch.empty(0))
    if images is None:
        images = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
    if images.shape[0] < 1 or tuple(images.shape[1:]) != tuple(input_size):
        raise ValueError(
            f"expected at least one image of {' x '.join(map(str, input_size))}, got a tensor of shape "
            f"{tuple(images.shape)}"
        )
    twin = eval_twin(model)
    analyses = [_analysis(twin, image) for image in images.to(like.device, like.dtype).split(1)]
    uncounted: Counter[str] = Counter()
    for analysis in analyses:
        uncounted |= analysis.unsupported_ops()
    by_module = _mean([analysis.by_module() for analysis in analyses])
    total = by_module.pop("", 0)
    return FlopReport(total, _mean([a.by_operator() for a in analyses]), by_module, dict(uncounted))


def _analysis(model: nn.Module, image: Tensor) -> FlopCountAnalysis:
    """fvcore's finished count of one image (1, 3, H, W)."""
    analysis = FlopCountAnalysis(model, image)
    analysis.set_op_handle(**HANDLES, **dict.fromkeys(IGNORED_OPERATORS))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        analysis.total()
    return analysis


def _mean(counts: list[Counter[str]]) -> dict[str, int]:
    sums: Counter[str] = sum(counts, Counter())
    return {name: round(value / len(counts)) for name, value in sums.items() if value}
