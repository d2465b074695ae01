"""Three counts of every small model agree: on a trace (fvcore), in closed form, and torch's own while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import pytest
import timm
import torch
from architectures import SIZES, SMALL, make_architecture
from hosts import HOSTS, PAIRS, covered, make_host, make_images, make_model
from timm.layers import SimpleNorm
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import effvit
from effvit.hosts.host import ReducedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import FlopReport, count_flops
from effvit.reducers import METHODS, EViT, Reducer
from effvit.testing.models import example, reduce

# What torch does not count, and we do as fvcore does.
NOT_PRODUCTS = {"layer_norm", "rms_norm", "batch_norm", "adaptive_avg_pool2d", "grid_sampler", "upsample_bilinear2d"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def products(report: FlopReport) -> int:
    return sum(macs for name, macs in report.by_operator.items() if name not in NOT_PRODUCTS)


def macs_by_torch(model: nn.Module, x: Tensor) -> int:
    """MACs by torch's counter, which counts two FLOPs for each and on a CPU does not see the fused attention kernel."""
    model.requires_grad_(False)  # else the counter stumbles over parameters that a module takes as input
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def unseen(model: nn.Module) -> int:
    """MACs that torch runs although no score depends on them, so that a trace leaves them out."""
    if not isinstance(model, ReducedHost):
        return 0
    patches, reducers = model.patch_embed.num_patches, model.reducers
    if model.method == "gtp":  # the key weights that the last block hands on
        left = model.num_prefix_tokens + model.token_counts()[-1]
        return left * reducers[len(model.blocks) - 1].num_prop
    if model.method == "expedite":  # the hard labels of the patches
        return patches * prod(next(iter(reducers.values())).clusters(model.patch_embed.grid_size)) * model.embed_dim
    return 0


def noise(size: Sequence[int]) -> Tensor:
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def token_counts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """The keyword of closed_form_macs for a method that adapts to the image; nothing for all others."""
    if not isinstance(model, ReducedHost) or not any(r.variable_length for r in model.reducers.values()):
        return {}
    return {"token_counts": [int(features.tokens.counts()) for features in model.trace_tokens(x)]}


def check_agreement(model: nn.Module, size: tuple[int, int, int]) -> None:
    x = noise(size)
    report = count_flops(model, size, strict=True)
    assert sum(closed_form_macs(model, size, **token_counts(model, x)).values()) == report.total
    switches = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in switches:
        module.fused_attn = False
    if switches:
        assert count_flops(model, size, strict=True).total == report.total
    assert macs_by_torch(model, x) == products(report) + unseen(model)


@pytest.mark.parametrize("name", HOSTS)
def test_counts_of_hosts_agree(name: str) -> None:
    model = make_host(name)
    check_agreement(model, (3, *make_images(model).shape[2:]))


@pytest.mark.parametrize(("method", "host"), covered(PAIRS))
def test_counts_of_methods_agree(method: str, host: str) -> None:
    model = make_model(method, host)
    check_agreement(model, (3, *model.patch_embed.img_size))


@pytest.mark.parametrize("settings", [{"reduce_at": (0,)}, {"reduce_at": (1, 2, 3), "prop_attn": True}, {"window": 3}])
def test_counts_of_algm_follow_its_settings(settings: dict[str, Any]) -> None:
    model = make_model("algm", "registers", **settings)
    check_agreement(model, (3, *model.patch_embed.img_size))


@pytest.mark.parametrize("case", SMALL)
def test_counts_of_architectures_agree(case: str) -> None:
    check_agreement(make_architecture(case), (3, *SIZES[case][0]))


