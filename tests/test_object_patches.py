"""What is kept of an object: shares that are known exactly, from maps made by hand and from schedules."""

from __future__ import annotations

import pytest
import timm
import torch
from hosts import PAIRS, covered, make_host, make_images, make_model

import effvit
from effvit.measure.controls import control_of
from effvit.measure.object_patches import mean_object_patches, object_shares, sits_on
from effvit.measure.values import ObjectPatches
from effvit.reducers import METHODS
from effvit.tokens import Moved, TokenMap

MERGE_AND_DROP = ("diffrate", "vid_tldr")  # a token stands for several patches, and none for some


def full_map(patches: int = 6, batch: int = 1) -> TokenMap:
    return TokenMap.full(torch.zeros(batch, 1 + patches, 4), (2, patches // 2), 1, 1)


class TestMap:
    """Six patches in a map that is made by hand."""

    def test_every_patch_of_the_full_grid_is_a_token(self) -> None:
        assert sits_on(full_map()).all()

    def test_dropped_patches_are_no_tokens_and_not_represented(self) -> None:
        tokens = full_map().keep(torch.tensor([[1, 4]]), 2)
        assert sits_on(tokens).tolist() == [[False, True, False, False, True, False]]
        assert torch.equal(tokens.on_its_own(), sits_on(tokens))

    def test_of_merged_patches_one_is_a_token_and_all_are_represented(self) -> None:
        tokens = full_map().relabel(
            Moved(torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.tensor([[2, 3, 5]])), 3, keeps_every_patch=True
        )
        assert sits_on(tokens).tolist() == [[False, False, True, True, False, True]]
        assert tokens.on_its_own().all()

    def test_fused_token_sits_on_no_patch_and_represents_none(self) -> None:
        """It keeps the position of its first member, patch 0."""
        tokens = full_map().fuse(torch.tensor([[3, 5, 0]]), 2)
        assert sits_on(tokens).tolist() == [[False, False, False, True, False, True]]
        assert torch.equal(tokens.on_its_own(), sits_on(tokens))

    def test_padding_sits_on_no_patch_even_where_it_names_that_of_a_token(self) -> None:
        index, valid = torch.tensor([[1, 1, 4], [0, 2, 5]]), torch.tensor([[True, False, False], [True] * 3])
        tokens = full_map(batch=2).keep(index, 3, valid)
        assert sits_on(tokens).long().tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]]


