"""Reduced models in other packages that take models of timm: torchvision's feature extraction, captum and open_clip.

transformers and peft, which cannot lie beside OpenMMLab, are in tests/test_transformers_clients.py.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts import SETTINGS, make_images, make_model
from pages import DOCS, example
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import effvit

PAGE = "hub_and_clients.md"
NARROW: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 5}


def evit() -> Any:
    """A small EViT, with weights large enough for attention to differ between patches."""
    model = timm.create_model("evit_deit_tiny_patch16_224", keep_rate=0.5, reduce_at=(1,), **NARROW).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs_of(model: nn.Module, layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """What forward hooks see of the layers."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda layer, inputs, output: seen.append(output)) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


class TestTorchvision:
    @pytest.mark.parametrize("method", SETTINGS)
    def test_extracted_block_is_what_a_hook_on_it_sees(self, method: str) -> None:
        model: Any = make_model(method, "class_token").eval()
        x = make_images(model)
        blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
        # DynamicViT samples in training what it drops in evaluation, of which torchvision is right to warn.
        differ = (
            pytest.warns(UserWarning, match="in train mode are different") if method == "dynamicvit" else nullcontext()
        )
        with differ:
            extractor = create_feature_extractor(model, [*blocks, "head"])
        with torch.no_grad():
            extracted = extractor(x)
            expected = outputs_of(model, [*model.blocks, model.head], x)
        assert list(extracted) == [*blocks, "head"]
        assert all(torch.equal(a, b) for a, b in zip(extracted.values(), expected, strict=True))

    def test_layers_inside_a_block_have_the_names_of_their_modules(self) -> None:
        _, names = get_graph_node_names(evit())
        assert {"blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.3.mlp.act"} <= set(names)

    def test_tokens_that_are_left_are_fewer_behind_the_reduction(self) -> None:
        extractor = create_feature_extractor(evit(), ["blocks.0.mlp", "blocks.1.mlp"])
        before, after = extractor(torch.randn(2, 3, 64, 64)).values()
        assert before.shape == (2, 1 + 16, 48)
        assert after.shape == (2, 1 + 8 + 1, 48)  # the class token, half of the patches, and the fused token

    def test_example_of_the_page_prints_what_stands_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        exec(example(PAGE, "create_feature_extractor"), {})
        assert f"```text\n{capsys.readouterr().out}```" in (DOCS / PAGE).read_text()


