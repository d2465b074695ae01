"""Files that other runtimes read: how a recorded model is written to them, and how such a file runs on this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

__all__ = [
    "FORMATS",
    "INPUT",
    "OUTPUT",
    "Format",
    "Run",
    "check_installed",
    "read_onnx",
    "read_openvino",
    "read_pt2",
    "write_onnx",
]

Run = Callable[[Tensor], Tensor]
INPUT, OUTPUT = "images", "scores"  # names of the two ends of a graph


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: Of the file that is named; others, which belong to it, lie beside it.
        needs: Packages that write and run it besides torch.
        write: Recorded program, path -> nothing; the files are there.
        read: Path -> what computes scores (B, classes) of images (B, C, H, W) on a CPU in float32.
    """

    suffix: str
    needs: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    read: Callable[[Path], Run]


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Write the program as ``torch.export.load`` and AOTInductor read it."""
    torch.export.save(program, path)


def read_pt2(path: Path) -> Run:
    """The program of a .pt2 file, run by torch."""
    with warnings.catch_warnings():  # torch 2.11 reads its weights into a buffer that it then finds read-only
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        run: Run = torch.export.load(path).module()
    return run


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """Let a logger tell of nothing less than errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write the program as ONNX, in the opset that this torch prefers; weights above 1.5 GB go to a file beside it."""
    with warnings.catch_warnings(), errors_alone("onnx_ir"):  # of empty lists, which it takes for integers rightly
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)  # of torch at itself
        graph = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert graph is not None
    graph.save(path)


def read_onnx(path: Path, threads: int = 0) -> Run:
    """The graph of an .onnx file, run by onnxruntime on so many threads; 0 for its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def write_openvino(program: ExportedProgram, path: Path) -> None:
    """Write the program as OpenVINO's .xml and .bin, by way of ONNX, which takes a fraction of the direct conversion.

    Weights stay float32: ``openvino.save_model`` would round them to float16 unless told otherwise.
    """
    import openvino

    with TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.onnx"
        write_onnx(program, graph)
        openvino.save_model(openvino.Core().read_model(graph), path, compress_to_fp16=False)


def read_openvino(path: Path, threads: int = 0) -> Run:
    """The graph of an .xml or .onnx file, run by OpenVINO on so many threads of the CPU; 0 for its own choice.

    It computes in float32, which on CPUs with bfloat16 is not its default.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())  # the next run overwrites its own output


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "onnx": Format(".onnx", ONNX_PACKAGES, write_onnx, read_onnx),
    "pt2": Format(".pt2", (), write_pt2, read_pt2),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino"), write_openvino, read_openvino),
}


def check_installed(to: str) -> None:
    """Raise an ImportError that names the packages which a format needs and this Python lacks."""
    lacking = [package for package in FORMATS[to].needs if find_spec(package) is None]
    if lacking:
        raise ImportError(f"{to} files need {', '.join(lacking)}; run pip install 'effvit[export]'")
