"""Seeds against torch's pooling and closed forms, and the way up from semantic tokens to patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.architectures.semantic_tokens import LearnedSeeds, SeedBlock, SemanticBlock, max_seeds, soft_assignment
from effvit.layers.cross_attention import CrossAttention

DIM = 12
# Divisible, overlapping in one or both directions (7 in 3 is a Swin's window, 14 in 4 DeiT's grid), equal, one token.
GRIDS = [((8, 8), (4, 4)), ((14, 14), (4, 4)), ((7, 7), (3, 3)), ((5, 9), (4, 3)), ((3, 4), (3, 4)), ((6, 5), (1, 1))]


def image_tokens(grid: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], DIM, dtype=torch.float64)


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)


class TestMaxSeeds:
    @pytest.mark.parametrize(("grid", "out"), GRIDS)
    def test_are_those_of_adaptive_max_pooling_and_so_are_the_gradients(
        self, grid: tuple[int, int], out: tuple[int, int]
    ) -> None:
        x = image_tokens(grid).requires_grad_()
        weight = torch.randn(2, out[0] * out[1], DIM, dtype=torch.float64)
        own = max_seeds(x, grid, out)
        expected = F.adaptive_max_pool2d(as_map(x, grid), out).flatten(2).transpose(1, 2)
        assert torch.equal(own, expected)
        gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (own, expected)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-14)

    def test_need_a_patch_for_every_seed(self) -> None:
        with pytest.raises(
            ValueError, match=r"4 x 4 semantic tokens need a grid of at least .* got 4 x 3; use larger images"
        ):
            max_seeds(image_tokens((4, 3)), (4, 3), (4, 4))


class TestLearnedSeeds:
    @pytest.mark.parametrize(("grid", "out"), [(g, o) for g, o in GRIDS if g[0] % o[0] == g[1] % o[1] == 0])
    def test_start_as_the_means_of_windows_where_these_divide_the_grid(
        self, grid: tuple[int, int], out: tuple[int, int]
    ) -> None:
        x = image_tokens(grid)
        expected = F.adaptive_avg_pool2d(as_map(x, grid), out).flatten(2).transpose(1, 2)
        assert torch.allclose(LearnedSeeds(DIM).double()(x, grid, out), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(("grid", "out"), GRIDS)
    def test_are_weighted_means_of_image_tokens(self, grid: tuple[int, int], out: tuple[int, int]) -> None:
        pool = busy(LearnedSeeds(DIM))
        x = image_tokens(grid)
        x[..., 0] = 3.0  # whatever the mask and the offset, a mean of equal values is that value
        seeds = pool(x, grid, out)
        assert seeds.shape == (2, out[0] * out[1], DIM)
        assert torch.allclose(seeds[..., 0], torch.full_like(seeds[..., 0], 3.0), rtol=0, atol=1e-12)
        assert (seeds.amax(1) <= x.amax(1) + 1e-12).all()

    def test_offset_of_one_window_reads_the_neighbour(self) -> None:
        pool, x = LearnedSeeds(DIM).double(), image_tokens((4, 6))
        still = pool(x, (4, 6), (2, 3)).unflatten(1, (2, 3))
        with torch.no_grad():
            pool.proj.bias[1] = 100.0  # tanh of it is 1: one window to the right
        moved = pool(x, (4, 6), (2, 3)).unflatten(1, (2, 3))
        assert torch.allclose(moved[:, :, :2], still[:, :, 1:], rtol=0, atol=1e-12)

    def test_mask_picks_one_token_of_a_window(self) -> None:
        pool, x = LearnedSeeds(DIM).double(), image_tokens((4, 4))
        with torch.no_grad():
            pool.conv.weight.zero_()
            pool.conv.weight[:, 0, 1, 1] = 1.0  # identity
            pool.proj.weight[0, 0] = 1e4  # the mask follows the first normalised channel
        position = F.gelu(F.layer_norm(x, (DIM,), eps=pool.norm.eps))[..., 0].view(2, 4, 4)
        windows = position.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3).flatten(3)
        tokens = x.view(2, 2, 2, 2, 2, DIM).transpose(2, 3).flatten(3, 4)  # (B, 2, 2, 4, C)
        picked = tokens.gather(3, windows.argmax(-1)[..., None, None].expand(-1, -1, -1, 1, DIM)).squeeze(3)
        assert torch.allclose(pool(x, (4, 4), (2, 2)), picked.flatten(1, 2), rtol=0, atol=1e-6)

    def test_gradients_reach_the_mask_and_the_offset(self) -> None:
        pool = busy(LearnedSeeds(DIM))
        pool(image_tokens((5, 9)), (5, 9), (4, 3)).square().sum().backward()
        assert pool.proj.weight.grad is not None
        assert (pool.proj.weight.grad.flatten(1).abs().amax(1) > 0).all()

    def test_need_a_patch_for_every_seed(self) -> None:
        with pytest.raises(ValueError, match="2 x 2 semantic tokens need a grid"):
            LearnedSeeds(DIM).double()(image_tokens((1, 8)), (1, 8), (2, 2))


def busy(module: LearnedSeeds) -> LearnedSeeds:
    """The module with weights away from their initial zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module.double()


