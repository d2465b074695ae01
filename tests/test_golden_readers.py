"""The readers of golden cases themselves: an argument that nobody reads fails, and so does a value not compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_dymu
import golden_stvit_swin
import pytest
import test_golden
import torch
from golden_cases import Case, Record, expect, unread
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from effvit.architectures.stvit_swin import STViTSwin

PLAIN = {
    **{"img_size": 32, "patch": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 5},
    **{"qkv_bias": True, "norm_eps": 1e-6, "act": "gelu(exact)", "batch": 1, "mode": "eval, float32"},
}


def write(folder: Path, method: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Case:
    path = folder / "case.json"
    path.write_text(json.dumps(config))
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path.with_suffix(".safetensors"))
    return Case(method, path)


def dense_case(folder: Path, method: str, **config: Any) -> Case:
    """A case in which nothing is reduced: timm's own ViT is the official code."""
    config = PLAIN | config
    model = VisionTransformer(
        config["img_size"], config["patch"], embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5,
        qkv_bias=config["qkv_bias"],
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        y, blocks = model._pos_embed(model.patch_embed(x)), {}
        for i, block in enumerate(model.blocks):
            y = blocks[f"block{i}/out"] = block(y)
        tokens = model.forward_features(x)
        tensors = blocks | {
            "input": x,
            "output": model(x),
            "final_norm": tokens,
            "tokens_per_layer": torch.tensor([17, 17]),
        }
    return write(folder, method, config, tensors | {f"state/{key}": value for key, value in model.state_dict().items()})


NOTHING_REDUCED = {
    "evit": {"keep_rate": [1], "fuse_token": True},
    "tome": {
        **{"r": 0, "r_is": "int", "r_per_layer_requested": [0, 0], "prop_attn": True, "distilled": False},
        **{"global_pool": None, "patch_fn": "tome.patch.timm", "trace_source": False},
    },
    "gtp": {
        **{"official_file": "models_v3.py", "class_token": True},
        "options": {"num_prop": 0, "selection": "MixedAttnMax", "propagation": "None"},
    },
}


class TestNothingReduced:
    @pytest.mark.parametrize("qkv_bias", [True, False])
    @pytest.mark.parametrize("method", NOTHING_REDUCED)
    def test_case_that_reduces_nothing_is_timms_own_model(self, method: str, qkv_bias: bool, tmp_path: Path) -> None:
        case = dense_case(tmp_path, method, qkv_bias=qkv_bias, **NOTHING_REDUCED[method])
        test_golden.compare_case(case)

    def test_matching_of_no_token_keeps_tokens_and_order(self, tmp_path: Path) -> None:
        row = {"B": 1, "N": 5, "metric_dim": 4, "C": 2, "r": 0, "class_token": True, "distill_token": False, "N_out": 5}
        x, size = torch.randn(1, 5, 2), torch.ones(1, 5, 1)
        tensors = {"s0/metric": torch.randn(1, 5, 4), "s0/x": x, "s0/size": size, "s0/merged_x": x}
        case = write(tmp_path, "tome", {"soft": [row], "kth": []}, tensors | {"s0/merged_size": size})
        case = Case("tome", case.path.rename(tmp_path / "f_none.json"))
        (tmp_path / "case.safetensors").rename(tmp_path / "f_none.safetensors")
        test_golden.compare_case(case)


class TestArguments:
    def test_entry_that_nobody_read_is_named(self) -> None:
        record = Record({"note": "", "a": 1, "b": {"c": 2, "d": 3}, "rows": [{"e": 4}]})
        assert record["b"]["c"] == 2
        assert "a" in record  # asking is not reading
        assert unread(record) == ["a", "b.d", "rows", "rows.0.e"]

    @pytest.mark.parametrize("method", NOTHING_REDUCED)
    def test_argument_that_no_reader_knows_is_an_error(self, method: str, tmp_path: Path) -> None:
        case = dense_case(tmp_path, method, **NOTHING_REDUCED[method], layer_norm_first=True)
        with pytest.raises(AssertionError, match="recorded, but not read by the comparison: layer_norm_first"):
            test_golden.compare_case(case)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"act": "relu"}, "act='relu' has no counterpart"),
            ({"mode": "train"}, "recorded in training mode"),
            ({"batch": 2}, "batch is 2, but the input has 1"),
        ],
    )
    def test_value_that_is_not_compared_is_an_error(
        self, changed: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        case = dense_case(tmp_path, "evit", **(NOTHING_REDUCED["evit"] | changed))
        with pytest.raises(AssertionError, match=message):
            test_golden.compare_case(case)

    def test_one_value_without_counterpart_passes_and_another_does_not(self) -> None:
        expect({"a": 1}, a=1, b=2)
        with pytest.raises(AssertionError, match="a=3 has no counterpart here, only 1"):
            expect({"a": 3}, a=1)


class TestDymu:
    @pytest.mark.parametrize("pre_norm", [True, False])
    def test_pre_norm_and_thresholds_given_by_hand_reach_the_model(self, pre_norm: bool, tmp_path: Path) -> None:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
        state = VisionTransformer(**sizes, pre_norm=pre_norm).state_dict()
        config = {"kind": "timm", "config": {**sizes, "pre_norm": pre_norm, "r_total": 4, "qkv_bias": True}}
        config["config"]["specified_thresholds"] = [0.5, 0.75]
        tensors = {"input": torch.randn(1, 3, 32, 32)} | {f"state/{key}": value for key, value in state.items()}
        host, settings = golden_dymu.build(write(tmp_path, "dymu", config, tensors))
        assert isinstance(host.norm_pre, torch.nn.LayerNorm) == pre_norm
        assert settings["thresholds"] == [0.5, 0.75]


class TestStvitSwin:
    def build(self, folder: Path, **kwargs: Any) -> STViTSwin:
        kwargs = {"embed_dim": 8, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 4, 8], "num_classes": 3} | kwargs
        config = {"config": {"cls": "SwinTransformer", "img_size": 224, "kwargs": kwargs}, "mode": "eval"}
        return golden_stvit_swin.build(write(folder, "stvit_swin", config, {"input": torch.zeros(1, 3, 224, 224)}))

    @pytest.mark.parametrize("scaled", [True, False])
    def test_layer_scale_is_read(self, scaled: bool, tmp_path: Path) -> None:
        names = [name for name, _ in self.build(tmp_path, use_layer_scale=scaled).named_parameters()]
        assert ("stages.0.blocks.0.ls1.gamma" in names) == scaled

    def test_scale_of_attention_is_that_of_the_swin_blocks_of_three_stages(self, tmp_path: Path) -> None:
        model = self.build(tmp_path, qk_scale=0.5)
        scales = [stage.blocks[0].attn.scale for i, stage in enumerate(model.stages) if i != 2]
        assert scales == [0.5] * 3
        assert model.stages[2].blocks[0].block.attn.scale == 8**-0.5  # 32 channels in 4 heads

    def test_argument_of_the_dense_form_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match=r"arguments without a counterpart: \['pad_mask'\]"):
            self.build(tmp_path, pad_mask=True)
