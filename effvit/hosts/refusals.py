"""Why a model or a keyword is refused, and what to give in its place.

Nothing here is needed to run a model. Libraries are told apart by the names of their classes, so none is imported.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from effvit.hosts._unserved import UNSERVED

__all__ = ["is_file_name", "is_sharded", "name_arguments", "reason_against", "reason_against_class"]

UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
FEATURE_NETS = ("FeatureListNet", "FeatureDictNet", "FeatureHookNet", "FeatureGetterNet")  # of features_only
# Classes that hold a program recorded from a model, without its blocks.
RECORDED = ("GraphModule", "ScriptModule", "RecursiveScriptModule", "TopLevelTracedModule", "ExportedProgram")


def is_file_name(name: str) -> bool:
    """Whether a string names a file or folder rather than a model: no registered name has such signs or endings."""
    return os.sep in name or ":" in name or name.endswith((".pth", ".pt", ".bin", ".safetensors", ".tar", ".onnx"))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP holds the parameters, which by the names of its classes needs no import of it."""
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(model).__mro__)


def _path_of(cls: type) -> str:
    """Module path and name of a class: two libraries may give the same name to different ones."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _listed(supported: Collection[type]) -> str:
    return ", ".join(sorted(_path_of(cls) for cls in supported))


def _held(model: nn.Module, supported: Collection[type]) -> str | None:
    """Where in the model the first one of a supported class is, reduced or not: "module", "visual.trunk"."""
    return next((name for name, part in model.named_modules() if name and isinstance(part, tuple(supported))), None)


def reason_against(model: object, supported: Collection[type], final: Collection[type] = ()) -> str:
    """Why tokens of what was given cannot be reduced, and what to do.

    Args:
        model: What was given in place of a model of one of these classes.
        supported: The classes.
    """
    kind: type = type(model)
    known = f"supported are {_listed(supported)}"
    if isinstance(model, str) and model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return f"{model} names a folder that timm reads; give timm.create_model({model!r}, pretrained=True)"
    if isinstance(model, (str, os.PathLike)):
        return (
            f"{os.fspath(model)} names a file, not a model; create the model with timm.create_model, read the file "
            "with effvit.load_checkpoint(model, path), then sparsify the model"
        )
    if isinstance(model, Mapping):
        return (
            f"a {kind.__name__} of weights is no model; create the model with timm.create_model, load the weights with "
            "model.load_state_dict or effvit.load_checkpoint, then sparsify the model"
        )
    if any(cls.__name__ in RECORDED for cls in kind.__mro__):
        return f"a {_path_of(kind)} is a recorded program; sparsify the model first, then trace, quantise or export it"
    if not isinstance(model, nn.Module):
        return f"cannot reduce the tokens of a {_path_of(kind)}, which is no model; {known}"
    if is_sharded(model):
        return "the parameters of this model are sharded (FSDP); sparsify the model first, then shard it"
    held = _held(model, supported)
    if kind.__name__ in FEATURE_NETS:
        part = "create the model without features_only, sparsify it"
        if held is not None:
            part = f"sparsify the vision transformer at {held!r}, effvit.sparsify(model.{held}, ...),"
        return (
            f"a {_path_of(kind)} only holds the parts that its maps need; {part} and call forward_intermediates, or "
            "create a registered name with features_only=True"
        )
    if held is not None and any(cls.__name__ == "PeftModel" for cls in kind.__mro__):
        return (
            f"a {_path_of(kind)} holds a vision transformer at {held!r}, and adapters in its layers; sparsify that "
            f"part, effvit.sparsify(model.{held}, ...), which shares them, or sparsify model.merge_and_unload()"
        )
    if held is not None:
        return (
            f"a {_path_of(kind)} holds a vision transformer at {held!r} and does more than it; sparsify that part, "
            f"effvit.sparsify(model.{held}, ...), and wrap, compile or put it back afterwards"
        )
    return reason_against_class(kind, supported, final)


def reason_against_class(kind: type, supported: Collection[type], final: Collection[type] = ()) -> str:
    """The reason against a model of a class that is not supported and holds none that is.

    Args:
        kind: The class.
        supported: The classes that are.
        final: Those of them whose subclasses cannot be registered.
    """
    base = next((cls for cls in kind.__mro__ if cls in supported), None)
    if base is not None:
        remedy = "if it only adds to it, register it: effvit.register_host(cls)"
        if base in final:
            remedy = f"subclasses of hosts with windows cannot be registered: create a {_path_of(base)}"
        return (
            f"{_path_of(kind)} is a subclass of {_path_of(base)} and may compute something else, so it is not reduced "
            f"as one; {remedy}"
        )
    library = kind.__module__.partition(".")[0]
    advice = _against_family(kind)
    if library in ("torchvision", "transformers", "open_clip", "mmpretrain", "torch"):
        advice = f"; {library}'s models have other blocks: create the same architecture with timm.create_model"
    return f"cannot reduce the tokens of a {_path_of(kind)}{advice}; supported are {_listed(supported)}"


def _against_family(kind: type) -> str:
    """What stands against a class of timm, as a clause behind a colon; nothing for a class that no table tells of."""
    modules = [cls.__module__ for cls in kind.__mro__]
    families = [module.removeprefix("timm.models.") for module in modules if module.startswith("timm.models.")]
    return next((f": {UNSERVED[family]}" for family in families if family in UNSERVED), "")


@contextmanager
def name_arguments(name: str, settings: Collection[str]) -> Iterator[None]:
    """Raise a TypeError that names the model where its constructor does not know a keyword.

    Args:
        name: Registered name of the model.
        settings: Keywords of its own, of which the nearest is proposed.
    """
    try:
        yield
    except TypeError as error:
        found = UNEXPECTED.search(str(error))
        if found is None:
            raise
        argument = found[1]
        if argument == "output_stride":
            raise TypeError(
                f"{name} has no output_stride: a vision transformer has no strides to replace by dilation, which PAN "
                "and DeepLab ask for; use a decoder that takes maps of strides 4 to 32 (Unet, FPN, UPerNet), for a "
                "plain ViT under the name that effvit.register_pyramid returns"
            ) from error
        close = difflib.get_close_matches(argument, settings, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        own = f"its own are {', '.join(sorted(settings))}; " if settings else ""
        raise TypeError(f"{name} has no argument {argument!r}; {hint}{own}{error}") from error
