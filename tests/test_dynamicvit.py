"""DynamicViT: what predictors score, what training multiplies in, and what is told of weights that nobody trained.

Agreement with both official codes is in test_golden.py, the laws of every method in test_contract.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts import make_host, make_images, make_model
from timm.utils import ModelEmaV3
from torch import Tensor

import effvit
from effvit.attention import policy_softmax
from effvit.hosts.checkpoints import load_checkpoint
from effvit.hosts.learnt_pruning import check_learns_to_prune, dense_output, pruned_output
from effvit.reducers.dynamicvit import DynamicViT, KeepPredictor, hard_choice, kept_token_loss, ratio_loss

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7, "img_size": 64}


def predictors(model: Any) -> list[DynamicViT]:
    return [reducer for reducer in model.reducers.values() if isinstance(reducer, DynamicViT)]


class TestPredictor:
    def test_halved_layer_is_the_whole_one_on_both_halves(self) -> None:
        """The equations of the paper, written without the part that is one vector an image."""
        predictor, x = KeepPredictor(16).double(), torch.randn(2, 5, 16).double()
        decision = torch.tensor([[1.0, 1, 0, 1, 1], [0, 0, 1, 0, 1]]).double()
        features = predictor.in_conv(x)
        left = decision.unsqueeze(-1)
        mean = (features[..., 8:] * left).sum(1, keepdim=True) / left.sum(1, keepdim=True)
        expected = predictor.out_conv(torch.cat([features[..., :8], mean.expand(-1, 5, -1)], dim=-1))
        assert torch.allclose(predictor(x, decision), expected, atol=1e-12)
        assert torch.allclose(predictor(x), predictor(x, torch.ones(2, 5).double()), atol=1e-12)

    def test_image_that_keeps_no_patch_has_finite_logits(self) -> None:
        assert KeepPredictor(16)(torch.randn(2, 5, 16), torch.zeros(2, 5)).isfinite().all()

    def test_mean_eps_is_added_to_the_average_itself(self) -> None:
        """TokenReduction's 1e-6, here large enough to be seen: as if every feature of the average had it."""
        plain, shifted, x = KeepPredictor(8), KeepPredictor(8, mean_eps=0.5), torch.randn(1, 3, 8)
        shifted.load_state_dict(plain.state_dict())
        features = plain.in_conv(x)
        mean = features[..., 4:].mean(1, keepdim=True).expand(-1, 3, -1) + 0.5
        expected = plain.out_conv(torch.cat([features[..., :4], mean], dim=-1))
        assert torch.allclose(shifted(x), expected, atol=1e-6)

    def test_channels_that_cannot_be_halved_twice_are_refused(self) -> None:
        host = timm.create_model("vit_tiny_patch16_224", embed_dim=42, num_heads=3, depth=4)
        with pytest.raises(ValueError, match="must be a multiple of 4, got 42"):
            effvit.sparsify(host, "dynamicvit")


