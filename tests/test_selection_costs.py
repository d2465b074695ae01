"""What selection behind a tower costs, by three counts, and what it costs to read what is handed over."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hosts import HOSTS, make_host, make_images
from made_up import made_up_profile
from test_closed_form import macs_by_torch, products
from test_naflex import make as make_naflex
from test_towers import CASES, SIZES, build
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

import effvit
from effvit.measure.breakdown import time_by_block
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.costs import handed_over, method_of, profile, tokens_by_block
from effvit.measure.flops import count_flops
from effvit.measure.reader import Reader, parse_reader
from effvit.measure.records import as_object, check_record, profile_of
from effvit.measure.selections import list_image_selectors
from effvit.selectors import SELECTORS, Choice, Features, QueryPooler, Selector

SIZE = (3, 48, 48)
STATIC = [name for name in list_image_selectors() if SELECTORS[name].choose is not Selector.choose]
FEW = {"neighbours": 4}


def make_tower(**kwargs: Any) -> VisionTransformer:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**(sizes | kwargs)).eval()


def make_selector(method: str | Selector, tower: nn.Module | None = None, **kwargs: Any) -> effvit.TokenSelector:
    few = FEW if method in ("prumerge", "prumerge_plus") else {}
    return effvit.TokenSelector(make_tower() if tower is None else tower, method, **(few | kwargs)).eval()


class TensorsAlone(nn.Module):
    """Without what torch's counter does not take."""

    def __init__(self, selector: effvit.TokenSelector) -> None:
        super().__init__()
        self.selector = selector

    def forward(self, images: Tensor) -> Tensor:
        return self.selector(images).tokens


def check_agreement(module: effvit.TokenSelector, size: tuple[int, int, int] = SIZE) -> dict[str, int]:
    """Three counts, as those of other models in tests/test_closed_form.py; the terms of the closed form."""
    report = count_flops(module, size, strict=True)
    terms = closed_form_macs(module, size)
    assert sum(terms.values()) == report.total
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    pooled = report.by_operator.get("avg_pool2d", 0)  # sums, which torch does not count
    assert macs_by_torch(TensorsAlone(module), images) == products(report) - pooled
    return terms


def check_totals(module: effvit.TokenSelector, size: tuple[int, int, int]) -> None:
    """The closed form and the count on a trace, of towers whose parts torch's counter does not all take."""
    report = count_flops(module, size, strict=True)
    assert sum(closed_form_macs(module, size).values()) == report.total


