"""Checkpoint files of official repositories, of transformers, of open_clip and of timm -> our parameter names."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from timm.models import (
    beit,
    deepseek_vit,
    eva,
    gemma4_vit,
    hiera,
    hieradet_sam2,
    naflexvit,
    qwen3_vit,
    swin_transformer,
    swin_transformer_v2,
    tiny_vit,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from effvit.block import check_model
from effvit.hosts._foreign_configs import check_config
from effvit.hosts._pickles import check_pickles
from effvit.hosts._tiny_vit_names import timm_name
from effvit.hosts._torchscript import is_torchscript, read_torchscript
from effvit.hosts.foreign_names import find_tower, unknown_names
from effvit.hosts.surface import keep_own
from effvit.messages import plain, shown

__all__ = [
    "Conversion",
    "adapt_state",
    "check_state",
    "convert_checkpoint",
    "host_state_dict",
    "load_checkpoint",
    "official_state_dict",
    "place_learnt",
    "read_checkpoint",
    "read_file",
]

# Where training scripts put the weights, the first that is there is taken. The first four in the order of timm's
# load_state_dict: averaged weights before the last ones. DeiT, EViT and GTP have "model"; SlowFast "model_state"; the
# tutorial of torch "model_state_dict"; DeepSpeed "module". The EMAHook of mmengine writes the averaged weights to
# "state_dict" and the last ones to "ema_state_dict", so that this is taken only alone.
CONTAINERS = (
    *("state_dict_ema", "model_ema", "state_dict", "model"),
    *("model_state", "model_state_dict", "module", "ema_state_dict"),
)
# Two networks of one shape, as DINO (2104.14294) trains them: where both are there, the caller names one.
NETWORKS = ("teacher", "student")
# What wraps a model, in any order: DDP, DeepSpeed and AveragedModel "module", torch.compile "_orig_mod", Lightning
# "model", detectors "backbone", SAM "image_encoder"; and what FSDP and checkpointing insert anywhere in a name.
WRAPPERS = re.compile(r"^((module|_orig_mod|model|backbone|encoder|image_encoder)\.)+")
INSERTED = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Thresholds of DyMU, which timm's filters leave at the block they belong to.
THRESHOLD = re.compile(r"^(blocks\.\d+\.)threshold$")
# Predictors of DynamicViT, numbered by pruning block.
PREDICTOR = re.compile(r"^score_predictor\.(\d+)\.")
# What a reduced host has besides the plain one: learnt thresholds, and the module of the fill "attention".
OWN = re.compile(r"(\.reducer\.|^recovery\.)")
# timm's own readers of towers, for its files and those of the language models that the towers are from.
TOWER_FILTERS: dict[type[nn.Module], Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]] = {
    qwen3_vit.Qwen3VitEncoder: qwen3_vit.checkpoint_filter_fn_encoder,
    qwen3_vit.Qwen3VitClassifier: qwen3_vit.checkpoint_filter_fn_classifier,
    deepseek_vit.DeepseekVitEncoder: deepseek_vit.checkpoint_filter_fn_encoder,
    deepseek_vit.DeepseekVitClassifier: deepseek_vit.checkpoint_filter_fn_classifier,
    gemma4_vit.Gemma4VitEncoder: gemma4_vit.checkpoint_filter_fn_encoder,
    gemma4_vit.Gemma4VitClassifier: gemma4_vit.checkpoint_filter_fn_classifier,
}
# Bounds that Gemma's towers clamp to, infinite where there is none.
BOUND = re.compile(r"\.(input|output)_(min|max)$")
# Parameters of training only: the projection head of DINO, how many weights an average is of. Constants: the all-zero
# row of ATS, an index table. And what stands around a backbone in the files of mmdet, mmseg and SAM.
DROPPED = re.compile(
    r"(^(n_averaged|steps)$|^head\.(mlp|last_layer)\.|\.attn\.(out_zero_mask|attention_bias_idxs)$"
    r"|^(neck|rpn_head|roi_head|bbox_head|decode_head|auxiliary_head|prompt_encoder|mask_decoder)\.)"
)
# What a tower of CLIP or a classifier of transformers has, and a host made as a backbone has not.
HEAD = re.compile(r"^head(_dist)?\.(weight|bias)$")
# timm's filters of hosts that need nothing around them.
PLAIN_FILTERS: dict[type[nn.Module], Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]] = {
    beit.Beit: beit.checkpoint_filter_fn,
    hiera.Hiera: hiera.checkpoint_filter_fn,
    hieradet_sam2.HieraDet: hieradet_sam2.checkpoint_filter_fn,
    naflexvit.NaFlexVit: naflexvit.checkpoint_filter_fn,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2.checkpoint_filter_fn,
    vision_transformer_relpos.VisionTransformerRelPos: vision_transformer_relpos.checkpoint_filter_fn,
    vision_transformer_sam.VisionTransformerSAM: vision_transformer_sam.checkpoint_filter_fn,
}
# The program of a TorchScript archive, which is never read; ``check_pickles`` reads all that is called .pkl.
PROGRAM = re.compile(r"^[^/]*/code/.*(?<!\.pkl)$")
# The encoders of SAM have no use for a classifier: the one that MobileSAM's holds no longer fits its features.
STALE = re.compile(r"(^|\.)image_encoder\.head\.(weight|bias)$")


def official_state_dict(
    checkpoint: Mapping[str, object], key: str | None = None, own: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a loaded checkpoint under plain names, and the names of what was dropped from it.

    Files of the families of ``foreign_names`` keep the names they have, by which ``adapt_state`` knows them.

    Args:
        checkpoint: Weights, or a dict that holds them beside others: averaged ones come before the last ones, in timm's
            order.
        key: The entry with the weights; None finds it.
        own: Names of the model to load, which stay even if other networks have parts that are dropped under them.

    Raises:
        ValueError: Entries whose names are no strings, or two of one plain name; no ``key``, or none given for a file
            of a teacher and a student; a weight that is no dense array of real numbers; several vision towers.
    """
    checkpoint = _container(checkpoint, key)
    for name in checkpoint:
        if not isinstance(name, str):
            raise ValueError(
                f"a checkpoint names its weights by strings, but this one has an entry {name!r}; save the model's "
                "state_dict"
            )
    is_foreign = find_tower(dict.fromkeys(INSERTED.sub("", name) for name in checkpoint)) is not None
    state: dict[str, Tensor] = {}
    dropped = []
    for name, value in checkpoint.items():
        stale = STALE.search(name)
        name = INSERTED.sub("", name)
        name = name if is_foreign else WRAPPERS.sub("", name)
        no_weight = not is_foreign and (stale or (DROPPED.search(name) and name not in own))
        if not isinstance(value, Tensor) or no_weight:
            dropped.append(name)
        elif name in state:
            raise ValueError(
                f"the checkpoint holds {plain(name)} of several networks; save the state_dict of one of them alone"
            )
        else:
            _check_weight(name, value)
            state[name] = value
    return state, dropped


