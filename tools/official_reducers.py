"""Official reduced vision transformers beside ours: DeiT-S with the same weights, images, rates and blocks.

Official code is written for timm 0.4.12 and runs with it, from a folder ``timm-0.4.12`` among the checkouts
(``pip install --no-deps --target CODE/timm-0.4.12 timm==0.4.12``); its attention forms the whole map, and so does that
of the code that extends it. ATC runs with the timm that is installed, as it was written for a later one.
"""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import timm
import torch
from official_code import Official, Pair, Setting, check_there, found_equal, importing, on_cpu
from safetensors.torch import save_file
from torch import Tensor, nn

import effvit
from effvit.measure.profiler import noise

__all__ = ["REDUCTIONS"]

OLD_TIMM = "timm-0.4.12"
BLOCKS, RATE = [3, 6, 9], 0.7
COUNTS = [137, 96, 67]  # 196 * 0.7 ** n
SHAPE = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
SHARP = 12.0  # factor on the random query weights, so that attention tells tokens apart
THRESHOLD = 0.0  # of ALGM, for the cosines of noise: about a third of the windows reach it


def sharpen(model: nn.Module) -> None:
    """Multiply the query weights by ``SHARP``."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attn.qkv.weight"):
                weight[: weight.shape[1]] *= SHARP


def own_name(name: str) -> str:
    """An official name -> ours: the j-th layer of a method of TokenReduction sits in the j-th of ``BLOCKS``."""
    if not name.startswith("cluster_layers."):
        return name
    _, stage, rest = name.split(".", 2)
    return f"blocks.{BLOCKS[int(stage)]}.reducer.{rest}"


def ours(official: nn.Module, method: str | None, settings: dict[str, Any], **host: Any) -> nn.Module:
    """Our model with the weights of the official one."""
    dense = timm.create_model("deit_small_patch16_224", **host)
    model: nn.Module = dense if method is None else effvit.sparsify(dense, method, **settings)
    state = {own_name(name): value for name, value in official.state_dict().items() if "_ddp." not in name}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "official.safetensors"
        save_file(state, path)
        effvit.load_checkpoint(model, path)
    return model.eval()


def lengths(model: nn.Module, run: Callable[[Tensor], object], images: Tensor) -> tuple[list[int], Tensor]:
    """Tokens, the class token included, that enter the MLP of each block, and the scores."""
    found: list[int] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].shape[1]))
        for block in model.blocks  # type: ignore[union-attr]
    ]
    with torch.inference_mode():
        scores = run(images)
    for hook in hooks:
        hook.remove()
    assert isinstance(scores, Tensor)
    return found, scores


def pair(
    official: nn.Module,
    method: str | None,
    batch_size: int,
    run: Callable[[Tensor], object] | None = None,
    host: dict[str, Any] | None = None,
    **settings: Any,
) -> Pair:
    """The official model beside ours under the settings, compared by tokens in each block and by scores."""
    official.eval()
    sharpen(official)
    own, images = ours(official, method, settings, **(host or {})), noise((3, 224, 224), batch_size)
    run = official if run is None else run
    (theirs, scores), (counts, our_scores) = lengths(official, run, images), lengths(own, own, images)
    close = found_equal(scores, our_scores, "scores", ordered=True) == "scores equal"
    if theirs != counts:
        equal = "scores equal, computed of more tokens" if close else f"{theirs} tokens in the blocks against {counts}"
    else:
        equal = "tokens of each block and scores equal" if close else "tokens of each block equal"
    return Pair(run, own, images, equal)


def old(
    code: Path, folder: str, own: Sequence[str], module: str, make: Callable[[Any], Any], empty: Sequence[str] = ()
) -> Any:
    """What ``make`` makes of an official module that runs with timm 0.4.12."""
    with importing([code / folder, code / OLD_TIMM], ("timm", *own), empty):
        torch.manual_seed(0)
        return make(importlib.import_module(module))


def norm_layer() -> Callable[..., nn.Module]:
    """DeiT's layer norm."""
    return partial(nn.LayerNorm, eps=1e-6)


def dense(code: Path, setting: Setting) -> Pair:
    """No reduction at all: timm 0.4.12, from which the official code is derived."""
    model = old(code, OLD_TIMM, (), "timm.models.vision_transformer", _plain)
    return pair(model, None, setting.batch_size)


