"""Everything that records, transforms or runs a model elsewhere, and the models: docs/export.md and deployment.md."""

from __future__ import annotations

import copy
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import architectures
import onnxruntime
import runtimes
import timm
import torch
from hosts import SETTINGS, make_host
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import effvit
from effvit.testing import make_window_model, window_pairs
from effvit.testing.windows import WINDOW_HOSTS, WINDOW_SIZE

__all__ = [
    "CASES",
    "DEPLOYED",
    "RECORDERS",
    "REFUSALS",
    "SLOW",
    "Case",
    "Recorder",
    "Refusal",
    "Verdict",
    "export_page",
    "judge",
    "make_case",
    "num_lost",
    "pairs",
    "recorded_images",
    "refusal",
]

Recorded = Callable[[Tensor], Tensor]


class Scores(nn.Module):
    """A model whose only positional argument is one batch of images, for the exporters; with maps as one row each."""

    def __init__(self, model: nn.Module, maps: bool = False) -> None:
        super().__init__()
        self.model = model
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        if not self.maps:
            return self.model(x)
        maps = self.model.forward_intermediates(x, intermediates_only=True)
        return torch.cat([y.flatten(1) for y in maps], dim=1)


# -- models ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A model to record.

    Attributes:
        build: Makes the model, small and in eval mode.
        size: (H, W) of the images it is recorded with.
        other: (H, W) of other images it takes, None if it takes no other.
        maps: Whether the maps of ``forward_intermediates`` are compared, not the scores.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    other: tuple[int, int] | None = None
    maps: bool = False


def _reduced(method: str, host: str, recover: str | None, settings: dict[str, Any], **options: Any) -> nn.Module:
    model = effvit.sparsify(make_host(host, **options), method, recover=recover, **(SETTINGS[method] | settings))
    return model.eval()


def host_case(
    method: str, host: str = "class_token", recover: str | None = None, dynamic: bool = False, **settings: Any
) -> Case:
    size = (64, 80) if host == "lvvit" else (48, 64)
    options = {"dynamic_img_size": True} if dynamic else {}
    build = partial(_reduced, method, host, recover, settings, **options)
    return Case(build, size, (64, 80) if dynamic else None, maps=recover is not None)


