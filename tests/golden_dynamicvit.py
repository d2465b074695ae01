"""DynamicViT against the authors' code and TokenReduction's, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.architectures.sit_distillation import score_loss
from effvit.hosts.checkpoints import load_checkpoint
from effvit.hosts.host import ReducedHost
from effvit.hosts.learnt_pruning import PrunedOutput, pruned_output
from effvit.reducers import dynamicvit
from effvit.reducers.dynamicvit import DynamicViT, hard_choice, kept_token_loss, ratio_loss

# What training records: the noise of a case is of one call, as the whole model.
GUMBEL = (
    "stageI/gumbel is the noise added to the log probabilities; decision = one-hot argmax (class 0 keeps), straight "
    "through"
)


def compare(case: Case) -> None:
    config = case.config
    expect(config, checked=True, tau=1.0, gumbel=GUMBEL)
    assert set(config["state_names"]) == case.state().keys() or "input" not in case
    for key in ("max_abs_error_f64", "min_margin", "min_adjacent_gap", "min_gumbel_gap", "max_rel_grad_error_f64"):
        assert config.get(key, 0) >= 0  # how near its decisions are, and how exact it is
    if "input" not in case:
        compare_functions(case)
        return
    model = make(case)
    (compare_training if case.training else compare_evaluation)(case, model)


def compare_functions(case: Case) -> None:
    """What a case without its model says of decisions and losses (``PARTS`` of tools/cut_golden.py)."""
    config = case.config
    expect(config, dtype="float32")
    assert case.training
    images, patches, channels = case["tokens"].shape
    assert (images, patches, channels) == (
        config["batch"], (config["img_size"] // config["patch"]) ** 2, config["embed_dim"],
    )  # fmt: skip
    assert case["output"].shape == (images, config["num_classes"])
    assert all(
        config[key] for key in ("depth", "num_heads", "mlp_ratio", "qkv_bias", "norm_eps", "predictor_eps_on_mean")
    )  # of the model that is not there
    reducers = DynamicViT.plan(config["depth"], keep_rate=config["rates_given"][0], reduce_at=config["pruning_loc"])
    rates = [reducer.rate for reducer in reducers.values() if isinstance(reducer, DynamicViT)]
    assert rates == config["token_ratio"]
    decisions: list[Tensor] = []
    for stage in range(len(rates)):
        choice = hard_choice(case[f"stage{stage}/log_prob_f64"].float(), case[f"stage{stage}/gumbel"])[..., 0]
        decisions.append(choice * decisions[-1] if decisions else choice)
    check_decisions(case, decisions)
    losses(case, PrunedOutput(case["output"], case["tokens"], tuple(decisions), tuple(rates)))


def check_decisions(case: Case, decisions: Sequence[Tensor]) -> None:
    for stage, decision in enumerate(decisions):
        case.close(decision, f"stage{stage}/decision")
        assert decision.mean().item() == pytest.approx(case.config["kept_fraction"][stage], rel=SINGLE)
    case.close(decisions[-1].unsqueeze(-1), "last_decision")


def make(case: Case) -> ReducedHost:
    """The model of a case, whose official weights are loaded from a file as a user would."""
    config = case.config
    dtype = getattr(torch, config["dtype"])
    host = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        num_classes=config["num_classes"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
    ).to(dtype)
    rates, blocks = config["rates_given"], config["pruning_loc"]
    settings: dict[str, Any] = {"keep_rate": rates, "progressive": False} if len(rates) > 1 else {"keep_rate": rates[0]}
    model = effvit.sparsify(host, "dynamicvit", reduce_at=blocks, mean_eps=config["predictor_eps_on_mean"], **settings)
    assert isinstance(model, ReducedHost)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "official.pth"
        torch.save({"model": case.state()}, path)
        assert load_checkpoint(model, path) == []
    return model


def reducers_of(model: ReducedHost) -> list[DynamicViT]:
    return [reducer for reducer in model.reducers.values() if isinstance(reducer, DynamicViT)]


def compare_evaluation(case: Case, model: ReducedHost) -> None:
    tolerance = DOUBLE if case.config["dtype"] == "float64" else SINGLE
    reducers = reducers_of(model)
    assert [reducer.rate for reducer in reducers] == case.config["token_ratio"]
    logits: list[Tensor] = []
    hooks = [r.predictor.register_forward_hook(lambda _m, _x, output: logits.append(output)) for r in reducers]
    model.eval()
    with torch.no_grad():
        case.close(model(case["input"]), "output", tolerance)
        del logits[:]
        trace = model.trace_tokens(case["input"])
    for hook in hooks:
        hook.remove()
    entered = torch.arange(trace[0].tokens.num_patches).expand(len(case["input"]), -1)
    for stage, (block, kept) in enumerate(zip(model.reducers, case.config["kept_per_stage"], strict=True)):
        case.close(logits[stage].log_softmax(-1), f"stage{stage}/log_prob", tolerance)
        tokens = trace[block].tokens
        assert tokens.num_tokens == kept
        place = (tokens.anchor.unsqueeze(2) == entered.unsqueeze(1)).int().argmax(2)
        case.equal(place, f"stage{stage}/kept")
        entered = tokens.anchor


def compare_training(case: Case, model: ReducedHost) -> None:
    reducers = reducers_of(model)
    assert [reducer.rate for reducer in reducers] == case.config["token_ratio"]
    noise = [case[f"stage{stage}/gumbel"] for stage in range(len(reducers))]
    x = case["input"].clone().requires_grad_()
    with patch.object(dynamicvit, "gumbel_noise", side_effect=noise):
        output = pruned_output(model.train(), x)
    case.close(output.logits, "output")
    case.close(output.tokens, "tokens")
    check_decisions(case, output.decisions)
    losses(case, output).backward()
    for key in case.tensors:
        if key.startswith("grad/"):
            name = key.removeprefix("grad/")
            if name.startswith("score_predictor."):
                stage, _, rest = name.removeprefix("score_predictor.").partition(".")
                name = f"blocks.{list(model.reducers)[int(stage)]}.reducer.predictor.{rest}"
            gradient = model.get_parameter(name).grad
            assert gradient is not None, key
            case.close(gradient, key)


def losses(case: Case, output: PrunedOutput) -> Tensor:
    """The loss of the case, whose parts are compared with those recorded."""
    weights = case.config["loss_weights"]
    parts = {
        "ce": F.cross_entropy(output.logits, case["labels"]),
        "ratio": ratio_loss(output.decisions, output.rates),
        "kd": score_loss(output.logits, case["teacher_logits"]),
        "token": kept_token_loss(
            output.tokens, case["teacher_tokens"], output.decisions[-1], "mse" if weights["mse"] else "kl"
        ),
    }
    for name, value in parts.items():
        assert value.item() == pytest.approx(case.config["loss_terms_f64"][name], rel=SINGLE), name
    scaled = [weights["cls" if name == "ce" else name] * value for name, value in parts.items()]
    total = torch.stack(scaled).sum()
    assert total.item() == pytest.approx(case.config["loss_terms_f64"]["total"], rel=SINGLE)
    case.close(total.reshape(1), "loss")
    return total
