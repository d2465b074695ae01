"""Selection behind vision towers: one contract for all selectors, towers, and what is refused."""

from __future__ import annotations

import inspect
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hosts import make_host, make_images
from pages import DOCS, run_page
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effvit
from effvit.reducers.static_selection import random_ranks, uniform_ranks
from effvit.selectors import (
    SELECTORS,
    Choice,
    Features,
    Matryoshka,
    MatryoshkaLoss,
    QueryPooler,
    Selector,
)
from effvit.selectors.aim import merge_round
from effvit.selectors.cdpruner import determinant_order
from effvit.selectors.cells import cell_means, to_cells
from effvit.selectors.holitom import static_windows
from effvit.selectors.parts import valid_cells
from effvit.selectors.registry import RESERVED
from effvit.selectors.select import choose_tokens
from effvit.selectors.spread import Cosines, cosines_of, spread
from effvit.selectors.visionzip import contextual_tokens
from effvit.testing import assert_runs_on_fakes, count_reads

GRID, KEPT = (6, 8), 12
NUMBER = GRID[0] * GRID[1]
BY_NAME = [name for name, cls in SELECTORS.items() if not cls.learns and cls.takes == "select_tokens"]
STATIC = [name for name in BY_NAME if SELECTORS[name].choose is not Selector.choose]
ADAPTIVE = [name for name in BY_NAME if SELECTORS[name].adapt is not Selector.adapt]
EVERY_WAY = [(name, KEPT) for name in STATIC] + [(name, None) for name in ADAPTIVE]
NEIGHBOURS = {"recoverable": {"neighbours": 8}}  # the published 32 are more than are left of 48


def features(batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random tokens, scores with some that stand out, and keys."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, NUMBER, 24, generator=generator, dtype=dtype)
    scores = torch.rand(batch, NUMBER, generator=generator, dtype=dtype).pow(4)
    keys = torch.randn(batch, NUMBER, 16, generator=generator, dtype=dtype)
    return {"tokens": x, "grid": GRID, "scores": scores / scores.sum(1, keepdim=True), "keys": keys}


def choose(name: str | Selector, keep: float | None, given: dict[str, Any], **settings: Any) -> effvit.Selection:
    settings = NEIGHBOURS.get(str(name), {}) | settings
    return effvit.select_tokens(None, None, name, keep=keep, **of_use(name, given), **settings)


def of_use(name: str | Selector, given: dict[str, Any]) -> dict[str, Any]:
    """What is given, without what the method does not use."""
    selector = name if isinstance(name, Selector) else SELECTORS.get(name, Selector)
    used = {"scores": selector.row, "keys": selector.keys, "early": selector.reads_first}
    return {key: value for key, value in given.items() if used.get(key, True)}


def groups(ids: Tensor) -> Tensor:
    """(B, N) groups of tokens (B, K) that stand for themselves alone."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return torch.full((len(ids), NUMBER), -1).scatter(1, ids, places)


def make_tower(**kwargs: Any) -> VisionTransformer:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**(sizes | kwargs)).eval()


IMAGES = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "keep"), EVERY_WAY)
class TestContract:
    def test_an_image_alone_is_the_image_in_a_batch(self, name: str, keep: int | None) -> None:
        given = features()
        together = choose(name, keep, given)
        for image in range(3):
            one = {
                key: value[image : image + 1] if isinstance(value, Tensor) else value for key, value in given.items()
            }
            alone = choose(name, keep, one)
            count = int(together.counts[image])
            assert alone.tokens.shape[1] == count
            assert torch.equal(alone.ids[0], together.ids[image, :count])
            torch.testing.assert_close(alone.tokens[0], together.tokens[image, :count], rtol=1e-5, atol=1e-6)

    def test_tokens_stand_in_image_order_and_groups_name_them(self, name: str, keep: int | None) -> None:
        chosen = choose(name, keep, features())
        assert chosen.grid == GRID
        for image, count in enumerate(chosen.counts.tolist()):
            ids = chosen.ids[image, :count]
            assert (ids.diff() > 0).all()
            assert not chosen.ids[image, count:].any()
            assert not chosen.tokens[image, count:].any()
            assert chosen.mask()[image].nonzero().flatten().tolist() == ids.tolist()
            if chosen.group is not None:
                assert torch.equal(chosen.group[image, ids], torch.arange(count))
                assert chosen.group[image].max() == count - 1

    def test_number_of_tokens_is_known_before_the_tower_runs(self, name: str, keep: int | None) -> None:
        known = effvit.count_tokens(name, GRID, keep=keep)
        chosen = choose(name, keep, features())
        if keep is None:
            assert known is None
            assert chosen.valid is not None
            assert torch.equal(chosen.valid.sum(1), chosen.counts)
        else:
            assert known == keep
            assert chosen.counts.tolist() == [keep] * 3
            assert effvit.count_tokens(name, GRID, keep=keep, frames=5) == 5 * keep

    def test_gradients_reach_the_tokens_that_stay(self, name: str, keep: int | None) -> None:
        given = features()
        given["tokens"].requires_grad_()
        chosen = choose(name, keep, given)
        chosen.tokens.square().sum().backward()
        touched = given["tokens"].grad.abs().sum(-1) > 0
        assert touched.gather(1, chosen.ids)[chosen.mask().gather(1, chosen.ids)].all()

    def test_double_precision_and_half_stay_what_they_are(self, name: str, keep: int | None) -> None:
        for dtype in (torch.float64, torch.bfloat16):
            given = features()
            given["tokens"] = given["tokens"].to(dtype)
            assert choose(name, keep, given).tokens.dtype == dtype

    def test_nan_is_refused_by_image(self, name: str, keep: int | None) -> None:
        given = features()
        given["tokens"][1, 3, 0] = float("nan")
        with pytest.raises(ValueError, match=f"{name}: the features are NaN for image 1 of the batch"):
            choose(name, keep, given)

    def test_infinite_features_and_bad_keys_are_refused_by_image(self, name: str, keep: int | None) -> None:
        """A tower in float16 that overflows gives infinity, whose cosine to any other token is no number."""
        given = features()
        given["tokens"][2, 3, 0] = float("inf")
        remedy = "are infinite for image 2 of the batch; give finite ones"
        with pytest.raises(ValueError, match=f"{name}: the features {remedy}"):
            choose(name, keep, given)
        if SELECTORS[name].keys is None:
            return
        for value, message in (("inf", remedy), ("nan", "are NaN for image 2 of the batch")):
            given = features()
            given["keys"][2, 5, 1] = float(value)
            with pytest.raises(ValueError, match=f"{name}: the keys {message}"):
                choose(name, keep, given)


@pytest.mark.parametrize("total", [False, True])
def test_no_token_is_picked_twice_whatever_the_distances_are(total: bool) -> None:
    """Values that a device does not check: infinite tokens, whose distances are no numbers."""
    x = features()["tokens"]
    x[:, 3:9, 0] = float("inf")
    picks, _ = spread(cosines_of(x, 20), torch.zeros(3, 1, dtype=torch.int64), 20, total)
    assert [len(image.unique()) for image in picks] == [20] * 3


@pytest.mark.parametrize("name", ["divprune", "todre", "cdpruner"])
def test_greedy_methods_compare_each_pair_of_tokens_at_most_once(name: str) -> None:
    """Counted: N x N products of C for many picks, K x N for few, and in CDPruner the factor's K x K x N / 2."""
    tokens, channels = 256, 192
    x = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(0))
    given = {"tokens": x, "grid": (16, 16), "scores": torch.rand(2, tokens)}
    for kept in (128, 8):
        with FlopCounterMode(display=False) as counter:
            choose(name, kept, given)
        pairs = tokens**2 if kept == 128 else kept * tokens
        if name == "divprune" and kept == 8:
            pairs += tokens**2  # for the first token, the farthest from its nearest
        factor = kept**2 * tokens // 2 if name == "cdpruner" else 0
        assert counter.get_total_flops() <= 2 * 2 * (pairs * channels + factor)


@pytest.mark.parametrize("name", ["divprune", "todre"])
def test_cosines_that_are_held_choose_as_those_made_row_by_row(name: str) -> None:
    x, first = features(dtype=torch.float64)["tokens"], torch.zeros(3, 1, dtype=torch.int64)
    held = cosines_of(x, NUMBER)
    assert held.table is not None
    assert cosines_of(x, 4).table is None
    picks, far = spread(held, first, 20, total=name == "todre")
    others, apart = spread(Cosines(held.unit, None), first, 20, total=name == "todre")
    assert torch.equal(picks, others)
    torch.testing.assert_close(far, apart)