class TestEvaluation:
    @pytest.mark.parametrize(
        ("rate", "left"), [(0.5, [98, 49, 24]), (0.6, [117, 70, 42]), (0.7, [137, 96, 67]), (0.9, [176, 158, 142])]
    )
    def test_counts_are_the_official_ones_of_196_patches(self, rate: float, left: list[int]) -> None:
        """Those of both codes for DeiT at 224 px: powers of the rate, rounded down, of all patches."""
        with torch.device("meta"):
            model = timm.create_model("dynamicvit_deit_tiny_patch16_224", keep_rate=rate)
        assert model.token_counts() == [196] * 3 + [left[0]] * 3 + [left[1]] * 3 + [left[2]] * 3

    def test_listed_rates_are_shares_of_all_patches(self) -> None:
        model = make_model("dynamicvit", "class_token", keep_rate=(0.5, 0.25), progressive=False)
        assert model.token_counts() == [48, 24, 12, 12]
        assert model.settings["keep_rate"] == [0.5, 0.25]

    def test_kept_patches_are_those_of_the_largest_difference_of_logits(self) -> None:
        model = make_model("dynamicvit", "registers")
        x = make_images(model)
        trace, reducer = model.trace_tokens(x), predictors(model)[0]
        patches = trace[0].tokens.split(trace[0].x)[1]
        keep, drop = reducer.predictor(patches).unbind(-1)
        best = (keep - drop).argsort(dim=1, descending=True)[:, : trace[1].tokens.num_tokens]
        assert torch.equal(trace[1].tokens.anchor, best)

    def test_rate_above_the_one_before_keeps_all_that_are_left(self) -> None:
        model = make_model("dynamicvit", "class_token", keep_rate=(0.25, 0.5), progressive=False)
        assert model.token_counts() == [48, 12, 12, 12]
        assert model(make_images(model)).isfinite().all()

    def test_rate_of_no_patch_is_refused_but_on_hosts_of_any_size(self) -> None:
        with pytest.raises(ValueError, match="would leave 0 of 48 patch tokens in block 1"):
            effvit.sparsify(make_host("class_token"), "dynamicvit", keep_rate=0.01, reduce_at=(1,))
        model = effvit.sparsify(
            make_host("class_token", dynamic_img_size=True), "dynamicvit", keep_rate=0.01, reduce_at=(1,)
        )
        assert model.token_counts()[-1] == 1

    def test_keep_rate_can_change_after_training(self) -> None:
        model = make_model("dynamicvit", "class_token")
        model.set_keep_rate(0.5)
        assert model.token_counts() == [48, 24, 12, 12]
        assert model.settings == {"keep_rate": 0.5, "reduce_at": [1, 2], "progressive": True, "mean_eps": 0.0}

    def test_rates_that_differ_have_no_powers(self) -> None:
        """Neither code has them: a list is of shares of all patches there."""
        model = make_model("dynamicvit", "class_token")
        counts = model.token_counts()
        with pytest.raises(ValueError, match=r"must be one rate with progressive=True, .*got \[0.5, 0.4\]"):
            model.set_keep_rate([0.5, 0.4])
        assert model.token_counts() == counts
        shares = make_model("dynamicvit", "class_token", progressive=False)
        shares.set_keep_rate([0.5, 0.25])
        assert shares.token_counts() == [48, 24, 12, 12]

    @pytest.mark.parametrize("rates", [(0.5, 1.0, 0.25), (1.0, 0.5, 0.25)])
    def test_settings_with_a_rate_of_1_make_the_same_counts_after_another_rate(self, rates: tuple[float, ...]) -> None:
        model = make_model("dynamicvit", "class_token", keep_rate=rates, reduce_at=(1, 2, 3), progressive=False)
        for rate in (0.4, 1.0, None):
            model.set_keep_rate(rate)
            again = effvit.sparsify(make_host("class_token"), "dynamicvit", **model.settings)
            assert again.token_counts() == model.token_counts()

    def test_shares_are_told_when_a_reducer_was_taken_out_by_hand(self) -> None:
        """With powers the second block keeps as many patches without the first, which no settings say."""
        model = make_model("dynamicvit", "class_token", keep_rate=(0.5, 0.25), progressive=False)
        model.blocks[1].reducer = None
        assert model.settings["reduce_at"] == [2]
        again = effvit.sparsify(make_host("class_token"), "dynamicvit", **model.settings)
        assert again.token_counts() == model.token_counts() == [48, 48, 12, 12]

    def test_nan_names_the_image_and_the_block(self) -> None:
        model = make_model("dynamicvit", "class_token")
        x = make_images(model)
        x[1] = float("nan")
        with pytest.raises(ValueError, match="dynamicvit in block 1: scores of the predictor are NaN for image 1"):
            model(x)


