"""What every architecture with weights of its own must hold; a case added to ``architectures.py`` inherits all.

The expectations are timm's own model tests (tests/test_models.py, timm 1.0.31) and laws: a picture does not
depend on its batch, recomputation changes nothing, exporters agree.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import timm
import torch
from architectures import SIZES, SMALL, make_architecture, make_images
from safetensors.torch import save_file
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import effvit
from effvit.architectures.variants import VARIANTS
from effvit.measure.flops import count_flops
from effvit.testing import assert_equal_scores_and_gradients


def total(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(o.square().sum() for o in out) if isinstance(out, tuple) else out.square().sum()


def test_every_class_has_a_small_case() -> None:
    assert {VARIANTS[name].model for name, _ in SMALL.values()} == {variant.model for variant in VARIANTS.values()}
    assert set(SIZES) == set(SMALL)


@pytest.mark.parametrize("case", SMALL)
class TestEveryArchitecture:
    def test_output_is_finite_and_has_the_right_shape(self, case: str) -> None:
        out = make_architecture(case)(make_images(case))
        assert out.shape == (2, 7)
        assert out.isfinite().all()

    def test_output_depends_on_the_image(self, case: str) -> None:
        first, second = make_architecture(case)(make_images(case))
        assert not torch.allclose(first, second, rtol=0, atol=1e-4)

    def test_an_image_does_not_depend_on_its_batch(self, case: str) -> None:
        model = make_architecture(case).double()
        x = make_images(case, batch=3).double()
        alone = torch.cat([model(image[None]) for image in x])
        assert torch.allclose(model(x), alone, rtol=0, atol=1e-10)

    def test_eval_is_deterministic(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        assert torch.equal(model(x), model(x))

    def test_gradients_reach_every_parameter(self, case: str) -> None:
        model = make_architecture(case).train()
        total(model(make_images(case))).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    def test_checkpointing_changes_no_output_and_no_gradient(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
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

    def test_forward_intermediates_ends_with_forward_features(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        final, maps = model.forward_intermediates(x)
        assert torch.allclose(final, model.forward_features(x), rtol=1e-4, atol=1e-5)
        assert len(maps) == len(model.feature_info) >= 3
        for info, features in zip(model.feature_info, maps, strict=True):
            sides = [math.ceil(side / info["reduction"]) for side in x.shape[-2:]]
            assert features.shape == (2, info["num_chs"], *sides)
            assert features.isfinite().all()

    def test_intermediates_alone_and_stopped_early_are_the_same(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        _, maps = model.forward_intermediates(x)
        alone = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, stop_early=True)
        assert len(alone) == 2
        assert all(torch.equal(a, b) for a, b in zip(alone, maps, strict=False))

    def test_forward_head_of_forward_features_is_forward(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        assert torch.allclose(model.forward_head(model.forward_features(x)), model(x), rtol=1e-5, atol=1e-6)

    def test_model_survives_pickle_and_torch_save(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))

    def test_bf16_autocast_and_bf16_weights_give_finite_output(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).isfinite().all()
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all()

    def test_float64_agrees_with_float32(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        single = model(x)
        assert torch.allclose(model.double()(x.double()), single.double(), rtol=1e-3, atol=1e-4)

    def test_other_input_sizes_after_set_input_size(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case, resized=True)
        model.set_input_size(SIZES[case][1])
        final, maps = model.forward_intermediates(x)
        assert final.isfinite().all()
        assert [m.shape[-2] for m in maps] == [math.ceil(x.shape[-2] / i["reduction"]) for i in model.feature_info]
        assert model(x).shape == (2, 7)

    def test_compiles_as_one_graph(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        assert_equal_scores_and_gradients(torch.compile(model, fullgraph=True, backend="eager"), model, x)

    def test_fx_traces_it_exactly(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
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

    def test_layer_decay_groups_cover_every_parameter(self, case: str) -> None:
        model = make_architecture(case)
        groups = param_groups_layer_decay(model)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert len({group["lr_scale"] for group in groups}) > 3

    def test_classifier_follows_timm(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
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
        assert make_architecture(case, num_classes=0)(x).shape == pooled.shape

    def test_features_only_gives_maps_as_feature_info_says(self, case: str) -> None:
        model, x = make_architecture(case, features_only=True), make_images(case)
        maps = model(x)
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        for features, reduction in zip(maps, model.feature_info.reduction(), strict=True):
            assert features.shape[-2:] == tuple(math.ceil(side / reduction) for side in x.shape[-2:])
        sum(m.square().sum() for m in maps).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]

    def test_settings_survive_the_round_trip_through_a_hub_folder(self, case: str, tmp_path: Path) -> None:
        model, x = make_architecture(case), make_images(case)
        save_for_hf(model, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))

    def test_own_checkpoint_loads_back(self, case: str, tmp_path: Path) -> None:
        model, x = make_architecture(case), make_images(case)
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        name, small = SMALL[case]
        other = timm.create_model(name, **({"num_classes": 7} | small)).eval()
        assert effvit.load_checkpoint(other, tmp_path / "own.safetensors") == []
        assert torch.equal(other(x), model(x))

    def test_every_operator_is_counted(self, case: str) -> None:
        report = count_flops(make_architecture(case), (3, *SIZES[case][0]))
        assert report.total > 0
        assert not report.uncounted

    def test_wrong_images_are_refused_in_words(self, case: str) -> None:
        model, (height, width) = make_architecture(case), SIZES[case][0]
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got a tensor of shape"):
            model(torch.randn(3, height, width))
        with pytest.raises(ValueError, match="the batch holds no image"):
            model(torch.randn(0, 3, height, width))
        with pytest.raises(TypeError, match=r"expected images of dtype torch.float32, the model's, got torch.uint8"):
            model(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        with pytest.raises(ValueError, match="output_fmt must be"):
            model.forward_intermediates(make_images(case), output_fmt="NHCW")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_name_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        features = timm.create_model(name, features_only=True)
    assert model.pretrained_cfg["architecture"] == name
    assert len(features.feature_info.channels()) >= 3
    assert name in effvit.list_models()
