"""Expedite against its official code: the two layers on maps, and inside the windows of a SAM encoder."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor

import effvit
from effvit.layers.windows import to_windows
from effvit.recover import reconstruct_tokens
from effvit.reducers.expedite import cluster_grid, cluster_tokens, nearest_centre
from effvit.tokens import flat_rows, take_rows


def compare(case: Case) -> None:
    case.evaluated()
    if "cls" in case.config["config"]:
        compare_encoder(case)
    else:
        compare_layers(case)


def tolerance(x: Tensor) -> float:
    return DOUBLE if x.dtype == torch.float64 else SINGLE


def compare_layers(case: Case) -> None:
    config, x = case.config["config"], case["input"]
    limit = tolerance(x)
    clusters = cluster_grid(config["num_spixels"])
    options = {"num_iters": config["n_iters"], "temperature": config["temperture"]}  # spelt so officially
    centres = cluster_tokens(x, clusters, **options, window_size=config["window_size"])
    case.close(centres, "inter/super_tokens", limit)
    patches, centres = x.flatten(1, 2), centres.flatten(1, 2)
    labels = nearest_centre(patches, centres)
    case.equal(labels, "inter/hard_labels")
    z = case["super_tokens_input"]
    mix = {"temperature": config["temperture"], "k": config["k"], "norm": "official"}
    case.close(reconstruct_tokens(z, patches, centres, **mix), "output", limit)
    case.close(reconstruct_tokens(centres, patches, centres, **mix), "inter/reconstructed_self", limit)
    case.close(take_rows(z, flat_rows(labels, z.shape[1])), "inter/naive_unpool", limit)


def hourglass(kwargs: dict[str, Any]) -> tuple[VisionTransformerSAM, dict[str, Any]]:
    """timm's encoder and the settings of ``expedite``, given the keywords of HourglassImageEncoderViT."""
    own = dict(kwargs)
    own["neck_chans"] = own.pop("out_chans")
    own.pop("rel_pos_zero_init", None)  # of no effect on loaded weights
    settings = {
        "cluster_at": own.pop("hourglass_clustering_location"),
        "num_clusters": own.pop("hourglass_num_cluster", 100),
        "temperature": own.pop("hourglass_temperture", 0.01),
        "num_iters": own.pop("hourglass_cluster_iters", 5),
        "window_size": own.pop("hourglass_cluster_window_size", 5),
        "k": own.pop("hourglass_reconstruction_k", 20),
        "norm": "official",
    }
    return VisionTransformerSAM(**own, num_classes=0, global_pool=""), settings


def record(model: Any, images: Tensor) -> dict[str, Tensor]:
    """All that the cases record."""
    found: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> None:
        found[name] = value

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, y, name=f"inter/blocks.{i}.out": note(name, y))
    first, (side, _) = model.blocks[model.span.first], model.span.cells
    first.register_forward_pre_hook(
        lambda m, args: note("inter/super_tokens", to_windows(args[0], side).unflatten(1, (side, side)))
    )
    model.neck.register_forward_pre_hook(lambda m, args: note("inter/neck_in", args[0]))
    found["output"] = model.forward_features(images)
    return found


def compare_encoder(case: Case) -> None:
    dtype = case["input"].dtype
    expect(case.config["config"], cls="HourglassImageEncoderViT")
    dense, settings = hourglass(case.config["config"]["kwargs"])
    state = {key.replace("mlp.lin", "mlp.fc"): value for key, value in case.state().items()}
    dense.load_state_dict(state)
    model = effvit.sparsify(dense.to(dtype).eval(), "expedite", **settings)
    with torch.no_grad():
        found = record(model, case["input"])
    recorded = [key for key in case.tensors if key == "output" or key.startswith("inter/")]
    for key in recorded:
        case.close(found[key], key, tolerance(found[key]))
