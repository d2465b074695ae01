"""CAS-ViT: its two classifiers, its dense outputs and its published costs."""

from __future__ import annotations

import pytest
import timm
import torch
from architectures import make_architecture, make_images
from hosts import released
from torch import Tensor, nn

from effvit.architectures.casvit import AdditiveAttention, CASViT
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops

# Tianfang-Zhang/CAS-ViT@041d2d6 with fvcore: GMACs at 224 and 384, parameters; then the detectors' backbone at 512.
OFFICIAL = {
    "xs": (0.5541, 1.6268, 3_200_700, 2.8933, 2.7591),
    "s": (0.9228, 2.7098, 5_764_224, 4.8184, 5.2507),
    "m": (1.8743, 5.504, 12_421_520, 9.7856, 11.6522),
    "t": (3.5786, 10.5099, 21_763_120, 18.6851, 20.7381),
}


class Maps(nn.Module):
    """A dense model, for the counter."""

    def __init__(self, model: CASViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, intermediates_only=True)


@pytest.mark.parametrize("size", OFFICIAL)
def test_cost_is_that_of_the_official_code(size: str) -> None:
    small, large, parameters, _, _ = OFFICIAL[size]
    for pixels, gmacs in ((224, small), (384, large)):
        with torch.device("meta"):
            model = timm.create_model(f"casvit_{size}_{pixels}")
        assert sum(p.numel() for p in model.parameters()) == parameters
        closed_form = sum(closed_form_macs(model, (3, pixels, pixels)).values())
        assert closed_form / 1e9 == pytest.approx(gmacs, rel=0.001)


@pytest.mark.parametrize("size", released(OFFICIAL, ["xs"]))
def test_cost_of_maps_is_that_of_the_official_code(size: str) -> None:
    """On a trace, since closed forms are of models that classify."""
    _, _, _, gmacs, parameters = OFFICIAL[size]
    model = timm.create_model(f"casvit_{size}_224", out_norm=True)
    model.prune_intermediate_layers((0, 1, 2, 3), prune_norm=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=1e-4)
    assert count_flops(Maps(model), (3, 512, 512)).total / 1e9 == pytest.approx(gmacs, rel=0.001)


def test_both_classifiers_answer_in_training_and_their_mean_in_eval() -> None:
    model, x = make_architecture("casvit"), make_images("casvit")
    first, second = model.get_classifier()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(model(x), (first(pooled) + second(pooled)) / 2, atol=1e-6)
    scores = model.train()(x)
    assert isinstance(scores, tuple)
    assert [tuple(s.shape) for s in scores] == [(2, 7), (2, 7)]
    assert not torch.equal(*scores)
    model.set_distilled_training(False)
    assert torch.allclose(model(x), (scores[0] + scores[1]) / 2, atol=1e-5)


def test_one_classifier_answers_alone() -> None:
    model = make_architecture("casvit", distilled=False).train()
    x = make_images("casvit")
    assert model(x).shape == model.eval()(x).shape == (2, 7)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert not [name for name in model.state_dict() if "fc_dist" in name]
    with pytest.raises(ValueError, match="this CASViT has one classifier; create it with distilled=True"):
        model.set_distilled_training()


def test_both_classifiers_are_replaced_together() -> None:
    model, x = make_architecture("casvit"), make_images("casvit")
    model.reset_classifier(3)
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    assert [tuple(s.shape) for s in model.train()(x)] == [(2, 3), (2, 3)]
    model.reset_classifier(0, "")
    assert not [name for name in model.state_dict() if name.startswith("head")]
    assert model(x).shape == (2, 40, 3, 2)


def test_normalised_copies_go_out_and_the_map_goes_on_as_it_is() -> None:
    x = make_images("casvit", resized=True)
    plain, normed = make_architecture("casvit"), make_architecture("casvit", out_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    final, maps = normed.forward_intermediates(x)
    assert torch.equal(final, plain.forward_features(x))
    for before, norm, after in zip(plain.forward_intermediates(x)[1], normed.out_norms, maps, strict=True):
        assert torch.allclose(norm(before), after, atol=1e-5)
        assert not torch.allclose(before, after, atol=1e-3)


def test_a_pixel_reaches_far_through_the_channel_gates_only() -> None:
    # A gate, dwconv and proj, each 3 x 3, see three pixels each way (closed form).
    attn = AdditiveAttention(8).eval()
    x = torch.randn(1, 8, 15, 15)
    other = x.clone()
    other[..., 0, 0] += 1.0
    assert not torch.equal(attn(x)[..., 7:, 7:], attn(other)[..., 7:, 7:])
    for gates in (attn.gates_q, attn.gates_k):
        gates.channel = nn.Identity()
    assert torch.equal(attn(x)[..., 7:, 7:], attn(other)[..., 7:, 7:])


def test_each_channel_has_a_gate_of_its_own_behind_that_of_the_pixels() -> None:
    """The sigmoid of what the means of all channels give (rcvit.py@041d2d6), after the spatial gate."""
    gates, x = AdditiveAttention(8).eval().gates_q, torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        y = x * gates.spatial(x)
        gate = torch.sigmoid(y.mean((2, 3)) @ gates.channel[1].weight.flatten(1).T)
        assert torch.allclose(gates(x), y * gate[:, :, None, None], atol=1e-6)


def test_a_depth_for_each_stage_is_required() -> None:
    with pytest.raises(ValueError, match=r"depths needs one value for each of the 4 stages, got \[1, 2\]"):
        CASViT(depths=(1, 2))
