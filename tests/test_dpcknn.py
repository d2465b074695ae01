"""DPC-KNN: clusters around peaks of density and what merges into them, against a slow search, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hosts import make_host, make_images, make_model

import effvit
from effvit.reducers.clusters import merge_clusters
from effvit.reducers.density import density_peaks, peak_scores
from effvit.reducers.dpcknn import peak_clusters


def test_every_token_goes_to_the_nearest_centre_and_a_centre_to_itself() -> None:
    """The expectation is a search over all pairs; equal tokens show that a centre does not go to an earlier one."""
    x = torch.randn(3, 20, 6, dtype=torch.float64)
    x[0, 11] = x[0, 4]
    scores = torch.rand(3, 20)
    scores[0, [4, 11]] = torch.tensor([2.0, 1.5])  # both are centres
    centres, cluster = peak_clusters(scores, x, 5)
    assert torch.equal(centres, scores.argsort(dim=1, descending=True)[:, :5])
    for image in range(3):
        for token in range(20):
            distance = (x[image, centres[image]] - x[image, token]).norm(dim=-1)
            own = (centres[image] == token).nonzero().flatten().tolist()
            assert cluster[image, token] == (own[0] if own else int(distance.argmin()))


def test_merged_token_is_the_weighted_mean_of_its_members() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    weight, size = torch.rand(2, 7, dtype=torch.float64), torch.randint(1, 4, (2, 7)).double()
    cluster = torch.tensor([[0, 1, 1, 0, 2, 1, 2], [2, 2, 2, 0, 1, 0, 0]])
    merged, sizes = merge_clusters(x, weight, size, cluster, 3, eps=0.5)
    for image in range(2):
        for number in range(3):
            members = cluster[image] == number
            shares = weight[image, members]
            mean = (shares.unsqueeze(-1) * x[image, members]).sum(0) / (shares.sum() + 0.5)
            assert torch.allclose(merged[image, number], mean)
            assert sizes[image, number] == size[image, members].sum()


def test_centres_are_the_peaks_of_hot() -> None:
    """One formulation of density peaks serves both methods."""
    model = make_model("dpcknn", "average_pool", reduce_at=(0,), num_tokens=12, k=3)
    x, _, tokens = model._start(make_images(model), memory=False)
    _, left = model.reducers[0].merge(x, tokens, 12)  # type: ignore[operator]
    assert torch.equal(left.anchor.sort(dim=1).values, density_peaks(x, 12, k=3))
    scores = peak_scores(x, 3).gather(1, left.anchor)
    assert (scores.diff(dim=1) <= 0).all()


def test_untrained_score_weights_equally() -> None:
    """It starts at zero; exp(0) is the weight of ``equal_weight``."""
    learnt, equal = (make_model("dpcknn", "class_token", equal_weight=equal) for equal in (False, True))
    x = make_images(learnt)
    assert torch.equal(learnt(x), equal(x))
    assert not equal.reducers[1].state_dict()


def test_score_moves_the_mean_towards_its_tokens() -> None:
    model = make_model("dpcknn", "class_token").double()
    score = model.reducers[1].score  # type: ignore[union-attr]
    x = make_images(model).double()
    equal = model(x)
    torch.nn.init.normal_(score.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    scaled = model(x)
    assert not torch.allclose(scaled, equal)
    torch.nn.init.constant_(score.bias, 3.0)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(model(x), scaled, atol=1e-4)  # a factor on all weights cancels, but for the eps of the sum


def test_sizes_add_up_to_the_patches_over_several_stages() -> None:
    model = make_model("dpcknn", "class_token")
    tokens = model.forward_tokens(make_images(model)).tokens
    assert tokens.size is not None
    assert tokens.key_weight is None  # attention stays plain
    assert (tokens.size[:, 1:].sum(1) == tokens.num_patches).all()
    assert (tokens.size[:, :1] == 1).all()


def test_counts_are_powers_of_the_rate_at_the_published_blocks() -> None:
    with torch.device("meta"):
        model = effvit.sparsify("deit_tiny_patch16_224", "dpcknn")
    assert model.token_counts() == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3


def test_equal_tokens_make_clusters_of_finite_tokens() -> None:
    """Of a flat image all densities are equal; the release chooses by its noise."""
    centres, cluster = peak_clusters(peak_scores(torch.ones(2, 9, 4), 5), torch.ones(2, 9, 4), 3)
    assert all(len(set(row)) == 3 for row in centres.tolist())
    assert torch.equal(cluster.gather(1, centres), torch.arange(3).expand(2, -1))


def test_settings_out_of_range_are_named() -> None:
    host = make_host("class_token")
    with pytest.raises(ValueError, match="k must be at least 2, got 1"):
        effvit.sparsify(host, "dpcknn", k=1)
    with pytest.raises(TypeError, match="equal_weight must be True or False, got 1"):
        effvit.sparsify(host, "dpcknn", equal_weight=1)
    with pytest.raises(ValueError, match="k must be at least 2 and at most the number of tokens, got 49 for 48 tokens"):
        effvit.sparsify(host, "dpcknn", k=49)(make_images(host))
    with pytest.raises(ValueError, match="dpcknn would leave 0 of 48 patch tokens in block 1"):
        effvit.sparsify(host, "dpcknn", keep_rate=0.01, reduce_at=(1,))


def test_keep_rate_can_change_while_training() -> None:
    model = make_model("dpcknn", "class_token", reduce_at=(1, 3))
    model.set_keep_rate(0.5)
    assert model.token_counts() == [48, 24, 24, 12]
    assert model.settings["keep_rate"] == 0.5
