"""Controls of a method and of the resolution: equal token counts and multiply-adds, and what has no control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hosts import HOSTS, PAIRS, covered, make_host, make_images, make_model
from timm.layers import LayerNorm, RmsNormFp32
from torch import nn

import effvit
from effvit.hosts.host import as_host
from effvit.hosts.towers import ReducedTower
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.controls import control_of, place_of, resolution_control
from effvit.measure.flops import count_flops
from effvit.measure.ideal import mean_counts
from effvit.reducers import METHODS, Reducer
from effvit.reducers.cost import BlockSizes

STATIC = [pair for pair in PAIRS if not METHODS[pair[0]].variable_length]
RAGGED = [pair for pair in PAIRS if METHODS[pair[0]].variable_length]


def without_reduction(model: nn.Module, **counts: list[int]) -> int:
    """Multiply-adds by closed form but for the method's own."""
    terms = closed_form_macs(model, (3, *model.patch_embed.img_size), **counts)  # type: ignore[union-attr]
    return sum(macs for name, macs in terms.items() if name != "reduction")


def pooled_anew(model: Any, left: int) -> int:
    """What a head takes for more than the tokens left: for patches that Expedite restores and merging gives back."""
    patches, width = model.patch_embed.num_patches, model.embed_dim
    method = METHODS[model.method]
    macs = 0
    if method.keeps_every_patch and method.has_sizes and hasattr(model, "aux_head"):
        macs += (patches - left) * model.num_classes * width
    if method.soft and model._pools_patches:
        behind = model.encoder if isinstance(model, ReducedTower) else model  # a classifier's own norm is of the mean
        kind = type(getattr(behind, "norm", None))
        macs += {nn.LayerNorm: 5, LayerNorm: 5, RmsNormFp32: 3}.get(kind, 0) * (patches - left) * width
        if model.global_pool == "map":
            macs += (patches - left) * 2 * width * (width + 1)  # keys and values of the pooling, and attention to them
    return macs


class TestControlOfAMethod:
    @pytest.mark.parametrize(("method", "host"), covered(STATIC))
    def test_counts_and_multiply_adds_are_those_of_the_method_without_its_own(self, method: str, host: str) -> None:
        """The closed form tells a method's own multiply-adds apart; both counts agree exactly."""
        model = make_model(method, host)
        control = control_of(model, "random", seed=3)
        assert control.token_counts() == model.token_counts()
        x = make_images(model)
        assert mean_counts(control, x) == mean_counts(model, x)
        expected = without_reduction(model) - pooled_anew(model, model.token_counts()[-1])
        assert count_flops(control, (3, *model.patch_embed.img_size), strict=True).total == expected

    @pytest.mark.parametrize(("method", "host"), covered(RAGGED))
    def test_counts_that_depend_on_the_image_are_rounded_means(self, method: str, host: str) -> None:
        """Counted on each image the method costs a little more: attention grows with the square of the tokens."""
        model = make_model(method, host)
        x = make_images(model, batch=4)
        counts = [round(count) for count in mean_counts(model, x)]
        control = control_of(model, "uniform", images=x)
        assert control.token_counts() == counts
        expected = without_reduction(model, token_counts=counts) - pooled_anew(model, counts[-1])
        assert count_flops(control, x.shape[1:], strict=True).total == expected
        own = closed_form_macs(model, x.shape[1:], token_counts=counts)["reduction"] + pooled_anew(model, counts[-1])
        counted = count_flops(model, x.shape[1:], images=x).total
        assert counted - own == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize("method", METHODS)
    def test_place_is_the_one_the_closed_form_says(self, method: str) -> None:
        for reducer in make_model(method, "class_token").reducers.values():
            change = reducer.cost(BlockSizes(40, 30, 1, 1, (6, 8), 32, 2, 16, last=False))
            if change.left < 40:
                place = "block" if change.keys < 40 else "queries" if change.queries < 40 else "mlp"
                assert place_of(reducer) == place

    def test_fused_token_of_evit_is_one_more_patch(self) -> None:
        """29 of 48 are kept and one is fused: ceil(0.6 * 48) + 1."""
        settings = control_of(make_model("evit", "class_token")).settings
        assert settings == {
            "keep_rate": 0.7,
            "reduce_at": [1, 2],
            "num_tokens": [30, 19],
            "place": "mlp",
            "seed": 0,
        }

    def test_control_keeps_the_weights_the_fill_and_the_model(self) -> None:
        model = make_model("hot", "class_token", recover="attention")
        before = dict(model.reducers)
        control = control_of(model, "uniform")
        assert control.recover == "attention"
        own = dict(control.recovery.named_parameters())  # type: ignore[union-attr]
        assert all(own[name] is trained for name, trained in model.recovery.named_parameters())  # type: ignore[union-attr]
        assert control.blocks[0].norm1.weight is model.blocks[0].norm1.weight
        assert control_of(model, share=False).blocks[0].norm1.weight is not model.blocks[0].norm1.weight
        assert model.reducers == before
        assert model.method == "hot"

    def test_learnt_thresholds_are_left_behind_without_a_warning(self) -> None:
        """Warnings are errors here; ``sparsify`` warns where another method is without what one has learnt."""
        model = effvit.sparsify(make_host("class_token"), "dymu", r_total=8)
        x = make_images(model)
        effvit.calibrate(model, [x])
        assert not control_of(model, images=x).reducers[0].state_dict()

    def test_control_of_a_model_that_reduces_nothing_is_its_host(self) -> None:
        host = make_host("class_token")
        control = control_of(effvit.sparsify(host, "tome", r=0))
        assert control.reducers == {}
        assert torch.equal(control(make_images(host)), host(make_images(host)))

    def test_control_of_a_control_is_at_its_place(self) -> None:
        model = make_model("random", "class_token", place="queries", seed=4)
        again = control_of(model, "random", seed=4)
        assert again.reducers[1].place == "queries"  # type: ignore[union-attr]
        assert torch.equal(again(make_images(model)), model(make_images(model)))

    def test_images_of_another_size_are_counted_at_theirs(self) -> None:
        model = effvit.sparsify(make_host("class_token", dynamic_img_size=True), "evit", reduce_at=(1,), keep_rate=0.5)
        control = control_of(model, images=torch.zeros(1, 3, 32, 32))
        assert control.settings["num_tokens"] == [9]  # 8 of 16, and the fused one
        assert control_of(model).settings["num_tokens"] == [25]

    def test_method_that_restores_its_patches_has_none(self) -> None:
        model = make_model("expedite", "class_token", restore_at=3)
        with pytest.raises(ValueError, match="expedite restores 48 tokens from 24 in block 3, but a control has no"):
            control_of(model)

    def test_counts_that_depend_on_the_image_need_images(self) -> None:
        with pytest.raises(ValueError, match="how many tokens ats keeps depends on the image; give images="):
            control_of(make_model("ats", "class_token"))

    def test_other_models_and_methods_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"a control follows a plain ViT .* reduced by a method, got a Vision"):
            control_of(make_host("class_token"))
        windows = effvit.sparsify(timm.create_model("tiny_vit_5m_224", depths=(1, 1, 1, 1)), "tome", r=1)
        with pytest.raises(TypeError, match=r"a TinyVit gives its tokens back in every window.* no patches to choose"):
            control_of(windows)
        with pytest.raises(ValueError, match="method must be one of random, uniform, got 'tome'"):
            control_of(make_model("evit", "class_token"), "tome")

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            (("before", "reduce"), "mine acts in before, reduce, so the place"),
            (
                ("after",),
                "mine acts in after, so the place at which its tokens leave is not known; make the control by",
            ),
        ],
    )
    def test_method_whose_place_is_not_known_is_refused(self, steps: tuple[str, ...], message: str) -> None:
        def step(self: Reducer, x: torch.Tensor, *others: Any) -> Any:
            return x, others[0]

        mine = type("Mine", (Reducer,), {"name": "mine", **dict.fromkeys(steps, step)})
        with pytest.raises(ValueError, match=message):
            place_of(mine())

    def test_places_that_differ_between_blocks_are_refused(self) -> None:
        model = make_model("uniform", "class_token")
        model.reducers[2].place = "mlp"  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"at one place .*, but uniform at several: \{1: 'block', 2: 'mlp'\}"):
            control_of(model)


