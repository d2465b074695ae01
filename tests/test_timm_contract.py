"""What timm and the libraries around it expect of a model beside its numbers: children, modes, initialisation, hooks.

Expectations are the dense timm host in the limit of nothing reduced, closed forms, and how timm 1.0.31 treats its own
models (``reset_classifier``, ``init_weights`` after ``to_empty``).
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from architectures import SMALL, make_architecture
from architectures import make_images as architecture_images
from fvcore.nn import FlopCountAnalysis, flop_count_str
from hosts import HOSTS, OFF, PAIRS, SETTINGS, covered, make_host, make_images, make_model
from timm.models.vision_transformer import VisionTransformer
from timm.utils import AttentionExtract
from torch import Tensor, nn

import effvit
from effvit import requirements
from effvit.hosts._unserved import UNSERVED
from effvit.hosts.host import HOST_CLASSES
from effvit.hosts.lvvit import LVViT

POOLS = ("token", "avg", "avgmax", "max", "map", "prr")
DROPPING = [m for m in SETTINGS if m != "expedite"]  # which clusters the full grid and says so


def pooled_host(pool: str, **kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=5, global_pool=pool, patch_drop_rate=0.3, **kwargs).train()


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    """Output with the same patches dropped in every call."""
    torch.manual_seed(7)
    return model(x)


class TestPatchDropout:
    @pytest.mark.parametrize(("method", "pool"), covered([(method, pool) for method in DROPPING for pool in POOLS]))
    def test_nothing_reduced_pools_as_the_dense_host(self, method: str, pool: str) -> None:
        if method == "ats" and pool in ("map", "prr"):
            with pytest.raises(ValueError, match="attention pooling"):
                effvit.sparsify(pooled_host(pool), method)
            return
        for include in (False, True):
            host, x = pooled_host(pool, pool_include_prefix=include), torch.randn(3, 3, 32, 32)
            model = effvit.sparsify(host, method, **OFF[method])
            torch.testing.assert_close(seeded(model, x), seeded(host, x))

    @pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "map"])
    @pytest.mark.parametrize("class_token", [True, False])
    @pytest.mark.parametrize(("method", "settings"), [("tome", {"r": 2}), ("dymu", {"thresholds": (0.5,) * 4})])
    def test_merged_tokens_are_pooled_once_for_each_patch_left(
        self, method: str, settings: dict[str, Any], pool: str, class_token: bool
    ) -> None:
        host = pooled_host(pool, class_token=class_token)
        model, x = effvit.sparsify(host, method, **settings), torch.randn(3, 3, 32, 32)
        torch.manual_seed(7)
        y, tokens = model.forward_tokens(x)
        # timm keeps int(16 * 0.7) patches
        assert (tokens.size.sum(1) == model.num_prefix_tokens + 11).all()
        sequences = [image.repeat_interleave(size.long(), dim=0) for image, size in zip(y, tokens.size, strict=True)]
        expected = host.forward_head(torch.stack(sequences))
        torch.testing.assert_close(seeded(model, x), expected, rtol=1e-4, atol=1e-5)
        torch.manual_seed(7)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected, rtol=1e-4, atol=1e-5)

    def test_token_head_of_lvvit_reads_the_patches_that_are_left(self) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
        host = LVViT(**sizes, num_classes=5, patch_drop_rate=0.3).train()
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(seeded(effvit.sparsify(host, "tome", r=0), x), seeded(host, x))
        assert seeded(effvit.sparsify(host, "tome", r=3), x).isfinite().all()

    def test_model_in_eval_mode_drops_no_patch(self) -> None:
        host, x = pooled_host("avg").eval(), torch.randn(2, 3, 32, 32)
        assert torch.equal(effvit.sparsify(host, "tome", r=0)(x), host(x))


class TestPooling:
    @pytest.mark.parametrize("include", [False, True])
    def test_padding_of_short_images_holds_the_mean_of_what_is_pooled(self, include: bool) -> None:
        """So that the mean over all slots is that of the image's own tokens, with the class token if timm's is."""
        host = make_host("class_token", global_pool="avg", pool_include_prefix=include)
        model = effvit.sparsify(host, "ats", reduce_at=(1, 2, 3))
        x = make_images(model, 4)
        with torch.no_grad():
            y, tokens = model.forward_tokens(x)
            padded = model.forward_features(x)
        assert tokens.valid is not None
        assert not tokens.valid.all()
        for image, out, valid in zip(y, padded, tokens.sequence_mask(), strict=True):
            assert torch.equal(out[valid], image[valid])
            mean = image[valid][0 if include else 1 :].mean(0)
            assert torch.allclose(out[~valid], mean.expand(int((~valid).sum()), -1), atol=1e-6)


class TestIntermediates:
    def test_final_norm_is_that_of_prefix_tokens_too(self) -> None:
        model = make_model("tome", "registers")
        x = make_images(model)
        with torch.no_grad():
            _, pairs = model.forward_intermediates(x, norm=True, return_prefix_tokens=True)
            assert torch.equal(pairs[-1][1], model.forward_tokens(x).x[:, :5])

    def test_blocks_behind_the_last_one_asked_for_change_nothing(self) -> None:
        model = make_model("tome", "class_token")
        x = make_images(model)
        with torch.no_grad():
            _, whole = model.forward_intermediates(x, indices=[0, 2])
            for stopped in (
                model.forward_intermediates(x, indices=[0, 2], intermediates_only=True),
                model.forward_intermediates(x, indices=[0, 2], stop_early=True)[1],
            ):
                assert [torch.equal(a, b) for a, b in zip(stopped, whole, strict=True)] == [True, True]


def children_that_are_none(model: nn.Module) -> list[str]:
    return [f"{name}.{key}" for name, m in model.named_modules() for key, child in m._modules.items() if child is None]


class TestChildren:
    @pytest.mark.parametrize(("method", "host"), covered(PAIRS))
    def test_none_is_no_child(self, method: str, host: str) -> None:
        model = make_model(method, host)
        model.reset_classifier(3, "token" if model.num_class_tokens else "avg")
        assert not children_that_are_none(model)

    def test_slot_that_was_filled_is_empty_again(self) -> None:
        model = effvit.sparsify(make_host("class_token"), "evit", recover="attention")
        with pytest.warns(UserWarning, match="evit had learnt recovery"):
            again = effvit.sparsify(model, "evit", keep_rate=0.8, reduce_at=(2,), recover="last")
        assert not children_that_are_none(again)
        assert list(again.reducers) == [2]

    @pytest.mark.parametrize("method", SETTINGS)
    def test_fvcore_prints_a_model_of_every_method(self, method: str) -> None:
        model = make_model(method, "class_token")
        counts = FlopCountAnalysis(model, make_images(model)).unsupported_ops_warnings(False)
        assert "(blocks)" in flop_count_str(counts.uncalled_modules_warnings(False))

    @pytest.mark.parametrize("case", SMALL)
    def test_none_is_no_child_of_an_architecture(self, case: str) -> None:
        model = make_architecture(case)
        assert not children_that_are_none(model)
        model.prune_intermediate_layers([0])
        assert not children_that_are_none(model)


class TestClassifier:
    """As timm's own: new modules have the mode, device and dtype of the model."""

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("case", [*SMALL, *HOSTS, *(f"tome {host}" for host in HOSTS)])
    def test_reset_classifier_follows_the_model(self, case: str, training: bool) -> None:
        model = make_architecture(case) if case in SMALL else make_host(case.removeprefix("tome "))
        model = (effvit.sparsify(model, "tome") if case.startswith("tome ") else model).to(torch.bfloat16)
        model.train(training)
        for classes in (3, 0, 4):
            model.reset_classifier(classes)
            assert {module.training for module in model.modules()} == {training}
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("training", [False, True])
    def test_modules_that_sparsify_adds_have_the_mode_of_the_model(self, training: bool) -> None:
        host = make_host("class_token", patch_drop_rate=0.5).train(training)
        model = effvit.sparsify(host, "evit", recover="attention")
        assert {m.training for name, m in model.named_modules() if "reducer" not in name} == {training}


