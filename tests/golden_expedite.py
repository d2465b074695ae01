"""Expedite against its official code: the two layers on maps, and inside the windows of a SAM encoder."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer_sam import VisionTransformerSAM, window_partition, window_unpartition
from torch import Tensor, nn

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


class HourglassEncoder(nn.Module):
    """timm's SAM encoder with clusters in the windows from one block on, as HourglassImageEncoderViT."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__()
        own = dict(kwargs)
        own["neck_chans"] = own.pop("out_chans")
        own.pop("rel_pos_zero_init", None)  # of no effect on loaded weights
        self.location = own.pop("hourglass_clustering_location", -1)
        self.clusters = cluster_grid(own.pop("hourglass_num_cluster", 100))
        temperature = own.pop("hourglass_temperture", 0.01)
        self.clustering = {
            "num_iters": own.pop("hourglass_cluster_iters", 5),
            "temperature": temperature,
            "window_size": own.pop("hourglass_cluster_window_size", 5),
        }
        self.mixture = {
            "temperature": temperature,
            "k": own.pop("hourglass_reconstruction_k", 20),
            "norm": "official",
        }
        self.sam = VisionTransformerSAM(**own, num_classes=0, global_pool="")
        self.window = kwargs["window_size"]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """All that the cases record."""
        found: dict[str, Tensor] = {}
        x = self.sam.patch_embed(images)  # (B, H, W, C)
        x = x if self.sam.pos_embed is None else x + self.sam.pos_embed
        size, clustered = (x.shape[1], x.shape[2]), False
        for i, block in enumerate(self.sam.blocks):
            if i == self.location and self.clusters != (self.window, self.window):
                windows, padded = window_partition(x, self.window)
                centres = cluster_tokens(windows, self.clusters, **self.clustering)
                found["inter/super_tokens"] = centres
                side = self.clusters[0]
                small = (padded[0] // self.window * side, padded[1] // self.window * side)
                x, clustered = window_unpartition(centres, side, small), True
            if clustered and block.window_size:
                block.window_size = side  # get_rel_pos of timm resizes the tables linearly, as SAM's
            x = block(x)
            found[f"inter/blocks.{i}.out"] = x
        if clustered:
            z, _ = window_partition(x, side)
            full = reconstruct_tokens(z.flatten(1, 2), windows.flatten(1, 2), centres.flatten(1, 2), **self.mixture)
            x = window_unpartition(full.unflatten(1, (self.window, self.window)), self.window, size, padded)
        x = x.permute(0, 3, 1, 2)
        found["inter/neck_in"] = x
        found["output"] = self.sam.neck(x)
        return found


def compare_encoder(case: Case) -> None:
    dtype = case["input"].dtype
    expect(case.config["config"], cls="HourglassImageEncoderViT")
    encoder = HourglassEncoder(case.config["config"]["kwargs"]).to(dtype).eval()
    state = {key.replace("mlp.lin", "mlp.fc"): value for key, value in case.state().items()}
    encoder.sam.load_state_dict(state)
    with torch.no_grad():
        found = encoder(case["input"])
    recorded = [key for key in case.tensors if key == "output" or key.startswith("inter/")]
    for key in recorded:
        case.close(found[key], key, tolerance(found[key]))