@pytest.mark.parametrize("name", STATIC)
class TestStatic:
    def test_all_tokens_are_the_tokens_bit_for_bit(self, name: str) -> None:
        given = features()
        for keep in (NUMBER, 1.0):
            chosen = choose(name, keep, given)
            assert torch.equal(chosen.tokens, given["tokens"])
            assert torch.equal(chosen.ids, torch.arange(NUMBER).expand(3, -1))
            assert torch.equal(chosen.group, chosen.ids)

    def test_a_device_is_not_read_and_nothing_is_made_elsewhere(self, name: str) -> None:
        settings = {"neighbours": 8} if name.startswith("prumerge") else {}
        module = effvit.TokenSelector(make_tower(), name, keep=9, **settings)
        assert not count_reads(lambda: module(IMAGES))
        for autocast in (False, True):
            assert_runs_on_fakes(module, lambda images: tuple(module(images)[:3]), IMAGES, autocast)

    def test_it_exports_with_a_dynamic_batch(self, name: str) -> None:
        program, given = exported(name)
        expected = choose(name, KEPT, given)
        tokens, ids = program.module()(given["tokens"], given["scores"], given["keys"])
        assert torch.equal(ids, expected.ids)
        torch.testing.assert_close(tokens, expected.tokens)

    def test_it_runs_in_onnxruntime(self, name: str, tmp_path: Path) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        program, given = exported(name)
        torch.onnx.export(program, (), tmp_path / "selector.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "selector.onnx", providers=["CPUExecutionProvider"])
        tokens, ids = session.run(None, {entry.name: given[entry.name].numpy() for entry in session.get_inputs()})
        expected = choose(name, KEPT, given)
        assert torch.equal(torch.from_numpy(ids), expected.ids)
        torch.testing.assert_close(torch.from_numpy(tokens), expected.tokens, rtol=1e-4, atol=1e-5)


class Chooser(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.selector = SELECTORS[name]()
        self.selector.settle(GRID)

    def forward(self, tokens: Tensor, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return choose_tokens(self.selector, Features(tokens, GRID, scores, keys), KEPT)[:2]


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_controls_choose_the_same_behind_the_meta_device(name: str) -> None:
    """Memory of ``to_empty`` holds anything, and ``assign=True`` leaves buffers that no file holds."""
    expected = effvit.TokenSelector(make_tower(), name, keep=9)
    with torch.device("meta"):
        empty, assigned = (effvit.TokenSelector(make_tower(), name, keep=9) for _ in range(2))
    assigned.load_state_dict(expected.state_dict(), assign=True)
    empty.to_empty(device="cpu").load_state_dict(expected.state_dict())
    ranks = {"random": random_ranks((6, 6), 0), "uniform": uniform_ranks((6, 6))}[name]
    assert torch.equal(empty.selector.ranks, ranks)
    for module in (empty, assigned):
        assert torch.equal(module(IMAGES).ids, expected(IMAGES).ids)


def exported(name: str) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """A selector as a program for a batch of any size, and features of another batch."""
    example = features(2)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    inputs = (example["tokens"], example["scores"], example["keys"])
    return torch.export.export(Chooser(name), inputs, dynamic_shapes=(batch, batch, batch)), features(3, seed=5)


class TestPruMergePlus:
    @pytest.mark.parametrize("spaced", [6, 7, 11, 13])
    def test_spaced_tokens_reach_the_end_of_the_image(self, spaced: int) -> None:
        """Only spaced tokens are kept of the second half, where no score is, and no gap is longer than a stretch."""
        given = features()
        given["scores"] = torch.zeros(3, NUMBER)
        given["scores"][:, : NUMBER // 2] = 1
        chosen = choose("prumerge_plus", 2 * spaced + 1, given, neighbours=4)
        late = chosen.ids[0, chosen.ids[0] >= NUMBER // 2]
        gaps = torch.cat([late, torch.tensor([NUMBER])]).diff()
        assert gaps.max() <= -(-NUMBER // spaced)

    def test_spaced_tokens_are_those_of_the_release_at_an_eighth(self) -> None:
        """The release begins in the middle of the first stretch of 1 / ratio tokens and goes on by as many."""
        given = features()
        given["scores"] = torch.rand(3, NUMBER) * 1e-6
        chosen = choose("prumerge_plus", 2 * NUMBER // 8 + 1, given)
        assert set(range(4, NUMBER, 8)) <= set(chosen.ids[0].tolist())


class TestSelection:
    def test_positions_are_those_of_the_dense_grid(self) -> None:
        chosen = choose("uniform", KEPT, features())
        assert torch.equal(chosen.positions()[..., 0] * GRID[1] + chosen.positions()[..., 1], chosen.ids)
        assert torch.equal(chosen.positions(7), chosen.positions() + 7)
        video = chosen._replace(grid=(2, 3, 8))
        assert torch.equal(video.positions() @ torch.tensor([24, 8, 1]), chosen.ids)

    @pytest.mark.parametrize("name", ["class_attention", "divprune", "cdpruner", "todre", "random", "uniform"])
    def test_same_cells_of_the_full_grid_are_the_tokens_where_nothing_is_merged(self, name: str) -> None:
        given = features()
        chosen = choose(name, KEPT, given)
        assert torch.equal(chosen.take(given["tokens"]), chosen.tokens)
        with pytest.raises(ValueError, match="take needs a tensor of 3 images and 48 cells"):
            chosen.take(given["tokens"][:, 1:])

    def test_packed_tokens_have_no_padding(self) -> None:
        chosen = choose("prumerge", None, features())
        packed = chosen.packed()
        assert len(set(chosen.counts.tolist())) > 1, "images of equal counts would show nothing"
        assert packed.cu_seqlens.tolist() == [0, *chosen.counts.cumsum(0).tolist()]
        for image, count in enumerate(chosen.counts.tolist()):
            start = int(packed.cu_seqlens[image])
            assert torch.equal(packed.tokens[start : start + count], chosen.tokens[image, :count])


class TestCDPruner:
    @pytest.mark.parametrize("seed", range(4))
    def test_tokens_of_low_relevance_are_picked_as_in_float64(self, seed: int) -> None:
        """Relevances over many orders of magnitude, whose variances are far below the largest but no rounding error."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 96, 512, generator=generator)
        relevance = torch.rand(2, 96, generator=generator).pow(6) + 1e-6
        exact = determinant_order(x.double(), 64, relevance.double())[0]
        assert torch.equal(determinant_order(x, 64, relevance)[0], exact)


class TestShares:
    """Shares as decimal fractions, of which a product in binary may fall short."""

    @pytest.mark.parametrize(
        ("share", "grid", "expected"),
        [(0.29, (10, 10), 29), (1 / 49, (7, 7), 1), (0.57, (10, 10), 57), (0.299, (10, 10), 29), (1.0, (24, 24), 576)],
    )
    def test_a_share_of_whole_cells_is_their_number(self, share: float, grid: tuple[int, int], expected: int) -> None:
        for name in ("class_attention", "visionzip", "cdpruner", "uniform", "todre", "aim"):
            assert effvit.count_tokens(name, grid, keep=share) == expected

    def test_matryoshka_takes_shares_of_a_few_digits(self) -> None:
        """576 tokens pooled by 3 x 3 are 64, a share of 0.1111."""
        assert effvit.count_tokens("matryoshka", (24, 24), keep=0.1111) == 64
        assert effvit.count_tokens("matryoshka", (24, 24), keep=0.0625) == 36


class TestCells:
    def test_cells_are_pixel_unshuffle_row_by_row(self) -> None:
        x = torch.rand(2, NUMBER, 5)
        cells = to_cells(x, GRID, 2).unflatten(2, (4, 5))
        for row in range(3):
            for column in range(4):
                patches = [(2 * row + i) * 8 + 2 * column + j for i in (0, 1) for j in (0, 1)]
                assert torch.equal(cells[:, row * 4 + column], x[:, patches])
        assert torch.equal(cell_means(x, GRID, 2), cells.mean(2))

    def test_merged_cells_are_chosen_by_the_mean_of_their_scores(self) -> None:
        given = features()
        chosen = choose("class_attention", 3, given, merge=2)
        means = cell_means(given["scores"], GRID, 2)
        assert torch.equal(chosen.ids, means.topk(3).indices.sort(1).values)
        assert torch.equal(chosen.tokens, chosen.take(to_cells(given["tokens"], GRID, 2)))
        assert chosen.grid == (3, 4)
        assert effvit.count_tokens("class_attention", GRID, keep=0.5, merge=2) == 6

    def test_grid_that_a_merger_does_not_divide_is_refused_by_side(self) -> None:
        with pytest.raises(ValueError, match="the width of the grid 6 x 8 is 8; resize or pad"):
            choose("divprune", 2, features(), merge=3)


class TestTower:
    def test_tokens_of_a_block_are_timms_and_blocks_behind_it_do_not_run(self) -> None:
        tower = make_tower(depth=4)
        ran = []
        for i, block in enumerate(tower.blocks):
            block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        chosen = effvit.select_tokens(tower, IMAGES, "divprune", keep=9)
        assert ran == [0, 1, 2]
        dense, prefix = tower.forward_intermediates(
            IMAGES, indices=[-2], norm=False, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )[0]
        assert torch.equal(chosen.take(dense), chosen.tokens)
        assert torch.equal(chosen.prefix, prefix)
        reduced = effvit.sparsify(tower, "evit", keep_rate=1.0)
        features = reduced.forward_tokens(IMAGES, block=-2)
        assert torch.equal(features.x, torch.cat([prefix, dense], 1))
        with pytest.raises(ValueError, match=r"block must be in -4 to 3 for a model of 4 blocks, got 4"):
            reduced.forward_tokens(IMAGES, block=4)

    def test_of_a_block_that_is_only_read_nothing_runs_behind_its_projections(self) -> None:
        tower = make_tower(depth=4)
        ran = []
        for i, block in enumerate(tower.blocks):
            for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp"):
                block.get_submodule(name).register_forward_hook(lambda *_, at=f"{i}.{name}": ran.append(at))
        effvit.select_tokens(tower, IMAGES, "prumerge", keep=5, block=1, neighbours=4)
        # Of the last projection the rows of queries and keys are taken: no values are made.
        assert ran[-6:] == ["2.norm1", "2.attn.qkv", "2.attn.proj", "2.norm2", "2.mlp", "3.norm1"]
        ran.clear()
        effvit.select_tokens(tower, IMAGES, "prumerge", keep=5, block=-1, neighbours=4)
        assert ran[-1] == "3.mlp", "the tokens leave behind the block that is read"

    def test_the_tower_stays_as_it_was(self) -> None:
        tower = make_tower()
        before, kinds = tower(IMAGES), [type(m) for m in tower.modules()]
        effvit.select_tokens(tower, IMAGES, "visionzip", keep=9)
        assert torch.equal(tower(IMAGES), before)
        assert [type(m) for m in tower.modules()] == kinds

    def test_scores_are_the_rows_and_columns_of_the_softmax_map(self) -> None:
        tower = make_tower(reg_tokens=2, class_token=True)
        maps = softmax_maps(tower, IMAGES)
        prefix = tower.num_prefix_tokens
        by_class = effvit.select_tokens(tower, IMAGES, "class_attention", keep=5, block=1)
        torch.testing.assert_close(by_class.scores, maps[1].mean(1)[:, 0, prefix:], rtol=1e-5, atol=1e-6)
        received = effvit.select_tokens(tower, IMAGES, "class_attention", keep=5, block=1, scores="received")
        torch.testing.assert_close(received.scores, maps[1].mean((1, 2))[:, prefix:], rtol=1e-5, atol=1e-6)
        last = effvit.select_tokens(tower, IMAGES, "prumerge", keep=5, block=0)
        state = projections(tower, IMAGES, 2)
        torch.testing.assert_close(last.scores, one_head(*state)[:, prefix:], rtol=1e-5, atol=1e-6)

    def test_tower_without_class_token_needs_to_be_told_by_what(self) -> None:
        tower = make_tower(class_token=False, global_pool="avg")
        with pytest.raises(ValueError, match="the tower has none; give scores='received'"):
            effvit.select_tokens(tower, IMAGES, "visionzip", keep=9)
        with pytest.raises(ValueError, match="the tower has none; use a method that needs features alone"):
            effvit.select_tokens(tower, IMAGES, "prumerge")
        with pytest.raises(ValueError, match="the attention received is no substitute"):
            effvit.select_tokens(tower, IMAGES, "prumerge", scores="received")
        assert effvit.select_tokens(tower, IMAGES, "visionzip", keep=9, scores="received").tokens.shape == (2, 9, 32)

    def test_reduced_tower_names_the_patches_of_the_image(self) -> None:
        tower = effvit.sparsify(make_tower(depth=4), "tome", r=[9, 9])
        features = tower.forward_tokens(IMAGES, block=-2)
        chosen = effvit.select_tokens(tower, IMAGES, "class_attention", keep=5)
        for image in range(2):
            for place, cell in enumerate(chosen.ids[image].tolist()):
                token = features.tokens.source[image, cell]
                assert torch.equal(chosen.tokens[image, place], features.x[image, 1 + token])
                members = (features.tokens.source[image] == token).nonzero().flatten()
                assert (chosen.group[image, members] == place).all()
        with pytest.raises(ValueError, match=r"is to keep 20 tokens, but only 18 leave the tower"):
            effvit.select_tokens(tower, IMAGES, "divprune", keep=20)

    def test_reduced_tower_is_refused_where_scores_or_cells_are_of_other_tokens(self) -> None:
        dense = make_tower(depth=4)
        tower = effvit.sparsify(dense, "tome", r=[0, 0, 9, 0])
        with pytest.raises(ValueError, match="tome reduces tokens in block 2, so that they are scores of other tokens"):
            effvit.select_tokens(tower, IMAGES, "class_attention", keep=5)
        assert effvit.select_tokens(tower, IMAGES, "prumerge", keep=5, block=2, neighbours=4).counts.tolist() == [5, 5]
        with pytest.raises(ValueError, match="a merger of 2 x 2 needs all patches in place, but tome leaves 27 of 36"):
            effvit.select_tokens(tower, IMAGES, "divprune", keep=5, merge=2)
        with pytest.raises(ValueError, match="matryoshka needs all patches in place"):
            effvit.select_tokens(tower, IMAGES, "matryoshka", keep=9)
        ragged = effvit.sparsify(dense, "ats", reduce_at=[1], keep_rate=0.5)
        with pytest.raises(ValueError, match="ats leaves tokens that differ in number"):
            effvit.select_tokens(ragged, IMAGES, "divprune", keep=5)

    def test_relevance_follows_the_patches_of_a_reduced_tower(self) -> None:
        tower = effvit.sparsify(make_tower(depth=4), "tome", r=[9, 9])
        relevance = torch.zeros(2, 36) + 1e-3
        anchors = tower.forward_tokens(IMAGES, block=-2).tokens.anchor
        relevance.scatter_(1, anchors[:, :1], 1.0)
        chosen = effvit.select_tokens(tower, IMAGES, "cdpruner", keep=5, relevance=relevance)
        assert (chosen.ids == anchors[:, :1]).any(1).all()

    def test_patches_of_large_norm_rank_last(self) -> None:
        given = features()
        given["tokens"][:, 7] *= 100
        given["scores"][:, 7] = 1
        assert (choose("class_attention", 5, given).ids == 7).any(1).all()
        assert not (choose("class_attention", 5, given, max_norm=50.0).ids == 7).any()

    def test_patches_of_large_norm_are_behind_those_of_the_lowest_score(self) -> None:
        given = features()
        given["tokens"][:, 7] *= 100
        given["scores"] = torch.zeros_like(given["scores"])
        chosen = choose("class_attention", NUMBER - 1, given, max_norm=50.0)
        assert torch.equal(chosen.mask(), (torch.arange(NUMBER) != 7).expand(3, -1))
        of_cells = choose("class_attention", NUMBER // 4 - 1, given, max_norm=50.0, merge=2)
        assert torch.equal(of_cells.mask(), (torch.arange(NUMBER // 4) != 3).expand(3, -1))

    @pytest.mark.parametrize("outlier", [7, 40])
    def test_contextual_tokens_are_those_without_the_patches_of_large_norm(self, outlier: int) -> None:
        """Against the same tokens on a grid that lacks the patch."""
        given = of_use("visionzip", features())
        place = torch.tensor([i for i in range(NUMBER) if i != outlier])
        without = {key: value[:, place] for key, value in given.items() if isinstance(value, Tensor)}
        given["tokens"][:, outlier] *= 100
        expected = choose("visionzip", 12, without | {"grid": (1, NUMBER - 1)}, contextual=5)
        chosen = choose("visionzip", 12, given, contextual=5, max_norm=50.0)
        assert torch.equal(chosen.ids, place[expected.ids])
        assert torch.equal(chosen.tokens, expected.tokens)
        assert (chosen.group[:, outlier] == -1).all()

    def test_means_are_summed_in_float32(self) -> None:
        """Those of tokens in bfloat16 are those of the same numbers in float32, rounded once."""
        x = (3 + 0.3 * features()["tokens"]).bfloat16()
        keys, dominant = features()["keys"], torch.zeros(3, 1, dtype=torch.int64)
        for means in (lambda x: contextual_tokens(x, keys, dominant, 2).tokens, lambda x: merge_round(x, 24).tokens):
            assert torch.equal(means(x), means(x.float()).bfloat16())

    def test_rotary_towers_choose_too(self) -> None:
        tower = timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=3, embed_dim=48, num_heads=2).eval()
        images = torch.rand(1, 3, 64, 64)
        chosen = effvit.select_tokens(tower, images, "visionzip", keep=6)
        dense = tower.forward_intermediates(
            images, indices=[-2], norm=False, intermediates_only=True, output_fmt="NLC"
        )[0]
        contextual = chosen.scores[0].topk(6).indices  # no contextual token of so few: 6 * 10 // 64 is 0
        assert torch.equal(chosen.tokens[0], dense[0, contextual.sort().values])

    def test_gradients_reach_the_blocks_that_run_through_checkpoints_too(self) -> None:
        tower = make_tower().train()
        gradients = []
        for checkpointing in (False, True):
            tower.set_grad_checkpointing(checkpointing)
            tower.zero_grad()
            effvit.select_tokens(tower, IMAGES, "visionzip", keep=9, contextual=3).tokens.square().sum().backward()
            assert tower.blocks[2].mlp.fc1.weight.grad is None
            gradients.append(tower.blocks[0].attn.qkv.weight.grad)
        torch.testing.assert_close(*gradients)

    def test_module_comes_back_from_a_file_and_in_half_precision(self) -> None:
        module = effvit.TokenSelector(make_tower(), "visionzip", keep=9)
        again = pickle.loads(pickle.dumps(module))
        assert torch.equal(again(IMAGES).tokens, module(IMAGES).tokens)
        assert again.half()(IMAGES.half()).tokens.dtype == torch.float16

    def test_images_of_any_size_have_their_own_grid(self) -> None:
        tower = make_tower(dynamic_img_size=True)
        chosen = effvit.select_tokens(tower, torch.rand(1, 3, 64, 40), "uniform", keep=0.5)
        assert chosen.grid == (8, 5)
        assert chosen.counts.tolist() == [20]
        with pytest.raises(ValueError, match="the width of the grid 8 x 5 is 5; resize or pad"):
            effvit.select_tokens(tower, torch.rand(1, 3, 64, 40), "uniform", keep=0.5, merge=2)

    def test_compiled_tower_is_one_graph(self) -> None:
        module = effvit.TokenSelector(make_tower(), "visionzip", keep=9, contextual=3)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(IMAGES).ids, module(IMAGES).ids)

    def test_exported_tower_gives_its_tokens(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.selector = effvit.TokenSelector(make_tower(), "visionzip", keep=9, contextual=3)

            def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
                return self.selector(images)[:2]

        module = Tokens().eval()
        program = torch.export.export(module, (IMAGES,))
        tokens, ids = program.module()(IMAGES.flip(0))
        assert torch.equal(ids, module(IMAGES.flip(0))[1])
        torch.testing.assert_close(tokens, module(IMAGES.flip(0))[0])


def projections(tower: VisionTransformer, images: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, heads, P+N, D) of a block of timm's tower."""
    x = tower.norm_pre(tower._pos_embed(tower.patch_embed(images)))
    for before in tower.blocks[:block]:
        x = before(x)
    attn = tower.blocks[block].attn
    qkv = attn.qkv(tower.blocks[block].norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return q, k


def softmax_maps(tower: VisionTransformer, images: Tensor) -> list[Tensor]:
    pairs = [projections(tower, images, block) for block in range(len(tower.blocks))]
    return [(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) for q, k in pairs]


def one_head(q: Tensor, k: Tensor) -> Tensor:
    q, k = q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2)
    return (q[:, :1] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)[:, 0]


class TestRefusals:
    @pytest.mark.parametrize("value", [0.5, "x", [1.0], {}, object(), torch.zeros(2, 48, 24).numpy()])
    def test_features_that_are_no_tensors_are_named(self, value: Any) -> None:
        given = features()
        for name, method in (("tokens", "divprune"), ("keys", "visionzip"), ("relevance", "cdpruner")):
            with pytest.raises(
                TypeError, match=rf"^{name} must be a tensor, got {type(value).__name__}; torch\.as_tensor"
            ):
                choose(method, 4, given | {name: value})
        with pytest.raises(TypeError, match=r"scores of tokens are a tensor \(B, N\), got"):
            choose("class_attention", 4, given | {"scores": value})
        with pytest.raises(TypeError, match="relevance must be a tensor, got"):
            effvit.select_tokens(make_tower(), IMAGES, "cdpruner", keep=4, relevance=value)
        with pytest.raises(TypeError, match="parts must be a tensor, got"):
            effvit.select_parts(make_tower(), value, "hired", crops=(1, 2), keep=0.5)
        with pytest.raises(ValueError, match="are 3 parts, got a single number"):
            effvit.select_parts(make_tower(), torch.tensor(3.0), "hired", crops=(1, 2), keep=0.5)

    def test_infinite_scores_are_ranks_but_no_weights(self) -> None:
        """Minus infinity masks a cell where scores are ranked; a mean with such a weight would be NaN."""
        given = features()
        given["scores"][1, 40:] = -math.inf
        for method in ("class_attention", "visionzip"):
            chosen = choose(method, 9, given)
            assert chosen.tokens.isfinite().all()
        assert (choose("class_attention", 9, given).ids[1] < 40).all()
        for method in ("prumerge", "prumerge_plus", "recoverable"):
            with pytest.raises(ValueError, match=f"{method}: the scores are infinite for image 1 of the batch"):
                choose(method, None, given)
        bare = {name: given[name] for name in ("tokens", "grid", "scores")}
        with pytest.raises(ValueError, match="globalcom2: the scores are infinite for image 1"):
            effvit.select_parts(None, None, "globalcom2", crops=(1, 2), keep=0.5, **bare)
        finite = features()
        early = finite["scores"].clone()
        early[2, 0] = math.inf
        bare = {name: finite[name] for name in ("tokens", "grid", "scores")}
        with pytest.raises(ValueError, match="hired: the early scores are infinite for image 2"):
            effvit.select_parts(None, None, "hired", crops=(1, 2), keep=0.5, early=early, **bare)

    @pytest.mark.parametrize(("keep", "number"), [(np.int64(9), 9), (np.float32(0.25), 12)])
    def test_numbers_of_numpy_are_numbers(self, keep: Any, number: int) -> None:
        assert choose("divprune", keep, features()).counts.tolist() == [number] * 3
        assert effvit.count_tokens("divprune", GRID, keep=keep) == number

    @pytest.mark.parametrize("name", ["holitom", "globalcom2"])
    @pytest.mark.parametrize("keep", [None, 1, 2, True, "x", -0.5, 1.5, math.nan])
    def test_shares_of_all_cells_are_no_numbers(self, name: str, keep: Any) -> None:
        """One token is not all of them, and a number laid out beforehand is refused there already."""
        message = re.escape(f"{name} shares out a ratio, got keep={keep!r}; give a share in (0, 1], such as 0.25")
        given = {key: features()[key] for key in ("tokens", "grid", "scores")}
        choose_all = effvit.select_video if name == "holitom" else effvit.select_parts
        cut = {} if name == "holitom" else {"crops": (1, 2)}
        with pytest.raises(ValueError, match=message):
            choose_all(None, None, name, keep=keep, **given, **cut)
        with pytest.raises(ValueError, match=message):
            effvit.count_tokens(name, GRID, keep=keep, frames=3)
        assert effvit.count_tokens(name, GRID, keep=0.5, frames=3) is None

    def test_number_for_a_method_that_finds_its_own_is_refused(self) -> None:
        class Own(Selector):
            name = "own"
            summary = "keep what is above the mean"

            def adapt(self, features: Features) -> Choice:
                raise NotImplementedError

        with pytest.raises(
            ValueError, match="own finds by itself how many tokens an image needs, got keep=4; leave it out"
        ):
            choose(Own(), 4, features())

    def test_empty_batch_gives_an_empty_selection(self) -> None:
        given = features()
        none = {name: given[name][:0] for name in ("tokens", "scores", "keys")} | {"grid": GRID}
        for method in ("recoverable", "prumerge", "divprune"):
            chosen = choose(method, 9 if method == "divprune" else None, none)
            assert len(chosen.tokens) == len(chosen.counts) == 0

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
    def test_features_that_cannot_be_averaged_are_refused(self, dtype: torch.dtype) -> None:
        """Means of whole numbers would be rounded, and large scores to equal ones, without a word."""
        given = features()
        for name in ("tokens", "keys", "scores"):
            message = f"{name} must be of a floating-point dtype, got {dtype}"
            with pytest.raises(TypeError, match=message):
                choose("visionzip", 4, given | {name: given[name].to(dtype)})

    @pytest.mark.parametrize(
        ("keep", "message"),
        [
            (0, "keep must be in 1 to 48, the cells of the grid, got 0"),
            (49, "keep must be in 1 to 48, the cells of the grid, got 49; 1.0 keeps all"),
            (1.5, r"keep must be a whole number of tokens or a share in \(0, 1\], got 1.5"),
            (0.001, "keep=0.001 of 48 cells leaves no token"),
            (None, "divprune needs keep: a number of tokens, 1 to 48 here"),
        ],
    )
    def test_number_out_of_range_is_named(self, keep: float | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            choose("divprune", keep, features())
        with pytest.raises(ValueError, match=message):
            effvit.count_tokens("divprune", GRID, keep=keep)

    @pytest.mark.parametrize(
        ("name", "keep", "settings", "message"),
        [
            ("visionzip", 12, {"contextual": 12}, "contextual=12 of keep=12 tokens leaves no dominant one"),
            ("prumerge", 9, {"neighbours": 48}, "needs more tokens than that, got 48; give fewer neighbours"),
            ("prumerge", None, {"neighbours": 48}, "needs more tokens than that, got 48; give fewer neighbours"),
            ("prumerge", 1, {}, "prumerge needs keep of at least 2"),
            (
                "recoverable",
                9,
                {},
                "recoverable finds by itself how many tokens an image needs, got keep=9; leave it out",
            ),
            ("recoverable", None, {"neighbours": 47}, "adds 47 neighbours to a token, but keeps"),
            ("llava_mini", 4, {}, "llava_mini chooses by weights that are trained, and a name brings none; make one, "),
            ("cdpruner", 25, {}, "as many tokens apart as they have channels, 24, got keep=25"),
            ("matryoshka", 13, {}, "of 6 x 8 cells it gives 48, 12 tokens, got keep=13"),
            ("todre", 12, {"version": "v3"}, "version must be one of v1, v2, got 'v3'"),
            ("divprune", 12, {"seed": 1}, "divprune has no setting 'seed'; it has none"),
            ("divprun", 12, {}, "unknown selector 'divprun'; did you mean divprune"),
            ("tome", 12, {}, "'tome' is a method that acts inside a model; use effvit.sparsify"),
        ],
    )
    def test_what_a_method_cannot_do_is_a_sentence(
        self, name: str, keep: int | None, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            choose(name, keep, features(), **settings)

    @pytest.mark.parametrize(("value", "rule"), [(-0.1, "negative"), (0.0, "all 0"), (float("inf"), "infinite")])
    def test_relevance_that_scales_nothing_is_refused(self, value: float, rule: str) -> None:
        """Cosines are no relevances of CDPruner: a negative one counts as much as its positive."""
        relevance = torch.rand(3, NUMBER) + 0.1
        relevance[1, slice(None) if value == 0 else 4] = value
        message = f"cdpruner: the relevances are {rule} for image 1 of the batch; .* as relevance_to_text does"
        with pytest.raises(ValueError, match=message):
            choose("cdpruner", 9, features(), relevance=relevance)
        choose("recoverable", None, features(), relevance=torch.rand(3, NUMBER) - 0.5)  # cosines are its own

    def test_missing_scores_and_keys_are_asked_for(self) -> None:
        given = features()
        bare = {"tokens": given["tokens"], "grid": GRID}
        with pytest.raises(ValueError, match=r"only tokens were given; give scores= \(B, N\) and keys= \(B, N, D\)"):
            choose("visionzip", 9, bare)
        with pytest.raises(ValueError, match="visionzip compares keys of the tower's attention"):
            choose("visionzip", 9, bare | {"scores": given["scores"]})
        with pytest.raises(TypeError, match=r"tokens need grid=\(H, W\)"):
            effvit.select_tokens(None, None, "divprune", keep=9, tokens=given["tokens"])
        with pytest.raises(ValueError, match=r"tokens must be \(B, 48, C\) for a grid of \(6, 8\)"):
            choose("divprune", 9, {"tokens": given["tokens"][:, 1:], "grid": GRID})
        message = r"give a tower and its images \(parts, frames\), or tokens= and grid= without them"
        with pytest.raises(TypeError, match=message):
            effvit.select_tokens(make_tower(), None, "divprune", keep=9)
        with pytest.raises(TypeError, match=message):
            effvit.select_parts(make_tower(), None, "divprune", crops=(1, 2), keep=9)
        with pytest.raises(TypeError, match=message):
            effvit.select_video(make_tower(), IMAGES, keep=0.5, tokens=given["tokens"], grid=GRID)

    def test_what_would_be_ignored_is_refused(self) -> None:
        given = features()
        tower, bare = make_tower(), {"tokens": given["tokens"], "grid": GRID}
        for name, value in (("max_norm", 9.0), ("scores", "received"), ("relevance", torch.rand(2, 36))):
            message = f"divprune does not use {name}, which would change nothing; leave it out, or use"
            with pytest.raises(ValueError, match=message):
                effvit.select_tokens(tower, IMAGES, "divprune", keep=4, **{name: value})
        for name, value in (("max_norm", 9.0), ("scores", given["scores"]), ("keys", given["keys"])):
            with pytest.raises(ValueError, match=f"divprune does not use {name}, which would change nothing"):
                effvit.select_tokens(None, None, "divprune", keep=4, **bare, **{name: value})
        with pytest.raises(ValueError, match="visionzip does not use early"):
            effvit.select_parts(None, None, "visionzip", crops=(1, 2), keep=4, **given, early=given["scores"])
        with pytest.raises(
            ValueError, match=r"class_attention does not use relevance, .* use one of cdpruner, recoverable"
        ):
            choose("class_attention", 4, given, relevance=given["scores"])
        with pytest.raises(TypeError, match=r"scores of tokens are a tensor \(B, N\), got 'received'"):
            choose("class_attention", 4, given | {"scores": "received"})
        with pytest.raises(TypeError, match="scores, keys, early and grid of a tower are its own"):
            effvit.select_tokens(make_tower(), IMAGES, "class_attention", keep=4, scores=given["scores"])
        with pytest.raises(ValueError, match=r"relevance must be for \(2, 36\) patches, got \(2, 30\)"):
            effvit.select_tokens(make_tower(), IMAGES, "cdpruner", keep=4, relevance=torch.rand(2, 30))

    @pytest.mark.parametrize(
        ("method", "name", "shape", "message"),
        [
            ("class_attention", "scores", (3, 48, 1), r"scores must be \(B, N\) = \(3, 48\), got shape \(3, 48, 1\)"),
            ("cdpruner", "relevance", (3, 48, 1), r"relevance must be \(B, N\) = \(3, 48\), got shape \(3, 48, 1\)"),
            ("visionzip", "keys", (3, 48), r"keys must be \(B, N, D\) = \(3, 48, D\), got shape \(3, 48\)"),
        ],
    )
    def test_other_shapes_are_named(self, method: str, name: str, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            choose(method, 9, features() | {name: torch.rand(shape)})

    @pytest.mark.parametrize(
        ("name", "keep", "settings", "message"),
        [
            ("prumerge", 1, {}, "prumerge needs keep of at least 2, one token for those not kept, got 1"),
            ("prumerge_plus", 9, {"neighbours": 48}, "needs more tokens than that, got 48; give fewer neighbours"),
            ("prumerge", None, {"neighbours": 48}, "needs more tokens than that, got 48; give fewer neighbours"),
            ("visionzip", 12, {"contextual": 12}, "contextual=12 of keep=12 tokens leaves no dominant one"),
        ],
    )
    def test_a_number_that_is_refused_is_not_counted(
        self, name: str, keep: int | None, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            effvit.count_tokens(name, GRID, keep=keep, **settings)
        with pytest.raises(ValueError, match=message):
            choose(name, keep, features(), **settings)
        assert effvit.count_tokens(name, GRID, keep=1.0, **settings) == NUMBER

    def test_grids_and_crops_are_two_sides(self) -> None:
        given = features()
        with pytest.raises(TypeError, match="grid must be two whole numbers, rows and columns, got 24"):
            effvit.count_tokens("divprune", 24, keep=4)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="grid must be two whole numbers, rows and columns, got 48"):
            choose("divprune", 4, given | {"grid": 48})
        with pytest.raises(ValueError, match="grid must be at least 1, got 0"):
            effvit.count_tokens("divprune", (0, 24), keep=4)
        with pytest.raises(TypeError, match="crops must be two whole numbers, rows and columns, got 2"):
            effvit.select_parts(None, None, "divprune", keep=4, crops=2, **of_use("divprune", given))  # type: ignore[arg-type]

    def test_patch_dropout_is_named_where_all_patches_are_needed(self) -> None:
        tower = make_tower(patch_drop_rate=0.5).train()
        message = r"needs all patches in place, but patch_drop_rate is on and leaves 18 of 36; call eval\(\)"
        with pytest.raises(ValueError, match=f"uniform {message}"):
            effvit.select_tokens(tower, IMAGES, "uniform", keep=4)
        with pytest.raises(ValueError, match=f"a merger of 2 x 2 {message}"):
            effvit.select_tokens(tower, IMAGES, "divprune", keep=4, merge=2)
        assert effvit.select_tokens(tower.eval(), IMAGES, "uniform", keep=4).counts.tolist() == [4, 4]

    def test_class_that_cannot_be_a_tower_is_told_how_to_take_part(self) -> None:
        with pytest.raises(TypeError, match="or run the tower and give what leaves it, merger included, as tokens="):
            effvit.select_tokens(nn.Linear(3, 3), IMAGES, "divprune", keep=9)

    def test_scores_of_towers_with_relative_positions_have_their_biases(self) -> None:
        """Against the softmax of the class token's logits, which timm's own module gives."""
        tower = make_host("beit")
        x = make_images(tower)
        read: list[Tensor] = []
        tower.blocks[-1].attn.attn_drop.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        for block in tower.blocks:
            block.attn.fused_attn = False
        tower(x)
        expected = read[0][:, :, 0, 1:].mean(1)  # (B, N)
        chosen = effvit.select_tokens(tower, x, "class_attention", keep=9, block=-1)
        assert torch.allclose(chosen.scores, expected, atol=1e-6)
        with pytest.raises(ValueError, match="bias each head in its own way; use 'visionzip'"):
            effvit.select_tokens(tower, x, "prumerge", keep=9)

    def test_sparsify_takes_no_selector(self) -> None:
        with pytest.raises(TypeError, match=r"a method is a subclass of effvit.Reducer, got .*RandomCells"):
            effvit.sparsify(make_tower(), SELECTORS["random"])  # type: ignore[arg-type]


class TestRegistration:
    def test_a_selector_of_ones_own_is_one_class(self) -> None:
        @effvit.register_method
        class Largest(Selector):
            """Keep the tokens of the largest norm."""

            name = "largest"
            summary = "keep the tokens of the largest norm"

            def choose(self, features: Features, kept: int) -> Choice:
                return Choice(features.x.norm(dim=-1).topk(kept, dim=1).indices)

        try:
            assert "largest" in effvit.list_selectors("lar*")
            assert effvit.register_method(Largest) is Largest
            given = features()
            norms = choose("largest", 4, given).take(given["tokens"].norm(dim=-1))
            assert torch.equal(norms.amin(1), given["tokens"].norm(dim=-1).topk(4).values.amin(1))
            assert effvit.select_tokens(make_tower(), IMAGES, Largest(), keep=4).counts.tolist() == [4, 4]
        finally:
            del SELECTORS["largest"]

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([0, 1, 2], r"own must choose ids \(B, 4\), got shape \(3, 3\)"),
            ([0, 1, 2, 2], "own: the ids are doubled in image 0 of the batch"),
            ([0, 1, 2, 48], "own: the ids are no places of 0 to 47 in image 0 of the batch"),
        ],
    )
    def test_ids_that_are_no_choice_are_refused(self, ids: list[int], message: str) -> None:
        class Own(Selector):
            name = "own"
            summary = "whatever it is told"

            def choose(self, features: Features, kept: int) -> Choice:
                return Choice(torch.tensor(ids).expand(features.x.shape[0], -1))

        with pytest.raises(ValueError, match=message):
            choose(Own(), 4, features())

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            (lambda ids: ids, "own must return an effvit.selectors.Choice, got Tensor"),
            (lambda ids: None, "own must return an effvit.selectors.Choice, got NoneType"),
            (lambda ids: Choice(ids[:1]), r"own must choose ids \(B, 4\), got shape \(1, 4\) for 3 images"),
            (lambda ids: Choice(ids.float()), r"ids must be \(3, 4\) of torch.int64, got \(3, 4\) of torch.float32"),
            (lambda ids: Choice(ids, torch.rand(3, 7, 24)), r"tokens must be \(3, 4, 'C'\), got shape \(3, 7, 24\)"),
            (lambda ids: Choice(ids, torch.rand(3, 4)), r"tokens must be \(3, 4, 'C'\), got shape \(3, 4\)"),
            (
                lambda ids: Choice(ids, torch.full((3, 4, 24), math.nan)),
                "own: the tokens that leave are NaN for image 0",
            ),
            (lambda ids: Choice(ids, group=ids), r"group must be \(3, 48\) of torch.int64, got \(3, 4\)"),
            (lambda ids: Choice(ids, group=groups(ids).float()), "of torch.int64, got .* of torch.float32"),
            (lambda ids: Choice(ids, group=groups(ids) + 1), "own: the group must be -1 or a place of 0 to 3, got"),
            (lambda ids: Choice(ids, group=groups(ids.flip(1))), r"group of image 0 .* group\[ids\[k\]\] must be k"),
            (lambda ids: Choice(ids, valid=ids >= 0), "a choice with padding names its groups; give group"),
            (
                lambda ids: Choice(ids, group=groups(ids), valid=ids[:, :2] >= 0),
                r"valid must be \(3, 4\) of torch.bool",
            ),
        ],
    )
    def test_what_is_no_choice_is_refused(self, choice: Callable[[Tensor], Any], message: str) -> None:
        class Own(Selector):
            name = "own"
            summary = "whatever it is told"

            def choose(self, features: Features, kept: int) -> Choice:
                return choice(torch.arange(kept).expand(len(features.x), -1))  # type: ignore[no-any-return]

        with pytest.raises((TypeError, ValueError), match=message):
            choose(Own(), 4, features())

    def test_keys_are_read_without_scores(self) -> None:
        class Long(Selector):
            name = "long_keys"
            summary = "keep the patches with the longest keys"
            keys = "mean"

            def choose(self, features: Features, kept: int) -> Choice:
                assert features.keys is not None
                assert features.scores is None
                return Choice(features.keys.norm(dim=-1).topk(kept, dim=1).indices)

        chosen = effvit.select_tokens(make_tower(), IMAGES, Long(), keep=4)
        assert chosen.counts.tolist() == [4, 4]
        alone = effvit.select_tokens(make_tower(), IMAGES[1:], Long(), keep=4)
        assert alone.ids.shape == (1, 4)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"row": "nope"}, "row of .* must be one of attention, logits, one_head, received, got 'nope'"),
            ({"keys": "nope"}, "keys of .* must be one of mean, joined, got 'nope'"),
            ({"takes": "nope"}, "takes of .* must be one of select_tokens, select_parts, select_video, got 'nope'"),
            ({"reads_first": True}, "has reads_first, the scores of the first block, but no row; set one"),
        ],
    )
    def test_what_no_tower_gives_is_refused(self, wrong: dict[str, Any], message: str) -> None:
        parts = {"name": "own", "summary": "x", "choose": lambda self, features, kept: None}
        with pytest.raises(ValueError, match=message):
            effvit.register_method(type("Own", (Selector,), parts | wrong))
        assert "own" not in SELECTORS

    def test_names_of_arguments_are_no_settings(self) -> None:
        class Blocked(Selector):
            name = "blocked"
            summary = "has a setting of the name of an argument"

            def __init__(self, *, block: int = 3) -> None:
                super().__init__()

            def choose(self, features: Features, kept: int) -> Choice:
                raise NotImplementedError

        with pytest.raises(ValueError, match=r"has a setting 'block', which effvit\.select_tokens or its like takes"):
            effvit.register_method(Blocked)
        functions = (
            effvit.select_tokens,
            effvit.select_parts,
            effvit.select_video,
            effvit.count_tokens,
            effvit.TokenSelector,
        )
        assert {name for function in functions for name in inspect.signature(function).parameters} == RESERVED

    def test_incomplete_or_doubled_selectors_are_refused(self) -> None:
        class Nameless(Selector):
            pass

        class Idle(Selector):
            name = "idle"
            summary = "does nothing"

        class Taken(SELECTORS["divprune"]):  # type: ignore[name-defined,misc]
            pass

        for selector, message in (
            (Nameless, "has no name; set name ="),
            (Idle, "does not define choose or adapt"),
        ):
            with pytest.raises(TypeError, match=message):
                effvit.register_method(selector)
        with pytest.raises(ValueError, match="the selector 'divprune' is registered already"):
            effvit.register_method(Taken)
        with pytest.raises(TypeError, match="a selector has its settings already, got seed"):
            choose(SELECTORS["divprune"](), 4, features(), seed=1)


class TestParts:
    """A thumbnail and 2 x 3 crops of 6 x 8 cells."""

    CROPS = (2, 3)

    def given(self, parts: int = 7) -> dict[str, Any]:
        of_parts = features(parts)
        return of_parts | {"early": features(parts, seed=3)["scores"], "crops": self.CROPS}

    @pytest.mark.parametrize(("method", "keep"), [("hired", 0.3), ("globalcom2", 0.3), ("class_attention", 9)])
    @pytest.mark.parametrize("thumbnail", ["first", "last"])
    def test_crops_of_a_canvas_are_named_by_its_cells(self, method: str, keep: float, thumbnail: str) -> None:
        given = self.given()
        selected = effvit.select_parts(None, None, method, keep=keep, thumbnail=thumbnail, **of_use(method, given))
        canvas = torch.arange(12 * 24).view(2, 6, 3, 8).transpose(1, 2).reshape(6, NUMBER)  # cells of each crop
        named = selected.canvas_ids()
        crops = slice(1, 7) if thumbnail == "first" else slice(0, 6)
        whole = 0 if thumbnail == "first" else 6
        assert (named[whole] == -1).all()
        for crop, (ids, cells) in enumerate(zip(selected.selection.ids[crops], named[crops], strict=True)):
            count = int(selected.selection.counts[crops][crop])
            assert torch.equal(cells[:count], canvas[crop, ids[:count]])
            assert (cells[count:] == -1).all()

    @pytest.mark.parametrize("method", ["hired", "globalcom2"])
    def test_thumbnail_last_is_the_same_choice(self, method: str) -> None:
        given = self.given()
        given = of_use(method, given)
        first = effvit.select_parts(None, None, method, keep=0.3, **given).selection
        turned = {key: value.roll(-1, 0) if isinstance(value, Tensor) else value for key, value in given.items()}
        last = effvit.select_parts(None, None, method, keep=0.3, thumbnail="last", **turned).selection
        assert torch.equal(last.mask(), first.mask().roll(-1, 0))

    def test_budget_is_kept_exactly_if_asked_for(self) -> None:
        given = of_use("hired", self.given())
        total = int(0.3 * 7 * NUMBER)
        counts = [
            effvit.select_parts(None, None, "hired", keep=keep, exact=exact, **given).selection.counts
            for keep, exact in ((0.3, False), (0.3, True), (total, True))
        ]
        assert total - 6 <= int(counts[0].sum()) < total
        assert int(counts[1].sum()) == total
        assert torch.equal(counts[1], counts[2])
        for keep in (0.3, total):
            assert effvit.count_tokens("hired", GRID, keep=keep, frames=7, exact=True) == total
            assert effvit.count_tokens("hired", GRID, keep=keep, frames=7) is None

    @pytest.mark.parametrize(("method", "keep"), [("hired", 1.0), ("hired", 7 * NUMBER), ("globalcom2", 1.0)])
    def test_all_tokens_are_the_tokens_bit_for_bit(self, method: str, keep: float) -> None:
        given = of_use(method, self.given())
        selection = effvit.select_parts(None, None, method, keep=keep, **given).selection
        assert torch.equal(selection.tokens, given["tokens"])
        assert torch.equal(selection.ids, torch.arange(NUMBER).expand(7, -1))
        assert torch.equal(selection.group, selection.ids)

    def test_all_tokens_of_a_padded_canvas_are_those_that_show_the_image(self) -> None:
        given = of_use("globalcom2", self.given())
        selected = effvit.select_parts(None, None, "globalcom2", keep=1.0, image_size=(100, 400), **given)
        shown = valid_cells((100, 400), self.CROPS, GRID).flatten().nonzero().flatten()
        named = selected.canvas_ids()
        assert torch.equal(named[named >= 0].sort().values, shown)
        assert int(selected.selection.counts[0]) == NUMBER

    def test_padding_of_the_canvas_is_never_kept(self) -> None:
        given = of_use("globalcom2", self.given())
        selected = effvit.select_parts(None, None, "globalcom2", keep=0.5, image_size=(100, 400), **given)
        row = selected.canvas_ids() // 24
        assert row[selected.canvas_ids() >= 0].min() >= 3
        assert row.max() <= 8

    @pytest.mark.parametrize("method", ["hired", "globalcom2", "visionzip"])
    def test_parts_run_through_a_tower(self, method: str) -> None:
        parts = torch.rand(5, 3, 48, 48)
        tower = make_tower()
        selected = effvit.select_parts(tower, parts, method, crops=(2, 2), keep=0.5)
        dense = tower.forward_intermediates(parts, indices=[-2], norm=False, intermediates_only=True, output_fmt="NLC")[
            0
        ]
        chosen = selected.selection
        assert chosen.prefix is not None
        if method != "visionzip":
            held = chosen.mask()
            assert torch.equal(chosen.packed().tokens, dense[held])

    def test_parts_take_what_images_take(self) -> None:
        """Cells, relevance and norms: each part as ``select_tokens`` has it."""
        given, relevance = self.given(), torch.rand(7, NUMBER)
        bare = {"tokens": given["tokens"], "grid": GRID}
        ranked = bare | {"scores": given["scores"]}
        for method, settings in (
            ("cdpruner", bare | {"relevance": relevance}),
            ("class_attention", ranked | {"merge": 2}),
            ("class_attention", ranked | {"max_norm": 5.0}),
        ):
            alone = effvit.select_tokens(None, None, method, keep=6, **settings)
            parts = effvit.select_parts(None, None, method, keep=6, crops=self.CROPS, **settings)
            assert torch.equal(parts.selection.ids, alone.ids)
            assert torch.equal(parts.selection.tokens, alone.tokens)
        of_cells = effvit.select_parts(None, None, "hired", keep=0.5, merge=2, **of_use("hired", given))
        assert of_cells.selection.grid == (3, 4)
        assert of_cells.canvas_ids().max() < 6 * 12

    @pytest.mark.parametrize("size", [(1, 10000), (10000, 1)])
    def test_a_thin_image_is_a_line_of_cells(self, size: tuple[int, int]) -> None:
        """Fitted into the canvas its short side is less than a cell."""
        assert valid_cells(size, self.CROPS, GRID).any()
        given = of_use("globalcom2", self.given())
        selected = effvit.select_parts(None, None, "globalcom2", keep=1.0, image_size=size, **given)
        side = 12 if size[0] > size[1] else 24
        assert int((selected.canvas_ids() >= 0).sum()) == 2 * side

    def test_scores_beside_features_are_widened(self) -> None:
        """Half-precision scores of two crops are ranked in float32, as the scores of a tower are."""
        given = of_use("globalcom2", self.given())
        given["scores"] = given["scores"].bfloat16()
        selected = effvit.select_parts(None, None, "globalcom2", keep=0.3, **given)
        assert selected.selection.scores.dtype == torch.float32

    def test_what_does_not_fit_is_refused(self) -> None:
        given = of_use("hired", self.given())
        shared = of_use("globalcom2", self.given())
        with pytest.raises(ValueError, match="2 x 3 crops and a thumbnail are 7 parts, got 6"):
            effvit.select_parts(None, None, "hired", keep=0.3, **of_use("hired", self.given(6)))
        with pytest.raises(ValueError, match="hired shares its budget by what the thumbnail shows"):
            effvit.select_parts(None, None, "hired", keep=0.3, thumbnail=None, **of_use("hired", self.given(6)))
        for method, few in (("hired", 1), ("globalcom2", 0.001)):
            of_method = of_use(method, self.given())
            with pytest.raises(
                ValueError, match=f"keep={few} of 48 cells in each of 7 parts leaves no token by the rule"
            ):
                effvit.select_parts(None, None, method, keep=few, **of_method)
        with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
            effvit.select_parts(None, None, "globalcom2", keep=0.3, image_size=(0, 30), **shared)
        for method in ("hired", "class_attention"):
            of_method = of_use(method, self.given()) | {"crops": (2, 3)}
            with pytest.raises(
                ValueError, match=f"{method} does not use image_size, .*; leave it out, or use one of globalcom2"
            ):
                effvit.select_parts(None, None, method, keep=0.3, image_size=(20, 200), **of_method)
        reduced = effvit.sparsify(make_tower(depth=4), "tome", r=[9, 9])
        with pytest.raises(ValueError, match="globalcom2 needs all patches in place, but tome leaves 18 of 36"):
            effvit.select_parts(reduced, torch.rand(5, 3, 48, 48), "globalcom2", crops=(2, 2), keep=0.3)
        with pytest.raises(ValueError, match="thumbnail must be one of first, last"):
            effvit.select_parts(None, None, "hired", keep=0.3, thumbnail="middle", **given)
        with pytest.raises(ValueError, match="globalcom2 shares out a ratio, got keep=50"):
            effvit.select_parts(None, None, "globalcom2", keep=50, **shared)
        with pytest.raises(ValueError, match=r"hired needs scores of the first block too; give early= \(B, N\)"):
            effvit.select_parts(None, None, "hired", keep=0.3, **(given | {"early": None}))
        with pytest.raises(ValueError, match=r"hired chooses among the parts of one image .* use effvit.select_parts"):
            choose("hired", None, {key: given[key] for key in ("tokens", "grid", "scores")})
        with pytest.raises(ValueError, match=r"hired chooses among the parts of one image"):
            effvit.TokenSelector(make_tower(), "hired")(IMAGES)


class TestVideo:
    def video(self) -> dict[str, Any]:
        """Five frames of 48 cells, of which the first half of the cells stays the same in the first three."""
        x = features(5)["tokens"]
        x[1:3, :24] = x[0, :24] + 0.01 * x[1:3, :24]
        return {"tokens": x, "grid": GRID, "scores": features(5)["scores"]}

    def test_means_of_many_float16_tokens_are_finite(self) -> None:
        x = torch.full((4, NUMBER, 8), 8000.0)
        x[..., 0] = torch.arange(NUMBER)
        given = {"tokens": x, "grid": GRID, "scores": torch.rand(4, NUMBER)}
        whole, half = (effvit.select_video(None, None, keep=0.05, **given | {"tokens": y}) for y in (x, x.half()))
        assert half.tokens.dtype == torch.float16
        assert torch.allclose(half.tokens.float(), whole.tokens, rtol=1e-3, atol=0.1)

    def test_what_stays_the_same_is_merged_over_its_window(self) -> None:
        given = self.video()
        chosen = effvit.select_video(None, None, keep=1.0, **given)
        assert chosen.grid == (5, *GRID)
        group = chosen.group.view(5, NUMBER)
        assert torch.equal(group[0, :24], group[1, :24])
        assert torch.equal(group[0, :24], group[2, :24])
        assert chosen.tokens.shape[1] == 5 * NUMBER - 2 * 24
        assert torch.equal(chosen.tokens[0, group[3]], given["tokens"][3])
        torch.testing.assert_close(chosen.tokens[0, group[0, :24]], given["tokens"][:3, :24].mean(0))
        assert chosen.positions().shape[-1] == 3

    def test_what_is_saved_is_given_back_to_the_ratio(self) -> None:
        chosen = effvit.select_video(None, None, keep=0.25, **self.video())
        assert int(0.25 * 5 * NUMBER) <= chosen.tokens.shape[1] <= int(0.25 * 5 * NUMBER) + 10  # ceil in each frame
        assert (chosen.ids.diff() > 0).all()
        assert torch.equal(chosen.group[0, chosen.ids[0]], torch.arange(chosen.tokens.shape[1]))

    def test_a_video_in_which_nothing_moves_keeps_a_token(self) -> None:
        given = features(4)
        still = {"tokens": given["tokens"][:1].expand(4, -1, -1), "grid": GRID, "scores": given["scores"]}
        assert effvit.select_video(None, None, keep=0.001, **still).tokens.shape[1] == 1

    def test_longest_windows_by_counting_all_cuts(self) -> None:
        """Against every way to cut seven frames."""
        steps = torch.rand(6, 10) > 0.3
        for longest in (1, 3, 7):
            best = 0
            for cuts in range(2**6):
                ends = [frame for frame in range(6) if cuts >> frame & 1] + [6]
                spans = list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))
                if max(last - first + 1 for first, last in spans) <= longest:
                    best = max(best, sum(int(steps[f:e].all(0).sum()) * (e - f) for f, e in spans if e > f))
            windows = static_windows(steps, longest)
            assert windows.saved == best
            assert windows.saved == sum(int(steps[f:e].all(0).sum()) * (e - f) for f, e in windows.spans if e > f)
            assert [f for f, _ in windows.spans] == [0, *(e + 1 for _, e in windows.spans[:-1])]

    def test_a_tower_needs_no_class_token(self) -> None:
        tower = make_tower(class_token=False, global_pool="avg")
        chosen = effvit.select_video(tower, torch.rand(4, 3, 48, 48), keep=0.3)
        assert chosen.tokens.shape == (1, int(chosen.counts), 32)

    def test_prefix_tokens_of_all_frames_come_along(self) -> None:
        tower = make_tower(reg_tokens=2)
        chosen = effvit.select_video(tower, IMAGES, keep=0.3)
        images = effvit.select_tokens(tower, IMAGES, "uniform", keep=4)
        assert torch.equal(chosen.prefix, images.prefix.reshape(1, 6, 32))

    def test_scores_are_of_the_block_the_tokens_leave(self) -> None:
        """The release deletes the last block of its tower and reads the last one that is left."""
        tower = make_tower(class_token=False, global_pool="avg")
        chosen = effvit.select_video(tower, IMAGES, keep=0.3)
        received = softmax_maps(tower, IMAGES)[-2].mean((1, 2))
        torch.testing.assert_close(chosen.scores, received.view(1, -1), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("name", "keep"), [("visionzip", 9), ("divprune", 0.25), ("prumerge", None)])
    def test_other_methods_choose_in_each_frame(self, name: str, keep: Any) -> None:
        """Against the selection of the frames as images: its tokens one after another, cells counted on."""
        tower = make_tower()
        few = {"neighbours": 4} if name == "prumerge" else {}
        images = effvit.select_tokens(tower, IMAGES, name, keep=keep, **few)
        chosen = effvit.select_video(tower, IMAGES, name, keep=keep, **few)
        assert torch.equal(chosen.tokens[0], images.packed().tokens)
        assert chosen.counts.tolist() == [int(images.counts.sum())]
        assert torch.equal(chosen.mask().view(images.mask().shape), images.mask())
        assert torch.equal(chosen.group[0, chosen.ids[0]], torch.arange(chosen.tokens.shape[1]))
        assert chosen.grid == (len(IMAGES), *images.grid)
        assert torch.equal(chosen.prefix, images.prefix.flatten(0, 1).unsqueeze(0))

    def test_what_is_no_video_is_refused(self) -> None:
        given = self.video()
        with pytest.raises(ValueError, match=r"hired chooses among the parts of one image .* use effvit.select_parts"):
            effvit.select_video(make_tower(), IMAGES, "hired", keep=0.3)
        with pytest.raises(ValueError, match=r"holitom shares out a ratio, got keep=None; give a share in \(0, 1\]"):
            effvit.select_video(None, None, **given)
        with pytest.raises(ValueError, match=r"holitom chooses among .* use effvit.select_video"):
            choose("holitom", None, given)
        with pytest.raises(ValueError, match=r"holitom shares out a ratio, got keep=1.2; give a share"):
            effvit.select_video(None, None, keep=1.2, **given)
        given["tokens"][2, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="holitom: the features are NaN for image 2"):
            effvit.select_video(None, None, keep=0.3, **given)


