"""ATC against its official code: clusters alone, and whole models with the partition of each block."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from golden_cases import Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit.reducers.atc import agglomerate, cosine_distances, number_clusters
from effvit.reducers.clusters import merge_clusters


def compare(case: Case) -> None:
    expect(case.config, checked=True)
    assert {*case.config["state_names"]} == case.state().keys()
    (compare_functions if "subcases" in case.config else compare_model)(case)


def compare_functions(case: Case) -> None:
    for number, row in enumerate(case.config["subcases"]):
        key, prefix = f"s{number}", int(row["class_token"])
        metric, x = case[f"{key}/metric"][:, prefix:], case[f"{key}/x"]
        size = case[f"{key}/size"].squeeze(-1)
        assert metric.shape[:2] == (row["B"], row["T"])
        first, cluster = number_clusters(agglomerate(cosine_distances(metric), row["K"], row["linkage"]), row["K"])
        case.equal(cluster, f"{key}/partition")
        assert torch.equal(cluster.gather(1, first), torch.arange(row["K"]).expand_as(first))
        merged, sizes = merge_clusters(x[:, prefix:], size[:, prefix:], size[:, prefix:], cluster, row["K"])
        # Officially labels are numbered in any order: those of the recording tell which row is which cluster.
        group = case[f"{key}/group"][:, prefix:].gather(1, first)  # (B, K)
        rows = case[f"{key}/merged"].gather(1, group.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        case.near(merged, rows, f"{key}/merged")
        case.near(sizes, case[f"{key}/merged_size"].squeeze(-1).gather(1, group), f"{key}/merged_size")


def compare_model(case: Case) -> None:
    config = case.config
    names = ("img_size", "embed_dim", "depth", "num_heads", "num_classes")
    norm = partial(nn.LayerNorm, eps=config["norm_eps_block"])
    expect(config, norm_eps_final=config["norm_eps_block"])
    host = VisionTransformer(patch_size=config["patch"], norm_layer=norm, **{name: config[name] for name in names})
    host.load_state_dict(case.state())
    options = {"linkage": config["linkage"], "prop_attn": config["prop_attn"]}
    model = effvit.sparsify(host.eval(), "atc", keep_rate=config["rate"], reduce_at=config["loc"], **options)
    with torch.no_grad():
        case.close(model(case["input"]), "output")
        trace = model.trace_tokens(case["input"])
    for block in config["loc"]:
        tokens = trace[block].tokens
        assert tokens.trail.step is not None
        assert tokens.trail.former is not None
        partition = tokens.trail.step.target(tokens.trail.patches[:, :1].expand(-1, tokens.trail.former.width))
        case.equal(partition, f"block{block}/partition")
        # Without proportional attention the official sizes are the numbers of tokens that this block merged.
        members = F.pad(F.one_hot(partition).sum(1).float(), (1, 0), value=1)
        sizes = tokens.size if config["prop_attn"] else members
        assert sizes is not None
        case.close(sizes.unsqueeze(-1), f"block{block}/size")
    case.equal(F.pad(trace[-1].tokens.source + 1, (1, 0)), "group")  # the class token's is 0