def initialised(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A new model, and one that was created on the meta device, filled with NaN and initialised."""
    torch.manual_seed(0)
    fresh = make()
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 113)
    model.init_weights()
    return fresh, model


def assert_distributed_alike(fresh: nn.Module, model: nn.Module) -> None:
    for (name, a), b in zip(fresh.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert b.isfinite().all(), name
        spread, number = a.std(correction=0), a.numel()
        bound = 6 * max(spread, b.std(correction=0)) / number**0.5  # six standard errors
        assert abs(a.mean() - b.mean()) <= bound, name
        assert abs(spread - b.std(correction=0)) <= bound, name


class TestInitialisation:
    @pytest.mark.parametrize("case", SMALL)
    def test_architecture_after_to_empty_is_as_new(self, case: str) -> None:
        name, small = SMALL[case]
        assert_distributed_alike(*initialised(lambda: timm.create_model(name, **({"num_classes": 7} | small))))

    @pytest.mark.parametrize("case", SMALL)
    def test_architecture_from_meta_filled_by_assignment_is_right_or_refused(self, case: str) -> None:
        """A state_dict lacks the buffers that are not persistent; timm's Swin ends in an error of torch then."""
        name, small = SMALL[case]
        reference = timm.create_model(name, **small).eval()
        with torch.device("meta"):
            model = timm.create_model(name, **small).eval()
        model.load_state_dict(reference.state_dict(), assign=True)
        x = architecture_images(case)
        if not any(buffer.is_meta for buffer in model.buffers()):
            assert torch.equal(model(x), reference(x))
            return
        with pytest.raises(ValueError, match=r"relative_position_index.* call model\.init_weights\(\), and load"):
            model(x)
        model.to_empty(device="cpu").init_weights()
        model.load_state_dict(reference.state_dict())
        assert torch.equal(model(x), reference(x))

    # timm leaves the learned frequencies of a mixed RoPE and Gemma's classifier as they were, in dense models too.
    @pytest.mark.parametrize("host", [host for host in HOSTS if host not in ("rope_mixed", "gemma4")])
    def test_host_after_to_empty_is_as_new(self, host: str) -> None:
        assert_distributed_alike(*initialised(lambda: effvit.sparsify(HOSTS[host](), "tome", r=1)))

    @pytest.mark.parametrize("host", ["class_token", "dinov3", "lvvit"])
    def test_trained_recovery_after_to_empty_is_as_new(self, host: str) -> None:
        fresh, model = initialised(lambda: effvit.sparsify(HOSTS[host](), "evit", recover="attention"))
        assert_distributed_alike(fresh, model)
        assert not model.recovery.attn.proj.weight.any()

    def test_needs_reset_false_leaves_what_modules_drew_themselves(self) -> None:
        model = make_architecture("casvit")
        before = model.stem[0].conv.weight.clone()
        model.init_weights(needs_reset=False)
        assert torch.equal(model.stem[0].conv.weight, before)
        assert not model.head.fc.bias.any()


class TestHooks:
    def test_blocks_and_attention_return_tensors(self) -> None:
        model = make_model("evit", "class_token")
        seen: list[Any] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _m, _a, output: seen.append(output))
            block.attn.register_forward_hook(lambda _m, _a, output: seen.append(output))
        x = make_images(model)
        model(x)
        assert all(isinstance(output, Tensor) for output in seen)
        for output, features in zip(seen[1::2], model.trace_tokens(x), strict=True):
            assert torch.equal(output, features.x)

    @pytest.mark.parametrize("method", SETTINGS)
    def test_output_that_a_hook_gives_takes_the_place_of_the_tokens(self, method: str) -> None:
        model = make_model(method, "class_token")
        x = make_images(model)
        model.blocks[-1].register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
        expected = model.head(model.norm(torch.zeros(1, model.embed_dim)))
        torch.testing.assert_close(model(x), expected.expand(2, -1))

    @pytest.mark.parametrize("method", ["fx", "hook"])
    def test_attention_extract_of_timm_finds_the_softmax_maps(self, method: str) -> None:
        """They are those of the dense host as far as nothing is reduced: rows of every query sum to 1."""
        model = make_model("evit", "class_token")
        for block in model.blocks:
            block.attn.fused_attn = False  # as ``timm.layers.set_fused_attn(False)`` before the model was made
        x = make_images(model)
        maps = AttentionExtract(model, method=method)(x)
        assert len(maps) == len(model.blocks)
        for weights, (tokens, _) in zip(maps.values(), [(None, None), *model.trace_tokens(x)[:-1]], strict=True):
            length = 1 + model.patch_embed.num_patches if tokens is None else tokens.shape[1]
            assert weights.shape == (2, model.blocks[0].attn.num_heads, length, length)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))

    def test_wrapper_that_knows_nothing_of_token_maps_fits_around_block_and_attention(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return 1.0 * self.inner(x, *args, **kwargs)

        model = make_model("tome", "class_token")
        x = make_images(model)
        expected = model(x)
        model.blocks[0].attn = Wrapped(model.blocks[0].attn)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("method", SETTINGS)
    def test_blocks_on_a_tensor_name_the_methods_that_give_tokens(self, method: str) -> None:
        model = make_model(method, "class_token")
        with pytest.raises(TypeError, match=r"needs the TokenMap .*trace_tokens\(images\) .*forward_intermediates"):
            model.blocks(torch.zeros(1, 49, 32))


class TestRefusals:
    def refusal(self, model: Any) -> str:
        with pytest.raises(TypeError) as error:
            effvit.sparsify(model, "tome", r=1)
        return str(error.value)

    def test_wrapped_model_is_named_with_the_part_to_reduce(self) -> None:
        vit = make_host("class_token")
        tower = nn.Module()
        tower.trunk = vit
        getter = timm.models._features.FeatureGetterNet(make_host("class_token"), out_indices=[0])
        for model, part in (
            (torch.compile(vit, backend="eager"), "_orig_mod"),
            (nn.DataParallel(vit), "module"),
            (nn.Sequential(vit, nn.Identity()), "0"),
            (tower, "trunk"),
            (getter, "model"),
        ):
            assert f"at '{part}'" in self.refusal(model)
            assert f"model.{part}" in self.refusal(model)

    def test_features_only_leaves_maps_to_ask_for(self) -> None:
        getter = timm.models._features.FeatureGetterNet(make_host("class_token"), out_indices=[0])
        message = self.refusal(getter)
        assert message.startswith("a timm.models._features.FeatureGetterNet only holds the parts that its maps need")
        assert "effvit.sparsify(model.model, ...), and call forward_intermediates, or create a registered" in message
        maps = effvit.sparsify(getter.model, "tome", r=1).forward_intermediates(
            make_images(getter.model), intermediates_only=True
        )
        assert len(maps) == len(getter.model.blocks)
        cnn = timm.create_model("test_resnet", features_only=True)
        assert "create the model without features_only, sparsify it and call forward" in self.refusal(cnn)

    def test_model_with_adapters_is_named_with_the_part_that_holds_them(self) -> None:
        """The classes stand for those of peft, which are told by their names and nested like this."""

        class LoraModel(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

        class PeftModel(nn.Module):
            __module__ = "peft.peft_model"
            __qualname__ = "PeftModel"

            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.base_model = LoraModel(model)

        message = self.refusal(PeftModel(make_host("class_token")))
        assert message.startswith(
            "a peft.peft_model.PeftModel holds a vision transformer at 'base_model.model', and ada"
        )
        assert "effvit.sparsify(model.base_model.model, ...), which shares them" in message
        assert "or sparsify model.merge_and_unload()" in message

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("cait_xxs24_224", r"cait\.Cait: its heads mix their attention maps \(talking heads\), which no"),
            ("xcit_nano_12_p16_224", r"xcit\.Xcit: it attends between channels, not tokens, and convolutions"),
            ("volo_d1_224", r"volo\.VOLO: its outlook attention gathers the neighbours of every patch"),
            ("pit_ti_224", r"pit\.PoolingVisionTransformer: it pools the grid between stages by a convolution"),
            ("mvitv2_tiny", r"mvitv2\.MultiScaleVit: its attention pools queries, keys and values by conv"),
            ("pvt_v2_b0", r"pvt_v2\.PyramidVisionTransformerV2: keys and values are pooled by a convolution"),
            ("maxvit_tiny_tf_224", r"maxxvit\.MaxxVit: it attends inside windows and strided grids of a full map"),
            ("twins_pcpvt_small", r"twins\.Twins: it attends inside windows of a full map, and to keys that"),
            ("nest_tiny", r"nest\.Nest: it attends inside blocks of a full map"),
            ("coat_tiny", r"coat\.CoaT: its attention is factorised, without a map of pairs of tokens"),
            ("crossvit_tiny_240", r"crossvit\.CrossVit: its two branches cut the image into patches of different"),
            ("tnt_s_legacy_patch16_224", r"tnt\.TNT: every patch holds a sequence of pixel tokens of its own"),
            ("convit_tiny", r"convit\.ConVit: its gated attention mixes in a map of positions behind the softmax"),
            ("levit_128s", r"levit\.LevitDistilled: it shrinks the grid between stages by strides"),
            ("davit_tiny", r"davit\.DaVit: it attends inside windows and between channels of a full map"),
            ("gcvit_xxtiny", r"gcvit\.GlobalContextVit: it attends inside windows of a full map"),
        ],
    )
    def test_family_that_is_no_host_is_told_why(self, name: str, reason: str) -> None:
        with torch.device("meta"):
            message = self.refusal(timm.create_model(name))
        assert re.search(rf"cannot reduce the tokens of a timm\.models\.{reason}.*; supported are ", message)

    def test_every_family_with_a_reason_is_one_of_timm(self) -> None:
        assert not UNSERVED.keys() - {*timm.list_modules()}
        assert not [cls for cls in HOST_CLASSES if cls.__module__.removeprefix("timm.models.") in UNSERVED]

    def test_weights_and_files_are_told_from_models(self, tmp_path: Path) -> None:
        weights = make_host("class_token").state_dict()
        assert "of weights is no model; create the model with timm.create_model" in self.refusal(weights)
        for name in (tmp_path / "a", str(tmp_path / "b"), "best.pth", "model.safetensors"):
            assert "names a file, not a model" in self.refusal(name)
        assert "effvit.load_checkpoint" in self.refusal("best.pth")

    def test_class_of_another_library_is_named_with_its_module(self) -> None:
        other = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64)
        message = self.refusal(other)
        assert "torchvision.models.vision_transformer.VisionTransformer; torchvision's models" in message
        assert "supported are" in message
        assert "timm.models.vision_transformer.VisionTransformer" in message.partition("supported")[2]

    def test_recorded_program_is_to_be_made_after_sparsify(self) -> None:
        vit = make_host("class_token")
        assert "recorded program; sparsify the model first" in self.refusal(torch.fx.symbolic_trace(nn.Identity()))
        program = torch.export.export(vit, (make_images(vit),), strict=False)
        assert "recorded program" in self.refusal(program)
        assert "which is no model" in self.refusal(3)

    def test_keyword_nobody_knows_is_named_with_the_nearest_setting(self) -> None:
        for name, wrong, near in (
            ("evit_deit_tiny_patch16_224", "keep_rat", "keep_rate"),
            ("casvit_xs_224", "depth", "depths"),
        ):
            with pytest.raises(TypeError, match=rf"{name} has no argument '{wrong}'; did you mean {near}\?"):
                timm.create_model(name, **{wrong: 1})
        with pytest.raises(TypeError, match="lvvit_small_patch16_224 has no argument 'keep'"):
            timm.create_model("lvvit_small_patch16_224", keep=1)

    @pytest.mark.parametrize("name", ["evit_deit_tiny_patch16_224", "casvit_xs_224", "lvvit_small_patch16_224"])
    def test_dilation_is_refused_with_what_to_use(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"{name} has no output_stride: .*effvit\.register_pyramid"):
            timm.create_model(name, features_only=True, output_stride=16)