def _plain(module: Any) -> nn.Module:
    model: nn.Module = module.VisionTransformer(**SHAPE, qkv_bias=True, norm_layer=norm_layer())
    return model


def token_reduction(
    code: Path,
    setting: Setting,
    module: str,
    kind: str,
    method: str,
    official: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Pair:
    """A model of TokenReduction, whose one rate stands for three counts."""
    arguments = Namespace(reduction_loc=BLOCKS, keep_rate=[RATE], **official)

    def make(found: Any) -> Any:
        return getattr(found, kind)(**SHAPE, mlp_ratio=4, qkv_bias=True, norm_layer=norm_layer(), args=arguments)

    model = old(code, "TokenReduction", ("models",), f"models.{module}", make)
    return pair(model, method, setting.batch_size, **settings)


def atc(code: Path, setting: Setting) -> Pair:
    """Average linkage by scikit-learn, image by image."""
    arguments = Namespace(reduction_loc=BLOCKS, reduction_ratio=[RATE], linkage="average", proportional_attn=True)
    with importing([code / "ATC/ATC_setup"], ("models",)):
        torch.manual_seed(0)
        kind = importlib.import_module("models.atc").AgglomerativeClusteringVisionTransformer
        model = kind(**SHAPE, mlp_ratio=4, qkv_bias=True, norm_layer=norm_layer(), args=arguments)
    return pair(model, "atc", setting.batch_size, keep_rate=RATE, reduce_at=BLOCKS)


def pitome(code: Path, setting: Setting) -> Pair:
    """A tenth of the tokens in each block."""

    def make(module: Any) -> Any:
        model: Any = _plain(importlib.import_module("timm.models.vision_transformer"))
        module.apply_patch(model)
        model.ratio = 0.9
        return model

    empty = ("transformers", "lavis", "tasks")
    model = old(code, "PiToMe", ("algo",), "algo.pitome.patch.deit", make, empty)
    return pair(model, "pitome", setting.batch_size, lambda images: model(images, False), keep_rate=0.9)


def mctf(code: Path, setting: Setting) -> Pair:
    """As in run/eval_deit_s_mctf.sh: 16 tokens in each block but the first."""
    active = list(range(1, 12))
    options: dict[str, Any] = {"mctf_type": [16, 0, 0, 1, 1, 1, 20, 40, 1, 1, 0], "task_type": [1, 0, 0, 0]}
    options |= {"use_mctf": True, "activate_layer": active, "norm_layer": norm_layer()}
    model = old(
        code, "MCTF", ("models", "utils"), "models.deit", lambda module: module.VisionTransformer(**SHAPE, **options)
    )
    return pair(model, "mctf", setting.batch_size, r=16, reduce_at=active)


def diffrate(code: Path, setting: Setting) -> Pair:
    """The published numbers of DeiT-S for 2.9 GMACs."""
    path = code / "DiffRate/compression_rate.json"
    check_there(path)
    numbers = json.loads(path.read_text())["ViT-S-DeiT"]["2.9"]  # lists, written as strings

    def make(module: Any) -> Any:
        model: Any = _plain(importlib.import_module("timm.models.vision_transformer"))
        module.apply_patch(model)
        model.set_kept_num(*(json.loads(numbers[f"{kind}_kept_num"]) for kind in ("prune", "merge")))
        return model

    model = old(code, "DiffRate", ("DiffRate",), "DiffRate.patch.deit", make)
    run = partial(model, return_flop=False)
    return pair(model, "diffrate", setting.batch_size, run, preset="deit_small_2.9")


def vid_tldr(code: Path, setting: Setting) -> Pair:
    """Its blocks in timm's ViT without a class token, since its models are of videos."""
    host: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False}
    info = {"use": True, "r": [8] * 12, "source_trace": False, "source": None, "size": None}

    def make(module: Any) -> Any:
        kind = partial(module.Block, 384, 6, norm_layer=norm_layer(), init_values=0.0, info=info)
        return nn.Sequential(*(kind(i=i) for i in range(12)))

    folder = "vid-TLDR/multi_modality"
    blocks = old(code, folder, ("models", "utils"), "models.backbones.vit.vit", make)
    model = timm.create_model("deit_small_patch16_224", **host)
    model.blocks = blocks

    def run(images: Tensor) -> object:
        info["size"] = None
        return model(images)

    return pair(model, "vid_tldr", setting.batch_size, run, host, r=8)


