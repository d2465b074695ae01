"""Decisions are made in float32, under autocast and in half precision: equal to float64 on the same inputs."""

from __future__ import annotations

import hosts
import pytest
import torch
import torch.nn.functional as F
from architectures import make_architecture
from architectures import make_images as architecture_images
from graphs import dense_graph
from torch import Tensor

from effvit.architectures.semantic_tokens import soft_assignment
from effvit.attention import AttnState
from effvit.layers.bidirectional_attention import GatherAttention, exchange_weights
from effvit.layers.cross_attention import CrossAttention
from effvit.layers.super_tokens import associate
from effvit.reducers.bipartite import bipartite_soft_matching, kth_bipartite_target
from effvit.reducers.density import peak_scores
from effvit.reducers.expedite import cluster_centres, nearest_centre
from effvit.reducers.gtp import GTP, SELECTIONS, propagation_graph
from effvit.reducers.matching import alternating_match
from effvit.reducers.zero_tprune import SIMILARITIES, match_groups, weighted_page_rank
from effvit.tokens import TokenMap, wide_product

HALVES = (torch.bfloat16, torch.float16)
# float32 inputs under autocast, and inputs in half precision, whose values float64 holds exactly
WAYS = [(torch.float32, half) for half in HALVES] + [(half, None) for half in HALVES]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def autocast(half: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)


