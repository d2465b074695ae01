"""Classifiers of mmpretrain on the small model and the garments that come with the package."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from effvit.data.preparation import load_images
from effvit.show.pictures import fashion_pictures

__all__ = ["NANO", "build_classifier", "garments", "train"]

NANO = "vit_nano_patch4_28"

Batch = tuple[Tensor, list[Any]]


def build_classifier(module: str, kind: str, **options: Any) -> Any:
    """A classifier of a module of ``effvit.dense`` for ten garments; the test is skipped without mmpretrain."""
    pytest.importorskip("mmpretrain", reason="the mm extra is not installed")
    from mmengine.registry import MODELS

    importlib.import_module(f"effvit.dense.{module}")
    torch.manual_seed(0)
    model = MODELS.build({"type": kind, "model_name": NANO, "data_preprocessor": {"num_classes": 10}, **options})
    model.init_weights()
    return model


def garments() -> Batch:
    """Twenty images of the package, as its small model takes them, and their labels."""
    from mmpretrain.structures import DataSample

    found = [*fashion_pictures().values()][::3]
    images = load_images(timm.create_model(NANO), [picture.image for picture in found])
    return images, [DataSample().set_gt_label(picture.label) for picture in found]


def train(model: Any, batch: Batch, lr: float) -> list[dict[str, float]]:
    """The losses of twelve steps on one batch."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    seen = []
    for _ in range(12):
        losses = model.loss(*batch)
        seen.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return seen