@pytest.mark.parametrize("size", [(64, 96), (60, 52)])  # windows of 7 padded; odd maps and a window as large as the map
def test_counts_of_swin_agree(size: tuple[int, int]) -> None:
    sizes = {"embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 4), "num_classes": 7}
    model = SwinTransformer(img_size=size, patch_size=4, window_size=7, **sizes).eval()
    check_agreement(model, (3, *size))


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "evit": [{"fuse_token": False}, {"keep_rate": 0.999}, {"num_tokens": 9}, {"num_tokens": 99}],
    "tome": [{"r": (3, -1.0)}, {"r": [40, 0, 3]}],
    "gtp": [
        {"selection": "CLSAttnMax"},
        {"selection": "CosSimMean", "graph_type": "Spatial"},
        {"selection": "Random", "token_scale": False, "sparsity": 0.6, "reduce_at": (0, 2)},
        {"propagation": "Mean"},
        {"propagation": "None", "graph_type": "Semantic"},
    ],
    "zero_tprune": [
        *({"r": 0}, {"keep_rate": 1.0}, {"similarity": "manhattan", "r": 99}),
        *({"keys": "averaged"}, {"renormalise": False}),
    ],
    "dynamicvit": [
        {"keep_rate": 0.999},
        {"keep_rate": (0.5, 0.9), "progressive": False},  # the second one has nothing to drop
    ],
    "diffrate": [
        {"prune_to": [], "merge_to": [40, 30, 20, 10]},
        {"prune_to": [40, 30, 20, 99], "merge_to": []},
        {"prune_to": None, "merge_to": None, "preset": "deit_small_2.3"},  # in proportion to 48 patches
    ],
    "expedite": [
        {"num_iters": 0},
        {"restore_at": 3},
        {"keep_rate": None, "num_clusters": (2, 3)},
        {"keep_rate": 0.8, "window_size": 1},  # in several tiles
    ],
    "hot": [{"keep_rate": 0.999}, {"num_tokens": 5}],
    "pitome": [{"keep_rate": 0.5}, {"keep_rate": [0.99, 0.7], "reduce_at": (0, 2), "protect_at": (0,)}],
    "mctf": [
        {"r": 7, "step": "tokens"},
        {"r": 0.2, "step": "after", "pooling": "size"},
        {"r": [0, 30], "reduce_at": (0, 2), "tau_sim": 0, "bidirection": False},
        {"r": 40, "prop_attn": False, "tau_size": 0, "tau_info": 0},
    ],
    "vid_tldr": [{"r": [40, 0, 3]}, {"r": 0.01}, {"r": (0.5, 0.2)}],
    "cubistmerge": [{"r_h": 3, "r_w": 0, "reduce_at": (3,)}, {"r_h": (0, 1), "r_w": (2, 0)}],
    "dpcknn": [{"keep_rate": 0.999}, {"num_tokens": 99}, {"equal_weight": True, "num_tokens": 5, "reduce_at": (0,)}],
    "kmedoids": [{"keep_rate": 0.999}, {"num_tokens": [99, 5]}, {"equal_weight": True, "reduce_at": (0, 1)}],
    "sinkhorn": [{"num_tokens": 7, "num_iters": 5}],
    "patchmerger": [{"num_tokens": 7, "scaled_attn": True}],
    "atc": [{"keep_rate": 0.999}, {"num_tokens": [99, 5], "linkage": "single", "prop_attn": False}],
    "random": [{"place": "queries"}, {"keep_rate": [0.9, 0.5]}],
    "uniform": [{"place": "mlp", "num_tokens": [99, 5]}, {"keep_rate": 0.999}],
    "radial": [
        {"pattern": "linf", "place": "mlp", "num_tokens": [99, 5], "reduce_at": (0, 2)},
        {"pattern": "l2", "keep_rate": 0.5},
        {"min_radius": 1.0, "reduce_at": (0, 2)},
        {"min_radius": 0, "pattern": "l2"},
    ],
}


@pytest.mark.parametrize(("method", "options"), [(m, options) for m, cases in OPTIONS.items() for options in cases])
def test_closed_form_follows_the_settings(method: str, options: dict[str, Any]) -> None:
    model = make_model(method, "class_token", **options)
    size = (3, *model.patch_embed.img_size)
    assert sum(closed_form_macs(model, size).values()) == count_flops(model, size, strict=True).total


def settings_of_few(method: str) -> dict[str, Any]:
    """Settings that would leave no patch of one, where a method has them."""
    names = METHODS[method].defaults()
    if "keep_rate" in names:
        return {"keep_rate": 0.5 if method == "pitome" else 0.3}  # PiToMe merges half at most
    return {"num_tokens": 1} if "num_tokens" in names else {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(8, 8), (8, 24)])
def test_what_methods_save_of_few_patches_agrees_on_a_host_of_any_size(method: str, size: tuple[int, int]) -> None:
    """At least one patch stays. The host is left out: it resizes its position table, which the form does not count."""
    host = make_host("class_token", dynamic_img_size=True)
    model = reduce(host, method, example(method) | settings_of_few(method))
    counts = token_counts(model, noise((3, *size)))
    by_form = sum(closed_form_macs(model, (3, *size), **counts).values())
    dense_form = sum(closed_form_macs(host, (3, *size)).values())
    total, dense_total = (count_flops(m, (3, *size), strict=True).total for m in (model, host))
    assert dense_form - by_form == dense_total - total


@pytest.mark.parametrize(
    ("prune_to", "merge_to"),
    [([10, 8, 8, 8], []), ([99, 8, 8, 8], [30, 8, 8, 8]), ([10, 8, 8, 8], [10, 7, 7, 7]), ([], [20, 9, 9, 9])],
)
def test_counts_of_a_head_on_every_patch_tell_merging_from_pruning(prune_to: list[int], merge_to: list[int]) -> None:
    """It reads tokens once for each patch that they stand for, where any merged, else those that are left."""
    model = make_model("diffrate", "lvvit", prune_to=prune_to, merge_to=merge_to)
    check_agreement(model, (3, *model.patch_embed.img_size))


