"""Agreement of STViT-R on Swin with the released code: classification, dense backbone, and lists of names."""

from __future__ import annotations

import re
from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, check_official_keys, expect
from timm.layers import to_2tuple
from torch import Tensor, nn

from effvit.architectures._stvit_r_names import UNIT
from effvit.architectures.dumbbell import DumbbellUnit
from effvit.architectures.semantic_tokens import max_seeds
from effvit.architectures.stvit_swin import STViTSwin
from effvit.layers.windows import to_windows

# Arguments of the official constructors that have the same name here, of both forms and of one of them.
SAME = (
    *("in_chans", "embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "relative_pos", "use_conv_pos"),
)
CLASSIFIER = ("num_classes", "use_global", "shortcut", "use_layer_scale")
# Without effect on what is compared, whatever their value: both classes have their LayerNorm behind the stem commented
# out, sizes of pretraining only shape the absolute positions, and the other two are of training.
WITHOUT_EFFECT = ("pretrain_img_size", "patch_norm", "use_checkpoint", "frozen_stages")
DROPPED = ("attn_mask", "relative_position_index")


def is_dense(case: Case) -> bool:
    return case.method == "stvit_r_dense"


def build(case: Case) -> STViTSwin:
    """The model of a configuration, whose every argument is used or known to have no effect."""
    case.evaluated()
    form = " (detection backbone)" if is_dense(case) else ""
    expect(case.config["config"], cls=f"SwinTransformer{form}")
    kwargs = dict(case.config["config"]["kwargs"])
    expect(kwargs, patch_size=4, ape=False, multi_scale="multi_scale_semantic_token1")
    for name in ("patch_size", "ape", "multi_scale", *WITHOUT_EFFECT):
        kwargs.pop(name, None)
    scale = kwargs.pop("qk_scale", None)
    model = (dense_model if is_dense(case) else classifier)(kwargs, case)
    assert not kwargs, f"arguments without a counterpart: {sorted(kwargs)}"
    if scale is not None:
        for i in (0, 1, 3):  # the released third stage does not get it
            for block in model.stages[i].blocks:
                block.attn.scale, block.attn.fused_attn = scale, False
    return model.eval()


def take(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of those names, taken out of ``kwargs``."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def dense_model(kwargs: dict[str, Any], case: Case) -> STViTSwin:
    kernels = {"k_window_size_1": 14, "k_window_size_2": 21, "restore_k_window_size": 27}
    kwargs.pop("out_indices", None)  # read by ``load`` and ``compare``
    return STViTSwin(
        num_classes=0,
        window_size=kwargs.pop("window_size", 7),
        window_samples=kwargs.pop("window_sample_size", 3),
        key_windows="dense",
        kernels=[kwargs.pop(name, default) for name, default in kernels.items()],
        mask_mode="official" if kwargs.pop("pad_mask", True) else "none",
        shortcut=True,
        shift_small=True,
        out_norm=True,
        **take(kwargs, SAME),
    )


def classifier(kwargs: dict[str, Any], case: Case) -> STViTSwin:
    size = case.config["config"]["img_size"]
    assert tuple(case["input"].shape[2:]) == to_2tuple(size)
    side, window = min(to_2tuple(size)), kwargs.pop("window_size", 7)
    return STViTSwin(
        window_size=[min(side // 4 // 2**i, window) for i in range(4)],
        window_samples=kwargs.pop("sample_window_size", 3),
        key_windows="cls",
        mask_mode="none",
        img_size=size,
        **({"use_global": True} | take(kwargs, (*SAME, *CLASSIFIER))),  # the release's default, not ours
    )


def load(model: STViTSwin, case: Case) -> None:
    state, dropped = model.adapt_state_dict(case.state())
    assert all(name.endswith(DROPPED) for name in dropped)
    known = case.config["config"]["kwargs"].get("out_indices", range(4))
    own = {k: v for k, v in model.state_dict().items() if re.match(r"out_norms\.(\d)", k)}
    state |= {k: v for k, v in own.items() if int(k.split(".")[1]) not in known}
    model.load_state_dict(state)


def outputs_of(model: STViTSwin, case: Case) -> dict[str, Tensor]:
    """Every intermediate result by its recorded name, from one forward pass."""
    results: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            results[name] = out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(hook))

    keep("patch_embed", model.stem)
    for i, stage in enumerate(model.stages):
        keep(f"layers.{i}.x_out", stage)
        if i:
            keep(f"layers.{i - 1}.out", stage.downsample)
    keep("layers.3.out", model.stages[3])
    keep("layers.2.recovered_tokens", model.stages[2])
    for u, unit in enumerate(model.stages[2].blocks):
        assert isinstance(unit, DumbbellUnit)
        for k, part in enumerate(UNIT):
            keep(f"layers.2.blocks.{6 * u + k}.out", unit.get_submodule(part))
    if not is_dense(case):
        keep("norm", model.norm)
    model.forward_intermediates(case["input"])
    for handle in handles:
        handle.remove()
    if "norm" in results:  # the only module in (B, C, H, W)
        results["norm"] = results["norm"].permute(0, 2, 3, 1)
    for u in range(len(model.stages[2].blocks)):
        x, samples = results[f"layers.2.blocks.{6 * u}.out"], (model.samples, model.samples)
        windows = to_windows(x, model.window)
        results[f"layers.2.blocks.{6 * u + 1}.pooled_seed"] = max_seeds(windows, (model.window,) * 2, samples)
    return results


def as_recorded(result: Tensor, expected: Tensor) -> Tensor:
    """A map (B, H, W, C) or sequence in the layout of the recorded one, (B, N, C) or (B, C, H, W)."""
    if result.ndim == 4:
        return result.flatten(1, 2) if expected.ndim == 3 else result.permute(0, 3, 1, 2)
    return result


def official_layout(stem: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """The stem's map (B, H, W, C) by way of the sequence that the official stem returns.

    For one image in that layout torch 2.11's batch norm (CPU, eval) has a wrong gradient, and the recorded gradients
    of the stem are this one: finite differences of the official code contradict them and agree with our layout's
    (``test_gradient_of_the_stem_is_that_of_finite_differences``).
    """
    return out.permute(0, 3, 1, 2).flatten(2).transpose(1, 2).unflatten(1, out.shape[1:3])


def compare(case: Case) -> None:
    model = build(case)
    dtype, tolerance = case["input"].dtype, SINGLE
    if dtype == torch.float64:
        model, tolerance = model.double(), DOUBLE
    load(model, case)
    with torch.no_grad():
        results = outputs_of(model, case)
    recorded = [key for key in case.tensors if key.startswith("inter/")]
    for key in recorded:
        name = key.removeprefix("inter/")
        assert name in results, f"{key} has no counterpart"
        case.close(as_recorded(results[name], case[key]), key, tolerance)

    indices = list(case.config["config"]["kwargs"].get("out_indices", range(4)))

    def outputs(x: Tensor) -> list[Tensor]:
        if is_dense(case):
            return model.forward_intermediates(x, indices=indices, intermediates_only=True)
        return [model(x)]

    final = outputs(case["input"])
    if "output" in case:
        case.close(final[0], "output", tolerance)
    else:
        for i, out in enumerate(final):
            case.close(out, f"output/{i}", tolerance)
    model.stem.register_forward_hook(official_layout)
    case.adapted_gradients(model, outputs, tolerance)


def compare_keys(content: dict[str, Any]) -> None:
    base, _, dense = content["model"].partition("_dense")
    form = "dense" if content["model"].endswith("dense") else "224"
    assert not dense
    check_official_keys(content, f"{base}_patch4_window7_{form}", DROPPED)