class TestQueryPooler:
    def test_it_makes_mixtures_with_the_positions_of_a_coarse_grid(self) -> None:
        given = features()
        pooler = QueryPooler(32, grid_size=2, num_heads=4, in_dim=24)
        chosen = choose(pooler, None, {"tokens": given["tokens"], "grid": GRID})
        assert chosen.tokens.shape == (3, 4, 32)
        assert chosen.positions()[0].tolist() == [[1, 2], [1, 6], [4, 2], [4, 6]]
        assert chosen.group is None
        _, attention = pooler.attend(given["tokens"], GRID)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4))
        assert effvit.count_tokens(pooler, GRID) == 4

    def test_all_cells_as_queries_are_still_pooled(self) -> None:
        pooler = QueryPooler(24, grid_size=2, num_heads=4)
        x = torch.rand(1, 4, 24)
        assert not torch.equal(choose(pooler, None, {"tokens": x, "grid": (2, 2)}).tokens, x)

    def test_other_numbers_and_widths_are_refused(self) -> None:
        pooler, given = QueryPooler(32, grid_size=2, num_heads=4), features()
        bare = {"tokens": given["tokens"], "grid": GRID}
        with pytest.raises(ValueError, match="these queries give 4 tokens, got keep=9"):
            choose(pooler, 9, bare)
        with pytest.raises(ValueError, match="attend to tokens of 32 channels, got 24"):
            choose(pooler, None, bare)
        with pytest.raises(ValueError, match="7 x 7 queries need at least as many cells"):
            choose(QueryPooler(24, grid_size=7, num_heads=4), None, bare)
        with pytest.raises(ValueError, match="dim must be a multiple of 4 and of num_heads=8, got 12"):
            QueryPooler(12)

    def test_its_table_is_saved_and_not_decayed(self) -> None:
        pooler = QueryPooler(32, num_heads=4)
        assert "pos_embed" in pooler.state_dict()
        assert "pos_embed" not in dict(pooler.named_parameters())


def test_page_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        run_page("select_tokens.md", capsys)
    finally:
        SELECTORS.pop("largest", None)


def test_page_names_every_selector() -> None:
    page = (DOCS / "select_tokens.md").read_text()
    assert [name for name in effvit.list_selectors() if f"`{name}`" not in page] == []


class TestMatryoshkaLoss:
    def test_loss_is_the_mean_over_the_scales(self) -> None:
        x, target = torch.rand(2, 16, 3), torch.rand(2, 3)
        pool = Matryoshka()

        def criterion(y: Tensor, wanted: Tensor) -> Tensor:
            return (y - wanted).square().mean()

        loss = MatryoshkaLoss(criterion, (1, 4, 16))(lambda tokens: tokens.amax(1), x, (4, 4), target)
        pooled = [pool.choose(Features(x, (4, 4)), n).tokens for n in (1, 4, 16)]
        torch.testing.assert_close(loss, torch.stack([criterion(y.amax(1), target) for y in pooled]).mean())
        with pytest.raises(ValueError, match="scales must name at least one"):
            MatryoshkaLoss(criterion, ())
