"""TAP and ADL against their official code: the mixed tokens of a block, its attention and the loss with gradients."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.layers import Attention
from torch import Tensor, nn

from effvit.hosts.attention_diversity import SMALLEST, attention_similarity
from effvit.hosts.token_pooling import TokenAwarePooling


def compare(case: Case) -> None:
    if "subcases" in case.config:
        compare_losses(case)
    else:
        compare_block(case)


def compare_losses(case: Case) -> None:
    for i, row in enumerate(case.config["subcases"]):
        logits = case[f"s{i}/logits"].clone().requires_grad_()
        assert logits.shape == (row["blocks"], row["B"], row["heads"], row["N"], row["N"])
        maps = logits.softmax(-1)
        loss = sum(attention_similarity(weights, row["threshold"]) for weights in maps) / (row["blocks"] + SMALLEST)
        if row["squeeze_bug"]:  # the official loss of one image is wrong, and its gradients are
            case.close(loss.reshape(1), f"s{i}/loss_right")
            continue
        case.close(loss.reshape(1), f"s{i}/loss")
        (gradient,) = torch.autograd.grad(loss, logits)
        case.close(gradient, f"s{i}/grad_logits")


class RecordedBlock(nn.Module):
    """RVT's block with our pooling: without a class token, and with the convolutional MLP that is RVT's own."""

    def __init__(self, dim: int, grid: int, num_heads: int, hidden: int, num_scales: int, eps: float) -> None:
        super().__init__()
        self.grid = (grid, grid)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.pool = TokenAwarePooling(dim, self.grid, num_scales=num_scales)
        self.mlp = nn.ModuleDict(
            {
                **{"fc1": nn.Conv2d(dim, hidden, 1), "bn1": nn.BatchNorm2d(hidden)},
                "dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
                **{"bn2": nn.BatchNorm2d(hidden), "fc2": nn.Conv2d(hidden, dim, 1), "bn3": nn.BatchNorm2d(dim)},
            }
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) -> what enters norm1, the softmax map and the tokens that leave."""
        mixed = self.pool(x)
        y = self.norm1(mixed)
        q, k, _ = self.attn.qkv(y).unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.attn.scale).softmax(-1)
        x = x + self.attn(y)
        part = self.mlp
        h = part["bn1"](part["fc1"](self.norm2(x).transpose(1, 2).unflatten(2, self.grid)))
        h = part["bn3"](part["fc2"](F.gelu(part["bn2"](part["dwconv"](F.gelu(h))))))
        return mixed, weights, x + h.flatten(2).transpose(1, 2)


def compare_block(case: Case) -> None:
    config, state = case.config, case.state()
    dim, hidden = config["dim"], config["dim"] * config["mlp_ratio"]
    expect(config, block="TAPADL_RVT/tap_robust_models.py Block (RVT's convolutional MLP)")
    sizes = {"num_heads": config["num_heads"], "num_scales": config["num_scales"], "eps": config["norm_eps"]}
    block = RecordedBlock(dim, config["grid"], hidden=hidden, **sizes).to(case["input"].dtype)
    pooling = "dilation_predictor."
    block.load_state_dict({("pool." + k if k.startswith(pooling) else k): v for k, v in state.items()})
    block.train(case.training)
    tolerance = DOUBLE if case["input"].dtype == torch.float64 else SINGLE

    x = case["input"].clone().requires_grad_()
    maps = x.detach().transpose(1, 2).unflatten(2, block.grid)
    with torch.no_grad():
        case.close(copy.deepcopy(block.pool).scale_weights(maps).permute(0, 2, 3, 1), "scale_weights", tolerance)
    mixed, weights, out = block(x)
    case.near(mixed, case["mixed_f64"], "mixed_f64", tolerance)
    case.close(weights, "attention", tolerance)
    case.close(out, "output", tolerance)
    diversity = attention_similarity(weights, config["adl_threshold"]) / (1 + SMALLEST)
    case.close(diversity.reshape(1), "adl", tolerance)
    (out.square().mean() + diversity).backward()
    assert x.grad is not None
    case.close(x.grad, "grad_input", tolerance)
    for name in [key.removeprefix("grad/") for key in case.tensors if key.startswith("grad/")]:
        gradient = block.get_parameter("pool." + name if name.startswith(pooling) else name).grad
        assert gradient is not None
        case.close(gradient, f"grad/{name}", tolerance)
