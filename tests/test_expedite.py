"""Expedite: clusters against the formulas, reconstruction in the model, restored sequences, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from test_contract import assert_law
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import effvit
from effvit.recover import reconstruct_tokens
from effvit.reducers.expedite import assign_patches, cell_middles, cluster_centres, cluster_tokens, nearest_centre
from effvit.reducers.tiles import Side, cut_side, first_patch, lay_tiles, tile_clusters, untile_clusters

# Grid of patches, of clusters, and window: sides that do not divide, of several bands, of one row, of equal grids.
TILED = [
    ((14, 14), (10, 10), 5),
    ((24, 17), (17, 12), 5),
    ((40, 3), (29, 2), 3),
    ((1, 30), (1, 23), 5),
    ((30, 1), (22, 1), 1),
    ((13, 13), (13, 13), 3),
    ((20, 31), (13, 31), 1),
    ((16, 16), (8, 4), 3),
    ((12, 12), (9, 9), 99),
]
NO_CLASS_POOL = ("average_pool", "attention_pool", "register_no_class", "gated_grouped")


def slow_clusters(x: Tensor, clusters: tuple[int, int], num_iters: int, temperature: float, window: int) -> Tensor:
    """Section 3 of the paper with the whole distance and its official mask of 1e16: x (B, H, W, C) -> (B, h, w, C)."""
    cells = torch.arange(clusters[0] * clusters[1], dtype=x.dtype).view(1, 1, *clusters)
    cell = F.interpolate(cells, size=x.shape[1:3]).flatten().long()
    own = torch.arange(clusters[0] * clusters[1])
    rows = (cell[:, None] // clusters[1] - own // clusters[1]).abs()
    columns = (cell[:, None] % clusters[1] - own % clusters[1]).abs()
    far = (torch.maximum(rows, columns) > window // 2) * 1e16
    tokens = x.flatten(1, 2)
    centres = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), clusters).flatten(2).transpose(1, 2)
    for _ in range(num_iters):
        distance = (tokens[:, :, None] - centres[:, None]).square().sum(-1) + far
        shares = (-temperature * distance).softmax(-1).transpose(1, 2).detach()
        centres = shares @ tokens / shares.sum(-1, keepdim=True).clamp(min=1e-16)
    return centres.unflatten(1, clusters)


class TestClusters:
    @pytest.mark.parametrize("grid", [(6, 9), (7, 5), (4, 4)])
    @pytest.mark.parametrize("clusters", [(3, 4), (1, 1), (4, 4)])
    @pytest.mark.parametrize(("num_iters", "window"), [(0, 3), (1, 1), (4, 3), (3, 9)])
    def test_centres_are_those_of_the_whole_formula(
        self, grid: tuple[int, int], clusters: tuple[int, int], num_iters: int, window: int
    ) -> None:
        x = torch.randn(2, *grid, 8, dtype=torch.float64)
        expected = slow_clusters(x, clusters, num_iters, 0.3, window)
        assert torch.allclose(cluster_tokens(x, clusters, num_iters, 0.3, window), expected, atol=1e-10)

    @pytest.mark.parametrize(("grid", "clusters", "window"), TILED)
    def test_centres_and_gradients_in_tiles_are_those_of_the_whole_formula(
        self, grid: tuple[int, int], clusters: tuple[int, int], window: int
    ) -> None:
        x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
        centres, expected = cluster_tokens(x, clusters, 3, 0.3, window), slow_clusters(x, clusters, 3, 0.3, window)
        assert torch.allclose(centres, expected, atol=1e-10)
        weights = torch.randn_like(expected)
        gradients = [torch.autograd.grad(y, x, weights)[0] for y in (centres, expected)]
        assert torch.allclose(*gradients, atol=1e-10)

    @pytest.mark.parametrize(("grid", "clusters", "window"), TILED)
    def test_centres_in_float32_are_right_to_rounding(
        self, grid: tuple[int, int], clusters: tuple[int, int], window: int
    ) -> None:
        x = torch.randn(1, *grid, 64)
        expected = slow_clusters(x.double(), clusters, 5, 5e-3, window)
        assert (cluster_centres(x, clusters, window_size=window) - expected).abs().max() < 1e-6 * expected.abs().max()

    @pytest.mark.parametrize(("grid", "clusters", "window"), TILED)
    def test_products_are_those_of_the_tiles(
        self, grid: tuple[int, int], clusters: tuple[int, int], window: int
    ) -> None:
        with FlopCounterMode(display=False) as counter:
            cluster_centres(torch.zeros(3, *grid, 8), clusters, 4, window_size=window)
        rows, columns = (cut_side(*side, window) for side in zip(grid, clusters, strict=True))
        assert counter.get_total_flops() == 2 * 3 * 4 * 2 * rows.pairs * columns.pairs * 8

    def test_nothing_is_copied_from_the_host_or_read_back(self) -> None:
        """On CUDA either would wait for the device."""

        class Recorded(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.add(func.overloadpacket.__name__)
                return func(*args, **kwargs or {})

        x, names = torch.randn(1, 14, 14, 8), set[str]()
        with Recorded():
            centres = cluster_centres(x, (10, 10)).flatten(1, 2)
            assign_patches(x.flatten(1, 2), centres, (14, 14), (10, 10))
        assert "index_select" in names
        assert not names & {"lift_fresh", "_to_copy", "_local_scalar_dense", "nonzero"}

    def test_labels_are_of_the_nearest_centre_wherever_it_is(self) -> None:
        x, centres = torch.randn(2, 30, 8), torch.randn(2, 7, 8)
        assert torch.equal(nearest_centre(x, centres), torch.cdist(x, centres).argmin(-1))

    def test_middle_of_a_cell_belongs_to_its_cluster_whatever_is_nearer(self) -> None:
        """All patches are nearest to the first of four centres, but each centre has the middle of its cell."""
        patches, centres = torch.zeros(1, 16, 3), torch.tensor([[[1.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 3]])
        source, anchor = assign_patches(patches, centres, (4, 4), (2, 2))
        assert anchor.tolist() == [[0, 2, 8, 10]]
        assert source[0, anchor[0]].tolist() == [0, 1, 2, 3]
        assert source.sum() == 0 + 1 + 2 + 3

    def test_gradient_is_that_of_means_with_fixed_shares(self) -> None:
        x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
        cluster_tokens(x, (2, 2), 3).sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad.sum(), torch.tensor(4 * 8.0, dtype=torch.float64))  # every mean has weight one

    @pytest.mark.parametrize(
        ("grid", "clusters"), [((14, 14), (10, 10)), ((5, 7), (5, 3)), ((3, 3), (1, 1)), ((9, 4), (8, 3))]
    )
    def test_middles_lie_in_their_own_cells(self, grid: tuple[int, int], clusters: tuple[int, int]) -> None:
        middles = cell_middles(grid, clusters, torch.zeros(1))
        row, column = middles // grid[1] * clusters[0] // grid[0], middles % grid[1] * clusters[1] // grid[1]
        assert torch.equal(row * clusters[1] + column, torch.arange(clusters[0] * clusters[1]))

    def test_middle_of_an_even_cell_is_the_first_of_the_two_in_it(self) -> None:
        """Rows 0 to 3 and 4 to 7, of three columns each: rows 1 and 5, column 1."""
        assert cell_middles((8, 3), (2, 1), torch.zeros(1)).tolist() == [1 * 3 + 1, 5 * 3 + 1]

    @pytest.mark.parametrize("clusters", [(5, 2), (2, 0)])
    def test_more_clusters_than_tokens_or_none(self, clusters: tuple[int, int]) -> None:
        message = rf"clusters must be at least 1 x 1 .* got {clusters[0]} x {clusters[1]} for a grid of 4 x 4; use"
        with pytest.raises(ValueError, match=message):
            cluster_tokens(torch.zeros(1, 4, 4, 2), clusters)

    def test_even_window(self) -> None:
        with pytest.raises(ValueError, match=r"window_size must be odd, .* got 4"):
            cluster_tokens(torch.zeros(1, 4, 4, 2), (2, 2), window_size=4)


class TestTiles:
    @pytest.mark.parametrize(("grid", "clusters", "window"), TILED)
    def test_all_pairs_within_the_window_have_a_place_of_their_own(
        self, grid: tuple[int, int], clusters: tuple[int, int], window: int
    ) -> None:
        """The place tells tile, patch and cluster: the pair must be of that patch and the clusters around its cell."""
        rows, columns = (cut_side(*side, window) for side in zip(grid, clusters, strict=True))
        tiling = lay_tiles(rows, columns, torch.zeros(1))
        seen, number = tiling.seen.view(tiling.number, -1), clusters[0] * clusters[1]
        names = tile_clusters(torch.arange(1, number + 1).view(1, 1, *clusters), rows, columns)[..., 0] - 1  # (T, G)
        place = tiling.pairs.view(tiling.beyond.shape)
        tile, rest = place // (seen.shape[1] * names.shape[1]), place % (seen.shape[1] * names.shape[1])
        patch, cluster = seen[tile, rest // names.shape[1]], names[tile, rest % names.shape[1]]
        assert torch.equal(patch, torch.arange(grid[0] * grid[1]).unsqueeze(1).expand_as(patch))
        near = torch.zeros(grid[0] * grid[1], number, dtype=torch.bool)
        near[patch[~tiling.beyond], cluster[~tiling.beyond]] = True
        far = []
        for patches, cells in zip(grid, clusters, strict=True):
            cell = torch.arange(patches).unsqueeze(1) * cells // patches
            far.append((cell - torch.arange(cells)).abs() > window // 2)
        expected = ~(far[0][:, None, :, None] | far[1][None, :, None, :]).flatten(2).flatten(0, 1)
        assert torch.equal(near, expected)
        assert (~tiling.beyond).sum() == expected.sum() == place[~tiling.beyond].unique().numel()

    @pytest.mark.parametrize("patches", range(1, 40, 3))
    def test_no_band_sees_rows_that_none_of_them_needs(self, patches: int) -> None:
        """A band needs the patches of its cells and of those in the window beside it; one more where cells differ."""
        for cells in range(1, patches + 1):
            side = cut_side(patches, cells, 5)
            needed = []
            for band in range(side.bands):
                first, last = band * side.width - side.radius, (band + 1) * side.width + side.radius
                end = min(patches, first_patch(last, patches, cells))
                needed.append(end - max(0, first_patch(first, patches, cells)))
            assert max(needed) <= side.reach <= max(needed) + 1
            assert side.width * (side.bands - 1) < cells <= side.width * side.bands

    @pytest.mark.parametrize(
        ("side", "expected"),
        [
            ((14, 10, 5), Side(14, 10, 2, 2, 5, 10)),  # 7 cells of 1.4 rows
            ((64, 46, 5), Side(64, 46, 2, 8, 6, 14)),  # 10 cells of 1.39 rows
            ((14, 9, 5), Side(14, 9, 2, 1, 9, 14)),  # 14 * (9 + 5) against 2 * 11 * (5 + 5)
            ((7, 5, 99), Side(7, 5, 4, 1, 5, 7)),
            ((30, 22, 1), Side(30, 22, 0, 11, 2, 3)),
        ],
    )
    def test_bands_are_those_with_the_least_pairs_and_repetitions(
        self, side: tuple[int, int, int], expected: Side
    ) -> None:
        assert cut_side(*side) == expected

    def test_clusters_return_from_their_tiles(self) -> None:
        rows, columns = Side(30, 23, 2, 4, 6, 14), Side(14, 10, 2, 2, 5, 10)
        centres = torch.randn(2, 3, 23, 10)
        tiles = tile_clusters(centres, rows, columns)
        assert tiles.shape == (2 * 4 * 2, 6 * 5, 3)
        assert torch.equal(untile_clusters(tiles, rows, columns), centres.permute(0, 2, 3, 1))


class TestModel:
    def test_default_is_the_published_grid_before_three_sixteenths_of_the_blocks(self) -> None:
        with torch.device("meta"):
            model = effvit.sparsify("deit_tiny_patch16_224", "expedite")
        assert model.token_counts() == [196] * 2 + [100] * 10
        assert model.recover == "reconstruct"

    @pytest.mark.parametrize("host", ["class_token", "average_pool", "dinov3"])
    def test_maps_are_reconstructed_from_the_features_before_the_clusters(self, host: str) -> None:
        model = make_model("expedite", host)
        x = make_images(model)
        before, final = model.trace_tokens(x)[0], model.trace_tokens(x)[-1]
        prefix, patches = before.tokens.split(before.x)
        centres = cluster_tokens(patches.unflatten(1, before.tokens.grid), (4, 6), 3, 0.05, 3).flatten(1, 2)
        z = final.x[:, prefix.shape[1] :]
        expected = reconstruct_tokens(z, patches, centres, 0.05, 4)
        dense = model.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NLC")[0]
        assert torch.allclose(dense, expected, atol=1e-5)

    @pytest.mark.parametrize("host", NO_CLASS_POOL)
    def test_head_that_pools_patches_sees_all_of_them_reconstructed_before_the_norm(self, host: str) -> None:
        model = make_model("expedite", host)
        x = make_images(model)
        features = model.forward_features(x)
        assert features.shape[1] == model.num_prefix_tokens + model.patch_embed.num_patches
        dense = model.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NLC")[0]
        assert torch.allclose(features[:, model.num_prefix_tokens :], model.norm(dense), atol=1e-5)
        assert torch.allclose(model(x), model.forward_head(features), atol=1e-5)

    def test_class_token_head_needs_no_reconstruction(self) -> None:
        model = make_model("expedite", "class_token")
        assert model.forward_features(make_images(model)).shape[1] == 1 + 4 * 6

    @pytest.mark.parametrize("host", ["class_token", "average_pool", "eva02", "rope_mixed", "lvvit"])
    def test_restored_blocks_see_the_full_grid_again(self, host: str) -> None:
        model = make_model("expedite", host, restore_at=3, num_clusters=(2, 3), keep_rate=None)
        x = make_images(model)
        number = model.patch_embed.num_patches
        assert model.token_counts() == [number, 6, 6, number]
        trace = model.trace_tokens(x)
        assert [features.tokens.num_tokens for features in trace] == model.token_counts()
        assert not trace[-1].tokens.moved
        for features in trace:
            assert_law(features.tokens)
        restored = effvit.recover.restore(*trace[2])[0]
        positions = model._embed(x)[1]
        full = type(trace[0].tokens).full(restored, trace[0].tokens.grid, *(trace[0].tokens.num_prefix,) * 2)
        reducer, model.blocks[3].reducer = model.blocks[3].reducer, None
        expected = model.blocks[3](restored, full, model._block_positions(positions, 3))
        model.blocks[3].reducer = reducer
        assert torch.allclose(trace[-1].x, expected, atol=1e-5)
        assert model.forward_features(x).shape[1] == model.num_prefix_tokens + number

    def test_restored_model_compiles_and_gives_gradients(self) -> None:
        model = make_model("expedite", "average_pool", restore_at=2).train()
        x = make_images(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        model(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_clusters_of_the_whole_grid_change_nothing(self) -> None:
        host = make_host("class_token")
        model = effvit.sparsify(host, "expedite", num_clusters=(6, 8))
        x = make_images(host)
        assert torch.equal(model(x), host(x))

    def test_square_number_of_clusters_is_a_square_grid(self) -> None:
        model = effvit.sparsify(make_host("class_token"), "expedite", num_clusters=9)
        assert model.token_counts()[-1] == 9

    def test_soft_clusters_cannot_be_reduced_again(self) -> None:
        model = make_model("expedite", "class_token")
        tokens = model.forward_tokens(make_images(model)).tokens
        with pytest.raises(ValueError, match=r"stand for soft clusters cannot be reduced again.*effvit\.recover\.rest"):
            tokens.keep(tokens.anchor[:, :2] * 0, 2)

    def test_hard_labels_fill_the_maps_if_asked_for(self) -> None:
        model = make_model("expedite", "class_token", recover="zero")
        features = model.trace_tokens(make_images(model))[-1]
        assert (features.tokens.source >= 0).all()
        dense = model.forward_intermediates(make_images(model), 1, intermediates_only=True, output_fmt="NLC")[0]
        for image in range(2):
            assert torch.equal(dense[image], features.x[image, 1:][features.tokens.source[image]])


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"window_size": 4}, ValueError, "window_size must be odd, so that a cluster is in its middle, got 4"),
            ({"window_size": 3.0}, TypeError, "window_size must be a whole number, got 3.0"),
            (
                {"k": 25, "num_clusters": (4, 6)},
                ValueError,
                "k must be at most the number of clusters, got 25 for 4 x 6",
            ),
            ({"k": 0}, ValueError, "k must be at least 1, got 0"),
            (
                {"num_clusters": (7, 3)},
                ValueError,
                r"at most one for each token, got 7 x 3 for a grid of 6 x 8; use few",
            ),
            ({"num_clusters": 7}, ValueError, r"num_clusters must be a square number or \(rows, columns\), got 7"),
            (
                {"num_clusters": (2, 3, 4)},
                ValueError,
                r"num_clusters must be \(rows, columns\) or a square number, got",
            ),
            ({"num_clusters": 2.5}, TypeError, "num_clusters must be a whole number, got 2.5"),
            ({"num_clusters": 4, "keep_rate": 0.5}, ValueError, "keep_rate and num_clusters both set the clusters"),
            ({"keep_rate": 1.5}, ValueError, r"keep_rate must be in \(0, 1\], got 1.5"),
            ({"temperature": 0}, ValueError, "temperature must be a positive number, got 0"),
            ({"temperature": float("nan")}, ValueError, "temperature must be a positive number, got nan"),
            ({"num_iters": -1}, ValueError, "num_iters must be at least 0, got -1"),
            ({"norm": "max"}, ValueError, "norm must be one of l2, l1, official, got 'max'"),
            ({"cluster_at": 4}, ValueError, "cluster_at names block 4, but the model has blocks 0 to 3"),
            (
                {"cluster_at": 2, "restore_at": 2},
                ValueError,
                "restore_at must be a block behind cluster_at, got 2 and 2",
            ),
            ({"restore_at": 4}, ValueError, "restore_at names block 4, but the model has blocks 0 to 3"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            effvit.sparsify(make_host("class_token"), "expedite", **settings)

    def test_clusters_that_no_longer_fit_a_smaller_input(self) -> None:
        model = effvit.sparsify(make_host("class_token"), "expedite", num_clusters=(5, 5))
        with pytest.raises(ValueError, match="at most one for each token, got 5 x 5 for a grid of 4 x 8"):
            model.set_input_size((32, 64))

    def test_keep_rate_set_later(self) -> None:
        model = make_model("expedite", "class_token", restore_at=3)
        with pytest.raises(
            ValueError, match=r"expedite: a keep rate would have no effect.* \(num_clusters stands in its place\)"
        ):
            make_model("expedite", "class_token", keep_rate=None, num_clusters=(3, 3)).set_keep_rate(0.5)
        model.set_keep_rate(0.25)
        assert model.token_counts() == [48, 12, 12, 48]
        model.set_keep_rate(None)
        assert model.token_counts() == [48, 24, 24, 48]

    def test_patches_dropped_before_the_clustering(self) -> None:
        model = effvit.sparsify(make_host("class_token", patch_drop_rate=0.5), "expedite")
        x, never = make_images(model), effvit.sparsify(make_host("class_token"), "expedite").eval()
        assert torch.equal(model.eval()(x), never(x))  # eval mode drops no patch
        with pytest.raises(
            ValueError, match=r"expedite clusters the full grid, .* patch_drop_rate=0, or use it in eval"
        ):
            model.train()(make_images(model))

    def test_nan_in_an_image_is_named(self) -> None:
        model = make_model("expedite", "class_token")
        x = make_images(model)
        x[1, 0, 3, 3] = float("nan")
        with pytest.raises(
            ValueError, match=r"expedite in block 1: cluster centres are NaN for image 1 .* hold NaN or"
        ):
            model(x)
