"""What a backbone meets of detectron2, after its documentation at detectron2.readthedocs.io.

detectron2 is on no package index, so the tests cannot install it.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn


@dataclass
class ShapeSpec:
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module, metaclass=ABCMeta):
    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self) -> dict[str, Tensor]: ...

    @property
    def size_divisibility(self) -> int:
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {}

    @abstractmethod
    def output_shape(self) -> dict[str, ShapeSpec]: ...


class Registry(dict[str, Callable[..., Any]]):
    def register(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def enter(entry: Callable[..., Any]) -> Callable[..., Any]:
            self[entry.__name__] = entry
            return entry

        return enter


class CfgNode(dict[str, Any]):
    """A dict whose entries are attributes too; one that allows new entries may be merged with any."""

    def __init__(self, entries: dict[str, Any] | None = None, new_allowed: bool = False) -> None:
        super().__init__(entries or {})
        object.__setattr__(self, "new_allowed", new_allowed)

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def merge(self, entries: dict[str, Any]) -> None:
        """As ``merge_from_file`` does with what a YAML file holds."""
        for name, value in entries.items():
            if name not in self and not self.__dict__["new_allowed"]:
                raise KeyError(f"Non-existent config key: {name}")
            if isinstance(value, dict) and isinstance(self.get(name), CfgNode):
                self[name].merge(value)
            else:
                self[name] = CfgNode(value) if isinstance(value, dict) else value


def modules() -> dict[str, ModuleType]:
    """The package, a fresh one each time: name -> module."""
    contents = {
        "detectron2": {},
        "detectron2.config": {"CfgNode": CfgNode},
        "detectron2.layers": {"ShapeSpec": ShapeSpec},
        "detectron2.modeling": {"BACKBONE_REGISTRY": Registry(), "Backbone": Backbone},
    }
    made = {}
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(attributes)
    return made
