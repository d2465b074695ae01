"""Stages of tokens as arrays: states in closed form, and shares that agree with what the models themselves hand out."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from architectures import make_architecture, make_images

import effvit
from effvit.show.token_stages import ALONE, DROPPED, FUSED, MERGED, SOFT, Stage, trace_stages

# Case -> (block, tokens) of its stages, from the arguments of the small models.
SOFT_CASES = {
    "stvit": [(2, 9), (3, 9)],
    "stvit learned": [(2, 6), (3, 6), (4, 6)],
    "stvit recovery": [(2, 9)],
    "stvit_r_swin": [(3, 12)],
    "stvit_swin": [(7, 12)],
    "lookupvit": [(0, 6), (1, 6), (2, 6)],
    "lookupvit_softmax": [(0, 16), (1, 16), (2, 16)],
    "supertoken": [(1, 6), (2, 6)],
    "supertoken_options": [(1, 35), (2, 25), (4, 12)],
    "sit": [(1, 17), (2, 8), (3, 4)],
}


def test_states_of_patches():
    labels = np.array([[0, 1, 1], [-1, 2, 2]])
    assert Stage(0, 3, labels).states.tolist() == [[ALONE, MERGED, MERGED], [DROPPED, MERGED, MERGED]]
    fused = np.array([False, False, True])
    assert Stage(0, 3, labels, fused).states.tolist() == [[ALONE, MERGED, MERGED], [DROPPED, FUSED, FUSED]]
    assert Stage(0, 0, np.full((1, 2), -1), fused).states.tolist() == [[DROPPED, DROPPED]]
    assert (Stage(0, 3, labels, assignment=np.zeros((2, 3, 3))).states == SOFT).all()


@pytest.mark.parametrize("case", SOFT_CASES)
def test_soft_tokens_share_every_patch(case):
    stages = trace_stages(make_architecture(case), make_images(case)[:1])
    assert [(stage.block, stage.tokens) for stage in stages] == SOFT_CASES[case]
    for stage in stages:
        assert stage.soft
        assert stage.assignment.shape == (*stage.labels.shape, stage.tokens)
        assert (stage.assignment >= 0).all()
        assert np.array_equal(stage.labels, stage.assignment.argmax(-1))
        total = stage.assignment.sum(-1)
        if "supertoken" in case:  # of pixels at the border something goes to super tokens that do not exist
            assert (total <= 1 + 1e-5).all()
        else:
            assert np.abs(total - 1).max() < 1e-5


def test_shares_of_stvit_are_those_its_maps_are_made_of():
    model, x = make_architecture("stvit"), make_images("stvit")[:1]
    last = trace_stages(model, x)[-1]
    with torch.no_grad():
        tokens = model._run(x, num_blocks=4)[0][1]  # (1, 9, C), behind the last layer of the STGM
        (maps,) = model.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)
    assignment = torch.from_numpy(last.assignment).flatten(0, 1)
    torch.testing.assert_close(assignment @ tokens[0], maps[0], rtol=1e-4, atol=1e-5)


def test_shares_of_sit_are_those_its_maps_are_made_of():
    model, x = make_architecture("sit"), make_images("sit")[:1]
    last = trace_stages(model, x)[-1]
    with torch.no_grad():
        final, (maps,) = model.forward_intermediates(x, indices=1, output_fmt="NLC", norm=False)
        tokens = model._run(x)[0][:, model.num_prefix_tokens :]
    assignment = torch.from_numpy(last.assignment).flatten(0, 1)
    torch.testing.assert_close(assignment @ tokens[0], maps[0], rtol=1e-4, atol=1e-5)
    assert final.shape[1] == model.num_prefix_tokens + last.tokens


@pytest.mark.parametrize("case", ["supertoken", "supertoken_options"])
def test_largest_share_is_the_nearest_super_token(case):
    model, x = make_architecture(case), make_images(case)[:1]
    first = trace_stages(model, x)[0]
    assert np.array_equal(first.labels, model.super_tokens(x, stage=0).labels[0])


def test_stages_of_a_method_are_those_of_its_reducing_blocks():
    torch.manual_seed(0)
    model = effvit.sparsify(timm.create_model("deit_tiny_patch16_224", img_size=64), "evit", keep_rate=0.5)
    x = torch.randn(1, 3, 64, 64)
    stages = trace_stages(model, x)
    assert [stage.block for stage in stages] == list(model.reducers)
    maps = [features.tokens for features in model.eval().trace_tokens(x)]
    for stage in stages:
        assert not stage.soft
        assert np.array_equal(stage.labels, maps[stage.block].labels()[0])
        assert stage.tokens == int(maps[stage.block].counts())


def test_model_is_left_as_it_was():
    model = make_architecture("lookupvit").train()
    trace_stages(model, make_images("lookupvit")[:1])
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("case", ["sit_dense", "supertoken without cells"])
def test_model_that_reduces_nowhere_has_no_stages(case):
    name = case.split()[0]
    model = make_architecture(name)
    if name == "supertoken":
        model.set_stoken_size((1, 1, 1, 1))
    assert trace_stages(model, make_images(name)[:1]) == []


def test_model_without_tokens_to_trace_is_refused():
    with pytest.raises(TypeError, match=r"in STViT, .*SiT, got a CASViT; reduce it by a method first"):
        trace_stages(make_architecture("casvit"), make_images("casvit")[:1])


def test_windowed_semantic_tokens_are_refused():
    case = "stvit_r_swin dense"
    with pytest.raises(ValueError, match=r"key_windows='dense' attend inside of windows .* key_windows='inside'"):
        trace_stages(make_architecture(case), make_images(case)[:1])