class TestTraining:
    def test_policy_softmax_of_kept_tokens_is_the_plain_one(self) -> None:
        weights = torch.randn(2, 3, 5, 5).double().softmax(-1)
        assert torch.allclose(policy_softmax(weights, torch.ones(2, 5).double()), weights, atol=1e-6)

    def test_dropped_tokens_are_keys_for_themselves_alone(self) -> None:
        """Up to the 1e-6 of the official code: what the others see is the softmax among those that stay."""
        logits, policy = torch.randn(1, 2, 4, 4).double(), torch.tensor([[1.0, 0, 1, 0]]).double()
        edited = policy_softmax(logits.softmax(-1), policy)
        seen = (policy.unsqueeze(1) + torch.diag(1 - policy[0])).bool().unsqueeze(1)  # (1, 1, 4, 4)
        expected = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        assert torch.allclose(edited, expected, atol=1e-5)

    def test_gradient_of_a_policy_of_zero_is_not_zero(self) -> None:
        policy = torch.tensor([[1.0, 0, 1]], requires_grad=True)
        weights = torch.tensor([[0.2, 0.5, 0.3]]).expand(1, 1, 3, 3)
        policy_softmax(weights, policy)[..., 0, 1].sum().backward()
        assert policy.grad is not None
        assert policy.grad[0, 1] > 0.1

    def test_choice_is_the_largest_of_log_probability_and_noise(self) -> None:
        log_prob, noise = torch.tensor([[-0.1, -2.3]]).log_softmax(-1), torch.tensor([[0.0, 3.0]])
        assert hard_choice(log_prob, noise).tolist() == [[pytest.approx(0, abs=1e-6), pytest.approx(1)]]
        assert hard_choice(log_prob, -noise).tolist() == [[pytest.approx(1), pytest.approx(0, abs=1e-6)]]

    def test_dropped_patches_never_come_back(self) -> None:
        torch.manual_seed(3)
        model = make_model("dynamicvit", "class_token").train()
        first, second = pruned_output(model, make_images(model, batch=8)).decisions
        assert 0 < second.mean() < first.mean() < 1
        assert (second <= first + 1e-6).all()

    def test_scores_of_kept_patches_are_those_of_a_model_without_the_others(self) -> None:
        """With the decisions of evaluation in place of samples training gives its scores, up to the official 1e-6."""
        model = make_model("dynamicvit", "class_token").double()
        x, expected = make_images(model).double(), []
        with torch.no_grad():
            scores, trace = model(x), model.trace_tokens(x)
            carried = [(trace[block].tokens.source >= 0).double() for block in model.reducers]
            noise = [torch.stack([kept, 1 - kept], dim=-1) * 1e3 for kept in carried]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("effvit.reducers.dynamicvit.gumbel_noise", lambda _: noise[len(expected)])
                patch.setattr(DynamicViT, "decide", counted(DynamicViT.decide, expected))
                trained = model.train()(x)
        assert len(expected) == 2
        assert torch.allclose(trained, scores, atol=1e-4)

    @pytest.mark.parametrize("host", ["class_token", "average_pool", "attention_pool", "lvvit"])
    def test_dropped_patches_have_no_weight_in_the_head(self, host: str) -> None:
        """A policy of evaluation's choice: pools in training see what evaluation leaves."""
        model = make_model("dynamicvit", host).double()
        x = make_images(model).double()
        with torch.no_grad():
            features, tokens = model.train().forward_tokens(x)
            other = features.clone()
            assert tokens.policy is not None
            other[tokens.policy < 0.5] = 7.0
            tolerance = 1e-3 if host == "attention_pool" else 1e-9  # dropped ones weigh a millionth
            assert torch.allclose(
                model.token_scores(features, tokens), model.token_scores(other, tokens), atol=tolerance
            )

    def test_rate_of_1_drops_nothing_in_training_either(self) -> None:
        """The model is its host, and its predictors get gradients of zero, which DistributedDataParallel waits for."""
        host = make_host("class_token")
        model = effvit.sparsify(host, "dynamicvit", reduce_at=(1, 2)).train()
        model.set_keep_rate(1.0)
        x = make_images(model)
        assert torch.equal(model(x), host.train()(x))
        pruned = pruned_output(model, x)
        assert [decision.tolist() for decision in pruned.decisions] == [[[1.0] * 48] * len(x)] * 2
        assert ratio_loss(pruned.decisions, pruned.rates) == 0
        model(x).sum().backward()
        for reducer in predictors(model):
            assert all(p.grad is not None and not p.grad.any() for p in reducer.parameters())

    def test_block_of_rate_1_takes_the_decision_of_the_one_before(self) -> None:
        """Its loss asks for no more patches than that one may leave."""
        model = make_model("dynamicvit", "class_token", keep_rate=(0.5, 0.25), progressive=False).train()
        model.set_keep_rate([0.5, 1.0])
        pruned = pruned_output(model, make_images(model))
        assert torch.equal(*pruned.decisions)
        assert 0 < pruned.decisions[0].mean() < 1
        assert pruned.rates == (0.5, 0.5)

    def test_reducer_in_eval_mode_behind_one_that_trains_is_refused(self) -> None:
        """What the first has decided to drop would come back: it is still there, for the second to choose from."""
        model = make_model("dynamicvit", "class_token").train()
        first, second = predictors(model)
        second.eval()
        with pytest.raises(ValueError, match=r"dynamicvit in block 2 is in eval mode .* by train\(\) or eval\(\)"):
            model(make_images(model))
        first.eval(), second.train()
        x, tokens = model.forward_tokens(make_images(model))
        assert x.shape[1] == 1 + model.token_counts()[1]
        assert tokens.policy is not None

    def test_reducer_in_eval_mode_drops_patches_for_good_inside_a_model_that_trains(self) -> None:
        model = make_model("dynamicvit", "class_token").train()
        for reducer in predictors(model):
            reducer.eval()
        x, tokens = model.forward_tokens(make_images(model))
        assert x.shape[1] == 1 + model.token_counts()[-1]
        assert tokens.policy is None
        with pytest.raises(ValueError, match="in training mode alone"):
            pruned_output(model, make_images(model))

    def test_only_plain_hosts_under_the_method_have_its_losses(self) -> None:
        with pytest.raises(TypeError, match="reduced by dynamicvit, got VisionTransformer"):
            check_learns_to_prune(make_host("class_token"))
        with pytest.raises(TypeError, match="a head on its tokens"):
            check_learns_to_prune(make_model("dynamicvit", "qwen3"))
        with pytest.raises(ValueError, match="evit with these settings learns no decisions"):
            check_learns_to_prune(make_model("evit", "class_token"))


