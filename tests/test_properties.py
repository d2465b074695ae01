"""A thousand drawn combinations of host, method, settings and size: right, or refused with a sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hosts import make_images, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contract import assert_law
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit.recover import FILLS, NORMS
from effvit.reducers import METHODS
from effvit.reducers.atc import LINKAGES
from effvit.reducers.diffrate_presets import PRESETS
from effvit.reducers.gtp import GRAPH_TYPES, PROPAGATIONS, SELECTIONS
from effvit.reducers.mctf import POOLING, STEPS
from effvit.reducers.ragged import RAGGED
from effvit.reducers.rings import PATTERNS
from effvit.reducers.static_selection import PLACES
from effvit.reducers.zero_tprune import PARTITIONS, SIMILARITIES
from effvit.schedule import R_SCHEDULES

REFUSALS = re.compile(
    r"would leave -?\d+ of \d+ patch tokens|scores patches by the class token|which attention pooling"
    r"|num_neighbours must be at least 1 and at most|keeps every entry of|token_scale needs propagation"
    r"|compat=True reproduces the official padded batch|k must be at (least 2 and at )?most the number of"
    r"|window must be at most the sides"
    r"|takes at most every second of"
    r"|drops no patch|restore_at must be a block behind|clusters must be at least 1 x 1 and at most one for each token"
    r"|makes \d+ tokens, but only \d+ enter it"
    r"|one of tau_sim, tau_info and tau_size must be above 0"
)
rates = st.sampled_from([0.2, 0.5, 0.7, 0.95, 1.0])


@st.composite
def hosts(draw: st.DrawFn) -> nn.Module:
    """A tiny host of any kind on any small grid, one patch and one row included."""
    patch = draw(st.sampled_from([4, 8]))
    grid = draw(st.sampled_from([(1, 1), (1, 5), (2, 2), (3, 4), (7, 5), (4, 1)]))
    heads = draw(st.sampled_from([2, 3]))
    common: dict[str, Any] = {
        "img_size": (grid[0] * patch, grid[1] * patch),
        "patch_size": patch,
        "embed_dim": 8 * heads,
        "num_heads": heads,
        "depth": draw(st.integers(1, 4)),
        "num_classes": 5,
        "init_values": draw(st.sampled_from([None, 0.1])),
        "qk_norm": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(["vit", "vit", "distilled", "eva"]))
    if kind == "distilled":
        return VisionTransformerDistilled(**common)
    class_token = draw(st.booleans())
    pools = ["avg", "map"] + (["token"] if class_token else [])
    common |= {"class_token": class_token, "global_pool": draw(st.sampled_from(pools))}
    registers = draw(st.integers(0, 2))
    if kind == "vit":
        return VisionTransformer(
            **common, reg_tokens=registers, pre_norm=draw(st.booleans()), no_embed_class=draw(st.booleans())
        )
    rope = draw(st.sampled_from([None, "cat", "mixed", "dinov3"]))
    return Eva(
        **common,
        num_reg_tokens=registers,
        swiglu_mlp=draw(st.booleans()),
        qkv_fused=draw(st.booleans()),
        use_rot_pos_emb=rope is not None,
        rope_type=rope or "cat",
    )


@st.composite
def methods(draw: st.DrawFn, depth: int) -> tuple[str, dict[str, Any]]:
    """A method with settings drawn from all it has."""
    method = draw(st.sampled_from(effvit.list_methods()))
    blocks = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1)))
    if method == "evit":
        drawn: dict[str, Any] = {"keep_rate": draw(rates), "fuse_token": draw(st.booleans()), "reduce_at": blocks}
    elif method == "tome":
        r = draw(st.one_of(st.integers(0, 9), st.tuples(st.integers(1, 6), st.sampled_from([-1.0, 0.5, 1.0]))))
        drawn = {"r": r, "prop_attn": draw(st.booleans())}
    elif method == "gtp":
        drawn = {
            "num_prop": draw(st.integers(0, 4)),
            "selection": draw(st.sampled_from([rule for rule in SELECTIONS if rule != "Random"])),
            "propagation": draw(st.sampled_from(PROPAGATIONS)),
            "graph_type": draw(st.sampled_from(GRAPH_TYPES)),
            "num_neighbours": draw(st.integers(1, 8)),
            "sparsity": draw(st.sampled_from([1.0, 1.0, 0.7])),
            "reduce_at": blocks,
        }
    elif method == "ats":
        drawn = {
            "keep_rate": draw(st.one_of(st.none(), rates)),
            "reduce_at": blocks,
            "grid": draw(st.sampled_from(["official", "midpoint"])),
            "value_norm": draw(st.sampled_from(["concat", "per_head"])),
            "ragged": draw(st.sampled_from(RAGGED)),
            "drop_tokens": draw(st.booleans()),
        }
    elif method == "dymu":
        drawn = {
            "r_total": draw(st.sampled_from([0, 1, 5, 40])),
            "r_schedule": draw(st.sampled_from(R_SCHEDULES)),
            "thresholds": [draw(st.sampled_from([-1.0, 0.0, 0.3, 0.6, 0.9, 1.0])) for _ in range(depth)],
            "max_r_per_instance_ratio": draw(st.sampled_from([None, None, 1.0, 2.5])),
            "ragged": draw(st.sampled_from(RAGGED)),
        }
    elif method == "algm":
        drawn = {
            "threshold": draw(st.sampled_from([-1.0, 0.0, 0.3, 0.6, 0.9, 1.0])),
            "reduce_at": blocks,
            "window": draw(st.integers(2, 3)),
            "prop_attn": draw(st.booleans()),
            "ragged": draw(st.sampled_from(RAGGED)),
        }
    elif method == "expedite":
        drawn = {
            **draw(st.sampled_from([{"keep_rate": 0.5}, {"keep_rate": 1.0}, {"num_clusters": (2, 3)}, {}])),
            "cluster_at": blocks[0],
            "restore_at": draw(st.sampled_from([None, *blocks[1:]])),
            "num_iters": draw(st.integers(0, 3)),
            "temperature": draw(st.sampled_from([5e-3, 0.1, 100.0])),
            "window_size": draw(st.sampled_from([1, 3, 5])),
            "k": draw(st.sampled_from([None, 1, 3])),
            "norm": draw(st.sampled_from(NORMS)),
        }
    elif method == "hot":
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "k": draw(st.integers(2, 4))}
    elif method == "pitome":
        drawn = {
            "keep_rate": draw(st.sampled_from([0.5, 0.7, 0.95, 1.0])),
            "reduce_at": blocks,
            "margins": draw(st.sampled_from([(0.75, 0.0), (0.9, 0.0), (0.0, -1.0)])),
            "protect_at": draw(st.sampled_from([None, blocks])),
            "prop_attn": draw(st.booleans()),
        }
    elif method == "mctf":
        taus = st.sampled_from([0.0, 1.0, 20.0])
        drawn = {"r": draw(st.sampled_from([0, 1, 2, 9, 0.3])), "reduce_at": blocks, "tau_sim": draw(taus)}
        drawn |= {"tau_info": draw(taus), "tau_size": draw(taus), "step": draw(st.sampled_from(STEPS))}
        drawn |= {name: draw(st.booleans()) for name in ("bidirection", "prop_attn")}
        drawn["pooling"] = draw(st.sampled_from(POOLING))
    elif method == "vid_tldr":
        drawn = {"r": draw(st.sampled_from([0, 2, 9, 0.3, (0.5, 0.2)[:depth], (3,)]))}
    elif method == "cubistmerge":
        drawn = {
            "r_h": draw(st.integers(0, 2)),
            "r_w": draw(st.integers(0, 3)),
            "reduce_at": blocks[:1],
            "compat": draw(st.booleans()),
        }
    elif method == "dpcknn":
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "k": draw(st.integers(2, 4))}
        drawn["equal_weight"] = draw(st.booleans())
    elif method == "kmedoids":
        equal = draw(st.booleans()) or blocks[0] == 0
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "equal_weight": equal}
        drawn["num_iters"] = draw(st.integers(0, 3))
    elif method == "atc":
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "prop_attn": draw(st.booleans())}
        drawn["linkage"] = draw(st.sampled_from(sorted(LINKAGES)))
    elif method == "sinkhorn":
        drawn = {"num_tokens": draw(st.integers(1, 4)), "reduce_at": blocks, "eps": draw(st.sampled_from([0.1, 1.0]))}
        drawn["num_iters"] = draw(st.integers(1, 4))
    elif method == "patchmerger":
        drawn = {"num_tokens": draw(st.integers(1, 4)), "reduce_at": blocks, "scaled_attn": draw(st.booleans())}
    elif method == "radial":
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "place": draw(st.sampled_from(PLACES))}
        drawn |= {
            "pattern": draw(st.sampled_from(PATTERNS)),
            "min_radius": draw(st.sampled_from([None, 0.0, 1.0, 2.5])),
        }
    elif method in ("random", "uniform"):
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "place": draw(st.sampled_from(PLACES))}
    elif method == "dynamicvit":
        drawn = {"keep_rate": draw(rates), "reduce_at": blocks, "progressive": draw(st.booleans())}
        drawn["mean_eps"] = draw(st.sampled_from([0.0, 1e-6]))
    elif method == "diffrate":
        numbers = st.one_of(st.just([]), st.lists(st.integers(1, 12), min_size=depth, max_size=depth))
        own = {"prune_to": draw(numbers), "merge_to": draw(numbers)}
        drawn = draw(st.sampled_from([own, own, {}, *({"preset": name} for name in sorted(PRESETS))]))
    else:
        drawn = {
            "keep_rate": draw(rates),
            "reduce_at": blocks,
            "r": draw(st.integers(0, 5)),
            "num_iters": draw(st.integers(1, 5)),
            "cls_boost": draw(st.sampled_from([None, 1.0])),
            "var_range": draw(st.sampled_from([None, (0.01, 0.7)])),
            "partition": draw(st.sampled_from(PARTITIONS)),
            "similarity": draw(st.sampled_from(sorted(SIMILARITIES))),
        }
    return method, drawn | {"recover": draw(st.sampled_from(tuple(FILLS)))}


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_combination_is_right_or_refused(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    host = data.draw(hosts()).double().eval()
    method, drawn = data.draw(methods(len(host.blocks)))
    x = torch.randn(data.draw(st.integers(1, 3)), 3, *host.patch_embed.img_size, dtype=torch.float64)
    try:
        with torch.no_grad():
            model = effvit.sparsify(host, method, **drawn).eval()
            out = model(x)
    except ValueError as error:
        if REFUSALS.search(str(error)):
            return
        raise

    with torch.no_grad():
        assert out.shape == (len(x), 5)
        assert out.isfinite().all()
        alone = torch.cat([model(image[None]) for image in x])
        assert torch.allclose(out, alone, rtol=1e-9, atol=1e-9)
        final, maps = model.forward_intermediates(x)
        assert final.isfinite().all()
        for features in maps:
            assert features.shape == (len(x), host.embed_dim, *host.patch_embed.grid_size)
            assert features.isfinite().all()
        for (y, tokens), bound in zip(model.trace_tokens(x), model.token_counts(), strict=True):
            assert y.shape[1] == host.num_prefix_tokens + tokens.anchor.shape[1]
            ragged = METHODS[method].variable_length
            assert tokens.anchor.shape[1] <= bound if ragged else tokens.anchor.shape[1] == bound
            assert_law(tokens)
            if tokens.size is not None:
                whole = host.num_prefix_tokens + host.patch_embed.num_patches
                carried = tokens.size.sum(1)
                dropped = torch.zeros_like(carried) if tokens.complete else (tokens.source < 0).sum(1).to(carried)
                assert torch.equal(carried + dropped, torch.full_like(carried, whole))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_attention_under_autocast_is_that_in_float32_to_the_precision_of_bfloat16(method: str) -> None:
    """Of the first block, which no decision precedes; bfloat16 keeps 8 bits, and a value goes through 3 products."""
    # Its example merges before the first block, by patches that bfloat16 has rounded, and takes out others.
    settings = {"reduce_at": (1, 2)} if method == "cubistmerge" else {}
    model, found = make_model(method, "class_token", **settings), []
    model.blocks[0].attn.register_forward_hook(lambda _m, _a, out: found.append(out))
    x = make_images(model)
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
    exact, rounded = found[0], found[-1].float()
    assert exact.norm() > 0
    assert (rounded - exact).norm() <= 3 * 2**-7 * exact.norm()