def _pyramid(method: str, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    small = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
    host = timm.create_model("tiny_vit_5m_224", num_classes=7, **small)
    for norm in host.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # statistics of these images alone; with those of none all scores are nearly the same
    with torch.no_grad():
        host.train()(images(8, (64, 96), 0))
    return effvit.sparsify(host.eval(), method, **settings).eval()


OTHER_SIZES = {"sam": (64, 40), "hieradet": (64, 40)}  # Swin and Hiera take images of the size they are made for

CASES: dict[str, Case] = {
    # every method, with the settings that change what is computed
    "evit": host_case("evit"),
    "evit fuse_token=False": host_case("evit", fuse_token=False),
    "tome": host_case("tome"),
    "tome prop_attn=False": host_case("tome", prop_attn=False),
    "gtp": host_case("gtp"),
    "gtp propagation=Mean": host_case("gtp", propagation="Mean"),
    "gtp propagation=None": host_case("gtp", propagation="None", selection="CLSAttnMean"),
    "gtp graph_type=Spatial": host_case("gtp", graph_type="Spatial", selection="IMGAttnMean"),
    "gtp graph_type=Semantic": host_case("gtp", graph_type="Semantic", selection="CosSimMax"),
    "gtp sparsity=0.6": host_case("gtp", sparsity=0.6),
    "ats": host_case("ats"),
    "ats drop_tokens=False": host_case("ats", drop_tokens=False),
    "ats grid=midpoint": host_case("ats", grid="midpoint", value_norm="per_head", keep_rate=0.5),
    "ats compat": host_case("ats", compat=True, keep_rate=0.5),
    "ats packed": host_case("ats", ragged="packed"),
    "zero_tprune": host_case("zero_tprune"),
    "zero_tprune alternate": host_case("zero_tprune", partition="alternate", similarity="dot", var_range=None),
    "zero_tprune euclidean": host_case("zero_tprune", partition="sequential_i", similarity="euclidean", cls_boost=1.0),
    "zero_tprune manhattan": host_case("zero_tprune", similarity="manhattan"),
    "zero_tprune averaged": host_case("zero_tprune", keys="averaged", renormalise=False),
    "dymu": host_case("dymu"),
    "dymu max_r": host_case("dymu", r_total=8, max_r_per_instance_ratio=1.0),
    "dymu compat": host_case("dymu", compat=True),
    "dymu packed": host_case("dymu", ragged="packed"),
    "algm": host_case("algm"),
    "algm compat": host_case("algm", compat=True),
    "algm packed": host_case("algm", ragged="packed"),
    "dynamicvit": host_case("dynamicvit"),
    "diffrate": host_case("diffrate"),
    "expedite": host_case("expedite"),
    "expedite restore_at": host_case("expedite", restore_at=3, norm="official"),
    "hot": host_case("hot"),
    "pitome": host_case("pitome"),
    "pitome prop_attn=True": host_case("pitome", protect_at=(0, 1), prop_attn=True),
    "mctf": host_case("mctf"),
    "mctf step=tokens": host_case("mctf", step="tokens", bidirection=False),
    "mctf step=after": host_case("mctf", step="after", pooling="size"),
    "mctf pooling=mean": host_case("mctf", pooling="mean"),
    "mctf pooling=max": host_case("mctf", pooling="max"),
    "vid_tldr": host_case("vid_tldr"),
    "vid_tldr r=3": host_case("vid_tldr", r=3),
    "cubistmerge": host_case("cubistmerge"),
    "cubistmerge compat": host_case("cubistmerge", r_h=2, r_w=2, reduce_at=(1,), compat=True),
    "dpcknn": host_case("dpcknn"),
    "dpcknn equal_weight": host_case("dpcknn", equal_weight=True),
    "kmedoids": host_case("kmedoids"),
    "kmedoids equal_weight": host_case("kmedoids", equal_weight=True),
    "atc": host_case("atc"),
    "atc linkage=complete": host_case("atc", linkage="complete", prop_attn=False),
    "sinkhorn": host_case("sinkhorn"),
    "patchmerger": host_case("patchmerger"),
    "random": host_case("random"),
    "random place=mlp": host_case("random", place="mlp"),
    "uniform": host_case("uniform"),
    "uniform place=queries": host_case("uniform", place="queries"),
    "radial": host_case("radial"),
    "radial min_radius": host_case("radial", min_radius=1.0),
}
# every method on hosts with RoPE, two class tokens, registers, attention pooling, and heads that pool patches
CASES |= {
    f"{method} {host}": host_case(method, host)
    for method in SETTINGS
    for host in ("distilled", "eva02", "rope_mixed", "lvvit")
}
CASES |= {
    f"{method} {host}": host_case(method, host)
    for method in (
        *("tome", "gtp", "zero_tprune", "dymu", "algm", "dynamicvit", "expedite", "hot", "vid_tldr"),
        *("mctf", "dpcknn", "kmedoids"),
    )
    for host in ("average_pool", "attention_pool")
}
CASES |= {f"ats {host}": host_case("ats", host) for host in ("registers", "gated_grouped")}
CASES |= {f"{method} dinov3": host_case(method, "dinov3") for method in SETTINGS}
CASES |= {f"{method} packed eva02": host_case(method, "eva02", ragged="packed") for method in ("ats", "dymu")}
# dense maps, one fill after another
CASES |= {
    f"{method} recover={fill}": host_case(method, recover=fill)
    for method, fill in (
        ("evit", "last"),
        ("evit", "nearest"),
        ("hot", "zero"),
        ("ats", "last"),
        ("ats", "reconstruct"),
        ("gtp", "reconstruct"),
        ("zero_tprune", "attention"),
        ("tome", "last"),
        ("dymu", "last"),
        ("algm", "last"),
        ("expedite", "reconstruct"),
    )
}
# models that take images of any size
CASES |= {f"{method} dynamic_img_size": host_case(method, dynamic=True) for method in SETTINGS}
CASES |= {f"{method} dynamic_img_size eva02": host_case(method, "eva02", dynamic=True) for method in ("evit", "ats")}
CASES |= {f"{method} naflex dynamic_img_size": host_case(method, "naflex", dynamic=True) for method in ("evit", "ats")}
CASES |= {
    "tiny_vit tome": Case(partial(_pyramid, "tome", {"r": 3}), (64, 96), (96, 72)),
    "tiny_vit expedite": Case(partial(_pyramid, "expedite", {"keep_rate": 0.5}), (64, 96), (96, 72)),
    "tiny_vit pitome": Case(partial(_pyramid, "pitome", {"keep_rate": 0.8, "protect_at": ()}), (64, 96), (96, 72)),
    "tiny_vit cubistmerge": Case(partial(_pyramid, "cubistmerge", {"r_h": 1, "r_w": 1}), (64, 96), (96, 72)),
}


def _takes_any_size(name: str) -> bool:
    options = architectures.SMALL[name][1]
    if name.startswith(("supertoken", "casvit", "stvit_r_swin", "stvit_swin")):
        tables = options.get("relative_pos") or options.get("use_global", name.startswith("stvit_swin"))
        return not tables  # which have one size
    return options.get("dynamic_img_size", False)


CASES |= {
    name: Case(
        partial(architectures.make_architecture, name),
        architectures.SIZES[name][0],
        architectures.SIZES[name][1] if _takes_any_size(name) else None,
    )
    for name in architectures.SMALL
}
# hosts with windows, of which TinyViT stands above
WINDOW_RECORDED = [host for host in WINDOW_HOSTS if host != "tiny_vit"]
CASES |= {
    f"{host} {method}": Case(partial(make_window_model, method, host), WINDOW_SIZE, OTHER_SIZES.get(host))
    for method, host in window_pairs(hosts=WINDOW_RECORDED)
}
# hosts with relative positions, and one with a mask behind the softmax
RELATIVE = (("evit", "beit"), ("ats", "beit"), ("tome", "relpos"), ("zero_tprune", "shared_relpos"))
MASKED = (("evit", "illama"), ("ats", "illama"), ("tome", "illama"), ("mctf", "illama"))
CASES |= {f"{method} {host}": host_case(method, host) for method, host in (*RELATIVE, *MASKED)}

# A model of each method and architecture, for runtimes that take minutes and formats that depend on nothing else.
DEPLOYED = (
    *SETTINGS,
    *("tiny_vit tome", "tiny_vit expedite"),
    *("lookupvit", "stvit", "stvit_r_swin", "stvit_swin", "supertoken", "casvit", "sit", "sit_dense"),
)


@functools.lru_cache(maxsize=4)
def make_case(name: str) -> nn.Module:
    """The model of a case, ready to record."""
    case = CASES[name]
    return Scores(case.build(), case.maps).eval()


def images(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    """Random images (batch, 3, H, W)."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def recorded_images(case: str) -> Tensor:
    """The images that a case is recorded with."""
    return images(2, CASES[case].size, 1)


def others(case: Case, height_only: bool) -> dict[str, Tensor]:
    """What a recorded model is held to: other images than it was recorded with, other batches, another size."""
    batches = {
        "image": images(2, case.size, 2),
        "batch": images(5, case.size, 3),
        "batch of 1": images(1, case.size, 4),
    }
    if case.other is None:
        return batches
    return batches | {"size": images(2, (case.other[0], case.size[1]) if height_only else case.other, 5)}


# -- recorders ---------------------------------------------------------------------------------------------------


class Recorder(NamedTuple):
    """Something that records a model.

    Attributes:
        record: Model and images (B, 3, H, W) -> what was recorded.
        promises: What a recorded model must take besides other images: "batch", "size" or both. For the rest torch's
            own error at run time is as good as the right result.
        dtype: Dtype of model and images: float64, so that no tie is decided by rounding, where the recorder has it.
        needs_sizes: Only for models that take other sizes.
        height_only: Another size differs in its height alone.
        expected: What the recorded model is held to; the plain run of the model.
        rounds: Weights or activations have fewer bits than those of the plain run, so that scores are not equal: those
            of an image must be nearer to its own plain ones than to those of any other image.
        only_deployed: Only for ``DEPLOYED``.
    """

    record: Callable[[nn.Module, Tensor], Recorded]
    promises: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    needs_sizes: bool = False
    height_only: bool = False
    expected: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    rounds: bool = False
    only_deployed: bool = False


def _compile(model: nn.Module, x: Tensor) -> Recorded:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    return compiled


def _compile_dynamic(model: nn.Module, x: Tensor) -> Recorded:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(x)
    return compiled


def _export(model: nn.Module, x: Tensor) -> Recorded:
    return torch.export.export(model, (x,), strict=False).module()


def _export_batch(model: nn.Module, x: Tensor) -> Recorded:
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module()


def _export_height(model: nn.Module, x: Tensor) -> Recorded:
    shapes = {"x": {2: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module()


def _export_size(model: nn.Module, x: Tensor) -> Recorded:
    shapes = {"x": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module()


def _trace(model: nn.Module, x: Tensor) -> Recorded:
    return torch.jit.trace(model, x, check_trace=False)


def _session(file: io.BytesIO) -> Recorded:
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _onnx(model: nn.Module, x: Tensor) -> Recorded:
    file = io.BytesIO()
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(model, (x,), input_names=["x"], dynamic_shapes=shapes, dynamo=True, verbose=False).save(file)
    return _session(file)


def _onnx_legacy(model: nn.Module, x: Tensor, dynamic: bool, opset: int = 17) -> Recorded:
    file = io.BytesIO()
    axes = {"dynamic_axes": {"x": {0: "batch"}}} if dynamic else {}
    torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False, opset_version=opset, **axes)
    return _session(file)


def _fx(model: nn.Module, x: Tensor) -> Recorded:
    return torch.fx.symbolic_trace(model.model) if not model.maps else torch.fx.symbolic_trace(model)


def _make_fx(model: nn.Module, x: Tensor) -> Recorded:
    return make_fx(model)(x)


def _vmap(model: nn.Module, x: Tensor) -> Recorded:
    return vmap(lambda image: model(image[None])[0])


def _one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(image[None]) for image in x])


def _gradients(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Image -> its gradients, in one row."""
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, (weights, buffers), (image[None],)).square().sum()

    return lambda image: torch.cat([g.flatten() for g in grad(loss)(weights, image).values()])


def _per_sample_grad(model: nn.Module, x: Tensor) -> Recorded:
    return vmap(_gradients(model, x))


def _gradients_one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    rows = []
    for image in x:
        model.zero_grad(set_to_none=False)
        with torch.enable_grad():
            model(image[None]).square().sum().backward()
        rows.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        )
    model.zero_grad(set_to_none=True)
    return torch.stack(rows)