def counted(decide: Any, calls: list[int]) -> Any:
    """The method, of which each call leaves a mark behind."""

    def mark(*args: Any) -> Any:
        result = decide(*args)
        calls.append(1)
        return result

    return mark


class TestLosses:
    def test_ratio_loss_is_zero_at_the_rates(self) -> None:
        decisions = [torch.tensor([[1.0, 1, 1, 0]]), torch.tensor([[1.0, 1, 0, 0]])]
        assert ratio_loss(decisions, (0.75, 0.5)).item() == 0
        assert ratio_loss(decisions, (0.75, 1.0)).item() == pytest.approx(0.25 / 2)

    def test_token_loss_looks_at_kept_patches_alone(self) -> None:
        student, teacher, kept = torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.tensor([[1.0, 0, 1]])
        expected = torch.nn.functional.mse_loss(student[:, [0, 2]], teacher[:, [0, 2]])
        assert kept_token_loss(student, teacher, kept).item() == pytest.approx(expected.item())
        p, q = student[0, [0, 2]].softmax(-1), teacher[0, [0, 2]].softmax(-1)
        divergence = (q * (q / p).log()).sum(-1).mean()
        assert kept_token_loss(student, teacher, kept, "kl").item() == pytest.approx(divergence.item(), rel=1e-5)

    def test_token_loss_of_no_kept_patch_is_zero(self) -> None:
        student = torch.randn(1, 3, 4, requires_grad=True)
        loss = kept_token_loss(student, torch.randn(1, 3, 4), torch.zeros(1, 3))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(student.grad, torch.zeros(1, 3, 4))  # type: ignore[arg-type]

    def test_dense_output_is_what_timm_makes_of_the_images(self) -> None:
        host = make_host("class_token")
        x = make_images(host)
        logits, tokens = dense_output(host, x)  # type: ignore[arg-type]
        assert torch.equal(logits, host(x))
        assert torch.equal(tokens, host.forward_features(x)[:, 1:])


