"""The contract of architectures: models with weights of their own, made through a name that timm knows.

The expectations are timm's own model tests (tests/test_models.py, timm 1.0.31) and laws: an image does not depend on
its batch, recomputation changes nothing, exporters agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import pytest
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from effvit.measure.flops import count_flops
from effvit.protocols import Setting, Settings, Size
from effvit.testing.fakes import assert_runs_on_fakes
from effvit.testing.laws import assert_equal_scores_and_gradients, copies_through_files, scores_and_intermediates
from effvit.testing.models import noise, perturb
from effvit.testing.reads import assert_reads
from effvit.testing.surface import Backbone, MapModel

__all__ = ["ArchitectureContract", "SmallModel", "parametrize_models"]


@dataclass(frozen=True)
class SmallModel:
    """A small model of an architecture, with 7 classes.

    Attributes:
        name: A name of ``timm.create_model``.
        settings: Keywords that make it small.
        size: (H, W) of the images it is made for.
        other: (H, W) of images that it takes after ``set_input_size``.
    """

    name: str
    settings: Settings
    size: Size
    other: Size

    def make(self, **settings: Setting) -> Backbone:
        """A model with the same weights at every call, in eval mode; ``settings`` are added or changed."""
        torch.manual_seed(0)
        model = timm.create_model(self.name, **({"num_classes": 7} | self.settings | settings)).eval()
        perturb(model)
        return cast(Backbone, model)

    def make_maps(self) -> MapModel:
        """The model made with ``features_only``."""
        return cast(MapModel, self.make(features_only=True))

    def images(self, batch: int = 2, resized: bool = False) -> Tensor:
        """Images (B, 3, H, W) of ``size`` or, resized, of ``other``, the same ones at every call."""
        return noise(batch, self.other if resized else self.size)


def parametrize_models(cases: Mapping[str, SmallModel]) -> pytest.MarkDecorator:
    """Decorator of a subclass of ``ArchitectureContract``: all tests with these models, named by the keys."""
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def total(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A loss of what a model gives, which in training mode may be several tensors."""
    parts = out if isinstance(out, tuple) else (out,)
    return torch.stack([part.square().sum() for part in parts]).sum()