def _shape(model: nn.Module, x: Tensor) -> Tensor:
    return torch.tensor(model(x).shape)


def _fake(model: nn.Module, x: Tensor) -> Recorded:
    def run(x: Tensor) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out = model(mode.from_tensor(x))
        return torch.tensor(out.shape)

    run(x)
    return run


def _meta(model: nn.Module, x: Tensor) -> Recorded:
    model = copy.deepcopy(model).to("meta")
    return lambda x: torch.tensor(model(x.to("meta")).shape)


RECORDERS: dict[str, Recorder] = {
    "torch.compile": Recorder(_compile, ("batch", "size")),
    "torch.compile, dynamic": Recorder(_compile_dynamic, ("batch", "size")),
    "torch.export": Recorder(_export),
    "torch.export, dynamic batch": Recorder(_export_batch, ("batch",)),
    "torch.export, dynamic height": Recorder(_export_height, ("size",), needs_sizes=True, height_only=True),
    "torch.export, dynamic size": Recorder(_export_size, ("size",), needs_sizes=True),
    "torch.onnx, dynamo=True": Recorder(_onnx, ("batch",), torch.float32),
    "torch.onnx, dynamo=False": Recorder(partial(_onnx_legacy, dynamic=False), (), torch.float32),
    "torch.onnx, dynamo=False, dynamic batch": Recorder(partial(_onnx_legacy, dynamic=True), ("batch",), torch.float32),
    "torch.jit.trace": Recorder(_trace),
    "torch.fx": Recorder(_fx, ("batch",)),
    "make_fx": Recorder(_make_fx),
    "vmap": Recorder(_vmap, ("batch", "size"), expected=_one_by_one),
    "per-sample gradients": Recorder(_per_sample_grad, ("batch", "size"), expected=_gradients_one_by_one),
    "fake tensors": Recorder(_fake, ("batch", "size"), torch.float32, expected=_shape),
    "meta device": Recorder(_meta, ("batch", "size"), torch.float32, expected=_shape),
    "OpenVINO": Recorder(runtimes.openvino, ("batch",), torch.float32, only_deployed=True),
    "onnxruntime, int8": Recorder(
        runtimes.quantized_by_onnxruntime, ("batch",), torch.float32, rounds=True, only_deployed=True
    ),
    "torchao, int8": Recorder(
        runtimes.quantized_by_torchao, ("batch", "size"), torch.float32, rounds=True, only_deployed=True
    ),
    **{
        str(dtype).removeprefix("torch."): Recorder(
            partial(runtimes.cast, dtype=dtype), ("batch", "size"), torch.float32, rounds=True, only_deployed=True
        )
        for dtype in (torch.bfloat16, torch.float16)
    },
    "channels_last": Recorder(runtimes.channels_last, ("batch", "size"), torch.float32, only_deployed=True),
}


