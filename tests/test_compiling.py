"""``effvit.compile``: the plain run is the expectation of what is computed, the paragraph on graphs in docs/export.md
of how often it is compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import effvit
from effvit.recording import counts_in_graphs
from effvit.tokens import compact

RAGGED = {"ats": {"reduce_at": (0, 1)}}
BOTH = list(product(RAGGED, ("padded", "packed")))


def host(**options: Any) -> VisionTransformer:
    """Two blocks on 36 patches, of attention uneven enough for counts to depend on the image."""
    size = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**(size | options)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:32] *= 12
    return model


def uneven(number: int) -> Tensor:
    return torch.randn(number, 3, 48, 48) * torch.linspace(0.1, 2, number)[:, None, None, None]


def twins(method: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A model and another on the same weights."""
    model = effvit.sparsify(host(), method, **settings)
    return model, effvit.sparsify(model, method, **settings)


def weighed(flops: list[int]) -> Callable[..., Any]:
    """A backend that runs a graph as it is and notes the FLOPs of its products."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            with FlopCounterMode(display=False) as counter:
                out = graph(*args)
            flops.append(counter.get_total_flops())
            return out

        return run

    return backend


@pytest.mark.parametrize(("method", "ragged"), BOTH)
def test_one_graph_and_one_more_for_other_batches_serve_all_counts(method: str, ragged: str) -> None:
    model, plain = twins(method, ragged=ragged, **RAGGED[method])
    counter = CompileCounter()
    effvit.compile(model, backend=counter, fullgraph=True)
    counts = set()
    with torch.no_grad():
        for number in (3, 3, 5, 4, 3):
            x = uneven(number)
            assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
            counts.add(plain.forward_tokens(x).x.shape[1])
    assert len(counts) > 1
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("method", "ragged"), BOTH)
def test_what_is_compiled_computes_with_the_tokens_left(method: str, ragged: str) -> None:
    """Plain torch.compile computes with all slots; a padded graph of ATS forms the very products of the plain run."""
    model, plain = twins(method, ragged=ragged, **RAGGED[method])
    slots = effvit.sparsify(model, method, **RAGGED[method])
    own: list[int] = []
    all_slots: list[int] = []
    x = uneven(4)
    with torch.no_grad():
        expected = torch.compile(slots, backend=weighed(all_slots), fullgraph=True)(x)
        assert torch.allclose(effvit.compile(model, backend=weighed(own), fullgraph=True)(x), expected, atol=1e-5)
        assert own[0] < 0.95 * all_slots[0]
        if (method, ragged) == ("ats", "padded"):
            with FlopCounterMode(display=False) as counter:
                plain(x)
            assert own[0] == counter.get_total_flops()


def test_a_model_compiled_both_ways_takes_the_graph_of_each() -> None:
    """Dynamo looks for graphs by the code that is run, which both ways would share."""
    model = effvit.sparsify(host(), "ats", **RAGGED["ats"])
    own: list[int] = []
    plain, backend = copy.deepcopy(model), weighed(own)
    x = uneven(4)
    with torch.no_grad():
        plain.compile(backend=backend)
        plain(x)
        effvit.compile(model, backend=backend)(x)
        assert own[1] < own[0]
        plain(x)
        assert own[2] == own[0]


def test_every_model_has_a_limit_of_its_own() -> None:
    """Dynamo keeps so many graphs of a function, and runs what comes then as it is, or fails for a full graph."""
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for width in (32, 64):
            model = effvit.sparsify(host(embed_dim=width, depth=1), "ats", reduce_at=(0,))
            effvit.compile(model, backend="eager", fullgraph=True)(uneven(3))


@pytest.mark.parametrize(("method", "ragged"), BOTH)
def test_gradients_are_those_of_the_plain_run(method: str, ragged: str) -> None:
    model, plain = twins(method, ragged=ragged, **RAGGED[method])
    effvit.compile(model.train(), backend=CompileCounterWithBackend("aot_eager"), fullgraph=True)
    plain.train()
    x = uneven(3)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, plain))
    for name, a, b in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(
    "method",
    ["evit", "tome", "gtp", "zero_tprune", "hot", "expedite", "pitome", "mctf", "vid_tldr", "cubistmerge", "random"],
)
def test_a_static_method_is_one_graph_and_one_more_over_batch_sizes(method: str) -> None:
    model, plain = twins(method)
    counter = CompileCounter()
    assert effvit.compile(model, backend=counter, fullgraph=True) is model
    with torch.no_grad():
        for number, graphs in ((4, 1), (4, 1), (3, 2), (2, 2), (7, 2)):
            x = uneven(number)
            assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
            assert counter.frame_count <= graphs


@pytest.mark.parametrize(("method", "ragged"), [("evit", {}), ("hot", {}), ("ats", {}), ("ats", {"ragged": "packed"})])
def test_a_keep_rate_schedule_takes_three_graphs_at_most(method: str, ragged: dict[str, str]) -> None:
    """Each of the blocks has a rate of its own, which dynamo would fix one after another."""
    model, plain = twins(method, reduce_at=(0, 1), **ragged)
    counter = CompileCounter()
    effvit.compile(model, backend=counter, fullgraph=True)
    x = uneven(3)
    with torch.no_grad():
        for step in range(8):
            for each in (model, plain):
                each.set_keep_rate(effvit.cosine_keep_rate(step, 1, 0.5, 0, 8))
            assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of its inductor
@pytest.mark.parametrize(
    ("method", "ragged"),
    [pytest.param(*pair, marks=() if pair == ("ats", "packed") else pytest.mark.release) for pair in BOTH],
)
def test_inductor_compiles_it(method: str, ragged: str) -> None:
    model, plain = twins(method, ragged=ragged, **RAGGED[method])
    effvit.compile(model, fullgraph=True)
    with torch.no_grad():
        for number in (3, 3):
            x = uneven(number)
            assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ragged", ["padded", "packed"])
def test_dymu_has_its_mlps_compiled_once_for_all_counts(ragged: str) -> None:
    """Inductor computes wrong scores from whole graphs that read its counts."""
    model, plain = twins("dymu", thresholds=(0.2, 0.2), ragged=ragged)
    graphs = CompileCounter()
    effvit.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    counts = set()
    with torch.no_grad():
        for number in (3, 5, 4, 2, 3):
            x = uneven(number)
            assert torch.allclose(model(x), plain(x), atol=1e-5)
            counts.add(plain.forward_tokens(x).x.shape[1])
    assert len(counts) > 1
    assert 1 <= graphs.frame_count <= 2


def test_compiled_mlps_of_dymu_work_on_the_tokens_left() -> None:
    model, plain = twins("dymu", thresholds=(0.2, 0.2))
    own: list[int] = []
    x = uneven(4)
    effvit.compile(model, backend=weighed(own), fullgraph=True)
    with torch.no_grad():
        model(x)
        rows = [features.x[..., 0].numel() for features in plain.trace_tokens(x)]
    assert own == [2 * number * 2 * 32 * 128 for number in rows]  # two products of 32 and 128 channels
    assert rows[-1] < 4 * 37


def test_images_that_keep_one_token_have_four_slots() -> None:
    """Compilers take a size of 1 for a broadcast, and a method may halve the size; the mask tells the empty slots."""

    def kept(order: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
        index, valid, _ = compact(order, stays, 6, trim=True)
        return index, valid

    order = torch.arange(6).expand(2, -1)
    stays = torch.zeros(2, 6, dtype=torch.bool)
    stays[0, 1] = stays[1, 5] = True
    with counts_in_graphs():
        index, valid = torch.compile(kept, backend="eager", fullgraph=True)(order, stays)
    assert index[:, 0].tolist() == [1, 5]
    assert valid.tolist() == [[True, False, False, False]] * 2


@pytest.mark.parametrize(("method", "ragged"), [*BOTH, ("dymu", "padded")])
def test_the_model_stays_what_it_was(method: str, ragged: str) -> None:
    settings = RAGGED.get(method, {"thresholds": (0.2, 0.2)})
    model, plain = twins(method, ragged=ragged, **settings)
    keys = list(model.state_dict())
    counter = CompileCounter()
    assert effvit.compile(effvit.compile(model, backend=counter), backend=counter) is model
    assert type(model) is type(plain)
    assert list(model.state_dict()) == keys
    x = uneven(3)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), effvit.sparsify(model, method, ragged=ragged, **settings)):
            assert torch.equal(twin(x), plain(x))
        assert counter.frame_count == 0
        assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("method", "settings"), [*RAGGED.items(), ("dymu", {"thresholds": (0.2, 0.2)})])
def test_recorders_meet_the_plain_model(method: str, settings: dict[str, Any]) -> None:
    """Exports and traces of the model do not depend on its being compiled."""
    model, plain = twins(method, **settings)
    effvit.compile(model, backend="eager")
    x = uneven(3)
    with torch.no_grad():
        expected = plain(x)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-5)
        assert torch.allclose(torch.jit.trace(model, (x,), check_trace=False)(x), expected, atol=1e-5)


def test_a_module_that_holds_a_reduced_model_is_compiled_whole() -> None:
    model, plain = twins("ats", **RAGGED["ats"])
    counter = CompileCounter()
    whole = effvit.compile(nn.Sequential(model, nn.Softmax(1)), backend=counter, fullgraph=True)
    with torch.no_grad():
        for number in (3, 3):
            x = uneven(number)
            assert torch.allclose(whole(x), plain(x).softmax(1), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("evit_deit_tiny_patch16_224", "an nn.Module, got str"),
        (torch.compile(nn.Identity(), backend="eager"), "is compiled by torch.compile already"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        effvit.compile(model)