def _container(checkpoint: Mapping[str, object], key: str | None) -> Mapping[str, object]:
    """The entry of a checkpoint that holds the weights, or the checkpoint itself."""
    held = {}
    for name in (*CONTAINERS, *NETWORKS):
        entry = checkpoint.get(name)
        if isinstance(entry, Mapping):
            held[name] = entry
    if key is not None:
        named = checkpoint.get(key)
        if not isinstance(named, Mapping):
            entries = [name for name, value in checkpoint.items() if isinstance(value, Mapping)]
            raise ValueError(f"the checkpoint has no weights under {shown(key)}, only under {shown(entries)}")
        return named
    if list(held) == list(NETWORKS):
        raise ValueError(
            "the checkpoint holds the weights of two networks, 'teacher' and 'student'; say which by key='teacher' or "
            "key='student' (--key on the command line, pretrained_key in a config)"
        )
    return next(iter(held.values()), checkpoint)


def _check_weight(name: str, value: Tensor) -> None:
    """Raise a ValueError unless a weight is a dense array of real numbers."""
    if value.layout != torch.strided or value.is_nested:
        kind = "sparse or nested"
    elif value.is_quantized:
        kind = "quantised"
    elif value.is_complex():
        kind = "complex"
    else:
        return
    raise ValueError(
        f"{plain(name)} is a {kind} tensor, but weights are dense arrays of real numbers; save the model's state_dict "
        "before it is quantised or pruned"
    )


