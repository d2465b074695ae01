"""The controls random and uniform: their orders against slow constructions, counts, places, and other image sizes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hosts import make_host, make_images, make_model

import effvit
from effvit.measure.flops import count_flops
from effvit.reducers import METHODS
from effvit.reducers.static_selection import PLACES, StaticSelection, random_ranks, uniform_ranks

CONTROLS = ("uniform", "random")


def anchors(model: Any, x: torch.Tensor) -> list[list[int]]:
    """Patches that leave each block, of the first image; an error where another image keeps others."""
    kept = [tokens.anchor for _, tokens in model.trace_tokens(x)]
    assert all(torch.equal(anchor, anchor[:1].expand_as(anchor)) for anchor in kept)
    return [anchor[0].tolist() for anchor in kept]


def bayer(side: int) -> list[list[int]]:
    """The dither matrix by its recursion, M_2n = [[4M, 4M + 2], [4M + 3, 4M + 1]] (Bayer, 1973)."""
    if side == 1:
        return [[0]]
    m = bayer(side // 2)
    upper = [[4 * v for v in row] + [4 * v + 2 for v in row] for row in m]
    return upper + [[4 * v + 3 for v in row] + [4 * v + 1 for v in row] for row in m]


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (7, 7), (6, 8), (3, 14), (16, 5)])
def test_uniform_order_is_that_of_the_dither_matrix_cut_to_the_grid(grid: tuple[int, int]) -> None:
    matrix = bayer(next(side for side in (1, 2, 4, 8, 16) if side >= max(grid)))
    values = [matrix[row][column] for row in range(grid[0]) for column in range(grid[1])]
    assert uniform_ranks(grid).tolist() == [sorted(values).index(value) for value in values]


def test_half_of_a_uniform_order_is_a_checkerboard_and_a_quarter_every_second_row_and_column() -> None:
    ranks = uniform_ranks((8, 12)).unflatten(0, (8, 12))
    row, column = torch.arange(8).unsqueeze(1), torch.arange(12)
    assert torch.equal(ranks < 48, (row + column) % 2 == 0)
    assert torch.equal(ranks < 24, (row % 2 == 0) & (column % 2 == 0))


@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (6, 8)])
def test_random_order_is_a_permutation_that_only_the_seed_decides(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    first = random_ranks(grid, 3)
    torch.manual_seed(1)
    with torch.device("meta"):  # of a host under construction
        assert torch.equal(random_ranks(grid, 3), first)
    assert sorted(first.tolist()) == list(range(grid[0] * grid[1]))
    if grid != (1, 1):
        assert not torch.equal(random_ranks(grid, 4), first)


def test_counts_are_those_of_dynamicvit() -> None:
    """int(196 r^(j+1)) at blocks 3, 6 and 9 (DynamicViT, 2106.02034); rounding block by block gives 95 for 96."""
    with torch.device("meta"):
        model = effvit.sparsify("deit_tiny_patch16_224", "random")
        fixed = effvit.sparsify("deit_tiny_patch16_224", "uniform", reduce_at=(3, 6), num_tokens=[100, 7])
    assert [model.token_counts()[block] for block in (2, 3, 6, 9)] == [196, 137, 96, 67]
    assert [fixed.token_counts()[block] for block in (2, 3, 6)] == [196, 100, 7]


@pytest.mark.parametrize("method", CONTROLS)
@pytest.mark.parametrize("place", PLACES)
def test_later_blocks_keep_some_of_what_earlier_ones_kept_in_image_order(method: str, place: str) -> None:
    model = make_model(method, "registers", reduce_at=(0, 1, 3), keep_rate=0.6, place=place)
    kept = anchors(model, make_images(model, batch=3))
    ranks = METHODS[method].plan(4, reduce_at=(0,))[0].ranks_on((6, 8))  # type: ignore[operator]
    for anchor, count in zip(kept, (28, 17, 17, 10), strict=True):  # int(48 * 0.6^(j+1))
        assert anchor == sorted((ranks < count).nonzero().flatten().tolist())


@pytest.mark.parametrize(("place", "keys", "queries"), [("block", 20, 20), ("queries", 48, 20), ("mlp", 48, 48)])
def test_place_says_what_dropped_patches_do_not_enter(place: str, keys: int, queries: int) -> None:
    model = make_model("random", "class_token", reduce_at=(1,), num_tokens=20, place=place)
    block, prefix = model.blocks[1], model.num_prefix_tokens
    seen: dict[str, int] = {}
    block.norm1.register_forward_hook(lambda _m, _x, y: seen.update(keys=y.shape[1]))
    block.attn.proj.register_forward_hook(lambda _m, _x, y: seen.update(queries=y.shape[1]))
    block.norm2.register_forward_hook(lambda _m, _x, y: seen.update(mlp=y.shape[1]))
    model(make_images(model))
    assert seen == {"keys": prefix + keys, "queries": prefix + queries, "mlp": prefix + 20}


@pytest.mark.parametrize("method", CONTROLS)
def test_kept_patches_equal_those_of_the_dense_blocks_on_them_alone(method: str) -> None:
    """The reference cuts the sequence by hand before timm's own blocks."""
    host = make_host("class_token").double()
    model = effvit.sparsify(host, method, reduce_at=(1, 2), num_tokens=[30, 11])
    x = make_images(model).double()
    ranks = model.reducers[1].ranks
    y, left = host._pos_embed(host.patch_embed(x)), torch.arange(48)
    for number, block in enumerate(host.blocks):
        if number in (1, 2):
            keep = ranks[left] < (30, 11)[number - 1]
            y, left = y[:, torch.cat([torch.tensor([True]), keep])], left[keep]
        y = block(y)
    assert torch.allclose(model(x), host.forward_head(host.norm(y)), rtol=0, atol=1e-10)


