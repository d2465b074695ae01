"""EViT: how many tokens are kept, and that keeping them all is the host."""

from __future__ import annotations

import pytest
import torch
from hosts import make_host, make_images, make_model


@pytest.mark.parametrize("num_tokens", [48, 60])
def test_absolute_number_beyond_the_patches_keeps_all_and_fuses_nothing(num_tokens: int) -> None:
    """With no token to sum up there is no fused one (section 3.1): counts and scores are those of timm's host."""
    model = make_model("evit", "class_token", num_tokens=num_tokens)
    x = make_images(model)
    assert model.token_counts() == [48] * 4
    assert torch.equal(model(x), make_host("class_token")(x))
