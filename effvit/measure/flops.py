"""Multiply-adds of a model on one image, counted operator by operator on a trace (fvcore).

The unit is the multiply-accumulate (MAC), which most papers on vision transformers print as "FLOPs". To keep
the numbers comparable the conventions are fvcore's: products of matrices and convolutions count one MAC for
each multiply-add, an affine LayerNorm counts 5 for each element, and element-wise arithmetic, softmax,
activations, sorting and moving of tokens count nothing. What is neither counted nor in that list of
exceptions is reported.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effvit.block import check_model, copy_shared
from effvit.protocols import check_views, views_of
from effvit.recording import traced_once

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # fvcore scripts its focal loss while it is imported
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

__all__ = ["HANDLES", "IGNORED_OPERATORS", "FlopReport", "Spread", "count_flops", "eval_twin"]

ModelT = TypeVar("ModelT", bound=nn.Module)


class Value(Protocol):
    """What is asked of a value in torch's trace."""

    def toIValue(self) -> object:
        """The constant it holds."""
        ...

    def node(self) -> Node:
        """The operator that made it."""
        ...


class Node(Protocol):
    """What is asked of an operator in torch's trace."""

    def inputs(self) -> Iterable[Value]:
        """What it was given."""
        ...


Values: TypeAlias = Sequence[Value]
Handle: TypeAlias = Callable[[Values, Values], int]

# Not counted by fvcore's convention, in place or not; fvcore itself ignores a few dozen more (views, copies, integers).
# fmt: off
IGNORED_OPERATORS = frozenset(f"aten::{name}{in_place}" for in_place in ("", "_") for name in (
    # element-wise arithmetic and activations, softmax
    "abs", "add", "addcmul", "ceil", "clamp_min", "cos", "div", "elu", "exp", "gelu", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "linalg_vector_norm", "log", "log2", "log_softmax", "logsumexp", "mul", "nan_to_num",
    "neg", "pow", "reciprocal", "round", "rsqrt", "rsub", "sigmoid", "silu", "sin", "softmax", "sqrt", "square", "sub",
    "tanh",
    # sums, extremes and order
    "adaptive_max_pool2d", "all", "amax", "amin", "any", "argmax", "argmin", "argsort", "cumsum", "kthvalue",
    "max_pool2d", "maximum", "mean", "min", "minimum", "quantile", "sort", "sum", "topk",
    # comparisons
    "__or__", "__rshift__", "__xor__", "isfinite", "isnan", "le", "lt", "ne", "nextafter",
    # making and moving tokens, adding one to another
    "clone", "col2im", "diagonal", "dropout", "empty_like", "expand_as", "eye", "feature_dropout", "fill", "flip",
    "im2col", "index_add", "index_copy", "index_fill", "index_select", "linspace", "meshgrid", "new_ones",
    "nonzero_static", "numel", "numpy_T", "one_hot", "ones_like", "pad", "pad_sequence", "rand_like", "repeat",
    "repeat_interleave", "reshape_as", "resolve_conj", "resolve_neg", "scatter", "scatter_add", "scatter_reduce",
    "tile", "triu", "unflatten", "unfold", "view_as", "where",
))
# fmt: on


def shape_of(value: Value) -> list[int]:
    """The value's shape, empty if it is no tensor."""
    shape: list[int] | None = get_shape(value)
    return shape or []


def listed(value: Value) -> list[Value]:
    """The entries of a list in the trace."""
    return list(value.node().inputs())


def product_flops(position: int = 0) -> Handle:
    """Handle for a product of matrices whose left factor is the operator's input at ``position``.

    One MAC for each element of the result and of the contracted dimension; unlike fvcore's own handle this
    also holds for vectors and for batch dimensions that are broadcast.
    """
    return lambda inputs, outputs: prod(shape_of(outputs[0])) * shape_of(inputs[position])[-1]


def attention_flops(inputs: Values, outputs: Values) -> int:
    """MACs of q k^T and of the attention map times v: B * heads * Nq * Nk * (Dk + Dv)."""
    key, value = shape_of(inputs[1]), shape_of(inputs[2])
    queries = prod(shape_of(outputs[0])[:-1])  # B * heads * Nq, also if k and v have fewer heads
    return queries * key[-2] * (key[-1] + value[-1])