def test_settings_tell_of_changed_rates_and_of_a_reducer_taken_out_by_hand() -> None:
    model = make_model("random", "class_token", reduce_at=(0, 1, 3), keep_rate=0.5)
    model.set_keep_rate([0.5, 1.0, 0.5])
    again = effvit.sparsify(make_host("class_token"), "random", **model.settings)
    assert again.token_counts() == model.token_counts() == [24, 24, 24, 12]
    model.blocks[0].reducer = None  # block 3 still counts on the rate of block 0
    with pytest.raises(ValueError, match="reducers of this model were changed by hand, and no settings of random"):
        _ = model.settings


@pytest.mark.parametrize("method", CONTROLS)
def test_order_follows_the_size_of_the_images(method: str) -> None:
    model = make_model(method, "class_token")
    before = model.reducers[1].ranks
    model.set_input_size((32, 40))
    assert model.reducers[1].ranks.tolist() == model.reducers[1].ranks_on((4, 5)).tolist()
    assert len(before) == 48
    dynamic = effvit.sparsify(make_host("class_token", dynamic_img_size=True), method, reduce_at=(1,), num_tokens=6)
    ranks = dynamic.reducers[1].ranks_on((3, 3))
    assert anchors(dynamic, torch.randn(2, 3, 24, 24))[-1] == (ranks < 6).nonzero().flatten().tolist()
    assert len(dynamic.reducers[1].ranks) == 48  # nothing is kept on the module during forward


@pytest.mark.parametrize("method", CONTROLS)
def test_images_of_another_size_are_counted_and_traced(method: str) -> None:
    """The count is that of a model of the size, and the position table resampled; a trace gives the scores of a run."""
    dynamic = effvit.sparsify(make_host("class_token", dynamic_img_size=True), method, reduce_at=(1,)).eval()
    report = count_flops(dynamic, (3, 32, 40))
    assert not report.uncounted
    fixed = effvit.sparsify(make_host("class_token"), method, reduce_at=(1,)).eval()
    fixed.set_input_size((32, 40))
    resampled = report.by_operator["_upsample_bicubic2d_aa"]
    assert report.total - resampled == count_flops(fixed, (3, 32, 40)).total
    x = torch.randn(1, 3, 32, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on numbers that the trace fixes
        assert torch.equal(torch.jit.trace(dynamic, x)(x), dynamic(x))


def test_few_patches_leave_one_where_images_have_any_size_and_are_refused_where_they_have_not() -> None:
    dynamic = effvit.sparsify(make_host("class_token", dynamic_img_size=True), "uniform", keep_rate=0.1)
    assert dynamic.token_counts((2, 2)) == [4, 1, 1, 1]
    with pytest.raises(ValueError, match="random would leave 0 of 1 patch tokens in block 3"):
        effvit.sparsify(make_host("class_token"), "random", keep_rate=0.2)


def test_order_comes_back_behind_the_meta_device() -> None:
    """Memory of ``to_empty`` holds anything, and ``assign=True`` leaves buffers that no file holds."""
    expected = make_model("random", "class_token", seed=5)
    x = make_images(expected)
    with torch.device("meta"):
        empty = effvit.sparsify(copy.deepcopy(make_host("class_token")).to("meta"), "random", **expected.settings)
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(expected.state_dict(), assign=True)
    empty.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(empty(x), expected(x))
    with pytest.warns(UserWarning, match=r"blocks\.1\.reducer\.ranks.* stayed: move or cast this model too"):
        assert torch.equal(assigned(x), expected(x))


def test_patch_dropout_leaves_fewer_to_choose_from() -> None:
    model = effvit.sparsify(
        make_host("class_token", patch_drop_rate=0.5), "random", num_tokens=[40, 9], reduce_at=(0, 1)
    )
    x = make_images(model)
    model.train()
    trace = model.trace_tokens(x)
    assert [tokens.anchor.shape[1] for _, tokens in trace] == [24, 9, 9, 9]
    ranks = model.reducers[0].ranks
    for before, after in zip(trace[0].tokens.anchor, trace[1].tokens.anchor, strict=True):
        assert set(ranks[after].tolist()) == set(sorted(ranks[before].tolist())[:9])


def test_controls_are_not_tuned() -> None:
    """``effvit tune`` looks for settings to deploy."""
    for method in METHODS.values():
        if issubclass(method, StaticSelection):
            assert method.ladders(12, 196) == []


def test_settings_are_checked_as_those_of_methods() -> None:
    host = make_host("class_token")
    with pytest.raises(ValueError, match="place must be one of block, queries, mlp, got 'head'"):
        effvit.sparsify(host, "uniform", place="head")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        effvit.sparsify(host, "random", seed=-1)
    with pytest.raises(ValueError, match="uniform has no setting 'seed'; it belongs to random"):
        effvit.sparsify(host, "uniform", seed=1)
