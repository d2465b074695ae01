"""Weights out of TorchScript archives, in which OpenAI keeps CLIP; the program beside them is neither run nor loaded.

The archive holds the tree of modules as a pickle whose classes are names of that program. Here they all stand for one
class that holds what it is given, and nothing else can be named but tensors.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["is_torchscript", "read_torchscript"]

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Module:
    """A module of the program: its parameters, sub-modules and constants by name."""

    def __init__(self) -> None:
        self.entries: dict[object, object] = {}

    def __setstate__(self, state: dict[object, object]) -> None:
        self.entries = dict(state)


class Rebuild:
    """What makes a tensor of a storage; a value of its own, so that a pickle cannot reach torch's function."""

    __slots__ = ()

    def __call__(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> Tensor:
        return storage.as_strided(size, stride, offset)


class ModuleUnpickler(pickle.Unpickler):
    """Reads the tree of modules; a ``pickle.UnpicklingError`` for any other class or function."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> object:
        if module.partition(".")[0] == "__torch__":
            return type("Module", (Module,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Rebuild()
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):  # of hooks, of which there are none
            return dict
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: tuple[str, str, str, str, int]) -> Tensor:
        _, kind, key, *_ = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            dtype = DTYPES[kind]
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that ``torch.jit.save`` wrote."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") and name.count("/") == 1 for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a program, by the names of its ``state_dict``."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        return dict(_tensors(ModuleUnpickler(archive, folder).load(), ""))


def _tensors(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    entries = module.entries if isinstance(module, Module) else {}
    for name, value in entries.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
