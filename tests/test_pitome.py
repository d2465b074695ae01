"""PiToMe: who merges and who is protected, against a slow search; margins, counts, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from torch import Tensor

import effvit
from effvit.attention import AttnState
from effvit.reducers import pitome
from effvit.reducers.pitome import PiToMe, energy, energy_matching
from effvit.tokens import TokenMap


def cosine(metric: Tensor, a: int, b: int) -> float:
    return float(F.cosine_similarity(metric[a], metric[b], dim=0))


def slow_groups(metric: Tensor, r: int, margin: float, protects: bool) -> set[frozenset[int]]:
    """The patches (N, D) of one image that share a token, from the equations of 2405.16148, pair by pair."""
    number = len(metric)
    energies = []
    for a in range(number):
        above = [cosine(metric, a, b) - margin for b in range(number)]
        energies.append(sum(t if t > 0 else math.exp(t) - 1 for t in above) / number)
    ranked = sorted(range(number), key=lambda token: -energies[token])
    candidates = ranked[: 2 * r] if protects else ranked
    merging, absorbing = candidates[0::2], candidates[1::2]
    into = {a: max(absorbing, key=lambda b, a=a: cosine(metric, a, b)) for a in merging}  # type: ignore[misc]
    most_similar = sorted(merging, key=lambda a: -cosine(metric, a, into[a]))[:r]
    groups = {token: {token} for token in range(number)}
    for a in most_similar:
        groups[into[a]] |= groups.pop(a)
    return {frozenset(group) for group in groups.values()}


def groups_of(source: Tensor) -> set[frozenset[int]]:
    """The patches (N,) of one image that share a token."""
    return {frozenset((source == token).nonzero().flatten().tolist()) for token in source.unique()}


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("protects", [True, False])
@pytest.mark.parametrize("r", [1, 4, 6])
def test_merging_is_that_of_the_slow_search(num_prefix: int, protects: bool, r: int) -> None:
    """Keys are averaged over heads; a token is the mean of its patches, and prefix tokens stay as they are."""
    length, margin = num_prefix + 12, 0.3
    x, tokens = torch.randn(3, length, 5), TokenMap.full(torch.zeros(3, length, 1), (3, 4), num_prefix, 0)
    k = torch.randn(3, 2, length, 4)
    reducer = PiToMe(1 - r / 12, margin, protects, prop_attn=False)
    merged, left = reducer.reduce(x, tokens, AttnState.of(k, k, k, 0.5, tokens))
    assert left.num_tokens == 12 - r
    assert torch.equal(merged[:, :num_prefix], x[:, :num_prefix])
    for image in range(3):
        metric, patches = k[image].mean(0)[num_prefix:], x[image, num_prefix:]
        assert groups_of(left.source[image]) == slow_groups(metric, r, margin, protects)
        means = [patches[left.source[image] == token].mean(0) for token in range(12 - r)]
        assert torch.allclose(merged[image, num_prefix:], torch.stack(means), atol=1e-6)


def test_energy_of_equal_and_of_orthogonal_tokens_is_that_of_the_equation() -> None:
    """Three equal tokens and one orthogonal to them, margin 0.5: ELU(0.5) is 0.5, ELU(-0.5) is exp(-0.5) - 1."""
    metric = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 2.0]]])
    apart = math.exp(-0.5) - 1
    expected = [(3 * 0.5 + apart) / 4] * 3 + [(0.5 + 3 * apart) / 4]
    assert torch.allclose(energy(metric, 0.5), torch.tensor([expected]))


def test_a_token_unlike_all_others_is_protected_from_its_most_similar_one() -> None:
    """Eight tokens of one kind and two others: those two have the least energy, and no candidate is one of them."""
    metric = torch.randn(1, 10, 16) * 0.05
    metric[0, :8, 0] += 1
    metric[0, 8, 1] = metric[0, 9, 2] = 1
    matching = energy_matching(metric, 4, 0.5, True, 0)
    assert not {8, 9} & set(matching.source[0].tolist())
    assert not {8, 9} & set(matching.destination[0].tolist())
    assert set(matching.order[0, :2].tolist()) == {8, 9}


def test_energies_by_rows_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(3, 50, 8, dtype=torch.float64)
    expected = energy(metric, 0.2)
    monkeypatch.setattr(pitome, "SIMILARITIES_AT_ONCE", 3 * 50 * 7)
    assert torch.allclose(energy(metric, 0.2), expected, atol=1e-12)


@pytest.mark.parametrize("protects", [True, False])
def test_matching_of_no_token_leaves_all_where_they_were(protects: bool) -> None:
    matching = energy_matching(torch.randn(2, 5, 4), 0, 0.5, protects, 1)
    assert matching.kept.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert matching.merged.shape == matching.into.shape == (2, 0)


@pytest.mark.parametrize(("tokens", "rate", "left"), [(196, 0.9, 177), (177, 0.9, 160), (9, 0.9, 9), (15, 0.5, 8)])
def test_a_block_loses_the_whole_part_of_its_share(tokens: int, rate: float, left: int) -> None:
    """196 at 0.9 lose 19 and 177 lose 17, as the official code prints; of nine no whole token is a tenth."""
    assert PiToMe.plan(1, keep_rate=rate)[0].count(tokens, 196) == left


def test_an_image_with_too_few_patches_to_lose_one_is_left_alone() -> None:
    model = effvit.sparsify(make_host("class_token", dynamic_img_size=True), "pitome", keep_rate=0.9).eval()
    assert model.token_counts((3, 3)) == [9] * 4
    assert not model.trace_tokens(torch.randn(1, 3, 24, 24))[-1].tokens.moved


@pytest.mark.parametrize(
    ("depth", "margins", "expected"),
    [
        (4, (0.75, 0.0), [0.75, 0.5625, 0.375, 0.1875]),  # DeiT: 0.75 (1 - i/L)
        (3, (0.9, 0.0), [0.9, 0.6, 0.3]),  # CLIP: 0.9 (1 - i/L)
        (4, (0.75, 0.35), [0.75, 0.65, 0.55, 0.45]),  # BLIP-2: 0.75 - 0.4 i/L
    ],
)
def test_margins_of_blocks_are_those_of_the_authors(
    depth: int, margins: tuple[float, float], expected: list[float]
) -> None:
    plan: dict[int, Any] = PiToMe.plan(depth, margins=margins)
    assert [reducer.margin for reducer in plan.values()] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("depth", "protect_at", "protecting"),
    [
        (4, None, [2, 3]),
        (5, None, [3, 4]),
        (4, (0, 1), [0, 1]),
        (4, (), []),
    ],
)
def test_the_second_half_of_the_blocks_protects_unless_others_are_named(
    depth: int, protect_at: tuple[int, ...] | None, protecting: list[int]
) -> None:
    """The official DeiT has the other rule in blocks i < ceil(L/2)."""
    plan: dict[int, Any] = PiToMe.plan(depth, protect_at=protect_at)
    assert [block for block, reducer in plan.items() if reducer.protects] == protecting


@pytest.mark.parametrize("prop_attn", [True, False])
def test_sizes_count_as_keys_only_if_asked_for(prop_attn: bool) -> None:
    model = make_model("pitome", "class_token", prop_attn=prop_attn)
    tokens = model.trace_tokens(make_images(model))[-1].tokens
    assert tokens.size is not None
    assert tokens.size[:, 1:].sum(1).tolist() == [tokens.num_patches] * len(tokens.size)
    assert (tokens.key_weight is None) != prop_attn


class TestRefusals:
    def test_more_than_half_of_the_tokens(self) -> None:
        message = r"pitome merges pairs, so keep_rate must be at least 0.5 in each block, got 0.4; merge in more blocks"
        with pytest.raises(ValueError, match=message):
            make_model("pitome", "class_token", keep_rate=[0.9, 0.9, 0.4, 0.9])
        model = make_model("pitome", "class_token")
        with pytest.raises(ValueError, match=message):
            model.set_keep_rate(0.4)
        assert model.settings["keep_rate"] == 0.8  # as it was

    @pytest.mark.parametrize("margins", [0.5, (0.5,), (0.5, 0.2, 0.1), "ab"])
    def test_margins_that_are_no_pair(self, margins: Any) -> None:
        with pytest.raises(ValueError, match=r"margins must be a (pair, of the first block|finite number)"):
            make_model("pitome", "class_token", margins=margins)

    @pytest.mark.parametrize("margin", [float("nan"), float("inf"), None, True])
    def test_margin_that_is_no_finite_number(self, margin: Any) -> None:
        with pytest.raises(ValueError, match="margins must be a finite number, got"):
            make_model("pitome", "class_token", margins=(margin, 0.0))

    def test_protecting_block_outside_the_depth(self) -> None:
        with pytest.raises(ValueError, match="protect_at names block 4, but the model has blocks 0 to 3"):
            make_model("pitome", "class_token", protect_at=(4,))