class ArchitectureContract:
    """What a model of an architecture must hold; see the module for how to run it on your own."""

    def test_output_is_finite_and_has_the_right_shape(self, case: SmallModel) -> None:
        out = case.make()(case.images())
        assert out.shape == (2, 7)
        assert out.isfinite().all()

    def test_output_depends_on_the_image(self, case: SmallModel) -> None:
        first, second = case.make()(case.images())
        assert not torch.allclose(first, second, rtol=0, atol=1e-4)

    def test_an_image_does_not_depend_on_its_batch(self, case: SmallModel) -> None:
        model = case.make().double()
        x = case.images(batch=3).double()
        alone = torch.cat([model(image[None]) for image in x])
        assert torch.allclose(model(x), alone, rtol=0, atol=1e-10)

    def test_eval_is_deterministic(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        assert torch.equal(model(x), model(x))

    def test_gradients_reach_every_parameter(self, case: SmallModel) -> None:
        model = case.make().train()
        total(model(case.images())).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    def test_checkpointing_changes_no_output_and_no_gradient(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            out = model(x)
            total(out).backward()
            gradients.append((out, [p.grad for p in model.parameters() if p.grad is not None]))
        assert torch.equal(gradients[0][0], gradients[1][0])
        for plain, checkpointed in zip(gradients[0][1], gradients[1][1], strict=True):
            assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-5)

    def test_forward_intermediates_ends_with_forward_features(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        final, maps = model.forward_intermediates(x)
        assert torch.allclose(final, model.forward_features(x), rtol=1e-4, atol=1e-5)
        assert len(maps) == len(model.feature_info) >= 3
        for info, features in zip(model.feature_info, maps, strict=True):
            sides = [math.ceil(side / info["reduction"]) for side in x.shape[-2:]]
            assert features.shape == (2, info["num_chs"], *sides)
            assert features.isfinite().all()

    def test_intermediates_alone_and_stopped_early_are_the_same(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        _, maps = model.forward_intermediates(x)
        alone = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, stop_early=True)
        assert len(alone) == 2
        assert all(torch.equal(a, b) for a, b in zip(alone, maps, strict=False))

    def test_forward_head_of_forward_features_is_forward(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        assert torch.allclose(model.forward_head(model.forward_features(x)), model(x), rtol=1e-5, atol=1e-6)

    def test_model_survives_pickle_and_torch_save(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        for again in copies_through_files(model):
            assert torch.equal(again(x), model(x))

    def test_bf16_autocast_and_bf16_weights_give_finite_output(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).isfinite().all()
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all()

    def test_float64_agrees_with_float32(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        single = model(x)
        assert torch.allclose(model.double()(x.double()), single.double(), rtol=1e-3, atol=1e-4)

    def test_other_input_sizes_after_set_input_size(self, case: SmallModel) -> None:
        model, x = case.make(), case.images(resized=True)
        model.set_input_size(case.other)
        final, maps = model.forward_intermediates(x)
        assert final.isfinite().all()
        assert [m.shape[-2] for m in maps] == [math.ceil(x.shape[-2] / i["reduction"]) for i in model.feature_info]
        assert model(x).shape == (2, 7)

    def test_compiles_as_one_graph(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        assert_equal_scores_and_gradients(torch.compile(model, fullgraph=True, backend="eager"), model, x)

    def test_fx_traces_it_exactly(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        tracer = {
            "leaf_modules": list(get_notrace_modules()),
            "autowrap_functions": list(get_notrace_functions()),
        }
        # In train mode a model may return more than one tensor, so only the graph of eval mode counts.
        _, nodes = get_graph_node_names(model, tracer_kwargs=tracer, suppress_diff_warning=True)
        traced = create_feature_extractor(
            model, return_nodes={nodes[-1]: "out"}, tracer_kwargs=tracer, suppress_diff_warning=True
        )
        assert torch.equal(traced(x)["out"], model(x))

    def test_layer_decay_groups_cover_every_parameter(self, case: SmallModel) -> None:
        model = case.make()
        groups = param_groups_layer_decay(model)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert len({group["lr_scale"] for group in groups}) > 3

    def test_classifier_follows_timm(self, case: SmallModel) -> None:
        model, x = case.make(), case.images()
        cfg = model.pretrained_cfg
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape[-1] == model.head_hidden_size
        assert model.num_features in (features.shape[-1], features.shape[1])
        keys = set(model.state_dict())
        classifier = cfg["classifier"]
        for part in (classifier,) if isinstance(classifier, str) else classifier:
            assert f"{part}.weight" in keys
        assert f"{cfg['first_conv']}.weight" in keys
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(0)
        assert model(x).shape == pooled.shape
        assert case.make(num_classes=0)(x).shape == pooled.shape

    def test_features_only_gives_maps_as_feature_info_says(self, case: SmallModel) -> None:
        model, x = case.make_maps(), case.images()
        maps = model(x)
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        for features, reduction in zip(maps, model.feature_info.reduction(), strict=True):
            assert features.shape[-2:] == tuple(math.ceil(side / reduction) for side in x.shape[-2:])
        total(tuple(maps)).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]

    def test_runs_on_fake_cuda_tensors(self, case: SmallModel) -> None:
        """In training and under autocast too: no tensor is made on another device, and no value is read."""
        model, x = case.make(), case.images()
        assert_runs_on_fakes(model, partial(scores_and_intermediates, model), x)
        assert_runs_on_fakes(model.train(), partial(scores_and_intermediates, model), x, autocast=True)

    def test_device_is_never_read(self, case: SmallModel) -> None:
        """Counted on real tensors, in training too."""
        model, x = case.make(), case.images()
        for training in (False, True):
            assert_reads(partial(scores_and_intermediates, model.train(training), x), 0)

    def test_every_operator_is_counted(self, case: SmallModel) -> None:
        report = count_flops(case.make(), (3, *case.size))
        assert report.total > 0
        assert not report.uncounted