class Verdict(NamedTuple):
    """What became of one case under one recorder.

    Attributes:
        outcome: "right"; "refused": an error before anything was recorded; "wrong".
        detail: The error, or what was wrong; for "right" which of the others torch itself turned down at run time.
    """

    outcome: str
    detail: str = ""


def judge(recorder_name: str, case_name: str) -> Verdict:
    """Record the case and hold it to other images, batches and sizes than those it was recorded with."""
    recorder, case = RECORDERS[recorder_name], CASES[case_name]
    model = make_case(case_name).to(recorder.dtype)
    grads = recorder.expected is _gradients_one_by_one
    with warnings.catch_warnings(), torch.set_grad_enabled(grads):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch._dynamo.reset()
        try:
            recorded = recorder.record(model, recorded_images(case_name).to(recorder.dtype))
        except Exception as error:
            return Verdict("refused", f"{type(error).__name__}: {error}")
        finally:
            logging.disable(logging.NOTSET)
        fixed, compared = [], []
        for what, x in others(case, recorder.height_only).items():
            x = x.to(recorder.dtype)
            expected = recorder.expected(model, x)
            try:
                got = recorded(x)
            except Exception as error:
                if what == "image" or what.split()[0] in recorder.promises:
                    late = "refused" if recorder.record in (_vmap, _per_sample_grad, _meta) else "wrong"
                    return Verdict(late, f"{what}: {type(error).__name__}: {error}")
                fixed.append(what)
                continue
            if recorder.rounds:
                compared.append((got, expected))
                continue
            rtol, of_largest = (1e-3, 1e-4) if recorder.dtype == torch.float32 else (1e-6, 1e-8)
            atol = of_largest * float(expected.abs().max())
            if got.shape != expected.shape or not torch.allclose(got.to(expected.dtype), expected, rtol, atol):
                far = f"{(got - expected).abs().max():.2g}" if got.shape == expected.shape else f"{tuple(got.shape)}"
                return Verdict("wrong", f"{what}: off by {far}, scores up to {expected.abs().max():.2g}")
    if compared and (lost := num_lost(*map(torch.cat, zip(*compared, strict=True)))):
        return Verdict("wrong", f"the scores of {lost} images are nearer to those of another")
    return Verdict("right", ", ".join(fixed))