def algm(code: Path, setting: Setting) -> Pair:
    """Segmenter's encoder with a classifier, merging in its first and fifth block."""

    def make(module: Any) -> Any:
        kind = importlib.import_module("segm.model.vit").VisionTransformer
        model = kind((224, 224), 16, 12, 384, 4 * 384, 6, 1000, dropout=0.0)
        module.apply_patch(SimpleNamespace(encoder=model), [1, 5], trace_source=True)
        model.threshold = THRESHOLD
        return model

    root = "algm-segmenter/algm"
    with importing([code / "algm-segmenter"]):
        model = old(code, root, ("algm", "segm"), "algm.patch.algm_segmenter_patch", make, ("mmseg", "mmcv"))
    host = {"norm_layer": nn.LayerNorm}
    settings: dict[str, Any] = {"threshold": THRESHOLD, "reduce_at": [0, 4], "compat": True}
    return pair(model, "algm", setting.batch_size, on_cpu(model), host, **settings)


def listed(
    kind: str, method: str, official: Mapping[str, Any] | None = None, module: str | None = None, **settings: Any
) -> Official:
    """A model of TokenReduction, of the module that has the method's name but where another is given."""
    make = partial(
        token_reduction, module=module or method, kind=kind, method=method, official=official or {}, settings=settings
    )
    return Official("TokenReduction", "88fe07e", make, asked={f"{RATE} in blocks 3, 6, 9": None})


BY_RATE: dict[str, Any] = {"keep_rate": RATE, "reduce_at": BLOCKS}
BY_NUMBER: dict[str, Any] = {"num_tokens": COUNTS, "reduce_at": BLOCKS}
MERGED = [0, 0, 0, 59, 0, 0, 41, 0, 0, 29, 0, 0]

REDUCTIONS: dict[str, Official] = {
    "none": Official(OLD_TIMM, "0.4.12", dense, "timm 0.4.12 beside the timm of today", {"all": None}),
    "dynamicvit": listed("DynamicVisionTransformer", "dynamicvit", module="dyvit", **BY_RATE),
    "dpcknn": listed(
        "DPCKNNVisionTransformer",
        "dpcknn",
        {"k_neighbors": 5, "equal_weight": False},
        k=5,
        equal_weight=False,
        **BY_RATE,
    ),
    "kmedoids": listed(
        "KMedoidsVisionTransformer", "kmedoids", {"cluster_iters": 3, "equal_weight": False}, num_iters=3, **BY_RATE
    ),
    "sinkhorn": listed(
        "SinkhornVisionTransformer", "sinkhorn", {"sinkhorn_eps": 1.0, "cluster_iters": 3}, num_iters=3, **BY_NUMBER
    ),
    "patchmerger": listed("PatchMergerVisionTransformer", "patchmerger", **BY_NUMBER),
    "radial": listed(
        "HeuristicVisionTransformer",
        "radial",
        {"heuristic_pattern": "l2", "not_contiguous": True},
        module="heuristic",
        pattern="l2",
        place="block",
        **BY_NUMBER,
    ),
    "evit": listed("EfficientVisionTransformer", "evit", **BY_NUMBER),
    "tome": listed("ToMeVisionTransformer", "tome", r=MERGED),
    "atc": Official("ATC", "227c94b", atc, "official: scikit-learn", {f"{RATE} in blocks 3, 6, 9": None}),
    "pitome": Official("PiToMe", "550b5de", pitome, asked={"0.9": None}),
    "mctf": Official("MCTF", "2004da0", mctf, asked={"r 16": None}),
    "diffrate": Official("DiffRate", "91ae3e3", diffrate, asked={"2.9 GMACs": None}),
    "vid_tldr": Official("vid-TLDR", "a25051d", vid_tldr, "official: its blocks in timm's ViT", {"r 8": None}),
    "algm": Official(
        "algm-segmenter", "674eaa2", algm, "official: Tensor.cuda replaced", {f"threshold {THRESHOLD}": None}
    ),
}
"""By the name of our method; "none" has no reduction."""
