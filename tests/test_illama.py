"""iLLaMA: its equations written as loops over places, its official files, and the mask where tokens moved."""

from __future__ import annotations

import cmath
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts import make_host, make_images, make_model
from torch import Tensor, nn

import effvit
from effvit.attention import AttnState, Beside, CausalMask, Picked
from effvit.hosts.illama import ILLaMA, default_cfgs, rotary_table
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers import METHODS, ragged
from effvit.tokens import TokenMap, take_rows

SOFT_MASKS = (0.0, 0.3, 1.0)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, place: int) -> Tensor:
    """A query or key (D,) at a place: pairs of neighbouring channels as complex numbers, turned one by one."""
    width = len(x)
    numbers = torch.view_as_complex(x.reshape(-1, 2))
    turned = [z * cmath.exp(1j * place * 10000 ** (-2 * i / width)) for i, z in enumerate(numbers)]
    return torch.view_as_real(torch.stack(turned)).flatten()


def attention_at_places(attn: nn.Module, x: Tensor, places: list[int], soft_mask: float) -> Tensor:
    """Attention of one image's tokens (N, C) that stand at these places, written one query and head after another."""
    heads, width = attn.num_heads, x.shape[1] // attn.num_heads
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).view(len(x), 3, heads, width).unbind(1)
    outputs = torch.zeros(len(x), heads, width, dtype=x.dtype)
    for h in range(heads):
        queries, keys = ([rotated(y[i, h], place) for i, place in enumerate(places)] for y in (q, k))
        for i, query in enumerate(queries):
            exponentials = [(query @ key * width**-0.5).exp() for key in keys]
            for j, exponential in enumerate(exponentials):
                factor = soft_mask if places[j] > places[i] else 1.0
                outputs[i, h] += factor * exponential / sum(exponentials) * v[j, h]
    return outputs.flatten(1) @ attn.proj.weight.T + attn.proj.bias


def features_by_the_equations(model: nn.Module, image: Tensor, soft_mask: float) -> Tensor:
    """Normalised tokens (N+1, C) of an image (3, H, W) as models/illama.py@dfc93b9 orders them: class token last."""
    x = model.patch_embed.proj(image.unsqueeze(0)).flatten(2)[0].T
    x = torch.cat([x, model.cls_token[0]]) + model.pos_embed[0].roll(-1, dims=0)
    for block in model.blocks:
        y = rms_norm(x, block.norm1.weight)
        x = x + attention_at_places(block.attn, y, list(range(len(x))), soft_mask)
        y = rms_norm(x, block.norm2.weight)
        gate = y @ block.mlp.fc1_g.weight.T
        x = x + (gate * gate.sigmoid() * (y @ block.mlp.fc1_x.weight.T)) @ block.mlp.fc2.weight.T
    return rms_norm(x, model.norm.weight)


@pytest.mark.parametrize("soft_mask", SOFT_MASKS)
@torch.no_grad()
def test_features_are_those_of_the_equations(soft_mask: float) -> None:
    model = make_host("illama", img_size=(16, 24), depth=2).double()
    model.set_soft_mask(soft_mask)
    x = make_images(model).double()
    features = model.forward_features(x)
    for image, own in zip(x, features, strict=True):
        expected = features_by_the_equations(model, image, soft_mask)
        assert torch.allclose(own.roll(-1, dims=0), expected, rtol=0, atol=1e-10)
    assert torch.equal(model.forward_head(features), model.head(features[:, 0]))