class TestModels:
    def test_shares_are_coverage_of_what_is_left_over_coverage_of_all(self) -> None:
        """The uniform control says which of the 48 patches it keeps; the object covers patches 0, 1 and 2 in part."""
        model = effvit.sparsify(make_host("class_token"), "uniform", num_tokens=[24, 6], reduce_at=[1, 2])
        x = make_images(model)
        coverage = torch.zeros(len(x), 48)
        coverage[:, :3] = torch.tensor([0.5, 0.25, 1.0])
        shares = object_shares(model, x, coverage)
        for block, features in enumerate(model.trace_tokens(x)):
            left = {*features.tokens.anchor[0].tolist()}
            expected = sum(weight for patch, weight in enumerate((0.5, 0.25, 1.0)) if patch in left) / 1.75
            assert shares.tokens[:, block].tolist() == pytest.approx([expected] * len(x))
        assert torch.equal(shares.tokens, shares.represented)
        assert shares.tokens[0, 0] == 1
        assert shares.tokens[0, -1] < 1

    @pytest.mark.parametrize(("method", "host"), covered(PAIRS))
    def test_of_an_object_everywhere_the_share_of_tokens_is_their_number(self, method: str, host: str) -> None:
        """Counts are known apart from maps; merging keeps every patch represented, a control and dropping do not.

        EViT's fused token is one of the tokens, but stands for no patch. Methods that merge and drop represent more
        patches than they have tokens, but not all.
        """
        model = make_model(method, host)
        x = make_images(model)
        patches = model.patch_embed.num_patches
        shares = object_shares(model, x, torch.ones(len(x), patches))
        trace = [features.tokens for features in model.trace_tokens(x)]
        fused = [0 if tokens.fused is None else tokens.fused.sum(1) for tokens in trace]
        counts = torch.stack([tokens.counts() - own for tokens, own in zip(trace, fused, strict=True)], dim=1)
        assert torch.allclose(shares.tokens, counts.double() / patches)
        assert (shares.represented >= shares.tokens - 1e-12).all()
        if METHODS[method].keeps_every_patch:
            assert torch.allclose(shares.represented, torch.ones_like(shares.represented))
        elif method in MERGE_AND_DROP:
            last = shares.represented[:, -1]
            assert ((shares.tokens[:, -1] < last) & (last < 1)).all()
            assert (shares.represented.diff(dim=1) <= 0).all()  # what was dropped never comes back
            for represented, tokens in zip(shares.represented.unbind(1), trace, strict=True):
                if method == "diffrate":  # sizes count the patches of each token
                    assert torch.allclose(represented, tokens.size[:, tokens.num_prefix :].double().sum(1) / patches)
                else:  # weights count the parts of the patches that stand out, of which none is more than a patch
                    weights = tokens.key_weight[:, tokens.num_prefix :].double().sum(1) / patches
                    assert (weights <= represented + 1e-6).all()
        else:
            assert torch.allclose(shares.represented, shares.tokens)

    @pytest.mark.parametrize("method", ["ats", "dymu"])
    def test_packed_and_padded_batches_keep_the_same(self, method: str) -> None:
        packed, padded = (make_model(method, "class_token", ragged=way) for way in ("packed", "padded"))
        padded.load_state_dict(packed.state_dict())
        x = make_images(packed, batch=4)
        coverage = torch.rand(4, 48)
        for one, other in zip(object_shares(packed, x, coverage), object_shares(padded, x, coverage), strict=True):
            assert torch.equal(one, other)

    def test_expedite_that_restores_its_patches_has_all_again(self) -> None:
        model = make_model("expedite", "class_token", restore_at=3)
        x = make_images(model)
        shares = object_shares(model, x, torch.ones(len(x), 48))
        assert (shares.tokens[:, 1] == 0.5).all()  # 24 of 48 clusters
        assert (shares.represented == 1).all()
        assert (shares.tokens[:, 3] == 1).all()

    def test_control_is_followed_too(self) -> None:
        model = make_model("tome", "class_token")
        x = make_images(model)
        ones = torch.ones(len(x), 48)
        control = object_shares(control_of(model, seed=1), x, ones)
        method = object_shares(model, x, ones)
        assert torch.allclose(control.tokens, method.tokens)
        assert control.represented[0, -1] < method.represented[0, -1] == 1

    def test_mean_counts_every_image_once(self) -> None:
        model = make_model("hot", "class_token")
        x, coverage = make_images(model, batch=5), torch.rand(5, 48)
        found = mean_object_patches(model, [(x[:2], coverage[:2]), (x[2:], coverage[2:])])
        shares = object_shares(model, x, coverage)
        assert found == ObjectPatches(
            pytest.approx(shares.tokens.mean(0).tolist()), pytest.approx(shares.represented.mean(0).tolist()), 5
        )


class TestRefused:
    def test_model_whose_tokens_sit_on_no_patch(self) -> None:
        sit = timm.create_model("sit_lvvit_tiny_224")
        with pytest.raises(TypeError, match=r"a plain ViT that effvit.sparsify has reduced, .* those of a \w*SiT"):
            object_shares(sit, torch.zeros(1, 3, 224, 224), torch.ones(1, 196))
        with pytest.raises(TypeError, match="those of a VisionTransformer cannot be told"):
            object_shares(make_host("class_token"), torch.zeros(1, 3, 48, 64), torch.ones(1, 48))

    @pytest.mark.parametrize(
        ("coverage", "message"),
        [
            (torch.ones(2, 47), r"coverage must be \(2, 48\), a number for each patch of each image, got \(2, 47\)"),
            (torch.full((2, 48), torch.nan), "coverage must be finite and at least 0"),
            (torch.full((2, 48), -1.0), "coverage must be finite and at least 0"),
            (torch.eye(2, 48) * torch.tensor([[1.0], [0.0]]), "every image must show an object, but image 1 has"),
        ],
    )
    def test_coverage_that_weighs_nothing(self, coverage: torch.Tensor, message: str) -> None:
        model = make_model("hot", "class_token")
        with pytest.raises(ValueError, match=message):
            object_shares(model, make_images(model), coverage)

    def test_no_images(self) -> None:
        with pytest.raises(ValueError, match="there are no images to follow an object in"):
            mean_object_patches(make_model("hot", "class_token"), [])
