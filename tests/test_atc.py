"""ATC: the agglomeration against a slow one, what merged tokens are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hosts import make_host, make_images, make_model

import effvit
from effvit.reducers.atc import LINKAGES, agglomerate, cosine_distances, number_clusters


def slow_clusters(distance: torch.Tensor, number: int, linkage: str) -> list[int]:
    """The first member of the cluster of each token of an image, from the definition: linkage over all members."""
    of_members = {"average": torch.mean, "complete": torch.amax, "single": torch.amin}[linkage]
    clusters = [[token] for token in range(len(distance))]
    while len(clusters) > number:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        i, j = min(pairs, key=lambda pair: float(of_members(distance[clusters[pair[0]]][:, clusters[pair[1]]])))
        clusters[i] += clusters.pop(j)
    first = {token: min(members) for members in clusters for token in members}
    return [first[token] for token in range(len(distance))]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("number", [1, 5, 16])
def test_clusters_are_those_of_the_slow_agglomeration(linkage: str, number: int) -> None:
    distance = cosine_distances(torch.randn(3, 16, 4, dtype=torch.float64))
    clusters = agglomerate(distance, number, linkage)
    assert clusters.tolist() == [slow_clusters(image, number, linkage) for image in distance]


def test_clusters_are_numbered_by_their_first_members() -> None:
    first, cluster = number_clusters(torch.tensor([[0, 1, 0, 3, 1, 3], [0, 0, 2, 2, 0, 5]]), 3)
    assert first.tolist() == [[0, 1, 3], [0, 2, 5]]
    assert cluster.tolist() == [[0, 1, 0, 2, 1, 2], [0, 0, 1, 1, 0, 2]]


def test_of_equal_tokens_the_first_pairs_join() -> None:
    assert agglomerate(torch.zeros(2, 4, 4), 2, "average").tolist() == [[0, 0, 0, 3]] * 2


def test_sizes_weigh_later_means_and_keys_only_with_proportional_attention() -> None:
    for prop_attn in (True, False):
        model = make_model("atc", "class_token", prop_attn=prop_attn)
        tokens = model.forward_tokens(make_images(model)).tokens
        assert tokens.size is not None
        assert (tokens.size[:, 1:].sum(1) == 48).all()
        assert (tokens.key_weight is not None) == prop_attn


def test_means_forget_sizes_without_proportional_attention() -> None:
    """Two stages on the same tokens: the second mean of the first two tokens and the third is that of two tokens."""
    sizes = {}
    for prop_attn in (True, False):
        model = make_model("atc", "class_token", prop_attn=prop_attn, reduce_at=(0,), num_tokens=1)
        x, _, tokens = model._start(make_images(model), memory=False)
        state = model.blocks[0].attend(x, tokens)[1]
        weight = torch.arange(1.0, 50.0).expand(2, -1)
        tokens = tokens.relabel(tokens.keep(tokens.source, 48).trail.step, 48, size=weight)  # type: ignore[arg-type]
        merged, _ = model.reducers[0].reduce(x, tokens, state)
        sizes[prop_attn] = merged[:, 1]
    shares = torch.arange(2.0, 50.0)
    assert torch.allclose(sizes[True], (x[:, 1:] * shares[:, None]).sum(1) / shares.sum(), atol=1e-5)
    assert torch.allclose(sizes[False], x[:, 1:].mean(1), atol=1e-5)


def test_settings_out_of_range_are_named() -> None:
    host = make_host("class_token")
    with pytest.raises(ValueError, match="linkage must be one of average, complete, single, got 'ward'"):
        effvit.sparsify(host, "atc", linkage="ward")
    with pytest.raises(TypeError, match="prop_attn must be True or False, got 0"):
        effvit.sparsify(host, "atc", prop_attn=0)
    with pytest.raises(ValueError, match="atc would leave 0 of 48 patch tokens in block 1"):
        effvit.sparsify(host, "atc", keep_rate=0.01, reduce_at=(1,))
    assert effvit.sparsify(host, "atc", num_tokens=99, reduce_at=(1,)).token_counts() == [48] * 4