class TestMask:
    def test_ends_are_the_whole_softmax_and_its_lower_triangle(self) -> None:
        weights = torch.rand(2, 3, 5, 5).softmax(-1)
        places = torch.arange(5).unsqueeze(0)
        assert torch.equal(CausalMask(places, 1.0).applied(weights), weights)
        assert torch.equal(CausalMask(places, 0.0).applied(weights), weights.tril())
        half = CausalMask(places, 0.5).applied(weights)
        assert torch.equal(half, weights / 2 + weights.tril() / 2)

    def test_class_token_attends_to_all(self) -> None:
        tokens = TokenMap.full(torch.zeros(2, 13, 8), (3, 4), 1, 1)
        weights = torch.rand(2, 1, 13, 13)
        masked = CausalMask.of(tokens, 0.0).applied(weights)
        assert torch.equal(masked[:, :, 0], weights[:, :, 0])
        assert not masked[:, :, 1:, 0].any()
        assert torch.equal(masked[:, :, 1:, 1:], weights[:, :, 1:, 1:].tril())

    @torch.no_grad()
    def test_later_tokens_count_in_the_denominator_alone(self) -> None:
        """As officially, where the mask is multiplied in behind the softmax: no row is renormalised."""
        model = make_host("illama")
        attn, x = model.blocks[0].attn, torch.randn(1, 49, 32)
        rope, width = rotary_table(x, attn.head_dim), 32
        before = attn(x, rope)
        for part, others_stay in ((slice(2 * width, None), True), (slice(width, 2 * width), False)):  # values, keys
            hook = attn.qkv.register_forward_hook(changed_last_token(part))
            after = attn(x, rope)
            hook.remove()
            assert torch.equal(after[:, 1:-1], before[:, 1:-1]) == others_stay
            assert not torch.equal(after[:, [0, -1]], before[:, [0, -1]])

    def test_is_set_on_the_model_it_is_set_on_alone(self) -> None:
        dense = make_host("illama")
        dense.set_soft_mask(0.5)
        model = effvit.sparsify(dense, "tome", r=0)
        x = make_images(dense)
        with torch.no_grad():
            assert torch.equal(model(x), dense(x))
            model.set_soft_mask(0)
            assert (model.soft_mask, dense.soft_mask) == (0.0, 0.5)
            assert not torch.equal(model(x), dense(x))
        assert not [name for name in model.state_dict() if "soft" in name]

    @pytest.mark.parametrize("soft_mask", [-0.1, 1.5, True, "1", float("nan")])
    def test_outside_its_range_is_refused(self, soft_mask: Any) -> None:
        message = f"soft_mask must be in [0, 1], got {soft_mask!r}; 0 is the causal mask"
        with pytest.raises(ValueError, match=re.escape(message)):
            make_host("illama").set_soft_mask(soft_mask)


def changed_last_token(part: slice) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that changes some of the channels (B, N, 3C) of the last token."""

    def change(_: nn.Module, arguments: Any, qkv: Tensor) -> Tensor:
        qkv = qkv.clone()
        qkv[:, -1, part] += 1
        return qkv

    return change


@pytest.mark.parametrize("soft_mask", SOFT_MASKS)
class TestMovedTokens:
    @torch.no_grad()
    def test_kept_tokens_stand_at_the_places_of_their_anchors(self, soft_mask: float) -> None:
        """In whatever order the sequence holds them."""
        model = make_model("tome", "illama", r=0).double()
        model.set_soft_mask(soft_mask)
        attn = model.blocks[0].attn
        x = torch.randn(2, 49, 32, dtype=torch.double)
        index = torch.stack([torch.randperm(48)[:9] for _ in range(2)])
        kept, tokens = TokenMap.full(x, (6, 8), 1, 1).select(x, index, 9)
        beside: Beside[AttnState] = Beside()
        out = attn(kept, tokens, rotary_table(x, attn.head_dim), beside=beside)
        for image in range(2):
            expected = attention_at_places(attn, kept[image], [48, *index[image].tolist()], soft_mask)
            assert torch.allclose(out[image], expected, rtol=0, atol=1e-12)
        state = beside.value
        values = (state.softmax_map() @ state.v).transpose(1, 2).flatten(2)
        assert torch.allclose(attn.proj(values), out, rtol=0, atol=1e-12)
        assert torch.allclose(state.class_rows(), state.softmax_map()[:, :, :1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("moved", [False, True])
    @torch.no_grad()
    def test_picked_queries_have_the_rows_of_the_whole_attention(self, moved: bool, soft_mask: float) -> None:
        model = make_model("tome", "illama", r=0)
        model.set_soft_mask(soft_mask)
        attn = model.blocks[0].attn
        x, rope, tokens = model._start(make_images(model), memory=False)
        if moved:
            x, tokens = tokens.select(x, torch.stack([torch.randperm(48)[:30] for _ in range(2)]), 30)
        index = torch.stack([torch.randperm(x.shape[1] - 1)[:5] for _ in range(2)])

        def pick(state: AttnState) -> Picked:
            return Picked(state.keys.rows(index), state.keys.keep(index, 5))

        whole = take_rows(attn(x, tokens, rope), tokens.rows(index))
        assert torch.allclose(attn(x, tokens, rope, pick=pick), whole, atol=1e-5)

    @torch.no_grad()
    def test_tokens_that_a_policy_drops_are_as_if_they_had_left(self, soft_mask: float) -> None:
        """To within the epsilon of DynamicViT's softmax (POLICY_EPS, relative to the largest logit of a row)."""
        model = make_model("tome", "illama", r=0)
        model.set_soft_mask(soft_mask)
        attn = model.blocks[0].attn
        x, rope, tokens = model._start(make_images(model), memory=False)
        index = torch.stack([torch.randperm(48)[:30] for _ in range(2)])
        kept, left = tokens.select(x, index, 30)
        policy = torch.zeros(2, 49).scatter(1, index + 1, 1.0)
        policy[:, 0] = 1
        out = attn(x, replace(tokens, policy=policy), rope)
        assert torch.allclose(take_rows(out, tokens.rows(index)), attn(kept, left, rope), rtol=1e-4, atol=1e-4)


