"""HoT's token pruning cluster: peaks of density against a slow search, ties, and what is refused."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hosts import make_host, make_images, make_model

import effvit
from effvit.data.preparation import load_images
from effvit.reducers import density
from effvit.reducers.density import density_peaks, peak_scores, squared_distances
from effvit.show.pictures import cutout_pictures


def slow_scores(x: torch.Tensor, k: int) -> list[float]:
    """The scores of x (N, C) from the definition, token by token; of equal densities the first is the denser."""
    return [math.exp(score) for score in log_scores(x, k)]


def log_scores(x: torch.Tensor, k: int) -> list[float]:
    """Their logarithms."""
    number, width = x.shape
    distance = [[float((x[i] - x[j]).square().sum() / width) ** 0.5 for j in range(number)] for i in range(number)]
    density = [-sum(d * d for d in sorted(row)[:k]) / k for row in distance]  # its logarithm
    scores = []
    for i in range(number):
        denser = [
            distance[i][j]
            for j in range(number)
            if density[j] > density[i] + 1e-12 or (abs(density[j] - density[i]) <= 1e-12 and j < i)
        ]
        scores.append(density[i] + math.log(min(denser, default=max(map(max, distance)))))
    return scores


@pytest.mark.parametrize("length", [11, 14])  # all distances at once, and by blocks
@pytest.mark.parametrize("k", [2, 3, 5])
def test_scores_are_those_of_the_slow_search(k: int, length: int) -> None:
    x = torch.randn(3, length, 6, dtype=torch.float64)
    expected = torch.tensor([slow_scores(image, k) for image in x], dtype=torch.float64)
    assert torch.allclose(peak_scores(x, k).exp(), expected, atol=1e-9)


@pytest.mark.parametrize("length", [12, 90])  # all distances at once, and by blocks
def test_tokens_that_lie_far_apart_choose_by_their_order_too(length: int) -> None:
    """In float32 their densities are below the smallest number."""
    x = 100 * torch.randn(3, length, 8)
    expected = torch.tensor([log_scores(image, 3) for image in x.double()]).topk(9).indices
    assert torch.equal(peak_scores(x, 3).topk(9).indices, expected)
    assert len({*map(tuple, expected.sort().values.tolist())}) == 3


def test_of_two_tokens_nearest_to_each_other_the_first_is_the_peak() -> None:
    x = torch.tensor([[[0.0], [0.125], [8.0], [8.25], [20.0]]])
    assert density_peaks(x, 2).tolist() == [[0, 2]]
    # Without a rule for ties both of a pair would stand far from anything denser.
    assert peak_scores(x, compat=True)[0, 1] > 0 > peak_scores(x)[0, 1]


def test_distances_are_symmetric_to_the_last_bit_with_zeros_to_itself() -> None:
    distance = squared_distances(100 * torch.randn(2, 50, 33))
    assert torch.equal(distance, distance.transpose(1, 2))
    assert (distance.diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.parametrize("length", [40, 45])
def test_scores_by_blocks_are_those_of_all_distances(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, length, 8, dtype=torch.float64)
    x[0, 30] = x[0, 3]  # in another block
    x[1, 21:23] = x[1, 20]
    expected = peak_scores(x, 3)
    monkeypatch.setattr(density, "WIDTHS_WHOLE", 0)
    monkeypatch.setattr(density, "LEAST_BLOCK", 16)
    assert torch.allclose(peak_scores(x, 3).exp(), expected.exp(), atol=1e-7)  # a root of what should be 0 is 1e-8


def test_of_equal_tokens_in_different_blocks_the_first_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "WIDTHS_WHOLE", 0)
    monkeypatch.setattr(density, "LEAST_BLOCK", 2)
    x = torch.zeros(1, 6, 4)
    x[0, 5] = 1  # the only one that is elsewhere
    scores = peak_scores(x, 2)[0]
    assert scores[0].isfinite()
    assert scores[1:5].tolist() == [-math.inf] * 4


def test_equal_tokens_are_spread_over_the_sequence_in_order() -> None:
    index = density_peaks(torch.ones(2, 9, 4), 3)
    assert index.shape == (2, 3)
    assert (index.diff(dim=1) > 0).all()


def test_peaks_come_in_image_order_and_keep_their_features() -> None:
    model = make_model("hot", "average_pool", reduce_at=(0,), keep_rate=0.25)
    x, positions, tokens = model._start(make_images(model), memory=False)
    reducer = model.reducers[0]
    pruned, left = reducer.prune(x, tokens, 12)  # type: ignore[operator]
    assert positions is None
    assert (left.anchor.diff(dim=1) > 0).all()
    assert torch.equal(pruned, torch.stack([image[index] for image, index in zip(x, left.anchor, strict=True)]))
    assert torch.equal(left.anchor, density_peaks(x, 12))


def test_default_is_the_published_third_before_three_eighths_of_the_blocks() -> None:
    with torch.device("meta"):
        model = effvit.sparsify("deit_tiny_patch16_224", "hot")
    assert model.token_counts() == [196] * 4 + [66] * 8


def test_neighbours_must_be_at_least_two_and_at_most_all() -> None:
    host = make_host("class_token")
    with pytest.raises(ValueError, match="k must be at least 2, got 1"):
        effvit.sparsify(host, "hot", k=1)
    with pytest.raises(ValueError, match="k must be at least 2 and at most the number of tokens, got 49 for 48 tokens"):
        effvit.sparsify(host, "hot", k=49)(make_images(host))


def test_keep_rate_and_blocks_are_checked_as_for_the_other_methods() -> None:
    host = make_host("class_token")
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 1.5"):
        effvit.sparsify(host, "hot", keep_rate=1.5)
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        effvit.sparsify(host, "hot", num_tokens=0)
    with pytest.raises(ValueError, match="reduce_at names block 4, but the model has blocks 0 to 3"):
        effvit.sparsify(host, "hot", reduce_at=(4,))
    model = effvit.sparsify(host, "hot", reduce_at=(1,))
    model.set_keep_rate(0.5)
    assert model.token_counts() == [48, 24, 24, 24]


def test_nan_in_an_image_is_named() -> None:
    model = make_model("hot", "class_token")
    x = make_images(model)
    x[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"hot in block 1: peak scores are NaN for image 1 .* hold NaN or infinity"):
        model(x)


def test_attention_learns_to_recover_what_was_dropped_of_photographs() -> None:
    """As in the second half of HoT: maps of a third of the patches come nearer to those of the dense model."""
    dense = timm.create_model("vit_nano_patch8_96", pretrained=True).eval()
    model = effvit.sparsify(dense, "hot", recover="attention").requires_grad_(False)
    model.recovery.requires_grad_(True)
    images = load_images(dense, [picture.image for picture in cutout_pictures().values()])
    take = {"intermediates_only": True, "indices": [len(dense.blocks) - 1]}
    with torch.no_grad():
        (full,) = dense.forward_intermediates(images, **take)
    optimizer = torch.optim.Adam(model.recovery.parameters(), lr=4e-3)
    losses = []
    for _ in range(12):
        (recovered,) = model.forward_intermediates(images, **take)
        loss = (recovered - full).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
