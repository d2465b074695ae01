"""The contract of methods on hosts with windows: no token map, full maps behind every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import pytest
import torch
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tiny_vit import TinyVit
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

import effvit
from effvit.hosts.windows import ReducedWindows, window_methods
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops
from effvit.protocols import Setting, Settings, Size
from effvit.reducers import METHODS
from effvit.testing.laws import assert_equal_scores_and_gradients, copies_through_files
from effvit.testing.models import noise, perturb
from effvit.testing.reads import assert_reads, count_reads
from effvit.testing.surface import Backbone, MakeModel

__all__ = [
    "WINDOW_HOSTS",
    "WINDOW_SIZE",
    "WindowContract",
    "assert_checkpointing_changes_nothing",
    "assert_closed_form_is_the_count",
    "assert_half_precision_runs",
    "make_window_host",
    "make_window_model",
    "parametrize_windows",
    "window_pairs",
]

WINDOW_SIZE: Size = (48, 56)
"""(H, W) of the images that the small hosts are made for; neither maps nor stages are whole windows there,
but for mask units of a Hiera, which takes no others."""

SHIFTED: Settings = {
    "img_size": WINDOW_SIZE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "num_classes": 7,
    "window_size": 4,
    "drop_path_rate": 0.0,
}

POOLED: Settings = {
    "patch_kernel": (3, 3),
    "patch_stride": (2, 2),
    "patch_padding": (1, 1),
    "embed_dim": 8,
    "num_heads": 1,
    "stages": (2, 2, 3),
    "q_pool": 2,
    "num_classes": 7,
}


def _small(make: Callable[..., nn.Module], settings: Settings) -> MakeModel:
    def build(**changed: Setting) -> nn.Module:
        return make(**(settings | changed))

    return build


WINDOW_HOSTS: dict[str, MakeModel] = {
    "sam": _small(
        VisionTransformerSAM,
        {
            "img_size": WINDOW_SIZE,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
            "num_classes": 7,
            "window_size": 4,
            "use_rel_pos": True,
            "global_attn_indexes": (1, 3),
            "neck_chans": 10,
        },
    ),
    "swin": _small(SwinTransformer, SHIFTED),
    "swinv2": _small(SwinTransformerV2, SHIFTED),
    "tiny_vit": _small(
        TinyVit,
        {
            "embed_dims": (8, 16, 24, 32),
            "num_heads": (1, 2, 3, 4),
            "depths": (1, 1, 2, 1),
            "window_sizes": (4, 4, 4, 4),
            "num_classes": 7,
            "drop_path_rate": 0.0,
        },
    ),
    "hiera": _small(
        Hiera,
        POOLED
        | {
            "img_size": WINDOW_SIZE,
            "mask_unit_size": (4, 4),
            "mask_unit_attn": (True, False, False),  # mask units of 2 x 2 would be too small for what methods leave
        },
    ),
    "hieradet": _small(HieraDet, POOLED | {"window_spec": (4, 4, 4), "global_att_blocks": (5,)}),
}


def make_window_host(name: str, **settings: Setting) -> Backbone:
    """A host with windows, with the same weights at every call, in eval mode."""
    torch.manual_seed(0)
    host = WINDOW_HOSTS[name](**settings).eval()
    perturb(host)
    return cast(Backbone, host)


def reduce_in_windows(host: Backbone, method: str, settings: Settings) -> ReducedWindows:
    """The host under the method, sharing its weights."""
    model = effvit.sparsify(host, method, recover=None, share=True, **settings)
    assert isinstance(model, ReducedWindows)
    return model


def make_window_model(method: str, host: str, **settings: Setting) -> ReducedWindows:
    """The host under the method with the settings of its ``example_in_windows``, some of them changed."""
    return reduce_in_windows(make_window_host(host), method, METHODS[method].example_in_windows() | settings).eval()


def window_pairs(methods: Iterable[str] | None = None, hosts: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """(method, host) for methods that act inside windows, of all or of these, on all hosts with windows or on these."""
    known = window_methods()
    return [
        (method, host)
        for method in (METHODS if methods is None else methods)
        if method in known
        for host in (WINDOW_HOSTS if hosts is None else hosts)
    ]


def parametrize_windows(*methods: str, hosts: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """Decorator of a subclass of ``WindowContract``: all tests with these methods, or all there are, on these hosts.

    Raises:
        ValueError: An unknown method, or one that does not act inside windows.
    """
    for method in methods:
        effvit.method_settings(method)
        if method not in window_methods():
            raise ValueError(
                f"{method} has neither Reducer.group nor Reducer.shrink and is refused by hosts with windows; give it "
                "one of them, or leave it out of parametrize_windows"
            )
    return pytest.mark.parametrize(("method", "host"), window_pairs(methods or None, hosts))


def maps_and_scores(model: Backbone | ReducedWindows, x: Tensor) -> list[Tensor]:
    """The maps of all stages, or of all blocks where there is one stage, the final one, and the scores."""
    final, maps = cast(Backbone, model).forward_intermediates(x)
    scores: Tensor = model(x)
    return [*maps, final, scores]


def assert_checkpointing_changes_nothing(model: nn.Module, x: Tensor) -> None:
    """Neither scores nor gradients, of which every parameter has one."""
    scores = model(x)
    scores.square().sum().backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in plain.items() if gradient is None or not gradient.any()] == []
    model.zero_grad()
    cast(Backbone, model).set_grad_checkpointing()
    again = model(x)
    again.square().sum().backward()
    assert torch.equal(again, scores)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def assert_closed_form_is_the_count(model: nn.Module, size: Size) -> None:
    """On images (3, H, W), with every operator of the trace counted."""
    assert sum(closed_form_macs(model, (3, *size)).values()) == count_flops(model, (3, *size), strict=True).total


def assert_half_precision_runs(model: nn.Module, x: Tensor) -> None:
    """Under autocast, and in bfloat16 throughout."""
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


class WindowContract:
    """What a method inside windows must hold on a host; run it by ``parametrize_windows``."""

    def test_nothing_reduced_is_bit_equal_to_timm(self, method: str, host: str) -> None:
        dense, x = make_window_host(host), noise(2, WINDOW_SIZE)
        model = reduce_in_windows(dense, method, METHODS[method].off())
        for own, timm_map in zip(maps_and_scores(model, x), maps_and_scores(dense, x), strict=True):
            assert torch.equal(own, timm_map)

    def test_maps_are_full_and_finite_and_something_was_reduced(self, method: str, host: str) -> None:
        dense, model, x = make_window_host(host), make_window_model(method, host), noise(2, WINDOW_SIZE)
        own, expected = maps_and_scores(model, x), maps_and_scores(dense, x)
        assert [y.shape for y in own] == [y.shape for y in expected]
        assert all(y.isfinite().all() for y in own)
        assert not torch.equal(own[-1], expected[-1])
        assert torch.equal(own[-2], model.forward_features(x))

    def test_an_image_does_not_depend_on_its_batch(self, method: str, host: str) -> None:
        model, x = make_window_model(method, host).double(), noise(3, WINDOW_SIZE).double()
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-10)

    def test_weights_are_shared_and_the_original_is_left_alone(self, method: str, host: str) -> None:
        dense, x = make_window_host(host), noise(2, WINDOW_SIZE)
        before = dense(x)
        model = reduce_in_windows(dense, method, METHODS[method].example_in_windows())
        assert list(model.state_dict()) == list(dense.state_dict())
        assert all(own is shared for own, shared in zip(model.parameters(), dense.parameters(), strict=True))
        model.train()
        cast(Backbone, model).set_grad_checkpointing()
        cast(Backbone, model).reset_classifier(3)
        assert not dense.training
        assert torch.equal(dense(x), before)

    def test_method_can_be_replaced(self, method: str, host: str) -> None:
        dense, x = make_window_host(host), noise(2, WINDOW_SIZE)
        model = reduce_in_windows(dense, method, METHODS[method].example_in_windows())
        scores = model(x)
        for other in window_methods():
            off = reduce_in_windows(cast(Backbone, model), other, METHODS[other].off())
            assert torch.equal(off(x), dense(x))
        assert torch.equal(model(x), scores)

    def test_checkpointing_changes_nothing_and_every_parameter_learns(self, method: str, host: str) -> None:
        model = make_window_model(method, host).train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # which would see the batch twice
                module.eval()
        assert_checkpointing_changes_nothing(model, noise(2, WINDOW_SIZE))

    def test_model_survives_pickle_and_torch_save(self, method: str, host: str) -> None:
        model, x = make_window_model(method, host), noise(2, WINDOW_SIZE)
        for again in copies_through_files(model):
            assert torch.equal(again(x), model(x))

    def test_half_precision_and_autocast_run(self, method: str, host: str) -> None:
        assert_half_precision_runs(make_window_model(method, host), noise(2, WINDOW_SIZE))

    def test_compiles_as_one_graph(self, method: str, host: str) -> None:
        model = make_window_model(method, host)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_equal_scores_and_gradients(compiled, model, noise(2, WINDOW_SIZE))

    def test_device_is_read_no_more_often_than_by_the_dense_host(self, method: str, host: str) -> None:
        x = noise(2, WINDOW_SIZE)
        own = len(count_reads(partial(make_window_host(host), x)))
        assert_reads(partial(make_window_model(method, host), x), own)

    def test_token_maps_are_refused_by_a_sentence(self, method: str, host: str) -> None:
        model, x = make_window_model(method, host), noise(1, WINDOW_SIZE)
        for call in (model.forward_tokens, model.trace_tokens):
            with pytest.raises(
                TypeError, match=r"no TokenMap tells of them; call forward_features .* and trace_stages"
            ):
                call(x)

    def test_stages_label_every_place_of_their_maps(self, method: str, host: str) -> None:
        stages = make_window_model(method, host).trace_stages(noise(1, WINDOW_SIZE))
        assert stages
        for stage in stages:
            assert 0 <= stage.labels.min() <= stage.labels.max() < stage.tokens