def einsum_flops(inputs: Values, outputs: Values) -> int:
    """MACs of ``torch.einsum``, contracted from left to right; fvcore rounds them to four digits.

    A pair of factors takes one MAC for each combination of the indices that either has. Indices that one factor
    alone has and that are summed over are summed first, which is no product.
    """
    left, _, right = str(inputs[0].toIValue()).replace(" ", "").partition("->")
    shapes = [shape_of(value) for value in listed(inputs[1])]
    factors: list[set[str]] = []
    sizes: Counter[str] = Counter()
    for term, shape in zip(left.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        broadcast = len(shape) - len(before) - len(after)  # dimensions of the ellipsis, aligned at the last
        labels: list[str] = [*before, *(f"...{i}" for i in range(broadcast, 0, -1) if dots), *after]
        factors.append(set(labels))
        sizes |= Counter(dict(zip(labels, shape, strict=True)))
    kept: set[str] = {*right.replace("...", "")} if right else {label for label in sizes if left.count(label) == 1}
    kept |= {label for label in sizes if label.startswith("...")}
    total, done = 0, factors[0]
    for i, factor in enumerate(factors[1:], start=2):
        later = kept.union(*factors[i:])
        done, factor = done & (factor | later), factor & (done | later)
        total += prod(sizes[label] for label in done | factor)
        done = (done | factor) & later
    return total


def rms_norm_flops(inputs: Values, outputs: Values) -> int:
    """As fvcore counts a LayerNorm, 5 for each element and 4 without weights, less the mean and its subtraction."""
    return prod(shape_of(outputs[0])) * (2 if not shape_of(inputs[2]) else 3)


def recurrent_flops(inputs: Values, outputs: Values) -> int:
    """MACs of an LSTM or GRU: each of its weight matrices is applied at every step."""
    steps = prod(shape_of(inputs[0])[:-1])
    shapes = [shape_of(value) for value in listed(inputs[2])]
    return steps * sum(prod(shape) for shape in shapes if len(shape) == 2)


def pool_flops(inputs: Values, outputs: Values) -> int:
    """Elements that average pooling adds up, as fvcore counts adaptive pooling."""
    shape, kernel = shape_of(outputs[0]), [int(str(value.toIValue())) for value in listed(inputs[1])]
    return prod(shape) * prod(kernel * (len(shape) - 2) if len(kernel) == 1 else kernel)


def resize_flops(taps: int, antialiased: bool = False) -> Handle:
    """Handle for a resize of maps whose kernel spans ``taps`` elements along a side, as fvcore counts bilinear ones.

    An antialiased kernel is wider by as much as a side shrinks.
    """

    def flops(inputs: Values, outputs: Values) -> int:
        old, new = shape_of(inputs[0]), shape_of(outputs[0])
        sides = [max(1.0, a / b) if antialiased else 1.0 for a, b in zip(old[2:], new[2:], strict=True)]
        return round(prod(new) * prod(taps * side for side in sides))

    return flops


HANDLES: dict[str, Handle] = {
    **{f"aten::{name}": product_flops() for name in ("matmul", "mm", "bmm", "mv", "dot")},
    **{f"aten::{name}": product_flops(1) for name in ("addmm", "addmv", "baddbmm")},
    "aten::cdist": product_flops(),  # one difference is squared and accumulated where a product has one MAC
    "aten::einsum": einsum_flops,
    "aten::rms_norm": rms_norm_flops,
    "prim::PythonOp._NoopSaveInputs": lambda inputs, outputs: 0,  # of torch.utils.checkpoint, which only keeps them
    "aten::lstm": recurrent_flops,
    "aten::gru": recurrent_flops,
    "aten::avg_pool1d": pool_flops,
    "aten::avg_pool2d": pool_flops,
    "aten::upsample_linear1d": resize_flops(2),
    "aten::upsample_bicubic2d": resize_flops(4),
    "aten::_upsample_bilinear2d_aa": resize_flops(2, antialiased=True),
    "aten::_upsample_bicubic2d_aa": resize_flops(4, antialiased=True),
    "aten::scaled_dot_product_attention": attention_flops,
    "aten::_scaled_dot_product_attention_math": attention_flops,
    "aten::_scaled_dot_product_flash_attention": attention_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "aten::_scaled_dot_product_efficient_attention": attention_flops,
    "aten::_scaled_dot_product_cudnn_attention": attention_flops,
    "aten::_scaled_dot_product_fused_attention_overrideable": attention_flops,
}


class Spread(NamedTuple):
    """How the MACs of single images are spread over a set of them; percentiles are interpolated linearly."""

    mean: float
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


@dataclass(frozen=True)
class FlopReport:
    """Multiply-accumulates (MACs) of one image, or their mean over several.

    Attributes:
        total: All counted MACs.
        by_operator: Operator, as fvcore names it -> MACs.
        by_module: Path of a module -> MACs of it and the modules inside it; those without any are left out.
        uncounted: Operator without a rule -> its calls for one image; empty for a complete count.
        per_image: MACs of every single image, in order.
    """

    total: int
    by_operator: dict[str, int]
    by_module: dict[str, int]
    uncounted: dict[str, int]
    per_image: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations, two to the MAC; what papers on vision transformers call so is ``total``."""
        return 2 * self.total

    @property
    def spread(self) -> Spread:
        """Distribution of ``per_image``."""
        quartiles: list[float] = np.quantile(self.per_image, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return Spread(sum(self.per_image) / len(self.per_image), *quartiles)

    def __str__(self) -> str:
        lines = [f"{self.total / 1e9:.4g} GMACs ({self.flops / 1e9:.4g} GFLOPs of two to the MAC)"]
        if len(self.per_image) > 1:
            spread = ", ".join(f"{name.replace('_', ' ')} {n / 1e9:.4g}" for name, n in self.spread._asdict().items())
            lines.append(f"{len(self.per_image)} images, GMACs: {spread}")
        modules = {name: macs for name, macs in self.by_module.items() if "." not in name}
        for heading, counts in (("operator", self.by_operator), ("module", modules)):
            width = max(map(len, (*counts, heading)))
            lines += ["", f"{heading:{width}}     GMACs   share"]
            for name, macs in sorted(counts.items(), key=lambda item: -item[1]):
                lines.append(f"{name:{width}}  {macs / 1e9:8.4f}  {macs / max(1, self.total):6.1%}")
        calls = ", ".join(f"{name} ({number})" for name, number in sorted(self.uncounted.items()))
        lines += ["", f"operators without a rule, and their calls: {calls or 'none'}"]
        return "\n".join(lines)


def eval_twin(model: ModelT) -> ModelT:
    """A copy of the model in eval mode that shares all parameters and buffers, but no hooks or flags."""
    return copy_shared(model).eval()


def tensors_alone(module: nn.Module, given: object, output: object) -> tuple[Tensor, ...] | None:
    """A forward hook: the tensors alone of a named tuple, such as a ``Selection``, since a trace takes nothing else."""
    if not hasattr(output, "_fields"):
        return None
    leaves: list[object] = tree_leaves(output)
    return tuple(value for value in leaves if isinstance(value, Tensor))


def count_flops(
    model: nn.Module, input_size: tuple[int, int, int], *, images: Tensor | None = None, strict: bool = False
) -> FlopReport:
    """Multiply-accumulates (MACs) of one image in eval mode. The model is left as it is.

    What no output of the model depends on is not in the trace, and so not in the count. Where a model takes several
    images as one, the crops of an image (``CropSelector``) or the frames of a video (``VideoSelector``), the count is
    that of all of them.

    Args:
        model: Takes images (1, 3, H, W) and returns a tensor, tuples or lists of tensors, or a named tuple, such as the
            ``Selection`` of a ``TokenSelector``, of which the tensors count.
        input_size: (channels, H, W) of an image, filled with seeded noise.
        images: (B, channels, H, W) images to count instead, one at a time: the mean, and ``per_image``, of a method
            whose number of tokens depends on the image, such as ATS and DyMU. Each number of the report is rounded.
        strict: Refuse a count that is not complete.

    Raises:
        TypeError: No model, such as a name; a size that is not of three whole numbers; images that are no tensor.
        ValueError: Images of another size than ``input_size``, or not a multiple of those that the model takes as one;
            with ``strict`` an operator without a rule.
    """
    check_model(model)
    like = next(model.parameters(), torch.empty(0))
    views = views_of(model)
    if not isinstance(input_size, Sequence) or [isinstance(s, Integral) for s in input_size] != [True] * 3:
        raise TypeError(f"input_size must be (channels, H, W), got {input_size!r}")
    if not isinstance(images, Tensor | None):
        raise TypeError(f"images must be a tensor (B, channels, H, W), got {type(images).__name__}")
    if images is None:
        images = torch.randn(views, *input_size, generator=torch.Generator().manual_seed(0))
    if images.shape[:1] in ((), (0,)) or tuple(images.shape[1:]) != tuple(input_size):
        raise ValueError(
            f"expected at least one image of {' x '.join(map(str, input_size))}, got a tensor of shape "
            f"{tuple(images.shape)}"
        )
    check_views(len(images), views)
    twin = eval_twin(model)
    twin.register_forward_hook(tensors_alone)
    counts = [_counts(twin, image) for image in images.to(like.device, like.dtype).split(views)]
    uncounted: Counter[str] = Counter()
    for count in counts:
        uncounted |= count.uncounted
    if strict and uncounted:
        raise ValueError(
            f"no rule counts the operators {', '.join(sorted(uncounted))}, so the count may be too low; give them one "
            "in effvit.measure.flops.HANDLES, or count with strict=False, which lists them as the report's uncounted"
        )
    by_module = _mean([count.by_module for count in counts])
    by_operator = _mean([count.by_operator for count in counts])
    per_image = tuple(count.total for count in counts)
    return FlopReport(by_module.pop("", 0), by_operator, by_module, dict(uncounted), per_image)


class _Counts(NamedTuple):
    """fvcore's count of one image; attributes as in ``FlopReport``."""

    total: int
    by_operator: Counter[str]
    by_module: Counter[str]
    uncounted: Counter[str]


def _counts(model: nn.Module, image: Tensor) -> _Counts:
    """The count of one image (1, 3, H, W), or of all that the model takes as one."""
    analysis = FlopCountAnalysis(model, image)
    analysis.set_op_handle(**HANDLES, **dict.fromkeys(IGNORED_OPERATORS))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), _separate_attention_operators(), traced_once():
        total = int(analysis.total())
    return _Counts(total, analysis.by_operator(), analysis.by_module(), analysis.unsupported_ops())


@contextmanager
def _separate_attention_operators() -> Iterator[None]:
    """Without torch's fused transformer layers, so that the modules inside ``nn.MultiheadAttention`` are called."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _mean(counts: list[Counter[str]]) -> dict[str, int]:
    sums: Counter[str] = sum(counts, Counter())
    return {name: round(value / len(counts)) for name, value in sums.items() if value}