class TestRequirements:
    def test_range_of_timm_is_that_of_the_package(self) -> None:
        text = (Path(effvit.__file__).parents[1] / "pyproject.toml").read_text()
        (wanted,) = re.findall(r'"(timm>=[^"]*)"', text)
        lowest, above = requirements.TIMM
        assert wanted == f"timm>={'.'.join(map(str, lowest))},<{'.'.join(map(str, above[:2]))}"

    @pytest.mark.parametrize("found", ["1.0.30", "0.9.16", "1.1.0", "1.1.0.dev0", "2.0.0", "unknown"])
    def test_other_timm_is_named_with_the_range(self, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda _: found)
        with pytest.raises(ImportError, match=rf"timm>=1\.0\.31,<1\.1, but found timm {found}; install it: pip"):
            requirements.check_timm()

    @pytest.mark.parametrize("found", ["1.0.31", "1.0.32.dev0", "1.0.99"])
    def test_timm_of_the_range_passes(self, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda _: found)
        requirements.check_timm()

    @pytest.mark.parametrize("module", ["openmmlab", "classifiers", "runner", "dense_flops"])
    def test_module_for_openmmlab_names_its_extra(self, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mmengine", None)
        with pytest.raises(
            ImportError, match=rf"effvit\.dense\.{module} needs mmengine, .* commands that `effvit doctor` prints"
        ):
            runpy.run_path(str(Path(effvit.__file__).parent / "dense" / f"{module}.py"))

    def test_module_for_transformers_names_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"needs transformers, .* install effvit\[transformers\]"):
            runpy.run_path(str(Path(effvit.__file__).parent / "dense" / "transformers.py"))

    def test_what_the_optional_package_misses_itself_is_not_put_down_to_it(self) -> None:
        with pytest.raises(ModuleNotFoundError, match="No module named 'addict'"), requirements.optional("a", "b", "c"):
            raise ModuleNotFoundError("No module named 'addict'", name="addict")


@pytest.mark.parametrize("case", SMALL)
def test_fvcore_prints_every_architecture(case: str) -> None:
    model = make_architecture(case)
    counts = FlopCountAnalysis(model, architecture_images(case)).unsupported_ops_warnings(False)
    assert flop_count_str(counts.uncalled_modules_warnings(False))
