"""Tokens behind projectors, and of NaFlexVits. Expectations are those of timm's towers, and softmax maps by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_naflex import collated, make, pixels
from test_towers import ENCODERS, build, images
from torch import Tensor, nn

import effvit
from effvit.selectors.cells import cell_grid, cell_means, to_cells

PROJECTING = (*ENCODERS, "qwen3 merge", "deepseek align")
CELLS = {"qwen3": (3, 6), "deepseek": (2, 3), "gemma4": (2, 4)}
GRIDS = {"qwen3": (6, 12), "deepseek": (5, 7), "gemma4": (6, 12)}


def family(case: str) -> str:
    return case.split()[0]


def received(tower: nn.Module, x: Tensor, block: int) -> Tensor:
    """(B, N) mean attention that each patch gets in a block: the softmax map of ``sparsify``'s own block, by hand."""
    state: list[Any] = []
    host = effvit.sparsify(tower, "tome", r=0)
    attn = host.blocks[block].attn
    plain = attn.forward

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        state.append(args[5].value)
        return out

    attn.forward = noted
    host.forward_tokens(x, block=block)
    (found,) = state
    return (found.q @ found.k.transpose(-2, -1) * found.scale).softmax(-1).mean((1, 2))


def mean_of_cells(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Means over side x side patches, cell by cell, of those that the grid has."""
    apart = scores.unflatten(1, grid)
    rows = [
        apart[:, top : top + side, left : left + side].flatten(1).mean(1)
        for top in range(0, grid[0], side)
        for left in range(0, grid[1], side)
    ]
    return torch.stack(rows, dim=1)


class TestProjectors:
    @pytest.mark.parametrize("case", ENCODERS)
    @pytest.mark.parametrize("method", ["divprune", "class_attention", "uniform", "random"])
    def test_tokens_are_those_that_the_dense_tower_gives_its_language_model(self, case: str, method: str) -> None:
        dense, x = build(case), images(case)
        scores = {"scores": "received"} if method == "class_attention" else {}
        chosen = effvit.select_tokens(dense, x, method, keep=4, **scores)
        read = dense(x)
        assert chosen.grid == CELLS[family(case)]
        assert torch.equal(chosen.tokens, chosen.take(read))
        assert (chosen.ids.diff() > 0).all()
        ranked = {"scores": chosen.scores} if scores else {}
        alone = effvit.select_tokens(None, None, method, keep=4, tokens=read, grid=chosen.grid, **ranked)
        assert torch.equal(chosen.ids, alone.ids), "the same choice as an engine makes of the projected tokens"

    @pytest.mark.parametrize("case", PROJECTING)
    def test_all_cells_are_the_projected_tokens_bit_for_bit(self, case: str) -> None:
        """An encoder returns its projected tokens; a classifier of them has them as its features."""
        dense, x = build(case), images(case)
        chosen = effvit.select_tokens(dense, x, "divprune", keep=1.0)
        assert torch.equal(chosen.tokens, dense(x) if case in ENCODERS else dense.forward_features(x))

    @pytest.mark.parametrize("case", ENCODERS)
    def test_cells_are_ranked_by_the_mean_attention_their_patches_get_in_the_last_block(self, case: str) -> None:
        dense, x = build(case), images(case)
        chosen = effvit.select_tokens(dense, x, "class_attention", keep=3, scores="received")
        side = 2 if case.startswith("qwen3") else 3
        expected = mean_of_cells(received(dense, x, -1), GRIDS[family(case)], side)
        torch.testing.assert_close(chosen.scores, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(chosen.ids, expected.topk(3).indices.sort(1).values)

    @pytest.mark.parametrize("case", ENCODERS)
    def test_positions_are_rows_and_columns_of_the_dense_grid_of_cells(self, case: str) -> None:
        chosen = effvit.select_tokens(build(case), images(case), "divprune", keep=4)
        width = CELLS[family(case)][1]
        assert torch.equal(chosen.positions(5) - 5, torch.stack([chosen.ids // width, chosen.ids % width], dim=-1))

    @pytest.mark.parametrize("case", ENCODERS)
    def test_contextual_tokens_are_sums_of_projected_tokens(self, case: str) -> None:
        """Dominant tokens are the projected ones as they are; every cell goes into some token."""
        dense, x = build(case), images(case)
        chosen = effvit.select_tokens(dense, x, "visionzip", keep=5, contextual=2, scores="received")
        assert chosen.group is not None
        assert (chosen.group >= 0).all()
        kept = (chosen.tokens.unsqueeze(2) == dense(x).unsqueeze(1)).all(-1).any(-1)  # (B, K)
        assert (kept.sum(1) >= 3).all()

    @pytest.mark.parametrize("case", ["qwen3 encoder", "deepseek encoder", "gemma4 soft"])
    def test_the_tower_stays_as_it_was(self, case: str) -> None:
        dense, x = build(case), images(case)
        before, kinds = dense(x), [type(module) for module in dense.modules()]
        effvit.select_tokens(dense, x, "visionzip", keep=4, scores="received")
        assert torch.equal(dense(x), before)
        assert [type(module) for module in dense.modules()] == kinds

    def test_frames_and_crops_are_cells_of_projected_tokens_too(self) -> None:
        dense, x = build("qwen3 encoder"), images("qwen3 encoder", batch=5)
        video = effvit.select_video(dense, x, keep=0.5, tau=1.0)  # nothing stays the same, so that nothing is merged
        assert video.grid == (5, 3, 6)
        read = dense(x)
        assert torch.equal(video.tokens, read.flatten(0, 1)[video.ids])
        parts = effvit.select_parts(dense, x, "divprune", crops=(2, 2), keep=0.5)
        assert torch.equal(parts.selection.tokens, parts.selection.take(read))
        assert parts.canvas_ids().max() < 4 * 18

    def test_merger_outside_of_a_tower_without_its_own_is_given(self) -> None:
        dense, x = build("deepseek classifier"), images("deepseek classifier")
        with pytest.raises(ValueError, match="the height of the grid 5 x 7 is 5; resize or pad"):
            effvit.select_tokens(dense, x, "divprune", keep=2, merge=3)
        chosen = effvit.select_tokens(dense, x[..., :42, :84], "divprune", keep=2, merge=3)
        assert (chosen.grid, chosen.tokens.shape) == ((1, 2), (2, 2, 9 * 32))

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek mean", "gemma4 patches"])
    def test_tower_without_its_projector_is_any_tower(self, case: str) -> None:
        dense, x = build(case), images(case)
        chosen = effvit.select_tokens(dense, x, "divprune", keep=9)
        maps = dense.forward_intermediates(x, indices=[-2], norm=False, intermediates_only=True, output_fmt="NLC")
        assert torch.equal(chosen.tokens, chosen.take(maps[0]))
        assert chosen.grid == GRIDS[family(case)]

    @pytest.mark.parametrize("case", ["qwen3 classifier", "deepseek encoder"])
    def test_random_cells_are_exported_at_the_size_of_the_tower(self, case: str) -> None:
        """An order cannot be drawn inside torch.export, so it is drawn for the tower's own grid before."""
        module, x = effvit.TokenSelector(build(case), "random", keep=3), images(case)
        program = torch.export.export(module, (x,))
        assert torch.equal(program.module()(x).ids, module(x).ids)
        side = {"qwen3": 64, "deepseek": 56}[family(case)]
        other = images(case, size=(side, side))
        assert module(other).counts.tolist() == [3, 3]
        with pytest.raises(
            ValueError, match=r"no random order of \d x \d can be drawn while a model is exported; make"
        ):
            torch.export.export(module, (other,))

    def test_patches_of_large_norm_are_those_in_front_of_the_projector(self) -> None:
        dense, x = build("qwen3 encoder"), images("qwen3 encoder")
        patches = dense.forward_intermediates(x, norm=False, intermediates_only=True, output_fmt="NLC")[-1]
        norms = patches.detach().norm(dim=-1)
        highest = mean_of_cells((norms == norms.amax(1, keepdim=True)).float(), (6, 12), 2) > 0
        bound = norms.topk(2, dim=1).values[0].mean().item()
        chosen = effvit.select_tokens(dense, x[:1], "class_attention", keep=17, scores="received", max_norm=bound)
        assert torch.equal(chosen.mask(), ~highest[:1])

    def test_reduced_tower_gives_what_is_left_through_its_own_output(self) -> None:
        """The remedy that the refusal names: the restored grid, projected, as tokens."""
        dense, x = build("qwen3 encoder"), images("qwen3 encoder")
        tower = effvit.sparsify(dense, "tome", r=8)
        with pytest.raises(ValueError, match="a merger of 2 x 2 needs all patches in place, but tome leaves 40 of 72"):
            effvit.select_tokens(tower, x, "divprune", keep=4)
        assert effvit.select_tokens(None, None, "divprune", keep=4, tokens=tower(x), grid=(3, 6)).counts.tolist() == [
            4,
            4,
        ]

    def test_other_blocks_cells_and_images_are_refused(self) -> None:
        dense, x = build("qwen3 encoder"), images("qwen3 encoder")
        for block in (-2, 0):
            message = (
                rf"the projector of this Qwen3VitEncoder reads the last block, 3, got block={block}; leave block out"
            )
            with pytest.raises(ValueError, match=message):
                effvit.select_tokens(dense, x, "divprune", keep=4, block=block)
        assert effvit.select_tokens(dense, x, "divprune", keep=4, block=-1, merge=2).counts.tolist() == [4, 4]
        with pytest.raises(
            ValueError, match="makes one token of 2 x 2 patches, got merge=1; leave merge out, or create"
        ):
            effvit.select_tokens(dense, x, "divprune", keep=4, merge=1)
        with pytest.raises(ValueError, match=r"reads cells of 2 x 2 patches, .* got 6 x 7 patches"):
            effvit.select_tokens(dense, x[..., :112], "divprune", keep=4)
        with pytest.raises(
            ValueError, match="class_attention scores patches by the class token, but the tower has none"
        ):
            effvit.select_tokens(dense, x, "class_attention", keep=4)
        with pytest.raises(
            TypeError, match=r"takes images .*, got 'patches': patches with coordinates come in no grid"
        ):
            effvit.select_tokens(build("gemma4 encoder"), {"patches": x}, "divprune", keep=4)

    @pytest.mark.parametrize("case", ENCODERS)
    def test_module_is_one_graph(self, case: str) -> None:
        module = effvit.TokenSelector(build(case), "visionzip", keep=4, contextual=1, scores="received")
        x = images(case)
        with torch.no_grad():
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            assert torch.equal(compiled(x).ids, module(x).ids)


class TestFilledCells:
    def test_mean_of_a_cell_is_that_of_the_patches_it_has(self) -> None:
        x = torch.rand(2, 35)
        torch.testing.assert_close(cell_means(x, (5, 7), 3, filled=True), mean_of_cells(x, (5, 7), 3))
        whole = torch.rand(2, 36)
        assert torch.equal(cell_means(whole, (6, 6), 3, filled=True), cell_means(whole, (6, 6), 3))
        assert cell_grid((5, 7), 3, filled=True) == (2, 3)
        assert to_cells(whole.unsqueeze(-1), (6, 6), 3).shape == (2, 4, 9)
        with pytest.raises(ValueError, match="the height of the grid 5 x 7 is 5; resize or pad"):
            cell_means(x, (5, 7), 3)


class TestNaFlex:
    def test_images_are_those_of_a_plain_tower(self) -> None:
        tower, x = make("token"), torch.stack(pixels((6, 8), (6, 8)))
        chosen = effvit.select_tokens(tower, x, "class_attention", keep=9)
        patches, prefix = tower.forward_intermediates(
            x, indices=[-2], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )[0]
        assert chosen.grid == (6, 8)
        assert torch.equal(chosen.prefix, prefix)
        assert torch.equal(chosen.tokens, chosen.take(patches))
        assert torch.equal(chosen.ids, chosen.scores.topk(9).indices.sort(1).values)

    def test_patches_of_one_grid_are_the_images_whatever_order_and_padding_they_come_in(self) -> None:
        tower, own = make("token"), pixels((5, 7), (5, 7))
        batch = collated(own, 50)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
        shuffled = {name: part[:, order] for name, part in batch.items()}
        expected = effvit.select_tokens(tower, torch.stack(own), "visionzip", keep=9)
        for patches in (batch, shuffled):
            chosen = effvit.select_tokens(tower, patches, "visionzip", keep=9)
            assert chosen.grid == (5, 7)
            assert torch.equal(chosen.ids, expected.ids)
            torch.testing.assert_close(chosen.tokens, expected.tokens, rtol=1e-4, atol=1e-5)

    def test_tower_without_a_class_token_needs_to_be_told_by_what(self) -> None:
        with pytest.raises(ValueError, match="the tower has none; give scores='received'"):
            effvit.select_tokens(make("average"), collated(pixels((5, 7))), "class_attention", keep=4)

    def test_patches_of_several_grids_are_refused(self) -> None:
        message = (
            "2 different grids, 5 x 7, 7 x 5, so there is no grid for the ids of all; give the images of one grid at"
        )
        with pytest.raises(ValueError, match=message):
            effvit.select_tokens(make("token"), collated(pixels((5, 7), (7, 5))), "divprune", keep=4)