class TestPacking:
    @pytest.mark.parametrize("method", ["ats", "dymu", "algm"])
    def test_is_refused(self, method: str) -> None:
        message = rf"{method} with ragged='packed' .* take no mask behind the softmax, as this ILLaMA has .*'padded'"
        with pytest.raises(ValueError, match=message):
            make_model(method, "illama", ragged="packed")

    @pytest.mark.parametrize("method", ["ats", "dymu", "algm"])
    def test_is_not_chosen_where_it_would_be_faster(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ragged, "MACS_PER_IMAGE", 0)
        monkeypatch.setattr(ragged, "MACS_PER_FEATURE", 0)
        for host, packed in (("class_token", True), ("illama", False)):
            model = make_model(method, host, ragged="auto")
            with torch.no_grad():
                (_, tokens), _ = model._forward_blocks(make_images(model, batch=4))
            assert tokens.packed == packed


class TestWeights:
    def official(self, model: nn.Module) -> dict[str, Tensor]:
        """Random weights under the names and shapes that models/illama.py@dfc93b9 registers."""
        dim, depth, hidden = model.embed_dim, len(model.blocks), model.blocks[0].mlp.fc2.in_features
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": tuple(model.pos_embed.shape),
            "patch_embed.proj.weight": (dim, 3, *model.patch_embed.patch_size),
            "patch_embed.proj.bias": (dim,),
            "norm.weight": (dim,),
            "head.weight": (model.num_classes, dim),
            "head.bias": (model.num_classes,),
        }
        for i in range(depth):
            shapes |= {
                f"blocks.{i}.norm1.weight": (dim,),
                f"blocks.{i}.attn.qkv.weight": (3 * dim, dim),
                f"blocks.{i}.attn.qkv.bias": (3 * dim,),
                f"blocks.{i}.attn.proj.weight": (dim, dim),
                f"blocks.{i}.attn.proj.bias": (dim,),
                f"blocks.{i}.norm2.weight": (dim,),
                f"blocks.{i}.mlp.fc1.weight": (hidden, dim),
                f"blocks.{i}.mlp.fc2.weight": (dim, hidden),
                f"blocks.{i}.mlp.fc3.weight": (hidden, dim),
            }
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    @pytest.mark.parametrize("method", [None, "evit"])
    def test_official_files_load(self, method: str | None, tmp_path: Path) -> None:
        model = make_host("illama") if method is None else make_model(method, "illama")
        state = self.official(model)
        torch.save({"model": state, "epoch": 299}, tmp_path / "illama.pth")
        effvit.load_checkpoint(model, tmp_path / "illama.pth")
        own = model.state_dict()
        assert len(own) == len(state)
        assert torch.equal(own["blocks.1.mlp.fc1_g.weight"], state["blocks.1.mlp.fc1.weight"])
        assert torch.equal(own["blocks.1.mlp.fc1_x.weight"], state["blocks.1.mlp.fc3.weight"])
        assert torch.equal(own["pos_embed"][:, 0], state["pos_embed"][:, -1])
        assert torch.equal(own["pos_embed"][:, 1:], state["pos_embed"][:, :-1])
        effvit.load_checkpoint(make_host("illama"), self.saved(own, tmp_path))  # under our names nothing moves

    def saved(self, state: dict[str, Tensor], folder: Path) -> Path:
        torch.save(state, folder / "own.pth")
        return folder / "own.pth"

    def test_own_files_load_as_they_are(self, tmp_path: Path) -> None:
        source, model = make_host("illama"), make_host("illama")
        nn.init.normal_(source.pos_embed)
        effvit.load_checkpoint(model, self.saved(source.state_dict(), tmp_path))
        assert torch.equal(model.pos_embed, source.pos_embed)

    def test_official_positions_are_resampled_without_that_of_the_class_token(self, tmp_path: Path) -> None:
        small, model = make_host("illama", img_size=(48, 48)), make_host("illama", img_size=(64, 64))
        state = self.official(small)
        torch.save(state, tmp_path / "illama.pth")
        effvit.load_checkpoint(model, tmp_path / "illama.pth")
        effvit.load_checkpoint(small, tmp_path / "illama.pth")
        small.set_input_size((64, 64))
        assert torch.equal(model.pos_embed, small.pos_embed)
        assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, -1])

    def test_gates_and_class_token_start_as_officially(self) -> None:
        """Truncated normal of 0.02 throughout; timm would start gates and class token at 1e-6."""
        torch.manual_seed(0)
        model = ILLaMA(img_size=32, embed_dim=64, depth=1, num_heads=1)
        for weight in (model.blocks[0].mlp.fc1_g.weight, model.blocks[0].mlp.fc1_x.weight, model.cls_token):
            assert weight.std().item() == pytest.approx(0.02, rel=0.3)


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "parameters", "macs"),
        [
            ("illama_tiny_patch16_224", 5_701_096, 1.3),
            ("illama_small_patch16_224", 22_018_024, 4.6),
            ("illama_base_patch16_224", 86_502_376, 17.6),
            ("illama_base_patch16_384", 86_794_216, 55.5),
            ("illama_large_patch16_224", 310_445_032, 62.8),
            ("illama_large_patch16_384", 310_834_152, 194.7),
        ],
    )
    def test_are_the_published_ones(self, name: str, parameters: int, macs: float) -> None:
        """n_parameters in logs/ and the README of techmonsterwang/iLLaMA@dfc93b9, whose MACs are without norms."""
        with torch.device("meta"):
            model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        terms = closed_form_macs(model, (3, *model.patch_embed.img_size))
        assert round((sum(terms.values()) - terms["norm"]) / 1e9, 1) == macs

    def test_all_pairs_are_counted_though_the_mask_leaves_half_of_them(self) -> None:
        """The map is formed whole, as officially."""
        model = make_host("illama")
        assert closed_form_macs(model, (3, 48, 64))["attention"] == len(model.blocks) * 2 * 49**2 * 32

    def test_every_name_says_where_its_weights_are(self) -> None:
        for name, cfg in own_cfgs():
            assert cfg.url.startswith("https://huggingface.co/techmonsterwang/iLLaMA/resolve/main/illama-"), name
            assert (cfg.crop_mode == "squash") == (cfg.input_size[-1] == 384), name

    @pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_class_token])
    def test_reduced_models_have_names(self, method: str) -> None:
        assert f"{method}_illama_tiny_patch16_224" in effvit.list_models("*illama*")


def own_cfgs() -> list[tuple[str, Any]]:
    """(name, configuration) of every tag."""
    return [(f"{name}.{tag}", cfg) for name, default in default_cfgs.items() for tag, cfg in default.cfgs.items()]


class TestArguments:
    @pytest.mark.parametrize("wrong", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
    def test_other_prefix_tokens_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="iLLaMA has one class token, which stands last, and no registers, got"):
            make_host("illama", **wrong)

    def test_patch_dropout_is_refused(self) -> None:
        message = r"patch_drop_rate must be 0 for iLLaMA, .*, got 0\.3; reduce the model by effvit\.sparsify"
        with pytest.raises(ValueError, match=message):
            make_host("illama", patch_drop_rate=0.3)

    def test_mask_is_refused(self) -> None:
        model = make_host("illama")
        with pytest.raises(ValueError, match="a ILLaMA takes no attn_mask or is_causal"):
            model.forward_features(make_images(model), is_causal=True)

    def test_image_of_another_size_is_told_the_way_there_is(self) -> None:
        with pytest.raises(ValueError, match=r"call model\.set_input_size\(\(32, 32\)\)"):
            make_host("illama")(torch.zeros(1, 3, 32, 32))