class TestSoftAssignment:
    def test_is_the_transposed_mean_attention_normalised_over_semantic_tokens(self) -> None:
        attn = CrossAttention(DIM, 3).double()
        s, x = image_tokens((2, 2)), image_tokens((3, 5))
        q, kv = attn.q(s), attn.kv(torch.cat([s, x], dim=1))
        key = attn.split_heads(kv[..., :DIM])
        weights = (attn.split_heads(q) @ key.transpose(2, 3) * (DIM // 3) ** -0.5).softmax(-1)
        expected = weights.mean(1)[:, :, 4:].transpose(1, 2)
        expected = expected / expected.sum(-1, keepdim=True)
        assert torch.allclose(soft_assignment(attn, q, kv, 15), expected, rtol=0, atol=1e-12)

    def test_is_finite_where_the_attention_underflows(self) -> None:
        attn = CrossAttention(DIM, 3)
        q, kv = 1e3 * torch.randn(1, 4, DIM), 1e3 * torch.randn(1, 15, 2 * DIM)
        assert torch.allclose(soft_assignment(attn, q, kv, 15).sum(-1), torch.ones(1, 15))


def test_heads_of_a_cross_attention_may_be_narrower_but_not_empty() -> None:
    narrow = CrossAttention(DIM, 1, head_dim=2)
    assert narrow(torch.randn(1, 4, DIM), torch.randn(1, 9, DIM)).shape == (1, 4, DIM)
    assert narrow.kv.out_features == 4
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        CrossAttention(DIM, 1, head_dim=0)
    with pytest.raises(ValueError, match=f"num_heads must divide the channels, got 7 heads for {DIM} channels"):
        CrossAttention(DIM, 7)


class TestLayers:
    def test_first_layer_attends_from_its_seeds_to_the_image(self) -> None:
        block, x = SeedBlock(DIM, 3, (2, 2), init_values=None).double(), image_tokens((3, 5))
        seeds = max_seeds(x, (3, 5), (2, 2))
        s, assignment = block(x, (3, 5))
        assert assignment is None
        assert torch.allclose(s, super(SeedBlock, block).forward(seeds, x), rtol=0, atol=1e-12)  # CrossBlock's

    def test_later_layer_adds_the_centres_to_its_queries_and_not_to_its_keys(self) -> None:
        block, s, x = SemanticBlock(DIM, 3, 4, init_values=None).double(), image_tokens((2, 2)), image_tokens((3, 5))
        assert block.global_centres is not None
        expected = super(SemanticBlock, block).forward(s + block.global_centres, s, x)  # CrossBlock's
        out, assignment = block(s, x, assign=True)
        assert torch.allclose(out, expected, rtol=0, atol=1e-12)
        assert assignment is not None
        assert assignment.shape == (2, 15, 4)

    def test_parameters_of_an_option_exist_only_with_it(self) -> None:
        plain = [SeedBlock(DIM, 3, (2, 2)), SemanticBlock(DIM, 3)]
        assert {
            name for block in plain for name, _ in block.named_parameters() if "pool" in name or "cent" in name
        } == set()

    def test_unknown_pooling_is_refused(self) -> None:
        with pytest.raises(ValueError, match="seed_pool must be 'max' or 'learned', got 'mean'"):
            SeedBlock(DIM, 3, (2, 2), seed_pool="mean")