class TestCounts:
    @pytest.mark.parametrize("name", STATIC)
    def test_three_counts_of_every_selector_agree(self, name: str) -> None:
        module = make_selector(name, keep=9)
        terms = check_agreement(module)
        everything = closed_form_macs(make_selector("uniform", keep=1.0), SIZE)
        if name in ("random", "uniform"):
            assert terms == everything, "a control has nothing to compute"
        else:
            assert terms["selection"] > 0

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("visionzip", {"keep": 5, "merge": 2, "contextual": 2, "max_norm": 9.0}),
            ("visionzip", {"keep": 9, "scores": "received"}),
            ("visionzip", {"keep": 1.0}),
            ("prumerge", {"keep": 9, "block": 0}),
            ("cdpruner", {"keep": 1}),
            ("divprune", {"keep": 1, "block": -1}),
            ("matryoshka", {"keep": 4}),
        ],
    )
    def test_counts_agree_at_other_settings(self, name: str, settings: dict[str, Any]) -> None:
        check_agreement(make_selector(name, **settings))

    @pytest.mark.parametrize("host", HOSTS)
    def test_counts_of_towers_agree(self, host: str) -> None:
        """Where the class token is read, or what each patch receives; towers that are no plain ViT are refused."""
        tower = make_host(host)
        images = make_images(tower)
        scores = "received" if getattr(tower, "cls_token", None) is None else "class"
        try:
            module = make_selector("visionzip", tower, keep=5, contextual=2, scores=scores)
        except TypeError as error:
            pytest.skip(str(error))
        check_agreement(module, (3, *images.shape[2:]))

    @pytest.mark.parametrize("host", ["class_token", "eva02", "gated_grouped"])
    def test_of_a_block_that_is_only_read_queries_and_keys_are_counted(self, host: str) -> None:
        tower = make_host(host)
        check_agreement(make_selector("prumerge", tower, keep=5, block=0), (3, *make_images(tower).shape[2:]))

    @pytest.mark.parametrize(("grid_size", "in_dim"), [(1, 32), (6, 32)])
    def test_counts_of_learnt_queries_agree(self, grid_size: int, in_dim: int) -> None:
        module = make_selector(QueryPooler(16, grid_size=grid_size, num_heads=2, in_dim=in_dim))
        assert sum(closed_form_macs(module, SIZE).values()) == count_flops(module, SIZE, strict=True).total

    def test_counts_of_a_reduced_tower_agree(self) -> None:
        tower = effvit.sparsify(make_tower(), "tome", r=[9, 9, 0, 0])
        terms = check_agreement(make_selector("visionzip", tower, keep=9, contextual=3))
        assert terms["reduction"] > 0

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize(
        ("method", "settings"), [("uniform", {}), ("divprune", {}), ("visionzip", {"scores": "received"}), ("aim", {})]
    )
    def test_counts_of_towers_of_language_models_agree(self, case: str, method: str, settings: dict[str, Any]) -> None:
        """Of all forms: positions that are resampled, projectors, and cells that DeepSeek fills with zeros."""
        check_totals(make_selector(method, build(case), keep=3, **settings), (3, *SIZES[case.split()[0]]))

    @pytest.mark.parametrize("name", ["random", "uniform"])
    def test_controls_are_counted_behind_towers_of_any_size(self, name: str) -> None:
        """Traces have symbols for the sides of their grids, and both cost nothing but the tower."""
        for tower, size in ((make_naflex("token"), (3, 16, 20)), (make_tower(dynamic_img_size=True), (3, 64, 48))):
            everything = count_flops(make_selector("divprune", tower, keep=1.0), size, strict=True)
            assert count_flops(make_selector(name, tower, keep=5), size, strict=True).total == everything.total

    @pytest.mark.parametrize("case", ["gemma4 patches", "gemma4 classifier"])
    def test_counts_of_grouped_keys_agree(self, case: str) -> None:
        module = make_selector("visionzip", build(case, num_kv_heads=1), keep=3, scores="received")
        check_totals(module, (3, *SIZES["gemma4"]))

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek classifier", "gemma4 classifier"])
    def test_of_a_tower_that_is_read_behind_the_exit_queries_and_keys_are_counted(self, case: str) -> None:
        class LastReceived(SELECTORS["visionzip"]):  # type: ignore[misc]
            """VisionZip by the attention of the last block."""

            name = "last_received"
            reads_last = True

        module = make_selector(LastReceived(), build(case), keep=3, block=0, scores="received")
        check_totals(module, (3, *SIZES[case.split()[0]]))

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek classifier", "gemma4 classifier"])
    def test_counts_of_a_reduced_tower_of_a_language_model_agree(self, case: str) -> None:
        tower = effvit.sparsify(build(case), "tome", r=[4, 4, 0, 0])
        check_totals(make_selector("divprune", tower, keep=3), (3, *SIZES[case.split()[0]]))

    def test_blocks_behind_the_chosen_one_are_not_counted(self) -> None:
        """Each block of a plain ViT costs the same."""
        counts = [count_flops(make_selector("uniform", keep=9, block=block), SIZE).total for block in range(4)]
        assert counts[1] - counts[0] == counts[2] - counts[1] == counts[3] - counts[2] > 0

    def test_patches_that_are_missing_are_refused_as_by_the_model(self) -> None:
        tower = effvit.sparsify(make_tower(), "tome", r=[9, 9, 0, 0])
        for settings, who in (({"merge": 3, "keep": 2}, "a merger of 3 x 3"), ({"keep": 2}, "uniform")):
            module = make_selector("uniform", tower, **settings)
            for run in (lambda m: m(torch.rand(1, *SIZE)), lambda m: closed_form_macs(m, SIZE)):
                with pytest.raises(ValueError, match=f"{who} needs all patches in place, but tome leaves 18 of 36"):
                    run(module)

    def test_visionzip_is_counted_by_hand(self) -> None:
        """One class row of 37 keys, then 27 tokens against 3 targets by keys of 16 channels."""
        assert closed_form_macs(make_selector("visionzip", keep=9, contextual=3), SIZE)["selection"] == (
            37 * 32 + (36 - 9) * 3 * 16
        )

    def test_a_number_that_depends_on_the_image_is_counted_on_images(self) -> None:
        module = make_selector("prumerge")
        report = count_flops(module, SIZE, images=torch.rand(3, *SIZE), strict=True)
        assert len(report.per_image) == 3
        with pytest.raises(ValueError, match=r"prumerge without keep leaves as many tokens as the image needs"):
            closed_form_macs(module, SIZE)

    def test_a_selector_without_a_form_is_refused_by_name(self) -> None:
        class First(Selector):
            name = "first"
            summary = "keep the first tokens"

            def choose(self, features: Features, kept: int) -> Choice:
                return Choice(torch.arange(kept).expand(features.x.shape[0], -1))

        module = make_selector(First(), keep=4)
        with pytest.raises(TypeError, match="the selector 'first' has no closed form; give it a cost, or use effvit"):
            closed_form_macs(module, SIZE)
        assert count_flops(module, SIZE).total == count_flops(make_selector("uniform", keep=4), SIZE).total


