"""LV-ViT in closed form: what timm does not have and recorded cases meet only as a whole."""

from __future__ import annotations

import torch
from hosts import make_host, make_images


def test_scores_are_those_of_the_class_token_plus_half_the_largest_of_the_patches() -> None:
    """GTP's models/lvvit.py@97a1178: for each class apart the patch with the largest score."""
    model = make_host("lvvit")
    with torch.no_grad():
        x = model.forward_features(make_images(model))
        patches = torch.stack([model.aux_head(x[:, i]) for i in range(1, x.shape[1])])
        expected = model.head(x[:, 0]) + patches.max(dim=0).values / 2
        assert torch.allclose(model.forward_head(x), expected, atol=1e-6)


def test_residuals_are_divided_by_the_damping() -> None:
    block = make_host("lvvit").blocks[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        y = x + block.attn(block.norm1(x)) / 2
        assert torch.allclose(block(x), y + block.mlp(block.norm2(y)) / 2, atol=1e-6)