class TestWeights:
    MESSAGE = "predictors with random weights"

    def small(self, **settings: Any) -> Any:
        return timm.create_model("dynamicvit_deit_tiny_patch16_224", **TINY, **settings).eval()

    def run(self, model: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model(torch.randn(1, 3, 64, 64))
        return [str(warning.message) for warning in told]

    def train_a_step(self, model: Any) -> Any:
        """The model after a step of its predictors, in eval mode."""
        pruned = pruned_output(model.train(), torch.randn(2, 3, 64, 64))
        ratio_loss(pruned.decisions, pruned.rates).backward()
        torch.optim.SGD([p for reducer in predictors(model) for p in reducer.parameters()], lr=0.1).step()
        return model.eval()

    def test_new_predictors_are_told_of_and_trained_ones_are_not(self) -> None:
        model = self.small()
        told = self.run(model)
        assert len(told) == 3
        assert all(self.MESSAGE in message for message in told)
        assert self.run(model) == []  # they were looked at
        assert self.run(self.small().train().eval())
        assert self.run(self.train_a_step(self.small())) == []

    def test_average_of_weights_that_trained_is_not_told_of(self) -> None:
        """It stays in eval mode, and its weights are written in place."""
        model = self.small()
        average = ModelEmaV3(model, decay=0.5)
        average.update(self.train_a_step(model))
        assert self.run(average.module) == []
        assert self.run(effvit.sparsify(average.module, "dynamicvit", keep_rate=0.5)) == []

    def test_they_are_told_of_once(self) -> None:
        model = self.small()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for _ in range(2):
                model(torch.randn(1, 3, 64, 64))
        assert len(told) <= 1

    def test_file_of_the_host_leaves_them_new_and_one_of_the_model_does_not(self, tmp_path: Path) -> None:
        host = timm.create_model("deit_tiny_patch16_224", **TINY)
        torch.save(host.state_dict(), tmp_path / "host.pth")
        model = self.small()
        load_checkpoint(model, tmp_path / "host.pth")
        assert self.run(model)
        model = self.small()
        torch.save(self.train_a_step(self.small()).state_dict(), tmp_path / "own.pth")
        load_checkpoint(model, tmp_path / "own.pth")
        assert self.run(model) == []

    def test_official_predictors_without_a_block_are_named(self, tmp_path: Path) -> None:
        model = self.small(reduce_at=(1,))
        weights = timm.create_model("deit_tiny_patch16_224", **TINY).state_dict()
        for stage in range(2):
            own: dict[str, Tensor] = KeepPredictor(32).state_dict()
            weights |= {f"score_predictor.{stage}.{name}": value for name, value in own.items()}
        torch.save({"model": weights}, tmp_path / "official.pth")
        dropped = load_checkpoint(model, tmp_path / "official.pth")
        assert len(dropped) == 10
        assert all(name.startswith("score_predictor.1.") for name in dropped)
        kept = model.state_dict()["blocks.1.reducer.predictor.in_conv.1.weight"]
        assert torch.equal(kept, weights["score_predictor.0.in_conv.1.weight"])

    def test_they_stay_when_the_model_is_reduced_again(self) -> None:
        model = self.train_a_step(self.small())
        again = effvit.sparsify(model, "dynamicvit", keep_rate=0.5)
        for own, former in zip(predictors(again), predictors(model), strict=True):
            assert own.predictor.in_conv[1].weight is former.predictor.in_conv[1].weight
        assert self.run(again) == []

    def test_their_loss_to_another_method_is_told_of_once_they_have_learnt(self) -> None:
        model = self.small()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            effvit.sparsify(model, "evit")
        with pytest.warns(UserWarning, match="dynamicvit had learnt blocks.1.reducer.predictor"):
            effvit.sparsify(self.train_a_step(model), "evit")


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"keep_rate": 0}, r"keep_rate must be in \(0, 1\], got 0"),
            ({"keep_rate": (0.5, 1.2, 0.3)}, r"keep_rate must be in \(0, 1\], got 1.2"),
            ({"keep_rate": (0.5, 0.4)}, "keep_rate has 2 values for 3 blocks"),
            (
                {"keep_rate": (0.5, 1.0, 0.5)},
                r"must be one rate with progressive=True, .*got \[0.5, 1.0, 0.5\]; give one, or progressive=False",
            ),
            ({"progressive": 1}, "progressive must be True or False, got 1"),
            ({"mean_eps": -1e-6}, "mean_eps must be at least 0, got -1e-06"),
            ({"mean_eps": float("nan")}, "mean_eps must be a finite number"),
            ({"reduce_at": (3, 12)}, "reduce_at names block 12"),
        ],
    )
    def test_settings_out_of_range_are_named(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            DynamicViT.plan(12, **settings)

    def test_hosts_with_windows_are_refused(self) -> None:
        with pytest.raises((TypeError, ValueError), match="dynamicvit"):
            effvit.sparsify(timm.create_model("swin_tiny_patch4_window7_224"), "dynamicvit")