def num_lost(found: Tensor, plain: Tensor) -> int:
    """Images whose scores (B, classes) are not nearest to the plain scores of the same image."""
    return int((torch.cdist(found, plain).argmin(1) != torch.arange(len(found))).sum())


# -- what is refused ---------------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """An error instead of a recorded model.

    Attributes:
        recorders: Pattern of the recorders that meet it.
        cases: Pattern of the models.
        match: What its message holds.
        note: Why, and what works instead, for docs/export.md.
    """

    recorders: str
    cases: str
    match: str
    note: str


SLOW = {
    name
    for name in RECORDERS
    if name.startswith(("torch.compile", "torch.export", "torch.onnx, dynamo=True", "OpenVINO", "onnxruntime"))
}
WINDOW_CASES = "|".join(WINDOW_HOSTS)
METHOD_CASES = "|".join((*SETTINGS, WINDOW_CASES))
REFUSALS = (
    Refusal(
        r"torch\.export, dynamic batch|torch\.onnx, dynamo=True",
        r"dymu compat",
        "fixed batch",
        "With `compat=True` a batch of one image is merged otherwise than a larger one: export with a fixed batch, or "
        "use `compat=False`.",
    ),
    Refusal(
        r"torch\.onnx, dynamo=False.*",
        r"(stvit|stvit_r_swin|stvit_swin|lookupvit).*",
        "dynamo=True",
        "The trace-based exporter produces graphs of these architectures that fail to load or compute something else: "
        "use `torch.onnx.export(..., dynamo=True)`.",
    ),
    Refusal(
        r"torch\.onnx, dynamo=False.*",
        rf"({METHOD_CASES})\b.*",
        "dynamo=True",
        "The trace-based exporter fixes batch sizes that should be dynamic and adds rows with the same index only "
        "once, so reduced models refuse it: use `torch.onnx.export(..., dynamo=True)`.",
    ),
    Refusal(
        r"torch\.fx",
        r".*dynamic_img_size.*|stvit dynamic",
        "torch.fx cannot trace it",
        "Token counts depend on the image size, which `torch.fx` does not know while it traces: create the model with "
        "`dynamic_img_size=False`, or use `torch.export`.",
    ),
    Refusal(
        r"torch\.fx",
        rf"({WINDOW_CASES}) .*",
        "torch.fx cannot trace it",
        "How a host with windows (timm's own too) pads them depends on the size of the map: use `torch.export`, or, "
        "except for SAM, timm's `create_feature_extractor`, which does not trace into their blocks.",
    ),
    Refusal(
        r"(?!torch\.fx).*",
        r"(algm|ats|dymu) packed.*",
        "ragged='padded'",
        "The length of a packed batch depends on its images: use `ragged='padded'`, which gives the same result. "
        "For ATS `effvit.compile` makes one graph of it; `torch.compile` without `fullgraph=True` runs it in "
        "dozens of pieces.",
    ),
    Refusal(
        r"(?!torch\.fx).*",
        r"ats compat",
        "drop_tokens=False",
        "`compat=True` depends on how much padding is cut off: use `drop_tokens=False`, or `compat=False`.",
    ),
    Refusal(
        r"(?!torch\.fx).*",
        r"algm compat",
        "use compat=False",
        "With `compat=True` an image merges what its batch allows, so a graph holds for no other: use `compat=False`.",
    ),
    Refusal(
        r"torch\.export, dynamic (height|size)",
        r"(expedite|random|uniform|radial|mctf|pitome|algm|atc) dynamic_img_size",
        "a dynamic height or width",
        "The grid of clusters, the order of `random`, `uniform` and `radial`, ALGM's windows, ATC's steps and pairs "
        "of MCTF and PiToMe are for one image size: export with height and width fixed, once for every size; the batch "
        "may be dynamic.",
    ),
    Refusal(
        r"torch\.compile, dynamic",
        r"radial.*",
        "is not a constant",
        "With `dynamic=True` the sides of the grid are symbols, on which no rings can be counted: leave `dynamic` out, "
        "and each size gets its graph.",
    ),
    Refusal(
        r"vmap|per-sample gradients",
        r"random dynamic_img_size",
        "randomness error mode",
        "For another image size than the model's the order is drawn while it runs: call `set_input_size` first, or use "
        '`vmap(..., randomness="same")`.',
    ),
    Refusal(
        r"torch\.export, dynamic (height|size)",
        r"stvit_(r_)?swin.*|supertoken.*",
        "a dynamic height or width",
        "Padding and masks of windows and cells depend on the size in so many ways that `torch.export` does not finish "
        "in minutes: export with height and width fixed, once for every size; the batch may be dynamic.",
    ),
    Refusal(
        r"torch\.export, dynamic size",
        r"(tome|gtp|zero_tprune|vid_tldr) dynamic_img_size",
        "both height and width",
        "The token counts are expressions of both sides, which `torch.export` does not simplify in minutes: export "
        "with one of height and width dynamic, or none, once for every size; the batch may be dynamic.",
    ),
    Refusal(
        r"torch\.onnx, dynamo=True",
        r"sam (expedite|cubistmerge)|hiera .*",
        "only 4D query",
        "timm's attention of SAM, which smaller grids keep, and of Hiera, which blocks that pool keep, calls the fused "
        "kernel without a dimension of heads or with one of windows, which torch's exporter to ONNX does not take: set "
        "`block.attn.fused_attn = False` in each block first.",
    ),
    Refusal(
        r"torch\.export, dynamic (height|size)",
        r"(sam|hieradet) .*",
        "a dynamic height or width",
        "Windows are padded in ways that `torch.export` does not follow: export with height and width fixed, once for "
        "every size; the batch may be dynamic.",
    ),
    Refusal(
        r"torch\.export, dynamic (height|size)",
        r"\w+ naflex dynamic_img_size",
        "a dynamic height or width",
        "timm's `NaFlexVit` asks whether the grid is that of its table of positions, which would fix the size: export "
        "with height and width fixed, once for every size; the batch may be dynamic.",
    ),
)


def refusal(recorder: str, case: str) -> Refusal | None:
    """The refusal that is expected, the first that fits; None where the recorded model must be right."""
    for entry in REFUSALS:
        if re.fullmatch(entry.recorders, recorder) and re.fullmatch(entry.cases, case):
            return entry
    return None


def pairs() -> list[tuple[str, str]]:
    """Every recorder with every case it is for, by cases."""
    return [
        (name, case)
        for case in CASES
        for name, recorder in RECORDERS.items()
        if (CASES[case].other or not recorder.needs_sizes) and (case in DEPLOYED or not recorder.only_deployed)
    ]


INTRODUCTION = """# Exporting, compiling and transforming models