class Decoder(nn.Module):
    """The products of a language model's layers, with grouped queries, for images of as many pixels as tokens."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        width, inner = reader.width, reader.mlp or 4 * reader.width
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(width, width),
                    "k": nn.Linear(width, reader.kv_width),
                    "v": nn.Linear(width, reader.kv_width),
                    "o": nn.Linear(width, width),
                    "up": nn.Linear(width, inner),
                    "down": nn.Linear(inner, width),
                    **({"gate": nn.Linear(width, inner)} if reader.gated else {}),
                }
            )
            for _ in range(reader.layers)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2).transpose(1, 2)  # (B, n, d)
        heads, groups = self.reader.heads, self.reader.kv_heads or self.reader.heads
        for layer in self.layers:
            q, k, v = (
                layer[name](x).unflatten(-1, (number, -1)).transpose(1, 2)
                for name, number in (("q", heads), ("k", groups), ("v", groups))
            )
            k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
            x = x + layer["o"](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            inner = layer["up"](x)
            x = x + layer["down"](inner * functional.silu(layer["gate"](x)) if self.reader.gated else inner.relu())
        return x


class TestReader:
    @pytest.mark.parametrize(
        "reader",
        [
            Reader(layers=2, width=24, heads=4),
            Reader(layers=1, width=24, heads=4, kv_heads=2, mlp=40),
            Reader(layers=3, width=16, heads=2, mlp=64, gated=False),
        ],
    )
    def test_prefill_is_what_its_layers_multiply(self, reader: Reader) -> None:
        """Counted on a trace of such layers, on 5 x 3 tokens."""
        counted = count_flops(Decoder(reader), (reader.width, 5, 3)).total
        assert reader.prefill_macs(15) == reader.prefill_macs(11, text=4) == counted

    def test_formula_is_that_of_fastv_without_groups_and_gates(self) -> None:
        """Equation 5 of 2403.06764: 4 n d^2 + 2 n^2 d + 2 n d m for each layer."""
        n, d, m = 616, 4096, 11008
        reader = Reader(layers=32, width=d, heads=32, mlp=m, gated=False)
        assert reader.prefill_macs(576, text=40) == 32 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)

    def test_cache_holds_keys_and_values_of_every_layer(self) -> None:
        reader = Reader(layers=2, width=24, heads=4, kv_heads=2, number_bytes=4)
        assert reader.cache_bytes(10, text=3) == 2 * 2 * 13 * (2 * 6) * 4
        assert reader.cache_bytes(0) == 0

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"layers": 0}, "layers must be at least 1, got 0"),
            ({"heads": -2}, "heads must be at least 1, got -2"),
            ({"mlp": 0}, "mlp must be at least 1, got 0"),
            ({"heads": 5}, "heads must divide the width of a reader, got width=24 and heads=5"),
            ({"kv_heads": 3}, "kv_heads must divide the heads of a reader, got heads=4 and kv_heads=3"),
        ],
    )
    def test_sizes_of_no_reader_are_refused(self, sizes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Reader(**({"layers": 2, "width": 24, "heads": 4} | sizes))

    def test_numbers_that_are_not_whole_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"width must be a whole number, got 24\.0"):
            Reader(layers=2, width=24.0, heads=4)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="text must be at least 0, got -1"):
            Reader(layers=2, width=24, heads=4).prefill_macs(3, text=-1)

    def test_text_of_a_reader_makes_it_again(self) -> None:
        for reader in (Reader(2, 24, 4), Reader(2, 24, 4, kv_heads=2, mlp=7, gated=False, number_bytes=1)):
            assert parse_reader(str(reader)) == reader

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("32", "--reader takes NAME=NUMBER with commas between them, of layers, width, heads, .*, got '32'"),
            ("layers=2,depth=3", "of layers, width, .*, got 'depth=3'"),
            ("layers=2.5,width=24,heads=4", "--reader: layers must be a whole number of at least 1, got '2.5'"),
            ("layers=-1,width=24,heads=4", "--reader: layers must be a whole number of at least 1, got '-1'"),
            ("layers=2,width=24,heads=4,gated=2", "--reader: gated must be true or false, got '2'"),
            ("layers=2,layers=3", "--reader names layers twice"),
            ("layers=2,width=24", "--reader lacks heads; give e.g. layers=32"),
            ("layers=2,width=24,heads=5", "heads must divide the width of a reader"),
        ],
    )
    def test_text_of_no_reader_is_a_sentence(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_reader(text)


class TestCosts:
    def test_what_is_handed_over_is_counted_and_read(self) -> None:
        reader = Reader(2, 24, 4)
        handed = handed_over(make_selector("visionzip", keep=9), torch.rand(2, *SIZE), reader, 5)
        assert handed.tokens == 9
        assert handed.prefill_macs == reader.prefill_macs(9, 5)
        assert handed.cache_bytes == reader.cache_bytes(9, 5)
        bare = handed_over(make_selector("prumerge"), torch.rand(3, *SIZE))
        assert 2 <= bare.tokens <= 36
        assert bare.prefill_macs is bare.cache_bytes is None

    def test_a_tower_that_hands_over_everything_has_no_method(self) -> None:
        assert method_of(make_selector("uniform", keep=1.0), SIZE[1:]) == (None, {})
        method, settings = method_of(make_selector("visionzip", keep=9, contextual=3), SIZE[1:])
        assert (method, settings["keep"], settings["contextual"], settings["block"]) == ("visionzip", 9, 3, -2)
        tower = effvit.sparsify(make_tower(), "tome", r=[9, 9, 0, 0])
        assert method_of(make_selector("divprune", tower, keep=9), SIZE[1:])[0] == "tome + divprune"

    def test_whether_a_tower_hands_over_everything_depends_on_the_size(self) -> None:
        """6 x 6 patches of the size it was made for, 8 x 8 of another."""
        tower = make_tower(dynamic_img_size=True)
        assert method_of(make_selector("divprune", tower, keep=36), SIZE[1:]) == (None, {})
        assert method_of(make_selector("divprune", tower, keep=36), (64, 64))[0] == "divprune"
        module = make_selector("divprune", tower, keep=50)
        assert method_of(module, (64, 64))[0] == "divprune"
        assert module(torch.rand(1, 3, 64, 64)).counts.tolist() == [50]
        with pytest.raises(ValueError, match="keep must be in 1 to 36, the cells of the grid, got 50"):
            module.keeps_all(SIZE[1:])
        (cost,) = profile({"few": module}, (3, 64, 64), 1, rounds=1, warmup=0).models
        assert (cost.method, cost.settings["keep"]) == ("divprune", 50)

    def test_tokens_are_those_that_leave_each_block_up_to_the_exit(self) -> None:
        tower = effvit.sparsify(make_tower(), "tome", r=[9, 9, 0, 0])
        assert tokens_by_block(make_selector("divprune", tower, keep=9, block=2), torch.rand(1, *SIZE)) == [27, 18, 18]
        assert tokens_by_block(make_selector("prumerge", keep=9, block=0), torch.rand(1, *SIZE)) == [36]

    def test_selection_has_its_part_in_the_breakdown(self) -> None:
        parts = {
            block.block: block.seconds
            for block in time_by_block(make_selector("divprune", keep=9), torch.rand(1, *SIZE), 1)
        }
        assert set(parts) == {*(f"tower.host.blocks.{i}" for i in range(3)), "selection", "rest"}
        assert parts["selection"]["selection"] > 0
        assert parts["rest"]["rest"] > 0


def test_record_of_a_tower_comes_back_from_json() -> None:
    record = made_up_profile()
    record["models"][0]["handed"] = {"tokens": 9.0, "text": 5}
    record["models"][1]["handed"] = {"tokens": 9.5, "text": 5, "reader": "r", "prefill_macs": 7, "cache_bytes": 8}
    check_record(record, "file")
    read = profile_of(record)
    assert read.models[1].handed is not None
    assert read.models[1].handed.prefill_macs == 7
    assert json.loads(json.dumps(as_object(read)))["models"][1]["handed"] == record["models"][1]["handed"]
    assert "handed" not in as_object(replace(read.models[0], handed=None))
    record["models"][0]["handed"]["tokens"] = -1
    with pytest.raises(ValueError, match="handed"):
        check_record(record, "file")
