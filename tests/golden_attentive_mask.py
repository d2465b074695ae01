"""A-CLIP's attentive masking against its official code: masks of random crops, and a tower that is masked."""

from __future__ import annotations

from functools import partial

import torch
from golden_cases import SINGLE, Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.hosts.attentive_mask import attended_patches, mask_attentively, scores_in_view, tower_scores

GRID = (14, 14)


def removed(index: Tensor, number: int) -> Tensor:
    """(B, N) True for the patches that are not seen."""
    return torch.ones(len(index), number, dtype=torch.bool).scatter(1, index, False)


def compare(case: Case) -> None:
    if "attention" in case:
        compare_masks(case)
    else:
        compare_tower(case)


def compare_masks(case: Case) -> None:
    config = case.config
    seen, view = ([tuple(row) for row in case[key].tolist()] for key in ("ema_view", "crop"))
    scores = scores_in_view(case["attention"], GRID, seen, view)
    case.close(scores, "scores")
    index = attended_patches(scores, GRID, config["ratio"])
    assert index.shape == (config["batch"], config["kept_patches"])
    assert config["kept_patches"] == 4 * config["kept_blocks"]
    case.equal(removed(index, 196), "removed")


@torch.no_grad()
def compare_tower(case: Case) -> None:
    """The teacher here has the student's weights, and its whole view."""
    config = case.config
    case.evaluated()
    expect(config, dtype="float32")
    host = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
    )
    host.load_state_dict(case.state())
    teacher = effvit.sparsify(host, "tome", r=0).eval()
    scores = tower_scores(teacher, case["input"])
    case.close(scores, "scores")
    case.close(teacher.forward_features(case["input"])[:, 0], "teacher_class")
    student = mask_attentively(teacher, ratio=config["ratio"]).train()
    with student.token_drop.attending(scores):
        features = student.forward_tokens(case["input"])
    assert features.tokens.present is not None
    case.equal(removed(features.tokens.present, 196), "removed")
    case.close(features.x[:, 0], "student_class")
    case.near(features.x[:, 1:], case["student_tokens_in_image_order_f64"], "student tokens", SINGLE)