class TestResolutionControl:
    def test_vit_nano_at_twenty_pixels_takes_half_of_its_multiply_adds(self) -> None:
        """25 patches and 36.4 M multiply-adds, counted on a trace of the model that comes back."""
        dense = timm.create_model("vit_nano_patch4_28", pretrained=True).eval()
        before = {name: value.clone() for name, value in dense.state_dict().items()}
        small, size, macs = resolution_control(dense, 36.5e6)
        assert size == (20, 20)
        assert macs == count_flops(small, (1, 20, 20), strict=True).total
        assert macs == pytest.approx(36.4e6, rel=0.01)
        assert small(torch.zeros(2, 1, 20, 20)).shape == (2, 10)
        assert dense.patch_embed.img_size == (28, 28)
        assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())

    @pytest.mark.parametrize("host", HOSTS)
    def test_grid_is_the_largest_in_the_proportions_of_the_host(self, host: str) -> None:
        """Every host: one more row or column of the longer side would exceed the target."""
        dense = make_host(host)
        rows, columns = as_host(dense).patch_embed.grid_size
        patch = as_host(dense).patch_embed.patch_size[0]
        whole = sum(closed_form_macs(dense, (3, rows * patch, columns * patch)).values())
        small, size, macs = resolution_control(dense, 0.6 * whole)
        assert macs == sum(closed_form_macs(small, (3, *size)).values()) <= 0.6 * whole
        assert small(torch.zeros(1, 3, *size)).isfinite().all()
        wider = size[1] // patch + 1
        larger = (round(rows * wider / columns) * patch, wider * patch)
        assert sum(closed_form_macs(dense, (3, *larger)).values()) > 0.6 * whole
        assert size[0] == round(rows * (size[1] // patch) / columns) * patch

    def test_target_above_the_model_leaves_it_at_its_size_on_weights_of_its_own(self) -> None:
        dense = make_host("class_token")
        same, size, _ = resolution_control(dense, 1e12)
        assert size == (48, 64)
        assert torch.equal(same(make_images(dense)), dense(make_images(dense)))
        assert not {id(p) for p in same.parameters()} & {id(p) for p in dense.parameters()}

    @pytest.mark.parametrize(
        ("make", "macs", "error", "message"),
        [
            (lambda: make_host("class_token"), 1, ValueError, r"macs must be at least \d+, which .* one patch, got 1"),
            (lambda: make_host("class_token"), -1, ValueError, "macs must be a positive number, got -1"),
            (lambda: make_model("tome", "class_token"), 1e9, TypeError, "the model is reduced by tome already; give"),
            (lambda: nn.Linear(3, 4), 1e9, TypeError, "smaller images are for a plain ViT, .* got a Linear"),
        ],
    )
    def test_what_has_no_such_size_is_refused(
        self, make: Callable[[], nn.Module], macs: float, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            resolution_control(make(), macs)
