"""CubistMerge: rows and columns against a slow search, what the release loses, grids, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from torch import Tensor

import effvit
from effvit.reducers.cubistmerge import CubistMerge, merge_grid, merge_lines
from effvit.testing.models import noise
from effvit.testing.windows import WINDOW_SIZE, make_window_host, make_window_model


def slow_line(x: Tensor, r: int) -> tuple[Tensor, list[int]]:
    """One row (N, C) after its merging and where each token went, token by token (2509.21764)."""
    number = len(x)
    best: dict[int, tuple[float, int]] = {}
    for odd in range(1, number, 2):
        around = [place for place in (odd - 1, odd + 1) if place < number]
        cosines = {place: float(F.cosine_similarity(x[odd], x[place], dim=0)) for place in around}
        into = max(around, key=cosines.__getitem__)  # the first, which is the left one, of two equal ones
        best[odd] = (cosines[into], into)
    removed = {odd: best[odd][1] for odd in sorted(best, key=lambda odd: -best[odd][0])[:r]}
    kept = [place for place in range(number) if place not in removed]
    rows = []
    for place in kept:
        members = torch.stack([x[place], *(x[odd] for odd, into in removed.items() if into == place)])
        largest = members.abs().max(0).indices
        rows.append(members.gather(0, largest.unsqueeze(0)).squeeze(0))
    return torch.stack(rows), [kept.index(removed.get(place, place)) for place in range(number)]


@pytest.mark.parametrize("number", [2, 7, 8])
@pytest.mark.parametrize("r", [0, 1, 3])
def test_rows_are_those_of_the_slow_search(number: int, r: int) -> None:
    x, r = torch.randn(20, number, 3), min(r, number // 2)
    line = merge_lines(x, r)
    for row, tokens in enumerate(x):
        expected, target = slow_line(tokens, r)
        assert torch.equal(line.x[row], expected)
        assert line.target[row].tolist() == target
        assert line.kept[row].tolist() == sorted(line.kept[row].tolist())
        assert line.target[row][line.kept[row]].tolist() == list(range(number - r))


class TestWindows:
    """In hosts whose windows become smaller ones."""

    def test_one_window_of_a_whole_map_is_the_grid_of_a_plain_vit(self) -> None:
        """Without relative positions the blocks work on the tokens of ``merge_grid``, which then go back."""
        model = make_window_host("sam", use_rel_pos=False, window_size=6, global_attn_indexes=(), img_size=(48, 48))
        x = noise(2, (48, 48))
        reduced = effvit.sparsify(model, "cubistmerge", r_h=2, r_w=2, reduce_at=[2])
        y = model.patch_embed(x)
        y = model.norm_pre(model.pos_drop(y + model.pos_embed))
        y = model.blocks[1](model.blocks[0](y)).flatten(1, 2)
        merged, target, _ = merge_grid(y, (6, 6), 2, 2)
        small = make_window_host("sam", use_rel_pos=False, window_size=0, global_attn_indexes=(), img_size=(48, 48))
        small.load_state_dict(model.state_dict())
        merged = small.blocks[3](small.blocks[2](merged.unflatten(1, (4, 4)))).flatten(1, 2)
        full = merged.gather(1, target.unsqueeze(-1).expand(-1, -1, merged.shape[2])).unflatten(1, (6, 6))
        expected = model.neck(full.permute(0, 3, 1, 2))
        torch.testing.assert_close(reduced.forward_features(x), expected, rtol=1e-5, atol=1e-5)

    def test_windows_choose_for_themselves(self) -> None:
        """One window of an image does not change what is merged in another."""
        model = make_window_model("cubistmerge", "sam", reduce_at=[0])
        x = noise(1, WINDOW_SIZE)
        other = x.clone()
        other[..., 32:, :] += 1  # the windows of the second row
        labels = [model.trace_stages(images)[0].labels for images in (x, other)]
        assert (labels[0][:4] == labels[1][:4]).all()
        assert (labels[0][4:] != labels[1][4:]).any()

    def test_windows_become_smaller_once(self) -> None:
        with pytest.raises(
            ValueError, match=r"cubistmerge makes the windows .* smaller once, got blocks 0, 2; give one"
        ):
            effvit.sparsify(make_window_host("sam"), "cubistmerge", reduce_at=[0, 2])

    def test_a_window_keeps_half_of_its_rows(self) -> None:
        with pytest.raises(ValueError, match=r"at most every second of 4 rows .* got r_h=3 in block 0"):
            effvit.sparsify(make_window_host("sam"), "cubistmerge", r_h=3, r_w=1)

    def test_square_windows_stay_square(self) -> None:
        with pytest.raises(ValueError, match=r"must be square .*, got 3 x 2; give .* or r_h equal to r_w"):
            effvit.sparsify(make_window_host("sam"), "cubistmerge", r_h=1, r_w=2)


def test_columns_are_merged_behind_rows() -> None:
    x = torch.randn(2, 5 * 6, 3)
    merged, target, order = merge_grid(x, (5, 6), 2, 3)
    for image in range(2):
        rows = [slow_line(row, 3) for row in x[image].unflatten(0, (5, 6))]
        columns = [slow_line(torch.stack([row[0][j] for row in rows]), 2) for j in range(3)]
        expected = torch.stack([columns[j][0][i] for i in range(3) for j in range(3)])
        assert torch.equal(merged[image], expected)
        places = [[columns[j][1][i] * 3 + j for j in rows[i][1]] for i in range(5)]
        assert target[image].tolist() == [place for row in places for place in row]
    assert torch.equal(target.gather(1, order), torch.arange(9).expand(2, -1))


def test_of_two_tokens_that_go_into_one_the_release_loses_one() -> None:
    """Tokens 1 and 3 are most like token 2; 1 is more like it, so that 3 has rank 1, which is odd, and stays."""
    x = torch.tensor([[[0.0, 1, 0], [3, 0, 0], [2, 0, 0], [2, 0, 1], [0, 0, -1]]])
    x[0, 1, 1], x[0, 0, 0] = 0.01, -0.5
    assert merge_lines(x, 2).x[0, 1].tolist() == pytest.approx([3, 0.01, 1])
    assert merge_lines(x, 2, compat=True).x[0, 1].tolist() == pytest.approx([2, 0, 1])


def test_gradient_of_each_channel_goes_to_the_token_that_won_it() -> None:
    x = torch.tensor([[[1.0, -2.0], [3.0, -1.0]]], requires_grad=True)
    merge_lines(x, 1).x.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[0, 1], [1, 0]]]


def test_tokens_are_a_grid_in_order_of_rows_with_the_sizes_of_what_they_took_in() -> None:
    model = make_model("cubistmerge", "class_token")
    assert model.token_counts() == [5 * 7, 5 * 7, 4 * 6, 4 * 6]
    tokens = model.trace_tokens(make_images(model))[-1].tokens
    assert tokens.complete
    assert tokens.key_weight is None
    assert tokens.size is not None
    for image, source in enumerate(tokens.source):
        assert tokens.size[image, 1:].tolist() == torch.bincount(source, minlength=24).tolist()
        rows = torch.div(source.unflatten(0, (6, 8)), 6, rounding_mode="floor")
        assert (rows.diff(dim=0) >= 0).all() or (rows[-1] == 3).all()


def test_an_image_of_any_size_loses_half_of_its_rows_at_most() -> None:
    model = effvit.sparsify(make_host("class_token", dynamic_img_size=True), "cubistmerge", r_h=3, r_w=2).eval()
    assert model.token_counts((4, 7)) == [2 * 5] * 4
    assert model.token_counts((1, 1)) == [1] * 4
    assert model(torch.randn(1, 3, 32, 56)).isfinite().all()


def test_default_is_two_rows_and_columns_before_the_second_of_twelve_blocks() -> None:
    """145 tokens with the class token in 11 of 12 blocks of DeiT-B, as counted of the release."""
    plan: dict[int, Any] = CubistMerge.plan(12)
    assert list(plan) == [1]
    assert plan[1].count_on(196, (14, 14)) + 1 == 145


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"r_h": 4, "r_w": 0}, r"every second of 6 rows or columns of the grid, got r_h=4 in block 0; take fewer"),
            ({"r_h": 0, "r_w": 5}, r"every second of 8 rows or columns of the grid, got r_w=5 in block 0; take fewer"),
            ({"r_h": [3, 2], "r_w": 0, "reduce_at": (0, 1)}, r"every second of 3 rows .* got r_h=2 in block 1"),
        ],
    )
    def test_grid_that_cannot_lose_so_many_rows(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            effvit.sparsify(make_host("class_token"), "cubistmerge", **settings)

    @pytest.mark.parametrize("name", ["r_h", "r_w"])
    def test_rows_that_are_no_number(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            effvit.sparsify(make_host("class_token"), "cubistmerge", **{name: -1})
        for value in (1.5, True, "2"):
            with pytest.raises(TypeError, match=f"{name} must be a whole number, got"):
                effvit.sparsify(make_host("class_token"), "cubistmerge", **{name: value})

    def test_switch_that_is_none(self) -> None:
        with pytest.raises(TypeError, match="compat must be True or False, got 'no'"):
            effvit.sparsify(make_host("class_token"), "cubistmerge", compat="no")

    def test_sequence_without_some_of_its_patches(self) -> None:
        model = effvit.sparsify(make_host("class_token", patch_drop_rate=0.5), "cubistmerge").train()
        with pytest.raises(ValueError, match="merges neighbours of a whole grid of 6 x 8, got 24 tokens; train with"):
            model(make_images(model))