A recorded model either equals the plain one on other images, batches and sizes, or raises an error while it is recorded
that names what works instead. The table gives the outcome of every combination that was run: {right} were right,
{refused} refused, none wrong. The {open} with a dot have not been run for this page. `make test` runs a part of them,
`pytest -m release tests/test_export.py` the rest; `python tests/test_export.py RECORDER MODEL` runs those whose names
match two patterns and updates `tests/export_verdicts.json` and this page.

The models are small, have random weights and are recorded with two images of one size. A ✓ means that scores (or dense
maps, where the row names a fill) agree with the plain run on other images, on batches of five and of one and, for
models that accept them, on images of another size, unless the recorder fixes the shapes, as its column says; torch's
own error then rejects other shapes. A row with only the name of a method uses the settings of its `example`; other rows
name what differs. All but per-sample gradients are recorded under `torch.no_grad()`, as `effvit export` does: with
gradients on, torch 2.11's exporter to ONNX fails for hosts with windows and with relative positions ("Cannot view a
tensor").
"""
COMPILING = """
## effvit.compile

`effvit.compile(model, **options)` compiles a model in place and returns it: the same object, class and `state_dict`,
whose calls run compiled. Methods of fixed token counts are compiled as by `model.compile(**options)`: one graph, one
more once the batch size changes and, by torch's rule, one for a batch of one image. A schedule of keep rates takes two
graphs, but Expedite, whose clusters are laid out for each grid, takes one for every grid, and `random`, `uniform` and
`radial`,
whose counts follow from the rates of several blocks, take more.

