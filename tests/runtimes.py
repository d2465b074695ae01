"""Runtimes and number formats that models are deployed in: recorders beside torch's own, for docs/deployment.md."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import onnx
import torch
from torch import Tensor, nn

from effvit.deployment.exporting import record
from effvit.deployment.formats import Run, read_onnx, read_openvino, write_onnx
from effvit.deployment.int8 import quantize_model, quantize_onnx

__all__ = ["cast", "channels_last", "openvino", "operators", "quantized_by_onnxruntime", "quantized_by_torchao"]

GRAPHS: WeakKeyDictionary[nn.Module, bytes] = WeakKeyDictionary()  # two runtimes read one that takes a minute to make


@torch.no_grad()
def graph_file(model: nn.Module, x: Tensor, folder: str) -> Path:
    """An ONNX file of the model with a dynamic batch, in the folder."""
    path = Path(folder) / "graph.onnx"
    if model not in GRAPHS:
        write_onnx(record(model, x, any_batch=True), path)
        GRAPHS[model] = path.read_bytes()
    path.write_bytes(GRAPHS[model])
    return path


def operators(model: nn.Module, x: Tensor) -> list[str]:
    """ONNX operators of the model's graph; of those that combine values at one place also how: "ScatterND add"."""
    with TemporaryDirectory() as folder:
        nodes = onnx.load(graph_file(model, x, folder)).graph.node
    return sorted({" ".join([node.op_type, *_reduction(node)]) for node in nodes})


def _reduction(node: onnx.NodeProto) -> list[str]:
    found = [attribute.s.decode() for attribute in node.attribute if attribute.name == "reduction"]
    return [reduction for reduction in found if reduction != "none"]


def openvino(model: nn.Module, x: Tensor) -> Run:
    with TemporaryDirectory() as folder:
        return read_openvino(graph_file(model, x, folder))


def quantized_by_onnxruntime(model: nn.Module, x: Tensor) -> Run:
    with TemporaryDirectory() as folder:
        small = Path(folder) / "int8.onnx"
        quantize_onnx(graph_file(model, x, folder), small)
        return read_onnx(small)


def quantized_by_torchao(model: nn.Module, x: Tensor) -> Run:
    return quantize_model(model)


def cast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    small = copy.deepcopy(model).to(dtype)
    return lambda x: small(x.to(dtype)).float()


def channels_last(model: nn.Module, x: Tensor) -> Run:
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return lambda x: strided(x.contiguous(memory_format=torch.channels_last))