class Conversion(NamedTuple):
    """What a checkpoint became.

    Attributes:
        state: The weights under the model's names, complete and of its shapes.
        same: Names that the file has too.
        renamed: Names that the file does not have -> the file's name of the same weight.
        made: Names of weights that were joined, split, or not in the file and filled in.
        dropped: Names of the file that were left out: of training only, constants, or of what the model does not have.
        family: Whose names the file has, as ``foreign_names`` calls it; None for timm's and the official ones of a
            model.
    """

    state: dict[str, Tensor]
    same: list[str]
    renamed: dict[str, str]
    made: list[str]
    dropped: list[str]
    family: str | None


def place_learnt(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Rename what official files hold beside the host and fill in what they do not; returns names without a place.

    A plain host's checkpoint has no thresholds, no predictors and no recovery, and an official one has thresholds for
    blocks that do not reduce too.
    """
    own = {name: value for name, value in model.state_dict().items() if OWN.search(name)}
    unused = place_predictors(state, own)
    learns = any(".reducer." in name for name in own)
    for name in [name for name in state if THRESHOLD.match(name) and learns]:
        value = state.pop(name)
        prefix = THRESHOLD.sub(r"\1reducer.", name)
        if f"{prefix}threshold" not in own:
            unused.append(name)
            continue
        state[f"{prefix}threshold"] = value
        state[f"{prefix}num_batches"] = (value != 1).long()  # officially not saved; 1.0 stands for none
    keep_own(state, own)
    return unused


def place_predictors(state: dict[str, Tensor], own: Collection[str]) -> list[str]:
    """Rename DynamicViT's official predictors in ``state`` after the blocks they belong to; returns those without one.

    Args:
        state: Weights.
        own: Names of what the model learns.
    """
    places = sorted({int(name.split(".")[1]) for name in own if ".reducer.predictor." in name})
    unused = []
    for name in [name for name in state if PREDICTOR.match(name)]:
        stage, _, rest = name.removeprefix("score_predictor.").partition(".")
        value = state.pop(name)
        if int(stage) < len(places):
            state[f"blocks.{places[int(stage)]}.reducer.predictor.{rest}"] = value
        else:
            unused.append(name)
    return unused


def host_state_dict(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under timm's or official names -> the model's names, resampled to its sizes as timm does it."""
    _check_tables(state, model)
    if isinstance(model, eva.Eva):
        return eva.checkpoint_filter_fn(_without_zero_biases(state, model), model)
    if isinstance(model, vision_transformer.VisionTransformer) and state:
        return vision_transformer.checkpoint_filter_fn(illama_state_dict(state), model, adapt_layer_scale=True)
    for cls, convert in PLAIN_FILTERS.items():
        if isinstance(model, cls):
            return convert(state, model)
    if isinstance(model, swin_transformer.SwinTransformer):
        return swin_state_dict(state, model)
    if isinstance(model, tiny_vit.TinyVit):
        return tiny_vit_state_dict(state, model)
    for cls, adapt in TOWER_FILTERS.items():
        if isinstance(model, cls):
            own = {name: value for name, value in state.items() if OWN.search(name)}
            return adapt(_placed(state, model), model) | own
    return state


def illama_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """iLLaMA's weights under official names -> ours, the position of the class token first; any other state as it is.

    Officially the first and the third layer of the MLP make the gate and what it lets through, and the position of the
    class token is the last (models/illama.py of techmonsterwang/iLLaMA@dfc93b9).
    """
    if not any(".mlp.fc3." in name for name in state):
        return state
    state = {
        name.replace(".mlp.fc1.", ".mlp.fc1_g.").replace(".mlp.fc3.", ".mlp.fc1_x."): value
        for name, value in state.items()
    }
    table = state.get("pos_embed")
    return state if table is None else {**state, "pos_embed": table.roll(1, dims=1)}


def _without_zero_biases(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state without biases of queries and values, if the model has none and all of them are zero.

    Those of the distilled DINOv3 are, which is why timm has hosts of both kinds; its filter would drop others too.

    Raises:
        ValueError: Other biases than zero.
    """
    own: dict[str, Tensor] = model.state_dict()
    kept = dict(state)
    for name, value in state.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)(qkv\.bias|q_bias|v_bias)", name)
        if match is None or not {match[1] + part for part in ("q_bias", "q_proj.weight", "qkv.bias")}.isdisjoint(own):
            continue
        used = torch.cat(value.chunk(3)[::2]) if match[2] == "qkv.bias" else value  # DINOv3 masks that of its keys
        if used.any():
            raise ValueError(
                f"{name} is a bias of queries and values that is not zero, and this {type(model).__name__} has none; "
                "create the host with qkv_bias=True (in timm, of a name that ends in _qkvb)"
            )
        del kept[name]
    return kept


def _placed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A classifier's weights under timm's names: those of the tower it holds begin with ``encoder.``, a wrapper's name.

    Files of a language model name a tower otherwise, and may hold a head and a norm of their own.
    """
    parts = {name.partition(".")[0] for name in model.state_dict()}
    if "encoder" not in parts or not {name.partition(".")[0] for name in state} & (parts - {"encoder"}):
        return state
    if any(name.startswith(("encoder.", "vision.", "model.", "visual.", "vision_", "vlm.")) for name in state):
        return state
    return {name if name.partition(".")[0] in parts else f"encoder.{name}": value for name, value in state.items()}


def _check_tables(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise a ValueError for a position table or patch kernel that cannot be resampled to the model's sizes."""
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is not None and own is not None and own.ndim == 3:  # SAM's is a map, of one size
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
        if "register_tokens" in state:  # DINOv2's, whose table has a row for the class token, which timm adds to it
            prefix = 1
        patches = table.shape[1] - prefix if table.ndim == 3 else 0
        is_square = patches > 0 and math.isqrt(patches) ** 2 == patches
        if table.ndim != 3 or table.shape[0] != 1 or not (is_square or table.shape[1] == own.shape[1]):
            raise ValueError(
                f"pos_embed has shape {tuple(table.shape)}, which is no table (1, {prefix} + patches, C) of a square "
                f"of patches; the model's is {tuple(own.shape)}"
            )
    kernel, own = state.get("patch_embed.proj.weight"), getattr(getattr(model, "patch_embed", None), "proj", None)
    if kernel is not None and own is not None and (kernel.ndim not in (2, 4) or not kernel.numel()):
        raise ValueError(
            f"patch_embed.proj.weight has shape {tuple(kernel.shape)}, which is no kernel of patches; the model's is "
            f"{tuple(own.weight.shape)}"
        )


def swin_state_dict(state: Mapping[str, Tensor], model: swin_transformer.SwinTransformer) -> dict[str, Tensor]:
    """Weights of a Swin under timm's or official names -> timm's, tables of other windows resampled as timm does it.

    Tables of the model's shape stay as they are: timm takes those of windows that are not square for square ones.
    """
    own: dict[str, Tensor] = model.state_dict()
    fitting = {
        name: value
        for name, value in state.items()
        if name.endswith("relative_position_bias_table") and name in own and value.shape == own[name].shape
    }
    others = {name: value for name, value in state.items() if name not in fitting}
    return swin_transformer.checkpoint_filter_fn(others, model) | fitting


def tiny_vit_state_dict(state: Mapping[str, Tensor], model: tiny_vit.TinyVit) -> dict[str, Tensor]:
    """Weights of a TinyViT under timm's or official names -> timm's, attention biases resampled as timm does it."""
    own: dict[str, Tensor] = model.state_dict()
    state = {timm_name(name): value for name, value in state.items()}
    known = {name: value for name, value in state.items() if name in own and value.shape[:1] == own[name].shape[:1]}
    return {**state, **tiny_vit.checkpoint_filter_fn(known, model)}


def read_file(path: str | Path, allowed: Sequence[type] = ()) -> Mapping[str, Any]:
    """The content of a checkpoint file; nothing but weights and plain values is ever loaded from it.

    Args:
        path: .safetensors, or a .pth; of TorchScript, the weights alone are read.
        allowed: Further types a .pth may hold, as ``torch.serialization.safe_globals`` takes them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A folder, a file that cannot be read, or one that holds no dict.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{plain(path)} is a folder, not a checkpoint; name the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {plain(path)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        check_pickles(path)
        content: object
        # EViT's and DeiT's files hold their command line as a Namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            content = read_torchscript(path) if is_torchscript(path) else torch.load(path, "cpu", weights_only=True)
        if isinstance(content, Mapping):
            _check_memory(content)
    except Exception as error:  # a damaged file makes the readers raise nearly anything: KeyError, struct.error ...
        raise ValueError(
            f"{plain(path)} cannot be read as a checkpoint ({_reason(error)}); it is truncated, of another format, "
            "or holds code besides weights, which is never run: get the file anew, or save its state_dict alone"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{plain(path)} holds a {type(content).__name__}, not a dict of weights")
    return content


def _reason(error: Exception) -> str:
    """What a reader complained about, in its own first line; torch's advice to let the file run code is left out."""
    if isinstance(error, LookupError):  # whose text is a bare number
        return "its entries refer to others that are not there"
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it asks for {plain(asked[1])}" if asked else "it is no pickle of plain values and weights"
    return plain(next((line for line in str(error).splitlines() if line), type(error).__name__))


def _check_archive(path: Path) -> None:
    """Raise a ValueError for a zip file that grows when it is unpacked, as none of torch's does.

    But for the program of a TorchScript archive, which is compressed, and which nothing here unpacks.
    """
    if not zipfile.is_zipfile(path):  # torch before 1.6
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist() if not PROGRAM.search(entry.filename))
    if unpacked > path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes would unpack to {unpacked}")


def _check_memory(content: Mapping[object, object]) -> None:
    """Raise a ValueError for a tensor that is larger than what the file holds of it, and would fill the memory."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            _check_memory(value)
        elif (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and (value.is_meta or value.nbytes > value.untyped_storage().nbytes())
        ):
            raise ValueError(f"{plain(name)} of shape {tuple(value.shape)} is not in the file as a whole")


def read_checkpoint(
    path: str | Path, allowed: Sequence[type] = (), key: str | None = None, own: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file under plain names, and the names of what was dropped from it.

    The file is read by ``read_file``; ``key``, ``own`` and further errors are those of ``official_state_dict``.
    """
    content = read_file(path, allowed)
    try:
        return official_state_dict(content, key, own)
    except ValueError as error:
        raise ValueError(f"{plain(path)}: {error}") from error


def adapt_state(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of an official file under the names and shapes of a model, and the names that have no place in it.

    Raises:
        ValueError: Weights of shapes that cannot be brought to the model's.
    """
    adapt = getattr(model, "adapt_state_dict", None)
    tower, left_out = find_tower(state), list[str]()
    try:
        if tower is not None:
            state, left_out = tower.timm_names(state)
        if adapt is not None:
            return adapt(dict(state))
        state = host_state_dict(dict(state), model)
    except ValueError:
        raise
    except Exception as error:  # timm's filters and ours index and reshape what they are given
        raise ValueError(
            f"the checkpoint's weights cannot be brought to the shapes of this {type(model).__name__} "
            f"({plain(error)}); create the model it was saved from"
        ) from error
    if tower is not None:
        own = model.state_dict()
        unused = [name for name in state if HEAD.match(name) and name not in own]
        left_out += unused
        state = {name: value for name, value in state.items() if name not in unused}
    return state, left_out + place_learnt(state, model)


def check_state(
    state: Mapping[str, Tensor], model: nn.Module, origin: str | Path, known: Collection[str] | None = None
) -> None:
    """Raise a ValueError unless ``state`` holds every weight of the model in its shape, as finite numbers.

    Args:
        state: Weights under the model's names.
        model: The model.
        origin: Where they are from, for the message.
        known: For a model that is part of another, the names of the whole: those may be in ``state`` without being
            in the model, and weights of the model that are not among them are new and may be missing.
    """
    own: dict[str, Tensor] = model.state_dict()
    known = own if known is None else known
    faults = [f"{name} is missing" for name in own if name in known and name not in state]
    faults += [f"{plain(name)} is not a parameter of the model" for name in state if name not in known]
    fitting = {name: value for name, value in state.items() if name in own}
    faults += [
        f"{name} has shape {tuple(value.shape)}, the model's {tuple(own[name].shape)}"
        for name, value in fitting.items()
        if value.shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(
            f"{plain(origin)} is a checkpoint of another model than this {type(model).__name__}: "
            f"{'; '.join(faults[:4])}{more}; "
            "create the model it was saved from (its name, num_classes and patch_size must agree)"
        )
    for name, value in fitting.items():
        if own[name].is_floating_point():
            _check_numbers(name, value, origin)


def _check_numbers(name: str, value: Tensor, origin: str | Path) -> None:
    """Raise a ValueError for a weight of whole numbers, or one that is not finite."""
    if not value.is_floating_point():
        raise ValueError(
            f"{plain(origin)}: {name} holds {value.dtype} in place of floating-point numbers; save the weights before "
            "they are quantised"
        )
    sound = value.float().isnan().logical_not() if BOUND.search(name) else value.float().isfinite()
    if not value.is_meta and not sound.all():
        raise ValueError(
            f"{plain(origin)}: {name} holds NaN or infinity, the training it is from diverged; take an earlier "
            "checkpoint"
        )


class Origins(TorchFunctionMode):
    """Notes, while it is entered, which of the given tensors each result is computed from."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names: dict[int, set[str]] = {}
        for name, value in given.items():
            self.names.setdefault(id(value), set()).add(name)
        self.results: list[Tensor] = []  # alive, so that no other tensor gets the identity of one

    def of(self, value: Tensor) -> set[str]:
        """Names of the given tensors that a result is computed from."""
        return self.names.get(id(value), set())

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = set[str]().union(*(self.of(leaf) for leaf in inputs))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.names[id(leaf)] = self.of(leaf) | names
                self.results.append(leaf)
        return result


def convert_checkpoint(
    model: nn.Module, path: str | Path, allowed: Sequence[type] = (), key: str | None = None
) -> Conversion:
    """The weights of a checkpoint of timm, of an official repository or of ``foreign_names``, under a model's names.

    Position embeddings and patch embeddings of another size are resampled as timm does it.

    Args:
        model: A timm or effvit model; it is left as it is.
        path: .safetensors, or a .pth that loads with ``weights_only=True``.
        allowed: Further types a .pth may hold, as ``torch.serialization.safe_globals`` takes them.
        key: The entry of the file that holds the weights, e.g. "teacher" or "model"; None takes averaged weights before
            the last ones, in timm's order, and refuses a file with a teacher and a student.

    Raises:
        TypeError: No model, such as a name.
        FileNotFoundError: No such file.
        ValueError: The file cannot be read, has two networks, or belongs to another architecture: missing, unexpected
            or differently shaped parameters, of which the first are named.
    """
    check_model(model)
    given, dropped = read_checkpoint(path, allowed, key, model.state_dict().keys())
    tower = find_tower(given)
    family = None if tower is None else tower.family.name
    if tower is not None:
        check_config(path, model)
    with Origins(given) as origins:
        state, _ = adapt_state(model, given)
    sources = {name: origins.of(value) | ({name} & given.keys()) for name, value in state.items()}
    if not any(sources[name] for name in model.state_dict().keys() & state.keys()):
        raise ValueError(f"{plain(path)} is a checkpoint of another model: {unknown_names(given)}")
    check_state(state, model, path if family is None else f"{path} ({family})")
    same, renamed, made = [], {}, []
    for name, value in state.items():
        origin = next(iter(sources[name]), None)
        if name in given:
            same.append(name)
        elif len(sources[name]) == 1 and origin is not None and given[origin].numel() == value.numel():
            renamed[name] = origin
        else:
            made.append(name)
    used = set[str]().union(*sources.values())
    return Conversion(state, same, renamed, made, [*dropped, *(name for name in given if name not in used)], family)


def load_checkpoint(
    model: nn.Module, path: str | Path, allowed: Sequence[type] = (), key: str | None = None
) -> list[str]:
    """Load a checkpoint of timm or of an official repository into a model, strictly.

    Arguments and errors are those of ``convert_checkpoint``.

    Returns:
        Names of entries that were dropped because they only serve training, or are constants.
    """
    conversion = convert_checkpoint(model, path, allowed, key)
    model.load_state_dict(conversion.state)
    for module in model.modules():
        cache = getattr(module, "attention_bias_cache", None)
        if isinstance(cache, dict):
            cache.clear()  # timm's TinyViT and LeViT keep biases of the weights before
    return conversion.dropped