# fvcore on the official modules with attention in separate products, 224 pixels.
@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("deit_base_patch16_224", 17.5827),
        ("vit_large_patch16_224", 61.6041),
        ("lvvit_small_patch16_224", 6.5688),
        ("lvvit_medium_patch16_224", 12.7035),
        # Measured on the dense backbone, which norms the maps of the first three stages and has no classifier.
        ("swin_small_patch4_window7_224", 8.7704 - 5 * 56**2 * 96 * 1.75 / 1e9 + 768e3 / 1e9),
        ("swin_base_patch4_window7_224", 15.4703 - 5 * 56**2 * 128 * 1.75 / 1e9 + 1024e3 / 1e9),
    ],
)
def test_large_models_are_counted_without_memory(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(closed_form_macs(model, (3, 224, 224)).values()) / 1e9 == pytest.approx(gmacs, rel=1e-4)


def test_terms_are_those_of_the_text_book() -> None:
    with torch.device("meta"):
        terms = closed_form_macs(timm.create_model("deit_small_patch16_224"), (3, 224, 224))
    n, c, depth = 197, 384, 12
    assert terms == {
        "embedding": 196 * c * 3 * 16**2,
        "projection": depth * n * 4 * c**2,
        "attention": depth * 2 * n**2 * c,
        "mlp": depth * n * 8 * c**2,
        "norm": (2 * depth + 1) * n * 5 * c,
        "head": 1000 * c,
    }


@pytest.mark.parametrize("kind", [VisionTransformer, Eva])
@pytest.mark.parametrize(
    ("made_for", "size"),
    [(48, (64, 48)), (48, (32, 32)), (48, (48, 48)), ((32, 72), (32, 72)), ((32, 72), (48, 48)), (48, (32, 72))],
)
def test_positions_of_other_image_sizes_are_resampled(kind: Any, made_for: Any, size: tuple[int, int]) -> None:
    """Counted on a trace: larger, smaller and turned grids, and the one that the model was made for."""
    torch.manual_seed(0)
    sizes = {"img_size": made_for, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    dense = kind(**sizes, dynamic_img_size=True).eval()
    for model in (dense, effvit.sparsify(dense, "tome", r=2)):
        assert sum(closed_form_macs(model, (3, *size)).values()) == count_flops(model, (3, *size), strict=True).total


def test_other_image_sizes_are_padded_to_whole_patches() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2, dynamic_img_size=True, dynamic_img_pad=True)
    assert closed_form_macs(model, (3, 50, 33)) == closed_form_macs(model, (3, 64, 48))


def test_model_without_closed_form_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a Linear has no closed form, only VisionTransformer, .* have; use effvit"):
        closed_form_macs(nn.Linear(3, 4), (3, 224, 224))


def test_method_without_closed_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", type("Mine", (EViT,), {"name": "mine", "cost": Reducer.cost}))
    model = effvit.sparsify(make_host("class_token"), "mine")
    with pytest.raises(TypeError, match=r"the method 'mine' has no closed form, only evit, .* have; give it a cost"):
        closed_form_macs(model, (3, 32, 32))


def test_blocks_and_norms_without_closed_form_are_refused() -> None:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
    with pytest.raises(TypeError, match="blocks of the class ParallelScalingBlock have no closed form"):
        closed_form_macs(VisionTransformer(block_fn=ParallelScalingBlock, **sizes), (3, 32, 32))
    with pytest.raises(TypeError, match=r"closed forms know LayerNorm, .* not SimpleNorm; use count_flops"):
        closed_form_macs(VisionTransformer(norm_layer=SimpleNorm, **sizes), (3, 32, 32))


def test_token_counts_are_asked_for_where_they_depend_on_the_image() -> None:
    with pytest.raises(ValueError, match="ats keeps as many tokens as the image needs; give token_counts"):
        closed_form_macs(make_model("ats", "class_token"), (3, 48, 64))
    with pytest.raises(ValueError, match="token_counts follow from the sizes of this model; leave them out"):
        closed_form_macs(make_model("tome", "class_token"), (3, 48, 64), token_counts=[48] * 4)
    with pytest.raises(ValueError, match="token_counts needs one value for each of 4 blocks, got 3"):
        closed_form_macs(make_model("ats", "class_token"), (3, 48, 64), token_counts=[48] * 3)


@pytest.mark.parametrize("method", ["ats", "dymu"])
def test_packed_batches_cost_what_padded_ones_do_for_one_image(method: str) -> None:
    padded, packed = (make_model(method, "dinov3", ragged=ragged) for ragged in ("padded", "packed"))
    size = (3, 48, 64)
    expected = sum(closed_form_macs(padded, size, **token_counts(padded, noise(size))).values())
    assert [count_flops(model, size, strict=True).total for model in (padded, packed)] == [expected, expected]
