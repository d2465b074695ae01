"""The linear head of mmseg, against its three steps written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmseg", reason="the mm extra is not installed")

from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from effvit.dense.linear_head import LinearHead

pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of.*:UserWarning")


def head(in_channels: int | list[int] = 6, **options: Any) -> LinearHead:
    init_default_scope("mmseg")
    torch.manual_seed(0)
    built = MODELS.build(
        {"type": "LinearHead", "in_channels": in_channels, "num_classes": 5, "norm_cfg": {"type": "BN"}, **options}
    )
    assert isinstance(built, LinearHead)
    return built


def test_scores_are_linear_in_the_normed_map() -> None:
    model, x = head(), torch.randn(2, 6, 4, 3)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    normed = (x - model.norm.running_mean.view(-1, 1, 1)) / (model.norm.running_var.view(-1, 1, 1) + 1e-5).sqrt()
    expected = torch.einsum("kc,bchw->bkhw", model.conv_seg.weight[:, :, 0, 0], normed)
    expected = expected + model.conv_seg.bias.view(-1, 1, 1)
    torch.testing.assert_close(model.eval()([x]), expected)


def test_dropout_takes_whole_channels_before_the_norm() -> None:
    """A channel left out is a constant under the norm of the batch, so what is left of it is the norm's bias."""
    model, x = head(dropout_ratio=0.5).train(), torch.randn(1, 6, 8, 8)
    seen: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    model([x])
    dropped = (seen[0] == 0).all((2, 3))
    assert 0 < dropped.sum() < 6
    torch.testing.assert_close(seen[0][~dropped], 2 * x[~dropped])
    assert head(dropout_ratio=0).dropout is None


def test_several_maps_are_resized_to_the_first_and_concatenated() -> None:
    model = head([2, 4]).eval()
    fine, coarse = torch.randn(1, 2, 8, 6), torch.randn(1, 4, 4, 3)
    both = torch.cat([fine, F.interpolate(coarse, (8, 6), mode="bilinear", align_corners=False)], dim=1)
    torch.testing.assert_close(model([fine, coarse]), model.conv_seg(model.norm(both)))
