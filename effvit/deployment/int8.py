"""Models that multiply in 8 bits: an ONNX file rewritten by ONNX Runtime, the linear layers of a module by torchao."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TypeVar

from torch import nn

__all__ = ["quantize_model", "quantize_onnx"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def quantize_onnx(source: Path, target: Path) -> None:
    """Write the ONNX file again with int8 weights, for each channel; what enters them is rounded by the batch's range.

    That is so in linear layers and convolutions, as ONNX Runtime does by default. No images are needed to calibrate it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def quantize_model(model: ModelT) -> ModelT:
    """A copy of the model whose linear layers have int8 weights, for each channel; inputs are rounded for each token.

    torchao means such a model to be compiled (``effvit.compile``).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao tells of kernels for other devices at import
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return quantized