def make_state(dtype: torch.dtype, num_tokens: int = 64) -> AttnState:
    """Attention of 2 images of 8 x 8 patches and a class token, which are alike: near 1 bfloat16 has few values."""
    base = draw(2, 3, 1, 16)
    q, k, v = ((base + 0.2 * draw(2, 3, num_tokens + 1, 16).roll(i, 0)).to(dtype) for i in range(3))
    tokens = TokenMap.full(draw(2, num_tokens + 1, 48), (8, num_tokens // 8), 1, 1)
    return AttnState.of(q, k, v, 0.25, tokens)


def widened(state: AttnState) -> AttnState:
    return state._replace(q=state.q.double(), k=state.k.double(), v=state.v.double())


@pytest.mark.parametrize(("dtype", "half"), WAYS)
class TestDecisions:
    """The expectation is the same function on the same values in float64."""

    def test_product_is_that_of_float32(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        a, b = draw(2, 5, 64, dtype=dtype), draw(2, 64, 7, dtype=dtype)
        with autocast(half):
            product = wide_product(a, b)
        assert product.dtype == torch.float32
        assert torch.allclose(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)

    def test_matching_of_alternating_tokens(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        metric = (draw(2, 1, 32) + 0.2 * draw(2, 50, 32)).to(dtype)
        with autocast(half):
            best, match = alternating_match(metric, 1)
            matching = bipartite_soft_matching(metric, 9, 1)
            target = kth_bipartite_target(metric, 3)
        expected_best, expected = alternating_match(metric.double(), 1)
        assert torch.equal(match, expected)
        assert torch.allclose(best.double(), expected_best, atol=1e-6)
        assert torch.equal(matching.source, bipartite_soft_matching(metric.double(), 9, 1).source)
        assert torch.equal(target, kth_bipartite_target(metric.double(), 3))

    def test_attention_that_tokens_are_ranked_by(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        state = make_state(dtype)
        with autocast(half):
            rows, weights = state.class_rows(), state.softmax_map()
        logits = state.q.double() @ state.k.double().transpose(-2, -1) * 0.25
        assert rows.dtype == weights.dtype == torch.float32
        assert torch.allclose(weights.double(), logits.softmax(-1), rtol=1e-5, atol=1e-7)
        assert torch.allclose(rows.double(), logits.softmax(-1)[:, :, :1], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "Random"])
    def test_scores_of_gtp(self, dtype: torch.dtype, half: torch.dtype | None, selection: str) -> None:
        reducer = GTP.plan(1, num_prop=4, selection=selection)[0]
        assert isinstance(reducer, GTP)
        state = make_state(dtype)
        with autocast(half):
            scores = reducer.scores(state._replace(weights=state.softmax_map()))
        wide = widened(state)
        expected = reducer.scores(wide._replace(weights=wide.softmax_map()))
        assert torch.allclose(scores.double(), expected, rtol=1e-5, atol=1e-6)

    def test_semantic_graph_has_the_neighbours_asked_for(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        x = (draw(2, 1, 32) + 0.2 * draw(2, 65, 32)).to(dtype)
        with autocast(half):
            graph = dense_graph(propagation_graph(x, (8, 8), 1, "Semantic", 8))
        assert torch.equal((graph > 0).sum(2), torch.full((2, 64), 8))
        assert torch.equal(graph > 0, dense_graph(propagation_graph(x.double(), (8, 8), 1, "Semantic", 8)) > 0)

    def test_page_rank(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        weights = make_state(dtype).softmax_map()
        kept = torch.ones(2, 65).index_fill(1, torch.tensor([3, 8, 40]), 0)
        with autocast(half):
            rank, part = weighted_page_rank(weights, 20, 8.0), weighted_page_rank(weights, 20, 8.0, 1, kept, 62)
        assert torch.allclose(rank.double(), weighted_page_rank(weights.double(), 20, 8.0), rtol=1e-4, atol=1e-7)
        expected = weighted_page_rank(weights.double(), 20, 8.0, 1, kept.double(), 62)
        assert torch.allclose(part.double(), expected, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_look_alikes_of_zero_tprune(self, dtype: torch.dtype, half: torch.dtype | None, similarity: str) -> None:
        features = (draw(2, 1, 32) + 0.2 * draw(2, 60, 32)).to(dtype)
        places = torch.arange(60).expand(2, -1)
        groups = places[:, ::2], places[:, 1::2]
        with autocast(half):
            best, match = match_groups(features, *groups, similarity)
        expected_best, expected = match_groups(features.double(), *groups, similarity)
        assert torch.equal(match, expected)
        assert torch.allclose(best.double(), expected_best, rtol=1e-5, atol=1e-4)

    def test_density_peaks(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        x = draw(2, 40, 16, dtype=dtype)
        with autocast(half):
            scores = peak_scores(x, 3)
        assert torch.equal(scores.topk(9).indices, peak_scores(x.double(), 3).topk(9).indices)

    @pytest.mark.parametrize("num_iters", [0, 3])
    def test_clusters_and_labels(self, dtype: torch.dtype, half: torch.dtype | None, num_iters: int) -> None:
        x = draw(2, 8, 8, 16, dtype=dtype)
        with autocast(half):
            centres = cluster_centres(x, (3, 3), num_iters, 0.05)
            labels = nearest_centre(x.flatten(1, 2), centres.flatten(1, 2))
        expected = cluster_centres(x.double(), (3, 3), num_iters, 0.05)
        assert torch.allclose(centres.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(labels, nearest_centre(x.double().flatten(1, 2), expected.flatten(1, 2)))

    @pytest.mark.parametrize("n_iter", [1, 3])
    def test_association_of_super_tokens(self, dtype: torch.dtype, half: torch.dtype | None, n_iter: int) -> None:
        pixels = 3 * draw(2, 3, 4, 6, 16, dtype=dtype)
        with autocast(half):
            weights = associate(pixels, n_iter)
        assert torch.allclose(weights.double(), associate(pixels.double(), n_iter), rtol=1e-3, atol=1e-5)

    def test_assignment_of_semantic_tokens(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        attn = CrossAttention(24, 2)
        q, kv = draw(2, 4, 24, dtype=dtype), draw(2, 20, 48, dtype=dtype)
        with autocast(half):
            weights = soft_assignment(attn, q, kv, 16)
        assert torch.allclose(
            weights.double(), soft_assignment(attn, q.double(), kv.double(), 16), rtol=1e-4, atol=1e-6
        )

    def test_exchange_of_lookupvit(self, dtype: torch.dtype, half: torch.dtype | None) -> None:
        torch.manual_seed(0)
        attn = GatherAttention(24, 2, "softmax").to(dtype)
        compressed, lookup = draw(2, 4, 24, dtype=dtype), draw(2, 20, 24, dtype=dtype)
        with autocast(half), torch.no_grad():
            q, k = (y.unflatten(-1, (2, -1)).transpose(1, 2).double() for y in (attn.q(compressed), attn.k(lookup)))
            weights = attn(compressed, lookup)[1]
        expected = exchange_weights(q @ k.transpose(-2, -1) * 12**-0.5, "softmax")[1]
        assert weights is not None
        assert torch.allclose(weights.double(), expected, rtol=1e-4, atol=1e-6)


def test_random_scores_of_half_precision_do_not_tie() -> None:
    """bfloat16 has 256 values in a range of random numbers: of 64 scores some would be equal."""
    reducer = GTP.plan(1, num_prop=4, selection="Random")[0]
    assert isinstance(reducer, GTP)
    torch.manual_seed(0)
    scores = reducer.scores(make_state(torch.bfloat16))
    assert scores.dtype == torch.float32
    assert all(len(row.unique()) == len(row) for row in scores)


def test_propagation_keeps_the_residual_stream_in_float32_under_autocast() -> None:
    """As in timm's blocks, whose residuals add half-precision branches to a float32 stream."""
    model = hosts.make_model("gtp", "class_token")
    streams = []
    model.blocks[1].register_forward_hook(lambda _module, _args, out: streams.append(out[0].dtype))
    with autocast(torch.bfloat16), torch.no_grad():
        model(hosts.make_images(model))
    assert streams == [torch.float32]


@pytest.mark.parametrize("dtype", HALVES)
class TestHalfPrecision:
    """Every setting that chooses an operation runs in half precision on a CPU, near its own result in float32."""

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_zero_tprune_runs(self, dtype: torch.dtype, similarity: str) -> None:
        self.assert_near("zero_tprune", dtype, similarity=similarity)

    @pytest.mark.parametrize("graph_type", ["Spatial", "Semantic", "Mixed"])
    def test_gtp_runs(self, dtype: torch.dtype, graph_type: str) -> None:
        self.assert_near("gtp", dtype, graph_type=graph_type, sparsity=0.6)

    @pytest.mark.parametrize("method", ["evit", "tome", "ats", "dymu", "algm", "hot", "expedite"])
    def test_method_runs(self, dtype: torch.dtype, method: str) -> None:
        self.assert_near(method, dtype)

    def assert_near(self, method: str, dtype: torch.dtype, **settings: object) -> None:
        model = hosts.make_model(method, "class_token", **settings)
        x = hosts.make_images(model)
        with torch.no_grad():
            expected = model(x)
            scores = model.to(dtype)(x.to(dtype))
        assert scores.dtype == dtype
        assert F.cosine_similarity(scores.float(), expected).min() > 0.9

    @pytest.mark.parametrize(
        "case", ["stvit learned", "stvit_r_swin", "supertoken_options", "sit", "lookupvit", "casvit"]
    )
    def test_architecture_runs(self, dtype: torch.dtype, case: str) -> None:
        model, x = make_architecture(case), architecture_images(case)
        with torch.no_grad():
            expected = model(x)
            scores = model.to(dtype)(x.to(dtype))
        assert scores.dtype == dtype
        assert F.cosine_similarity(scores.float(), expected).min() > 0.98