Where counts depend on the image, plain `torch.compile` keeps all slots, so that it saves nothing. For ATS, padded or
packed, `effvit.compile` makes one graph that reads how many tokens stay, in each block as a plain run does, and goes on
with sizes that were unknown before; other counts do not compile anew. It is tested with torch 2.11.

- Of DyMU and ALGM the MLPs are compiled, once for all counts, and the rest runs as it is. In graphs that read them the
  vector code of inductor (torch 2.11, CPU) gave wrong scores, with three blocks of DeiT-Ti, where `backend="eager"`
  gave the right ones.
- Of all others only calls are compiled, not `forward_features` or `forward_intermediates`; a model of
  `features_only=True`, or any module that holds a reduced model, can be given as a whole.
- Copies, pickles and what `effvit.sparsify` makes of the model are not compiled.
- A CUDA graph cannot hold a read: use plain `torch.compile`, or `drop_tokens=False` for ATS.
- Packed batches in training: the gradients of their attention form each image's softmax map; padded ones do not.
- A method of your own whose counts depend on the image gets them compiled if it selects by `effvit.tokens.compact` and
  sets `graph_reads_counts = True`; compare its scores.
"""
COLUMNS = {
    "torch.compile": (
        "`torch.compile` with `fullgraph=True`, any batch and size; STViT on Swin, super-token SViT and hosts with "
        "windows: a graph for each size"
    ),
    "torch.compile, dynamic": "the same with `dynamic=True`",
    "torch.export": "`torch.export`, shapes fixed",
    "torch.export, dynamic batch": "`torch.export` with a dynamic batch",
    "torch.export, dynamic height": "`torch.export` with a dynamic height; models that take any size",
    "torch.export, dynamic size": "`torch.export` with dynamic height and width; models that take any size",
    "torch.onnx, dynamo=True": "`torch.onnx.export(..., dynamo=True)` with a dynamic batch, run by onnxruntime",
    "torch.onnx, dynamo=False": "`torch.onnx.export(..., dynamo=False)`, shapes fixed",
    "torch.onnx, dynamo=False, dynamic batch": "the same with `dynamic_axes` for the batch",
    "torch.jit.trace": "`torch.jit.trace`",
    "torch.fx": "`torch.fx.symbolic_trace`, any batch",
    "make_fx": "`make_fx`, shapes fixed",
    "vmap": "`torch.func.vmap` over images",
    "per-sample gradients": "`vmap(grad(...))` over images",
    "fake tensors": "`FakeTensorMode`: shapes of the result",
    "meta device": "forward on the meta device: shapes of the result",
}


def export_page(verdicts: dict[str, dict[str, str]]) -> str:
    """docs/export.md of the outcomes {case: {recorder: outcome}}."""
    numbered = {name: str(i) for i, name in enumerate(COLUMNS, start=1)}
    letters = {entry: chr(ord("a") + i) for i, entry in enumerate(REFUSALS)}
    wanted = {(recorder, case) for recorder, case in pairs() if recorder in COLUMNS}
    outcomes = [verdicts.get(case, {}).get(recorder) for recorder, case in wanted]
    counts = {"right": outcomes.count("right"), "refused": outcomes.count("refused"), "open": outcomes.count(None)}
    lines = [INTRODUCTION.format(**counts), "Columns:", ""]
    lines += [f"{numbered[name]}. {meaning}" for name, meaning in COLUMNS.items()]
    lines += ["", f"| model | {' | '.join(numbered.values())} |", f"|---|{':-:|' * len(numbered)}"]
    for case in CASES:
        cells = []
        for recorder in COLUMNS:
            outcome, entry = verdicts.get(case, {}).get(recorder), refusal(recorder, case)
            marks = {None: "·", "right": "✓", "refused": letters[entry] if entry else "refused", "wrong": "wrong"}
            cells.append(marks[outcome] if (recorder, case) in wanted else "")
        lines.append(f"| {case.replace('_img_size', '_img_size=True')} | {' | '.join(cells)} |")
    lines += ["", "Refused with an error:", ""]
    lines += [f"- **{letters[entry]}**: {entry.note}" for entry in REFUSALS]
    return "\n".join(lines) + "\n" + COMPILING