class TestCaptum:
    @pytest.fixture
    def attr(self) -> Any:
        return pytest.importorskip("captum.attr", reason="the dev extra is not installed")

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    TARGET = torch.tensor([1, 2])

    def test_integrated_gradients_are_the_mean_of_gradients_on_the_way_from_black(self, attr: Any, x: Tensor) -> None:
        """Sundararajan et al. (1703.01365), eq. 3, image by image; captum runs all steps as one batch."""
        model, steps = evit(), 8
        found = attr.IntegratedGradients(model).attribute(x, target=self.TARGET, n_steps=steps, method="riemann_middle")
        for image, target, own in zip(x, self.TARGET, found, strict=True):
            total = torch.zeros_like(image)
            for step in range(steps):
                at = ((step + 0.5) / steps * image).unsqueeze(0).requires_grad_()
                total += torch.autograd.grad(model(at)[0, target], at)[0][0]
            assert torch.allclose(own, total / steps * image, rtol=1e-4, atol=1e-6)

    def test_attributions_add_up_to_the_scores_unless_the_choice_of_tokens_changes_on_the_way(
        self, attr: Any, x: Tensor
    ) -> None:
        """Completeness (Sundararajan et al., proposition 1) asks for a continuous score; a choice that depends on the
        image makes it jump."""
        dynamic = evit()
        static = effvit.sparsify(dynamic, "uniform", keep_rate=0.5).eval()
        gaps = []
        for model in (static, dynamic):
            found = attr.IntegratedGradients(model).attribute(x, target=self.TARGET, n_steps=64)
            difference = (model(x) - model(torch.zeros_like(x)))[[0, 1], self.TARGET]
            gaps.append((found.sum((1, 2, 3)) - difference).abs().min().item())
        assert gaps[0] < 1e-4 < 1e-2 < gaps[1]

    def test_grad_cam_of_the_patch_embedding_is_on_the_grid(self, attr: Any, x: Tensor) -> None:
        """Selvaraju et al. (1610.02391), eq. 1 and 2: channels weighted by their mean gradient."""
        model = evit()
        layer = model.patch_embed.proj
        found = attr.LayerGradCam(model, layer).attribute(x, target=self.TARGET, relu_attributions=True)
        (activation,) = outputs_of(model, [layer], x)
        handle = layer.register_forward_hook(lambda layer, inputs, output: activation)
        scores = model(x)[[0, 1], self.TARGET].sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(scores, activation)
        expected = (activation * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
        assert found.shape == (2, 1, 4, 4)
        assert torch.allclose(found, expected, atol=1e-6)

    def test_gradient_times_activation_of_a_block_is_on_its_tokens_and_goes_to_the_grid(
        self, attr: Any, x: Tensor
    ) -> None:
        model, block = evit(), 1
        found = attr.LayerGradientXActivation(model, model.blocks[block]).attribute(x, target=self.TARGET)
        assert found.shape == (2, 1 + 8 + 1, 48)
        tokens = model.trace_tokens(x)[block].tokens
        maps = effvit.to_map(found.sum(-1, keepdim=True), tokens, "zero")
        assert maps.shape == (2, 1, 4, 4)
        own = tokens.on_its_own()  # (B, H*W): patches that are tokens still, not a part of the fused one
        assert own.sum(1).tolist() == [8, 8]
        kept = found[:, 1:9].sum(-1)  # their tokens, in the order of EViT's scores
        assert torch.equal(maps.flatten(1)[own].view(2, 8).sort().values, kept.sort().values)

    def test_grad_cam_of_a_block_takes_tokens_for_channels_as_in_a_dense_model(self, attr: Any, x: Tensor) -> None:
        """captum expects channels first: its result is no map of patches, whether or not the model is reduced."""
        for model in (evit(), timm.create_model("deit_tiny_patch16_224", **NARROW).eval()):
            assert attr.LayerGradCam(model, model.blocks[2]).attribute(x, target=self.TARGET).shape == (2, 1, 48)

    def test_example_of_the_page_gives_maps(self, attr: Any) -> None:
        names: dict[str, Any] = {}
        exec(example(PAGE, "LayerGradientXActivation"), names)
        assert names["maps"].shape == (2, 1, 7, 7)
        assert names["maps"].any()


class TestOpenClip:
    @pytest.fixture
    def open_clip(self) -> Any:
        return pytest.importorskip("open_clip", reason="the dev extra is not installed")

    def make(self, open_clip: Any, folder: Path, tower: str) -> Any:
        """A CLIP model with that tower for images, by a config as open_clip's own are."""
        vision = {"timm_model_name": tower, "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        file = folder / f"clip_{tower}.json"
        file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(file)
        torch.manual_seed(0)
        return open_clip.create_model(file.stem).eval()

    def test_name_of_the_zoo_is_a_tower_that_takes_the_weights_of_the_dense_one(
        self, open_clip: Any, tmp_path: Path
    ) -> None:
        dense = self.make(open_clip, tmp_path, "deit_tiny_patch16_224")
        cheap = self.make(open_clip, tmp_path, "evit_deit_tiny_patch16_224")
        cheap.load_state_dict(dense.state_dict())
        assert cheap.visual.trunk.token_counts()[-1] == 71
        x = torch.randn(2, 3, 224, 224)
        scores = cheap.encode_image(x, normalize=True) @ cheap.encode_text(torch.ones(3, 8).long(), normalize=True).T
        assert scores.shape == (2, 3)
        expected = cheap.visual.head(effvit.sparsify(dense.visual.trunk, "evit")(x))
        assert torch.equal(cheap.encode_image(x), expected)

    def test_tower_of_a_trained_model_is_replaced_by_its_reduced_form(self, open_clip: Any, tmp_path: Path) -> None:
        clip = self.make(open_clip, tmp_path, "deit_tiny_patch16_224")
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            dense = clip.encode_image(x)
            trunk = clip.visual.trunk
            clip.visual.trunk = effvit.sparsify(trunk, "tome", r=0)
            assert torch.equal(clip.encode_image(x), dense)  # nothing is reduced
            clip.visual.trunk = effvit.sparsify(trunk, "tome", r=13)
            cheap = clip.encode_image(x)
        assert cheap.shape == dense.shape
        assert not torch.equal(cheap, dense)

    def test_locked_tower_gets_no_gradients(self, open_clip: Any, tmp_path: Path) -> None:
        clip = self.make(open_clip, tmp_path, "evit_deit_tiny_patch16_224")
        clip.lock_image_tower()
        clip.encode_image(torch.randn(1, 3, 224, 224)).sum().backward()
        assert all(p.grad is None for p in clip.visual.trunk.parameters())
        assert clip.visual.head.proj.weight.grad is not None

    def test_examples_of_the_page_give_a_tower_with_the_weights_of_open_clips_own(
        self, open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without values, on the meta device: the models are large and their weights are on the network."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(open_clip, "create_model", partial(open_clip.create_model, device="meta"))
        by_name, by_hand = {}, {}
        code = example(PAGE, "open_clip").replace(', pretrained="webli"', "")
        first, again, second = code.rpartition("import open_clip\n")
        with torch.device("meta"):
            exec(first, by_name)
            exec(again + second, by_hand)
            own = open_clip.create_model("ViT-B-16-SigLIP").state_dict()
        for clip in (by_name["clip"], by_hand["clip"]):
            assert clip.visual.trunk.method == "tome"
            assert {name: value.shape for name, value in clip.state_dict().items()} == {
                name: value.shape for name, value in own.items()
            }

    def test_tower_of_open_clips_own_class_is_refused(self, open_clip: Any) -> None:
        vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        clip = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
        with pytest.raises(TypeError, match=r"open_clip's models have other blocks: create the same"):
            effvit.sparsify(clip.visual, "tome")
