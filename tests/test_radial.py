"""The radial patterns: their rings, the numbers that are kept, radii that shrink, and what is refused."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hosts import make_host, make_images

import effvit
from effvit.measure.controls import CONTROLS
from effvit.reducers.rings import PATTERNS, distances, ring_sizes, sizes_within

LENGTHS = {"l1": lambda x, y: abs(x) + abs(y), "l2": math.hypot, "linf": lambda x, y: max(abs(x), abs(y))}


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (6, 9), (14, 14)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_distances_are_those_of_equal_steps_between_the_borders(pattern: str, grid: tuple[int, int]) -> None:
    """From floor(-n / 2) to floor(n / 2), also where that is not symmetric."""
    places = [[-side // 2 + i * (side // 2 - -side // 2) / max(side - 1, 1) for i in range(side)] for side in grid]
    expected = [LENGTHS[pattern](x, y) for x in places[0] for y in places[1]]
    torch.testing.assert_close(distances(grid, pattern), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_rings_are_kept(pattern: str) -> None:
    away = distances((9, 6), pattern)
    sizes = ring_sizes((9, 6), pattern)
    assert sizes == tuple((away <= radius).sum().item() for radius in sorted({*away.tolist()}))
    assert sizes[-1] == 54


def test_number_kept_is_the_nearest_of_a_ring_and_the_smaller_of_two() -> None:
    """Squares of 4, 16 and 36 patches on a grid of 6 x 6: 10 is as far from 4 as from 16."""
    host = make_host("class_token", img_size=48, patch_size=8)
    for asked, kept in ((10, 4), (11, 16), (26, 16), (27, 36), (1, 4)):
        model = effvit.sparsify(host, "radial", num_tokens=asked, reduce_at=(1,), pattern="linf")
        assert model.token_counts()[-1] == kept
        trace = model.trace_tokens(make_images(host))
        assert trace[-1].tokens.anchor.shape[1] == kept


def test_radii_shrink_in_every_block_of_the_range() -> None:
    """In equal steps from the farthest corner, which block 0 and the block before another first one still keep."""
    host = make_host("class_token", img_size=48, patch_size=8)
    later = effvit.sparsify(host, "radial", reduce_at=(1, 2), pattern="linf", min_radius=0.6)
    assert later.token_counts()[:3] == [36, *sizes_within((6, 6), "linf", 4, 0.6)[1:3]]
    first = effvit.sparsify(host, "radial", reduce_at=(0, 2), pattern="linf", min_radius=0.6)
    assert first.token_counts()[:3] == [*sizes_within((6, 6), "linf", 5, 0.6)[:3]]
    middle = effvit.sparsify(host, "radial", reduce_at=(0, 2), pattern="linf", min_radius=0)
    assert middle.token_counts()[:3] == [*sizes_within((6, 6), "linf", 5, 0.6)[:3]]  # 0.6 is where that patch lies


def test_it_is_no_control_at_the_counts_of_a_method() -> None:
    assert "radial" not in CONTROLS


def test_settings_that_exclude_each_other_are_refused() -> None:
    host = make_host("class_token")
    with pytest.raises(ValueError, match="num_tokens and min_radius both take the place of a rate"):
        effvit.sparsify(host, "radial", num_tokens=9, min_radius=1.0)
    with pytest.raises(ValueError, match="pattern must be one of l1, l2, linf, got 'l0'"):
        effvit.sparsify(host, "radial", pattern="l0")
    with pytest.raises(ValueError, match="min_radius must be a finite number, got nan"):
        effvit.sparsify(host, "radial", min_radius=math.nan)


def test_keep_rate_of_shrinking_radii_cannot_be_set() -> None:
    model = effvit.sparsify(make_host("class_token"), "radial", min_radius=1.0, reduce_at=(1, 2))
    with pytest.raises(ValueError, match=r"no block uses one \(min_radius stands in its place\)"):
        model.set_keep_rate(0.5)


@pytest.mark.parametrize("any_size", [False, True])
def test_radius_that_leaves_no_patch_is_refused_where_the_size_is_known(any_size: bool) -> None:
    """On images of any size a patch stays."""
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 24}
    host = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=any_size, **sizes)
    settings = {"min_radius": 0.01, "reduce_at": (0, 23)}
    if any_size:
        assert effvit.sparsify(host, "radial", **settings).token_counts()[-1] == 1
    else:
        with pytest.raises(ValueError, match="radial would leave 0 of 4 patch tokens in block 21"):
            effvit.sparsify(host, "radial", **settings)
