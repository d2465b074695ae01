"""The methods there are, those of this package and those that others register."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from effvit.reducers.base import Reducer

__all__ = [
    "ENTRY_POINTS",
    "METHODS",
    "RESERVED",
    "load_entry_points",
    "on_registration",
    "origin_of",
    "register_kind",
    "register_method",
    "register_reducer",
]

MethodT = TypeVar("MethodT")

METHODS: dict[str, type[Reducer]] = {}
ENTRY_POINTS = "effvit.methods"
# Keywords that stand beside a method's settings and mean something else: of sparsify, timm.create_model, its builders.
RESERVED = frozenset(
    {"model", "method", "recover", "share", "host", "settings"}
    | {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"}
    | {"exportable", "no_jit", "features_only", "out_indices", "feature_cfg", "pretrained_strict", "num_classes"}
    | {"in_chans", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "global_pool", "class_token"}
    | {"reg_tokens", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"}
    | {"patch_drop_rate", "dynamic_img_size", "dynamic_img_pad", "init_values", "qk_norm", "device", "dtype"}
)
_listeners: list[Callable[[type[Reducer]], None]] = []
_kinds: dict[type, Callable[[type], None]] = {}


def on_registration(listener: Callable[[type[Reducer]], None]) -> None:
    """Call ``listener`` with every method that is registered already, and with each that will be."""
    _listeners.append(listener)
    for method in METHODS.values():
        listener(method)


def register_kind(base: type, register: Callable[[type], None]) -> None:
    """Let ``register_method`` hand subclasses of ``base``, which are no reducers, to ``register``."""
    _kinds[base] = register


def register_method(method: type[MethodT]) -> type[MethodT]:
    """Add a method, so that ``sparsify``, the zoo's names, the tools and the OpenMMLab backbone know it.

    A subclass of ``effvit.Selector`` goes to the methods of ``effvit.select_tokens`` instead, whose names are apart.

    It can stand above a class as a decorator. A package that is installed adds its methods without being imported, by
    entry points of the group ``effvit.methods``. The same class may be registered again.

    Args:
        method: A subclass of ``Reducer`` with ``name``, ``summary``, ``plan``, ``count`` (or ``count_on``) and ``off``,
            or one of ``Selector`` with ``name``, ``summary`` and ``choose``.

    Returns:
        The class.

    Raises:
        TypeError: No subclass of ``Reducer`` or ``Selector``, one that lacks something, or a reducer that overrides
            ``forward``.
        ValueError: A name that is no word in lower case, or that another method has; a setting whose name means
            something else to ``sparsify`` or ``timm.create_model``.
    """
    kind = next((base for base in _kinds if isinstance(method, type) and issubclass(method, base)), None)
    register_reducer(method) if kind is None else _kinds[kind](method)
    return method


def register_reducer(cls: type) -> type[Reducer]:
    """``register_method`` of what ``sparsify`` takes."""
    method = _checked(cls)
    known = METHODS.get(method.name)
    if known is method:
        return method
    if known is not None:
        raise ValueError(
            f"the method {method.name!r} is registered already, as {origin_of(known)}; "
            f"give {origin_of(method)} another name"
        )
    METHODS[method.name] = method
    try:
        for listener in _listeners:
            listener(method)
    except Exception:
        del METHODS[method.name]
        raise
    return method


def _checked(method: type) -> type[Reducer]:
    """The class, if it is one of a reducer that can run."""
    if not (isinstance(method, type) and issubclass(method, Reducer)):
        raise TypeError(f"a method is a subclass of effvit.Reducer, got {method!r}")
    for attribute in ("name", "summary"):
        if not isinstance(getattr(method, attribute, None), str):
            raise TypeError(f"{origin_of(method)} has no {attribute}; set {attribute} = '...' in the class")
    missing = [name for name in ("plan", "off") if getattr(method, name).__func__ is getattr(Reducer, name).__func__]
    if method.count is Reducer.count and method.count_on is Reducer.count_on:
        missing.append("count")
    if missing:
        raise TypeError(f"{origin_of(method)} does not define {' and '.join(missing)}, see effvit.Reducer")
    if method.forward is not Reducer.forward:
        raise TypeError(
            f"{origin_of(method)} overrides forward, which runs the block for every method; act in before, pick, "
            "map_edit, reduce or after instead"
        )
    if not re.fullmatch("[a-z][a-z0-9_]*", method.name):
        raise ValueError(f"the name of a method is a word in lower case, got {method.name!r} for {origin_of(method)}")
    clash = sorted(method.defaults().keys() & RESERVED)
    if clash:
        raise ValueError(
            f"{origin_of(method)} has a setting {clash[0]!r}, which effvit.sparsify or timm.create_model takes for "
            "something else; give it another name"
        )
    return method


def origin_of(method: type) -> str:
    """Module and name of a class, for messages."""
    return f"{method.__module__}.{method.__qualname__}"


def load_entry_points() -> None:
    """Register what installed packages offer in the group ``effvit.methods``; a warning names what fails."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register_method(entry.load())
        except Exception as error:
            warnings.warn(
                f"the method {entry.name!r} of {entry.value} is left out: {type(error).__name__}: {error}", stacklevel=2
            )
