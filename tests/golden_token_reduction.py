"""The methods of TokenReduction (2308.04657) against its official code: whole models, and what they decide inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.hosts.host import ReducedHost
from effvit.reducers import METHODS, kmedoids
from effvit.reducers.mixing import Mixture
from effvit.tokens import Step

__all__ = ["COMPARE", "build", "compare_model", "host_of", "stages"]

OWN = "cluster_layers."  # how the names of the parameters begin that a method adds officially


class Stage(NamedTuple):
    """What a model did before a block.

    Attributes:
        x: (B, P+K, C) tokens that enter the block.
        step: Where the tokens went.
        entering: (B, N) any int64, for as many tokens as there were before.
    """

    x: Tensor
    step: Step
    entering: Tensor


def host_of(case: Case) -> nn.Module:
    """timm's model with the official weights but for those of the method."""
    config = case.config
    sizes = {name: config[name] for name in ("img_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")}
    norm = partial(nn.LayerNorm, eps=config["norm_eps"])
    host = VisionTransformer(patch_size=config["patch"], norm_layer=norm, **sizes)
    assert {*config["state_names"]} == case.state().keys()
    host.load_state_dict({name: value for name, value in case.state().items() if not name.startswith(OWN)})
    return host.to(getattr(torch, config["dtype"])).eval()


def own_name(name: str, blocks: list[int]) -> str:
    """An official name -> ours: the j-th layer of the method sits in the j-th reducing block."""
    if not name.startswith(OWN):
        return name
    stage, _, rest = name.removeprefix(OWN).partition(".")
    return f"blocks.{blocks[int(stage)]}.reducer.{rest}"


def build(case: Case, **settings: Any) -> ReducedHost:
    """The model of the case under the method, made from the rate if it names one and held to the recorded counts."""
    config, host = case.config, host_of(case)
    blocks, counts, rates = config["reduction_loc"], config["counts"], config["keep_rate"]
    if len(rates) > 1:  # several are counts, not rates
        number = {"num_tokens": rates}
    else:  # methods whose weights have a row for each token are made with numbers alone
        number = {"keep_rate": rates[0]} if "keep_rate" in METHODS[case.method].defaults() else {"num_tokens": counts}
    model = effvit.sparsify(host, case.method, reduce_at=blocks, **number, **settings)
    assert isinstance(model, ReducedHost)
    assert [model.token_counts()[block] for block in blocks] == counts
    state = {own_name(name, blocks): value for name, value in case.state().items()}
    model.load_state_dict(state, strict=True)
    return model


def stages(model: ReducedHost, case: Case) -> list[Stage]:
    """What the model does before its reducing blocks."""
    entered: list[Tensor] = []
    blocks = case.config["reduction_loc"]
    hooks = [
        model.blocks[block].norm1.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
        for block in blocks
    ]
    with torch.no_grad():
        trace = model.trace_tokens(case["input"])
    for hook in hooks:
        hook.remove()
    found = []
    for x, block in zip(entered, blocks, strict=True):
        trail = trace[block].tokens.trail
        assert trail.step is not None
        assert trail.former is not None
        found.append(Stage(x, trail.step, trail.patches[:, :1].expand(-1, trail.former.width)))
    return found


def compare_model(case: Case, model: ReducedHost, check: Callable[[Case, str, Stage, float], None]) -> None:
    """Outputs, what ``check`` compares of each stage, and gradients."""
    expect(case.config, checked=True)
    limit = DOUBLE if case.config["dtype"] == "float64" else SINGLE
    model.train(case.training)
    with torch.no_grad():
        case.close(model(case["input"]), "output", limit)
    for number, stage in enumerate(stages(model, case)):
        check(case, f"stage{number}", stage, limit)
    recorded = [key for key in case.tensors if key.startswith("grad/")]
    assert bool(recorded) == (case.config["loss"] is not None)
    if recorded:
        model(case["input"]).square().sum().backward()
    for key in recorded:
        gradient = model.get_parameter(own_name(key.removeprefix("grad/"), case.config["reduction_loc"])).grad
        assert gradient is not None, key
        case.close(gradient, key)


# -- DPC-KNN ---------------------------------------------------------------------------------------------------


def check_clusters(case: Case, key: str, stage: Stage, limit: float) -> None:
    """Centres in their order, the cluster of each token and the merged tokens; the noise parts no two densities."""
    case.equal(stage.step.order, f"{key}/centers")
    case.equal(stage.step.target(stage.entering), f"{key}/cluster")
    case.close(stage.x[:, 1:], f"{key}/merged_f64", limit)


def compare_dpcknn(case: Case) -> None:
    settings = case.config["settings"]
    model = build(case, k=settings["k_neighbors"], equal_weight=settings["equal_weight"])
    compare_model(case, model, check_clusters)


# -- K-Medoids -------------------------------------------------------------------------------------------------


def check_medoids(case: Case, key: str, stage: Stage, limit: float) -> None:
    """Medoids in the order of the start, and the cluster of each token."""
    case.equal(stage.step.order, f"{key}/centers")
    case.equal(stage.step.target(stage.entering), f"{key}/cluster")


def compare_kmedoids(case: Case) -> None:
    settings = case.config["settings"]
    expect(case.config, empty_clusters=0)
    model = build(case, num_iters=settings["cluster_iters"], equal_weight=settings["equal_weight"])
    if not settings["equal_weight"]:
        compare_model(case, model, check_medoids)
        return
    first = np.random.RandomState(case.config["seed"]).randint(model.patch_embed.num_patches)
    with patch.object(kmedoids, "central_token", lambda distance: torch.full((len(distance), 1), first)):
        compare_model(case, model, check_medoids)


# -- PatchMerger and Sinkhorn ----------------------------------------------------------------------------------


def check_mixtures(case: Case, key: str, stage: Stage, limit: float) -> None:
    """The weights of all tokens in all mixtures, and in which mixture each token weighs most."""
    assert isinstance(stage.step, Mixture)
    case.close(stage.step.shares, f"{key}/soft", limit)
    if f"{key}/hard" in case:
        case.equal(stage.step.shares.argmax(1), f"{key}/hard")


def compare_patchmerger(case: Case) -> None:
    compare_model(case, build(case, scaled_attn=case.config["settings"]["scaled_attn"]), check_mixtures)


def compare_sinkhorn(case: Case) -> None:
    settings = case.config["settings"]
    model = build(case, eps=settings["sinkhorn_eps"], num_iters=settings["cluster_iters"])
    compare_model(case, model, check_mixtures)


COMPARE: dict[str, Callable[[Case], None]] = {
    "dpcknn": compare_dpcknn,
    "kmedoids": compare_kmedoids,
    "sinkhorn": compare_sinkhorn,
    "patchmerger": compare_patchmerger,
}
